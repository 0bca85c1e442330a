"""Which way the head and the attention are computed on this GPU: the first that is right here.

The first run on a GPU tries them in a child process, on small problems, and keeps what it found beside the
default reference cache, one file for each machine. What fails or is inexact is left out of the whole process,
and said aloud.
"""

import hashlib
import json
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path

import torch
from fastdpo_kernels import tiles
from rich.console import Console
from rich.markup import escape

from fastdpo.doctor import machine
from fastdpo.doctor.trials import NO_ANSWER, NO_PROCESS, Children, NotStarted, Outcome, try_check
from fastdpo.errors import ModelError
from fastdpo.files import durable
from fastdpo.reference.cache_file import cache_path


@dataclass(frozen=True)
class Ladder:
    """A thing to compute, the ways to do it, the one to like best first, and the check of one of them:
    "module:name" of a function of (device, rung) that returns Measureds."""

    name: str
    check: str
    rungs: tuple[str, ...]
    needs_bf16: bool = False


@dataclass(frozen=True)
class Choice:
    """taken: ladder -> its rung, None where none is right. left_out: rung -> why, "failed: ...".
    unknown: rung that is taken as it is -> why it could not be tried; such a choice is not kept."""

    taken: dict[str, str | None]
    left_out: dict[str, str]
    unknown: dict[str, str] = field(default_factory=dict)


HEAD, ATTENTION = "fastdpo.doctor.head_checks", "fastdpo.doctor.attention_checks"
LADDERS = (
    Ladder("lm_head, bf16", f"{HEAD}:check_bf16", tiles.RUNGS, True),
    Ladder("lm_head, fp32 or LoRA", f"{HEAD}:check_others", ("cublas", "torch")),
    Ladder("attention, bf16", f"{ATTENTION}:check_bf16", ("varlen", "flash_attn", "segments"), True),
    Ladder("attention, fp32 or softcap", f"{ATTENTION}:check_others", ("flash_attn", "segments")),
)
_known: dict[str, Choice] = {}  # to this process, by the verdict's file name, where none can be kept too


def ladders_of(device: str) -> tuple[Ladder, ...]:
    """Those that a run on this device may stand on."""
    has_bf16 = machine.has_bf16(device)
    return tuple(ladder for ladder in LADDERS if has_bf16 or not ladder.needs_bf16)


def choose(ladders: tuple[Ladder, ...], outcome_of: Callable[[Ladder, str], Outcome]) -> Choice:
    """The first right rung of each ladder. A rung that is wrong in one ladder is taken in none; one that
    nothing is known of is taken as it is."""
    known: dict[tuple[str, str], Outcome] = {}
    left_out: dict[str, str] = {}

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

    before = -1
    while before < len(left_out):
        before = len(left_out)
        taken = {ladder.name: first_right(ladder) for ladder in ladders}
    stands = [(rung, known[name, rung]) for name, rung in taken.items() if rung is not None]
    return Choice(taken, left_out, {r: o.why for r, o in stands if o.verdict == "unknown"})


def settle(console: Console, device: str | None = None) -> None:
    """Leaves out of this process what is wrong on this GPU (the current one, unless another is named), by the
    kept verdict or a new one, aloud, as is said what nothing is known of. Raises ModelError where a ladder
    has no right rung."""
    device = device or f"cuda:{torch.cuda.current_device()}"
    key = machine.key(device)
    path = verdict_path(key)
    say = lambda text: console.print(text, highlight=False, soft_wrap=True)
    choice = read_verdict(path, key) or _known.get(path.name) or _tried(path, key, device, console, say)
    if choice is None:
        return
    _known[path.name] = choice
    leave_out(choice.left_out)
    lines = [f"{rung} is left out on this GPU, {why}" for rung, why in choice.left_out.items()]
    lines += [f"{rung} is taken as it is, untried: {why}" for rung, why in choice.unknown.items()]
    if lines:
        lines.append("; ".join(f"{name}: by {rung}" for name, rung in choice.taken.items()))
        again = f" (kept in {path}: remove it to try again)" if path.exists() else ""
        lines.append(f"`fastdpo doctor` shows each kernel, with text for a bug report{again}")
    for line in lines:
        say(f"[yellow]{escape(line)}")


def _tried(path: Path, key: dict, device: str, console: Console, say) -> Choice | None:
    """A new verdict, kept; None, said aloud, where nothing could be tried."""
    if path.exists():
        say(f"[yellow]{escape(f'{path} is damaged, or cannot be read')}")
    first = f"first run on {key['gpu']} with these versions"
    say(f"{escape(first)}: its kernels are tried on small problems, once")
    try:
        with Children(device) as children, console.status("") as status:

            def trial(ladder: Ladder, rung: str) -> Outcome:
                status.update(f"{ladder.name} by {rung}")
                return try_check(children, ladder.check, {"device": device, "rung": rung})

            choice = choose(ladders_of(device), trial)
    except NotStarted as error:
        text = (
            f"the kernels could not be tried ({error}): they are taken as they are. "
            "`fastdpo doctor` tries them too"
        )
        say(f"[yellow]{escape(text)}")
        return None
    if nothing := [name for name, rung in choice.taken.items() if rung is None]:
        why = "; ".join(f"{rung} {why}" for rung, why in choice.left_out.items())
        raise ModelError(
            f"{nothing[0]}: no way to compute it is right on this machine ({why}). "
            "`fastdpo doctor` shows each, with text for a bug report"
        )
    if why := kept(path, key, choice):
        say(f"[yellow]the verdict is of this run alone: {escape(why)}")
    return choice


def verdict_path(key: dict) -> Path:
    """Where the verdict for a `machine.key` is kept: in one folder, whatever cache a run has, so that all
    look where the doctor keeps it."""
    cache = cache_path("auto")
    assert cache is not None
    return cache.parent / f"kernels-{_digest(key)[:16]}.json"


def read_verdict(path: Path, key: dict) -> Choice | None:
    """The kept Choice. None where there is none, or none that can be believed."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content.pop("digest") != _digest(content) or content["key"] != key:
            return None
        return Choice(content["taken"], content["left_out"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def kept(path: Path, key: dict, choice: Choice) -> str:
    """Keeps the verdict for the next runs; why it is not kept, or nothing."""
    if choice.unknown:
        return "another process may have the GPU's memory"
    if any(sign in why for why in choice.left_out.values() for sign in (NO_ANSWER, NO_PROCESS)):
        return "a check without an answer may have one the next time"
    content = {"key": key, "taken": choice.taken, "left_out": choice.left_out}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        durable.write_text(path, json.dumps(content | {"digest": _digest(content)}, indent=1) + "\n")
    except OSError as error:
        return f"cannot write {path}: {error}"
    return ""


def _digest(content: dict) -> str:
    return hashlib.blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=16).hexdigest()


def leave_out(rungs: Collection[str]) -> None:
    """No head and no attention of this process runs by these, nor by what was avoided before."""
    from fastdpo.model import attention

    for family, ways in ((tiles, tiles.RUNGS[:-1]), (attention, ("varlen", "flash_attn"))):
        family.avoid(*(rung for rung in ways if rung in rungs or family.avoids(rung)))
