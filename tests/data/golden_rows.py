"""The record of what becomes of data of every kind: of golden_cases.py's and golden_files.py's. It asks
`fastdpo.data.load.load_data` alone and helpers of the tests: a copy of the two files runs in any tree.

    python -m tests.data.golden_rows > tests/data/golden_rows.yaml      after a change that is meant
    python -m tests.data.golden_rows NAME                               one record, its report in whole
"""

import io
import json
import sys
import tempfile
from datetime import datetime
from hashlib import blake2b
from pathlib import Path

import yaml
from rich.console import Console

from fastdpo.data.load import DataSpec, load_data
from fastdpo.errors import FastDPOError
from tests.data.golden_cases import Case
from tests.data.golden_files import CASES
from tests.data.shared_data import SHARED

CLOCK = datetime(2026, 3, 9, 7, 5)
WHOLE = dict(data_format=None, chat_template_kwargs=None, max_length=100_000, truncation="keep_start")
WHOLE |= dict(eval_data=None, strict=False, seed=0, data_cache="off")


def load(case: Case, folder: Path, data: str | list[str], **more):
    """load_data of a case whose files are in the folder; `more`: other keys of DataSpec."""
    keys = json.loads(json.dumps(case.keys).replace("FOLDER", str(folder)))
    spec = DataSpec(data, **WHOLE | keys | more)
    return load_data(spec, case.tokenizer(), Console(file=io.StringIO()), CLOCK)


def record(case: Case, folder: Path, data: str | list[str], whole: bool = False, **more) -> dict:
    """Digests of what came of it, and what a reader of a difference wants to know."""
    masked = lambda said: said.replace(str(folder), "FOLDER").replace(str(SHARED), "SHARED")
    try:
        groups, held, told = load(case, folder, data, **more)
    except FastDPOError as error:
        return {"error": masked(f"{type(error).__name__}: {error}")}
    told = json.loads(masked(json.dumps(told)))
    told["data"]["dropped"].get("template_error", {}).pop("message", None)  # in words of jinja's
    for report in told.values():
        report.pop("prompts", None)  # the record is older
    counts = {name: said["rows"] for of in ("dropped", "notes") for name, said in told["data"][of].items()}
    out = {"kept": f"{told['data']['kept']['rows']} of {told['data']['rows']}", **counts}
    out |= {name: digest(some) for name, some in columns([*groups, *held]).items()}
    if held:
        out["held"] = " ".join(str(group.row) for group in held)
    return out | {"report": told if whole else digest(json.dumps(told).encode())}


def columns(groups) -> dict[str, list[bytes]]:
    responses = [response for group in groups for response in group.responses]
    said = lambda *values: repr(values).encode()
    some = lambda value: None if value is None else float(value)
    return {
        "rows": [said(int(g.row), len(g.responses)) for g in groups],
        "ids": [one.ids.tobytes() for one in responses] + [group.prompt.tobytes() for group in groups],
        "masks": [r.target_mask.tobytes() for r in responses],
        "pairs": [said(*map(tuple, g.pairs)) for g in groups],
        "known": [said(some(r.score), some(r.ref_logp), r.label) for r in responses],
        "weights": [b"" if r.token_weight is None else r.token_weight.tobytes() for r in responses],
    }


def digest(parts: bytes | list[bytes]) -> str:
    whole = blake2b(digest_size=6)
    for part in [parts] if isinstance(parts, bytes) else parts:
        whole.update(len(part).to_bytes(8, "big") + part)
    return whole.hexdigest()


if __name__ == "__main__":
    for name in sys.argv[1:] or CASES:
        with tempfile.TemporaryDirectory() as folder:
            data = CASES[name].write(Path(folder))
            line = {name: record(CASES[name], Path(folder), data, whole=len(sys.argv) > 1)}
        how = {"default_flow_style": False} if len(sys.argv) > 1 else {"default_flow_style": None}
        yaml.safe_dump(line, sys.stdout, width=108, sort_keys=False, allow_unicode=True, **how)
