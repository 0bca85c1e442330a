"""What datasets loads: parquet files, a folder that save_to_disk wrote, a data set of the hub."""

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path

from fastdpo.console.quiet import no_bars
from fastdpo.data.files.arrow_rows import ArrowRows
from fastdpo.data.formats.dataset_info import not_listed
from fastdpo.errors import DataError
from fastdpo.files.names import look_up, similar

_NO_ROOM = re.compile("Not enough disk space|No space left on device")  # datasets', the system's


def parquet_rows(files: dict[str, list[Path]], content: str, spec: str) -> dict[str, list[ArrowRows]]:
    """The rows by split. `content` is a digest of the files: datasets keeps what it makes of them by their
    times of change, which another file of that name may share. Raises DataError."""
    paths = {name: [str(file) for file in some] for name, some in files.items()}
    how = dict(name=content, data_files=paths)
    data = _with_datasets("load_dataset", spec, "Check that the file is what its name says", "parquet", **how)
    return {str(name): [ArrowRows(some)] for name, some in data.items()}


def saved_rows(folder: Path, spec: str) -> dict[str, list[ArrowRows]]:
    """The rows by split, of what save_to_disk wrote. Raises DataError."""
    data = _with_datasets("load_from_disk", spec, "Was it written by save_to_disk, and whole?", folder)
    splits = data if isinstance(data, dict) else {str(data.split or "train"): data}
    return {str(name): [ArrowRows(some)] for name, some in splits.items()}


def hub_rows(spec: str, looked_up: str, **options) -> ArrowRows:
    """Those of a split of a data set of the hub, downloaded where they are not yet. `options` are
    load_dataset's. Raises DataError."""
    answer = look_up(options["path"], "dataset", options.get("revision"))
    if answer.found is False:
        where = not_listed(looked_up) or similar(looked_up)
        raise DataError(f"data: {looked_up!r} cannot be loaded: it {answer.why}{where}")
    way_out = (
        f"{looked_up!r} is not a local path, so it was looked up on the Hugging Face hub. Check the "
        "name, :config and #split, and the network (or log-in); or download it and give a path"
    )
    if answer.found:
        return ArrowRows(_with_datasets("load_dataset", spec, way_out, **options))
    way_out = f"{looked_up!r} is not a local path, and only the cache of datasets can be read: {answer.why}"
    try:
        with _out_of_reach():
            return ArrowRows(_with_datasets("load_dataset", spec, way_out, **options))
    except DataError as error:
        if not isinstance(error.__context__, ConnectionError):
            raise
        where = f"{looked_up!r} is neither a path here nor in the cache of datasets, and {answer.why}"
        where += not_listed(looked_up)
        raise DataError(f"data: {where}; check the name, or download it and give a path") from None


@contextlib.contextmanager
def _out_of_reach() -> Iterator[None]:
    """Inside, datasets asks for nothing over the network: it would try for half a minute."""
    from datasets import config

    was, config.HF_HUB_OFFLINE = config.HF_HUB_OFFLINE, True
    try:
        yield
    finally:
        config.HF_HUB_OFFLINE = was


def _with_datasets(function: str, spec: str, way_out: str, *args, **options):
    """datasets and its builders raise anything; the user needs one line and what to do."""
    import datasets

    try:
        with no_bars():
            return getattr(datasets, function)(*args, **options)
    except Exception as error:
        if isinstance(error, datasets.exceptions.DatasetGenerationError) and error.__cause__:
            error = error.__cause__  # what says more than "An error occurred while generating the dataset"
        reason = (str(error).strip() or "no message").splitlines()[0]
        if _NO_ROOM.search(reason):
            way_out = (
                "datasets writes all of it, whatever the #split, below "
                f"{datasets.config.HF_DATASETS_CACHE}, beside what it downloads. Set HF_HOME to a folder on "
                "a disk with room for both, or give fewer of its files (org/name:path/of/a/folder, or a "
                "folder of them here)"
            )
        text = f"data: {spec!r} cannot be loaded: {type(error).__name__}: {reason}\n{way_out}."
        raise DataError(text) from None
