"""Stage `fit`: what trains on 12 to 48 GB, ours beside TRL.

Run again on the same day it goes on where it stopped.
"""

from dataclasses import replace

from benchmarks.memory.fit import CLAIMS, FULL, IN_BACKWARD, Limits, run
from benchmarks.results import stage_arguments

# Paging needs a GPU. Where bitsandbytes is not installed, QLoRA is told as absent.
DRY = Limits(
    device="cpu",
    claims=(
        replace(
            CLAIMS[0],
            gigabytes=0.5,
            tokens=192,
            pairs=2,
            keys=CLAIMS[0].keys | {"optim": "adamw_torch_fused"} | IN_BACKWARD,
        ),
        replace(CLAIMS[1], gigabytes=0.5, tokens=192),
    ),
    contenders=("fastdpo", "TRL"),
    first=96,
    most=384,
    precision=2.0,
    tiny=True,
)


def main() -> None:
    """All claims, as far as the minutes go."""
    args = stage_arguments(__doc__)
    run(DRY if args.dry_run else FULL, args.minutes, args.out)


if __name__ == "__main__":
    main()
