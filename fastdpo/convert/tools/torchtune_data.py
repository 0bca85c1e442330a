"""torchtune's data components: where the rows are, and how they are read."""

from fastdpo.convert.draft import Draft
from fastdpo.convert.tools import shared

# tokenizers that write turns as plain text, and what they put around a question unless they are told
_INST = "[INST] {prompt} [/INST] "  # Llama2ChatTemplate's and MistralChatTemplate's
_AS_TEXT = {"llama2_tokenizer": _INST, "mistral_tokenizer": _INST}
_AROUND = {  # torchtune/data/_prompt_templates.py
    "torchtune.data.QuestionAnswerTemplate": "Question: {prompt}\n\nAnswer: ",
    "torchtune.data.SummarizeTemplate": "Summarize this dialogue:\n{prompt}\n---\nSummary:\n",
    "torchtune.models.llama2.Llama2ChatTemplate": _INST,
    "torchtune.models.mistral.MistralChatTemplate": _INST,
}
_STACK = {"prompt": "question", "chosen": "response_j", "rejected": "response_k"}
SETS = {  # a component of data: (the data set that it takes by itself, its columns)
    "stack_exchange_paired_dataset": ("lvwerra/stack-exchange-paired:data/rl", _STACK),
    "hh_rlhf_helpful_dataset": ("RLHFlow/HH-RLHF-Helpful-standard", {}),
    "preference_dataset": (None, {}),
}


def last(component: str) -> str:
    return component.rpartition(".")[2]


def data(
    draft: Draft,
    data_component=None,
    source=None,
    data_files=None,
    *,
    data_dir=None,
    config=None,
    split=None,
    column_map=None,
    tokenizer="",
    prompt_template=None,
) -> None:
    if (name := last(data_component or "")) not in SETS:
        return draft.refuse("data_component")
    own, columns = SETS[name]
    own, _, folder = (own or "").partition(":")  # a folder that a component has comes before what is given
    where = [] if folder else draft.given("data_dir", "config")
    more = where + draft.given("split")
    files = [data_files] if isinstance(data_files, str) else data_files or []
    if isinstance(files, dict):
        return draft.refuse("data_files")
    if files:
        specs = [shared.spec(file, None, split) for file in files]
        draft.set("data", shared.one_or_all(specs), "data_files", *more[len(where) :])
        if where:
            draft.refuse(where[0], fix="give the files' whole paths, or their folder, in data")
    elif source or own:
        key = "source" if source else "data_component"
        draft.set("data", shared.spec(source or own, folder or data_dir or config, split), key, *more)
    else:
        return draft.refuse("source")
    columns = columns | (column_map or {})
    text = _around(draft, last(tokenizer), prompt_template)
    if "prompt" not in columns:  # conversations
        if columns:
            draft.set("data_format", columns, "column_map")
        if text:
            draft.check("tokenizer", "left out, the model's own chat template is used; see `fastdpo data`")
    elif text:
        draft.set("data_format", columns | {"prompt_format": text}, "data_component", "tokenizer")
    else:
        columns = {"format": "intel", "question": columns.pop("prompt")} | columns  # a user's turn
        draft.set("data_format", columns, "data_component")
    if not text:
        draft.check("tokenizer", "the model's own chat template writes the turns; see `fastdpo data`")


def _around(draft: Draft, tokenizer: str, template) -> str | None:
    """What a tokenizer that writes turns as plain text puts around a question."""
    default = _AS_TEXT.get(tokenizer)
    if template is None:
        return default
    if isinstance(template, dict):
        before, after = template.get("user") or ("", "")
        text = before + "{prompt}" + after if not any(template.get("assistant") or ()) else None
    else:
        text = _AROUND.get(template)
    if text is None or default is None:
        draft.refuse("prompt_template")
    return text
