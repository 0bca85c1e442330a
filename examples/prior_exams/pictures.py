"""Chest X-rays as an artist would sketch them: every finding is in the pixels, no patient is.

As on a real film the patient's left is on the right.
"""

import numpy as np
from PIL import Image

SIZE = 96
LUNGS = {"right": 29, "left": 67}  # the column of each one's middle
APEX, BASE, FLOOR = 28, 54, 74  # rows
NODULE = {
    "left apex": (APEX, 66),
    "left base": (BASE, 77),
    "right apex": (APEX, 26),
    "right base": (BASE, 23),
}
PACEMAKER = (14, 84)
ROW, COLUMN = np.mgrid[:SIZE, :SIZE].astype(np.float32)


def draw(findings: dict[str, str], rng: np.random.Generator) -> Image.Image:
    """A picture of them: no two are the same."""
    y, x = ROW - rng.uniform(-2, 2), COLUMN - rng.uniform(-2, 2)
    film = np.full((SIZE, SIZE), 140.0, np.float32)
    for middle in LUNGS.values():
        film -= 80 * _disc(y, x, (48, middle), (32, 16))
    film += 8 * (np.sin((y + 0.02 * (x - 48) ** 2) / 2.2) > 0.75)  # ribs
    film += 40 * (np.abs(x - 48) < 4)  # the spine
    wide = 21 if findings["heart"] == "enlarged" else 11
    film = np.maximum(film, 175 * _disc(y, x, (62, 50), (14, wide + rng.uniform(-1, 1))))
    if (side := findings["effusion"]) != "none":
        away = np.abs(x - LUNGS[side])
        level = FLOOR - 8 + rng.uniform(-1.5, 1.5) - 0.02 * away**2  # a meniscus
        film = np.maximum(film, 205.0 * ((y > level) & (y < FLOOR + 8) & (away < 17)))
    if (zone := findings["nodule"]) != "none":
        row, column = NODULE[zone]
        place = (row + rng.uniform(-1, 1), column + rng.uniform(-1, 1))
        film += 130 * _disc(y, x, place, (4.5, 4.5))
    if findings["device"] == "pacemaker":
        row, column = PACEMAKER
        film[(np.abs(y - row) < 6) & (np.abs(x - column) < 6)] = 250
        film[(np.abs(x - column + (y - row) * 0.62) < 1.2) & (y > row) & (y < 60)] = 240
    if findings["device"] == "central line":
        film[(np.abs(x - 44) < 1.2) & (y < 50)] = 250
        film[(np.abs(y - 10) < 1.2) & (x > 8) & (x < 45)] = 250
    film = film * rng.uniform(0.92, 1.08) + rng.normal(0, 6, film.shape)
    return Image.fromarray(film.clip(0, 255).astype(np.uint8)).convert("RGB")


def _disc(
    y: np.ndarray, x: np.ndarray, middle: tuple[float, float], radii: tuple[float, float]
) -> np.ndarray:
    """1 within an ellipse, 0 outside, with a soft edge."""
    far = ((y - middle[0]) / radii[0]) ** 2 + ((x - middle[1]) / radii[1]) ** 2
    return 1 / (1 + np.exp(np.minimum(12 * (far - 1), 50)))
