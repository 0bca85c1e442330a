"""Stage `learning`: the full grid of `benchmarks.learning.real`, three trainings at a time.

It goes on where an earlier command stopped: training by training in the JSON, and within a training in
runs/learning-real as long as the machine is the same.
"""

import sys

from benchmarks.learning.real.grid import FULL
from benchmarks.learning.real.run import arguments, measure
from benchmarks.learning.real.start import join_parts
from benchmarks.results import stage_parser


def main() -> int:
    join_parts()
    return measure(arguments(stage_parser(__doc__)), FULL, workers=3)


if __name__ == "__main__":
    sys.exit(main())
