"""Which versions of the other trainers are known inside; patched, another one could be silently wrong."""

from fastdpo.errors import ConfigError

LLAMA_FACTORY = "pip install llamafactory==0.9.5"
_KNOWN = {  # our module: (package, its versions, what to do with another one)
    "trl": ("TRL", {"1.15", "1.16"}, "this knows the inside of 1.15 to 1.16: pip install 'trl>=1.15,<1.17'"),
    "trl_older": (
        "TRL",
        {"1.9"},
        "this is for 1.9 (Axolotl 0.19's); fastdpo.integrations.trl knows 1.15 and 1.16",
    ),
    "llama_factory": ("LLaMA-Factory", {"0.9.5"}, f"this knows the inside of 0.9.5: {LLAMA_FACTORY}"),
}


def check_version(module: str, version: str) -> None:
    """ConfigError for a version, as "1.15.2", whose inside this module of ours does not know."""
    package, known, way_out = _KNOWN[module]
    if not known & {version, ".".join(version.split(".")[:2])}:
        raise ConfigError(f"fastdpo.integrations.{module}: {package} {version} is installed; {way_out}")
