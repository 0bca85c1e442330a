"""The block on training with images, from a record to Markdown; blocks.py lists it."""

from benchmarks.tables.markdown import markdown, number, where


def images(record: dict, link: str) -> str:
    """A line a model and number of responses: fastdpo beside the fastest TRL of any setting."""
    rows, missing, shapes = [], [], {}
    for model, mixes in record["results"].items():
        for mix, race in mixes.items():
            found = {n: r for n, r in race.get("summary", {}).items() if "pairs_per_second" in r}
            best = [name for name, r in found.items() if r["family"] == "TRL" and r.get("fastest_of_family")]
            if "fastdpo" not in found or not best:
                why = race.get("why") or "no time for both"
                missing.append(f"\n\nNo numbers for {model}, {mix}: {why}.")
                continue
            shapes = race["shape"] | {"pairs": race["plan"]["pairs"]}
            rows.append([f"{model}, {mix}", *_cells(race, found["fastdpo"], found[best[0]])])
    if not rows:
        return f"No numbers yet ({link}).{''.join(missing)}"
    text = (
        f"Optimizer steps of {shapes['pairs']} pairs on {where(record)}, bf16 autocast over fp32 weights "
        f"(under a LoRA bf16 ones), frozen towers, no layer computed twice ({link}). A prompt has "
        f"{shapes['prompt']:,} tokens, {shapes['image_tokens']:,} of them a picture's, a response "
        f"{shapes['response']}; each prompt is counted once. TRL at the fastest setting of the same run, "
        "which computes the reference in every step; ours finds it, and in a first epoch makes it. TRL's "
        "pixels are made before its clock begins. Images: how often a step encodes each one, a reference's "
        "times too; idle: of a step, how long the GPU had nothing to do:"
    )
    header = ("", "tokens/s", "peak", "idle", "images", "TRL's images", "over TRL 1.16")
    header += ("in a first epoch", "asked")
    return f"{text}\n\n{markdown(header, rows)}{''.join(missing)}"


def _cells(race: dict, ours: dict, best: dict) -> list[str]:
    prompts = race["shape"]["prompts"]
    first = best.get("fastdpo_times_faster_in_a_first_epoch")
    return [
        f"{ours['useful_tokens_per_second']:,.0f}",
        f"{ours['peak_gb']:.1f} GB",
        f"{ours['idle_share']:.0%}",
        *(f"{(r['images'] + r['reference_images']) / prompts:.0f}" for r in (ours, best)),
        f"{best['fastdpo_times_faster']:.2f}x, {best['fastdpo_memory_ratio']:.2f}x memory",
        "" if first is None else f"{first:.2f}x",
        f"{number(race['asked'])}x",
    ]
