"""Attention on real length mixes: fastdpo's shared prompt beside every other way to give a trainer its rows.

    python -m benchmarks.attention.run [--out DIR]      toy sizes, any device; gpu/attention.py: real ones

Forward and forward+backward of one layer on one microbatch. Each contender gets its rows in its own form
(shared; separate rows end to end; separate rows padded, PADDED_PAIRS pairs a batch) before the clock runs;
ours gathers its keys inside. Before it is timed each is held against fp64.
"""

import argparse
import gc
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.attention.inputs import AttentionInputs, Heads, Truth
from benchmarks.ceilings import measure as measure_ceilings
from benchmarks.head.run import peak_of, timed
from benchmarks.lengths import PairLengths, draw
from benchmarks.models import MODELS
from benchmarks.results import RESULTS, write_result
from fastdpo.model.attention import attend, gather_copies

Call = Callable[[Tensor, Tensor, Tensor], Tensor]
MODES = ("forward", "forward+backward")
OURS = "shared, fastdpo"
MISSES = 8
# Relative errors against fp64 on the same rounded inputs; a wrong mask errs by 1e-1 and more.
LIMIT = {torch.bfloat16: 2e-2, torch.float32: 1e-5}


class CannotRunError(Exception):
    """A contender has nothing to say on this machine."""


def heads_of(name: str) -> Heads:
    """Head counts of one of MODELS."""
    model = MODELS[name]
    return Heads(model.heads, model.kv_heads, model.head_dim)


def microbatch(mix: str, tokens: int) -> list[PairLengths]:
    """Pairs of a mix, in order, that fill `tokens` places with shared prompts: those that no longer fit are
    passed over, up to MISSES. The shortest one where none fits."""
    rows, misses, out, used = iter(draw(mix, tokens)), 0, [], 0
    while misses < MISSES and (row := next(rows, None)):
        size = sum(row) - 2
        if used + size <= tokens:
            out.append(row)
            used += size
        else:
            misses += 1
    return out or [min(draw(mix, tokens), key=sum)]


def _ours(layout, backend: str | None = None) -> Call:
    return lambda q, k, v: attend(q, k, v, layout, backend=backend)


def _needs_cuda(inputs: AttentionInputs) -> None:
    if not inputs.source["q"].is_cuda:
        raise CannotRunError("its kernels are for CUDA")


def separate_varlen(inputs: AttentionInputs) -> Call:
    """torch.nn.attention.varlen: what packing without sharing takes."""
    _needs_cuda(inputs)
    return _ours(inputs.separate, "varlen")


def flash_attn(form: str) -> Callable[[AttentionInputs], Call]:
    """flash-attn 2's varlen kernel at its fastest: its backward is not deterministic."""

    def make(inputs):
        from flash_attn import flash_attn_varlen_func

        _needs_cuda(inputs)
        layout = getattr(inputs, form)
        sizes = (layout.cu_q, layout.cu_k, layout.max_q, layout.max_k)

        def call(q, k, v):
            k, v = gather_copies(k, layout), gather_copies(v, layout)
            return flash_attn_varlen_func(q, k, v, *sizes, causal=True)

        return call

    return make


def flex(inputs: AttentionInputs) -> Call:
    """FlexAttention under the shared-prompt mask; the block mask is built before the clock runs, as one
    serves all layers."""
    _needs_cuda(inputs)
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    torch._dynamo.reset()  # static shapes for every problem: dynamic ones run slower
    seen_until, T = inputs.shared.seen_until, len(inputs.source["q"])
    visible = lambda batch, head, q, k: (k <= q) & (q < seen_until[k])
    mask = create_block_mask(visible, None, None, T, T, device=seen_until.device)
    compiled, gqa = torch.compile(flex_attention), inputs.heads.query != inputs.heads.key

    def call(q, k, v):
        args = (x[None].transpose(1, 2) for x in (q, k, v))
        return compiled(*args, block_mask=mask, enable_gqa=gqa)[0].transpose(0, 1)

    return call


def padded_sdpa(masked: bool) -> Callable[[AttentionInputs], Call]:
    """SDPA batch by batch. Right padding needs no mask beside the causal one (padding sees rows, rows see
    no padding); transformers gives one all the same, with the key heads repeated, as the kernels that
    take a mask want them, and SDPA then skips nothing."""

    def make(inputs):
        group = inputs.heads.query // inputs.heads.key
        sizes = [rows * width for rows, width in inputs.batches]
        real = torch.zeros(sum(sizes), dtype=torch.bool, device=inputs.padded_at.device)
        real[inputs.padded_at] = True
        masks = [None] * len(sizes)
        if masked:
            shaped = (r.view(batch) for r, batch in zip(real.split(sizes), inputs.batches))
            masks = [
                r[:, None, None] & torch.ones(r.shape[1], r.shape[1], device=r.device).tril().bool()
                for r in shaped
            ]

        def call(q, k, v):
            out = []
            for *rows, mask, (n, L) in zip(*(x.split(sizes) for x in (q, k, v)), masks, inputs.batches):
                args = [x.view(n, L, *x.shape[1:]).transpose(1, 2) for x in rows]
                if mask is None:
                    how = {"is_causal": True, "enable_gqa": group > 1}
                else:
                    args[1:] = (x.repeat_interleave(group, dim=1) for x in args[1:])
                    how = {"attn_mask": mask}
                piece = F.scaled_dot_product_attention(*args, **how)
                out.append(piece.transpose(1, 2).flatten(0, 1))
            return torch.cat(out)

        return call

    return make


# name -> (form of its rows, what makes its call, or raises why it cannot)
CONTENDERS = {
    OURS: ("shared", lambda inputs: _ours(inputs.shared)),
    "shared, flash-attn": ("shared", flash_attn("shared")),
    "shared, FlexAttention": ("shared", flex),
    "shared, dense mask": ("shared", lambda inputs: _ours(inputs.shared, "dense")),
    "separate rows, varlen": ("separate", separate_varlen),
    "separate rows, flash-attn": ("separate", flash_attn("separate")),
    "separate rows, SDPA each": ("separate", lambda inputs: _ours(inputs.separate, "segments")),
    "padded, SDPA causal": ("padded", padded_sdpa(masked=False)),
    "padded, SDPA with a mask": ("padded", padded_sdpa(masked=True)),
}


def leaves(rows: dict[str, Tensor], mode: str) -> dict[str, Tensor]:
    """q, k, v without gradients yet."""
    return {key: rows[key].detach().requires_grad_(mode != "forward") for key in "qkv"}


def once(call: Call, given: dict[str, Tensor], grad: Tensor, mode: str) -> Tensor:
    """One call, and its backward; the gradients are in the leaves."""
    out = call(*given.values())
    if mode != "forward":
        out.backward(grad)
    return out.detach()


def examine(name: str, inputs: AttentionInputs, truth: Truth) -> tuple[Call, dict]:
    """(a contender's call, its errors and peaks). Raises CannotRunError when it is wrong."""
    form, make = CONTENDERS[name]
    call, rows = make(inputs), inputs.form(form)
    given = leaves(rows, MODES[-1])
    errors = truth.errors(form, once(call, given, rows["grad"], MODES[-1]), given)
    limit = LIMIT[inputs.source["q"].dtype]
    if not max(errors.values()) < limit:
        raise CannotRunError(f"wrong: {errors}, where the limit is {limit}")
    peaks = {mode: peak_of(lambda m=mode: once(call, leaves(rows, m), rows["grad"], m)) for mode in MODES}
    return call, {"errors": errors, "peak_bytes": peaks, "rows": len(rows["q"])}


def measure(inputs: AttentionInputs, turns: int) -> tuple[dict, dict]:
    """({name: numbers}, {name: why absent}) of one microbatch. Raises where ours is wrong."""
    truth, calls, results, absent = Truth(inputs), {}, {}, {}
    for name in CONTENDERS:
        try:
            calls[name], results[name] = examine(name, inputs, truth)
        except Exception as error:  # a peer that fails must not take the others' numbers with it
            if name == OURS:
                raise
            absent[name] = f"{type(error).__name__}: {(str(error) or '?').splitlines()[0][:120]}"
        gc.collect()
    forms = {CONTENDERS[name][0]: None for name in calls}
    forms = {form: inputs.form(form) for form in forms}
    for mode in MODES:
        seconds = {name: [] for name in calls}
        for _ in range(turns):
            for name, call in calls.items():
                rows = forms[CONTENDERS[name][0]]
                args = (call, leaves(rows, mode), rows["grad"], mode)
                seconds[name].append(timed(lambda args=args: once(*args)))
        for name, times in seconds.items():
            results[name].setdefault("seconds", {})[mode] = times
            results[name].setdefault("median_s", {})[mode] = statistics.median(times)
    return results, absent


def problem(mix: str, heads: Heads, tokens: int, dtype: torch.dtype, device: str, turns: int) -> dict:
    """Everything about one mix and head shape."""
    inputs = AttentionInputs.make(microbatch(mix, tokens), heads, dtype, device)
    results, absent = measure(inputs, turns)
    return {
        "mix": mix,
        "heads": vars(heads),
        "pairs": len(inputs.lengths),
        "flops": {"shared": inputs.flops, "separate": inputs.flops_of_separate},  # of a forward
        "least_bytes": {mode: inputs.least_bytes(mode) for mode in MODES},
        "results": results,
        "absent": absent,
    }


def floor_seconds(found: dict, mode: str, ceilings: dict) -> float:
    """The longer of the shared rows' FLOPs at the GEMM ceiling and their bytes at the copy ceiling."""
    flops = found["flops"]["shared"] * (1 if mode == "forward" else 3)
    bytes_ = found["least_bytes"][mode]
    return max(flops / ceilings["gemm_tflops"] / 1e12, bytes_ / ceilings["copy_gb_s"] / 1e9)


def print_table(problems: list[dict], ceilings: dict, console: Console) -> None:
    """A table for every problem."""
    for found in problems:
        title = f"{found['mix']}, {Heads(**found['heads'])}, {found['pairs']} pairs"
        table = Table(title=title)
        for column in ("", "rows", "forward ms", "of floor", "+backward ms", "of floor", "of ours", "error"):
            table.add_column(column, justify="left" if not column else "right")
        ours = found["results"][OURS]["median_s"][MODES[-1]]
        for name, r in found["results"].items():
            cells = [f"{r['rows']:,}"]
            for mode in MODES:
                seconds = r["median_s"][mode]
                cells += [f"{1e3 * seconds:.3f}", f"{floor_seconds(found, mode, ceilings) / seconds:.2f}"]
            last = r["median_s"][MODES[-1]]
            table.add_row(name, *cells, f"{last / ours:.2f}x", f"{max(r['errors'].values()):.0e}")
        console.print(table)
        for name, why in found["absent"].items():
            console.print(f"  absent: {name}: {why}", style="dim", highlight=False)


def run(cases, tokens: int, turns: int, minutes: float, out: Path) -> Path:
    """Every (mix, model name) of cases while there is time, then the tables and one JSON."""
    started, problems, left = time.perf_counter(), [], []
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    ceilings = measure_ceilings(device, small=device == "cpu")
    record = {"tokens": tokens, "ceilings": ceilings, "problems": problems, "no_time_for": left}
    write = lambda: write_result("attention", record, out)
    for mix, name in cases:
        if time.perf_counter() - started > 60 * minutes:
            left.append(f"{mix}, {name}")
            continue
        print(f"{mix}, {name}", flush=True)
        problems.append(problem(mix, heads_of(name), tokens, dtype, device, turns) | {"model": name})
        write()  # what is measured stays, whatever comes next
        gc.collect()
    print_table(problems, ceilings, Console(width=130))
    return write()


TOY = (("HH-RLHF", "CPU"), ("TL;DR", "CPU"))


def main() -> None:
    """Toy sizes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=RESULTS, help="the folder of the JSON")
    args = parser.parse_args()
    run(TOY, tokens=1024, turns=3, minutes=5, out=args.out)


if __name__ == "__main__":
    main()
