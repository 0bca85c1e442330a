"""Formats of several responses a prompt, with scores or ranks: their columns as Columns."""

from fastdpo.data import row_fields
from fastdpo.data.formats.columns import Columns, about, about_chat, column, items, ranked, text
from fastdpo.data.formats.turns import Tags, from_human_and_assistant, turns
from fastdpo.data.row_fields import RowProblem

_LOW, _HIGH = 2, 10  # see _check_overall


def responses(row: dict, tags: Tags | None = None) -> Columns:
    """fastdpo's own: {prompt, responses: [{text, score}, ...]}."""
    column(row, "prompt")
    listed = items(row, "responses", ("text", "score"))
    answers = [
        (f"responses[{i}].text", item["text"], row_fields.score(item["score"], f"responses[{i}].score"))
        for i, item in enumerate(listed)
    ]
    marks = tuple((item, "", f"responses[{i}].") for i, item in enumerate(listed))
    return ranked("responses", row["prompt"], answers, marks, **about(row))


def nectar(row: dict, tags: Tags | None = None) -> Columns:
    """Nectar: {prompt, answers: [{answer, rank}, ...]}, where rank 1 is the best."""
    prompt = column(row, "prompt")
    if isinstance(prompt, str):
        prompt = from_human_and_assistant(prompt, "prompt")
    listed = items(row, "answers", ("answer", "rank"))
    answers = [
        (f"answers[{i}].answer", item["answer"], _score_of_rank(item, f"answers[{i}].rank"))
        for i, item in enumerate(listed)
    ]
    return ranked("answers", prompt, answers, **about_chat(row))


def nemo(row: dict, tags: Tags | None = None) -> Columns:
    """NeMo-RL: {context, completions: [{rank, completion}, ...]}, where the lowest rank is the best."""
    context = column(row, "context")
    if not isinstance(context, str):
        context = turns(context, "context", tags)
    listed = items(row, "completions", ("rank", "completion"))
    answers = []
    for i, item in enumerate(listed):
        field, value = f"completions[{i}].completion", item["completion"]
        value = value if isinstance(value, str) else turns(value, field, tags)
        answers.append((field, value, _score_of_rank(item, f"completions[{i}].rank")))
    return ranked("completions", context, answers, prompt_field="context", **about_chat(row))


def _score_of_rank(item: dict, field: str) -> float:
    return 0.0 - row_fields.score(item["rank"], field)


def ultrafeedback(score_key: str):
    """The reader of UltraFeedback's {instruction, completions: [{response, ...}]} by one of its scores:
    overall_score (1 to 10, GPT-4's verdict) or fine-grained_score (the mean of four ratings, 1 to 5)."""

    def read(row: dict, tags: Tags | None = None) -> Columns:
        listed = items(row, "completions", ("response", score_key))
        answers = []
        for i, item in enumerate(listed):
            score = row_fields.score(item[score_key], f"completions[{i}].{score_key}")
            if score_key == "overall_score":
                _check_overall(score, item, f"completions[{i}].overall_score")
            answers.append((f"completions[{i}].response", item["response"], score))
        prompt = text(row, "instruction")
        return ranked("completions", prompt, answers, prompt_field="instruction", **about_chat(row))

    return read


def _check_overall(score: float, item: dict, field: str) -> None:
    """Copies of UltraFeedback from before December 2023 give 10 to responses that were meant to have 1; its
    authors told them by fine-grained scores of at most 2."""
    fine = item.get("fine-grained_score")
    if score == _HIGH and row_fields.is_number(fine) and fine <= _LOW:
        message = f"{_HIGH} beside a fine-grained_score of {fine}: a known fault of UltraFeedback's first "
        message += (
            "version, where 1 was meant; take the corrected one, or data_format: ultrafeedback_fine_grained"
        )
        raise RowProblem("faulty_score", field, message)
