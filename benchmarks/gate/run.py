"""The correctness gate: no time is worth telling of kernels that are wrong.

    python -m benchmarks.gate.run [--out DIR]      prints what is wrong, and exits 1 where anything is

The head against the fp64 definition by every plan and loss, the gather of keys and values and the
attention over shared prompts against their definitions, shared prompts against separate rows through a
whole model, and two optimizer steps of the trainer against a plain loop. Seconds, on any device.
"""

import argparse
import copy
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console

from benchmarks import inputs
from benchmarks.gate.head import BOUNDS, head_failures, relative
from benchmarks.lengths import PairLengths
from benchmarks.models import MODELS, BenchModel, build, tiny
from benchmarks.results import write_result
from fastdpo.config.keys import Config
from fastdpo.data.packing import pack
from fastdpo.model import attention
from fastdpo.model.policy import Policy
from fastdpo.model.support import stock_logp
from fastdpo.optim.optimizers import make_optimizer
from fastdpo.reference.fill import load_reference
from fastdpo.training.job import stage_job
from fastdpo.training.stage import Progress, Stage

BETA, RATE, STEPS, BATCH = 0.1, 1e-3, 2, 4
QUIET = Console(quiet=True)


def check(device: str, dtype: torch.dtype) -> list[str]:
    """What is wrong, a line each; [] where everything is right. A part that cannot run is wrong."""
    parts = {
        "head": head_failures,
        "attention": attention_failures,
        "shared prompt": sharing_failures,
        "trainer": trainer_failures,
    }
    found = []
    for name, part in parts.items():
        print(f"gate: {str(dtype).split('.')[1]}, {name}", flush=True)  # the last line names what hangs
        try:
            found += part(device, dtype)
        except Exception as error:  # the news of a gate: the other parts go on
            found.append(f"{name}: cannot run: {type(error).__name__}: {error}")
    return found


def gate_model() -> BenchModel:
    """Two layers with weights so large that a wrong mask shows in the first digits."""
    small = tiny(MODELS["Qwen2.5-0.5B"])
    return replace(small, config=small.config | {"initializer_range": 0.12})


def gate_groups(n: int = 2 * BATCH) -> list:
    """Pairs of random tokens: one-token prompts and responses among them."""
    lengths = [PairLengths(13, 7, 1), PairLengths(1, 2, 9), PairLengths(40, 12, 5), PairLengths(9, 1, 1)]
    lengths += [PairLengths(3 + 5 * i % 17, 1 + 7 * i % 11, 2 + 3 * i % 8) for i in range(n - len(lengths))]
    return inputs.groups_of(inputs.random_rows(lengths, gate_model().vocab))


def attention_failures(device: str, dtype: torch.dtype) -> list[str]:
    """The gather of a prompt's keys for each of its responses, and attention against a dense mask."""
    layout = pack(gate_groups()).to(torch.device(device)).layout
    T, heads, kv_heads, size = len(layout.seen_until), 4, 2, 16
    draw = torch.Generator().manual_seed(0)
    normal = lambda *shape: torch.randn(*shape, generator=draw).to(device, dtype)
    rows, upstream = normal(T, kv_heads, size), normal(len(layout.kv_index), kv_heads, size)
    ours, truth = _with_gradients(lambda k: attention.gather_copies(k, layout), upstream, rows)
    wide = [t.double() for t in (upstream, rows)]
    exact, exact_gradient = _with_gradients(lambda k: k[layout.kv_index], *wide)
    bound, found = BOUNDS[dtype].gradient, []
    if not torch.equal(ours.double(), exact):
        found.append("attention: the gathered keys are not those of the layout")
    if not relative(truth[0], exact_gradient[0]) <= bound:
        found.append("attention: the gradient of the gathered keys is not the sum over their copies")
    q, k, v = normal(T, heads, size), normal(T, kv_heads, size), normal(T, kv_heads, size)
    upstream = normal(T, heads, size)
    with torch.autocast(torch.device(device).type, dtype=dtype, enabled=dtype.itemsize == 2):
        ours, gradients = _with_gradients(lambda *x: attention.attend(*x, layout), upstream, q, k, v)
    wide = [t.double() for t in (upstream, q, k, v)]
    exact, truths = _with_gradients(lambda *x: attention.attend(*x, layout, backend="dense"), *wide)
    pairs = {"output": (ours, exact)}
    pairs |= {f"gradient of {name}": pair for name, pair in zip("qkv", zip(gradients, truths))}
    for name, (got, wanted) in pairs.items():
        if not (error := relative(got, wanted)) <= 2 * bound:
            found.append(f"attention: {name} off by {error:.1e} from a dense mask's")
    return found


def _with_gradients(function: Callable, upstream, *tensors):
    """(its value, the gradient of each tensor)."""
    leaves = [t.detach().requires_grad_() for t in tensors]
    out = function(*leaves)
    return out.detach(), torch.autograd.grad(out, leaves, upstream.to(out.dtype))


def dpo(logratios: torch.Tensor) -> torch.Tensor:
    """The mean DPO loss of log-ratios [R] of winners and losers, side by side."""
    return -F.logsigmoid(BETA * (logratios[0::2] - logratios[1::2])).mean()


def sharing_failures(device: str, dtype: torch.dtype) -> list[str]:
    """Loss and every gradient of a whole model, prompts shared, against fp32 on separate rows."""
    groups, bounds = gate_groups(), BOUNDS[dtype]
    model = build(gate_model(), device, torch.float32).train()
    batch = pack(groups).to(torch.device(device))
    sizes = [int(r.target_mask.sum()) for g in groups for r in g.responses]
    by_response = lambda logp: torch.stack([part.sum() for part in logp.split(sizes)])
    results = []
    for policy in (Policy(copy.deepcopy(model), torch.float32), Policy(model, dtype)):
        if results:
            policy.set_sharing(True)
            logp = policy.token_logp(batch)
        else:
            logp = torch.cat([stock_logp(policy, group) for group in groups])
        loss = dpo(by_response(logp))
        loss.backward()
        gradients = {n: p.grad for n, p in policy.model.named_parameters() if p.grad is not None}
        results.append((logp.detach(), loss.detach(), gradients))
    (truth, true_loss, true_gradients), (logp, loss, gradients) = results
    found = []
    if not (nats := (logp - truth).abs().max().item()) <= bounds.model_nats:
        found.append(f"shared prompt: log-probs off by {nats:.1e} nats from separate rows'")
    if not (error := relative(loss, true_loss)) <= bounds.model:
        found.append(f"shared prompt: the loss off by {error:.1e} from separate rows'")
    if gradients.keys() != true_gradients.keys():
        found.append("shared prompt: other parameters get a gradient than on separate rows")
    error = relative(_flat(gradients.values()), _flat(true_gradients[n] for n in gradients))
    if not error <= bounds.model:
        found.append(f"shared prompt: gradients off by {error:.1e} from separate rows'")
    return found


def _flat(tensors) -> torch.Tensor:
    return torch.cat([t.detach().double().flatten() for t in tensors])


def trainer_failures(device: str, dtype: torch.dtype) -> list[str]:
    """Optimizer steps of Stage, each of several microbatches, against a loop in plain torch."""
    groups, bounds = gate_groups(STEPS * BATCH), BOUNDS[dtype]
    model = build(gate_model(), device, torch.float32).train()
    start, plain = _flat(model.parameters()), copy.deepcopy(model)
    truths = plain_steps(Policy(plain, torch.float32), groups)
    ours = trainer_steps(Policy(model, dtype), groups)
    found = []
    for step, (wanted, got) in enumerate(zip(truths, ours), 1):
        for name, a, b in zip(("loss", "gradient norm"), got, wanted):
            if not abs(a - b) <= bounds.model * abs(b):
                found.append(f"trainer: the {name} of step {step} is {a:.6g}, a plain loop's {b:.6g}")
    moved, wanted = _flat(model.parameters()) - start, _flat(plain.parameters()) - start
    if not (error := relative(moved, wanted)) <= bounds.update:
        found.append(f"trainer: how {STEPS} steps move the weights, off by {error:.1e} from a plain loop")
    return found


def trainer_steps(policy: Policy, groups: list) -> list[tuple[float, float]]:
    """(loss, gradient norm) of each of STEPS steps of the trainer's own."""
    config = Config(model="random", data="random", batch_size=BATCH, max_tokens=60, learning_rate=RATE)
    config = replace(config, lr_scheduler_type="constant", beta=BETA, reference_cache="off")
    policy.set_sharing(True)
    stage = Stage(stage_job(config), policy, groups, [])
    options = dict(path=None, fresh_lora=False, max_tokens=config.max_tokens, console=QUIET)
    stage.reference = load_reference(policy, [stage.groups], **options)
    optimizer, _ = make_optimizer(policy, config, STEPS)
    out = []
    for i in range(STEPS):
        progress = Progress()
        norm = stage.step(stage.groups[i * BATCH : (i + 1) * BATCH], progress, i + 1)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        out.append((progress.window.sums.means()["loss"], float(norm)))
    return out


def plain_steps(policy: Policy, groups: list) -> list[tuple[float, float]]:
    """The same by the stock model, one row a response, full logits, torch's AdamW."""
    responses = lambda part: torch.cat([_sums(policy, group) for group in part])
    with torch.no_grad():
        reference = responses(groups)
    optimizer = torch.optim.AdamW(policy.model.parameters(), lr=RATE, weight_decay=0.0)
    out = []
    for i in range(0, len(groups), BATCH):
        loss = dpo(responses(groups[i : i + BATCH]) - reference[2 * i : 2 * (i + BATCH)])
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(policy.model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        out.append((loss.item(), float(norm)))
    return out


def _sums(policy: Policy, group) -> torch.Tensor:
    """The log-prob of each response of a group, [R]."""
    sizes = [int(r.target_mask.sum()) for r in group.responses]
    return torch.stack([part.sum() for part in stock_logp(policy, group).split(sizes)])


def run_gate(device: str) -> dict:
    """The record of all dtypes that training uses on this device."""
    dtypes = [torch.float32, torch.bfloat16]
    start = time.perf_counter()
    failures = [f"{str(dtype).split('.')[1]}: {line}" for dtype in dtypes for line in check(device, dtype)]
    return {"passed": not failures, "failures": failures, "seconds": time.perf_counter() - start}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="a folder: write the verdict there")
    args = parser.parse_args()
    record = run_gate("cuda" if torch.cuda.is_available() else "cpu")
    print("\n".join(record["failures"]) or f"gate: green, {record['seconds']:.1f} s")
    if args.out:
        write_result("gate", record, args.out)
    return 0 if record["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
