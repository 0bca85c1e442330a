"""DTensors, as FSDP2 leaves weights, in two processes: what is frozen is gathered, what trains is refused."""

import os

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from fastdpo_kernels import linear_dpo, linear_logp

if not dist.is_available():
    pytest.skip("torch without distributed", allow_module_level=True)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Partial, Shard, distribute_tensor

V, D, M = 11, 6, 8
PAIRS = (torch.tensor([0, 3, 8]), torch.tensor([[0, 1]]))


def drawn(rank):
    """The head, the same everywhere: weight, bias, A, B; and a rank's own rows."""
    torch.manual_seed(0)
    head = [torch.randn(*shape) for shape in ((V, D), (V,), (2, D), (V, 2))]
    torch.manual_seed(1 + rank)
    return head, torch.randn(M, D), torch.randint(0, V, (M,))


def call(function, hidden, target, weight, bias, a, b):
    options = dict(bias=bias, lora=(a, b, 0.5))
    if function is linear_logp:
        return linear_logp(hidden, weight, target, **options).sum()
    return linear_dpo(hidden, weight, target, *PAIRS, **options)[0]


def frozen_is_gathered(rank, mesh, function):
    head, hidden, target = drawn(rank)
    shards = [distribute_tensor(t, mesh, [Shard(0)]) for t in head]
    assert shards[0].to_local().shape[0] < V
    hidden.requires_grad_()
    found = []
    for tensors in (head, shards):
        loss = call(function, hidden, target, *tensors)
        found.append([loss.detach(), torch.autograd.grad(loss, hidden)[0]])
    assert all(map(torch.equal, *found))
    with torch.no_grad():  # where no gradient is made, all are
        loss = call(function, hidden, target, *[t.requires_grad_() for t in shards])
        assert torch.equal(loss, found[0][0])


def trained_is_refused(rank, mesh, function):
    head, hidden, target = drawn(rank)
    sharded = lambda t: distribute_tensor(t, mesh, [Shard(0)]).requires_grad_()
    names = ("hidden", "target", "weight", "bias", "lora A", "lora B")
    for i, name in enumerate(names):
        tensors = [hidden, target, *head]
        tensors[i] = distribute_tensor(target, mesh, [Shard(0)]) if i == 1 else sharded(tensors[i])
        with pytest.raises(
            ValueError, match=rf"tensor for {name}, got a DTensor of placements \(Shard\(dim=0\)"
        ):
            call(function, *tensors)


def the_callers_way_to_a_gradient(rank, mesh, function):
    """What the refusal names: full_tensor(grad_placements=[Partial("avg")])."""
    (weight, *rest), hidden, target = drawn(rank)
    shard = distribute_tensor(weight, mesh, [Shard(0)]).requires_grad_()
    whole = shard.full_tensor(grad_placements=[Partial("avg")])
    call(function, hidden, target, whole, *rest).backward()
    of_ranks = []
    for other in range(2):
        (weight, *rest), hidden, target = drawn(other)
        loss = call(function, hidden, target, weight.requires_grad_(), *rest)
        of_ranks += torch.autograd.grad(loss, weight)
    torch.testing.assert_close(shard.grad.full_tensor(), sum(of_ranks) / 2)


def slices_and_main_gradients_are_plain(rank, mesh, function):
    """A gathered head would be no slice, and what a GEMM adds to has to be plain."""
    (weight, *_), hidden, target = drawn(rank)
    shard = distribute_tensor(weight, mesh, [Shard(0)])
    with pytest.raises(ValueError, match="tensor for weight, got a DTensor"):
        linear_logp(hidden, shard, target, process_group=dist.group.WORLD)
    with pytest.raises(ValueError, match=r"needs grad_into .* got DTensor"):
        linear_logp(hidden, weight, target, grad_into=distribute_tensor(0 * weight, mesh, [Shard(0)]))


def work(rank, store):
    dist.init_process_group("gloo", f"file://{store}", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    for check in (frozen_is_gathered, trained_is_refused, the_callers_way_to_a_gradient):
        for function in (linear_logp, linear_dpo):
            check(rank, mesh, function)
    slices_and_main_gradients_are_plain(rank, mesh, linear_logp)
    dist.barrier()  # else one might close what the other still reads
    dist.destroy_process_group()
    os._exit(0)  # threads of torch's collectives may outlive the group, and abort a process that winds down


def test_frozen_dtensors_are_gathered_and_trained_ones_refused(tmp_path):
    mp.spawn(work, (tmp_path / "store",), nprocs=2)
