"""ms-swift's data sets: where `NAME:SUBSET#COUNT` is here, and how its rows are read."""

from pathlib import Path

from fastdpo.convert.draft import Draft
from fastdpo.convert.tools import shared
from fastdpo.values import as_list

# Preference data that ms-swift knows by ModelScope's name: its name on the hub, and how it reads the rows
# (swift/dataset/dataset/llm.py, data/dataset_info.json). Its questions are users' turns, whatever the column.
_KNOWN: dict[str, tuple[str, str | dict]] = {
    "hjh0119/shareAI-Llama3-DPO-zh-en-emoji": (
        "shareAI/DPO-zh-en-emoji",
        {"format": "intel", "question": "question", "chosen": "answer_zh", "rejected": "answer_en"},
    ),
    "AI-ModelScope/zhihu_rlhf_3k": ("liyucheng/zhihu_rlhf_3k", "prompt_pairs"),
    "swift/orca_dpo_pairs": ("Intel/orca_dpo_pairs", "intel"),
    "AI-ModelScope/stack-exchange-paired": (
        "lvwerra/stack-exchange-paired",
        {"format": "intel", "question": "question", "chosen": "response_j", "rejected": "response_k"},
    ),
    "AI-ModelScope/orpo-dpo-mix-40k": (
        "mlabonne/orpo-dpo-mix-40k",
        {"chosen": "chosen", "rejected": "rejected"},
    ),
    "HumanLLMs/Human-Like-DPO-Dataset": ("HumanLLMs/Human-Like-DPO-Dataset", "prompt_pairs"),
}
_READ = dict(_KNOWN.values())
_PAIR = {"query": "prompt", "response": "chosen", "rejected_response": "rejected"}
_JUDGED = {"query": "instruction", "response": "output", "label": "kto_tag"}
_FILES = (".jsonl", ".json", ".csv", ".parquet")
DATA_REASONS = {
    "dataset": "fastdpo reads a file, a folder or a hub's NAME:SUBSET; give each subset as a data set",
    "val_dataset": "fastdpo reads a file, a folder or a hub's NAME:SUBSET; give each subset as a data set",
    "columns": "data_format names the columns: {prompt: ..., chosen: ..., rejected: ...}",
    "system": "give rows a system column",
    "interleave_prob": "data sets are read one after the other; remove it",
}


def data(
    draft: Draft,
    dataset=None,
    val_dataset=None,
    columns=None,
    val_size=None,
    *,
    use_hf=None,
) -> None:
    formats: list[str | dict | None] = []
    for key, names, ours in (("dataset", dataset, "data"), ("val_dataset", val_dataset, "eval_data")):
        specs = [_spec(draft, key, name, use_hf, formats) for name in as_list(names)]
        if specs and None not in specs:
            draft.set(ours, shared.one_or_all(specs), key)
    if val_size and val_dataset:
        draft.leave("val_size", "val_dataset is held out")
    elif val_size:
        shared.held_out(draft, val_size)
    if columns:
        _columns(draft, columns)
    elif formats and any(one != formats[0] for one in formats):
        draft.refuse("dataset", fix="their rows are read in several ways; write the rows into one file")
    elif formats and formats[0]:
        draft.set("data_format", formats[0], "dataset", why="as ms-swift reads that data set")


def _spec(draft: Draft, key: str, name: str, use_hf, formats: list) -> str | None:
    """Ours for one of theirs, and in `formats` how its rows are read."""
    where, _, rest = name.rpartition("::")
    place, _, count = rest.rpartition("#") if "#" in rest else (rest, "", "")
    place, _, subset = place.partition(":")
    is_here = place.endswith(_FILES) or place.startswith(("/", ".", "~")) or Path(place).exists()
    if "/" in subset or subset == "all" or (subset and is_here) or (count and not count.isdecimal()):
        draft.refuse(key, name)
        return None
    subset = "" if subset == "default" else subset
    is_hub = where.lower() == "hf" or (use_hf and where.lower() != "ms")
    known = place
    if not is_here:
        known, format = (place, _READ.get(place)) if is_hub else _KNOWN.get(place, (place, None))
        formats.append(format)
    if not (is_here or is_hub or place in _KNOWN):
        draft.check(key, f"{place} is ModelScope's name, here it is looked up on the Hugging Face hub")
    if place.endswith("orpo-dpo-mix-40k"):
        draft.check(key, "ms-swift leaves out its rows of toxic-dpo-v0.2, here they are read")
    if count:
        draft.check(key, f"ms-swift draws {count} rows at random, here they are the first {count}")
    return shared.spec(known, subset, f"train[:{count}]" if count else None)


def _columns(draft: Draft, columns) -> None:
    """{the rows' own name: ms-swift's}, which is the other way round here. A text is a turn of a chat."""
    if not isinstance(columns, dict):
        return draft.refuse("columns")
    is_judged = draft.theirs.get("rlhf_type") == "kto"
    ours = _JUDGED if is_judged else _PAIR
    names: dict = {ours.get(name, name): theirs for theirs, name in columns.items()}
    if "messages" not in names:
        if is_judged:
            names.setdefault("kto_tag", "label")
        if not names.keys() >= {*ours.values()}:
            return draft.refuse("columns")
        names = {"format": "alpaca_kto" if is_judged else "prompt_pairs"} | names
    draft.set("data_format", names, "columns")
