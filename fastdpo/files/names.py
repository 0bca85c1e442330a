"""What a name stands for, found before a library is asked: a path that is like it, a name on the hub."""

import difflib
import os
from pathlib import Path
from typing import Any, NamedTuple

_CONNECT = 4  # seconds; a slow network connects in less, and may then take its time to answer


class Answer(NamedTuple):
    """The hub's, about a name."""

    found: bool | None  # None: the hub was not reached, so nobody knows
    why: str  # it is not found, in words


def similar(path: Path | str) -> str:
    """`; did you mean 'X'?`, where its folder holds something of a similar name; else nothing."""
    path = Path(os.path.expanduser(path))
    try:
        names = [other.name for other in path.parent.iterdir()]
    except OSError:
        return ""
    close = difflib.get_close_matches(path.name, names, n=1)
    return f"; did you mean {str(path.with_name(close[0]))!r}?" if close else ""


def is_hub_name(name: str) -> bool:
    """Whether it may be a repository's name (`name` or `org/name`), as it is no path."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def gguf_path(name: str) -> str:
    """FOLDER/FILE.gguf of FOLDER:FILE.gguf, where there is such a folder; any other name as it is."""
    folder, _, file = name.rpartition(":")
    is_one = is_gguf(file) and os.path.isdir(folder) and not os.path.exists(name)
    return f"{folder}/{file}" if is_one else name


def is_gguf(name: str) -> bool:
    return name.lower().endswith(".gguf")


def look_up(name: str, kind: str, revision: str | None = None, file: str | None = None) -> Answer:
    """Asks the hub once whether it shows us the repository. kind: model (with a config.json, or this file),
    or dataset.

    Libraries try again and again, for a minute, where the hub is out of reach; who asks them only after a
    good answer never meets that.
    """
    from huggingface_hub import constants, errors, get_hf_file_metadata, get_token, hf_hub_url

    wanted = file or ("config.json" if kind == "model" else "README.md")
    answers = constants.HF_HUB_ETAG_TIMEOUT
    timeout: Any = (_CONNECT, answers, answers, _CONNECT)  # connect, read, write, wait for the pool
    try:
        url = hf_hub_url(name, wanted, repo_type=kind, revision=revision)
        get_hf_file_metadata(url, token=get_token(), timeout=timeout)
    except errors.GatedRepoError:
        page = f"{constants.ENDPOINT}/{'datasets/' * (kind == 'dataset')}{name}"
        return Answer(False, f"is gated: ask for access at {page}, then log in by `hf auth login`")
    except errors.RevisionNotFoundError:
        return Answer(False, f"has no revision {revision} on the hub")
    except errors.RepositoryNotFoundError:
        why = f"is neither a path here nor a {kind} that the hub shows you; check the name"
        return Answer(False, f"{why}, and for a private one log in by `hf auth login`")
    except errors.EntryNotFoundError:
        if file:
            return Answer(False, f"has no file {file} on the hub")
        if kind == "model":
            why = "has no config.json on the hub: it is an adapter, no model, or of GGUF files"
            return Answer(False, f"{why}; one of these is named as in {name}:FILE.gguf")
    except errors.HfHubHTTPError as error:
        return Answer(None, f"the hub, {constants.ENDPOINT}, answers {error.response.status_code}")
    except errors.OfflineModeIsEnabled:
        return Answer(None, "HF_HUB_OFFLINE is set")
    except Exception as error:  # whatever the network, a proxy or HF_ENDPOINT makes httpx raise
        reason = " ".join(str(error).split()) or type(error).__name__
        return Answer(None, f"the hub, {constants.ENDPOINT}, is out of reach: {reason}")
    return Answer(True, "")
