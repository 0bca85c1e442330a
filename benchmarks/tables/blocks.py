"""Tables and sentences of results for README and docs: a function a block, from a record to Markdown."""

from collections.abc import Iterator

from benchmarks.tables import (
    explained_blocks,
    head_blocks,
    image_blocks,
    learning_blocks,
    memory_blocks,
    online_blocks,
    round_blocks,
    row_blocks,
)
from benchmarks.tables.markdown import markdown, number, where


def races(record: dict) -> Iterator[tuple[str, str, dict]]:
    """(model, mix, race) of a steps result: one race on a CPU, several on a GPU."""
    if "summary" in record:
        yield record["plan"]["model"], record["plan"]["mix"], record
        return
    for model, mixes in record["results"].items():
        for mix, race in mixes.items():
            if "summary" in race:
                yield model, mix, race


def measured(race: dict) -> dict[str, dict]:
    """The contenders that have numbers."""
    return {name: r for name, r in race["summary"].items() if "pairs_per_second" in r}


def unmeasured(race: dict) -> str:
    """Who has none, and why."""
    missing = {n: r for n, r in race["summary"].items() if "pairs_per_second" not in r}
    return "".join(f"\n\nNo numbers for {name}: {r['why']}." for name, r in missing.items())


def steps_on_a_cpu(record: dict, link: str) -> str:
    """Every contender of the one race."""
    _, mix, race = next(races(record))
    text = (
        f"Optimizer steps of {race['plan']['pairs']} pairs on {where(record)}, fp32, reference precomputed "
        "but on the ladder (which computes it in each step), a random Qwen2-shaped model (hidden 256, 4 "
        "layers, vocabulary 151,936, tied), row lengths "
        f"of {mix}, each in its own process, medians and quartiles over interleaved turns ({link}):"
    )
    rows = []
    for name, r in measured(race).items():
        ours = name == "fastdpo"
        rate = f"{number(r['pairs_per_second'])} ({' to '.join(map(number, r['quartiles']))})"
        beside = f"{r['fastdpo_times_faster']:.1f}x faster, {r['fastdpo_memory_ratio']:.2f}x memory"
        peak = f"{r['peak_gb']:.2f} GB"
        rows.append([name.replace("TRL ", "TRL 1.16, "), rate, peak, "" if ours else beside])
    header = ("", "pairs/s", "peak memory", "fastdpo against it")
    return f"{text}\n\n{markdown(header, rows)}{unmeasured(race)}"


def steps_on_a_gpu(record: dict, link: str) -> str:
    """A line a model and mix: fastdpo beside the fastest TRL and plain HF of any batch size."""
    rows, pairs = [], set()
    for model, mix, race in races(record):
        found = measured(race)
        if "fastdpo" not in found:
            continue
        pairs.add(race["plan"]["pairs"])
        ours, cells = found["fastdpo"], []
        for family in ("TRL", "TRL, lengths grouped", "plain HF"):
            best = [r for r in found.values() if r["family"] == family and r.get("fastest_of_family")]
            cells.append(
                f"{best[0]['fastdpo_times_faster']:.2f}x (FLOPs {best[0]['flop_ratio']:.2f}x), "
                f"{best[0]['fastdpo_memory_ratio']:.2f}x memory"
                if best
                else "no numbers"
            )
        mfu = f"{ours['flop_utilisation']:.0%}"
        rows.append(
            [f"{model}, {mix}", number(ours["pairs_per_second"]), f"{ours['peak_gb']:.1f} GB", mfu, *cells]
        )
    text = (
        f"Optimizer steps of {' or '.join(map(str, sorted(pairs)))} pairs on {where(record)}, bf16 autocast "
        "over fp32 weights (under a LoRA bf16 ones) and fused AdamW in all, against "
        f"the fastest batch size of each trainer in the same run ({link}): pairs a second, peak memory, "
        "useful FLOPs of the measured GEMM ceiling, and by how much fastdpo is faster, beside what the FLOPs "
        "alone would give:"
    )
    header = (
        "",
        "pairs/s",
        "peak",
        "of ceiling",
        "over TRL 1.16",
        "over TRL, lengths grouped",
        "over plain HF",
    )
    return f"{text}\n\n{markdown(header, rows)}"


def dropin(record: dict, link: str) -> str:
    """A line a mix and batch size."""
    plan, rows, missing = record["plan"], [], []
    for mix, found in record["results"].items():
        for size, of in found["sizes"].items():
            label = f"{mix}, batch size {size}"
            if "failed" in of:
                missing.append(f"\n\nNo numbers for {label}: {of['why']}.")
                continue
            stock, patched = of["stock"], of["patched"]
            faster = patched["pairs_per_second"] / stock["pairs_per_second"]
            rates = [
                f"{number(r['pairs_per_second'])} ({' to '.join(map(number, r['quartiles']))})"
                for r in (stock, patched)
            ]
            peaks = [f"{number(r['peak_bytes'] / 1e9)} GB" for r in (stock, patched)]
            ratio = f"{faster:.1f}x faster, {patched['peak_bytes'] / stock['peak_bytes']:.2f}x memory"
            rows.append([label, rates[0], peaks[0], rates[1], peaks[1], ratio])
    how = "bf16 autocast over fp32 weights" if record["gpu"] else "fp32, malloc tuned in both"
    model = "the model of the first table" if plan["model"] == "CPU" else plan["model"]
    text = (
        f"TRL 1.16's own DPOTrainer, stock and after `patch()`, on {where(record)}, {how}: {model}, "
        f"optimizer steps of {plan['pairs']} pairs, reference precomputed, no gradient checkpointing, pairs "
        f"a second with quartiles over interleaved turns ({link}):"
    )
    header = ("", "stock, pairs/s", "peak", "patched, pairs/s", "peak", "patched is")
    return f"{text}\n\n{markdown(header, rows)}{''.join(missing)}"


def cache(record: dict, link: str) -> str:
    """A sentence, of the longer data set."""
    found = record["results"]["ultrafeedback"]
    stored = found["stored"]
    return (
        f"The reference cache at UltraFeedback's lengths, {stored['pairs']:,} pairs, on {where(record)} "
        f"(`python -m benchmarks.growth.cache`, {link}): a file of {stored['size_over_raw']:.2f} times the "
        f"raw fp32 bytes, {stored['lookup_ms']:.1f} ms to look up a step of 64 pairs, "
        f"{stored['load_seconds']:.1f} s for a run that finds everything; filling it costs "
        f"{found['fill']['overhead']:.1%} beside the forward of a small model."
    )


def head(record: dict, link: str) -> str:
    """The first shape: every head, frozen and trained."""
    shape, modes = next(iter(record["results"].items()))
    names = {name for found, _ in modes.values() for name in found}
    order = [n for mode in ("trained", "frozen") for n in modes.get(mode, [{}])[0] if n in names]
    rows = []
    for name in dict.fromkeys(order):
        cells = []
        for mode in ("frozen", "trained"):
            r = modes.get(mode, ({},))[0].get(name)
            peak = f", {r['peak_bytes'] / 1e9:.2f} GB" if r and "peak_bytes" in r else ""
            cells.append(f"{number(1e3 * r['median_s'])} ms{peak}" if r else "")
        error = modes.get("trained", ({},))[0].get(name, {}).get("nats_max")
        rows.append([name, *cells, "" if error is None else f"{error:.0e}"])
    text = (
        f"The lm_head on {shape} (M scored rows x D hidden x V vocabulary), "
        f"{record['dtype'].split('.')[-1]}, on {where(record)} ({link}); floor: the GEMMs that no head can "
        "do without, measured in the same turns:"
    )
    header = ("", "frozen head", "trained head", "largest error, nats")
    return f"{text}\n\n{markdown(header, rows)}"


def memory(record: dict, link: str) -> str:
    """What fits, a line a question."""
    contenders = list(record["limits"]["contenders"])
    answers = {}
    for found in record["found"]:
        gave = found.get("fits")
        said = f"{gave:,}" if isinstance(gave, int) else gave or "nothing"
        question = (found["kind"], found["of"], found["gigabytes"])
        answers.setdefault(question, {})[found["contender"]] = "no answer" if "no_answer" in found else said
    rows = [
        [
            f"longest pair of {of}, tokens" if kind == "pair" else f"largest model, {of}",
            f"{size:g} GB",
            *(by.get(name, "no answer") for name in contenders),
        ]
        for (kind, of, size), by in answers.items()
    ]
    text = f"What fits on {where(record)} limited to so much memory, one pair at a time ({link}):"
    return f"{text}\n\n{markdown(('', 'memory', *contenders), rows)}"


def attention(record: dict, link: str) -> str:
    """Forward and backward of a layer's attention, ours and the fastest other of each problem."""
    rows = []
    for found in record["problems"]:
        times = {n: 1e3 * list(r["median_s"].values())[-1] for n, r in found["results"].items()}
        ours = times.pop("shared, fastdpo")
        if not times:
            continue
        best = min(times, key=times.get)
        row = [f"{found['mix']}, {found['model']}", f"{number(ours)} ms", f"{best}, {number(times[best])} ms"]
        rows.append([*row, f"{times[best] / ours:.2f}x"])
    text = (
        f"Attention of {record['tokens']:,} tokens, one layer, forward and backward, on {where(record)} "
        f"({link}), shared prompts beside the fastest way without fastdpo:"
    )
    return f"{text}\n\n{markdown(('', 'shared prompts', 'fastest other', 'faster'), rows)}"


def growth(record: dict, link: str) -> str:
    """The fitted powers of time."""
    rows = []
    for found in record["series"].values():
        for line, powers in found["slopes"].items():
            done = [r["x"] for r in found["lines"][line] if "seconds" in r]
            if "seconds" in powers:
                span = f"{done[0]:,} to {done[-1]:,}"
                peak = f"{powers['peak_bytes']:.2f}" if "peak_bytes" in powers else ""
                rows.append([f"{found['x']}: {line}", span, f"{powers['seconds']:.2f}", peak])
    text = f"How cost grows on {where(record)}, as the power k of a fit c n^k; 1 is in proportion ({link}):"
    return f"{text}\n\n{markdown(('', 'from, to', 'time', 'peak memory'), rows)}"


def _all(stage: str) -> str:
    return f"bash benchmarks/gpu_all.sh {stage}"


# block -> (what, "cpu" or "gpu", its text, what is missing without a result, what measures it)
BLOCKS = {
    "steps-cpu": ("steps", "cpu", steps_on_a_cpu, "training steps on a CPU", "make bench-cpu"),
    "dropin-cpu": (
        "dropin",
        "cpu",
        dropin,
        "TRL stock and patched on a CPU",
        "python -m benchmarks.steps.dropin",
    ),
    "cache": ("cache", "cpu", cache, "the reference cache", "make bench-cpu"),
    "rows-cpu": (
        "rows",
        "cpu",
        row_blocks.rows,
        "rows from a file to training, beside TRL",
        "python -m benchmarks.rows.run",
    ),
    "growth-cpu": ("growth", "cpu", growth, "how cost grows on a CPU", "make bench-cpu"),
    "steps-gpu": ("steps", "gpu", steps_on_a_gpu, "training steps on a GPU, beside TRL", _all("steps")),
    "images-gpu": (
        "images",
        "gpu",
        image_blocks.images,
        "training steps with images on a GPU, beside TRL",
        _all("images"),
    ),
    "rounds-gpu": (
        "rounds",
        "gpu",
        round_blocks.rounds,
        "on-policy rounds on a GPU, beside TRL",
        _all("rounds"),
    ),
    "dropin-gpu": ("dropin", "gpu", dropin, "TRL stock and patched on a GPU", _all("dropin")),
    "head-gpu": ("head", "gpu", head, "the lm_head on a GPU, beside every other one", _all("head")),
    "head-shapes": ("head", "gpu", head_blocks.shapes, "the lm_head in every shape", _all("head")),
    "memory-gpu": ("memory", "gpu", memory, "the largest pair and model that fit a GPU", _all("memory")),
    "fit-gpu": (
        "fit",
        "gpu",
        memory_blocks.fit,
        "what trains on cards of 12 to 48 GB, ours and TRL's",
        _all("fit"),
    ),
    "tricks-gpu": (
        "tricks",
        "gpu",
        memory_blocks.tricks,
        "what each trick that saves memory costs in speed",
        _all("tricks"),
    ),
    "plan-cpu": (
        "plan",
        "cpu",
        memory_blocks.plan,
        "the plan's peak beside real processes",
        "python -m benchmarks.memory.plan_accuracy",
    ),
    "plan-gpu": (
        "plan",
        "gpu",
        memory_blocks.plan,
        "the plan's peak beside a GPU's allocator",
        "python -m benchmarks.memory.plan_accuracy --gpu",
    ),
    "attention-gpu": ("attention", "gpu", attention, "shared-prompt attention on a GPU", _all("attention")),
    "growth-gpu": ("growth", "gpu", growth, "how cost grows on a GPU", _all("growth")),
    **learning_blocks.BLOCKS,
    **online_blocks.BLOCKS,
    **explained_blocks.BLOCKS,
}
