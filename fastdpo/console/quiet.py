"""Left out is what libraries say of one another, or of kernels that no run here asks for: nobody who reads it
could act on it. All else that they say is said."""

import contextlib
import logging
import sys
import warnings
from collections.abc import Iterator

_LOGGED = {  # by logger: all of it when they are imported
    "torchao": ("Failed to load ", "Skipping import of cpp extensions"),  # built for other GPUs and torches
    "torch.utils._pytree": (" is an Enum subclass and is now natively supported",),  # torchao registers two
    "torch.utils.cpp_extension": ("No CUDA runtime is found",),  # torch.compile, given nvcc and no GPU
    "transformers.generation.configuration_utils": ("generation flags are not valid",),  # a model's own file
    "transformers.modeling_utils": (" LOAD REPORT",),  # fastdpo.model.source says what is in it
    "transformers.utils.import_utils": ("requires torchvision (not installed)",),  # PIL does the same
    "bitsandbytes.backends.cpu.ops": ("Failed to load CPU gemm_4bit_forward",),  # the hub's, for generating
}
_WARNED = (
    "`is_gradient_checkpointing` is deprecated",  # peft asks transformers
    r"Cannot \w+ progress bars: environment variable",  # the hub's, where HF_HUB_DISABLE_PROGRESS_BARS is set
    r"OptimState\dbit does not implement _stable_hash_for_caching",  # torch.compile asks torchao
)


def leave_out_noise() -> None:
    for name, texts in _LOGGED.items():
        is_said = lambda record, texts=texts: not any(text in record.getMessage() for text in texts)
        logging.getLogger(name).addFilter(is_said)
    for text in _WARNED:
        warnings.filterwarnings("ignore", text)


@contextlib.contextmanager
def no_bars() -> Iterator[None]:
    """Inside, transformers shows no bars of its loading and saving; those of the hub and of datasets, which
    a download of gigabytes needs, are shown on a terminal alone. Also a decorator."""
    from huggingface_hub import utils as hub
    from transformers.utils import logging as transformers

    theirs, hubs = transformers.is_progress_bar_enabled(), not hub.are_progress_bars_disabled()
    transformers.disable_progress_bar()  # the hub's too
    if hubs and sys.stderr.isatty():
        hub.enable_progress_bars()
    try:
        with _no_bars_of_datasets():
            yield
    finally:
        if theirs:
            transformers.enable_progress_bar()  # the hub's too
        (hub.enable_progress_bars if hubs else hub.disable_progress_bars)()


@contextlib.contextmanager
def _no_bars_of_datasets() -> Iterator[None]:
    loaded = sys.modules.get("datasets")  # else it shows none, and its import takes a while
    if loaded is None or sys.stderr.isatty() or loaded.utils.are_progress_bars_disabled():
        yield
        return
    loaded.disable_progress_bars()
    try:
        yield
    finally:
        loaded.enable_progress_bars()
