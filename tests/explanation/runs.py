"""Tiny runs to explain, made once a session, and the explanations of them that several tests read."""

import json
import random

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

import fastdpo
from fastdpo.explanation import explain as module
from tests import tiny
from tests.training.test_samples import silent
from tests.training.test_trainer import Run

MIXTURE = dict(num_local_experts=4, num_experts_per_tok=2)
_SIDES = {"chosen": "cat dog bird house tree".split(), "rejected": "red blue old under near".split()}


def rows(n, seed=0):
    """Preference rows whose two sides have no word in common, so that there is a direction to find."""
    draw = random.Random(seed)
    some = lambda words: " " + " ".join(draw.choice(words) for _ in range(draw.randint(3, 7)))
    return [
        {"prompt": tiny.sentence(draw, draw.randint(2, 9))} | {side: some(_SIDES[side]) for side in _SIDES}
        for _ in range(n)
    ]


def save_moved(start, folder, size=0.02):
    """A second model of the same shape, each of its weights moved."""
    model = AutoModelForCausalLM.from_pretrained(start)
    torch.manual_seed(1)
    for parameter in model.parameters():
        parameter.data += size * torch.randn_like(parameter)
    model.save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return str(folder)


class Place:
    """A folder with `rows.jsonl`, the models `model` and `gpt2/model`, and the runs `full`, `lora` and
    `gpt2/run`, which hold these rows out."""

    def __init__(self, folder):
        self.folder, self._kept = folder, dict[str, dict]()
        data = rows(30, seed=3)
        data[4] |= {"prompt": data[3]["prompt"]}
        tiny.write_jsonl(folder / "rows.jsonl", data)
        held = dict(eval_data=str(folder / "rows.jsonl"), max_steps=4)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("fastdpo.api.write_report", lambda *_, **__: None)
            self.lora = Run(folder, "lora", lora_rank=4, learning_rate=1e-2, **held)
            self.full = Run(folder, "full", **held)
            (folder / "gpt2").mkdir()
            Run(folder / "gpt2", model_type="gpt2", **held)
        texts = [(row[side], side == "chosen") for row in rows(20, seed=8) for side in _SIDES]
        lines = [{"text": text, "label": int(label)} for text, label in texts]
        tiny.write_jsonl(folder / "labels.jsonl", lines)
        torch.manual_seed(5)
        save_file({"direction": torch.randn(64)}, folder / "vector.safetensors")

    def __call__(self, *models, page=False, **options):
        """What `fastdpo.explain` says of models that lie here, in its folder `out` if nothing else is
        asked for. page: whether there is to be one, which takes a second."""
        at = lambda name: str(self.folder / name)
        for name in ("data", "probe", "output"):
            if isinstance(options.get(name), str):
                options[name] = at(options[name])
        given = dict(output=at("out"), overwrite=True, causes=0) | options
        with pytest.MonkeyPatch.context() as patch:
            if not page:
                patch.setattr(module, "page", lambda made: "no page")
            return fastdpo.explain(*map(at, models), console=silent(), **given)

    def kept(self, model, **options):
        """(the same, its folder), made once: not to be changed."""
        output = f"kept/{model.replace('/', '-')}"
        if model not in self._kept:
            self._kept[model] = self(model, output=output, page=True, **options)
        return self._kept[model], self.folder / output


def json_of(folder):
    return json.loads((folder / "explain.json").read_text())
