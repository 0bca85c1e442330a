"""Starting from a peft adapter folder: it is trained on, and base + adapter is the reference."""

import io
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

from fastdpo.config.keys import Config
from fastdpo.data.groups import Limits
from fastdpo.data.load import load_groups
from fastdpo.data.packing import pack
from fastdpo.errors import ConfigError, ModelError
from fastdpo.model.loading import load_model_config, load_policy, load_tokenizer
from fastdpo.model.saving import save_model
from fastdpo.model.support import prepare
from tests import tiny
from tests.rounding import is_tie, model_ulps
from tests.training.test_trainer import QUIET, Run


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """A run that has trained a LoRA."""
    torch.manual_seed(0)
    return Run(tmp_path_factory.mktemp("first"), lora_rank=4, learning_rate=1e-2, max_steps=10)


@pytest.fixture
def adapter(first, tmp_path):
    """A copy of that run's adapter folder, to break."""
    return shutil.copytree(first.folder / "model", tmp_path / "adapter")


def edit(folder: Path, **values) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def config_of(first, adapter, **keys) -> Config:
    keys = dict(model=first.start, adapter=adapter and str(adapter), dtype="fp32") | keys
    return Config(**keys, data="x", max_length=64)


def load(config: Config):
    """(the policy, what was printed)"""
    console = Console(file=io.StringIO(), width=10**4)
    return load_policy(config, console), console.file.getvalue()


@torch.no_grad()
def logps(model, groups):
    """The definition: one full-logits forward a response; scored tokens, f32[M]."""
    out = []
    for g, r in ((group, response) for group in groups for response in group.responses):
        ids = torch.tensor([[*g.prompt, *r.ids]])
        scores = model(ids).logits[0, :-1].float().log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
        out.append(scores[len(g.prompt) - 1 :][torch.from_numpy(r.target_mask)])
    return torch.cat(out)


def new_adapter(folder, base, **settings):
    """An adapter on a model, with random weights wherever it has any; returns the model with it."""
    settings = dict(r=4, target_modules="all-linear", task_type="CAUSAL_LM") | settings
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(**settings))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    return model.eval()


def test_modules_may_be_pefts_own_choice(first):
    policy, _ = load(config_of(first, None, lora_rank=2, lora_target_modules="peft"))
    model = policy.model
    found = {name.split(".")[-2] for name, _ in model.named_modules() if name.endswith("lora_A")}
    assert found == {"q_proj", "v_proj"}  # of Llama


def test_a_chat_template_may_be_given_as_text(first, tmp_path):
    (tmp_path / "t.jinja").write_text(text := "{% for m in messages %}<{{ m.content }}>{% endfor %}")
    for given in (text, str(tmp_path / "t.jinja")):
        tokenizer = load_tokenizer(config_of(first, None, chat_template=given))
        assert tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False) == "<a>"


# ---- the run


@pytest.mark.parametrize("key", ["adapter", "model"])
def test_a_run_goes_on_from_it_and_refers_to_it(first, tmp_path, key):
    folder = first.folder / "model"
    keys = dict(model=first.start) | {key: str(folder)}
    run = Run(tmp_path, learning_rate=1e-2, max_steps=10, **keys)
    assert run.evals[0]["eval_rewards/margins"] == 0
    assert is_tie(run.steps[0])  # training rows are packed otherwise: rounding
    assert run.evals[-1]["eval_rewards/margins"] > 0.05

    tokenizer = AutoTokenizer.from_pretrained(first.start)
    limits = Limits(64, "keep_start")
    groups, _ = load_groups(run.config.eval_data, tokenizer, limits, strict=True, console=QUIET)
    base = AutoModelForCausalLM.from_pretrained(first.start)
    chosen = lambda model: float(logps(model, [g.only_chosen() for g in groups]).sum()) / len(groups)
    at_base, at_start = chosen(base), chosen(PeftModel.from_pretrained(base, folder))
    assert run.evals[0]["eval_logps/chosen"] == pytest.approx(at_start, abs=1e-3)
    assert abs(at_base - at_start) > 0.1  # so a reference without the adapter would show
    saved = AutoPeftModelForCausalLM.from_pretrained(run.folder / "model")
    assert run.evals[-1]["eval_logps/chosen"] == pytest.approx(chosen(saved), abs=1e-3)
    assert not (run.folder / "model/model.safetensors").exists()
    settings = json.loads((run.folder / "model/adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == first.start and settings["r"] == 4


@pytest.mark.filterwarnings("error:The PEFT config's `base_model_name_or_path`")  # said once, by us
def test_what_it_starts_from_is_said(first, adapter):
    _, said = load(config_of(first, adapter))
    assert f"starting from the adapter {adapter} on {first.start}; a run's reference is both" in said
    edit(adapter, base_model_name_or_path="a/model")
    policy, said = load(config_of(first, adapter))
    assert f"on {first.start} (it was trained on a/model)" in said
    assert policy.model.peft_config["default"].base_model_name_or_path == first.start


def test_lora_dropout_is_off_in_training_and_back_in_the_saved_adapter(first, adapter, tmp_path):
    edit(adapter, lora_dropout=0.3)
    policy, said = load(config_of(first, adapter))
    assert "dropout set to 0 for training: lora_dropout (was 0.3)" in said
    batch = pack(tiny.groups(), policy.share)
    assert policy.model.training and torch.equal(policy.token_logp(batch), policy.token_logp(batch))
    save_model(policy, tiny.tokenizer(), tmp_path / "saved")
    assert json.loads((tmp_path / "saved/adapter_config.json").read_text())["lora_dropout"] == 0.3


def test_bf16_keeps_what_is_trained_in_fp32(first, tmp_path):
    new_adapter(tmp_path / "adapter", first.start, modules_to_save=["norm"])
    policy, _ = load(config_of(first, tmp_path / "adapter", dtype="bf16"))
    assert {p.dtype for p in policy.trained()} == {torch.float32}
    assert {p.dtype for p in policy.model.parameters() if not p.requires_grad} == {torch.bfloat16}


VARIANTS = {
    "rslora": dict(use_rslora=True),
    "dora": dict(use_dora=True),
    "head": dict(target_modules=["q_proj", "lm_head"]),
    "embeddings": dict(target_modules=["q_proj", "embed_tokens"]),
    "one on both ends": dict(target_modules=["q_proj", "embed_tokens"], ensure_weight_tying=True),
    "whole head": dict(modules_to_save=["lm_head"]),
    "whole embeddings": dict(modules_to_save=["embed_tokens"]),
    "pissa": dict(init_lora_weights="pissa"),
}


@pytest.mark.filterwarnings("ignore")  # peft's, on embeddings
@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize("name", VARIANTS)
def test_adapters_of_others_are_read_and_saved_as_peft_does(tmp_path, name, tie):
    base = tiny.save_model(tmp_path / "base", tie_word_embeddings=tie)
    theirs, groups = new_adapter(tmp_path / "adapter", base, **VARIANTS[name]), tiny.groups()
    keys = dict(model=base, adapter=str(tmp_path / "adapter"), max_length=64, dtype="fp32")
    policy = load_policy(Config(**keys, data="x"), QUIET)
    assert len(policy.trained()) == sum(p.requires_grad for p in theirs.parameters())
    prepare(policy, groups, QUIET)
    ours = lambda: policy.token_logp(pack(groups, policy.share))
    theirs = logps(theirs, groups)
    torch.testing.assert_close(ours(), theirs, rtol=0, atol=model_ulps(theirs))
    ours().sum().backward()
    for parameter in policy.trained():
        assert parameter.grad is not None
        parameter.data += 0.01 * torch.randn_like(parameter)
    save_model(policy, tiny.tokenizer(), tmp_path / "saved")
    again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "saved")
    again = logps(again, groups)
    torch.testing.assert_close(again, ours().detach(), rtol=0, atol=model_ulps(again))


# ---- the tokenizer


def test_the_tokenizer_is_the_adapter_s_where_it_has_one(first, adapter):
    tokenizer = AutoTokenizer.from_pretrained(adapter)
    tokenizer.add_tokens(["<extra>"])
    tokenizer.save_pretrained(adapter)
    assert "<extra>" in load_tokenizer(config_of(first, adapter)).get_vocab()
    for path in adapter.glob("tokenizer*"):
        path.unlink()
    assert "<extra>" not in load_tokenizer(config_of(first, adapter)).get_vocab()


# ---- what is refused


def no_weights(folder):
    (folder / "adapter_model.safetensors").unlink()


def pickled(folder):
    no_weights(folder)
    torch.save({}, folder / "adapter_model.bin")


def damaged(folder):
    (folder / "adapter_model.safetensors").write_bytes(b"12345678")


def dora_on_the_head(folder):
    base = json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]
    new_adapter(folder, base, target_modules=["lm_head"], use_dora=True)


REFUSED = {
    "nothing": (shutil.rmtree, "adapter: .* does not exist here; give the folder of a peft adapter"),
    "no JSON": (lambda f: (f / "adapter_config.json").write_text("{"), "cannot read adapter_config.json"),
    "a list": (lambda f: (f / "adapter_config.json").write_text("[]"), "peft_type None"),
    "another kind": (lambda f: edit(f, peft_type="PREFIX_TUNING"), "PREFIX_TUNING; only LORA"),
    "alora": (lambda f: edit(f, alora_invocation_tokens=[1]), "alora_invocation_tokens.* not supported"),
    "newer": (lambda f: edit(f, use_magic=True), "use_magic.*update peft"),
    "pickle": (pickled, "only adapter_model.bin, a pickle"),
    "no weights": (no_weights, "there is none; save it with"),
    "damaged": (damaged, "weights in adapter_model.safetensors that are cut short or damaged"),
    "dora on the head": (dora_on_the_head, "use_dora on the lm_head"),
}


@pytest.mark.filterwarnings("ignore")  # peft's, on embeddings
@pytest.mark.parametrize("name", REFUSED)
def test_refused(first, adapter, name):
    spoil, message = REFUSED[name]
    spoil(adapter)
    with pytest.raises(ModelError, match=message):
        load(config_of(first, adapter))


def test_a_sound_one_is_not_refused(first, adapter):
    load(config_of(first, adapter))


@pytest.mark.parametrize("key", ["lora_rank", "lora_alpha"])
def test_its_rank_is_its_own(first, adapter, key):
    with pytest.raises(ConfigError, match=f"{key}: the adapter .* has its own"):
        load_model_config(config_of(first, adapter, **{key: 8}))


def test_pure_bf16_is_of_whole_models(first, adapter):
    with pytest.raises(ConfigError, match="pure_bf16: a LoRA's weights stay in fp32"):
        load_model_config(config_of(first, adapter=None, model=str(adapter), dtype="auto", pure_bf16=True))


def test_an_adapter_on_an_adapter(first, adapter, tmp_path):
    with pytest.raises(ConfigError, match=r"is a peft adapter already(.|\n)*give as model the base"):
        load_tokenizer(config_of(first, adapter, model=str(adapter)))
    second = shutil.copytree(adapter, tmp_path / "second")
    edit(second, base_model_name_or_path=str(adapter))
    with pytest.raises(ModelError, match="is an adapter itself"):
        load_tokenizer(config_of(first, None, model=str(second)))


def test_a_folder_that_does_not_name_its_base(first, adapter):
    config = config_of(first, None, model=str(adapter))
    edit(adapter, base_model_name_or_path=None)
    with pytest.raises(ModelError, match="does not say what its base is; set model to the base"):
        load_model_config(config)
    edit(adapter, base_model_name_or_path="no/such-model")
    named = r"'no/such-model', the base of the adapter .*, is neither a folder here nor in the hub's cache"
    with pytest.raises(ModelError, match=named):
        load_model_config(config)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        (dict(hidden_size=32), "size mismatch for .*q_proj"),
        (dict(num_hidden_layers=1), "layers.1.* is not in the base"),
        (dict(num_hidden_layers=3), "layers.2.* is not in the adapter"),
        (dict(model_type="gpt2"), "Target modules .* not found in the base model"),
    ],
    ids=str,
)
def test_another_base(first, adapter, tmp_path, sizes, message):
    targets = json.loads((adapter / "adapter_config.json").read_text())["target_modules"]
    names = {target.split(".")[-1] for target in targets}
    edit(adapter, target_modules=sorted(names))  # on whichever layers have them
    other = tiny.save_model(tmp_path / "other", **sizes)
    with pytest.raises(ModelError) as caught:
        load(config_of(first, adapter, model=other))
    said = str(caught.value)
    assert f"{adapter} does not fit the model {other}; it was trained on {first.start}" in said
    assert re.search(message, said), said


def test_a_base_with_fewer_tokens_than_the_adapter_s_tokenizer(first, adapter, tmp_path):
    other = tiny.save_model(tmp_path / "other", vocab_size=90)
    with pytest.raises(ModelError, match="the model embeds only 90 ids"):
        Run(tmp_path, model=other, adapter=str(adapter), max_steps=1)
