"""The benchmark's models have the published sizes, and its lengths and rows are what they say."""

import numpy as np
import pytest
import torch

from benchmarks.inputs import FIRST_ID, groups_of, random_rows
from benchmarks.lengths import MAX_LENGTH, MIXES, REAL_ROWS, SHORTEST, PairLengths, draw
from benchmarks.models import MODELS, build, tiny
from fastdpo.data.packing import pack

# from the model cards and config.json files; 1.72 is Qwen3-1.7B with its head counted once
BILLIONS = {
    "Qwen2.5-0.5B": 0.494,
    "Llama-3.2-1B": 1.236,
    "Qwen2.5-1.5B": 1.544,
    "Qwen3-1.7B": 1.721,
    "Llama-3.1-8B LoRA": 8.030,
    "Qwen2.5-7B LoRA": 7.616,
    "Qwen2.5-3B": 3.086,
    "Qwen2.5-14B LoRA": 14.770,
    "Qwen2.5-32B LoRA": 32.764,
    "Llama-3.1-8B": 8.030,
    "Llama-3.1-70B LoRA": 70.554,
    "Qwen3-VL-2B": 2.128,
    "Qwen2.5-VL-3B LoRA": 3.755,
}


@pytest.mark.parametrize("name", MODELS)
def test_parameters(name):
    model = MODELS[name]
    built = build(model, "meta", torch.bfloat16)
    linears = {n: p.numel() for n, p in built.named_parameters() if p.ndim == 2 and ".layers." in n}
    assert sum(linears.values()) == model.body_params
    if name in BILLIONS:
        assert sum(p.numel() for p in built.parameters()) / 1e9 == pytest.approx(BILLIONS[name], abs=6e-4)
    head, embedding = built.get_output_embeddings().weight, built.get_input_embeddings().weight
    assert head.shape == (model.vocab, model.hidden) and head.dtype == torch.bfloat16
    assert (head is embedding) == model.config["tie_word_embeddings"]


def test_lora_parameters():
    from peft import LoraConfig, get_peft_model

    model = tiny(MODELS["Llama-3.1-8B LoRA"])
    lora = LoraConfig(r=model.lora_rank, target_modules="all-linear", task_type="CAUSAL_LM")
    built = get_peft_model(build(model, "meta", torch.float32), lora)
    assert sum(p.numel() for p in built.parameters() if p.requires_grad) == model.lora_params
    assert MODELS["Qwen2.5-0.5B"].lora_params == 0


@pytest.mark.parametrize("name", MODELS)
def test_toys_keep_the_options_and_the_seed(name):
    model, toy = MODELS[name], tiny(MODELS[name])
    first, second = (build(toy, "cpu", torch.float32) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters()))
    assert sum(p.numel() for p in first.parameters()) < 400_000
    for key in ("tie_word_embeddings", "rms_norm_eps"):
        assert toy.config[key] == model.config[key]
    rope = model.config["rope_parameters"]
    changed = {key for key, value in toy.config["rope_parameters"].items() if value != rope[key]}
    assert changed == ({"mrope_section"} if model.vision else set())  # of a head's size
    assert (toy.lora_rank is None) == (model.lora_rank is None)


@pytest.mark.parametrize("name", [name for name in MIXES if MIXES[name].length])
def test_mixes_have_the_published_medians(name):
    drawn = np.array(draw(name, 4000))
    prompt, response = MIXES[name].medians
    assert prompt + response == pytest.approx(MIXES[name].length)
    assert prompt / response == pytest.approx(MIXES[name].ratio)
    assert np.median(drawn[:, 0]) == pytest.approx(prompt, rel=0.05)
    assert np.median(drawn[:, 1:]) == pytest.approx(response, rel=0.05)
    assert drawn.min() >= SHORTEST and (drawn[:, 0] + drawn[:, 1:].max(1)).max() <= MAX_LENGTH


def test_real_lengths():
    rows = draw("hh real", REAL_ROWS)
    again = draw("hh real", REAL_ROWS + 3)
    assert again[:REAL_ROWS] == rows and sorted(draw("hh real", REAL_ROWS, seed=1)) == sorted(rows)
    P, C, R = np.median(rows, axis=0)
    assert (P, C, R) == (113.5, 34, 34)  # of all 4132 rows: 120, 34, 33


def test_draws_are_reproducible():
    for mix in MIXES:
        assert draw(mix, 5) == draw(mix, 9)[:5] != draw(mix, 5, seed=1)
    assert all(type(n) is int for n in draw("TL;DR", 1)[0])


def test_rows_and_groups():
    lengths = [PairLengths(5, 2, 3), PairLengths(1, 4, 1)]
    rows = random_rows(lengths, vocab=50)
    assert [tuple(len(ids) for ids in row.values()) for row in rows] == lengths
    assert rows == random_rows(lengths, vocab=50) != random_rows(lengths, vocab=50, seed=1)
    ids = [i for row in random_rows(lengths * 50, vocab=50) for part in row.values() for i in part]
    assert min(ids) == FIRST_ID and max(ids) == 49
    batch = pack(groups_of(rows))
    assert batch.cu_resp.diff().tolist() == [2, 3, 4, 1] and batch.pairs.tolist() == [[0, 1], [2, 3]]
    wanted = [ids for row in rows for ids in (*row["chosen_ids"], *row["rejected_ids"])]
    assert batch.target.tolist() == wanted
