"""Stage `head`: `benchmarks.head.run` on the GPU."""

from benchmarks.head.run import run
from benchmarks.results import stage_arguments

if __name__ == "__main__":
    args = stage_arguments(__doc__)
    run(args.dry_run, args.minutes, args.out)
