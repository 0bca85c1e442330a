"""What ranks agree on without a word, what they refuse, and how they end; one process plays them all."""

import io
import signal
import socket
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from rich.console import Console
from safetensors import safe_open
from safetensors.torch import save_file

from fastdpo.config.keys import Config
from fastdpo.data.dealing import deal_sizes, used_and_room
from fastdpo.data.packing import Size, split_sizes
from fastdpo.distributed import ending, launch
from fastdpo.distributed.ending import Elsewhere, Ending
from fastdpo.distributed.shards import bounds_of
from fastdpo.distributed.turns import Turns
from fastdpo.distributed.world import ALONE, World, buckets, joined
from fastdpo.errors import ConfigError, DataError, Stopped, TrainingError
from fastdpo.training import checkpoint, job, ranks
from fastdpo.training.checkpoint import Tensors
from fastdpo.training.resume import rows_digest
from fastdpo.training.stopping import Stopping
from tests import tiny


def sizes(n, seed):
    draw = np.random.default_rng(seed)
    ranges = (5, 60), (1, 5), (5, 60), (1, 40)
    rows = zip(*(draw.integers(*some, n) for some in ranges))
    return [Size(*map(int, row), number) for number, row in enumerate(rows)]


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
@pytest.mark.parametrize("n", [1, 2, 7, 40])
def test_a_step_is_dealt_whole_and_within_the_caps(n, ranks, share):
    for seed in range(5):
        some, caps = sizes(n, seed), (120, 70, share)
        rounds = deal_sizes(some, ranks, *caps)
        parts = [part for one in rounds for part in one]
        assert sorted(i for part in parts for i in part) == list(range(n))
        assert all(len(one) == ranks and any(one) for one in rounds)
        assert all(all(one) for one in rounds[:-1])  # only the last round has too few
        for part in filter(None, parts):
            assert len(part) == 1 or len(split_sizes([some[i] for i in part], *caps)) == 1
        if ranks == 1:
            assert parts == split_sizes(some, *caps)


def test_work_is_even_where_there_is_enough():
    some = sizes(64, 0)
    used, room = used_and_room(some, deal_sizes(some, 4, 200, None, True))
    assert used == sum(size.tokens for size in some) and 0.9 < used / room <= 1


def test_turns():
    of = lambda rank, n: list(Turns("abcde"[:n], World(rank=rank, size=2)))
    assert of(0, 5) == [(0, "a"), (2, "c"), (4, "e")]
    assert of(1, 5) == [(1, "b"), (3, "d"), (None, "e")]
    assert of(1, 0) == [] and len(Turns("abcde", World(size=2))) == 3
    assert list(Turns("ab", ALONE)) == [(0, "a"), (1, "b")]


def test_parts_of_a_tensor_are_those_of_chunk(tmp_path):
    whole = {"a": torch.arange(14.0).view(7, 2), "b": torch.arange(2.0), "step": torch.tensor(3.0)}
    for number in range(4):
        of = {name: t[slice(*bounds_of(len(t), number, 4))] for name, t in whole.items() if t.ndim}
        chunks = {name: whole[name].chunk(4) for name in of}
        for name, part in of.items():
            expected = chunks[name][number] if number < len(chunks[name]) else whole[name][:0]
            assert part.equal(expected)
        of |= {"step": whole["step"]} if number == 0 else {}
        save_file({n: t.contiguous() for n, t in of.items() if t.numel()}, tmp_path / f"{number}.safetensors")
    files = [safe_open(tmp_path / f"{number}.safetensors", framework="pt") for number in range(4)]
    saved = Tensors(files)
    for name, tensor in whole.items():
        assert saved.shape(name) == tuple(tensor.shape) and saved.read(name).equal(tensor)
    for first, last in [(0, 7), (1, 3), (3, 7), (5, 5), (7, 7)]:
        assert saved.read("a", first, last).equal(whole["a"][first:last])


def test_gradients_go_in_buckets_of_one_dtype(monkeypatch):
    monkeypatch.setattr("fastdpo.distributed.world.BUCKET", 10)
    made = [torch.nn.Parameter(torch.zeros(n, dtype=d)) for n, d in [(4, torch.float32), (6, torch.float32)]]
    made += [torch.nn.Parameter(torch.zeros(n, dtype=torch.bfloat16)) for n in (1, 12)]
    assert [[p.numel() for p in bucket] for bucket in buckets(made)] == [[4, 6], [1], [12]]


def endings(size=2):
    store = dist.HashStore()
    return [Ending(store, rank, size) for rank in range(size)]


def test_one_rank_says_why_and_the_others_end_with_its_code(monkeypatch):
    monkeypatch.setattr(ending, "SOON", 0)
    first, second = endings()
    error = TrainingError("out of memory")
    assert second.cause(error) is error and second.cause(error) is error
    gone = first.cause(RuntimeError("Connection closed by peer"))
    assert isinstance(gone, Elsewhere) and gone.code == 1 and gone.message == "out of memory"
    assert first.cause(gone) is gone


def test_the_exit_code_is_that_of_who_spoke():
    for error, code in [(Stopped(signal.SIGINT), 130), (ConfigError("x"), 2), (KeyError("x"), 1)]:
        first, second = endings()
        assert first.cause(error) is error and second.cause(ValueError("same")).code == code


def test_a_rank_that_was_killed_is_told_in_words():
    first, _ = endings()
    found = first.cause(RuntimeError("[gloo] Connection closed by peer"))
    assert isinstance(found, TrainingError) and "has lost another process" in str(found)
    assert Ending().cause(error := RuntimeError("connection")) is error  # alone


def test_a_signal_that_a_scheduler_and_torchrun_send_is_one():
    stopping = Stopping(Console(quiet=True), World(size=2))
    stopping.saves = True
    for _ in range(2):
        stopping._on_signal(signal.SIGTERM, None)
    stopping._when -= 60  # a minute ago
    with pytest.raises(Stopped):
        stopping._on_signal(signal.SIGTERM, None)


class Waits(World):
    """A rank that notes at each wait whether the checkpoint was there."""

    def wait(self):
        self.ending.append(self.mesh.exists())


def test_no_rank_goes_on_before_the_checkpoint_is_there(tmp_path):
    model = torch.nn.Linear(2, 1)
    seen = []
    for rank in range(2):
        folder = tmp_path / f"step-{rank}"
        world = Waits(rank=rank, size=2, mesh=folder, ending=[])
        policy = SimpleNamespace(world=world, model=model)
        checkpoint.save(folder, policy, SimpleNamespace(tensors=dict), {})
        seen.append(world.ending)
    assert seen == [[False, False, True], [False] * 3]


class Two(World):
    """A rank whose gather also brings what the other one has."""

    def gather(self, value):
        return [value, self.ending]


def two(other):
    return Two(rank=0, size=2, ending=other)


def test_ranks_that_differ_are_refused(monkeypatch):
    rows = tiny.groups()
    with pytest.raises(DataError, match="data: rank 1 on there reads other rows than rank 0 on"):
        ranks.check_same_rows(two((rows_digest(rows[1:], []), "there")), rows, [])
    ranks.check_same_rows(two((rows_digest(rows, []), "there")), rows, [])
    with pytest.raises(ConfigError, match="all nodes need the same versions"):
        ranks.check_alike(two({"python": "3.0"}))


@pytest.mark.parametrize(
    "keys, name",
    [
        (dict(optim="adafactor"), "optim: adafactor"),
        (dict(offload_optimizer=True), "offload_optimizer"),
        (dict(pure_bf16=True), "pure_bf16"),
        (dict(load_in_4bit=True, lora_rank=2), "load_in_4bit"),
        (dict(memory="24GB"), "memory"),
        (dict(optim="adamw_8bit"), "optim: adamw_8bit"),
    ],
)
def test_what_shards_do_not_know_is_refused_by_name(keys, name):
    config, world = Config(model="m", data="d", **keys), World(size=2)
    with pytest.raises(ConfigError, match=f"^{name}: not with shard"):
        job.check_ranks(config, world, sharded=True)
    job.check_ranks(config, world, sharded=False)
    job.check_ranks(config, ALONE, sharded=True)


def test_weights_are_not_updated_in_a_backward_of_several_ranks():
    config = Config(model="m", data="d", optimizer_in_backward=True, max_grad_norm=0.0)
    with pytest.raises(ConfigError, match="optimizer_in_backward: on several GPUs"):
        job.check_ranks(config, World(size=2), sharded=False)


@pytest.mark.parametrize(
    "shard, lora, fits, sharded",
    [
        ("auto", None, False, True),
        ("auto", None, True, False),
        ("auto", None, "no [GPU]'s memory is known", False),
        ("auto", 2, False, False),
        (False, None, False, False),
        (True, 2, True, True),
    ],
)
def test_auto_shards_where_all_weights_train_and_do_not_fit(monkeypatch, shard, lora, fits, sharded):
    monkeypatch.setattr(World, "with_shards", lambda self, hybrid: "sharded")
    monkeypatch.setattr(World, "told", lambda self, make: make())
    config = Config(model="m", data="d", shard=shard, lora_rank=lora)
    world = World(size=2)
    said = Console(file=io.StringIO(), width=200)
    assert (ranks.placed(world, job.job_of(config), lambda: fits, said) == "sharded") == sharded
    told = "shard: auto keeps all weights on each GPU: no [GPU]'s memory is known\n"
    assert said.file.getvalue() == (told if isinstance(fits, str) else "")


def test_gpus_that_are_not_there(monkeypatch):
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    launch.check_gpus(2)
    with pytest.raises(ConfigError, match="--gpus: 4, but this machine has 2; give 2 or less"):
        launch.check_gpus(4)
    with pytest.raises(ConfigError, match="--gpus: 0 is below 1"):
        launch.check_gpus(0)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    with pytest.raises(ConfigError, match="torchrun has started the processes already"):
        launch.check_gpus(2)


def test_the_command_goes_on_without_its_flag(monkeypatch):
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    monkeypatch.setattr(launch, "launch", lambda gpus, words: (gpus, words))
    assert launch.on_gpus(2, ["train", "c.yaml", "--gpus", "2", "--beta=1"]) == (
        2,
        ["train", "c.yaml", "--beta=1"],
    )
    assert launch.on_gpus(2, ["train", "--gpus=2"]) == (2, ["train"])
    assert launch.on_gpus(1, ["train", "--gpus=1"]) is None and launch.on_gpus(None, ["train"]) is None


def test_a_process_group_of_someone_else_is_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    with pytest.raises(ConfigError, match=r"torch\.distributed is initialised already"), joined():
        pass


@pytest.mark.parametrize("told", [{"MASTER_ADDR": "127.0.0.1"}, {}])
def test_a_port_that_is_taken_or_not_said(monkeypatch, told):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        told |= {"MASTER_PORT": str(taken.getsockname()[1])} if told else {}
        for name in ("MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID", "TORCHELASTIC_USE_AGENT_STORE"):
            monkeypatch.delenv(name, raising=False)
        for name, value in (told | {"WORLD_SIZE": "2", "RANK": "0"}).items():
            monkeypatch.setenv(name, value)
        where = ":".join(told.values()) or r"\?:\?"
        with pytest.raises(ConfigError, match=f"rank 0 finds no meeting point at {where}"), joined():
            pass


def test_a_world_size_that_is_set_and_empty_is_none(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "")
    monkeypatch.setenv("RANK", "")
    assert launch.is_first()
    with joined() as world:
        assert world is ALONE
