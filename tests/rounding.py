"""How far apart rounding alone may leave two right computations of the same numbers, on any processor.

In what order a sum is taken is each processor's own affair: its vector width, and its library's choice of a
kernel for so many rows. A bound that one of them gave is red on the next. What they share is the size of what
is compared and the unit in its last place, so bounds are counted in those.
"""

import torch


def ulps(n: float, *tensors: torch.Tensor) -> float:
    """n units in the last place of the largest number in the tensors, in the coarsest of their dtypes."""
    eps = max(torch.finfo(t.dtype).eps for t in tensors)
    return n * eps * max(float(t.detach().abs().max()) for t in tensors)


def model_ulps(*tensors: torch.Tensor) -> float:
    """How far log-probs [M] of the tests' models may be apart, computed in two ways.

    Two layers of some 20 roundings a number, added up as a random walk, are 6 units of the largest. Measured
    are 1 to 5, with MKL's kernels for AMD, for Intel with AVX-512 and with AVX2, and with sums in random
    order. The least wrong that is known, attention without its softcap of 50, is 300 units off; a wrong mask
    or position shows in the first digits.
    """
    return ulps(32, *tensors)


def is_tie(log: dict, beta: float = 0.1) -> bool:
    """Whether a step's margin is rounding: policy and reference are one model, packed in two ways. It is beta
    times a difference of sums of log-probs, each as far off as model_ulps allows."""
    sums = torch.tensor([log["logps/chosen"], log["logps/rejected"]])
    return abs(log["rewards/margins"]) <= beta * model_ulps(sums)
