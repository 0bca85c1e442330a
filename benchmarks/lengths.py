"""How long prompts and responses are: mixes that follow published statistics, and one of real rows.

    python -m benchmarks.lengths DATA TOKENIZER     writes lengths/hh_real.json anew

DATA is any source that fastdpo reads, TOKENIZER a folder; only numbers of tokens are kept.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

MAX_LENGTH = 2048  # of prompt + response: what these data sets are trained with
MAX_PROMPT = 1536
SHORTEST = 4
SIGMA = 0.6
REAL = Path(__file__).parent / "lengths/hh_real.json"
REAL_ROWS = 512
TABLE = "Wang and Hegde 2024, arXiv 2410.20305, table 1"


class PairLengths(NamedTuple):
    """Tokens of a pair's parts. A row of a trainer is prompt + chosen, or prompt + rejected."""

    prompt: int
    chosen: int
    rejected: int


@dataclass(frozen=True)
class Mix:
    """A distribution of lengths, or real ones.

    The published numbers are two medians over a data set: of a sequence's length, and of the ratio P/R
    of its prompt to its response. A sequence is the prompt with one response, so P + R = length. The
    prompt's median is then length * ratio / (1 + ratio), a response's length / (1 + ratio). That each is
    log-normal, that the three of a pair are independent, and sigma = SIGMA are our assumptions. Real rows
    of HH-RLHF spread wider (sigma 0.77 for prompts, 0.90 for responses), and a narrow spread is the
    cautious choice: it leaves less padding, and padding is what a packing trainer avoids.
    """

    source: str
    length: float | None = None  # median tokens of prompt + one response; None: real rows
    ratio: float | None = None  # median of prompt / response

    @property
    def medians(self) -> tuple[float, float]:
        """(prompt, response), in tokens."""
        response = self.length / (1 + self.ratio)
        return self.length - response, response


MIXES = {
    "UltraFeedback": Mix(TABLE, 409, 0.42),
    "HH-RLHF": Mix(TABLE, 186, 2.15),
    "TL;DR": Mix(TABLE, 416, 11.14),
    "Capybara": Mix(TABLE, 1160, 1.59),
    "MetaMath-DPO": Mix(TABLE, 872, 3.91),
    "hh real": Mix("Anthropic hh-rlhf (MIT), Qwen2.5 tokenizer and template; see lengths/hh_real.json"),
}


def draw(mix: str, n: int, seed: int = 0) -> list[PairLengths]:
    """n pairs of a mix of MIXES, the same for the same (mix, seed), however many. Every part has at least
    SHORTEST tokens, a prompt at most MAX_PROMPT, a row at most MAX_LENGTH: longer ones are cut."""
    found = MIXES[mix]
    random = np.random.Generator(np.random.PCG64([seed, *mix.encode()]))
    if found.length is None:
        rows = json.loads(REAL.read_text())["rows"]
        return [PairLengths(*rows[i]) for i in _shuffles(random, len(rows), n)]
    prompt, response = found.medians
    drawn = np.array([prompt, response, response]) * np.exp(SIGMA * random.standard_normal((n, 3)))
    drawn = drawn.round().astype(int)
    prompts = drawn[:, 0].clip(SHORTEST, MAX_PROMPT)
    responses = drawn[:, 1:].clip(SHORTEST, MAX_LENGTH - prompts[:, None])
    return [PairLengths(int(p), int(c), int(r)) for p, (c, r) in zip(prompts, responses)]


def draw_samples(mix: str, n: int, responses: int, most: int, seed: int = 0) -> list[tuple[int, ...]]:
    """n prompts with so many sampled responses each: (prompt, response, response, ...). Those of `draw`, with
    responses of as many draws as that takes, which sampling stops at `most` tokens."""
    draws = [draw(mix, n, seed + number) for number in range(-(-responses // 2))]
    longer = [[r for row in rows for r in row[1:]][:responses] for rows in zip(*draws)]
    return [(row.prompt, *(min(most, r) for r in rs)) for row, rs in zip(draws[0], longer)]


def _shuffles(random: np.random.Generator, size: int, n: int) -> np.ndarray:
    """n indices below `size`: whole permutations one after another, so that none comes twice before
    all have come."""
    return np.concatenate([random.permutation(size) for _ in range(-(-n // size))])[:n]


def summary(lengths: Sequence[PairLengths]) -> dict:
    """What to print beside a result: medians of both parts and the ratio of all tokens of separate rows
    to those of rows with a shared prompt."""
    P, C, R = np.array(lengths).T
    return {
        "pairs": len(lengths),
        "prompt_median": float(np.median(P)),
        "response_median": float(np.median(np.concatenate([C, R]))),
        "longest_row": int((P + np.maximum(C, R)).max()),
        "separate_over_shared_tokens": float((2 * P + C + R).sum() / (P + C + R).sum()),
    }


def main() -> None:
    """Counts the tokens of REAL_ROWS rows of a data source."""
    from rich.console import Console
    from transformers import AutoTokenizer

    from fastdpo.data.groups import Limits
    from fastdpo.data.load import load_groups

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data")
    parser.add_argument("tokenizer", type=Path)
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer)
    limits = Limits(MAX_LENGTH, "drop")
    groups, _ = load_groups(args.data, tokenizer, limits, strict=False, console=Console(stderr=True))
    groups.sort(key=lambda group: (group.input_tokens, group.row))
    evenly = np.linspace(0, len(groups) - 1, REAL_ROWS).round().astype(int)
    counts = []
    for group in (groups[i] for i in evenly):
        winner, loser = group.pairs[0][:2]
        counts.append([len(group.prompt), *(len(group.responses[i].ids) for i in (winner, loser))])
    record = {
        "source": "Anthropic hh-rlhf, MIT: https://huggingface.co/datasets/Anthropic/hh-rlhf",
        "what": f"tokens of [prompt, chosen, rejected]; {REAL_ROWS} of {len(groups)} rows, evenly by length",
        "made_by": f"python -m benchmarks.lengths {Path(args.data).name} {args.tokenizer.name}",
        "rows": counts,
    }
    text = json.dumps(record).replace('", "', '",\n "').replace("[[", "[\n  [").replace("], [", "],\n  [")
    REAL.write_text(text + "\n")
    print(f"written: {REAL}, {summary([PairLengths(*c) for c in counts])}")


if __name__ == "__main__":
    main()
