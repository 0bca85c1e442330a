"""Prompts and their responses as token ids: the records between a data file and a microbatch. numpy alone, so
that a process which makes them needs no torch.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from PIL.Image import Image as Picture


@dataclass(frozen=True, eq=False, slots=True)
class Image:
    """An image of a prompt. Its pixels are read when a microbatch is made, and not kept."""

    key: bytes  # 16: a hash of its pixels and of the processor that the model sees them through
    size: tuple[int, int]  # (width, height) of what `open` returns
    open: "Callable[[], Picture]"  # RGB, upright, at most image_max_pixels; raises DataError
    tokens: int = 0  # that stand for it in the prompt


@dataclass(frozen=True, eq=False, slots=True)
class Response:
    """One response of a prompt: the tokens that follow the group's shared prompt."""

    ids: np.ndarray  # i64[n], n >= 1; the last one is scored
    target_mask: np.ndarray  # bool[n]: which of them are scored
    score: float | None = None  # the row's rating, where it has one
    ref_logp: float | None = None  # the row's reference log-prob of the whole response, where it has one
    label: bool | None = None  # of an unpaired row (KTO): desirable or not
    token_weight: np.ndarray | None = None  # f32[n] in [0, 1]: how relevant each token is (weighted DPO)
    key: bytes | None = None  # what the reference knows it by behind its prompt, see data.store.digests


class Pair(NamedTuple):
    """One preference between two responses of a group, by their index in `group.responses`."""

    winner: int
    loser: int
    offset: float = 0.0  # ODPO's margin, subtracted from the reward margin
    weight: float = 1.0


@dataclass(frozen=True, eq=False, slots=True)
class PreferenceGroup:
    """A prompt and its N responses. A (prompt, chosen, rejected) row is N = 2 with one pair."""

    row: int  # the row's number in its data set, from 0
    prompt: np.ndarray  # i64[n], n >= 1: the tokens that every response follows, none of them scored
    responses: tuple[Response, ...]
    pairs: tuple[Pair, ...]
    whole: bool = False  # a response's last token is an input too, though nothing is predicted from it
    images: tuple[Image, ...] = ()  # of the prompt, in the order in which their tokens stand in it

    def inputs(self, response: Response) -> np.ndarray:
        """Those of its tokens that go through the model."""
        return response.ids if self.whole else response.ids[:-1]

    @property
    def input_tokens(self) -> int:
        """Tokens of the shared-prompt forward."""
        return len(self.prompt) + sum(len(self.inputs(r)) for r in self.responses)

    @property
    def scored_tokens(self) -> int:
        return sum(int(r.target_mask.sum()) for r in self.responses)

    @property
    def chosen(self) -> tuple[int, ...]:
        """The responses that no other response beats and no label calls undesirable (of a plain row: the
        chosen one)."""
        losers = {pair.loser for pair in self.pairs}
        return tuple(i for i, r in enumerate(self.responses) if i not in losers and r.label is not False)

    def judged(self, good: bool) -> tuple[int, ...]:
        """The responses labelled desirable (or undesirable); in a paired row each pair labels two, as TRL
        unpairs rows, so that a response may occur more than once."""
        labelled = tuple(i for i, r in enumerate(self.responses) if r.label is good)
        return labelled + tuple(p.winner if good else p.loser for p in self.pairs)

    def only_chosen(self) -> "PreferenceGroup":
        """The same prompt with only the chosen responses, and so without pairs: what SFT trains on."""
        return replace(self, responses=tuple(self.responses[i] for i in self.chosen), pairs=())


Groups = Sequence[PreferenceGroup]  # of a data set: read from disk where one is asked for (data/store)
