"""placeholder"""

import numpy as np


def reset_length(target_mask, share, rng, room=None):
    if not rng.random() < share:
        return 0
    places = np.flatnonzero(target_mask)
    places = places if room is None else places[places <= room]
    return int(rng.choice(places)) if len(places) else 0
