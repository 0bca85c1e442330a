"""Stage `head`: `benchmarks.head` on the GPU."""

from benchmarks.head import run
from benchmarks.results import stage_arguments

if __name__ == "__main__":
    args = stage_arguments(__doc__)
    run(args.dry_run, args.minutes, args.out)
