"""A trained model to the Hugging Face hub: the log-in is checked before training, the upload comes after."""

import shlex
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError
from huggingface_hub.utils import validate_repo_id
from rich.console import Console
from rich.markup import escape

from fastdpo.errors import ConfigError, FastDPOError
from fastdpo.publish.model_card import adapter_settings, base_of

_LOG_IN = "run `hf auth login` with a token that may write, or set HF_TOKEN"
# What of an earlier model in the same repository would be loaded together with, or instead of, this one.
_STALE = "model*.safetensors model.safetensors.index.json adapter_model.safetensors adapter_config.json"


class HubError(FastDPOError):
    """The hub did not take a model; the message says how to try again."""


def check_hub(name: str | None, key: str = "push_to_hub") -> None:
    """Raises ConfigError where `name` is no repository's name, or nobody is logged in, or the hub is out of
    reach. None asks for nothing."""
    if name is None:
        return
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise ConfigError(f"{key}: {name!r} is not a repository's name, as in me/my-dpo: {error}") from None
    try:
        HfApi().whoami()
    except LocalTokenNotFoundError:
        raise ConfigError(f"{key}: not logged in to the Hugging Face hub; {_LOG_IN}") from None
    except Exception as error:
        if isinstance(error, HfHubHTTPError) and error.response.status_code in (401, 403):
            raise ConfigError(f"{key}: the hub does not accept the token; {_LOG_IN}: {error}") from None
        raise ConfigError(f"{key}: the hub cannot be reached: {type(error).__name__}: {error}") from None


def push(folder: Path, name: str, console: Console) -> str:
    """Uploads a model folder as the repository `name`, in one commit, and returns its address.

    A repository that does not exist is made private; one that does keeps its visibility and its other files,
    but for the weights of an earlier model. Raises HubError; the folder is only read.
    """
    folder = Path(folder)
    again = f"fastdpo push {shlex.quote(str(folder))} --to {name}"
    base = base_of(adapter_settings(folder))
    if base and Path(base).exists():
        text = f"adapter_config.json names its base by a path of this machine, {base}, which others can read "
        text += "and cannot load; `fastdpo merge` makes one whole model of both"
        console.print(f"[yellow]{escape(text)}", highlight=False, soft_wrap=True)
    api = HfApi()
    try:
        address = api.create_repo(name, private=True, exist_ok=True)
        api.upload_folder(
            repo_id=getattr(address, "repo_id", name),
            folder_path=folder,
            commit_message="Upload by fastdpo",
            delete_patterns=_STALE.split(),
        )
    except KeyboardInterrupt:
        text = f"not pushed; the model is whole in {folder}. To try again: {again}"
        console.print(escape(text), highlight=False, soft_wrap=True)
        raise
    except Exception as error:  # the network, the hub's refusals, a log-in that ran out
        why = f"{type(error).__name__}: {error}\nThe model is whole in {folder}. To try again: {again}"
        raise HubError(f"{name} was not pushed: {why}") from None
    console.print(f"pushed to {address}", highlight=False, soft_wrap=True)
    return str(address)
