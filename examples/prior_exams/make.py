"""Makes the pictures, the pairs and the start model of examples/prior_exams/train.yaml, on a CPU in minutes.

    python -m examples.prior_exams.make [--out runs/prior_exams] [--seed 0]

After Banerjee et al., arXiv 2406.06496: reports on X-rays speak of prior exams, and a model that learnt from
them speaks of exams that nobody has shown it. In a pair the rejected report is such a one as it was written,
the chosen one is the same without what it says of priors, and the spans are the lines that differ.

    train.jsonl, eval.jsonl   pairs in TRL's format: images, prompt, chosen, rejected; their spans
    held_out.jsonl            other pictures, with what is true of them
    pictures/                 PNG files
    start/                    a LLaVA and its processor, trained on reports that speak of priors
"""

import argparse
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from examples.prior_exams import model as vlm
from examples.prior_exams import pictures, reports
from examples.prior_exams.reports import FINDINGS, Report

INDICATIONS = ("cough", "fever", "chest pain", "shortness of breath")
END = "<|end|>"


@dataclass(frozen=True)
class Sizes:
    """How much of everything; steps are optimizer steps."""

    reports: int = 2000  # that the start model learns from
    pairs: int = 480  # of them
    eval_pairs: int = 64  # of others
    held_out: int = 200
    tower_steps: int = 300
    report_steps: int = 300


@dataclass(frozen=True)
class Study:
    """A picture, why it was taken, and a report on it."""

    report: Report
    picture: Image.Image
    indication: str

    @property
    def prompt(self) -> list[dict]:
        """One user turn, the picture and then the text."""
        asked = f"Indication: {self.indication}. Write the report."
        return [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": asked}]}]

    @property
    def truth(self) -> list[float]:
        """Which finding has which value, a 1 among 0 for each kind."""
        findings = self.report.findings
        return [float(findings[kind] == value) for kind, values in FINDINGS.items() for value in values]

    @property
    def edited(self) -> str:
        return reports.without_priors(self.report.text)[0]


def draw_study(rng: np.random.Generator) -> Study:
    report = reports.draw_report(rng)
    return Study(report, pictures.draw(report.findings, rng), str(rng.choice(INDICATIONS)))


def pair(study: Study, image: str) -> dict:
    """A row of train.jsonl."""
    edited, was, now = reports.without_priors(study.report.text)
    said = lambda text: [{"role": "assistant", "content": text}]
    row = {"images": [image], "prompt": study.prompt, "chosen": said(edited)}
    return row | {"rejected": said(study.report.text), "chosen_spans": now, "rejected_spans": was}


def write(folder: Path, name: str, studies: list[Study], row: Callable[[Study, str], dict]) -> None:
    """NAME.jsonl, and its pictures."""
    (folder / "pictures").mkdir(parents=True, exist_ok=True)
    lines = []
    for number, study in enumerate(studies):
        image = f"pictures/{name}-{number:04}.png"
        study.picture.save(folder / image)
        lines.append(json.dumps(row(study, image)) + "\n")
    (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")


def make_start(studies: list[Study], sizes: Sizes, seed: int, folder: Path) -> None:
    """Trains the start model, and saves it as any model is saved."""
    texts = [text for study in studies for text in (study.report.text, study.edited)]
    asked = [study.prompt[0]["content"][1]["text"] for study in studies]
    processor = vlm.make_processor([*texts, *asked])
    model = vlm.make_model(processor, seed)
    shown = [study.picture for study in studies]
    pixels = processor.image_processor(shown, return_tensors="pt")["pixel_values"]
    truth = torch.tensor([study.truth for study in studies])
    tell("the tower", vlm.learn_findings(model, pixels, truth, sizes.tower_steps, seed), sizes.tower_steps)
    asks = lambda study: processor.apply_chat_template(study.prompt, add_generation_prompt=True)
    rows = [(asks(study), study.report.text + END) for study in studies]
    losses = vlm.learn_reports(model, processor, pixels, rows, sizes.report_steps, seed)
    tell("reports", losses, sizes.report_steps)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def tell(what: str, losses, steps: int) -> None:
    """Goes through a training."""
    for step, loss in enumerate(losses, 1):
        if step % 50 == 0 or step == steps:
            print(f"{what}: step {step} of {steps}, loss {loss:.3f}", flush=True)


def make(folder: Path, seed: int = 0, sizes: Sizes | None = None) -> None:
    """All files into `folder`, in the place of earlier ones."""
    sizes = sizes or Sizes()
    for name in ("pictures", "start"):
        shutil.rmtree(folder / name, ignore_errors=True)
    rng = np.random.default_rng(seed)
    studies = [draw_study(rng) for _ in range(sizes.reports)]
    with_priors = [study for study in studies if study.edited != study.report.text]
    if len(with_priors) < sizes.pairs:
        raise SystemExit(f"{len(with_priors)} reports speak of priors, {sizes.pairs} are wanted: draw more")
    write(folder, "train", with_priors[: sizes.pairs], pair)
    others: list[Study] = []
    while len(others) < sizes.eval_pairs:
        study = draw_study(rng)
        others += [study] if study.edited != study.report.text else []
    write(folder, "eval", others, pair)
    asked = lambda study, image: {
        "images": [image],
        "prompt": study.prompt,
        "findings": study.report.findings,
    }
    write(folder, "held_out", [draw_study(rng) for _ in range(sizes.held_out)], asked)
    print(f"{sizes.pairs} pairs and {sizes.held_out} pictures held out: {folder}", flush=True)
    make_start(studies, sizes, seed, folder / "start")
    print(f"the start model: {folder / 'start'}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/prior_exams"), help="the folder of all files")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    make(args.out, args.seed)


if __name__ == "__main__":
    main()
