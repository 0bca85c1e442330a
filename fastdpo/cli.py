"""The `fastdpo` command."""

import logging
import sys

from fastdpo.errors import ConfigError, FastDPOError, Stopped

USAGE = """usage: fastdpo COMMAND [CONFIG.yaml] [--key value ...]

commands:
  train        train on preference rows; the model ends up in OUTPUT_DIR/model
  ref          compute the reference's log-probs into the cache, before any training
  data         show what the rows become: counts, lengths, drops, one row decoded
  plan         predict the GPU memory of a run, whose it is, and what would make it fit
  merge        make one whole model of a LoRA adapter and its base
  push         upload a run's model to the Hugging Face hub
  convert      write the config of TRL, Axolotl or LLaMA-Factory as one of ours
  doctor       check this machine: versions, every kernel against fp64, speed; text for a bug report
  objectives   list every loss: what it is, its options, its paper
  demo         make a small model and preferences, train, show before and after (no network)

`fastdpo train --help` lists the keys."""


def main(argv: list[str] | None = None) -> int:
    """Runs a command; returns 0, or 1 when it could not go on, 2 for a wrong config or command, or 128 + the
    number of the signal that stopped it (130 for SIGINT, 143 for SIGTERM)."""
    argv = list(sys.argv[1:] if argv is None else argv)
    for name in ("torchao", "bitsandbytes", "torch.utils._pytree"):  # of kernels that a CPU does not have
        logging.getLogger(name).setLevel(logging.ERROR)
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE)
        return 0 if argv else 2
    command, *rest = argv
    if command not in COMMANDS:
        print(f"unknown command {command!r}\n\n{USAGE}", file=sys.stderr)
        return 2
    try:
        return COMMANDS[command](rest) or 0
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except Stopped as stop:
        print(stop, file=sys.stderr)
        return 128 + stop.signal
    except FastDPOError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def _config(command: str, argv: list[str]):
    from fastdpo.config.reading import help_text, load_config

    if "-h" in argv or "--help" in argv:
        print(help_text(command))
        return None
    return load_config(argv)


def _train(argv):
    config = _config("train", argv)
    if config is not None:
        from fastdpo.api import train

        train(config)


def _ref(argv):
    config = _config("ref", argv)
    if config is not None:
        from fastdpo.api import fill_reference

        fill_reference(config)


def _data(argv):
    config = _config("data", argv)
    if config is not None:
        from rich.console import Console

        from fastdpo.data.groups import Limits, load_groups
        from fastdpo.data.show import show
        from fastdpo.model.policy import load_tokenizer

        console = Console()
        tokenizer = load_tokenizer(config)
        limits = Limits(config.max_length, config.truncation)
        for spec in (config.data, config.eval_data):
            if isinstance(spec, str):
                groups, report = load_groups(
                    spec,
                    tokenizer,
                    limits,
                    strict=config.strict,
                    console=console,
                    data_format=config.data_format,
                )
                show(groups, report, tokenizer, console)


def _plan(argv):
    from fastdpo.planning.command import main as plan

    plan(argv)


def _merge(argv):
    usage = "usage: fastdpo merge RUN_OR_ADAPTER_FOLDER [--output DIR] [--dtype auto|bf16|fp32]\n"
    usage += "  (default: RUN_OR_ADAPTER_FOLDER-merged, in the base's dtype)"
    source, options = _folder_and_options(argv, usage, ("output", "dtype"))
    if source is not None:
        from fastdpo.publish.merge import merge

        merge(source, **options)


def _push(argv):
    usage = "usage: fastdpo push RUN_OR_MODEL_FOLDER --to NAME   (a new repository is made private)"
    source, options = _folder_and_options(argv, usage, ("to",))
    if source is not None:
        from rich.console import Console

        from fastdpo.publish.hub import check_hub, push
        from fastdpo.publish.model_card import model_folder

        if "to" not in options:
            raise ConfigError(usage)
        folder = model_folder(source, "push")
        check_hub(options["to"], "--to")
        push(folder, options["to"], Console())


def _folder_and_options(argv: list[str], usage: str, names: tuple[str, ...]):
    """(the folder, {option: value}) of `FOLDER [--option value]...`; (None, {}) after --help."""
    if "-h" in argv or "--help" in argv:
        print(usage)
        return None, {}
    words = [part for word in argv for part in (word.split("=", 1) if word.startswith("--") else [word])]
    folders, options = [], {}
    while words:
        word = words.pop(0)
        if not word.startswith("-"):
            folders.append(word)
        elif word[2:] in names and word[2:] not in options and words:
            options[word[2:]] = words.pop(0)
        else:
            raise ConfigError(f"{word}: not understood\n{usage}")
    if len(folders) != 1:
        raise ConfigError(f"expected one folder, got {len(folders)}\n{usage}")
    return folders[0], options


def _convert(argv):
    """Prints the YAML, or writes it to a file, and its notes as comments in it."""
    usage = "usage: fastdpo convert THEIRS.yaml [--output OURS.yaml]   (default: printed)"
    if "-h" in argv or "--help" in argv:
        print(usage)
        return
    if len(argv) not in (1, 3) or argv[0].startswith("-") or argv[1:2] not in ([], ["--output"]):
        raise ConfigError(usage)
    from pathlib import Path

    from fastdpo.config.reading import read_yaml
    from fastdpo.convert.convert import converted

    text = converted(read_yaml(Path(argv[0])))
    if len(argv) == 1:
        print(text, end="")
        return
    path = Path(argv[2])
    if path.exists():
        raise ConfigError(f"--output: {path} exists already; remove it, or name another file")
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--output: cannot write {path}: {error}") from None
    print("".join(line[2:] + "\n" for line in text.splitlines() if line.startswith("# ")), end="")


def _doctor(argv):
    from fastdpo.doctor.command import main as doctor

    return doctor(argv)


def _objectives(argv):
    if argv:
        raise ConfigError(f"objectives takes no arguments, got: {' '.join(argv)}")
    from rich.console import Console

    from fastdpo.objectives import table

    table(Console())


def _demo(argv):
    if "-h" in argv or "--help" in argv:
        print("usage: fastdpo demo [OUTPUT_DIR]   (default: runs/demo)")
        return
    if len(argv) > 1 or any(word.startswith("-") for word in argv):
        raise ConfigError(f"demo takes one folder at most, got: {' '.join(argv)}")
    from fastdpo.demo import demo

    demo(argv[0] if argv else "runs/demo")


COMMANDS = {
    "train": _train,
    "ref": _ref,
    "data": _data,
    "plan": _plan,
    "merge": _merge,
    "push": _push,
    "convert": _convert,
    "doctor": _doctor,
    "objectives": _objectives,
    "demo": _demo,
}

if __name__ == "__main__":
    sys.exit(main())
