"""The lm_head of a preference step: fastdpo's plans beside every other head, on the same scored rows.

    python -m benchmarks.head.run [--smoke] [--out DIR]     gpu/head.py is the same as a stage

For each shape and mode (forward; frozen: gradient of hidden; trained: of the weight too) all contenders
take turns, so that a drifting clock meets all of them, and the median counts. The floor is the three
GEMMs that no head can do without, measured in the same turns. --smoke: small shapes, any device, and
nothing is written without --out. It begins nothing new after some minutes and says what is left; run again
on the same day and commit it goes on there. Who fails is told with the reason and takes no other's numbers
along: after an illegal memory access, which leaves the GPU unusable for the process, it begins anew without
whoever made it.
"""

import argparse
import gc
import os
import statistics
import sys
import time
from pathlib import Path

import torch
from rich.console import Console
from torch.profiler import ProfilerActivity, profile

from benchmarks.head import other_heads, our_heads
from benchmarks.head.inputs import Gemms, Inputs, Shape, Truth
from benchmarks.head.table import draw, print_table
from benchmarks.process import gpu_unusable
from benchmarks.results import RESULTS, result_of_today, write_result
from fastdpo.doctor import machine

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
    """{name: run} of all that can do this and are not `absent`; why others cannot is added there."""
    found = {name: run for name, (run, modes) in our_heads.CONTENDERS.items() if mode in modes}
    for name, make in other_heads.MAKERS.items():
        try:
            found[name] = make(inputs)
        except Exception as error:  # whatever a broken package makes of its import
            absent.setdefault(name, reason(error))
    return {name: run for name, run in found.items() if name not in absent}


def reason(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error) or '?').splitlines()[0][:80]}"


class Unusable(Exception):
    """(name, why): the GPU takes nothing more from this process after what `name` did."""


def failed(name: str, error: Exception) -> str:
    """Why a contender has no numbers, and room for the others. Raises Unusable where there is none."""
    why = reason(error)
    error.__traceback__ = None  # it holds the tensors that it failed on
    gc.collect()
    if gpu_unusable():
        raise Unusable(name, why)
    torch.cuda.empty_cache()
    return why


def measure_mode(
    inputs: Inputs, mode: str, truth: Truth, turns: int, unfit: dict[str, str]
) -> tuple[dict, dict]:
    """({name: numbers}, {name: why absent}) of one shape and mode; `unfit` is not even tried."""
    results, absent = {}, dict(unfit)
    runs = contenders(inputs, mode, absent)
    for name in list(runs):
        try:
            results[name] = examine(runs[name], inputs, mode, truth)
        except Exception as error:  # who fails must not take the others' numbers along
            absent[name] = failed(name, error)
            del runs[name]
        gc.collect()
    gemms = Gemms(inputs).products
    needed = list(gemms)[: MODES[mode]]
    seconds = {name: [] for name in (*needed, *runs)}
    for _ in range(turns):
        for name in needed:
            seconds[name].append(timed(gemms[name]))
        for name in list(runs):
            leaves = inputs.leaves(mode)
            try:
                seconds[name].append(timed(lambda run=runs[name], x=leaves: once(run, x, mode)))
            except Exception as error:
                absent[name] = failed(name, error)
                del runs[name], results[name]
    floor = sum(statistics.median(seconds[name]) for name in needed)
    results = {"floor": {}} | results
    results["floor"] = {"median_s": floor, "gemms_s": {name: seconds[name] for name in needed}}
    M, V, D = inputs.shape.M, inputs.shape.V, inputs.shape.D
    results["floor"]["tflops"] = 2 * M * V * D * MODES[mode] / floor / 1e12
    for name in runs:
        median = statistics.median(seconds[name])
        results[name] |= {"seconds": seconds[name], "median_s": median, "of_floor": floor / median}
        if name in our_heads.CONTENDERS:
            told = our_heads.told(name, mode, inputs)
            work = told["flops"] / (2 * M * V * D * MODES[mode])
            results[name] |= told | {"of_own_flops": work * floor / median}
    return results, absent


def run(small: bool, minutes: float, out: Path | None) -> None:
    """Every shape and mode, then the tables, and one JSON in the folder `out`."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    started, left = time.perf_counter(), []
    earlier = (out and result_of_today("head", out)) or {}
    results, unfit = earlier.get("results", {}), earlier.get("unfit", {})
    tell = lambda: out and write(out, results, left, str(dtype), unfit)
    for shape in SMALL if small else SHAPES:
        done = results.setdefault(str(shape), {})
        inputs = truth = None
        for mode in [mode for mode in MODES if mode not in done or not done[mode][0]]:
            if time.perf_counter() - started > 60 * minutes:
                left.append(f"{shape}, {mode}")
                continue
            print(f"{shape}, {mode}", flush=True)
            try:
                if truth is None:
                    inputs = Inputs.make(shape, dtype, device)
                    truth = Truth(inputs)
                done[mode] = measure_mode(inputs, mode, truth, 3 if small else TURNS, unfit)
            except Unusable as unusable:
                unfit[unusable.args[0]] = unusable.args[1]
                if not tell():
                    raise
                anew(minutes - (time.perf_counter() - started) / 60)
            except Exception as error:  # out of memory for the truth, say: the next shape may be smaller
                done[mode] = {}, {"all": failed("all", error)}
            tell()  # what is measured stays, whatever comes next
    print_table(results, Console(width=130))
    if left:
        print(f"no time for: {'; '.join(left)}")
    path = tell()
    if path:
        draw(path, results)


def anew(minutes: float) -> None:
    """This very command in place of this process, for the minutes that are left."""
    print("the GPU is unusable for this process: it begins anew", flush=True)
    command = [sys.executable, *sys.orig_argv[1:], "--minutes", f"{max(0.0, minutes):.2f}"]
    os.execv(sys.executable, command)


def write(out: Path, results: dict, left: list[str], dtype: str, unfit: dict[str, str]) -> Path:
    """The JSON: every single time, and what it was measured on. unfit: who made the GPU unusable."""
    found = machine.versions(other_heads.DISTRIBUTIONS)
    record = {"dtype": dtype, "no_time_for": left, "unfit": unfit}
    return write_result("head", record | {"peers": found, "results": results}, out)


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
