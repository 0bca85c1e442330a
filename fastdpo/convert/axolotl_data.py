"""Axolotl's data sets and their types: where the rows are, and our name for how they are read."""

from fastdpo.convert.rules import Draft
from fastdpo.convert.shared import spec

_TYPES = {  # the last word of a dataset's type: our data_format; None: told by the rows' columns
    **dict.fromkeys(("argilla", "argilla_chat", "default", "passthrough")),
    **{name: name for name in ("icr", "intel", "prompt_pairs", "ultra", "nectar")},
}
_FIELDS = {f"field_{name}": name for name in ("prompt", "chosen", "rejected", "system")}
_UNREAD = "it is not read; see data_format in `fastdpo train --help`"
_ONE_FORMAT = "both data sets must have one format"
_REASONS = {
    "": "give one data set; write the rows into one file",
    ".data_files": "give one file, or a folder",
    ".type": f"known are {', '.join(_TYPES)}; see data_format",
    ".roles": "messages need our names for their parts and roles",
}
DATA_REASONS = {key + end: why for key in ("datasets", "test_datasets") for end, why in _REASONS.items()}
_TEXTS = ("prompt_format", "chosen_format", "rejected_format")


def data(draft: Draft, datasets=None, test_datasets=None) -> None:
    for key, sets, ours in (("datasets", datasets, "data"), ("test_datasets", test_datasets, "eval_data")):
        if sets and len(sets) != 1:
            draft.refuse(key, [one.get("path") for one in sets])
            continue
        for one in sets or ():
            _one_set(draft, key, ours, dict(one))


def _one_set(draft: Draft, key: str, ours: str, entry: dict) -> None:
    path, name, split = entry.pop("path"), entry.pop("name", None), entry.pop("split", None)
    files = entry.pop("data_files", None)
    entry.pop("ds_type", None)
    if files:
        files = [files] if isinstance(files, str) else files
        if len(files) != 1:
            draft.refuse(f"{key}.data_files", files)
        path = files[0]
    draft.set(ours, spec(path, name, split), f"{key}.path")
    data_format = _data_format(draft, key, entry.pop("type", None), entry)
    for other, value in entry.items():
        if value is not None:
            draft.refuse(f"{key}.{other}", value, _UNREAD)
    if data_format is None:
        return
    if draft.ours.get("data_format", data_format) != data_format:
        draft.refuse(f"{key}.type", data_format, _ONE_FORMAT)
    draft.set("data_format", data_format, f"{key}.type")


def _data_format(draft: Draft, key: str, kind, entry: dict):
    """Our data_format for a dataset's type."""
    if isinstance(kind, dict):  # user_defined
        said = {ours: kind.get(theirs, ours) for theirs, ours in _FIELDS.items()}
        texts = {name: kind[name] for name in _TEXTS if kind.get(name)}
        if "{system}" not in texts.get("prompt_format", ""):
            said.pop("system")  # Axolotl reads it only then
        for ours in ("prompt", "chosen", "rejected"):  # its formats may name the field
            texts = {n: t.replace(f"{{{said[ours]}}}", f"{{{ours}}}") for n, t in texts.items()}
        return said | texts
    family, _, last = (kind or "passthrough").rpartition(".")
    last = "default" if last == "chat_template" else last
    if last not in _TYPES:
        return draft.refuse(f"{key}.type", kind)
    if family and family != "chat_template":
        draft.check(f"{key}.type", f"the tokenizer's own chat template writes the turns, not {family}'s")
    if kind and last == "nectar":
        draft.check(
            f"{key}.type",
            "Axolotl trains nectar's worst answers as chosen; here rank 1 is the best, and all pairs train",
        )
    roles = entry.pop("roles", None) or {}
    properties = entry.pop("message_property_mappings", None) or {}
    if any(one != [role] for role, one in roles.items()) or any(k != v for k, v in properties.items()):
        draft.refuse(f"{key}.roles", roles or properties)
    names = {name: entry.pop(f"field_{name}", name) for name in ("messages", "chosen", "rejected")}
    if kind in ("chat_template", "chat_template.default"):
        return {"format": "messages"} | names | {"system": "system", "tools": "tools"}
    return _TYPES[last]
