"""Stage `attention`: `benchmarks.attention.run` on a GPU, at the models' head shapes and every length mix."""

from benchmarks.attention.run import TOY, run
from benchmarks.lengths import MIXES
from benchmarks.results import stage_arguments

# one of each head shape, those that most people train first; Qwen3-1.7B and the 8B have 128-wide heads
SHAPES = ("Llama-3.1-8B LoRA", "Qwen2.5-0.5B", "Qwen3-1.7B", "Llama-3.2-1B", "Qwen2.5-7B LoRA")
TOKENS, TURNS = 16_384, 9


def main() -> None:
    """Every mix of one shape before the next shape."""
    args = stage_arguments(__doc__)
    if args.dry_run:
        run(TOY[:1], tokens=256, turns=1, minutes=args.minutes, out=args.out)
    else:
        cases = [(mix, shape) for shape in SHAPES for mix in MIXES]
        run(cases, TOKENS, TURNS, args.minutes, args.out)


if __name__ == "__main__":
    main()
