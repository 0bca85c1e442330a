"""The lm_head of a preference step: fastdpo's plans beside every other head, on the same scored rows.

    python -m benchmarks.head [--smoke] [--out DIR]     `gpu_head` is the same as a stage

For each shape and mode (forward; frozen: gradient of hidden; trained: of the weight too) all contenders
take turns, so that a drifting clock meets all of them, and the median counts. The floor is the three
GEMMs that no head can do without, measured in the same turns. --smoke: small shapes, any device, and
nothing is written without --out. It begins nothing new after some minutes and says what is left.
"""

import argparse
import gc
import importlib.metadata
import statistics
import time
from pathlib import Path

import torch
from fastdpo_kernels import MEMORY_BUDGET
from rich.console import Console
from rich.table import Table
from torch.profiler import ProfilerActivity, profile

from benchmarks.figures import Bar, bars
from benchmarks.head_inputs import Gemms, Inputs, Shape, Truth
from benchmarks.peers import head_others, head_ours
from benchmarks.results import RESULTS, write_result

SHAPES = (
    Shape(8192, 4096, 128256, 256),
    Shape(8192, 2048, 151936, 256),
    Shape(8192, 896, 151936, 256),
    Shape(4096, 4096, 128256, 256),
    Shape(8192, 2304, 262144, 256, softcap=30.0),
    Shape(1024, 4096, 128256, 256),
)
# with budgets that half of the rows fit
SMALL = (
    Shape(96, 64, 1500, 12, budget=700_000),
    Shape(64, 48, 2001, 16, softcap=30.0, budget=700_000),
)
MODES = {"forward": 1, "frozen": 2, "trained": 3}  # and the GEMMs of 2MVD that are its floor
TURNS = 7


def timed(call) -> float:
    """Seconds of call(), on the device's own clock where there is one."""
    if not torch.cuda.is_available():
        start = time.perf_counter()
        call()
        return time.perf_counter() - start
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    call()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e3


def once(run, leaves: Inputs, mode: str) -> torch.Tensor | None:
    """One call and its backward: the log-probs, where it tells them; the gradients are in the leaves."""
    with torch.set_grad_enabled(mode != "forward"):
        loss, logp = run(leaves)
    if mode != "forward":
        loss.backward()
    return None if logp is None else logp.detach()


def peak_of(call) -> int:
    """The most bytes alive at once during call(), over those alive before."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    now = peak = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    return peak


def examine(run, inputs: Inputs, mode: str, truth: Truth) -> dict:
    """What one contender gets right, what it takes, and whether a second run gives the same bits."""
    first, second = inputs.leaves(mode), inputs.leaves(mode)
    logp, again = once(run, first, mode), once(run, second, mode)
    found = truth.errors(logp, first)
    pairs = [(logp, again), (first.hidden.grad, second.hidden.grad)]
    pairs.append((first.weight.grad, second.weight.grad))
    found["same_bits"] = all(a is None or torch.equal(a, b) for a, b in pairs)
    del logp, again, first, second, pairs
    found["peak_bytes"] = peak_of(lambda: once(run, inputs.leaves(mode), mode))
    return found


def contenders(inputs: Inputs, mode: str, absent: dict) -> dict:
    """{name: run} of all that can do this; why the others cannot goes into `absent`."""
    found = {name: run for name, (run, modes) in head_ours.CONTENDERS.items() if mode in modes}
    for name, make in head_others.MAKERS.items():
        try:
            found[name] = make(inputs)
        except Exception as error:  # whatever a broken package makes of its import
            absent[name] = f"{type(error).__name__}: {(str(error) or '?').splitlines()[0][:80]}"
    return found


def measure_mode(inputs: Inputs, mode: str, truth: Truth, turns: int) -> tuple[dict, dict]:
    """({name: numbers}, {name: why absent}) of one shape and mode."""
    results, absent, seconds = {}, {}, {}
    runs = contenders(inputs, mode, absent)
    for name in list(runs):
        try:
            results[name] = examine(runs[name], inputs, mode, truth)
        except Exception as error:  # a peer that fails must not take the others' numbers with it
            if name in head_ours.CONTENDERS:
                raise
            absent[name] = f"{type(error).__name__}: {(str(error) or '?').splitlines()[0][:80]}"
            del runs[name]
        gc.collect()
    gemms = Gemms(inputs).products
    needed = list(gemms)[: MODES[mode]]
    for _ in range(turns):
        for name in needed:
            seconds.setdefault(name, []).append(timed(gemms[name]))
        for name, run in runs.items():
            leaves = inputs.leaves(mode)
            seconds.setdefault(name, []).append(timed(lambda run=run, x=leaves: once(run, x, mode)))
    floor = sum(statistics.median(seconds[name]) for name in needed)
    results = {"floor": {}} | results
    results["floor"] = {"median_s": floor, "gemms_s": {name: seconds[name] for name in needed}}
    M, V, D = inputs.shape.M, inputs.shape.V, inputs.shape.D
    results["floor"]["tflops"] = 2 * M * V * D * MODES[mode] / floor / 1e12
    for name in runs:
        median = statistics.median(seconds[name])
        results[name] |= {"seconds": seconds[name], "median_s": median, "of_floor": floor / median}
        if name in head_ours.CONTENDERS:
            told = head_ours.told(name, mode, inputs)
            work = told["flops"] / (2 * M * V * D * MODES[mode])
            results[name] |= told | {"of_own_flops": work * floor / median}
    return results, absent


def row(name: str, r: dict, ours: float) -> list[str]:
    """One line of the table; `ours` is the fastest of ours in the same mode, in seconds."""
    show = lambda key, form, unit=1.0: form.format(r[key] * unit) if key in r else ""
    plan = f" ({r['plan']})" if "plan" in r else show("tflops", " ({:.2f} TFLOP/s)")
    nats = f"{r['nats_max']:.0e} / {r['nats_median']:.0e}" if "nats_max" in r else ""
    own = show("of_own_flops", " ({:.2f})")
    promised = show("promised_bytes", " of {:,.1f}", 1e-6)
    return [
        name + plan,
        show("median_s", "{:.2f}", 1e3),
        show("of_floor", "{:.2f}") + own,
        "" if name == "floor" else f"{r['median_s'] / ours:.2f}x",
        show("peak_bytes", "{:,.1f}", 1e-6) + promised,
        nats,
        show("d_hidden_roundings", "{:.2f}"),
        show("d_weight_roundings", "{:.2f}"),
        {True: "yes", False: "no"}.get(r.get("same_bits"), ""),
    ]


def print_table(results: dict, console: Console) -> None:
    """A table for every shape; the modes follow each other."""
    columns = ("ms", "of floor (own)", "of ours", "peak MB", "nats max / med", "dX", "dW", "same bits")
    for shape, modes in results.items():
        table = Table(title=f"{shape} (M x D x V)")
        table.add_column("")
        for column in columns:
            table.add_column(column, justify="right")
        for mode, (measured, _) in modes.items():
            mine = [measured[n]["median_s"] for n in head_ours.CONTENDERS if n in measured]
            table.add_section()
            table.add_row(f"[bold]{mode}")
            for name, numbers in measured.items():
                table.add_row(*row(name, numbers, min(mine)))
        console.print(table)
        reasons = {}
        for mode, (_, absent) in modes.items():
            for name, why in absent.items():
                reasons.setdefault((name, why), []).append(mode)
        for (name, why), where in reasons.items():
            console.print(f"  absent: {name} ({', '.join(where)}): {why}", style="dim", highlight=False)
    console.print(
        "of floor: the time of the GEMMs no head can do without over ours; (own): with the plan's own "
        "FLOPs. dX, dW: errors against fp64 in units of one rounding of dZ to the inputs' dtype. peak MB: "
        "beyond the inputs, gradients included, of what the plan promised."
    )


def run(small: bool, minutes: float, out: Path | None) -> None:
    """Every shape and mode, then the tables, and one JSON in the folder `out`."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    started, results, left = time.perf_counter(), {}, []
    for shape in SMALL if small else SHAPES:
        results[str(shape)] = {}
        inputs = truth = None
        for mode in MODES:
            if time.perf_counter() - started > 60 * minutes:
                left.append(f"{shape}, {mode}")
                continue
            if inputs is None:
                inputs = Inputs.make(shape, dtype, device)
                truth = Truth(inputs)
            print(f"{shape}, {mode}", flush=True)
            results[str(shape)][mode] = measure_mode(inputs, mode, truth, 3 if small else TURNS)
            if out:  # what is measured stays, whatever comes next
                write(out, results, left, str(dtype))
    print_table(results, Console(width=130))
    if left:
        print(f"no time for: {'; '.join(left)}")
    if out:
        draw(write(out, results, left, str(dtype)), results)


def write(out: Path, results: dict, left: list[str], dtype: str) -> Path:
    """The JSON: every single time, and what it was measured on."""
    found = {}
    for name in head_others.DISTRIBUTIONS:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    record = {"dtype": dtype, "memory_budget": MEMORY_BUDGET, "no_time_for": left}
    return write_result("head", record | {"peers": found, "results": results}, out)


def draw(path: Path, results: dict) -> None:
    """A plot of each mode of the first shape, beside the JSON."""
    shape, modes = next(iter(results.items()))
    for mode, (measured, _) in modes.items():
        title = f"The lm_head, {mode}, {shape} (M x D x V)"
        drawn = [
            Bar(name, 1e3 * r["median_s"], *spread_ms(r), ours=name in head_ours.CONTENDERS)
            for name, r in measured.items()
        ]
        bars(f"{path.stem}_{mode}", title, "milliseconds", drawn, path.parent)


def spread_ms(r: dict) -> tuple[float, float] | tuple[()]:
    """The fastest and the slowest turn; nothing for the floor, which is a sum of medians."""
    return (1e3 * min(r["seconds"]), 1e3 * max(r["seconds"])) if "seconds" in r else ()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="small shapes, on whatever is here")
    parser.add_argument("--out", type=Path, help="the folder of the JSON; without it none for --smoke")
    parser.add_argument("--minutes", type=float, default=60, help="begin nothing new after these")
    args = parser.parse_args()
    if not torch.cuda.is_available() and not args.smoke:
        parser.error("no GPU here: --smoke runs small shapes on a CPU")
    run(args.smoke, args.minutes, args.out or (None if args.smoke else RESULTS))


if __name__ == "__main__":
    main()
