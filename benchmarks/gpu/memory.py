"""Stage `memory`: what fits in 24, 48 and 80 GB; run again on the same day it goes on where it stopped."""

from benchmarks.memory.run import FULL, Limits, run
from benchmarks.results import stage_arguments

DRY = Limits(
    device="cpu",
    gigabytes=(0.1,),
    pair_models=("Llama-3.2-1B",),
    ladders={"all weights": ("Qwen2.5-0.5B", "Llama-3.2-1B")},
    contenders=("fastdpo", "plain HF"),
    first=128,
    most=4096,
    row=256,
    precision=2.0,
    tiny=True,
)


def main() -> None:
    """All tasks, as far as the minutes go."""
    args = stage_arguments(__doc__)
    run(DRY if args.dry_run else FULL, args.minutes, args.out)


if __name__ == "__main__":
    main()
