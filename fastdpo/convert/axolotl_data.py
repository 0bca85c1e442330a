"""Axolotl's data sets and their types: where the rows are, and our name for how they are read."""

from fastdpo.convert.rules import Draft

_TYPES = {  # the last word of a dataset's type: our data_format; None: told by the rows' columns
    "argilla": None,
    "argilla_chat": None,
    "default": None,
    "passthrough": None,
    "icr": "icr",
    "intel": "intel",
    "prompt_pairs": "prompt_pairs",
    "ultra": "ultra",
    "nectar": "nectar",
}
_FIELDS = {
    "field_prompt": "prompt",
    "field_chosen": "chosen",
    "field_rejected": "rejected",
    "field_system": "system",
}
_TEXTS = ("prompt_format", "chosen_format", "rejected_format")


def data(draft: Draft) -> None:
    for key, ours in (("datasets", "data"), ("test_datasets", "eval_data")):
        sets = draft.take(key)
        if not sets:
            continue
        if len(sets) != 1:
            draft.refuse(
                key,
                [one.get("path") for one in sets],
                f"give one data set; write the rows into one file as {ours}",
            )
        _one_set(draft, key, ours, dict(sets[0]))
    if size := draft.take("val_set_size"):
        if size >= 1:
            draft.refuse("val_set_size", size, "give the share of rows to hold out, below 1")
        draft.set("eval_data", float(size), f"val_set_size {size}")


def _one_set(draft: Draft, key: str, ours: str, entry: dict) -> None:
    path, name, split = entry.pop("path"), entry.pop("name", None), entry.pop("split", None)
    files = entry.pop("data_files", None)
    entry.pop("ds_type", None)
    if files:
        files = [files] if isinstance(files, str) else files
        if len(files) != 1:
            draft.refuse(f"{key}: data_files", files, "give one file, or a folder")
        path = files[0]
    spec = path + (f":{name}" if name else "") + (f"#{split}" if split and split != "train" else "")
    draft.set(ours, spec, f"{key} {path}")
    data_format = _data_format(draft, key, entry.pop("type", None), entry)
    for other, value in entry.items():
        if value is not None:
            draft.refuse(
                f"{key}: {other}", value, "it is not read; see data_format in `fastdpo train --help`"
            )
    if data_format is None:
        return
    if draft.ours.get("data_format", data_format) != data_format:
        draft.refuse(f"{key}: type", data_format, "both data sets must have one format")
    draft.set("data_format", data_format, f"{key}: type")


def _data_format(draft: Draft, key: str, kind, entry: dict):
    """Our data_format for a dataset's type."""
    if isinstance(kind, dict):  # user_defined
        said = {ours: kind.get(theirs, ours) for theirs, ours in _FIELDS.items()}
        texts = {name: kind[name] for name in _TEXTS if kind.get(name)}
        if "{system}" not in texts.get("prompt_format", ""):
            said.pop("system")  # Axolotl reads it only then
        braces = {"prompt": said["prompt"], "chosen": said["chosen"], "rejected": said["rejected"]}
        for ours, theirs in braces.items():  # its formats may name the field
            texts = {n: t.replace(f"{{{theirs}}}", f"{{{ours}}}") for n, t in texts.items()}
        return said | texts
    family, _, last = (kind or "passthrough").rpartition(".")
    last = "default" if last == "chat_template" else last
    if last not in _TYPES:
        draft.refuse(f"{key}: type", kind, f"known are {', '.join(_TYPES)}; see data_format")
    if family and family != "chat_template":
        draft.check(f"type {kind}: the tokenizer's own chat template writes the turns, not {family}'s")
    if kind and last == "nectar":
        draft.check(
            "Axolotl trains nectar's worst answers as chosen; here rank 1 is the best, and all pairs train"
        )
    roles = entry.pop("roles", None) or {}
    properties = entry.pop("message_property_mappings", None) or {}
    if any(one != [role] for role, one in roles.items()) or any(k != v for k, v in properties.items()):
        draft.refuse(
            f"{key}: roles", roles or properties, "messages need our names for their parts and roles"
        )
    names = {name: entry.pop(f"field_{name}", name) for name in ("messages", "chosen", "rejected")}
    if kind in ("chat_template", "chat_template.default"):
        return {"format": "messages"} | names | {"system": "system", "tools": "tools"}
    return _TYPES[last]
