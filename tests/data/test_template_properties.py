"""What holds of every chat template and conversation: the corpus, and the templates in TRL's package."""

import re
from collections import Counter
from importlib.util import find_spec
from pathlib import Path

import pytest

from fastdpo.data.chat.pieces import pieces
from fastdpo.data.groups import to_group
from fastdpo.data.report import NOT_PRINTED, RowProblem
from tests.data.conversations import random_row
from tests.data.shared_data import WIDE, check, decode, scored_text, sequence
from tests.data.templates.case import Template
from tests.data.test_templates import TEMPLATES, template_ids, tokenizer_of

ROWS = 25  # a template
ALLOWED = {"template_error", "content_not_printed", "no_rendering"}  # a template may not know what a row says
_SPECIAL = re.compile(r"<[|｜][^<>'\"{}\s]+[|｜]>|<(?:start|end)_of_turn>|<turn\|>|<\|\w+>|\[/?[A-Z_]{4,}\]")
_ENDS = (
    "<|im_end|>",
    "<｜end▁of▁sentence｜>",
    "<|END_OF_TURN_TOKEN|>",
    "<|eot_id|>",
    "<|return|>",
    "<|eot|>",
)


def trl_templates() -> dict[str, str]:
    spec = find_spec("trl")
    folder = Path(spec.origin).parent / "chat_templates" if spec and spec.origin else Path("nowhere")
    return {f"trl's {file.stem}": file.read_text("utf-8") for file in sorted(folder.glob("*.jinja"))}


TRL = trl_templates()


def tokenizer_for(name: str):
    if name in TEMPLATES:
        return tokenizer_of(TEMPLATES[name], name)
    special = sorted(set(_SPECIAL.findall(TRL[name])) | {"<s>", "</s>", "[INST]", "[/INST]"})
    eos = next((end for end in _ENDS if end in special), "</s>")
    return tokenizer_of(Template(eos=eos, special=tuple(special), table={}, bos="<s>"), text=TRL[name])


def words_of(message: dict, kind: str | None = None) -> list[str]:
    """The words that the message says, of `kind` only where it is given."""
    said = [text for piece in pieces(message) if kind in (None, piece.kind) for text in piece.texts]
    return re.findall(r"say (\w+)", " ".join(said))


@pytest.mark.parametrize("name", [*TEMPLATES, *TRL])
def test_random_conversations(name):
    tokenizer, kept = tokenizer_for(name), Counter()
    kwargs = TEMPLATES[name].kwargs if name in TEMPLATES else {}
    for seed in range(ROWS):
        row = random_row(seed) | {"chat_template_kwargs": kwargs}
        try:
            group, notes = to_group(row, seed, tokenizer, WIDE)
        except RowProblem as problem:
            assert problem.reason in ALLOWED, problem
            kept[problem.reason] += 1
            continue
        kept["kept"] += 1
        check(group)
        for i, side in enumerate(("chosen", "rejected")):
            scored = scored_text(tokenizer, group.responses[i])
            if "prompt_as_for_generation" not in notes:
                ids = sequence(group, i)
                assert ids in [whole[: len(ids)] for whole in template_ids(tokenizer, row, side)], seed
            answers = [turn for turn in row[side] if turn["role"] == "assistant"]
            others = [turn for turn in row["prompt"] + row[side] if turn["role"] != "assistant"]
            missing = [w for turn in answers for w in words_of(turn) if w not in scored]
            unscored = sum(notes[name] for name in NOT_PRINTED)
            assert len(missing) <= unscored, (seed, missing, scored)
            assert not [w for turn in others for w in words_of(turn) if w in scored], (seed, scored)
            assert not [w for turn in row["prompt"] for w in words_of(turn) if w in scored], (seed, scored)
        prompt = decode(tokenizer, group.prompt)
        lost = [w for turn in row["prompt"] for w in words_of(turn) if w not in prompt]
        assert len(lost) <= sum(notes[name] for name in NOT_PRINTED), (seed, lost, prompt)
    assert sum(kept.values()) == ROWS
