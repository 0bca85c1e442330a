"""What is learnt, beside TRL and by objective: from records to Markdown."""

import re
from statistics import mean

from benchmarks.frontiers import Points, reward_at, spread
from benchmarks.tables.markdown import markdown, number, where
from fastdpo.console.formatting import counted

KLS = (1.0, 2.0, 5.0, 10.0)  # nats an answer
BY_REWARD = {"frontier": "frontier", "few pairs": "few pairs, one a prompt"}
SMALLEST_GAIN, AT_KL = 0.2, 5.0  # what plain DPO is to gain over the start, and where


def parity(record: dict, link: str) -> str:
    """A sentence a comparison."""
    said = []
    for r in record["results"].values():
        runs, what = list(r["seeds"].values()), r["settings"]
        first = max(abs(run["first_margin"]) for run in runs)
        theirs = max(abs(run["trl_first_margin"]) for run in runs)
        spread = r["mean_difference_between_orders"]
        apart = "" if spread is None else f" and TRL's own runs on different orders are {spread:.0e} apart"
        said.append(
            f"{what['steps']} steps of {what['pairs']} pairs in {r['dtype']} on {where(record)}, "
            f"{r['model']}, {counted(len(runs), 'order')} of the rows ({link}): the loss of a step differs "
            f"from TRL 1.16's by {r['largest_difference']:.0e} at most and {r['mean_difference']:.0e} on "
            f"average, while it falls by {r['fell_by']:.2f}{apart}; the first step's margin is {first:.1g} "
            f"(TRL's {theirs:.1g})."
        )
    return "\n\n".join(said)


def example(record: dict, link: str) -> str:
    """What the README's example learns, in one paragraph."""
    said = lambda number: f"{number['value']:.3f} ± {number['stderr']:.3f}"
    run, found, data = record["run"], record["held_out"], record["data"]
    accuracy, minutes = found["rewards/accuracies"], run["seconds"] / 60
    above = (accuracy["value"] - 0.5) / accuracy["stderr"]
    longer, shorter = (found[f"rewards/accuracies_{which}"] for which in ("longer", "shorter"))
    return (
        f"{run['steps']} steps on {run['pairs']:,} pairs on {where(record)}, {minutes:.0f} minutes; "
        f"before them the reference was computed, once for all runs ({link}). Accuracy over the reference on "
        "pairs not yet trained on, in the second half of the only pass: "
        f"{said(run['new_pairs'])}. On {data['pairs']:,} held-out pairs: {said(accuracy)}, {above:.1f} "
        f"standard errors above chance; margin {said(found['rewards/margins'])}, loss {said(found['loss'])} "
        f"(0.693 before). The longer response is the chosen one in {said(data['won_by_length'])} of them; "
        f"where it is, the accuracy is {said(longer)}, where it is not {said(shorter)}."
    )


PAPER = {  # 2406.06496: lines a report, share of reports
    "start": (1.34, 0.516),
    "gamma 1 (plain DPO)": (0.42, 0.274),
    "gamma 0.5": (0.28, 0.209),
    "gamma 0": (0.39, 0.252),
    "SFT on the edited reports": (1.28, 0.56),
}


def prior_exams(record: dict, link: str) -> str:
    """An arm a line, what the paper has behind it."""
    sizes, table = record["sizes"], []
    for arm, by_seed in record["arms"].items():
        of = lambda how, what, by_seed=by_seed: [seed[how][what] for seed in by_seed.values()]
        starts = [record["arms"]["start"][seed]["sampled"]["lines"] for seed in by_seed]
        fewer = f"{sum(starts) / lines:.1f}x" if (lines := sum(of("sampled", "lines"))) else ""
        cells = [
            spread(of("sampled", "lines")),
            "" if arm == "start" else fewer,
            spread(of("sampled", "reports")),
            spread(of("sampled", "findings")),
            spread(of("greedy", "lines")),
            spread(of("greedy", "findings")),
        ]
        theirs, share = PAPER[arm]
        times = f", {PAPER['start'][0] / theirs:.1f}x" if arm != "start" else ""
        table.append([arm, *cells, f"{theirs} in {share:.1%}{times}"])
    text = (
        f"{counted(sizes['pairs'], 'pair')}, {record['config']['num_epochs']} epochs, on {where(record)} "
        f"({link}), for each seed pictures, reports and a start model of its own. Lines that hold one of the "
        f"paper's 43 words in a report on one of {sizes['held_out']} pictures held out, a sample each at "
        "temperature 1 and the greedy one; fewer: against the start's; findings: the share that the report "
        f"tells as the picture has it. Mean ± deviation over (seeds). Tuning: {record['tuned']}. The paper: "
        "Llama 2 7B on MIMIC-CXR, lines a report, in so many reports:"
    )
    header = ("", "lines", "fewer", "reports with one", "findings", "greedy: lines", "findings", "paper")
    return f"{text}\n\n{markdown(header, table)}"


def trainings(record: dict, study: str) -> list[dict]:
    return [one for one in record["trainings"] if one["study"] == study]


def points_of(record: dict, study: str) -> dict[str, dict[int, Points]]:
    """Per arm and seed the (KL, reward) of all betas and marks, and of the start at KL 0."""
    out: dict[str, dict[int, Points]] = {}
    for one in trainings(record, study):
        arm = one["arm"].split(", beta")[0]
        points = out.setdefault(arm, {}).setdefault(one["seed"], [])
        if not points:
            points.append((0.0, record["start"][str(one["seed"])]["reward"]))
        points += [(mark["kl"], mark["reward"]) for mark in one["found"]["marks"]]
    return out


def rewards_at(points: dict[int, Points], kl: float) -> dict[int, float]:
    """{seed: the most reward for at most this KL}, of the seeds that came so far."""
    found = {seed: reward_at(some, kl) for seed, some in points.items()}
    return {seed: value for seed, value in found.items() if value is not None}


def gain(record: dict) -> dict[int, float]:
    """{seed: what plain DPO gains over the start at AT_KL}."""
    points = points_of(record, "frontier").get("DPO", {})
    return {seed: r - points[seed][0][1] for seed, r in rewards_at(points, AT_KL).items()}


def assistant(record: dict, link: str) -> str:
    """All of it as Markdown."""
    sizes = record["sizes"]
    rows = [record["rows"][f"sentiment-{seed}"] for seed in sizes["seeds"]]
    reward, best = (number(mean(some[name] for some in rows)) for name in ("reward", "best"))
    text = (
        f"{record['model']} on {where(record)} ({link}): {sizes['answers']} answers each to "
        f"{sizes['prompts']} prompts a seed, {sizes['steps']} steps of {record['common']['batch_size']} "
        f"prompts, a LoRA of rank {record['common']['lora_rank']}, {counted(len(rows), 'seed')}. Reward: "
        f"{record['reward']}. The start model's answers have {reward} on average, the best of "
        f"{sizes['answers']} {best}. Tuning: {record['tuned']}."
    )
    parts = [text]
    for study, title in BY_REWARD.items():
        if trainings(record, study):
            parts.append(
                f"Mean reward at a KL of the {title}, ± its deviation over (seeds); between the measured "
                "models by a straight line, which mixtures of two of them reach:"
            )
            parts += [_rewards(points_of(record, study)), _plot(link, study, title)]
            parts += ["And after the last step, whatever the KL:", _lasts(trainings(record, study))]
    if gains := gain(record):
        enough = sum(value >= SMALLEST_GAIN for value in gains.values())
        parts.append(
            f"At a KL of {AT_KL:g} nats plain DPO gains {spread(list(gains.values()), sign=True)} over the "
            f"start, {SMALLEST_GAIN} or more with {enough} of {len(record['sizes']['seeds'])} seeds."
        )
    if trainings(record, "noise"):
        parts += ["Accuracy on clean held-out pairs, by the share of training pairs that are flipped:"]
        parts += [_by_share(record, source) for source in ("sentiment", "hh")]
    for study, number_of in (("curriculum", "rewards/accuracies"), ("optimizers", "loss")):
        if trainings(record, study):
            parts += [f"{study.capitalize()}, held out ({number_of}):", _ends(record, study, number_of)]
    parts += [f"Left out: {study}, {why}." for study, why in record.get("skipped", {}).items()]
    return "\n\n".join(part for part in parts if part)


def _plot(link: str, study: str, title: str) -> str:
    """The picture that run.py draws beside the linked JSON."""
    found = re.fullmatch(r"\[results\]\((.*)/(.*)\.json\)", link)
    name = study.replace(" ", "_")
    return f"![Reward and KL: {title}]({found[1]}/plots/{found[2]}_{name}.svg)" if found else ""


def _rewards(points: dict[str, dict[int, Points]]) -> str:
    """Of each arm at each KL, and behind it the same minus DPO's, on as many pairs."""
    table = []
    for arm, by_seed in points.items():
        rivals = points.get(_dpo(arm), {})
        cells = []
        for kl in KLS:
            ours, theirs = rewards_at(by_seed, kl), rewards_at(rivals, kl)
            both = [ours[seed] - theirs[seed] for seed in ours if seed in theirs]
            apart = f"; {spread(both, sign=True)}" if both and rivals is not by_seed else ""
            cells.append(spread(list(ours.values())) + apart)
        table.append([arm, *cells])
    return markdown(["", *(f"KL {kl:g}; minus DPO's" for kl in KLS)], table)


def _lasts(some: list[dict]) -> str:
    """What as many steps give."""
    arms: dict[str, dict[int, dict]] = {}
    for one in some:
        arms.setdefault(one["arm"], {})[one["seed"]] = one["found"]["marks"][-1]
    table = []
    for arm, by_seed in arms.items():
        rivals = arms.get(_dpo(arm), {})
        both = [mark["reward"] - rivals[seed]["reward"] for seed, mark in by_seed.items() if seed in rivals]
        kl, reward = (spread([mark[name] for mark in by_seed.values()]) for name in ("kl", "reward"))
        table.append([arm, kl, reward, spread(both, sign=True) if rivals is not by_seed else ""])
    return markdown(["", "KL", "reward", "minus DPO's"], table)


def _dpo(arm: str) -> str:
    """The name of plain DPO under the same conditions."""
    return ",".join(["DPO", *arm.split(",")[1:]])


def by_share(record: dict, source: str) -> dict[str, dict[str, list[float]]]:
    """{arm: {share: accuracy of each seed}}"""
    out: dict[str, dict[str, list[float]]] = {}
    for one in trainings(record, "noise"):
        arm, of, share = one["arm"].split(", ")
        if of == source:
            accuracy = one["found"]["held_out"]["rewards/accuracies"]["value"]
            out.setdefault(arm, {}).setdefault(share, []).append(accuracy)
    return out


def _by_share(record: dict, source: str) -> str:
    arms = by_share(record, source)
    if not arms:
        return ""
    shares = list(dict.fromkeys(share for of in arms.values() for share in of))
    table = [[arm, *(spread(of.get(share, [])) for share in shares)] for arm, of in arms.items()]
    return markdown([source, *shares], table)


def _ends(record: dict, study: str, metric: str) -> str:
    """A held-out number at the end, of each arm; none of a model that is still the start model."""
    arms: dict[str, list[float]] = {}
    for one in trainings(record, study):
        found = one["found"]["held_out"]
        arms.setdefault(one["arm"], []).extend([found[metric]["value"]] if metric in found else [])
    return markdown(["", metric], [[arm, spread(values)] for arm, values in arms.items()])


# as in blocks.py
BLOCKS = {
    "parity-cpu": ("parity", "cpu", parity, "learning beside TRL in fp32", "make bench-cpu"),
    "parity-assistant": (
        "parity_real",
        "cpu",
        parity,
        "learning beside TRL on a real assistant",
        "python -m benchmarks.learning.real.parity",
    ),
    "parity-gpu": (
        "parity",
        "gpu",
        parity,
        "learning beside TRL in bf16",
        "bash benchmarks/gpu_all.sh parity",
    ),
    "example": (
        "example",
        "cpu",
        example,
        "the example of the README",
        "python -m benchmarks.learning.real.example",
    ),
    "prior-exams": (
        "prior_exams",
        "cpu",
        prior_exams,
        "weighted DPO on a vision-language model",
        "python -m benchmarks.learning.prior_exams",
    ),
    "assistant-cpu": (
        "learning_real",
        "cpu",
        assistant,
        "objectives on a real assistant",
        "make learn",
    ),
    "assistant-second": (
        "learning_second",
        "cpu",
        assistant,
        "Dr. DPO on flipped pairs and ODPO on few",
        "python -m benchmarks.learning.real --second",
    ),
    "assistant-gpu": (
        "learning_real",
        "gpu",
        assistant,
        "the full grid of them",
        "bash benchmarks/gpu_all.sh learning",
    ),
}
