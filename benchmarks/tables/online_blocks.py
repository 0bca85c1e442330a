"""What rounds learn: from records to Markdown."""

from benchmarks.frontiers import spread
from benchmarks.tables.markdown import markdown, number, where

OFFLINE = "offline DPO, own answers"  # what the arms are compared with
NUMBERS = ("reward", "kl", "helpful", "unknown")


def ends_of(record: dict, number_of: str) -> dict[str, list[float]]:
    """{arm: that number of each seed}"""
    return {arm: [of[number_of] for of in by_seed.values()] for arm, by_seed in record["arms"].items()}


def gains(record: dict, arm: str) -> list[float]:
    """Its reward minus the offline arm's, of each seed that both have."""
    ours, theirs = (record["arms"].get(name, {}) for name in (arm, OFFLINE))
    return [ours[seed]["reward"] - theirs[seed]["reward"] for seed in ours if seed in theirs]


def online(record: dict, link: str) -> str:
    """An arm a line, the start model first."""
    sizes, start = record["sizes"], record["start"]
    table = [["start model", "", number(start["reward"]), "", *(number(start[n]) for n in NUMBERS[1:])]]
    for arm, by_seed in record["arms"].items():
        rate = next(iter(by_seed.values()))["learning_rate"]
        apart = "" if arm == OFFLINE else spread(gains(record, arm), sign=True)
        cells = [spread(ends_of(record, name)[arm]) for name in NUMBERS]
        table.append([arm, f"{rate:g}", cells[0], apart, *cells[1:]])
    prompts = sizes["steps"] * sizes["batch_size"]
    text = (
        f"{prompts} prompts, {sizes['responses']} answers to each but for the given pairs, steps of "
        f"{sizes['batch_size']} prompts, a LoRA of rank {record['common']['lora_rank']}, on {where(record)} "
        f"({link}). Reward: {record['worth']}, on average over {sizes['measured']} fresh answers to each "
        "question about the four dishes that are held out; KL: nats an answer, exact, to the start model; "
        "helpful: the share rated 4 or 5; unknown: the share of 0. Learning rate: for each arm the best of "
        f"{', '.join(f'{rate:g}' for rate in sizes['rates'])} (of half of these for the given pairs) on a "
        "seed that is not reported; beta 0.1 and kl_coef 0.05, the defaults. Seeds are of the LoRA, the "
        "samples and their order, from one start model; mean ± deviation over (seeds)."
    )
    header = ("", "rate", "reward", "minus offline's", "KL", "helpful", "unknown")
    return f"{text}\n\n{markdown(header, table)}\n\n{_plots(link, 'reward, online and offline', '')}".strip()


def assistant(record: dict, link: str) -> str:
    """A round a line, and what start and end say of other prompts."""
    sizes, table = record["sizes"], []
    for one in record["rounds"]:
        score = f"{one['objective/scores']:.3f} ± {one['objective/scores_stderr']:.3f}"
        cells = (f"{one['objective/kl']:.2f}", f"{one['val/contain_eos_token']:.0%}")
        table.append([str(one["round"]), str(one["step"]), score, *cells, str(one["no_signal"])])
    said = lambda end: " and ".join(
        f"{record[end][name]:.3f} ± {record[end][f'{name}_stderr']:.3f}" for name in ("reward", "kl")
    )
    keys = record["keys"]
    text = (
        f"{record['keys']['model']} on {where(record)} ({link}): {sizes['rounds']} rounds of "
        f"{sizes['prompts']} prompts, {sizes['responses']} answers to each, steps of {keys['batch_size']} "
        f"prompts, a LoRA of rank {keys['lora_rank']}, DPO at beta {keys['beta']:g} and learning rate "
        f"{keys['learning_rate']:g}, in {record['seconds'] / 60:.0f} minutes beside other work. "
        f"{_fewer(sizes)}Reward: VADER's compound score, -1 to 1; KL: nats an answer, of the samples' "
        "log-probs. A round's numbers are of what it sampled, before it trained:"
    )
    header = ("round", "after steps", "reward", "KL", "ended", "prompts without a signal")
    ends = (
        f"On {sizes['held_out']} questions about other films the reward and the exact KL are {said('start')} "
        f"at the start and {said('end')} after the last round's training; mean ± standard error over prompts."
    )
    plots = "\n".join(
        _plots(link, f"rounds on an assistant, {what}", f"_{what}") for what in ("scores", "kl")
    )
    return f"{text}\n\n{markdown(header, table)}\n\n{ends}\n\n{plots}".strip()


def _fewer(sizes: dict) -> str:
    if sizes["prompts"] >= sizes["wanted"]:
        return ""
    return f"Rounds of {sizes['wanted']} prompts were meant, and these are what there was time for. "


def _plots(link: str, title: str, suffix: str) -> str:
    """The picture beside the linked JSON."""
    if not link.startswith("[results](") or not link.endswith(".json)"):
        return ""
    folder, _, name = link.removeprefix("[results](").removesuffix(".json)").rpartition("/")
    return f"![{title[:1].upper()}{title[1:]}]({folder}/plots/{name}{suffix}.svg)"


# as in blocks.py
BLOCKS = {
    "online": (
        "online",
        "cpu",
        online,
        "rounds beside offline DPO",
        "python -m benchmarks.learning.online",
    ),
    "rounds-assistant": (
        "rounds_real",
        "cpu",
        assistant,
        "rounds on a real assistant",
        "python -m benchmarks.learning.real.rounds",
    ),
}
