"""Which models share a reference, and which responses share a key."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from rich.console import Console
from transformers import AutoModelForCausalLM

from fastdpo.data.store.digests import response_keys
from fastdpo.model.policy import Policy
from fastdpo.model.support import prepare
from fastdpo.records import PreferenceGroup, Response
from fastdpo.reference import fingerprint
from fastdpo.reference.fingerprint import reference_fingerprint
from tests import tiny

QUIET = Console(quiet=True)


def with_lora(policy, rank=4, targets="all-linear", **keys):
    lora = LoraConfig(r=rank, target_modules=targets, task_type="CAUSAL_LM", **keys)
    return Policy(get_peft_model(policy.model, lora), policy.dtype)


def learn(policy):
    """Moves the adapter away from its start, where it does nothing."""
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in policy.model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    return policy


def namespace(policy, fresh_lora=False):
    return reference_fingerprint(policy, fresh_lora).namespace


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])  # gpt2's head is tied to its embedding
def test_a_fresh_lora_of_any_rank_refers_to_the_model_itself(model_type):
    plain = namespace(tiny.policy(model_type))
    assert len(plain) == 32 and int(plain, 16)
    assert namespace(with_lora(tiny.policy(model_type), 2), fresh_lora=True) == plain
    every = dict(targets=["c_attn"] if model_type == "gpt2" else ["q_proj", "lm_head"], rank=8)
    assert namespace(learn(with_lora(tiny.policy(model_type), **every)), fresh_lora=True) == plain


def test_the_same_model_from_any_folder_and_in_any_state_is_the_same_reference(tmp_path):
    policy = tiny.policy()
    before = namespace(policy)
    policy.model.save_pretrained(tmp_path / "there")
    loaded = Policy(AutoModelForCausalLM.from_pretrained(tmp_path / "there"), torch.float32)
    assert namespace(loaded) == before
    prepare(loaded, tiny.groups(), QUIET)
    assert loaded.share
    loaded.model.train().gradient_checkpointing_enable({"use_reentrant": False})
    assert namespace(loaded) == before


def test_dropout_that_training_switches_off_does_not_count():
    policy = tiny.policy("gpt2")
    before = namespace(policy)
    policy.core.config.attn_pdrop = policy.core.config.resid_pdrop = 0.1
    assert namespace(policy) == before


def test_special_tokens_that_a_trainer_sets_do_not_count():
    policy = tiny.policy()
    before = namespace(policy)
    config = policy.core.config
    config.bos_token_id, config.eos_token_id, config.pad_token_id = None, [2, 7], 2
    assert namespace(policy) == before


def test_one_changed_weight_is_another_reference():
    policy = tiny.policy()
    before = namespace(policy)
    for parameter in policy.model.parameters():
        with torch.no_grad():
            kept = parameter.view(-1)[-1].clone()
            parameter.view(-1)[-1] = torch.nextafter(kept, kept + 1)
            assert namespace(policy) != before
            parameter.view(-1)[-1] = kept
    assert namespace(policy) == before


def test_weights_that_change_places_are_another_reference():
    policy = tiny.policy()
    before = namespace(policy)
    first, second = (layer.self_attn.q_proj for layer in policy.core.model.layers)
    first.weight, second.weight = second.weight, first.weight
    assert namespace(policy) != before


@pytest.mark.parametrize(
    "overrides", [dict(rms_norm_eps=1e-5), dict(rope_parameters={"rope_type": "default", "rope_theta": 5e5})]
)
def test_what_the_config_makes_of_the_weights_counts(overrides):
    assert namespace(tiny.policy(**overrides)) != namespace(tiny.policy())


def test_dtypes_count():
    seen = {namespace(tiny.policy()), namespace(tiny.policy(dtype=torch.bfloat16))}
    policy = tiny.policy()
    policy.dtype = torch.bfloat16  # fp32 weights, bf16 computation
    assert len(seen | {namespace(policy)}) == 3


def test_what_happens_to_the_logits_counts():
    policy = tiny.policy()
    seen = {namespace(policy)}
    for change in (dict(scale=0.5), dict(softcap=30.0), dict(softcap=31.0)):
        other = tiny.policy()
        other.head = replace(other.head, **change)
        seen.add(namespace(other))
    assert len(seen) == 4


def test_our_own_numerics_count(monkeypatch):
    before = namespace(tiny.policy())
    monkeypatch.setattr(fingerprint, "NUMERICS_VERSION", 2)
    assert namespace(tiny.policy()) != before


def test_an_adapter_that_has_learnt_counts():
    base = namespace(tiny.policy())
    policy = learn(with_lora(tiny.policy()))
    learnt = namespace(policy)
    assert learnt != base
    assert namespace(learn(with_lora(tiny.policy()))) == learnt
    seen = {base, learnt}
    seen.add(namespace(learn(with_lora(tiny.policy(), lora_alpha=5))))
    seen.add(namespace(learn(with_lora(tiny.policy(), use_rslora=True))))
    seen.add(namespace(learn(with_lora(tiny.policy(), use_dora=True))))
    with torch.no_grad():
        next(p for n, p in policy.model.named_parameters() if "lora_A" in n).view(-1)[0] += 1e-3
    seen.add(namespace(policy))
    assert len(seen) == 6


def test_where_an_adapter_sits_counts():
    """The same tensors on another layer: only their names tell."""
    seen = set()
    for layer in (0, 1):
        policy = with_lora(tiny.policy(), targets=["q_proj"], layers_to_transform=[layer])
        with torch.no_grad():
            for name, parameter in policy.model.named_parameters():
                if "lora_" in name:
                    parameter.fill_(0.1)
        policy.model.peft_config["default"].layers_to_transform = None
        seen.add(namespace(policy))
    assert len(seen) == 2


def test_an_adapter_is_the_same_from_any_folder(tmp_path):
    from peft import PeftModel

    policy = learn(with_lora(tiny.policy()))
    policy.model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(tiny.policy().model, tmp_path / "adapter", is_trainable=True)
    assert namespace(Policy(loaded, torch.float32)) == namespace(policy)


def test_large_tensors_are_hashed_in_pieces(monkeypatch):
    policy = tiny.policy()
    monkeypatch.setattr(fingerprint, "_PIECE_BYTES", 100)  # no multiple of a row
    before = namespace(policy)
    with torch.no_grad():
        policy.core.model.embed_tokens.weight[-1, -1] += 1
    assert namespace(policy) != before


def test_the_differing_parts_have_names():
    plain, other = (reference_fingerprint(p, False) for p in (tiny.policy(), tiny.policy(rms_norm_eps=1e-5)))
    assert plain.differs_from(other.parts) == ["config"] and not plain.differs_from(plain.parts)
    assert "weights" in plain.differs_from({})


def sequence(prompt, ids, mask=None):
    mask = np.ones(len(ids), bool) if mask is None else np.array(mask, bool)
    response = Response(np.array(ids, np.int64), mask)
    return PreferenceGroup(0, np.array(prompt, np.int64), (response,), ())


def test_where_the_prompt_ends_does_not_matter_only_what_is_scored():
    (key,) = response_keys(sequence([5, 6, 7], [8, 9]))
    assert response_keys(sequence([5, 6], [7, 8, 9], [0, 1, 1])) == [key]
    others = [
        sequence([5, 6], [7, 8, 9]),  # scored from another token on
        sequence([5, 6, 7], [8, 9], [0, 1]),
        sequence([5, 6, 7], [8, 10]),
        sequence([5, 7, 6], [8, 9]),
        sequence([5, 6 + 2**16, 7], [8, 9]),
        sequence([5, 6, 7], [8, 9, 0], [1, 1, 0]),
    ]
    assert len({k for group in others for k in response_keys(group)} | {key}) == len(others) + 1


def test_each_response_has_its_key_in_order():
    group = tiny.groups()[2]
    alone = [replace(group, responses=(r,), pairs=()) for r in group.responses]
    assert response_keys(group) == [key for one in alone for key in response_keys(one)]
    assert all(len(key) == 16 for key in response_keys(group))
