"""What the sequences of a pack have in common, so that no token of it is computed twice.

A response branches off an earlier one where their sequences part: its tokens up to there are that one's. A
plain group's responses branch off its first one at the end of the prompt.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from fastdpo.data.store.stored import facts_of, taken, with_responses
from fastdpo.preferences import Groups, PreferenceGroup

LEAST = 16  # tokens: less in common than that, beyond a prompt, is not worth another pack than training's


class Branch(NamedTuple):
    """Where a response's sequence leaves another one's: `at` tokens are that one's. No parent, no tokens."""

    parent: int | None  # the response that computes the last of these tokens, by its number in the pack
    at: int


def own_prompts(groups: Sequence[PreferenceGroup]) -> list[Branch]:
    """Each group's prompt once."""
    tree: list[Branch] = []
    for group in groups:
        first = Branch(len(tree), len(group.prompt))
        tree += [Branch(None, 0), *[first] * (len(group.responses) - 1)]
    return tree


def beginnings(groups: Sequence[PreferenceGroup]) -> list[Branch]:
    """Prompts and beginnings that groups have in common once too: a system prompt, a prompt of several
    rows, a conversation's turns, responses that part late. Never more tokens than by `own_prompts`. A group
    with images has its prompt alone, for equal tokens may stand for other images."""
    tree: list[Branch] = []
    sequences: list[np.ndarray] = []
    known: dict[tuple[int | None, int, int], int] = {}  # (parent, at, the next token): who branches off there
    for group in groups:
        first, prompt = len(tree), len(group.prompt)
        if group.images:
            tree += [Branch(None, 0), *[Branch(first, prompt)] * (len(group.responses) - 1)]
            sequences += [np.zeros(0, np.int64)] * len(group.responses)  # nobody branches off them
            continue
        for response in group.responses:
            ids = np.concatenate([group.prompt, group.inputs(response)])
            branch = _longest(ids, sequences, known)
            if branch.at < len(ids):
                known[(*branch, int(ids[branch.at]))] = len(tree)
            if len(tree) == first:
                enough, plain = min(prompt, LEAST), Branch(None, 0)
            else:
                enough, plain = prompt + LEAST, _owner(tree, Branch(first, prompt))
            tree.append(branch if branch.at >= enough else plain)
            sequences.append(ids)
    return tree


def _longest(ids: np.ndarray, sequences: list[np.ndarray], known: dict) -> Branch:
    """As far as earlier sequences go along with this one."""
    parent, at = None, 0
    while at < len(ids) and (found := known.get((parent, at, int(ids[at])))) is not None:
        other = sequences[found]
        shorter = min(len(ids), len(other))
        differ = np.flatnonzero(ids[at:shorter] != other[at:shorter])
        parent, at = found, at + int(differ[0]) if len(differ) else shorter
    return Branch(parent, at)


def _owner(tree: list[Branch], branch: Branch) -> Branch:
    """The same place, by the response that computes the token before it."""
    parent, at = branch
    while parent is not None and tree[parent].at >= at:
        parent = tree[parent].parent
    return Branch(parent, at)


def own_tokens(groups: Sequence[PreferenceGroup], tree: Sequence[Branch]) -> list[np.ndarray]:
    """What each response's sequence brings behind its branch."""
    pieces = ((group.prompt, group.inputs(response)) for group in groups for response in group.responses)
    return [
        inputs[at - len(prompt) :] if at >= len(prompt) else np.concatenate([prompt[at:], inputs])
        for (prompt, inputs), (_, at) in zip(pieces, tree)
    ]


def branches_of(tree: Sequence[Branch]) -> list[list[int]]:
    """What branches off each response, the last branch first: tokens up to a branch are then before all that
    sees them and nothing else."""
    branches: list[list[int]] = [[] for _ in tree]
    for i, (parent, _) in enumerate(tree):
        if parent is not None:
            branches[parent].append(i)
    return [sorted(some, key=lambda i: -tree[i].at) for some in branches]


def once(groups: Groups) -> tuple[Groups, np.ndarray]:
    """(the groups with only those of their responses that no earlier one equals, and without the groups that
    this leaves empty; per group, the tokens of it and of those left out behind it as they were, i64[G]).

    Those of one prompt are behind the first of them, where one pack can have them; a function of all groups,
    in which one that is added at the end moves none of those before it past another.
    """
    facts = facts_of(groups)
    _, first, prompts = np.unique(facts.prompt_key, return_index=True, return_inverse=True)
    order = np.argsort(first[prompts], kind="stable")
    facts = facts.taken(order)
    _, first = np.unique(facts.key, return_index=True)
    new = np.zeros(len(facts.key), bool)
    new[first] = True
    kept = np.flatnonzero(facts.per_group(new))
    tokens = np.add.reduceat(facts.input_tokens, kept)
    return with_responses(taken(groups, order[kept]), new[facts.responses_of(kept)]), tokens
