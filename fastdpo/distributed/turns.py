"""What one process would do one after the other, dealt to the ranks of a world in rounds."""

from collections.abc import Iterator, Sequence
from typing import Generic, TypeVar

from fastdpo.distributed.world import World

T = TypeVar("T")


class Turns(Generic[T]):
    """This rank's (number, item) of each round: rank r has items r, r + n, ... In the last round, where too
    few are left, another one's item with None for a number, so that all ranks do as much."""

    def __init__(self, items: Sequence[T], world: World):
        self.items, self.world = items, world

    def __len__(self) -> int:
        """Rounds."""
        return -(-len(self.items) // self.world.size)

    def __iter__(self) -> Iterator[tuple[int | None, T]]:
        for first in range(0, len(self.items), self.world.size):
            number = first + self.world.rank
            is_mine = number < len(self.items)
            yield (number, self.items[number]) if is_mine else (None, self.items[first])
