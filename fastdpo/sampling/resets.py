"""Resets: a sample may begin inside of a known response, as DR-PO's (Chang et al. 2024, arXiv 2404.08495)."""

import numpy as np


def reset_length(
    target_mask: np.ndarray, share: float, rng: np.random.Generator, room: int | None = None
) -> int:
    """How many tokens of a response are given before a sample goes on: 0 with probability 1 - share; else the
    index of a token drawn uniformly from those that are scored (`target_mask`, bool[n]), of those at most
    `room` where that is given, and 0 where there is none. Of a plain response: uniform on {0 .. n - 1}.

    The paper draws from {1 .. n - 1}. With share 1 the first token is then never sampled, and so never
    trained: a policy that is unsure there stays so, however well it goes on. From 0 on, every scored token is
    the first one sampled equally often.
    """
    if rng.random() >= share:
        return 0
    places = np.flatnonzero(target_mask)
    places = places if room is None else places[places <= room]
    return int(rng.choice(places)) if len(places) else 0
