"""The race of training steps: its protocol, what it does with failures, and that its contenders agree."""

import json
import time
from dataclasses import replace

import numpy as np
import pytest

from benchmarks.flops import USEFUL
from benchmarks.inputs import groups_of, random_rows
from benchmarks.lengths import PairLengths
from benchmarks.models import MODELS
from benchmarks.peers.ladder import RUNGS, pack_apart, with_own_prompts
from benchmarks.peers.session import Ended
from benchmarks.steps import race as race_module
from benchmarks.steps.contenders import BATCHED, LADDER, fastdpo, hf_plain, ladder, trl
from benchmarks.steps.race import Contender, Course, Entry, Race
from benchmarks.steps.steps import (
    Plan,
    even_steps,
    grouped_steps,
    in_turns,
    mark_fastest,
    pool_of,
    told,
    width,
)
from benchmarks.workers import Worker, WorkerFailed
from fastdpo.data.packing import pack


@pytest.fixture
def toy(tmp_path):
    started = []

    def start(name="toy"):
        started.append(Worker("tests.benchmarks.toy", {}, tmp_path / f"{name}.log"))
        return started[-1]

    yield start
    for worker in started:
        if worker.alive:
            worker.stop()


def test_a_worker_answers_whatever_it_prints(toy, tmp_path):
    worker = toy()
    assert worker.prepare({"fails": None})["facts"] == {"fact": None}
    began = time.perf_counter()
    first, second = worker.steps(2), worker.steps(1)
    whole = time.perf_counter() - began
    assert [s["loss"] for s in first["steps"] + second["steps"]] == [1, 1 / 2, 1 / 3]
    assert all(s["seconds"] >= 0.02 for s in first["steps"])
    assert sum(s["seconds"] for s in first["steps"] + second["steps"]) <= whole
    assert 0 < first["idle_bytes"] <= first["peak_bytes"] and first["free_bytes"] > 0
    assert worker.profile()["trace"]["device"] == "cpu"
    worker.end()
    assert "below Python" in (tmp_path / "toy.log").read_text()
    worker.prepare({"fails": "again"})  # the same process, for the next job
    assert worker.steps(1)["steps"][0]["loss"] == 1


def test_a_worker_that_dies_says_why(toy):
    crash, memory, absent, slow = (toy(name) for name in ("crash", "memory", "absent", "slow"))
    crash.prepare({"fails": "crash"})
    crash.steps(2)
    with pytest.raises(WorkerFailed, match="died with code 7") as failed:
        crash.steps(1)
    assert failed.value.kind == "error" and not crash.alive
    for worker, kind, why in ((memory, "memory", "as a library"), (absent, "absent", "toys are not")):
        with pytest.raises(WorkerFailed, match=why) as failed:
            worker.prepare({"fails": kind})
        assert failed.value.kind == kind and not worker.alive  # nothing of it is left
    slow.prepare({"fails": "slow"})
    with pytest.raises(WorkerFailed) as failed:
        slow.steps(1, seconds=0.2)
    assert failed.value.kind == "time" and not slow.alive


class FakeDevice:
    """Workers without processes on a device of 100 bytes. Options: idle and held bytes, seconds a step,
    (step, what is added to everybody's loss from that one on), fails (in which step)."""

    def __init__(self):
        self.workers, self.standing, self.orders = {}, {}, []

    def get(self, name, module, environment):
        return self.workers.setdefault(name, FakeWorker(name, self))

    def stop(self):
        self.standing.clear()


class FakeWorker:
    def __init__(self, name, device):
        self.name, self.device = name, device

    def prepare(self, job, seconds):
        self.options, self.done, self.rows = job["options"], 0, job["rows"]
        if self.options["held"] > 100 - sum(self.device.standing.values()):
            raise WorkerFailed("memory", "out of memory")
        self.device.standing[self.name] = self.options["idle"]
        return {"facts": {}}

    def steps(self, n, seconds):
        self.device.orders.append(self.name)
        steps = []
        for _ in range(n):
            self.done += 1
            if self.done == self.options.get("fails"):
                del self.device.standing[self.name]
                raise WorkerFailed("error", "it broke")
            first, more = self.options.get("loss", (1, 0.0))
            loss = 1 / self.done + (more if self.done >= first else 0.0)
            steps.append({"loss": loss, "seconds": self.options.get("seconds", 1.0)})
        held, idle = self.options["held"], self.options["idle"]
        memory = {"held_bytes": held, "idle_bytes": idle, "peak_bytes": held, "resident_peak_bytes": held}
        return {"steps": steps, **memory, "free_bytes": 100 - sum(self.device.standing.values())}

    def profile(self, seconds):
        return {"trace": {"of": self.name}}

    def end(self):
        self.device.standing.pop(self.name, None)


COURSE = Course({"rows": "even"}, "grouped", tolerance=0.01, turns=2, measured=2, warm=1, checks=1)


def run_race(*contenders, course=COURSE):
    device = FakeDevice()
    race = Race(course, list(contenders), device, seconds=60, say=lambda line: None)
    race.run()
    assert not device.standing  # everybody was told to let go
    return race, device


def runner(name, held=20, idle=10, sizes_of=None, checkpointed=None, **options):
    options |= {"held": held, "idle": idle}
    return Contender(name, "toy", options, BATCHED, sizes_of=sizes_of, checkpointed=checkpointed)


def test_contenders_take_turns_and_failures_are_results():
    wrong, broken = runner("wrong", loss=(1, 0.02)), runner("broken", fails=5)
    race, device = run_race(runner("ours"), runner("a"), wrong, broken, runner("b"))
    states = {name: entry.state for name, entry in race.entries.items()}
    states_wanted = ["measured", "measured", "disagrees", "error", "measured"]
    assert states == dict(zip(["ours", "a", "wrong", "broken", "b"], states_wanted))
    assert "loss 1.02000 in step 1" in race.entries["wrong"].why
    assert not race.entries["wrong"].turns
    turns = device.orders[5:]  # after everybody's first steps
    assert turns == ["ours", "a", "broken", "b", "ours", "a", "broken", "b"]
    assert race.entries["a"].turns == [[1.0, 1.0], [1.0, 1.0]]
    assert race.entries["ours"].trace == {"of": "ours"}


def test_a_late_disagreement_is_seen():
    """The first loss is log 2 whatever a trainer does: those after it count too."""
    drifting, fine = runner("drifting", loss=(3, 0.02)), runner("fine", loss=(4, 0.02))
    grouped = replace(drifting, name="grouped", grouped=True)  # from its second step on other rows
    race, _ = run_race(runner("ours"), drifting, fine, grouped)
    assert race.entries["drifting"].state == "disagrees"
    assert "loss 0.35333 in step 3" in race.entries["drifting"].why
    assert race.entries["fine"].state == race.entries["grouped"].state == "measured"


def test_who_does_not_fit_opens_the_next_set():
    big = runner("big", held=75, idle=70)
    race, _ = run_race(runner("ours", 30, 20), runner("a", 30, 20), big, runner("b", 30, 20))
    assert race.sets == [["ours", "a", "b"], ["ours", "big"]]
    assert {entry.state for entry in race.entries.values()} == {"measured"}
    assert race.entries["big"].set_number == 1
    # It would fit while the others wait, but not beside what one of them takes in its step.
    race, _ = run_race(runner("ours", 30, 20), runner("a", 30, 20), runner("idle", 52, 52))
    assert race.sets == [["ours", "a"], ["ours", "idle"]]


def test_out_of_memory_is_told_of_the_whole_device():
    small = runner("huge, checkpointing")
    huge, large = runner("huge", held=101, checkpointed=small), runner("large", held=90)
    race, _ = run_race(runner("ours", 30, 20), huge, large)
    assert race.entries["huge"].state == "memory"
    assert race.entries["huge, checkpointing"].state == "measured"
    assert race.entries["large"].state == "measured" and race.entries["large"].set_number is None
    assert len(race.entries["large"].turns) == 2
    assert race.sets == [["ours", "huge, checkpointing"], ["ours"]]


def test_only_the_fastest_batch_sizes_go_on():
    sizes = [runner(f"size {s}", sizes_of="TRL", seconds=s) for s in (3.0, 1.0, 1.1, 2.0)]
    race, _ = run_race(runner("ours"), *sizes)
    states = [race.entries[size.name].state for size in sizes]
    assert states == ["slower", "measured", "measured", "slower"]
    assert race.entries["size 3.0"].why == "slower than size 1.0 in the first steps"


def test_the_numbers_that_are_told():
    plan = Plan("CPU", "hh real", "cpu", pairs=2, turns=2, measured=2, minutes=1)
    ours, peer = fastdpo(8192), trl(2, 2, MODELS["CPU"], "cpu")
    race = Race(COURSE, [ours, peer], None, 1.0)
    memory = {"peak_bytes": 2e9, "resident_peak_bytes": 2e9}
    turns = [[1.0, 1.0], [2.0, 2.0]]  # the machine slowed down between the turns
    race.entries = {
        "fastdpo": Entry("measured", turns=turns, losses=[0.7], memory=memory, set_number=0),
        peer.name: Entry("measured", turns=[[3.0, 3.0], [6.0, 6.0]], losses=[0.7], set_number=0),
    }
    race.entries[peer.name].memory = {name: 2 * value for name, value in memory.items()}
    race.ours_turns = [turns]
    rows_of = {False: [[PairLengths(10, 5, 5)] * 2]}
    numbers = {c.name: told(c, race, rows_of, plan, ceiling_tflops=1e-3) for c in (ours, peer)}
    mark_fastest(numbers)
    theirs = numbers[peer.name]
    assert theirs["fastdpo_times_faster"] == 3.0  # each beside its own, not the middle of all
    assert theirs["fastdpo_memory_ratio"] == 0.5 and theirs["fastest_of_family"]
    assert theirs["pairs_per_second"] == pytest.approx(2 / 4.5)
    assert theirs["useful_tokens_per_second"] == pytest.approx(40 / 4.5)
    assert theirs["slowest_and_fastest"] == pytest.approx([2 / 6, 2 / 3])
    assert theirs["flop_ratio"] > 1 and numbers["fastdpo"]["flop_ratio"] == 1
    useful = race_module.How() == USEFUL and numbers["fastdpo"]["flops"]
    assert numbers["fastdpo"]["flop_utilisation"] == pytest.approx(useful / 1.5 / 1e9)
    race.entries[peer.name].state = "disagrees"
    assert "pairs_per_second" not in told(peer, race, rows_of, plan, 1.0)


def test_steps_are_alike_and_grouped_ones_homogeneous():
    plan = Plan("Qwen2.5-0.5B", "HH-RLHF", "cuda", pairs=16, turns=2, measured=3, minutes=1, warm=1, checks=2)
    pool = pool_of(plan)
    even = even_steps(pool, 16, 4)
    tokens = [sum(map(sum, step)) for step in even]
    assert max(tokens) < 1.15 * min(tokens)
    mean = np.mean([sum(row) for row in pool])
    assert sum(tokens) / 64 == pytest.approx(mean, rel=0.03)
    grouped = grouped_steps(pool, 16, 6)
    assert len({tuple(row) for step in grouped for row in step} & set(map(tuple, pool))) > 80
    spread = lambda step: max(map(width, step)) / min(map(width, step))
    assert np.median([spread(step) for step in grouped]) < 1.1 < 2 < min(spread(step) for step in even)
    order = in_turns(["first"], list("abcdef"), plan)
    assert order == ["first", "first", *"aabc", *"ddef"]


def test_packing_apart_takes_the_places_that_are_counted():
    groups = groups_of(random_rows([PairLengths(5, 3, 4), PairLengths(2, 1, 6)], 100))
    batch, shared = pack_apart(groups), pack(groups)
    counted = sum(with_own_prompts(group).input_tokens for group in groups)
    assert batch.input_ids.numel() == counted == 2 * (5 + 2) + 3 + 4 + 1 + 6 - 4
    assert batch.pairs.tolist() == [[0, 1], [2, 3]] and batch.target.equal(shared.target)
    predicting = lambda b: b.input_ids[0, b.score_row].tolist()
    assert predicting(batch) == predicting(shared)


class Recorder:
    """A session in this process: n steps, and their losses."""

    def __init__(self, n):
        self.left, self.losses, self.told = n, [], []

    def ready(self, **facts):
        self.facts = json.loads(json.dumps(facts))

    def next_step(self):
        self.left -= 1
        return self.left >= 0

    def done(self, loss, also=lambda seconds: {}):
        self.losses.append(float(loss()))
        self.told.append(also(1.0))


def recorded(contender, job):
    module = pytest.importorskip(contender.module, reason="needs trl")
    recorder = Recorder(4)
    try:
        module.train(job | {"options": contender.options}, recorder)
    except Ended:
        pass
    return recorder


def losses_of(contender, job):
    return recorded(contender, job).losses


def test_trls_stored_reference_is_the_models_own(tmp_path):
    """Equal rows, another model, one process."""
    trl_dpo = pytest.importorskip("benchmarks.peers.trl_dpo", reason="needs trl")
    (tmp_path / "rows.json").write_text(json.dumps([random_rows([PairLengths(9, 5, 4)] * 2, 1000)]))

    def key(model, **keys):
        options = {"batch_size": 1, "best": True, "keys": keys}
        job = trl_dpo.Job(model, str(tmp_path / "rows.json"), "cpu", 1e-3, tiny=True, options=options)
        return trl_dpo.make_token_trainer(job, str(tmp_path / "trl")).train_dataset._fingerprint

    first = key("Qwen2.5-0.5B")
    assert first == key("Qwen2.5-0.5B")
    assert first not in (key("Llama-3.2-1B"), key("Qwen2.5-0.5B", pure_bf16=True))


@pytest.mark.parametrize("model", ["Qwen2.5-0.5B", "Llama-3.1-8B LoRA"])
def test_all_contenders_have_the_same_losses(tmp_path, model):
    lengths = [PairLengths(*n) for n in ((9, 5, 4), (3, 2, 7), (20, 1, 3), (6, 6, 1))]
    rows = random_rows(lengths, 1000)
    (tmp_path / "rows.json").write_text(json.dumps([rows[:2], rows[2:]]))
    job = {"model": model, "rows": str(tmp_path / "rows.json"), "device": "cpu", "tiny": True}
    job["learning_rate"] = 1e-3 if MODELS[model].lora_rank is None else 1e-2
    truth = losses_of(hf_plain(1, 2), job)
    assert abs(truth[0] - np.log(2)) < 1e-6 and min(truth) < np.log(2) - 0.02  # it moves
    field = [fastdpo(40), *ladder(40, 1), trl(1, 2, MODELS[model], "cpu")]
    if MODELS[model].lora_rank is None:
        field.append(trl(2, 2, MODELS[model], "cpu").checkpointed)
    for contender in field:
        assert losses_of(contender, job) == pytest.approx(truth, abs=2e-5), contender.name
    assert tuple(RUNGS) == LADDER
