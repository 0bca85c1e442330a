"""Groups that are read where they are asked for: a sequence of PreferenceGroups, of which only the facts are
in memory. Lists of groups serve wherever these do."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import compress
from typing import TYPE_CHECKING, Any

import numpy as np

from fastdpo.data.store.facts import Facts
from fastdpo.preferences import Groups, PreferenceGroup

if TYPE_CHECKING:  # Arrow, which an objective does not need
    from fastdpo.data.store.shards import OpenImage, Shard


class _Lazy(Sequence[PreferenceGroup]):
    """A slice is one too."""

    facts: Facts

    def __len__(self) -> int:
        return len(self.facts)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return self.taken(np.arange(len(self))[index])
        place = range(len(self))[index]  # raises IndexError, and counts from the end
        return self.group(place)

    def group(self, place: int) -> PreferenceGroup:
        raise NotImplementedError

    def taken(self, indices: np.ndarray) -> "_Lazy":
        raise NotImplementedError


class StoredGroups(_Lazy):
    """The groups of shards, one after the other. `first`: what the rows of each shard are numbered from.
    `openers`: what opens the images of each shard's rows."""

    def __init__(
        self,
        shards: "Sequence[Shard]",
        first: Sequence[int],
        openers: "Sequence[OpenImage | None] | None" = None,
    ):
        self._shards, self._openers = shards, openers or [None] * len(shards)
        sizes = [len(shard) for shard in shards]
        self._starts = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
        self._order: np.ndarray | None = None  # where they are in the shards
        self.facts = Facts.joined([shard.facts(number) for shard, number in zip(shards, first)])

    def group(self, place: int) -> PreferenceGroup:
        at = place if self._order is None else int(self._order[place])
        number = int(np.searchsorted(self._starts, at, side="right")) - 1
        at -= int(self._starts[number])
        return self._shards[number].group(at, self.facts, place, self._openers[number])

    def taken(self, indices: np.ndarray) -> "StoredGroups":
        some = object.__new__(StoredGroups)
        some._shards, some._starts, some._openers = self._shards, self._starts, self._openers
        some._order = indices if self._order is None else self._order[indices]
        some.facts = self.facts.taken(indices)
        return some


class _Altered(_Lazy):
    """Of each group some of its responses, bool[R], with the pairs and labels that `facts` say."""

    def __init__(self, groups: _Lazy, kept: np.ndarray, facts: Facts):
        self._groups, self._kept, self.facts = groups, kept, facts

    def group(self, place: int) -> PreferenceGroup:
        first, end = self._groups.facts.cu_resp[place : place + 2]
        return _altered(self._groups.group(place), self._kept[first:end], self.facts, place)

    def taken(self, indices: np.ndarray) -> "_Altered":
        kept = self._kept[self._groups.facts.responses_of(indices)]
        return _Altered(self._groups.taken(indices), kept, self.facts.taken(indices))


class _Joined(_Lazy):
    """One sequence after the other."""

    def __init__(self, parts: Sequence[_Lazy], order: np.ndarray | None = None):
        self._parts = parts
        self._starts = np.concatenate([[0], np.cumsum([len(part) for part in parts])]).astype(np.int64)
        facts = Facts.joined([part.facts for part in parts])
        self._order = np.arange(len(facts)) if order is None else order
        self.facts = facts if order is None else facts.taken(order)

    def group(self, place: int) -> PreferenceGroup:
        at = int(self._order[place])
        number = int(np.searchsorted(self._starts, at, side="right")) - 1
        return self._parts[number].group(at - int(self._starts[number]))

    def taken(self, indices: np.ndarray) -> "_Joined":
        return _Joined(self._parts, self._order[indices])


class _Made(_Lazy):
    """Groups that a function makes, by their places."""

    def __init__(self, make: Callable[[int], PreferenceGroup], facts: Facts, places: np.ndarray):
        self._make, self.facts, self._places = make, facts, places

    def group(self, place: int) -> PreferenceGroup:
        return self._make(int(self._places[place]))

    def taken(self, indices: np.ndarray) -> "_Made":
        return _Made(self._make, self.facts.taken(indices), self._places[indices])


def made(make: Callable[[int], PreferenceGroup], facts: Facts) -> Groups:
    """make(place) of each, when it is asked for."""
    return _Made(make, facts, np.arange(len(facts)))


def facts_of(groups: Groups) -> Facts:
    return groups.facts if isinstance(groups, _Lazy) else Facts.of(groups)


def taken(groups: Groups, indices: np.ndarray) -> Groups:
    """Those of the groups, in this order."""
    return groups.taken(indices) if isinstance(groups, _Lazy) else [groups[i] for i in indices]


def altered(groups: Groups, kept: np.ndarray, facts: Facts) -> Groups:
    """Each group with some of its responses, bool[R]; `facts` say what pairs, labels and `whole` are then."""
    if isinstance(groups, _Lazy):
        return _Altered(groups, kept, facts)
    ends = np.cumsum([len(group.responses) for group in groups])[:-1]
    some = zip(groups, np.split(kept, ends))
    return [_altered(group, part, facts, place) for place, (group, part) in enumerate(some)]


def _altered(group: PreferenceGroup, kept: np.ndarray, facts: Facts, place: int) -> PreferenceGroup:
    labels = facts.label[facts.cu_resp[place] : facts.cu_resp[place + 1]].tolist()
    responses = tuple(
        response if response.label in (None, bool(label)) else replace(response, label=bool(label))
        for response, label in zip(compress(group.responses, kept), labels)
    )
    pairs, whole = facts.pairs_of(place), bool(facts.whole[place])
    if (responses, pairs, whole) == (group.responses, group.pairs, group.whole):
        return group
    return replace(group, responses=responses, pairs=pairs, whole=whole)


def with_responses(groups: Groups, kept: np.ndarray) -> Groups:
    """Each group with some of its responses, bool[R], and without pairs: what is computed and not trained."""
    return altered(groups, kept, facts_of(groups).only(kept))


def only_chosen(groups: Groups) -> Groups:
    """PreferenceGroup.only_chosen of each."""
    return with_responses(groups, facts_of(groups).chosen)


def as_whole(groups: Groups) -> Groups:
    """With a response's last token as an input too."""
    facts = facts_of(groups)
    whole = replace(facts, whole=np.ones(len(facts), bool))
    return altered(groups, np.ones(len(facts.length), bool), whole)


def joined(first: Groups, second: Groups) -> Groups:
    """One after the other."""
    if isinstance(first, _Lazy) and isinstance(second, _Lazy):
        return _Joined([first, second])
    return [*first, *second]
