"""The race of a round's training part: fastdpo on groups of sampled responses, and what TRL makes of them.

TRL's OnlineDPOTrainer takes two completions a prompt and no more: it has the best and the worst. Its
DPOTrainer has every pair as a row. Both compute the reference in every step, since a round's rows come once;
ours is made before the step, and both are told: steps that find it, and steps with their rows' part of it.
Nobody is timed whose first losses are not those of plain torch on the same groups.
"""

import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace

from rich.console import Console
from rich.table import Table

from benchmarks.flops import USEFUL
from benchmarks.inputs import pair_rows, sampled_groups, sampled_rows
from benchmarks.lengths import draw_samples
from benchmarks.steps.contenders import BATCHED, OURS, TRL
from benchmarks.steps.race import Contender, Race
from benchmarks.steps.steps import POOL, Plan, even_steps, first_twice, raced
from benchmarks.steps.timed import mark_fastest, timed
from benchmarks.workers import Workers
from fastdpo.data.pairs import select_pairs

RESPONSES, MOST = 4, 256  # a prompt; tokens that sampling stops at
ASKED = 2.5  # times TRL's tokens a second
PLAIN, ONLINE = "benchmarks.peers.hf_rounds", "benchmarks.peers.trl_online"
SUMMED = 16.0  # tolerances of rloo's loss, a sum over up to MOST tokens whose errors are as good as random
COUNTED = {
    "response_tokens": "tokens of the responses that a step's loss reads, each once",
    "trl_tokens": "as TRL's DPOTrainer counts num_tokens: prompt and response of both rows of every pair "
    "(of rloo, which has no pairs: of a row a response), without padding",
}


@dataclass(frozen=True)
class Task:
    """What a step trains, by fastdpo's keys."""

    pairs: str
    keys: dict

    @property
    def options(self) -> dict:
        return {"pairs": self.pairs, "keys": self.keys}

    def counts(self, groups: list) -> dict[str, int]:
        """COUNTED of these groups."""
        groups = list(select_pairs(groups, self.pairs)[0])
        each = [[len(r.ids) for r in group.responses] for group in groups]
        rows = pair_rows(groups)
        counted = sum(2 * len(r["prompt_ids"]) + len(r["chosen_ids"]) + len(r["rejected_ids"]) for r in rows)
        if "objective" in self.keys:
            counted = sum(len(g.prompt) * len(lengths) + sum(lengths) for g, lengths in zip(groups, each))
        return {"response_tokens": sum(map(sum, each)), "trl_tokens": counted}


TASKS = {
    "best and worst": Task("best_worst", {}),
    "all pairs": Task("all", {}),
    "rloo": Task("all", {"objective": "rloo", "beta": None}),
}
FASTDPO, OFFLINE = [f"fastdpo, {task}" for task in TASKS], "fastdpo, offline pairs"


def ours(task: str, max_tokens: int, **more) -> Contender:
    options = TASKS[task].options | {"max_tokens": max_tokens}
    return Contender(f"fastdpo, {task}", OURS, options, USEFUL, **more)


def plain(task: str, size: int, **more) -> Contender:
    """Plain torch, for its losses."""
    options = TASKS[task].options | {"batch_size": size}
    return Contender(f"plain torch, {task}", PLAIN, options, BATCHED, checks_only=True, **more)


def online(size: int, prompts: int, label: str = "", **options) -> Contender:
    """TRL's OnlineDPOTrainer with so many prompts a microbatch."""
    return _trl(f"TRL online{label}", ONLINE, "best and worst", size, prompts, **options)


def unrolled(task: str, size: int, prompts: int, label: str = "", **options) -> Contender:
    """TRL's DPOTrainer with so many pairs a microbatch."""
    pairs = prompts * (RESPONSES * (RESPONSES - 1) // 2 if TASKS[task].pairs == "all" else 1)
    options = {"stored": False} | options
    return _trl(f"TRL DPO, {task}{label}", TRL, task, size, pairs, **options)


def _trl(name: str, module: str, task: str, size: int, whole: int, **options) -> Contender:
    """Its losses are plain torch's; of one thing the slow sizes leave, and where memory is out without it, it
    recomputes layers."""
    options = TASKS[task].options | {"batch_size": size, "best": True} | options
    found = Contender(
        f"{name} {size} x {whole // size}",
        module,
        options,
        replace(BATCHED, padded_to=size, reference_forward=True),
        family=name.split(" +")[0],
        sizes_of=name,
        like=None if task == "best and worst" else f"plain torch, {task}",
    )
    options = options | {"checkpointing": True}
    return replace(found, checkpointed=replace(found, name=f"{found.name}, checkpointing", options=options))


def contenders(prompts: int, sizes: tuple[int, ...], max_tokens: int, everything: bool) -> list[Contender]:
    """Plain torch before those whose losses must be its; TRL's likely best before what may make it faster."""
    check, others = 1 if len(sizes) < 3 else 2, [task for task in TASKS if task != "best and worst"]
    out = [ours("best and worst", max_tokens), plain("best and worst", check)]
    for task in others:
        tolerance = SUMMED if task == "rloo" else 1.0
        like = f"plain torch, {task}"
        out += [plain(task, check, like=like), ours(task, max_tokens, like=like, tolerance=tolerance)]
    offline = ours("best and worst", max_tokens)
    out.append(replace(offline, name=OFFLINE, options=offline.options | {"offline": True}))
    out += [online(size, prompts) for size in sizes]
    out += [unrolled("all pairs", size, prompts) for size in sizes]
    out += [unrolled("best and worst", size, prompts) for size in sizes[:2]]
    if everything:
        for label, more in ((" + flash-attn", {"flash": True}), (" + liger layers", {"liger": True})):
            out += [online(sizes[0], prompts, label, **more)]
            out += [unrolled("all pairs", sizes[0], prompts, label, **more)]
        stored = unrolled("all pairs", sizes[0], prompts, " + stored reference", stored=True)
        out.append(replace(stored, family="TRL DPO, all pairs, stored reference"))
    return out


def rows_of(plan: Plan) -> list[list[dict]]:
    """Each step's sampled rows; in a dry run a tenth of their lengths."""
    pool = draw_samples(plan.mix, POOL * plan.pairs, RESPONSES, MOST)
    if plan.tiny:
        pool = [tuple(max(2, n // 10) for n in row) for row in pool]
    steps = even_steps(pool, plan.pairs, plan.distinct)  # type: ignore[arg-type]
    return [sampled_rows(step, plan.bench_model.vocab, number) for number, step in enumerate(steps)]


def measure_rounds(
    plan: Plan, field: list[Contender], workers: Workers, keep: Callable[[dict], None] = lambda record: None
) -> dict:
    """One model and mix, plan.pairs prompts a step: as steps.measure_steps, with "counts" in the lengths'
    place."""
    rows = rows_of(plan)
    groups = [sampled_groups(step) for step in rows]
    mean = lambda found: {name: statistics.mean(one[name] for one in found) for name in COUNTED}
    counts = {task: mean([of.counts(step) for step in groups]) for task, of in TASKS.items()}
    first_twice(rows, plan)
    return raced(plan, field, {"even": rows}, workers, lambda race: record_of(race, plan, counts), keep)


def task_of(contender: Contender) -> str:
    return next(name for name, task in TASKS.items() if task.options.items() <= contender.options.items())


def record_of(race: Race, plan: Plan, counts: dict[str, dict[str, float]]) -> dict:
    """What a race says, during it too. Nothing is fast where the first of fastdpo's is not plain torch."""
    tokens = lambda contender: counts[task_of(contender)]["response_tokens"]
    numbers = {c.name: timed(c, race, plan.pairs, tokens(c), tokens(race.ours)) for c in race.contenders}
    mark_fastest(numbers)
    gate = {
        c.name: race.entries[c.name].state
        for c in race.contenders
        if c.name in race.entries and c.checks_only
    }
    first = plain("best and worst", 1).name
    if gate.get(first) != "checked":
        why = getattr(race.entries.get(first), "why", None) or "not there yet"
        numbers = {
            name: {"state": "disagrees", "why": f"the gate, {first}: {why}", "family": n["family"]}
            for name, n in numbers.items()
        }
    for contender in race.contenders:
        if "pairs_per_second" in (told := numbers[contender.name]):
            told["prompts_per_second"] = told.pop("pairs_per_second")
            told |= counted(contender, told, race, plan, counts[task_of(contender)])
            del told["fastdpo_times_faster"], told["fastdpo_memory_ratio"]  # of other work
    for told in numbers.values():
        told |= beside(told, numbers)
    shape = {"responses": RESPONSES, "most": MOST, "counts": counts, "counted": COUNTED}
    return {"shape": shape, "asked": ASKED, "gate": gate, "summary": numbers}


def counted(contender: Contender, told: dict, race: Race, plan: Plan, counts: dict[str, float]) -> dict:
    """Both counts a second, and the seconds of a step: of fastdpo with the reference's part, which others'
    steps have inside. Under a LoRA a run makes two, of all samples: objective/kl is of the base."""
    step, fill = told["median_seconds"], 0.0
    if made := race.entries[contender.name].facts.get("reference"):
        best_worst = TASKS[task_of(contender)].pairs == "best_worst"
        a_prompt = 2 * RESPONSES if plan.bench_model.lora_rank else 2 if best_worst else RESPONSES
        fill = made["seconds"] / made["responses"] * a_prompt * plan.pairs
    out = {"counts": counts, "fill_seconds_a_step": fill, "with_reference_seconds": step + fill}
    # in steps of the first contender of the same turns, whatever the machine did meanwhile
    out["of_first"] = told["fastdpo_times_faster"] * (1 + fill / step)
    return out | {f"{name}_per_second": n / (step + fill) for name, n in counts.items()}


def beside(told: dict, numbers: dict[str, dict]) -> dict:
    """Of a peer: by how much each of fastdpo's is faster, by both counts, and the memory it takes. Of
    fastdpo's: its memory beside offline DPO's."""
    if "of_first" not in told:
        return {}
    offline = numbers.get(OFFLINE, {})
    if told["family"] is None:
        return {"memory_beside_offline": told["peak_gb"] / offline["peak_gb"]} if "peak_gb" in offline else {}
    over = {}
    for name in FASTDPO:
        mine = numbers.get(name, {})
        if "of_first" in mine:
            seconds = told["of_first"] / mine["of_first"]
            faster = {count: seconds * mine["counts"][count] / told["counts"][count] for count in COUNTED}
            over[name] = faster | {"memory": mine["peak_gb"] / told["peak_gb"]}
    return {"over": over}


def print_table(title: str, record: dict, console: Console) -> None:
    """The contenders under each other; below, who has no numbers and why."""
    columns = ("", "response tokens/s", "TRL's tokens/s", "peak GB", *(f"{name} is" for name in FASTDPO))
    table = Table(title=title)
    for column in columns:
        table.add_column(column, justify="right" if column else "left")
    for name, r in record["summary"].items():
        if "prompts_per_second" not in r:
            continue
        over = r.get("over", {})
        table.add_row(
            name + (" *" if r.get("fastest_of_family") else "") + ("" if r["interleaved"] else " (alone)"),
            *(f"{r[f'{count}_per_second']:,.0f}" for count in COUNTED),
            f"{r['peak_gb']:.2f}",
            *(f"{over[ours]['response_tokens']:.2f}x" if ours in over else "" for ours in FASTDPO),
        )
    console.print(table)
    for name, r in record["summary"].items():
        if "prompts_per_second" not in r:
            console.print(f"  {name}: {r['state']}: {r['why']}", style="dim", highlight=False)
    console.print(f"* the fastest of its settings. Asked: {record['asked']}x TRL's tokens a second.")
