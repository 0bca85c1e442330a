"""Which way the head and the attention are computed on this GPU: the first that is right here.

The first run on a GPU tries them in a child process, on small problems, and keeps what it found; see
verdict.py. What fails or is inexact is left out of the whole process, and said aloud.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from fastdpo_kernels import tiles
from rich.console import Console
from rich.markup import escape

from fastdpo.doctor import machine
from fastdpo.doctor.trials import NO_ANSWER, NO_PROCESS, Children, NotStarted, Outcome, try_check
from fastdpo.doctor.verdict import Choice, keep_verdict, read_verdict, verdict_path
from fastdpo.errors import ModelError


@dataclass(frozen=True)
class Ladder:
    """A thing to compute, the ways to do it, the one to like best first, and the check of one of them:
    "module:name" of a function of (device, rung) that returns Measureds."""

    name: str
    check: str
    rungs: tuple[str, ...]
    needs_bf16: bool = False


HEAD, ATTENTION = "fastdpo.doctor.head_checks", "fastdpo.doctor.attention_checks"
LADDERS = (
    Ladder("lm_head, bf16", f"{HEAD}:check_bf16", tiles.RUNGS, True),
    Ladder("lm_head, fp32 or LoRA", f"{HEAD}:check_others", ("cublas", "torch")),
    Ladder("attention, bf16", f"{ATTENTION}:check_bf16", ("varlen", "flash_attn", "segments"), True),
    Ladder("attention, fp32 or softcap", f"{ATTENTION}:check_others", ("flash_attn", "segments")),
)
_known: dict[str, Choice] = {}  # to this process, by the verdict's file name, where none can be kept too
HEAD_RUNGS, ATTENTION_RUNGS = tiles.RUNGS[:-1], ("varlen", "flash_attn")  # that can be left out


def ladders_of(device: str) -> tuple[Ladder, ...]:
    """Those that a run on this device may stand on."""
    has_bf16 = machine.has_bf16(device)
    return tuple(ladder for ladder in LADDERS if has_bf16 or not ladder.needs_bf16)


def choose(ladders: tuple[Ladder, ...], outcome_of: Callable[[Ladder, str], Outcome]) -> Choice:
    """The first right rung of each ladder. A rung that is wrong in one ladder is taken in none; one that
    nothing is known of is taken as it is."""
    known, left_out = {}, {}

    def first_right(ladder: Ladder) -> str | None:
        for rung in (rung for rung in ladder.rungs if rung not in left_out):
            if (ladder.name, rung) not in known:
                known[ladder.name, rung] = outcome_of(ladder, rung)
            outcome = known[ladder.name, rung]
            if outcome.verdict in ("right", "unknown"):
                return rung
            if outcome.verdict != "not here":
                left_out[rung] = f"{outcome.verdict}: {outcome.why}"
        return None

    while True:
        before = len(left_out)
        taken = {ladder.name: first_right(ladder) for ladder in ladders}
        if len(left_out) == before:
            stands = [(rung, known[name, rung]) for name, rung in taken.items() if rung is not None]
            return Choice(taken, left_out, {r: o.why for r, o in stands if o.verdict == "unknown"})


def settle(
    console: Console,
    *,
    device: str | None = None,
    ladders: tuple[Ladder, ...] | None = None,
    seconds: float | None = None,
) -> None:
    """Leaves out of this process what is wrong on this GPU, by the kept verdict or a new one.

    Raises ModelError where a ladder has no right rung. device, ladders and seconds (of a check): the
    current GPU, LADDERS and trials.SECONDS, unless given.
    """
    device = device or f"cuda:{torch.cuda.current_device()}"
    key = machine.key(device)
    path = verdict_path(key)
    choice = read_verdict(path, key) or _known.get(path.name)
    if choice is None:
        limit = {} if seconds is None else {"seconds": seconds}
        choice = _tried(path, key, device, ladders or ladders_of(device), console, limit)
    if choice is not None:
        _known[path.name] = choice
        take(choice, console, path)


def _tried(path: Path, key: dict, device: str, ladders, console: Console, limit: dict) -> Choice | None:
    """A new verdict, kept; None, said aloud, where nothing could be tried."""
    say = partial(console.print, highlight=False, soft_wrap=True)
    if path.exists():
        say(f"[yellow]{escape(f'{path} is damaged, or cannot be read')}")
    first = f"first run on {key['gpu']} with these versions"
    say(f"{escape(first)}: its kernels are tried on small problems, once")
    try:
        with Children(device) as children, console.status("") as status:

            def trial(ladder: Ladder, rung: str) -> Outcome:
                status.update(f"{ladder.name} by {rung}")
                return try_check(children, ladder.check, {"device": device, "rung": rung}, **limit)

            choice = choose(ladders, trial)
    except NotStarted as error:
        text = f"the kernels could not be tried ({error}): they are taken as they are. `fastdpo doctor` tries"
        say(f"[yellow]{escape(text)} them too")
        return None
    _refuse_nothing_right(choice)
    if why := kept(path, key, choice):
        say(f"[yellow]the verdict is of this run alone: {escape(why)}")
    return choice


def kept(path: Path, key: dict, choice: Choice) -> str:
    """Keeps the verdict for the next runs; why it is not kept, or nothing."""
    if choice.unknown:
        return "another process may have the GPU's memory"
    if any(sign in why for why in choice.left_out.values() for sign in (NO_ANSWER, NO_PROCESS)):
        return "a check without an answer may have one the next time"
    try:
        keep_verdict(path, key, choice)
    except OSError as error:
        return f"cannot write {path}: {error}"
    return ""


def _refuse_nothing_right(choice: Choice) -> None:
    for name, rung in choice.taken.items():
        if rung is None:
            why = "; ".join(f"{rung} {why}" for rung, why in choice.left_out.items())
            raise ModelError(
                f"{name}: no way to compute it is right on this machine ({why}). "
                "`fastdpo doctor` shows each, with text for a bug report"
            )


def leave_out(rungs: Collection[str]) -> None:
    """No head and no attention of this process runs by these, nor by what was avoided before."""
    if not rungs:
        return
    from fastdpo.model import attention

    for family, ways in ((tiles, HEAD_RUNGS), (attention, ATTENTION_RUNGS)):
        family.avoid(*(rung for rung in ways if rung in rungs or family.avoids(rung)))


def take(choice: Choice, console: Console, path: Path | None = None) -> None:
    """Leaves out what the choice leaves out, aloud, as is said what nothing is known of."""
    leave_out(choice.left_out)
    lines = [f"{rung} is left out on this GPU, {why}" for rung, why in choice.left_out.items()]
    lines += [f"{rung} is taken as it is, untried: {why}" for rung, why in choice.unknown.items()]
    if not lines:
        return
    lines.append("; ".join(f"{name}: by {rung}" for name, rung in choice.taken.items()))
    again = "" if path is None or not path.exists() else f" (kept in {path}: remove it to try again)"
    lines.append(f"`fastdpo doctor` shows each kernel, with text for a bug report{again}")
    for line in lines:
        console.print(f"[yellow]{escape(line)}", highlight=False, soft_wrap=True)
