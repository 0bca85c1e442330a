"""Axolotl's data sets and their types: where the rows are, how they are read, and what writes their turns."""

from pathlib import Path
from typing import Any, NamedTuple

from fastdpo.convert.draft import Draft
from fastdpo.convert.tools.shared import one_or_all, spec
from fastdpo.convert.tools.template_names import ENDS, set_template

_WRITES = ("chatml", "llama3", "zephyr")  # families of types that write the turns themselves

_PAIRS = {  # a type's last word: our data_format
    "default": "axolotl",
    **{name: name for name in ("argilla", "icr", "intel", "prompt_pairs", "ultra", "nectar")},
    "argilla_chat": "trl",
}
_ASKED = {"argilla": "instruction", "intel": "question", "prompt_pairs": "prompt", "ultra": "prompt"}
_KTO = {  # the same of rl: kto, whose rows are all one judged answer
    last: {
        "format": "alpaca_kto",
        "instruction": asked,
        "output": "completion",
        "kto_tag": "label",
        "system": "system",
    }
    for last, asked in _ASKED.items()
} | {"argilla_chat": {"format": "messages_kto", "messages": "completion", "label": "label"}}

_ROLES = {  # what our reader of messages takes for each role, among others
    "system": {"system"},
    "user": {"user", "human"},
    "assistant": {"assistant", "gpt", "model", "chatgpt", "bot", "ai"},
    "tool": {"tool", "function", "observation"},
}
_MESSAGE = {"role": {"role", "from"}, "content": {"content", "value"}}
_NOT_READ = frozenset(  # keys of a data set that are for other types or other training
    "preprocess_shards trust_remote_code field_instruction field_input field_output field_human "
    "field_model field_system field_tools field_thinking template_thinking_key message_field_training "
    "message_field_training_detail split_thinking logprobs_field temperature roles_to_train train_on_eos "
    "train_on_eot drop_system_message conversation system_prompt system_format input_format input_transform "
    "field field_messages field_chosen field_rejected roles message_property_mappings message_field_role "
    "message_field_content".split()
)
_FILE_TYPES = ("json", "csv", "parquet", "arrow", "text")
_ONE = "all data sets must be read and written alike; convert them to one format first"
_NO_TEMPLATE = "write the template to a file and give chat_template: FILE.jinja"
_REASONS = {
    "": "a list of data sets is needed, each with its path",
    ".data_files": "download them from the hub, and give their folder as path",
    ".type": f"known are {', '.join(_PAIRS)} of {', '.join(_WRITES)}, chat_template, passthrough and "
    "user_defined; write rows of a format in docs/data.md",
    ".roles": "our names for the roles are needed (user or human, assistant or gpt, system, tool)",
    ".message_property_mappings": "a message needs role and content, or from and value",
    ".chat_template": _NO_TEMPLATE,
    ".shards": "write the rows that are meant into a file",
    ".revision": "download that revision and give its folder as path",
}
DATA_REASONS = {key + end: why for key in ("datasets", "test_datasets") for end, why in _REASONS.items()} | {
    "chat_template": _NO_TEMPLATE
}
_UNREAD = "it is not read, so what it does is not known; see data_format in `fastdpo train --help`"


def data(
    draft: Draft, datasets=None, test_datasets=None, chat_template=None, chat_template_jinja=None
) -> None:
    given: list[tuple[str, str | None]] = []  # templates: where they are said, and which
    writes = False  # Axolotl's turns are text to TRL
    for key, sets, ours in (("datasets", datasets, "data"), ("test_datasets", test_datasets, "eval_data")):
        if not sets:
            continue
        if not isinstance(sets, list) or not all(isinstance(e, dict) and e.get("path") for e in sets):
            draft.refuse(key)
            continue
        read = [_one_set(draft, key, dict(entry)) for entry in sets]
        specs = [spec for one in read for spec in one.specs]
        draft.set(ours, one_or_all(specs), f"{key}.path")
        data_format = draft.ours.get("data_format", read[0].data_format)
        given += [(one.said_in, one.template) for one in read]
        if any(one.data_format != data_format for one in read) or len({name for _, name in given}) > 1:
            draft.refuse(f"{key}.type", fix=_ONE)
        elif data_format and "data_format" not in draft.ours:
            draft.set("data_format", data_format, f"{key}.type", **{f"{key}.type": "passthrough"})
        writes = writes or any(one.family in (*_WRITES, "chat_template") for one in read)
    said_in, named = given[0] if given else ("", None)
    if named:
        _template(draft, said_in, named)
        for key, value in (("chat_template", chat_template), ("chat_template_jinja", chat_template_jinja)):
            if value:
                draft.leave(key, "the data set says how its turns are written")
    elif chat_template_jinja:
        draft.set("chat_template", chat_template_jinja, "chat_template_jinja")
    elif chat_template:
        _template(draft, "chat_template", chat_template)
    end = ENDS.get(draft.ours.get("chat_template", ""))
    special = draft.theirs.get("special_tokens") or {}
    if writes and draft.defaults and not (end and special.get("eos_token") == end):
        # the trainers of TRL add them to text, and Axolotl's text has its turns already
        draft.check(
            "datasets.type", "Axolotl's text gets BOS and EOS of the tokenizer, too; here only the template's"
        )


def _template(draft: Draft, key: str, name: str) -> None:
    """The template of this name, or the text or the file that it is."""
    fallback = "tokenizer_default_fallback_"
    if key.endswith("_jinja"):
        draft.set("chat_template", name, key)
    elif name != "tokenizer_default":
        own_first = "default:" if name.startswith(fallback) else ""
        set_template(draft, key, name.removeprefix(fallback), own_first=own_first)


class _Set(NamedTuple):
    specs: list[str]  # as our key data has them
    data_format: Any
    family: str  # its type's
    template: str | None  # that it says
    said_in: str


def _one_set(draft: Draft, key: str, entry: dict) -> _Set:
    path, names, split = entry.pop("path"), entry.pop("name", None), entry.pop("split", None)
    files = entry.pop("data_files", None)
    entry.pop("ds_type", None)  # the file's name tells it
    paths = _files(draft, key, path, [files] if isinstance(files, str) else files) if files else [path]
    names = names if isinstance(names, list) else [names]
    written, jinja = entry.pop("chat_template", None), entry.pop("chat_template_jinja", None)
    data_format, family = _data_format(draft, key, entry.pop("type", None), entry)
    for name, value in entry.items():
        if value in (None, False, [], {}, "main"):
            continue
        if name in _NOT_READ:
            draft.leave(f"{key}.{name}", "Axolotl does not read it with this type")
            continue
        known = name.removesuffix("_idx") in ("shards", "revision")
        draft.refuse(f"{key}.{name}", value, _REASONS[f".{name.removesuffix('_idx')}"] if known else _UNREAD)
    specs = [spec(path, name, split) for path in paths for name in names]
    if family in _WRITES:
        return _Set(specs, data_format, family, family, f"{key}.type")
    said_in = f"{key}.chat_template_jinja" if jinja else f"{key}.chat_template"
    return _Set(specs, data_format, family, jinja or written, said_in)


def _files(draft: Draft, key: str, path: str, files: list[str]) -> list[str]:
    """Axolotl reads these where the path is a folder or a kind of file, not where it is a file itself."""
    if Path(path).suffix in (".jsonl", ".json", ".csv", ".parquet"):
        return [path]
    on_hub = path.count("/") == 1 and not path.startswith((".", "/", "~")) and not Path(path).exists()
    if path not in _FILE_TYPES and on_hub:
        draft.refuse(f"{key}.data_files", files)
    return files


def _data_format(draft: Draft, key: str, kind, entry: dict) -> tuple[Any, str]:
    """(our data_format for a set's type, the type's family)."""
    kto = draft.theirs.get("rl") == "kto"
    if isinstance(kind, dict):
        return _user_defined(draft, key, kind, kto), ""
    family, _, last = (kind or "passthrough").partition(".")
    last = last or "default"
    formats: dict[str, Any] = _KTO if kto else _PAIRS
    if family == "passthrough":
        return "trl_unpaired" if kto else "trl", family
    if family == "chat_template" and last == "default" and not kto:
        return _messages(draft, key, entry, {"format": "messages"}, "messages"), family
    if family == "chat_template" and last == "argilla_chat" and not kto:
        return _messages(draft, key, entry, {"format": "trl"}), family
    if family == "chat_template" and last == "argilla" and draft.theirs.get("rl") == "orpo":
        return "ultra", family
    if family not in _WRITES or last not in formats or (family == "zephyr") != (last == "nectar"):
        draft.refuse(f"{key}.type", kind)
        return None, ""
    if last in ("argilla_chat", "ultra") and not (kto and last == "ultra"):
        draft.check(
            f"{key}.type", "of a longer conversation Axolotl trains the first answer; here it is the last"
        )
    if last == "nectar":
        draft.check(
            f"{key}.type",
            "Axolotl trains nectar's worst answers as chosen; here rank 1 is the best, and all pairs train",
        )
    return formats[last], family


def _messages(draft: Draft, key: str, entry: dict, said: dict, *more: str) -> dict:
    """A data_format of messages under the names of their columns."""
    roles = entry.pop("roles", None) or {}
    if any(not set(given) <= _ROLES.get(role, set()) for role, given in roles.items()):
        draft.refuse(f"{key}.roles", roles)
    older = {part: entry.pop(f"message_field_{part}", None) for part in _MESSAGE}
    parts = older | (entry.pop("message_property_mappings", None) or {})
    parts = {part: given for part, given in parts.items() if given}
    if any(given not in _MESSAGE.get(part, {part}) for part, given in parts.items()):
        draft.refuse(f"{key}.message_property_mappings", parts)
    names = (*more, "chosen", "rejected")
    return said | {name: entry.pop(f"field_{name}", None) or name for name in names}


def _user_defined(draft: Draft, key: str, kind: dict, kto: bool) -> dict:
    """Columns by their names, and text around them."""
    columns = ("prompt", "completion", "label") if kto else ("prompt", "chosen", "rejected")
    said = {name: kind.get(f"field_{name}") or name for name in (*columns, "system")}
    around = {f"{name}_format": kind.get(f"{name}_format") for name in columns}
    for name in kind.keys() - {*around, *(f"field_{name}" for name in said)}:
        draft.leave(f"{key}.type.{name}", "Axolotl does not read it with this type")
    texts = {name: str(text) for name, text in around.items() if text}
    for ours in columns:  # its formats may name the field
        texts = {n: t.replace(f"{{{said[ours]}}}", f"{{{ours}}}") for n, t in texts.items()}
    if text := texts.pop("completion_format", ""):  # the one response has the first one's name here
        texts["chosen_format"] = text.replace("{completion}", "{chosen}")
    read = [*columns, "system"] if "{system}" in texts.get("prompt_format", "") else columns
    return ({"format": "trl_unpaired"} if kto else {}) | {name: said[name] for name in read} | texts
