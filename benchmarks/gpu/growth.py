"""Stage `growth`: `benchmarks.growth.run` on a GPU, up to 64k tokens, a vocabulary of 262k, 16 responses."""

from benchmarks.growth.run import DRY, GPU, run
from benchmarks.results import stage_arguments


def main() -> None:
    """The series one after another."""
    args = stage_arguments(__doc__)
    run(DRY if args.dry_run else GPU, args.minutes, args.out)


if __name__ == "__main__":
    main()
