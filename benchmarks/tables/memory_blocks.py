"""The blocks on memory-limited training, from a record to Markdown; blocks.py lists them."""

from benchmarks.tables.markdown import markdown, number, where


def fit_table(record: dict) -> str:
    """A row a claim: the longest pair, ours and the best of TRL's, and how fast at what both can train on."""
    found = {(f["claim"], f["contender"]): f for f in record["found"]}
    theirs = sorted({f["contender"] for f in record["found"] if f["contender"].startswith("TRL")})
    rows = []
    for claim in record["limits"]["claims"]:
        of = lambda name, claim=claim: found.get((claim["name"], name), {})
        ours, best = of("fastdpo"), max(map(of, theirs), key=_order, default={})
        again = of("fastdpo, as long as TRL")
        tokens = min(claim["tokens"], best.get("fits") or claim["tokens"])
        rates = [_rate(claim, tokens, f) for f in (again if tokens < claim["tokens"] else ours, best)]
        rows.append(
            [
                f"{claim['gigabytes']:g} GB: {claim['name']}",
                f"{claim['tokens']:,}: {_does(claim, ours)}",
                _longest(ours),
                _longest(best),
                f"{tokens:,}",
                *rates,
            ]
        )
    header = ("card: what trains", "asked, tokens a pair", "longest, fastdpo", "longest, TRL 1.16")
    return markdown((*header, "at", "fastdpo, pairs/s", "TRL, pairs/s"), rows)


def fit(record: dict, link: str) -> str:
    """What it was measured on, the table, and what is to know beside it."""
    steps = {claim["name"]: claim["pairs"] for claim in record["limits"]["claims"]}
    pairs = ", ".join(f"{n} for {name}" for name, n in steps.items() if n > 1)
    text = (
        f"What fits a card, on {where(record)} with each allocator limited to its memory ({link}). Tokens: "
        f"{record['counting']}. Pairs an optimizer step: 1{f', {pairs}' if pairs else ''}. TRL has the "
        "same tricks where it has them: recomputed layers, offloaded activations, paged 8-bit AdamW, bf16 "
        "weights, a 4-bit base; with or without liger-kernel's layers, whichever reaches further:"
    )
    missing = [
        f"\n\nNo answer of {f['contender']} for {f['claim']}: {f['no_answer']}."
        for f in record["found"]
        if "no_answer" in f
    ]
    return f"{text}\n\n{fit_table(record)}{''.join(missing)}"


def tricks(record: dict, link: str) -> str:
    """A row a trick, beside the plain run of the same turns."""
    plan, rows, missing = record["plan"], [], []
    for name, r in record["rows"].items():
        if "pairs_per_second" not in r:
            missing.append(f"\n\nNo numbers for {name}: {r['why']}.")
            continue
        hidden = r.get("hidden")
        paged = f" and {number(r['paged_gb'])} GB paged" if r["paged_gb"] else ""
        cells = [number(r["pairs_per_second"]), f"{r['speed']:.2f}x", f"{number(r['peak_gb'])} GB{paged}"]
        rows.append([f"`{name}`", *cells, f"{r['memory']:.2f}x", "" if hidden is None else f"{hidden:.0%}"])
    text = (
        f"What each trick costs, on {where(record)}: {plan['model']}, steps of {plan['pairs']} pairs of "
        f"{plan['mix']}'s lengths, medians over interleaved turns ({link}). Speed and peak memory beside the "
        "first row, and how much of the time of its copies to and from the host the GPU computes. Paged "
        "states were beside the peak, on a GPU with room for them: what moving them costs is not told:"
    )
    header = ("keys", "pairs/s", "speed", "peak memory", "memory", "copies hidden")
    return f"{text}\n\n{markdown(header, rows)}{''.join(missing)}"


def plan(record: dict, link: str) -> str:
    """How far `fastdpo plan` was from the peaks that were measured."""
    errors = [case["error"] for case in record["cases"]]
    by = "torch's CUDA allocator" if record["gpu"] else "their resident memory"
    text = (
        f"`fastdpo plan` beside {len(errors)} real runs on {where(record)}, by {by} ({link}): its peak is off"
    )
    return f"{text} by {min(errors):+.1%} to {max(errors):+.1%}."


def _order(found: dict) -> tuple:
    """Further is better, and an answer better than none."""
    return found.get("fits") or 0, "fits" in found


def _longest(found: dict) -> str:
    if "fits" not in found:
        return "no answer"
    if found["fits"] is None:
        return "nothing"
    return f"{found['fits']:,}" + (" or more" if found["fails"] is None else "")


def _at(found: dict, tokens: int) -> dict | None:
    """The trial of so many tokens."""
    return next((trial for trial in found.get("trials", ()) if trial["tokens"] == tokens), None)


def _does(claim: dict, ours: dict) -> str:
    trial = _at(ours, claim["tokens"])
    if trial is None:
        return "not tried"
    if trial["peak_bytes"] is None:
        return "no"
    paged = f" and {number(trial['paged_bytes'] / 1e9)} GB paged" if trial["paged_bytes"] else ""
    return f"yes, {number(trial['peak_bytes'] / 1e9)} GB{paged}"


def _rate(claim: dict, tokens: int, found: dict) -> str:
    trial = _at(found, tokens)
    return number(claim["pairs"] / trial["seconds"]) if trial and trial["seconds"] else ""
