"""`fastdpo doctor`: what is installed, what is right, how fast it is."""

import contextlib
import signal
from collections.abc import Iterator

import torch
from rich.console import Console
from rich.markup import escape
from rich.text import Text

from fastdpo.console.progress import make_progress
from fastdpo.doctor import machine, show
from fastdpo.doctor.ladder import Choice, Ladder, choose, kept, ladders_of, verdict_path
from fastdpo.doctor.trials import Children, NotStarted, Outcome, try_check
from fastdpo.errors import ModelError

OTHERS = (
    ("activation_offloading", "fastdpo.doctor.other_checks:check_offloading"),
    ("load_in_4bit", "fastdpo.doctor.other_checks:check_4bit"),
)
SPEED = "fastdpo.doctor.speed:measure"


def doctor(console: Console | None = None) -> int:
    """Prints it all; returns the exit code. Raises ModelError where nothing can be tried."""
    console = console or Console()
    device = f"cuda:{torch.cuda.current_device()}" if torch.cuda.is_available() else "cpu"
    facts = machine.facts()
    console.print(show.facts_table(facts))
    ladders = ladders_of(device)
    try:
        with _ended_by_sigterm(), Children(device) as children:
            outcomes = try_all(children, ladders, console)
            choice = choose(ladders, lambda ladder, rung: outcomes[ladder.name, rung])
            speed = _speed(children, choice) if device != "cpu" else ""
    except NotStarted as error:
        raise ModelError(f"the process that the checks run in does not start: {error}") from None
    console.print(show.outcomes_table(outcomes, choice))
    if isinstance(speed, dict):
        console.print(show.speed_table(speed))
    for line in _closing(device, choice, outcomes, speed):
        console.print(line, highlight=False)
    show.print_report(console, show.report_text(facts, outcomes, choice, speed))
    return 1 if None in choice.taken.values() or choice.unknown else 0


@contextlib.contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """Inside, SIGTERM is SystemExit, so that what `with` holds is let go: a child that computes too."""

    def leave(number, frame):
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def try_all(children: Children, ladders: tuple[Ladder, ...], console: Console) -> show.Outcomes:
    """Every rung of every ladder, and the rest. In a log each is told at once: a limit from outside may come
    first; a terminal has a bar, and the table at the end."""
    device = children.device
    trials = [(ladder.name, rung, ladder.check) for ladder in ladders for rung in ladder.rungs]
    trials += [(name, "", check) for name, check in OTHERS]
    outcomes = {}
    with make_progress(console) as progress:
        bar = progress.add_task("checks", total=len(trials), unit="checks", info="")
        for name, rung, check in trials:
            progress.update(bar, info=f"{name} {rung}")
            arguments = {"device": device} | ({"rung": rung} if rung else {})
            outcomes[name, rung] = try_check(children, check, arguments)
            if not console.is_terminal:
                console.print(Text(show.outcome_line(name, rung, outcomes[name, rung])), highlight=False)
            progress.advance(bar)
        progress.update(bar, info="")
    return outcomes


def _speed(children: Children, choice: Choice) -> dict | str:
    """What speed.measure found, or why it found nothing."""
    if None in choice.taken.values() or not machine.has_bf16(children.device):
        return "speed: not measured, since not all is right here, or without bf16"
    answer = children.ask(SPEED, {"device": children.device, "left_out": list(choice.left_out)})
    return f"speed: not measured: {answer.failed}" if answer.failed else answer.value


def _closing(device: str, choice: Choice, outcomes: dict[tuple[str, str], Outcome], speed) -> list[str]:
    """What it means, in lines of rich's markup."""
    lines = []
    for rung, why in choice.left_out.items():
        lines.append(f"[yellow]{escape(f'{rung} is left out: {why}')}")
    for rung, why in choice.unknown.items():
        lines.append(f"[yellow]{escape(f'nothing is known of {rung}: {why}')}")
    for name, _ in OTHERS:
        outcome = outcomes[name, ""]
        if outcome.verdict in ("failed", "inexact"):
            lines.append(f"[red]{escape(f'do not train with {name} here: {outcome.why}')}")
        elif outcome.verdict == "unknown":
            lines.append(f"[yellow]{escape(f'nothing is known of {name}: {outcome.why}')}")
    if isinstance(speed, str) and speed:
        lines.append(f"[yellow]{escape(speed)}")
    if device == "cpu":
        lines.append(f"no GPU: {escape(machine.no_gpu())}")
        lines.append(escape(show.ahead_of_time(machine.versions(("triton",))["triton"])))
    elif None not in choice.taken.values():
        lines.append(_kept(device, choice))
    wrong = [name for name, rung in choice.taken.items() if rung is None]
    if wrong:
        return [*lines, f"[bold red]nothing is right for {', '.join(wrong)}: do not train on this machine"]
    if choice.unknown:
        return [*lines, "[bold yellow]not all that a run here stands on (*) could be tried"]
    return [*lines, "[bold green]all that a run here stands on (*) is right"]


def _kept(device: str, choice: Choice) -> str:
    key = machine.key(device)
    path = verdict_path(key)
    if why := kept(path, key, choice):
        return f"[yellow]the next runs will try the kernels again: {escape(why)}"
    return escape(f"kept for the next runs, in {path}")
