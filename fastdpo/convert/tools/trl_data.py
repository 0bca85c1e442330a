"""Where the rows of TRL's and alignment-handbook's configs are: one data set, or a mixture of several."""

import re

from fastdpo.convert.draft import Draft
from fastdpo.convert.tools import shared

_COLUMNS = set("prompt chosen rejected completion label tools chat_template_kwargs".split())  # that TRL reads
_WHOLE = "give data a list of data sets as ours: NAME:CONFIG#SPLIT"
_SHARE = "it takes a random share of that data set's rows; write such rows into a file and give it as data"
_UNREAD = "it is not read; see data in `fastdpo train --help`"
REASONS = {
    "datasets": f"a path is needed; {_WHOLE}",
    "datasets.fraction": "shares are of the smallest data set; give data as ours, as in NAME#train[:5000]",
    "datasets.data_files": "give one file, as data",
    "datasets.columns": "all data sets must have the same columns",
    "dataset_mixture": f"each of its datasets needs an id; {_WHOLE}",
    "dataset_mixture.datasets.weight": _SHARE,
    "dataset_mixture.datasets.columns": "all data sets must have the same columns",
    "dataset_mixture.test_split_size": "a share below 1, or a whole number of rows, is needed",
    "test_split_size": "a share below 1, or a whole number of rows, is needed",
    "dataset_mixer": "its shares are whole hundredths up to 1; give data as ours, as in NAME#train[:5000]",
    "dataset_splits": "one split with train in its name is needed, those to evaluate on with test",
    "dataset_configs": "one for each data set of dataset_mixer is needed",
}


def data(
    draft: Draft,
    dataset_name=None,
    datasets=None,
    dataset_mixer=None,
    dataset_mixture=None,
    *,
    test_split_size=None,
    dataset_config=None,
    dataset_train_split=None,
) -> None:
    given = {"dataset_mixture": dataset_mixture, "dataset_mixer": dataset_mixer, "datasets": datasets}
    given = {key: value for key, value in (given | {"dataset_name": dataset_name}).items() if value}
    for other in list(given)[1:]:
        draft.check(other, f"left out, {next(iter(given))} says what is read")
    evaluates = draft.theirs.get("eval_strategy") or draft.theirs.get("evaluation_strategy") or "no"
    if dataset_mixture:  # alignment-handbook's since July 2025
        _mixture(draft, dataset_mixture)
    elif dataset_mixer:  # its older one
        _mixer(draft, dataset_mixer, evaluates not in ("no", False) or draft.theirs.get("do_eval") is True)
    elif datasets:  # TRL's own
        _several(draft, "datasets", datasets, "path", "name")
        shared.hold_out(draft, test_split_size, "test_split_size")
    elif dataset_name:
        spec = lambda split: shared.spec(dataset_name, dataset_config, split)
        names = [
            f"dataset_{n}" for n, v in (("config", dataset_config), ("train_split", dataset_train_split)) if v
        ]
        draft.set("data", spec(dataset_train_split), "dataset_name", *names)
        test = draft.take("dataset_test_split", "test" if draft.defaults else None)
        if test and evaluates not in ("no", False):
            draft.set("eval_data", spec(test), "dataset_test_split", dataset_test_split=test)


def _several(draft: Draft, key: str, entries, path: str, config: str) -> None:
    """A list of data sets, each an object: what they are called, and which of their columns are read."""
    if not isinstance(entries, list) or not all(isinstance(e, dict) and e.get(path) for e in entries):
        return draft.refuse(key.split(".")[0])
    specs, columns = [], []
    for entry in map(dict, entries):
        name, split, files = entry.pop(path), entry.pop("split", None), entry.pop("data_files", None)
        if files and name in ("json", "csv", "parquet") and (isinstance(files, str) or len(files) == 1):
            name = files if isinstance(files, str) else files[0]
        elif files:
            draft.refuse(f"{key}.data_files", files)
        specs.append(shared.spec(name, entry.pop(config, None), split))
        columns.append(entry.pop("columns", None))
        if (weight := entry.pop("weight", None)) not in (None, 1):
            draft.refuse(f"{key}.weight", f"{weight:g} of {specs[-1]}")
        if (fraction := entry.pop("fraction", None)) is not None and len(entries) > 1:
            draft.refuse(f"{key}.fraction", fraction)
        for other, value in entry.items():
            if value is not None:
                draft.refuse(f"{key}.{other}", value, _UNREAD)
    draft.set("data", shared.one_or_all(specs), f"{key}.{path}")
    if any(columns):
        _columns(draft, f"{key}.columns", columns)


def _columns(draft: Draft, key: str, columns: list) -> None:
    """They read these columns and no others."""
    read = [set(some or ()) & _COLUMNS for some in columns]
    if any(some != read[0] for some in read):
        return draft.refuse(key)
    draft.set("data_format", {name: name for name in sorted(read[0])}, key)


def _mixture(draft: Draft, mixture) -> None:
    """{datasets: [{id, config, split, columns, weight}, ...], test_split_size, seed}."""
    if not isinstance(mixture, dict):
        return draft.refuse("dataset_mixture")
    _several(draft, "dataset_mixture.datasets", mixture.get("datasets"), "id", "config")
    shared.hold_out(draft, mixture.get("test_split_size"), "dataset_mixture.test_split_size")
    if mixture.get("seed") is not None:
        draft.leave("dataset_mixture.seed", "rows are shuffled, and split, by seed")
    for other in mixture.keys() - {"datasets", "test_split_size", "seed"}:
        draft.refuse(f"dataset_mixture.{other}", fix=_UNREAD)


def _mixer(draft: Draft, mixer: dict, evaluates: bool) -> None:
    """{name: share of its first rows, ...}, and for all of them the splits to train and to evaluate on."""
    splits = draft.take("dataset_splits", ["train", "test"])
    configs = draft.take("dataset_configs") or [None] * len(mixer)
    train, test = ([split for split in splits if what in split] for what in ("train", "test"))
    if len(train) != 1:
        return draft.refuse("dataset_splits", splits)
    if len(configs) != len(mixer):
        return draft.refuse("dataset_configs")
    shares = [round(100 * share, 6) for share in mixer.values()]
    if any(share != int(share) or not 0 < share <= 100 for share in shares):
        return draft.refuse("dataset_mixer")
    part = lambda share: train[0] if share == 100 else f"{train[0]}[:{share:.0f}%]"
    sets = list(zip(mixer, configs, shares))
    data = [shared.spec(name, config, part(share)) for name, config, share in sets]
    names = draft.given("dataset_configs", "dataset_splits")
    draft.set("data", shared.one_or_all(data), "dataset_mixer", *names)
    draft.check(
        "dataset_mixer",
        "alignment-handbook's older scripts put an empty system message before rows that have none, where "
        "the chat template knows one; here rows are as they are",
    )
    held_out = [shared.spec(name, config, split) for name, config, _ in sets for split in test]
    if evaluates and held_out:
        draft.set("eval_data", shared.one_or_all(held_out), "dataset_splits", dataset_splits=splits)


def said_in_names(draft: Draft, words: set[str]) -> tuple[str, str] | None:
    """(the key, the word) of the one word that says what a run is, in what it and its rows are called: in the
    first of these keys that has any of the words."""
    for key in ("hub_model_id", "run_name", "output_dir", "dataset_name", "dataset_mixer"):
        found = words & set(re.split(r"[\W_]+", str(draft.theirs.get(key) or "").lower()))
        if found:
            return (key, found.pop()) if len(found) == 1 else None
    return None
