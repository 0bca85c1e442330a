"""The step's FLOPs against sums by hand, against what torch counts, and against the head's own plan."""

import pytest
import torch
from fastdpo_kernels import plan
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import ceilings
from benchmarks.flops import USEFUL, How, step_flops, work
from benchmarks.inputs import groups_of, random_rows
from benchmarks.lengths import PairLengths
from benchmarks.models import MODELS, BenchModel, build, tiny
from fastdpo.data.packing import pack

ROWS = [PairLengths(3, 2, 4), PairLengths(1, 5, 1)]
SEPARATE, PADDED = How(shared_prompt=False), How(shared_prompt=False, padded_to=2, scored_head_rows="all")
# one layer, D 4, inner 6, 2 heads of size 2, 1 key head, V 10
SIZES = dict(hidden_size=4, intermediate_size=6, num_hidden_layers=1, num_attention_heads=2)
HAND = BenchModel("hand", "llama", SIZES | dict(num_key_value_heads=1, vocab_size=10))
N = 4 * 4 + 4 * 2 + 4 * 2 + 4 * 4 + 3 * 4 * 6  # q, k, v, o, and gate, up, down


def test_places_by_hand():
    # row 1: P 3, responses without their last token 1 and 3; row 2: P 1, 4 and 0
    shared = work(ROWS, USEFUL)
    assert (shared.places, shared.head_rows) == ((3 + 1 + 3) + (1 + 4 + 0), 2 + 4 + 5 + 1)
    assert shared.attended == (6 + (3 + 1) + (9 + 6)) + (1 + (4 + 10) + 0)
    separate = work(ROWS, SEPARATE)  # rows of 5, 7, 6, 2
    assert (separate.places, separate.head_rows) == (20, 12)
    assert separate.attended == 15 + 28 + 21 + 3
    padded = work(ROWS, PADDED)
    assert (padded.places, padded.attended, padded.head_rows) == (4 * 7, 4 * 28, 4 * 7)
    one = work(ROWS, How(shared_prompt=False, padded_to=1))
    assert (one.places, one.attended, one.head_rows) == (2 * 7 + 2 * 6, 2 * 28 + 2 * 21, 12)


def test_places_are_the_packers():
    batch = pack(groups_of(random_rows(ROWS, 50)))
    found, layout = work(ROWS, USEFUL), batch.layout
    assert found.places == batch.input_tokens and found.head_rows == len(batch.target)
    seen = torch.arange(found.places)
    mask = (seen[None] <= seen[:, None]) & (seen[:, None] < layout.seen_until[None])
    assert found.attended == int(mask.sum())
    assert work(ROWS, SEPARATE).places == batch.unshared_tokens


def test_a_step_by_hand():
    assert HAND.body_params == N == 120
    useful = step_flops(HAND, ROWS, USEFUL)
    assert useful == {
        "body": 12 * 6 * N,  # 2 forward, 4 backward
        "attention": 40 * 12 * 2 * 2,  # 40 pairs, 2 heads of 2: 4 forward, 8 backward
        "head": 12 * 6 * 10 * 4,
        "total": 12 * 6 * N + 40 * 48 + 12 * 240,
    }
    everything = How(False, None, "scored", 4, reference_forward=True, checkpointing=True)
    assert step_flops(HAND, ROWS, everything) == {
        "body": 20 * (10 * N - 2 * 24),  # the second forward stops before down_proj, 6 x 4
        "attention": 67 * (4 + 8 + 4 + 4) * 4,
        "head": 12 * (4 + 1) * 2 * 40,
        "total": 20 * (10 * N - 48) + 67 * 80 + 12 * 400,
    }


def test_a_lora_step_by_hand():
    lora = BenchModel("hand, LoRA", "llama", HAND.config, lora_rank=3)
    A = 3 * (8 + 6 + 6 + 8 + 10 + 10 + 10)
    assert lora.lora_params == A
    full = How(reference_forward=True, checkpointing=True)
    found = step_flops(lora, ROWS, full)
    assert found["body"] == 12 * (4 * (N + A) + 2 * (N + A - 3 * 4) + 2 * A + 2 * N)  # not B of down_proj
    assert found["head"] == 12 * (2 + 1) * 2 * 40
    assert step_flops(lora, ROWS, USEFUL)["body"] == 12 * (4 * N + 6 * A)


def counted(built, checkpointing: bool) -> int:
    """What torch counts for a step of ROWS, padded, with eager attention, full logits and no reference."""
    built.set_attn_implementation("eager")
    if checkpointing:
        built.gradient_checkpointing_enable({"use_reentrant": False})
    L = work(ROWS, PADDED).places // 4
    with FlopCounterMode(display=False) as counter:
        built.train()(input_ids=torch.zeros(4, L, dtype=torch.int64)).logits.sum().backward()
    # some releases of transformers make the angles by a product, others not
    angles = [sum(n.values()) for name, n in counter.get_flop_counts().items() if "rotary" in name]
    return counter.get_total_flops() - sum(angles)


def expected(model: BenchModel, checkpointing: bool) -> int:
    ours = step_flops(model, ROWS, How(False, 2, "all", checkpointing=checkpointing))
    L = work(ROWS, PADDED).places // 4
    return ours["total"] - ours["attention"] + ours["attention"] * 2 * L // (L + 1)  # L x L, not half


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", ["Qwen3-1.7B", "Llama-3.2-1B"])
def test_torch_counts_the_same_on_padded_rows(name, checkpointing):
    model = tiny(MODELS[name])
    assert counted(build(model, "cpu", torch.float32), checkpointing) == expected(model, checkpointing)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_torch_counts_the_same_for_a_lora(checkpointing):
    from peft import LoraConfig, get_peft_model

    model = tiny(MODELS["Llama-3.1-8B LoRA"])
    lora = LoraConfig(r=model.lora_rank, target_modules="all-linear", task_type="CAUSAL_LM")
    built = get_peft_model(build(model, "cpu", torch.float32), lora)
    built.enable_input_require_grads()  # what checkpointing needs, and it makes the first layer's d_input
    assert counted(built, checkpointing) == expected(model, checkpointing)


@pytest.mark.parametrize("budget,units", [(1 << 30, None), (1, 4)])
def test_the_heads_own_plan(budget, units):
    model = MODELS["CPU"]
    M = work(ROWS, USEFUL).head_rows
    for trained, rank in ((True, None), (False, 8)):
        chosen = plan(
            M, model.vocab, model.hidden, dtype=torch.float32, train_weight=trained, memory_budget=budget
        )
        how = How(head_units=units if trained else None)
        like = BenchModel("like it", "qwen2", model.config, rank)
        assert step_flops(like, ROWS, how)["head"] == chosen.flops


def test_a_shared_prompt_is_not_padded():
    with pytest.raises(ValueError, match="shared_prompt=False"):
        How(padded_to=4)


def test_ceilings(monkeypatch):
    monkeypatch.setattr(ceilings, "SMALL_SHAPES", ((8, 16, 4), (16, 16, 16)))
    found = ceilings.measure("cpu", small=True)
    assert set(found["gemms"]) == {"8x16x4", "16x16x16"} and found["dtype"] == "float32"
    assert found["gemm_tflops"] == max(found["gemms"].values()) > 0 < found["copy_gb_s"]
    monkeypatch.setattr(ceilings, "seconds_of", lambda call, device: [2.0, 1.0, 9.0])
    cpu = torch.device("cpu")
    assert ceilings.gemm_tflops((2, 3, 5), cpu, torch.float32) == 60 / 2.0 / 1e12
    assert ceilings.copy_gb_per_second(1000, cpu) == 2000 / 2.0 / 1e9
