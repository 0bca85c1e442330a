"""The fake CUDA device itself: every kind of wait and of mixed devices is seen where it is put into a step.
And what the trainer does while the device computes."""

import importlib
from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("triton")
import torch
from fastdpo_kernels import launch, triton_finish
from rich.console import Console

from fastdpo import records
from fastdpo.data.packing import pack
from fastdpo.data.store.facts import Facts
from fastdpo.errors import TrainingError
from fastdpo.model.policy import Policy
from fastdpo.moving import ALIGNED, to_host
from fastdpo.objectives.seam import Term
from fastdpo.optim.library import Library
from fastdpo.records import ResponseLogps
from fastdpo.reference import fill as ref_fill
from fastdpo.reference.cache import RefCache
from fastdpo.training import stage
from fastdpo.training.accumulate import Accumulator
from fastdpo.training.stage import Stage
from tests.tiny import group, groups
from tests.training.fake_cuda import CUDA, Counted, Wait
from tests.training.fake_driver import fake_cuda
from tests.training.test_fake_cuda import expected, make_stage, train

# the function linear_logp hides the module of that name
head = importlib.import_module("fastdpo_kernels.linear_logp")
CHECK, LOG = "stage.Stage.step", "metrics.Sums.means"  # the last step logs


def after(owner, name, fault):
    """Puts fault(result, arguments) behind every call of owner.name; returns what monkeypatch needs."""
    real = getattr(owner, name)

    def faulty(*args, **keys):
        out = real(*args, **keys)
        fault(out, args)
        return out

    return owner, name, faulty


FAULTS = {
    "item after the forward": (Stage, "score", lambda logps, args: logps.token_logp.sum().item()),
    "a copy to the host": (Stage, "score", lambda logps, args: logps.token_logp.detach().cpu()),
    "tolist": (Stage, "score", lambda logps, args: logps.pairs.tolist()),
    "synchronize": (Stage, "score", lambda logps, args: torch.cuda.synchronize()),
    "an if in the loss": (Term, "sum", lambda loss, args: bool(loss > 0)),
    "boolean indexing in the loss": (Term, "sum", lambda loss, args: args[1].score[args[1].score > 0]),
    "nonzero in the loss": (Term, "sum", lambda loss, args: torch.where(args[1].score > 0)),
    "repeat_interleave": (Term, "sum", lambda loss, args: args[1].score.repeat_interleave(args[1].lengths)),
    "segments by lengths": (
        *(Term, "sum"),
        lambda loss, args: torch.segment_reduce(args[1].token_logp, "sum", lengths=args[1].lengths),
    ),
    "an index on the host": (Term, "sum", lambda loss, args: args[1].score[torch.tensor([1, 0])]),
    "a tensor of numbers": (Term, "sum", lambda loss, args: torch.tensor([1.0, 2.0], device=CUDA)),
    "a float in the metrics": (Stage, "add_metrics", lambda none, args: float(args[2].token_logp.mean())),
    "equal in the metrics": (
        *(Stage, "add_metrics"),
        lambda none, args: torch.equal(args[2].score, args[2].score),
    ),
    "item in the head's backward": (head, "_backward", lambda grads, args: grads[0].sum().item()),
    "isfinite in the optimizer": (
        *(Library, "step"),
        lambda none, args: [bool(p.isfinite().all()) for p in args[1][0][0]],
    ),
    "the batch once more": (
        *(records, "to_device"),
        lambda moved, args: [t.to(CUDA, non_blocking=True) for t in args[0]],
    ),
    "a pinned batch, waited for": (
        *(records, "to_device"),
        lambda moved, args: args[0][0].pin_memory().to(CUDA),
    ),
    "a pinned copy to the host, waited for": (
        *(Stage, "score"),
        lambda logps, args: torch.empty(3, pin_memory=True).copy_(logps.token_logp[:3].detach()),
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_wait_in_a_step_is_seen(name, monkeypatch):
    """Once a step at least, beside the waits by design."""
    monkeypatch.setattr(*after(*FAULTS[name]))
    with fake_cuda() as device:
        made = make_stage(device, max_steps=1)
        design = expected(made)
        try:
            train(made, device)
        except Counted:  # nothing goes on after a size that is counted on the device
            pass
    more = {key: n for key, n in device.counts().items() if n > design.get(key, 0)}
    assert more, device.counts()


@pytest.mark.parametrize("batch", [lambda t: t.to(CUDA), lambda t: t.to(CUDA, non_blocking=True)])
def test_a_batch_that_goes_tensor_by_tensor_is_seen(batch, monkeypatch):
    """What the trainer once did: 21 blocking copies a microbatch; without pinning, asking for more changes
    nothing."""
    monkeypatch.setattr(records, "to_device", lambda tensors, device: [batch(t) for t in tensors])
    with fake_cuda() as device:
        train(make_stage(device, max_steps=1), device)
    blocking = [wait for wait in device.waits if wait.what == "blocking copy"]
    assert len(blocking) >= 2 * 19


MIXED = {
    "a vector of the host": lambda logps: logps.token_logp + torch.zeros(len(logps.token_logp)),
    "lengths of the host": lambda logps: logps.per_response(torch.zeros(len(logps.token_logp))),
    "one of each": lambda logps: torch.stack([logps.token_logp.sum(), torch.zeros(())]),
}


@pytest.mark.parametrize("name", MIXED)
def test_mixed_devices_are_seen(name, monkeypatch):
    monkeypatch.setattr(*after(Stage, "score", lambda logps, args: MIXED[name](logps)))
    with fake_cuda() as device:
        made = make_stage(device, max_steps=1)
        with pytest.raises(Exception, match="device"):
            train(made, device)


def test_a_kernel_on_a_tensor_of_the_host_is_seen(monkeypatch):
    real = launch.run

    def run(kernel, programs, *arguments, **constants):
        if kernel is triton_finish.finish_rows:
            arguments = (*arguments[:4], torch.zeros(9), arguments[5])
        real(kernel, programs, *arguments, **constants)

    monkeypatch.setattr(launch, "run", run)
    with fake_cuda() as device:
        made = make_stage(device, max_steps=1)
        with pytest.raises(AssertionError, match="finish_rows: logp_ptr is on cpu"):
            train(made, device)


def test_a_number_of_the_host_beside_the_device_waits_for_nothing():
    with fake_cuda() as device, device:
        some = torch.zeros(3, device=CUDA)
        for out in (some + torch.ones(()), torch.where(some > 0, some, 2.0), some.clamp(min=0).mul_(3.0)):
            assert out.device == CUDA and out.is_cuda
    assert not device.waits and not device.copies


def test_the_hosts_tensors_are_real():
    with fake_cuda() as device, device:
        assert torch.arange(5).sum().item() == 10 and torch.tensor([1.0, 2.0]).tolist() == [1, 2]
        assert torch.empty(3, pin_memory=True).is_pinned() and not torch.empty(3).is_pinned()
    assert not device.waits and not torch.empty(3).is_pinned()


def test_what_is_patched_is_as_before():
    before = torch.cuda.is_available(), torch.version.cuda, torch.cuda.current_stream
    with fake_cuda():
        assert torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
    assert (torch.cuda.is_available(), torch.version.cuda, torch.cuda.current_stream) == before


# What the trainer does meanwhile


@pytest.mark.parametrize("share", [True, False])
def test_a_batch_goes_over_in_one_buffer(share):
    """Byte by byte: each tensor lies whole and aligned in what was copied, and comes out where it lies."""
    batch = pack(groups(), share)
    before = list(batch._tensors())
    with fake_cuda() as device, device:
        moved = batch.to("cuda:0")
        after_ = list(moved._tensors())
    ((where, buffer),) = device.copies
    assert where == "moving.to_device" and not device.waits
    assert len(before) == len(after_) > 10 and moved.rows == batch.rows
    ends = 0
    for old, new in zip(before, after_):
        start = new.storage_offset() * new.itemsize
        assert (new.device, new.dtype, new.shape) == (CUDA, old.dtype, old.shape) and new.is_contiguous()
        assert start % ALIGNED == 0 and start >= ends
        ends = start + old.nbytes
        assert torch.equal(buffer[start:ends], old.flatten().view(torch.uint8))
    if share:
        assert moved.layout.segments == batch.layout.segments and moved.layout.max_k == batch.layout.max_k


def test_what_is_kept_is_no_view_of_a_microbatch():
    with fake_cuda() as device, device:
        moved = pack(groups()).to("cuda:0")
        logps = ResponseLogps.of(moved, torch.zeros(len(moved.target), device=CUDA))
        of_its_own = lambda record: [
            value.untyped_storage().nbytes() == value.nbytes
            for value in vars(record).values()
            if isinstance(value, torch.Tensor)
        ]
        assert all(of_its_own(logps.kept())) and not all(of_its_own(logps))


def test_on_the_host_nothing_is_copied():
    batch = pack(groups())
    assert all(a is b for a, b in zip(batch._tensors(), batch.to("cpu")._tensors()))
    some = torch.arange(3)
    copy, arrived = to_host(some)
    arrived()
    assert torch.equal(copy, some) and copy is not some


def events_of(monkeypatch, device) -> list[str]:
    """What happens, in order: "pack", "score", "seen" (its backward was queued), and where waits are."""
    events = []
    for owner, name in ((Policy, "pack"), (Stage, "score"), (Stage, "add_metrics")):
        word = "seen" if name == "add_metrics" else name
        monkeypatch.setattr(*after(owner, name, lambda out, args, word=word: events.append(word)))
    device.told = lambda wait: events.append(wait.where)
    return events


def test_packing_overlaps_the_device(monkeypatch):
    """A microbatch is packed once the one before is queued, the next step's first before the step waits."""
    with fake_cuda() as device:
        made = make_stage(device, logging_steps=None, objective="simpo")
        events = events_of(monkeypatch, device)
        train(made, device)
    one = ["score", "seen"]
    assert events == [
        *("pack", *one, "pack", *one, "pack", CHECK),
        *(*one, "pack", *one, CHECK, LOG),
    ]


def test_two_passes_pack_once_and_meanwhile(monkeypatch):
    with fake_cuda() as device:
        made = make_stage(device, logging_steps=None, objective="aot", max_steps=1)
        events = events_of(monkeypatch, device)
        train(made, device)
    twice = ["score", "seen"] * 2
    assert events == ["pack", "score", "pack", "score", *twice, CHECK, "stage.Stage.run", LOG]


AHEAD = {
    "sigmoid": {},
    "kto": dict(objective="kto"),
    "aot and kto": dict(objective={"aot": 1.0, "kto": 0.5}),
    "scopes": dict(objective="drdpo", objective_args={"scope": 2}, max_tokens=1000),
}


@pytest.mark.parametrize("name", AHEAD)
def test_what_was_packed_ahead_is_what_the_step_begins_with(name, monkeypatch):
    with fake_cuda() as device:
        made = make_stage(device, logging_steps=None, **AHEAD[name])
        events = events_of(monkeypatch, device)
        train(made, device)
    assert next(e for e in events[events.index(CHECK) :] if e in ("pack", "score")) == "score"
    size = getattr(made.objective, "within", None) or made.job.batch_size
    steps = list(stage.step_groups(made.groups, made.job, made.total))
    scopes = [some[i : i + size] for some in steps for i in range(0, len(some), size)]
    parts = [part for some in (*scopes, *map(made.aside, steps)) for part in made.cut(some)[0]]
    assert events.count("pack") == len(parts) and made.ahead == (None, None)


def test_a_parameter_without_dimensions_is_scaled_too():
    with fake_cuda() as device, device:
        scale = torch.zeros((), device=CUDA, requires_grad=True)
        scale.grad = torch.ones((), device=CUDA)
        Accumulator([scale], None, None, None, None, {})._scale_gradients(
            torch.ones((), device=CUDA).double()
        )
        assert scale.grad.shape == () and not device.waits


@pytest.fixture
def fill(monkeypatch):
    def fill(device, n=4, repeated=False, check=lambda: None, **keys):
        """What a fill of so many packs does, in order, and its cache."""
        some = [group(row // 2 if repeated else row, 6, [7, 4]) for row in range(n)]
        policy = make_stage(device, groups=some).policy
        facts = Facts.of(some)
        packs = [ref_fill._packs(some, facts, max_tokens=1, share=True)]
        wanted = np.unique(facts.key)
        cache = RefCache(None, SimpleNamespace(namespace="00"), wanted, None)
        events, added = [], []
        monkeypatch.setattr(*after(Policy, "pack", lambda batch, args: events.append("pack")))
        monkeypatch.setattr(
            *after(cache, "add", lambda none, args: added.append(args) or events.append("add"))
        )
        device.told = lambda wait: events.append("wait")
        with device:
            done = ref_fill._fill(policy, packs, len(wanted), cache, Console(quiet=True), check)[:2]
        return events, done, added

    return fill


def test_a_fill_packs_and_stores_while_the_device_computes(fill):
    with fake_cuda() as device:
        events, (packs, tokens), added = fill(device)
    once = ["wait", "add"]
    assert events == ["pack", "pack", *once, "pack", *once, "pack", *once, *once]
    assert device.counts() == {("fill._Computed.values", "synchronise"): 4}
    assert packs == 4 and tokens == 4 * (6 + 6 + 3)
    there, back = ("moving.to_device", "moving.to_host")
    assert sorted(copy.where for copy in device.copies) == [there] * 4 + [back] * 4
    assert [lengths.tolist() for _, lengths, _ in added] == [[5, 2]] * 4
    pinned = [torch.empty(0, dtype=torch.uint8).set_(some).numpy() for some in device._pinned.values()]
    assert pinned and not any(np.shares_memory(v, p) for *_, v in added for p in pinned)


def test_a_fill_computes_nothing_that_is_on_its_way(fill):
    """The second pack's responses are the first one's, which the device still computes."""
    with fake_cuda() as device:
        events, (packs, _), _ = fill(device, repeated=True)
    assert packs == 2 and events.count("pack") == 2


def test_a_stopped_fill_keeps_what_has_arrived(fill):
    def check():
        raise KeyboardInterrupt

    with fake_cuda() as device, pytest.raises(KeyboardInterrupt):
        fill(device, check=check)
    assert device.waits == [Wait("fill._Computed.values", "synchronise")]


def test_a_fill_that_fails_keeps_what_was_computed_before(fill, monkeypatch):
    computed, asked = ref_fill._computed, []

    def fails_at_the_third(policy, groups):
        asked.append(groups)
        if len(asked) == 3:
            raise TrainingError("out of GPU memory")
        return computed(policy, groups)

    monkeypatch.setattr(ref_fill, "_computed", fails_at_the_third)
    with fake_cuda() as device, pytest.raises(TrainingError):
        fill(device)
    assert device.waits == [Wait("fill._Computed.values", "synchronise")] * 2
