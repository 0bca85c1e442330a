"""Stage `tuning`: `benchmarks.head.tune_tiles` on the GPU, for as long as there is time.

Written after every tile.
"""

import os

from benchmarks.results import stage_arguments, write_result


def main() -> None:
    """Every tile that was tried, fastest first. A dry run: one tile by Triton's interpreter."""
    args = stage_arguments(__doc__)
    if args.dry_run:
        os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported
    from benchmarks.head.tune_tiles import HEAD, tell, tune

    keep = lambda record: write_result("tuning", record, args.out, quiet=True)
    if args.dry_run:
        record = tune(24, 32, 300, args.minutes, device="cpu", capability=(8, 0), keep=keep)
    else:
        record = tune(*HEAD, args.minutes, keep=keep)
    tell(record)
    write_result("tuning", record, args.out)


if __name__ == "__main__":
    main()
