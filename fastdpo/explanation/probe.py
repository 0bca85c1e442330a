"""The direction that the later parts look along: a linear probe of the state, or a vector of the user's own.

A probe of the run's own pairs finds what tells chosen from rejected in them, and that is often length:
`length_correlation` says how far its projection goes with the number of tokens, and `match_length` fits it on
as many pairs with the longer chosen as with the shorter, of like differences.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fastdpo.errors import ConfigError, DataError
from fastdpo.explanation.logistic import best_strength, dealt, fit

FEWEST = 20  # rows of a labelled file
_Z = 1.959963984540054  # of the standard normal, 97.5 %
_BINS = (0.05, 0.1, 0.2, 0.4, 0.8)  # edges of |log(chosen's tokens / rejected's)|: 5 % ... a factor of 2.2
_FEWEST_MATCHED = 10  # pairs


@dataclass(frozen=True)
class Direction:
    """`p`: f64[D] in the space of the normed state, not a unit; it points to label 1 (chosen).
    `accuracy`, on rows that it was not fitted on, with its 95 % `interval`; `tested`: how many prompts of
    pairs, or labelled rows, that was; `used`: how many responses or rows it was fitted on. `found`: the
    interval is above one half. `length_correlation`: of the projection of tested rows with their tokens; None
    where either is the same everywhere. Of a "vector" nothing is tested, and it counts as found."""

    p: Tensor
    kind: str  # "pairs" | "labels" | "vector"
    accuracy: float | None = None
    interval: tuple[float, float] | None = None
    tested: int = 0
    found: bool = False
    length_correlation: float | None = None
    used: int = 0
    C: float | None = None  # of the regression, see logistic.best_strength


def wilson(successes: float, n: float, z: float = _Z) -> tuple[float, float]:
    """The interval of a share of n (Wilson 1927, "Probable inference, the law of succession, and statistical
    inference", JASA 22), of 95 % by default; (0, 1) of none. Neither need be whole."""
    if n <= 0:
        return 0.0, 1.0
    share, zz = successes / n, z * z
    middle = (share + zz / (2 * n)) / (1 + zz / n)
    half = z / (1 + zz / n) * math.sqrt(share * (1 - share) / n + zz / (4 * n * n))
    return max(0.0, middle - half), min(1.0, middle + half)


@dataclass(frozen=True)
class Dealt:
    """Which pairs a direction is fitted on, and which test it."""

    fitted: Tensor  # i64[n, 2]
    tested: Tensor  # i64[m, 2]
    fold: Tensor  # i64[n], of logistic.dealt
    prompts: int  # of the tested ones


def deal(pairs: Tensor, prompt: Tensor, lengths: Tensor, seed: int, match_length: bool) -> Dealt:
    """pairs: i64[P, 2], the chosen and the rejected response; prompt: i64[R], equal of responses to the same
    prompt; lengths: i64[R], tokens. Half of the prompts, dealt by `seed`, are fitted on. Raises ConfigError
    for fewer than two prompts with pairs, and for too few pairs of matched lengths."""
    numbers = prompt[pairs[:, 0]].unique()
    if len(numbers) < 2:
        raise ConfigError(
            f"probe: pairs of {len(numbers)} prompts; half of them fit the direction and half test it, so it "
            "takes two at least, and a few hundred to find anything: give more rows with --data, or --probe"
        )
    draw = np.random.default_rng(seed)
    half = torch.from_numpy(draw.permutation(len(numbers)))[: len(numbers) // 2]
    fitting = torch.isin(prompt[pairs[:, 0]], numbers[half])
    fitted, tested = pairs[fitting], pairs[~fitting]
    if match_length:
        fitted = fitted[_matched(lengths[fitted], draw)]
    left, place = prompt[fitted[:, 0]].unique(return_inverse=True)
    return Dealt(fitted, tested, dealt(len(left), draw)[place], len(numbers) - len(half))


def from_pairs(state: Tensor, cut: Dealt, lengths: Tensor) -> Direction:
    """What tells chosen from rejected. state: [R, D], a mean state a response; lengths: i64[R], tokens.

    Each response that is fitted on counts once a label; accuracy is the share of tested pairs whose chosen
    projects higher (half of a tie). Its interval is that of as many trials as these have prompts, not pairs,
    which are alike within one."""
    state, fitted, tested = state.cpu(), cut.fitted, cut.tested
    C = best_strength(
        cut.fold,
        lambda some, C: _of_pairs(state, fitted[some], C),
        lambda found, some: _ahead(state, fitted[some], found[0]),
    )
    p, _ = _of_pairs(state, fitted, C)
    scores, accuracy = state.double() @ p, _ahead(state, tested, p)
    interval = wilson(accuracy * cut.prompts, cut.prompts)
    of = tested.unique()
    along = correlation(scores[of], lengths[of].double())
    used = sum(len(fitted[:, side].unique()) for side in (0, 1))
    return Direction(p, "pairs", accuracy, interval, cut.prompts, interval[0] > 0.5, along, used, C)


def _of_pairs(state: Tensor, pairs: Tensor, C: float) -> tuple[Tensor, float]:
    """The regression of their responses, each once a label."""
    chosen, rejected = pairs[:, 0].unique(), pairs[:, 1].unique()
    labels = torch.cat([torch.ones_like(chosen), torch.zeros_like(rejected)])
    return fit(state[torch.cat([chosen, rejected])], labels, C)


def _ahead(state: Tensor, pairs: Tensor, p: Tensor) -> float:
    """The share whose chosen projects higher, half of a tie."""
    ahead = (state[pairs[:, 0]].double() - state[pairs[:, 1]].double()) @ p
    return float(((ahead > 0).double() + (ahead == 0).double() / 2).mean())


def _matched(lengths: Tensor, draw: np.random.Generator) -> Tensor:
    """Which pairs to keep (i64) of these [n, 2] lengths, so that in each bin of |log ratio| as many
    chosen are the longer as the shorter; pairs of one length all stay."""
    ratio = (lengths[:, 0].double() / lengths[:, 1]).log().numpy()
    bins = np.digitize(np.abs(ratio), _BINS)
    keep = [np.flatnonzero(ratio == 0)]
    for one in np.unique(bins):
        longer, shorter = (np.flatnonzero((bins == one) & (sign * ratio > 0)) for sign in (1, -1))
        n = min(len(longer), len(shorter))
        keep += [draw.permutation(longer)[:n], draw.permutation(shorter)[:n]]
    kept = np.sort(np.concatenate(keep))
    if len(kept) < _FEWEST_MATCHED:
        longer_ones, fewest = int((ratio > 0).sum()), _FEWEST_MATCHED
        raise ConfigError(
            f"match_length: of {len(ratio)} pairs to fit on, {longer_ones} with the longer chosen, only "
            f"{len(kept)} can be matched in length, and {fewest} are needed; give more rows, or leave it out"
        )
    return torch.from_numpy(kept)


def from_labels(state: Tensor, labels: Tensor, lengths: Tensor, seed: int) -> Direction:
    """What tells texts of label 1 from those of label 0. state: [n, D], a mean state a text; labels: i64[n];
    lengths: i64[n], tokens. Half of each label is fitted on. Accuracy is the mean of those of the two labels,
    which chance makes one half, however rare one is; its interval is that of n trials of the same variance,
    4 / n = 1 / n_0 + 1 / n_1."""
    state, labels, lengths = state.cpu().double(), labels.cpu(), lengths.cpu()
    draw = np.random.default_rng(seed)
    each = [torch.from_numpy(draw.permutation((labels == one).nonzero()[:, 0].numpy())) for one in (0, 1)]
    if min(map(len, each)) < 2:
        raise DataError(
            f"probe: {len(each[0])} texts of label 0 and {len(each[1])} of label 1; half of each fit the "
            "direction and the others test it, so it takes two of each at least"
        )
    fitted = torch.cat([one[: len(one) // 2] for one in each])
    folds = [dealt(len(one) // 2, draw) for one in each]  # of one label too few: of both
    balanced = lambda found, of: _balanced(state[of] @ found[0] + found[1], labels[of])
    C = best_strength(
        torch.cat(folds) * (min(int(fold.max()) for fold in folds) > 0),
        lambda some, C: fit(state[fitted[some]], labels[fitted[some]], C),
        lambda found, some: balanced(found, fitted[some]),
    )
    found = fit(state[fitted], labels[fitted], C)
    tests = [one[len(one) // 2 :] for one in each]
    of, trials = torch.cat(tests), 4 / sum(1 / len(one) for one in tests)
    accuracy = balanced(found, of)
    interval = wilson(accuracy * trials, trials)
    along = correlation(state[of] @ found[0], lengths[of].double())
    return Direction(
        found[0], "labels", accuracy, interval, len(of), interval[0] > 0.5, along, len(fitted), C
    )


def _balanced(scores: Tensor, labels: Tensor) -> float:
    """The mean of the accuracies of both labels."""
    return sum(float(((scores > 0) == bool(one))[labels == one].double().mean()) for one in (0, 1)) / 2


def correlation(x: Tensor, y: Tensor) -> float | None:
    """Pearson's, of f64[n] each; None where either does not vary."""
    x, y = x - x.mean(), y - y.mean()
    size = float(x.norm() * y.norm())
    return float(x @ y) / size if size > 0 else None


def read_labels(path: Path) -> list[tuple[str, int]]:
    """(text, label) of each line {"text": ..., "label": 0 or 1}. Raises DataError, which names the line, for
    what is none; and for fewer than 20 lines, or a label that less than two have."""
    try:
        lines = Path(path).read_bytes().split(b"\n")
    except OSError as error:
        raise DataError(f"probe: cannot read {path}: {error.strerror}") from None
    out = [_labelled(line, f"{path}, line {n}") for n, line in enumerate(lines, 1) if line.strip()]
    counts = [sum(label == one for _, label in out) for one in (0, 1)]
    if len(out) < FEWEST or min(counts) < 2:
        found = f"{counts[0]} lines of label 0 and {counts[1]} of label 1"
        raise DataError(f"probe: {path} has {found}; it needs {FEWEST} lines at least, two of each label")
    return out


def _labelled(line: bytes, where: str) -> tuple[str, int]:
    wanted = 'a line is {"text": "...", "label": 0 or 1}'
    try:
        row = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError:
        raise DataError(f"probe: {where} is not UTF-8; {wanted}") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"probe: {where} is not JSON ({error}); {wanted}") from None
    if not isinstance(row, dict):
        raise DataError(f"probe: {where} is no object; {wanted}")
    for key in ("text", "label"):
        if key not in row:
            raise DataError(f"probe: {where} has no {key!r}; {wanted}")
    if not isinstance(row["text"], str) or not row["text"].strip():
        raise DataError(f"probe: the text of {where} is empty or no text; {wanted}")
    if not isinstance(row["label"], int | float) or row["label"] not in (0, 1):
        raise DataError(f"probe: the label of {where} is {str(row['label'])[:50]!r}; {wanted}")
    return row["text"], int(row["label"])


def read_vector(path: Path, D: int) -> Tensor:
    """f64[D], of a safetensors file's one tensor, [D] or [1, D]. Raises ConfigError for another number of
    tensors, another width, or what is no direction."""
    try:
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
            if len(names) != 1:
                found = f"{len(names)} tensors: {', '.join(names[:5])}" if names else "no tensor"
                raise ConfigError(f"probe: {path} has {found}; it needs one, of [{D}]")
            vector = file.get_tensor(names[0])
    except (SafetensorError, OSError) as error:
        raise ConfigError(f"probe: cannot read {path} as safetensors: {error}") from None
    shape = tuple(vector.shape)
    if shape not in ((D,), (1, D)):
        raise ConfigError(
            f"probe: {names[0]} of {path} is of shape {list(shape)}, the model's states are [{D}]; "
            "give a direction of this model's width"
        )
    out = vector.reshape(-1).double()
    if not bool(out.isfinite().all()):
        at = int((~out.isfinite()).nonzero()[0])
        raise ConfigError(f"probe: {names[0]} of {path} is {float(out[at])} at {at}; it needs finite numbers")
    if not bool(out.any()):
        raise ConfigError(f"probe: {names[0]} of {path} is 0 everywhere, which is no direction")
    return out


def from_vector(path: Path, D: int) -> Direction:
    """The vector of a file (`read_vector`) as a direction: nothing says whether it tells anything apart."""
    return Direction(read_vector(path, D), "vector", found=True)
