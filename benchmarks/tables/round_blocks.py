"""The block on on-policy rounds, from a record to Markdown; blocks.py lists it."""

from collections.abc import Iterator

from benchmarks.tables.markdown import markdown, number, where

ALL = "fastdpo, all pairs"
SAME_PAIRS = {"fastdpo, best and worst": "TRL DPO, best and worst", ALL: "TRL DPO, all pairs"}


def rounds(record: dict, link: str) -> str:
    """A line a model, mix and what trains; then how long sampling takes."""
    rows, missing, shapes = [], [], {}
    for model, mixes in record["results"].items():
        for mix, race in mixes.items():
            if "sample" in race:
                continue
            found = {n: r for n, r in race.get("summary", {}).items() if "prompts_per_second" in r}
            ours = [name for name in found if name in ("fastdpo, rloo", *SAME_PAIRS)]
            if not ours or not _best(found, "TRL online"):
                why = race.get("why") or _why(race) or "no time for both"
                missing.append(f"\n\nNo numbers for {model}, {mix}: {why}.")
                continue
            shapes = race["shape"] | {"prompts": race["plan"]["pairs"], "asked": race["asked"]}
            rows += [[f"{model}, {mix}: {name.split(', ')[1]}", *_cells(found, name)] for name in ours]
    sampled = "".join(f"\n\n{said}" for said in _sampling(record))
    if not rows:
        return f"No numbers yet ({link}).{''.join(missing)}{sampled}"
    text = (
        f"The training part of on-policy rounds on {where(record)}, steps of {shapes['prompts']} prompts "
        f"with {shapes['responses']} sampled responses of at most {shapes['most']} tokens, bf16 autocast "
        f"over fp32 weights (under a LoRA bf16 ones), no layer recomputed if memory allows ({link}). Rows "
        "come once, so a step has its part of the reference's pass; losses were those of plain torch first. "
        f"Response tokens: {shapes['counted']['response_tokens']}. TRL's tokens: "
        f"{shapes['counted']['trl_tokens']}. TRL 1.16 at the fastest setting of the same run: "
        "OnlineDPOTrainer's own training step on the best and the worst response, for it takes two, and "
        "DPOTrainer on the same pairs as rows. Times as fast by response tokens "
        f"(asked: {number(shapes['asked'])}x), in brackets by TRL's:"
    )
    header = ("", "response tokens/s", "TRL's tokens/s", "peak", "of offline DPO's", "over OnlineDPOTrainer")
    table = markdown((*header, "over DPOTrainer, same pairs"), rows)
    return f"{text}\n\n{table}{''.join(missing)}{sampled}"


def _best(found: dict, family: str) -> dict | None:
    """The fastest setting of a peer."""
    return next((r for r in found.values() if r["family"] == family and r.get("fastest_of_family")), None)


def _why(race: dict) -> str | None:
    """Of a race without numbers: what the first without them says."""
    return next((r["why"] for r in race.get("summary", {}).values() if r["state"] == "disagrees"), None)


def _cells(found: dict, name: str) -> list[str]:
    r, cells = found[name], []
    for family in ("TRL online", SAME_PAIRS.get(name)):
        over = ((_best(found, family) or {}) if family else {}).get("over", {}).get(name)
        faster = over and f"{over['response_tokens']:.2f}x ({over['trl_tokens']:.2f}x)"
        cells.append(f"{faster}, {over['memory']:.2f}x memory" if over else "no numbers" if family else "")
    offline = r.get("memory_beside_offline")
    return [
        *(f"{r[f'{count}_tokens_per_second']:,.0f}" for count in ("response", "trl")),
        f"{r['peak_gb']:.1f} GB",
        f"{offline:.2f}x" if offline else "",
        *cells,
    ]


def _sampling(record: dict) -> Iterator[str]:
    """Of each model that was sampled, an engine after another."""
    for model, mixes in record["results"].items():
        for race in mixes.values():
            if "sample" not in race:
                continue
            said = [_engine(name, told, race, mixes) for name, told in race["summary"].items()]
            s = race["sample"]
            asked = f"{s['prompts']} prompts, {s['responses']} answers each of {s['max_new_tokens']} tokens"
            limit = f"asked: less than {race['asked_seconds']} s"
            yield f"Sampling of a round, {model}, {asked} ({limit}). {' '.join(said)}"


def _engine(name: str, told: dict, race: dict, mixes: dict) -> str:
    if told["state"] != "measured":
        return f"By {name} no numbers: {told['why']}."
    seconds = told["round_seconds"]
    text = f"By {name}: {number(seconds)} s, {told['tokens_per_second']:,.0f} tokens a second"
    step = mixes.get(race["plan"]["mix"], {}).get("summary", {}).get(ALL, {}).get("with_reference_seconds")
    if step is None:
        return f"{text}."
    steps = race["sample"]["prompts"] / mixes[race["plan"]["mix"]]["plan"]["pairs"]
    return f"{text}, {seconds / (seconds + steps * step):.0%} of a round that trains all pairs once."
