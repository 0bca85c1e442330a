"""What a model writes on pictures that no pair is of: lines that speak of a prior exam, and wrong findings.

    python -m examples.prior_exams.measure [FOLDER ...]

Without folders, the start model and the one that train.yaml has trained.
"""

import argparse
import itertools
import json
from pathlib import Path

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from examples.prior_exams.model import write_reports
from examples.prior_exams.reports import FINDINGS, read, speaks_of_prior

MODELS = (Path("runs/prior_exams/start"), Path("runs/prior_exams/dpo/model"))


def measure(model_folder: Path, held_out: Path, sample: bool = False) -> dict[str, float]:
    """Of greedy reports, or of a sample a picture. `lines`: how many a report speak of a prior exam;
    `reports`: the share of reports with one or more; `findings`: the share of all findings that the report
    tells as they are, and each kind's own."""
    model = AutoModelForImageTextToText.from_pretrained(model_folder, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(model_folder)
    rows = [json.loads(line) for line in held_out.read_text(encoding="utf-8").splitlines()]
    pictures = [Image.open(held_out.parent / row["images"][0]).convert("RGB") for row in rows]
    texts = write_reports(model, processor, pictures, [row["prompt"] for row in rows], sample)
    return counted(texts, [row["findings"] for row in rows])


def counted(texts: list[str], truths: list[dict[str, str]]) -> dict[str, float]:
    """The numbers of these reports."""
    lines = [sum(map(speaks_of_prior, text.split("\n"))) for text in texts]
    said = [read(text) for text in texts]
    share = lambda values: sum(values) / len(values)
    right = {
        kind: share([found[kind] == truth[kind] for found, truth in zip(said, truths)]) for kind in FINDINGS
    }
    found = {"lines": share(lines), "reports": share([count > 0 for count in lines])}
    return found | {"findings": share(list(right.values()))} | right


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", type=Path, nargs="*", default=MODELS, help="folders of models")
    parser.add_argument("--held-out", type=Path, default=Path("runs/prior_exams/held_out.jsonl"))
    args = parser.parse_args()
    for folder, sample in itertools.product(args.models, (False, True)):
        found, how = measure(folder, args.held_out, sample), "sampled" if sample else "greedy"
        print(
            f"{folder}, {how}: {found['lines']:.2f} lines a report speak of a prior exam, in "
            f"{found['reports']:.0%} of the reports; {found['findings']:.0%} of the findings are right"
        )


if __name__ == "__main__":
    main()
