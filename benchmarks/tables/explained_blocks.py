"""What `fastdpo explain` finds of a real assistant, from its record to Markdown."""

from statistics import mean, stdev
from typing import Any

from benchmarks.tables.markdown import markdown, where
from fastdpo.explanation.cause_words import broken

_COLUMNS = {"projection": "projection", "margins": "margin", "score": "VADER's score"}
Seeds = dict[str, Any]  # {seed: what the record has of it}


def explained(record: dict, link: str) -> str:
    """How the change is made up, and what patches bring back."""
    seeds = record["seeds"]
    about = (
        f"{record['model']}, {len(seeds)} trainings on {where(record)} ({link}); mean ± standard deviation "
        f"over trainings, which differ in their seed and in which rows they are trained on. {_about(seeds)}"
    )
    return "\n\n".join(part for part in (about, _groups(seeds), _causes(seeds)) if part)


def _about(seeds: Seeds) -> str:
    each = list(seeds.values())
    direction, data = each[0]["direction"], each[0]["data"]
    low, high = direction["interval"]
    text = (
        f"{data['pairs']} held-out pairs of {data['prompts']} prompts. The direction tells chosen from "
        f"rejected responses in {direction['accuracy']:.0%} of the pairs of {direction['tested']} other "
        f"prompts (95 %: {low:.0%} to {high:.0%})"
    )
    if direction["length_correlation"] is not None:
        text += f", and its correlation with their length is {direction['length_correlation']:.2f}"
    margin = spread([one["behaviour"]["margins"] for one in each], 2)
    text += f". The margin grew by {margin} nats, at a KL of "
    text += f"{spread([one['behaviour']['kl/reverse'] for one in each], 3)} nats a token."
    if "neurons" not in each[0]:
        return f"{text} No direction was found, so nothing is said of neurons."
    names = ("total", "attention", "mlp", "embedding")
    total, attention, mlp, embedding = (spread([_of(one, name) for one in each], 3) for name in names)
    text += f" The projection changed by {total}: attention {attention}, MLPs {mlp}, embedding {embedding}."
    return text


def _of(one: dict, name: str) -> float:
    value = one["where"][name]
    return sum(value) if isinstance(value, list) else value


def _groups(seeds: Seeds) -> str:
    """A group a line: of all eight, those that lower what shall fall with their share of the gross."""
    each = [one["neurons"] for one in seeds.values() if "neurons" in one]
    if not each:
        return ""
    table = []
    for place, group in enumerate(each[0]["groups"]):
        some = [one["groups"][place] for one in each]
        of = "gross" if group["lowers"] else "raised"
        share = spread([100 * one["share"] for one in some], 1)
        cells = [spread([one["sum"] for one in some], 3), f"{share} % of {of}"]
        table.append([group["name"], group["paper"], spread([one["count"] for one in some], 0), *cells])
    gross, raised, net = (spread([one[name] for one in each], 3) for name in ("gross", "raised", "net"))
    half = spread([one["concentration"][0]["neurons"] for one in each], 0)
    text = f"{each[0]['neurons']:,} neurons: gross {gross}, raised {raised}, net {net}; "
    text += f"half of the gross is {half} of them."
    return f"{text}\n\n{markdown(('group', 'in the paper', 'neurons', 'sum', 'share'), table)}"


def _causes(seeds: Seeds) -> str:
    """A set of neurons a line: the shares of the effect that come back, in percent."""
    each = [one["causes"] for one in seeds.values() if one.get("causes", {}).get("rows")]
    if not each:
        return ""
    columns = [name for name in _COLUMNS if any(name in row for row in each[0]["rows"])]
    table = []
    for place, row in enumerate(each[0]["rows"]):
        if row["what"] in ("before", "after"):
            continue
        some = [one["rows"][place] for one in each]
        sizes = spread([one["size"] for one in some], 0) if row["size"] else ""
        broke = sum(bool(broken(*pair)) for pair in zip(each, some))
        told = f" (broken{_some(broke, len(some))})" if broke else ""
        shares = (_share([one.get(name) for one in some]) for name in columns)
        table.append([_name(row) + told, sizes, *shares])
    (pairs, *_) = (one["data"]["causes_pairs"] for one in seeds.values() if one.get("causes", {}).get("rows"))
    text = (
        f"Patched into the model before, on {pairs} pairs ({len(each)} of the trainings): the share of the "
        "effect that comes back, in percent. Empty: not measured, or an effect within two standard errors "
        "of 0; where only some trainings have one, a share is theirs. Broken: further from the model before "
        "than three times the training, and worse at the chosen responses than either model."
    )
    header = ("what is patched", "neurons", *(_COLUMNS[name] for name in columns))
    return f"{text}\n\n{markdown(header, table)}"


def _name(row: dict) -> str:
    """How a row is called whatever the number of its neurons is."""
    how = {"ablated": "off", "constant": "means after training", "token": "token by token"}.get(row["how"])
    if row["how"] == "parts":
        return f"{row['group']}, token by token"
    control = "as many random neurons as " if row["what"] == "random" else ""
    return f"{control}{row['group']}, {how}"


def _share(cells: list[dict | None]) -> str:
    """Over the trainings that tell it."""
    found = [100 * cell["share"] for cell in cells if cell and cell["share"] is not None]
    return spread(found, 0) + _some(len(found), len(cells)) if found else ""


def _some(count: int, total: int) -> str:
    """Of how many trainings something is, where it is not all."""
    return f" in {count} of {total}" if count < total else ""


def spread(values: list[float], digits: int) -> str:
    """Mean ± standard deviation; the mean alone where there is one, or where all are the same."""
    deviation = stdev(values) if len(values) > 1 else 0.0
    head = f"{mean(values):,.{digits}f}".replace("-", "−")
    return f"{head} ± {deviation:,.{digits}f}" if deviation else head


# as in blocks.py
BLOCKS = {
    f"explained-{task}": (
        f"explained_{task}",
        "cpu",
        explained,
        f"what DPO changed inside a real assistant: {told}",
        f"python -m benchmarks.learning.real.explained --only {task}",
    )
    for task, told in {"harmless": "harmless answers", "sentiment": "positive answers"}.items()
}
