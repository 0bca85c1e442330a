"""Left out is what libraries say of one another, or of kernels that no run here asks for: nobody who reads it
could act on it. All else that they say is said."""

import logging
import warnings

_LOGGED = {  # by logger: all of it when they are imported
    "torchao": ("Failed to load ", "Skipping import of cpp extensions"),  # built for other GPUs and torches
    "torch.utils._pytree": (" is an Enum subclass and is now natively supported",),  # torchao registers two
    "torch.utils.cpp_extension": ("No CUDA runtime is found",),  # torch.compile, given nvcc and no GPU
    "bitsandbytes.backends.cpu.ops": ("Failed to load CPU gemm_4bit_forward",),  # the hub's, for generating
}
_WARNED = (
    "`is_gradient_checkpointing` is deprecated",  # peft asks transformers
    r"OptimState\dbit does not implement _stable_hash_for_caching",  # torch.compile asks torchao
)


def leave_out_noise() -> None:
    for name, texts in _LOGGED.items():
        is_said = lambda record, texts=texts: not any(text in record.getMessage() for text in texts)
        logging.getLogger(name).addFilter(is_said)
    for text in _WARNED:
        warnings.filterwarnings("ignore", text)
