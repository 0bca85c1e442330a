"""What is taken of one model while its weights are there, so that the other one can take their place."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

from fastdpo.evaluation.kl import head_of
from fastdpo.explanation.attribute import Written
from fastdpo.explanation.behaviour import on
from fastdpo.explanation.capture import Captured, Seen, capture
from fastdpo.explanation.norms import folded
from fastdpo.explanation.own import own_answers
from fastdpo.explanation.places import Places, value_vectors
from fastdpo.model.policy import Policy
from fastdpo.records import Groups, PreferenceGroup, Response

_NEAREST = 5  # tokens of a neuron
_COLUMNS = 1 << 14  # of the lm_head's weight that are fp32 at once


@dataclass(frozen=True)
class Look:
    """What a pass over the rows gave."""

    captured: Captured  # of the rows' responses, or of the model's own answers
    seen: Seen  # of the rows' responses
    head: dict[str, Any]  # on the CPU

    def without_states(self) -> "Look":
        """Without the states of every token, once they are compared."""
        return replace(self, seen=replace(self.seen, hidden=self.seen.hidden[:0]))


def look(
    policy: Policy, places: Places, groups: Groups, *, own, max_tokens: int, console: Console, label: str
) -> Look:
    """own: the tokenizer, where the model's own answers are looked at; None: the rows' responses."""
    how: dict[str, Any] = dict(max_tokens=max_tokens, console=console)
    captured, seen = capture(policy, places, groups, **how, label=label)
    if own is not None:
        answers = own_answers(policy, own, groups, console, label)
        captured, _ = capture(policy, places, answers, **how, label=f"{label}, own answers")
    return Look(captured, seen, on(head_of(policy), "cpu"))


def written(places: Places, direction: Tensor) -> list[Written]:
    """A layer each, one layer's value vectors at a time; direction: f64[D], unit."""
    return [Written.of(value_vectors(layer, places.scale), direction) for layer in places.layers]


def unit(places: Places, p: Tensor, plain: bool) -> Tensor:
    """The unit direction f64[D] in the residual stream of a probe on the normed state: through the final
    norm's weight, or plain, as the papers have it."""
    p = p.double().cpu()
    u = p if plain else folded(places.norm, p)
    return u / u.norm().clamp(min=torch.finfo(u.dtype).tiny)  # of no direction, 0


def state_of_texts(
    policy: Policy, places: Places, texts: Sequence[str], tokenizer, max_length: int, **how: Any
) -> tuple[Tensor, Tensor]:
    """(f32[n, D]: the mean normed state of each text's tokens but the last, which predict the others; i64[n]:
    how many these are)."""
    groups = [_text(i, tokenizer(text)["input_ids"][:max_length]) for i, text in enumerate(texts)]
    seen = capture(policy, places, groups, **how)[1]
    return seen.state, seen.cu_resp.diff()


def _text(row: int, ids: list[int]) -> PreferenceGroup:
    ids = ids if len(ids) > 1 else [*ids, *ids] or [0, 0]
    tokens = np.array(ids, np.int64)
    response = Response(tokens[1:], np.ones(len(tokens) - 1, bool))
    return PreferenceGroup(row, tokens[:1], (response,), ())


@torch.no_grad()
def nearest_tokens(
    policy: Policy, places: Places, neurons: Sequence[tuple[int, int]], tokenizer
) -> list[list[str]]:
    """Of each (layer, neuron) the tokens that its value vector raises most, read by the final norm and the
    lm_head (nostalgebraist 2020, "interpreting GPT: the logit lens")."""
    weight, out = head_of(policy)["weight"], list[list[str]]()
    vectors: dict[int, Tensor] = {}
    for layer in sorted({layer for layer, _ in neurons}):
        which = sorted({neuron for where, neuron in neurons if where == layer})
        values = value_vectors(places.layers[layer], places.scale)[which]
        vectors |= {(layer, n): v for n, v in zip(which, values)}  # type: ignore[misc]
    for place in neurons:
        v = folded(places.norm, vectors[place])  # type: ignore[index]
        logits = torch.cat([part.float() @ v.float().to(part.device) for part in weight.split(_COLUMNS)])
        out.append([tokenizer.decode([i]) for i in logits.topk(_NEAREST).indices.tolist()])
    return out
