"""What fits a card, and what each trick costs: the claims, the counting, the search, real trials of toys."""

import importlib.util
import json
import time
from argparse import Namespace
from dataclasses import replace

import numpy as np
import pytest
import torch

from benchmarks.gpu.fit import DRY
from benchmarks.inputs import groups_of, random_rows
from benchmarks.lengths import PairLengths
from benchmarks.memory import fit
from benchmarks.memory import run as memory
from benchmarks.memory.fit import CLAIMS, OURS, THEIRS, pair_of, reach
from benchmarks.models import MODELS, build, build_4bit, tiny
from benchmarks.peers import ours, session
from benchmarks.peers.jobs import Job
from benchmarks.peers.session import Absent, Ended
from benchmarks.peers.tracing import covered
from benchmarks.steps import tricks
from benchmarks.tables import blocks
from benchmarks.tables import memory_blocks as blocks_memory
from benchmarks.workers import WorkerFailed
from fastdpo.config.keys import Config
from fastdpo.data.packing import pack, split_step
from tests.rounding import model_ulps

GB = 10**9
MACHINE = {"gpu": "NVIDIA H200", "cpu": "x", "threads": 1}
has_bnb = importlib.util.find_spec("bitsandbytes") is not None
needs_bnb = pytest.mark.skipif(not has_bnb, reason="needs bitsandbytes: pip install 'fastdpo[quant]'")


class Steps:
    """A session of n steps without a parent."""

    def __init__(self, n):
        self.left, self.losses, self.facts = n, [], None

    def ready(self, **facts):
        self.facts = facts

    def next_step(self):
        self.left -= 1
        return self.left >= 0

    def done(self, loss):
        self.losses.append(float(loss()))


def losses(train, tmp_path, options, model="Llama-3.2-1B", pairs=2, rate=1e-3):
    """Of three steps of a toy; the first two have the same rows."""
    rows = random_rows([PairLengths(12, 6, 5), PairLengths(9, 4, 7)][:pairs], 1000)
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([rows, rows, rows]))
    job = dict(model=model, rows=str(path), device="cpu", learning_rate=rate, tiny=True, options=options)
    session = Steps(3)
    try:
        train(job, session)
    except Ended:
        pass
    assert session.facts is not None
    return session.losses


# ---- claims and counting


def test_the_claims_are_those_of_the_project():
    asked = {(c.name, c.gigabytes): c.tokens for c in CLAIMS}
    assert asked == {
        ("Llama-3.1-8B, all weights", 24): 4096,
        ("Llama-3.1-8B, QLoRA", 16): 32_768,
        ("Llama-3.1-8B, LoRA", 24): 16_384,
        ("Llama-3.1-70B, QLoRA", 48): 2048,
        ("Qwen3-1.7B, all weights", 12): 4096,
    }
    for claim in CLAIMS:
        config = Config(model="m", data="d", lora_rank=MODELS[claim.model].lora_rank, **claim.keys)
        assert (config.lora_rank is None) == ("all weights" in claim.name) == config.pure_bf16
        assert config.load_in_4bit == ("QLoRA" in claim.name)
        assert config.gradient_checkpointing is True and config.activation_offloading
        assert claim.theirs.items() <= claim.keys.items() and fit.FULL.first < claim.tokens <= fit.FULL.most
        assert ("paged_adamw_8bit" == claim.theirs.get("optim")) == ("all weights" in claim.name)
        assert "optimizer_in_backward" not in claim.theirs


@pytest.mark.parametrize("tokens", [192, 1000, 4096, 32_768])
def test_tokens_of_a_pair_are_those_that_fastdpo_computes(tokens):
    (group,) = groups_of(random_rows([pair_of(tokens)], 1000))
    batch = pack([group])
    assert batch.input_tokens == tokens - 2  # the last of each response predicts nothing
    assert batch.unshared_tokens / tokens == pytest.approx(4 / 3, rel=0.02)


def test_each_pair_of_a_claim_is_a_microbatch(tmp_path):
    claim = replace(CLAIMS[0], pairs=4)
    trials = fit.FitTrials(DRY, claim, OURS, tmp_path, 0.0)
    warm, first, second = trials.steps(300)
    assert warm == [memory.WARM] * 4 and first == second == [pair_of(300)] * 4
    module, options = trials.peer(300)
    parts = split_step(groups_of(random_rows(first, 1000)), options["max_tokens"], None, True)
    assert module == "ours" and [len(part) for part in parts] == [1] * 4


def test_trl_has_the_tricks_that_it_knows(tmp_path):
    gpu = replace(DRY, device="cuda")
    of = lambda who, limits: fit.FitTrials(limits, CLAIMS[0], who, tmp_path, 0.0).peer(300)
    module, options = of("TRL + liger layers", gpu)
    assert module == "trl_dpo" and options["liger"] and options["best"] and options["batch_size"] == 1
    assert options["keys"]["activation_offloading"] and options["keys"]["optim"] == "paged_adamw_8bit"
    assert "activation_offloading" not in of("TRL", DRY)[1]["keys"]


# ---- the search


def reached(peak, claim=CLAIMS[0], **limits):
    tried = []

    def fits(n):
        tried.append(n)
        return None if peak(n) > claim.gigabytes * GB else int(peak(n))

    return reach(fits, claim, replace(fit.FULL, **limits)), tried


def test_the_claim_is_tried_first():
    found, tried = reached(lambda n: 16 * GB + 1e6 * n)
    assert tried[0] == 4096 and min(tried) == 4096
    assert found["fits"] <= 8000 < found["fails"] <= 1.1 * found["fits"]


def test_below_a_claim_that_fails():
    found, tried = reached(lambda n: 16 * GB + 4e6 * n)
    assert tried[:2] == [4096, 512] and max(tried) == 4096
    assert found["fits"] <= 2000 < found["fails"] <= 1.1 * found["fits"]
    found, _ = reached(lambda n: 30 * GB)
    assert found == {"fits": None, "fails": 512}
    found, _ = reached(lambda n: 16 * GB + (n > 4095) * 10 * GB)
    assert found == {"fits": 4095, "fails": 4096}


def test_no_row_is_longer_than_the_model_has_positions():
    found, tried = reached(lambda n: GB, CLAIMS[4])
    longest = pair_of(max(tried))
    assert found["fails"] is None and longest.prompt + longest.chosen == 40_960


# ---- a visit, with workers that pretend


class Pretender:
    """1 MB a token that a trainer computes (TRL: 4/3), 8 GB for the weights."""

    prepared: list[tuple] = []  # noqa: RUF012

    def __init__(self, module, environment, log):
        self.alive, self.room = True, int(environment["BENCH_BYTES"])

    def prepare(self, job, seconds):
        rows = json.loads(open(job["rows"]).read())
        self.tokens = sum(map(len, rows[-1][0].values()))
        self.peak = 8 * GB + int(1e6 * self.tokens * (4 / 3 if "batch_size" in job["options"] else 1))
        Pretender.prepared.append((job["model"], job["options"].get("liger", False), self.tokens))
        if job["options"].get("liger"):
            raise WorkerFailed("absent", "liger-kernel is not installed")

    def steps(self, n, seconds):
        assert n == 3
        if self.peak > self.room:
            self.alive = False
            raise WorkerFailed("memory", "no room")
        return {
            "peak_bytes": self.peak,
            "held_bytes": self.peak,
            "paged_bytes": 0,
            "steps": [{"seconds": 9}] * 2 + [{"seconds": 2}],
        }

    def end(self):
        pass

    def stop(self):
        self.alive = False


@pytest.fixture
def pretend(monkeypatch):
    monkeypatch.setattr(memory, "Worker", Pretender)
    monkeypatch.setattr(Pretender, "prepared", [])


LIMITS = replace(fit.FULL, device="cpu", tiny=True, claims=(CLAIMS[3], replace(CLAIMS[4], tokens=3500)))


def test_every_claim_has_an_answer(pretend, tmp_path):
    record = json.loads(fit.run(LIMITS, 60, tmp_path).read_text())
    found = {(f["claim"], f["contender"]): f for f in record["found"]}
    assert len(found) == 7  # three contenders, and ours where TRL ended below the second claim
    small = "Qwen3-1.7B, all weights"
    assert found[small, OURS]["fits"] <= 4000 < found[small, OURS]["fails"]
    ended = found[small, "TRL"]["fits"]
    assert ended <= 3000 < found[small, "TRL"]["fails"] <= 1.1 * ended
    again = found[small, fit.AS_LONG]["trials"]
    assert [(t["tokens"], t["seconds"]) for t in again] == [(ended, 2)]
    assert found[small, "TRL + liger layers"]["no_answer"].startswith("absent")
    for trial in found[small, OURS]["trials"]:
        trial["paged_bytes"] = 34 * GB // 10
    text = blocks_memory.fit(record | MACHINE, "link")
    assert "yes, 11.5 GB and 3.40 GB paged |" in text
    for trial in found[small, OURS]["trials"]:
        trial["paged_bytes"] = 0
    text = blocks_memory.fit(record | MACHINE, "link")
    assert "| 12 GB: Qwen3-1.7B, all weights | 3,500: yes, 11.5 GB |" in text and record["counting"] in text
    assert f"| {ended:,} | 2.00 | 2.00 |" in text  # 4 pairs in 2 s
    assert "No answer of TRL + liger layers for Llama-3.1-70B, QLoRA: absent" in text
    assert "1, 4 for Qwen3-1.7B, all weights" in text


def test_a_second_visit_goes_on(pretend, tmp_path, monkeypatch):
    one = replace(LIMITS, contenders=(OURS,), claims=LIMITS.claims[1:])
    until, clock = memory.time.perf_counter, []
    monkeypatch.setattr(memory.time, "perf_counter", lambda: until() + 1e6 * (len(Pretender.prepared) > 1))
    fit.run(one, 60, tmp_path)
    path = next(tmp_path.glob("fit_*.json"))
    (first,) = json.loads(path.read_text())["found"]
    assert first["no_answer"] == "no time left" and len(first["trials"]) == 2, clock
    assert "3,500: yes" in blocks_memory.fit_table(json.loads(path.read_text()))  # what was tried is told
    monkeypatch.setattr(memory.time, "perf_counter", until)
    fit.run(one, 60, tmp_path)
    (second,) = json.loads(path.read_text())["found"]
    assert second["trials"][:2] == first["trials"] and second["fits"]
    tried = [tokens for _, _, tokens in Pretender.prepared]
    assert len(set(tried)) == len(tried) == len(second["trials"])
    fit.run(one, 60, tmp_path)
    assert len(Pretender.prepared) == len(tried)


def test_the_table_of_what_nobody_could():
    claim = {"name": "x", "gigabytes": 24, "tokens": 100, "pairs": 1}
    trial = {"tokens": 100, "peak_bytes": None, "held_bytes": None, "paged_bytes": None, "seconds": None}
    nobody = {"fits": None, "fails": 10, "trials": [trial]}
    found = [{"claim": "x", "contender": who} | nobody for who in (OURS, "TRL")]
    record = {"limits": {"claims": [claim]}, "found": found}
    assert "| 24 GB: x | 100: no | nothing | nothing | 100 | | |" in blocks_memory.fit_table(record)
    record["found"] = []
    assert "| 24 GB: x | 100: not tried | no answer | no answer | 100 | | |" in blocks_memory.fit_table(
        record
    )


# ---- real trials of toys


def test_a_real_trial(tmp_path):
    """Bf16 weights updated in the backward, two microbatches a step, under a limit."""
    claim = DRY.claims[0]
    found = fit.answer(DRY, claim, OURS, time.perf_counter() + 600, tokens=claim.tokens)
    (trial,) = found["trials"]
    assert found["fits"] == claim.tokens and trial["seconds"] > 0, found
    assert 0 < trial["peak_bytes"] and trial["tokens"] == claim.tokens


@needs_bnb
@pytest.mark.parametrize("name", ["Llama-3.1-8B LoRA", "Llama-3.2-1B"])  # the second one is tied
def test_built_in_4_bits(name):
    import bitsandbytes as bnb

    toy = tiny(MODELS[name])
    built, plain = build_4bit(toy, "cpu", torch.float32), build(toy, "cpu", torch.float32)
    assert not any(t.is_meta for t in (*built.parameters(), *built.buffers()))
    whole = {n: p.shape for n, p in plain.named_parameters() if "_proj" not in n}
    assert {n: p.shape for n, p in built.named_parameters() if "_proj" not in n} == whole
    found = {n for n, m in built.named_modules() if isinstance(m, bnb.nn.Linear4bit)}
    assert found == {n for n, m in plain.named_modules() if "_proj" in n}
    for n in found:
        module = built.get_submodule(n)
        assert module.weight.quant_state.nested and module.weight.quant_type == "nf4"
        plain.get_submodule(n).weight.data = bnb.functional.dequantize_4bit(
            module.weight.data, module.weight.quant_state
        )
    for n in whole:
        plain.get_parameter(n).data = built.get_parameter(n).data
    for a, b in zip(built.buffers(), plain.buffers()):
        assert torch.equal(a, b)
    ids = torch.arange(20)[None]
    with torch.no_grad():
        ours, theirs = built(ids).logits, plain(ids).logits
    torch.testing.assert_close(ours, theirs, rtol=0, atol=model_ulps(theirs))
    weights = build_4bit(toy, "cpu", torch.float32).state_dict()
    assert all(torch.equal(v, weights[k]) for k, v in built.state_dict().items())


@needs_bnb
def test_trl_trains_in_4_bits(tmp_path):
    from benchmarks.peers import trl_dpo

    keys = replace(CLAIMS[1]).theirs | {"activation_offloading": False}
    options = {"batch_size": 1, "best": True, "keys": keys}
    first, second, third = losses(trl_dpo.train, tmp_path, options, "Llama-3.1-8B LoRA", rate=1e-2)
    assert first == pytest.approx(np.log(2), abs=1e-3) and third < second < first


def test_trls_keys():
    from benchmarks.peers.trl_dpo import step_settings

    options = {"batch_size": 1, "best": True, "keys": CLAIMS[0].theirs}
    job = Job("Llama-3.1-8B", "", "cuda", 1e-5, options=options)
    job.__dict__["steps"] = [[{}] * 4]
    settings = step_settings(job, "folder")
    assert settings["gradient_checkpointing"] and settings["activation_offloading"]
    assert settings["optim"] == "paged_adamw_8bit" and settings["gradient_accumulation_steps"] == 4
    assert "pure_bf16" not in settings


# ---- tricks


@pytest.mark.parametrize("name", tricks.TRICKS)
def test_every_trick_trains(name, tmp_path):
    keys, options = tricks.TRICKS[name], {"max_tokens": 28, "keys": tricks.TRICKS[name]}
    try:
        first, second, third = losses(ours.train, tmp_path, options)
    except (Absent, ImportError) as absent:
        assert "adamw_8bit" in str(keys) or "load_in_4bit" in keys, absent
        pytest.skip(str(absent))
    assert first == pytest.approx(np.log(2), abs=2e-3) and third < second < first - 1e-3
    if keys.get("gradient_checkpointing") or keys.keys() & {
        "activation_offloading",
        "tiled_mlp",
        "head_memory",
    }:
        plain = losses(ours.train, tmp_path, options | {"keys": {}})
        assert plain == pytest.approx([first, second, third], abs=1e-5)


def test_keys_reach_the_model(tmp_path):
    keys = {
        "gradient_checkpointing": 2,
        "activation_offloading": True,
        "head_memory": "64MiB",
        "pure_bf16": True,
    }
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([random_rows([PairLengths(9, 4, 7)], 1000)]))
    policy = ours.prepare(
        Job("Llama-3.2-1B", str(path), "cpu", 1e-3, tiny=True, options={"max_tokens": 64, "keys": keys})
    ).policy
    assert [layer.gradient_checkpointing for layer in policy.core.model.layers] == [True, False]
    assert hasattr(policy.core, "_fastdpo_offloading") and policy.head_budget == 64 << 20
    assert {p.dtype for p in policy.trained()} == {torch.bfloat16} and policy.dtype == torch.bfloat16


def test_tricks_are_keys_of_a_config():
    for keys in tricks.TRICKS.values():
        Config(model="m", data="d", **keys)
    assert not next(iter(tricks.TRICKS.values()))  # the plain run is the first one


def summary(name, seconds, peak):
    measured = {
        "pairs_per_second": 16 / seconds,
        "quartiles": [1, 2],
        "peak_gb": peak,
        "process_peak_gb": 1.0,
        "paged_gb": 0.0,
    }
    measured |= {"fastdpo_times_faster": seconds, "fastdpo_memory_ratio": 8 / peak, "interleaved": True}
    return measured | {"losses": [], "flops": 1.0}


@pytest.fixture
def cost(monkeypatch, tmp_path):
    """run(names) -> (the JSON's record, who raced in each race so far). The n-th of a race takes 1 + 3n
    seconds; in the first one tiled_mlp has no time."""
    asked = []

    def measure(plan, contenders, ceiling, workers, keep):
        asked.append([c.name for c in contenders])
        out = {c.name: summary(c.name, 1 + 3 * i, 8.0 / (1 + i)) for i, c in enumerate(contenders)}
        keep({"summary": {name: {"state": "time", "why": "no time left"} for name in out}})
        if len(asked) == 1 and "tiled_mlp" in out:
            out["tiled_mlp"] = {"state": "time", "why": "no time left"}
        return {"summary": out}

    def run(*names):
        args = Namespace(minutes=60, out=tmp_path)
        tricks.run(tricks.GPU, (tricks.PLAIN, *names), 8192, args, Stopped())
        return json.loads(next(tmp_path.glob("tricks_*.json")).read_text()), asked

    monkeypatch.setattr(tricks, "measure_steps", measure)
    monkeypatch.setattr(tricks, "hidden", lambda *_: {"seconds": 1.0, "hidden": 0.75})
    return run


class Stopped:
    """Workers that are only ever stopped."""

    def stop(self):
        pass


def test_what_tricks_cost(cost):
    names = ("activation_offloading", "tiled_mlp")
    record, _ = cost(*names)
    text = blocks_memory.tricks(record | MACHINE, "link")
    assert "| `none` | 16.0 | 1.00x | 8.00 GB | 1.00x | |" in text
    assert "| `activation_offloading` | 4.00 | 0.25x | 4.00 GB | 0.50x | 75% |" in text
    assert "No numbers for tiled_mlp: no time left" in text
    cost(*names)
    record, asked = cost(*names)
    assert asked == [[tricks.PLAIN, *names], [tricks.PLAIN, "tiled_mlp"]]
    rows = record["rows"]
    assert list(rows) == [tricks.PLAIN, *names]
    assert all("pairs_per_second" in row for row in rows.values())


PAGED = "optim: paged_adamw_8bit"


def test_paged_states_run_alone(cost, monkeypatch):
    """More managed memory than is free can hang a GPU."""
    whole = type("Card", (), {"total_memory": 80 * GB})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: whole)
    limited = tricks.apart(PAGED, 8192)
    assert limited.module == "benchmarks.memory.limited" and limited.environment["BENCH_BYTES"] == str(
        64 * GB
    )
    record, asked = cost("tiled_mlp", PAGED, "activation_offloading")
    assert asked == [[tricks.PLAIN, "tiled_mlp", "activation_offloading"], [PAGED]]
    row = record["rows"][PAGED]
    assert row["speed"] == row["memory"] == 1.0 and row["interleaved"] is False
    row["paged_gb"] = 2.5
    assert "8.00 GB and 2.50 GB paged | 1.00x" in blocks_memory.tricks(record | MACHINE, "link")
    assert [name for name in tricks.TRICKS if tricks.is_paged(name)] == [PAGED]


def test_a_trick_that_fails_is_told(cost, monkeypatch):
    measure = tricks.measure_steps

    def broken(plan, contenders, *rest):
        if contenders[0].name == PAGED:
            raise WorkerFailed("absent", "no bitsandbytes")
        return measure(plan, contenders, *rest)

    monkeypatch.setattr(tricks, "measure_steps", broken)
    monkeypatch.setattr(tricks, "apart", tricks.contender)
    record, _ = cost(PAGED)
    assert record["rows"][PAGED] == {"state": "absent", "why": "no bitsandbytes"}
    assert record["rows"][tricks.PLAIN]["speed"] == 1.0


def test_paged_states_have_room_beside_the_card(tmp_path, monkeypatch):
    large, small = CLAIMS[0], CLAIMS[4]
    assert large.paged == pytest.approx(2 * 8.03e9, rel=0.01) and CLAIMS[2].paged == 0
    assert fit.no_room(large, 80 * GB) is None and fit.no_room(small, 30 * GB) is None
    assert "16.1 GB of paged states" in fit.no_room(large, 40 * GB)
    assert fit.no_room(CLAIMS[2], 1) is None  # nothing of it is managed memory
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (40 * GB, 48 * GB))
    monkeypatch.setattr(fit, "FitTrials", None)  # nothing is begun
    found = fit.answer(replace(fit.FULL, claims=()), large, OURS, time.perf_counter() + 600)
    assert "this GPU has 40.0" in found["no_answer"]


@needs_bnb
def test_managed_memory_is_counted_and_never_given_back(monkeypatch):
    """bitsandbytes keeps paged states until the process ends: a worker that made some must end too."""
    from bitsandbytes.functional import GlobalPageManager

    assert session.memory()["paged_bytes"] == 0
    states = [torch.zeros(1000, dtype=torch.uint8), torch.zeros(10)]
    monkeypatch.setattr(GlobalPageManager.get_instance(), "paged_tensors", states)
    assert session.memory()["paged_bytes"] == 1040
    answers = []
    orders = [{"do": "prepare", "job": {}}, {"do": "quit"}]
    fake = Namespace(answer=lambda **content: answers.append(content), receive=lambda: orders.pop(0))
    monkeypatch.setattr(session.Session, "on_stdio", lambda: fake)
    session.serve(lambda job, session: None)
    assert answers[-1]["kept_bytes"] == 1040


def test_hidden_copies():
    assert covered([(0, 10)], [(0, 10)]) == 1 and covered([(0, 10)], []) == 0
    assert covered([(0, 10), (20, 30)], [(5, 8), (6, 12), (25, 40)]) == pytest.approx(10 / 20)
    assert covered([(0, 4), (2, 6)], [(3, 4)]) == pytest.approx(2 / 8)  # two streams at once


def test_the_readme_waits_for_both():
    assert {"fit-gpu", "tricks-gpu"} <= set(blocks.BLOCKS)
    assert set(THEIRS) <= set(fit.FULL.contenders)
