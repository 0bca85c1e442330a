"""What the backward finds of the forward: recomputed, kept, or kept in the host's memory."""

from fastdpo.config import Config
from fastdpo.errors import ConfigError


def set_up_activations(model, config: Config) -> None:
    """Prepares a model for gradient_checkpointing, activation_offloading and tiled_mlp. Raises ConfigError
    where the model has none of it."""
    if config.gradient_checkpointing:
        try:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        except ValueError as error:
            raise ConfigError(f"gradient_checkpointing: {error}") from None
