"""ref_chosen_logps and ref_rejected_logps: read, checked, used only where they are of what is scored."""

import io
import json

import numpy as np
import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM

from fastdpo.data.groups import Limits, to_group
from fastdpo.data.load import load_groups
from fastdpo.data.packing import pack
from fastdpo.data.report import MEANING
from fastdpo.data.rows import RowProblem, parse_row
from fastdpo.errors import DataError
from fastdpo.model.policy import Policy
from fastdpo.model.support import stock_logp
from fastdpo.records import ResponseLogps
from fastdpo.reference.columns import reference_columns
from tests import tiny
from tests.data.shared_data import WIDE, assistant, chat_row, ranked_row, small_tokenizer, text_row, user
from tests.training.test_trainer import Run

NAMES = ("ref_chosen_logps", "ref_rejected_logps")


def columns(chosen=-12.5, rejected=-7.25):
    return dict(zip(NAMES, (chosen, rejected)))


def known(row, limits=WIDE, **tokenizer):
    """(the reference log-probs of a row's responses, its notes)"""
    group, notes = to_group(row, 0, small_tokenizer(**tokenizer), limits)
    return [r.ref_logp for r in group.responses], notes


def said_of(*sets):
    """(the columns or None, what was printed)"""
    console = Console(file=io.StringIO(), width=10**4)
    return reference_columns(list(sets), console), console.file.getvalue()


def group_of(row, ref_logps=(-3.0, -4.0)):
    """A group of random tokens whose responses have these reference log-probs."""
    draw = np.random.default_rng(row)
    group = tiny.group(row, 4, draw.integers(1, 400, len(ref_logps)).tolist())
    for response, ref_logp in zip(group.responses, ref_logps):
        object.__setattr__(response, "ref_logp", ref_logp)
    return group


# ---- rows


@pytest.mark.parametrize("row", [text_row(), chat_row()], ids=["text", "messages"])
def test_they_are_read(row):
    assert parse_row(row, 0).ref_logps == (None, None)
    assert parse_row({**row, **columns(-12.5, -3)}, 0).ref_logps == (-12.5, -3.0)
    old = {"reference_chosen_logps": -1.0, "reference_rejected_logps": -2.0}
    assert parse_row({**row, **old}, 0).ref_logps == (-1.0, -2.0)
    assert parse_row({**row, **old, **columns()}, 0).ref_logps == (-12.5, -7.25)
    values, notes = known({**row, **columns()})
    assert values == [-12.5, -7.25] and notes["ref_columns"] == 2
    assert known(row) == ([None, None], {})


def test_white_space_that_trl_counts_is_noted():
    """TRL scores the newline that ChatML prints after <|im_end|>."""
    values, notes = known({**chat_row(), **columns()})
    assert values == [-12.5, -7.25] and notes == {"ref_columns": 2, "ref_columns_white_space": 2}
    assert "ref_columns_white_space" not in known(chat_row())[1]


@pytest.mark.peer
def test_trl_s_own_columns_are_the_start_model_s_sums(tmp_path):
    from datasets import Dataset

    trl = pytest.importorskip("trl")
    rows, base = tiny.rows(8), tiny.save_model(tmp_path / "base")
    quiet = dict(output_dir=str(tmp_path / "trl"), report_to="none", use_cpu=True, bf16=False)
    settings = trl.DPOConfig(
        precompute_ref_log_probs=True, gradient_checkpointing=False, max_length=64, **quiet
    )
    data = Dataset.from_list(rows)
    theirs = trl.DPOTrainer(base, args=settings, train_dataset=data, processing_class=tiny.tokenizer())
    policy = Policy(AutoModelForCausalLM.from_pretrained(base).eval(), torch.float32)
    for number, (row, their) in enumerate(zip(rows, theirs.train_dataset)):
        row |= {name: their[name] for name in NAMES}
        group, _ = to_group(row, number, tiny.tokenizer(), Limits(64))
        lengths = [len(r.ids) for r in group.responses]
        with torch.no_grad():
            sums = [float(logp.sum()) for logp in stock_logp(policy, group).split(lengths)]
        assert [r.ref_logp for r in group.responses] == pytest.approx(sums, abs=1e-4)


def test_null_is_none_and_ranked_rows_have_none():
    assert parse_row({**text_row(), **columns(None, None)}, 0).ref_logps == (None, None)
    row = {**ranked_row((" old", 2), (" gold", 1)), **columns()}
    assert parse_row(row, 0).ref_logps == (None, None)


MALFORMED = {
    "one only": (columns(rejected=None), "ref_rejected_logps", "missing or null.*both or none"),
    "the other only": ({"ref_rejected_logps": -1.0}, "ref_chosen_logps", "missing or null"),
    "NaN": (columns(float("nan")), "ref_chosen_logps", "finite number, not nan"),
    "infinite": (columns(rejected=-float("inf")), "ref_rejected_logps", "finite number, not -inf"),
    "text": (columns("-1"), "ref_chosen_logps", "a number.*not str '-1'"),
    "a list": (
        columns(rejected=[-1.0]),
        "ref_rejected_logps",
        "the sum over the response's tokens, not list",
    ),
    "a bool": (columns(True), "ref_chosen_logps", "not bool"),
    "positive": (columns(12.5), "ref_chosen_logps", "at most 0, not 12.5"),
    "TRL's old name": (
        {"reference_chosen_logps": "x", "reference_rejected_logps": -1.0},
        "reference_chosen_logps",
        "a number",
    ),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed(name):
    values, field, message = MALFORMED[name]
    with pytest.raises(RowProblem, match=f"^{field}: .*{message}") as caught:
        parse_row({**text_row(), **values}, 0)
    assert (caught.value.reason, caught.value.field) == ("malformed_ref_logps", field)


def test_malformed_rows_are_dropped_and_counted(tmp_path):
    rows = [{**text_row(), **columns(value)} for value in (-1.0, "x", -2.0)]
    data = tiny.write_jsonl(tmp_path / "d.jsonl", rows)
    quiet = Console(file=io.StringIO(), width=300)
    groups, report = load_groups(data, small_tokenizer(), WIDE, strict=False, console=quiet)
    report.print(quiet)
    assert [g.row for g in groups] == [0, 2]
    account = report.to_dict()
    assert account["dropped"]["malformed_ref_logps"]["examples"] == [1]
    assert account["notes"]["ref_columns"] == {"rows": 2, "items": 4, "examples": [0, 2]}
    assert f"4 {MEANING['ref_columns']}" in quiet.file.getvalue()
    with pytest.raises(DataError, match=r"row 1(.|\n)*ref_chosen_logps: a number"):
        load_groups(data, small_tokenizer(), WIDE, strict=True, console=quiet)


# ---- sums of whole responses only


@pytest.mark.parametrize("truncation", ["keep_start", "keep_end"])
def test_a_cut_response_has_none(truncation):
    row = {**text_row("good old world", " morning gold old", " wor world"), **columns()}
    group, _ = to_group(row, 0, small_tokenizer(), WIDE)
    longest = len(group.prompt) + max(len(r.ids) for r in group.responses)
    assert known(row, Limits(longest, truncation)) == ([-12.5, -7.25], {"ref_columns": 2})
    values, notes = known(row, Limits(longest - 1, truncation))
    assert values == [None, None] and notes["ref_columns_unusable"] == 2 and "ref_columns" not in notes


PARTLY_SCORED = {
    "a merged boundary": text_row("good wor", "ld morning", "ld old"),
    "one merged boundary": text_row("good wor", "ld morning", " old"),
    "trailing turns": {**chat_row(), "chosen": [assistant("gold"), user("more")]},
    "several turns": {**chat_row(), "chosen": [assistant("old"), user("more"), assistant("gold")]},
}


@pytest.mark.parametrize("name", PARTLY_SCORED)
def test_a_response_scored_in_part_has_none(name):
    """The column counts tokens that are not scored here, and by how much nobody knows."""
    values, notes = known({**PARTLY_SCORED[name], **columns()})
    assert values == [None, None] and notes["ref_columns_unusable"] == 2


def test_implicit_prompts_keep_theirs():
    row = {"chosen": "good old world", "rejected": "good old gold", **columns()}
    assert known(row)[0] == [-12.5, -7.25]


# ---- the reference


@pytest.mark.parametrize("scale", [1e-6, 1.0, 300.0, 1e5])
def test_sums_come_back(scale):
    draw = np.random.default_rng(0)
    groups = [group_of(row, tuple(-scale * draw.random(n))) for row, n in enumerate([2, 3, 2, 1, 4] * 8)]
    reference, _ = said_of(groups)
    batch = pack(groups)
    tokens = reference.of(groups)
    assert tokens.dtype == torch.float32 and tokens.shape == batch.target.shape
    logps = ResponseLogps.of(batch, torch.zeros(len(tokens)), tokens)
    expected = torch.tensor([r.ref_logp for g in groups for r in g.responses], dtype=torch.float64)
    assert ((logps.ref_logp.double() - expected) / expected).abs().max() <= 1.2e-7
    assert ((logps.log_ratio.double() + expected) / expected).abs().max() <= 1.2e-7


def test_used_where_every_row_has_them():
    training, held_out = [group_of(row) for row in range(6)], [group_of(row) for row in range(3)]
    reference, said = said_of(training, held_out)
    assert reference.account == {"source": "columns", "responses": 18} and not reference.per_token
    assert "ref_chosen_logps and ref_rejected_logps columns of the data (sums; no reference forward)" in said
    assert said_of(training, [])[0] is not None
    with pytest.raises(ValueError, match="row 7: not among the rows"):
        reference.of([training[0], group_of(7, (-1.0, None))])


def test_not_a_word_where_there_are_none():
    assert said_of([tiny.group(0, 3, [2, 2])], []) == (None, "")


def test_not_used_where_some_rows_lack_them():
    training = [group_of(row, (-1.0, -2.0) if row % 9 else (None, None)) for row in range(90)]
    reference, said = said_of(training, [])
    assert reference is None
    assert "can be used in 80 of 90 rows (not in rows 0, 9, 18, 27, 36, ..., which lack them" in said
    assert "the reference is computed instead" in said
    reference, said = said_of(training[1:9], [group_of(7), group_of(8, (None, None))])
    assert reference is None and "9 of 10 rows (not in rows held-out 8, which" in said


# ---- a run


def test_a_run_with_the_start_model_s_sums_is_the_run_without(tmp_path):
    """The columns of the model itself give the losses that a computed reference gives."""
    plain = Run(tmp_path, "plain", max_steps=6, eval_data=None)
    policy = Policy(AutoModelForCausalLM.from_pretrained(plain.start).eval(), torch.float32)
    tokenizer, rows = tiny.tokenizer(), tiny.rows(24)
    for number, row in enumerate(rows):
        group, _ = to_group(row, number, tokenizer, Limits(64))
        with torch.no_grad():
            both = stock_logp(policy, group).split([len(r.ids) for r in group.responses])
        row |= dict(zip(NAMES, (float(logp.sum()) for logp in both)))
    data = tiny.write_jsonl(tmp_path / "columns.jsonl", rows)
    run = Run(tmp_path, "run", max_steps=6, eval_data=None, data=data)
    torch.testing.assert_close(run.losses, plain.losses, rtol=0, atol=1e-5)
    notes = json.loads((run.folder / "data_report.json").read_text())["data"]["notes"]
    assert notes["ref_columns"]["rows"] == 24
    events = (run.folder / "events.jsonl").read_text().splitlines()
    (event,) = (e for e in map(json.loads, events) if e["event"] == "reference")
    assert event["source"] == "columns"

    shifted = [{**row, "ref_chosen_logps": row["ref_chosen_logps"] - 1} for row in rows]
    data = tiny.write_jsonl(tmp_path / "shifted.jsonl", shifted)
    other = Run(tmp_path, "other", max_steps=1, eval_data=None, data=data)
    assert other.steps[0]["rewards/margins"] == pytest.approx(0.1, abs=1e-4)  # beta x 1
