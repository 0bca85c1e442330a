"""The model card: README.md beside the weights, with the run's settings and metrics and nothing private."""

import json
import re
from pathlib import Path

from huggingface_hub import ModelCardData
from rich.console import Console
from rich.markup import escape

from fastdpo.config.keys import FIELDS
from fastdpo.config.reading import to_word
from fastdpo.errors import ConfigError
from fastdpo.report.history import RunHistory, read_run
from fastdpo.report.story import stage_tables

SETTINGS = "adapter_config.json"  # what makes a folder a peft adapter
_HUB_NAME = re.compile(r"([\w.-]+/[\w.-]+)(:[\w.-]+)?")
_FILES = (".jsonl", ".json", ".csv", ".parquet")
_NO_SETTINGS = set(  # told elsewhere in the card, or of this machine alone
    "model adapter data eval_data output_dir push_to_hub reference_cache report_to logging_steps save_steps "
    "save_total_limit resume overwrite samples stages".split()
)
_VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # what its --max-lora-rank takes
_HERE = "PATH_OR_REPOSITORY"  # of the folder the card lies in


def model_folder(source: str | Path, key: str) -> Path:
    """The model of a run folder, or the model folder that `source` is itself. Raises ConfigError."""
    for folder in (Path(source) / "model", Path(source)):
        if (folder / "config.json").exists() or (folder / SETTINGS).exists():
            return folder
    missing = "holds no model" if Path(source).exists() else "does not exist"
    raise ConfigError(f"{key}: {source} {missing}; name a run folder, or its model/")


def run_of(folder: Path) -> Path | None:
    """The run folder that a model folder is the `model/` of."""
    folder = Path(folder).resolve()
    return folder.parent if folder.name == "model" and (folder.parent / "config.yaml").exists() else None


def add_card(run: Path | None, folder: Path, console: Console, adapter: Path | None = None) -> None:
    """Writes README.md into a folder that holds a model, in place of peft's, which names local paths.

    `run` is where the model was trained, if known; `adapter` what was merged into it. A card that cannot be
    made costs no model: it is said, and that is all.
    """
    path = Path(folder) / "README.md"
    path.unlink(missing_ok=True)
    try:
        path.write_text(model_card(read_run(run) if run else None, folder, adapter), encoding="utf-8")
    except Exception as error:
        why = escape(f"{type(error).__name__}: {error}")
        console.print(f"[yellow]README.md, the model card, was not written: {why}", highlight=False)


def model_card(history: RunHistory | None, folder: Path, adapter: Path | None = None) -> str:
    """The card's text, for a folder of weights; see `add_card`."""
    config = history.config if history else {}
    settings = adapter_settings(folder) or (adapter_settings(adapter) if adapter else {})
    base = base_of(settings) or config.get("model") or ""
    objectives = [str(s["objective"]) for s in history.stages()] if history else []
    is_adapter = (Path(folder) / SETTINGS).exists()
    name = None if adapter else config.get("push_to_hub")
    tags = ["fastdpo", *_tags(objectives), *(["lora"] if is_adapter else [])]
    data = ModelCardData(
        base_model=base if _is_on_hub(base) else None,
        datasets=_data_set(config.get("data")),
        library_name="peft" if is_adapter else "transformers",
        pipeline_tag="text-generation",
        tags=tags,
    )
    parts = [
        f"---\n{data.to_yaml()}\n---",
        f"# {_title(name, history, adapter)}",
        _about(config, settings, base),
    ]
    if adapter:
        parts[-1] += f" The LoRA is merged into the weights{_dtype(folder)}, by `fastdpo merge`."
    if history:
        parts += [_training(history, objectives), *_metrics(history)]
    parts += [_use(name or _HERE, settings, base, is_adapter)]
    if history:
        parts += [_versions(history)]
    return "\n\n".join(part for part in parts if part) + "\n"


def base_of(settings: dict) -> str:
    """The base model that an adapter_config.json names: a hub name, a path, or nothing."""
    return settings.get("base_model_name_or_path") or ""


def adapter_settings(folder: Path) -> dict:
    """A folder's adapter_config.json; empty where it holds no adapter."""
    path = Path(folder) / SETTINGS
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def _dtype(folder: Path) -> str:
    config = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
    return f", in {config['dtype']}" if config.get("dtype") else ""


def _is_on_hub(name: str) -> bool:
    return (
        bool(re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name)) and not Path(name).exists() and name[0] not in "./~"
    )


def _data_set(spec) -> str | None:
    """The hub's name of a data set, where it is one."""
    name = str(spec or "").partition("#")[0]
    found = _HUB_NAME.fullmatch(name)
    local = not found or Path(found[1]).exists() or Path(name).exists() or name.endswith(_FILES)
    return None if local or name[0] in ".~" else found[1]


def _public(path) -> str:
    """A hub name as it is; of a local path its last part (of RUN/model, two)."""
    text = str(path)
    if _is_on_hub(text) or _data_set(text):
        return text
    name, _, split = text.partition("#")
    parts = [part for part in Path(name).parts if part not in ("/", ".", "..", "~")]
    kept = parts[-2:] if parts[-1:] == ["model"] else parts[-1:]
    return "/".join(kept) + (f"#{split}" if split else "")


def _link(name: str, kind: str = "") -> str:
    return f"[{name}](https://huggingface.co/{kind}{name})" if _is_on_hub(name) else f"`{_public(name)}`"


def _tags(objectives: list[str]) -> list[str]:
    return list(dict.fromkeys("dpo" if name == "sigmoid" else name for name in _names(objectives)))


def _names(objectives: list[str]) -> list[str]:
    """The losses in the stages' objectives, which may be weighted sums of several."""
    from fastdpo.objectives.catalogue import CATALOGUE

    return [word for text in objectives for word in re.findall(r"\w+", text) if word in CATALOGUE]


def _title(name: str | None, history: RunHistory | None, adapter: Path | None) -> str:
    if not name:
        name = history.run.resolve().name if history else _public(adapter)
        name += ", merged" if adapter else ""
    return name.rpartition("/")[2]


def _about(config: dict, settings: dict, base: str) -> str:
    """What was trained on what, in a sentence or two."""
    lora = f" and a LoRA of rank {settings['r']}" if settings else ""
    on = _data_set(config.get("data"))
    source = _link(on, "datasets/") if on else f"`{_public(config['data'])}`" if config.get("data") else ""
    text = f"{_link(base)}{lora}, trained with fastdpo" + (f" on {source}." if source else ".")
    if config.get("adapter"):
        text += f" It started from the adapter `{_public(config['adapter'])}`."
    if config.get("load_in_4bit"):
        text += " The base was in 4 bits (NF4) while it trained, and for any metrics below."
    return text


def _training(history: RunHistory, objectives: list[str]) -> str:
    """Each stage in a line, then the settings that are not fastdpo's defaults."""
    from fastdpo.objectives.catalogue import CATALOGUE

    lines = ["## Training", ""]
    for number, stage in enumerate(history.stages(), 1):
        sizes = [
            f"{stage[key]:,} {key}" for key in ("steps", "groups", "pairs", "responses") if stage.get(key)
        ]
        numbered = f"Stage {number}: " if len(objectives) > 1 else ""
        lines.append(f"- {numbered}`{stage['objective']}`, {', '.join(sizes).replace('groups', 'prompts')}")
    for name in dict.fromkeys(_names(objectives)):
        source = CATALOGUE[name].source
        paper = (
            f" ([{source}](https://arxiv.org/abs/{source}))" if re.fullmatch(r"\d{4}\.\d{5}", source) else ""
        )
        lines.append(f"- `{name}`: {CATALOGUE[name].about}{paper}")
    lines += _rows_used(history)
    rows = [
        (name, value)
        for name, value in history.config.items()
        if name not in _NO_SETTINGS and (name not in FIELDS or value != FIELDS[name].default)
    ]
    for number, stage in enumerate(history.config.get("stages") or [], 1):
        rows.append((f"stage {number}", ", ".join(f"{key}: {value}" for key, value in stage.items())))
    if rows:
        lines += ["", "Settings other than the defaults:", "", "| key | value |", "|---|---|"]
        lines += [f"| `{name}` | {_cell(name, value)} |" for name, value in rows]
    return "\n".join(lines)


def _rows_used(history: RunHistory) -> list[str]:
    """Which rows were trained on, and which were held out."""
    kept = ((history.data.get("data") or {}).get("kept") or {}).get("rows")
    held, out = history.config.get("eval_data"), []
    if kept:
        out.append(
            f"- {kept:,} rows of the data could be used (`fastdpo data` counts what becomes of the others)"
        )
    if isinstance(held, float):
        out.append(f"- a share of {held:g} of them, chosen by seed, was held out")
    elif held:
        out.append(f"- held out: `{_public(held)}`")
    return out


def _cell(name: str, value) -> str:
    is_path = name == "chat_template" or (isinstance(value, str) and value.startswith(("/", "~")))
    text = " ".join(to_word(_public(value) if is_path else value).split())
    return f"`{text}`".replace("|", "\\|")


def _metrics(history: RunHistory) -> list[str]:
    """A table a stage: TRL's names, before and after, and at the best held-out loss."""
    out = []
    for table in stage_tables(history):
        prefix = "eval_" if table["held_out"] else ""
        title = "Held-out metrics" if table["held_out"] else "Metrics on the training rows"
        if len(history.stages()) > 1:
            title += f", stage {table['stage'] + 1} ({table['objective']})"
        steps = zip(("before", "best", "after"), table["steps"])
        columns = [(name, f"step {int(step)}") for name, step in steps if step is not None]
        lines = [f"## {title}", "", f"| metric | {' | '.join(head for _, head in columns)} |"]
        lines.append(f"|---|{'--:|' * len(columns)}")
        for row in table["rows"]:
            values = " | ".join(str(row.get(name) or "") for name, _ in columns)
            lines.append(f"| `{prefix}{row['metric']}` | {values} |")
        if table["held_out"] and history.config.get("load_best"):
            lines += ["", "The stage ended with the weights of the lowest held-out loss, not with the last."]
        out.append("\n".join(lines))
    return out


def _use(name: str, settings: dict, base: str, is_adapter: bool) -> str:
    """How to load it, in transformers or peft, and in vLLM."""
    if not is_adapter:
        code = ["from transformers import AutoModelForCausalLM, AutoTokenizer", ""]
        code += [f'model = AutoModelForCausalLM.from_pretrained("{name}")']
    elif _is_on_hub(base):
        code = ["from peft import AutoPeftModelForCausalLM", "from transformers import AutoTokenizer", ""]
        code += [f'model = AutoPeftModelForCausalLM.from_pretrained("{name}")']
    else:
        code = [
            "from peft import PeftModel",
            "from transformers import AutoModelForCausalLM, AutoTokenizer",
            "",
        ]
        code += [f'base = AutoModelForCausalLM.from_pretrained("{_public(base)}")  # where you have it']
        code += [f'model = PeftModel.from_pretrained(base, "{name}")']
    code += [f'tokenizer = AutoTokenizer.from_pretrained("{name}")']
    text = "\n".join(["## Use", "", "```python", *code, "```"])
    if not is_adapter:
        return text
    if why := unserved_by_vllm(settings):
        return f"{text}\n\nvLLM serves it merged only (it has {', '.join(why)}): `fastdpo merge {_HERE}`."
    rank = next(rank for rank in _VLLM_RANKS if rank >= settings["r"])
    serve = f"vllm serve {_public(base)} --enable-lora --max-lora-rank {rank} --lora-modules policy={name}"
    return f"{text}\n\n```bash\n{serve}\n```"


def unserved_by_vllm(settings: dict) -> list[str]:
    """What of an adapter_config.json keeps vLLM from serving the adapter on its base as it was trained: its
    vllm/lora/peft_helper.py refuses the first four, and reads one rank and one alpha for all modules."""
    names = (
        "use_dora",
        "modules_to_save",
        "rank_pattern",
        "alpha_pattern",
        "lora_bias",
        "trainable_token_indices",
    )
    found = [name for name in names if settings.get(name)]
    if settings.get("bias", "none") != "none":
        found.append(f"bias: {settings['bias']}")
    if settings["r"] > _VLLM_RANKS[-1]:
        found.append(f"a rank over {_VLLM_RANKS[-1]}")
    return found


def _versions(history: RunHistory) -> str:
    started = [event for event in history.happened("start", "resume") if event.get("versions")]
    if not started:
        return ""
    versions = ", ".join(f"{name} {version}" for name, version in started[-1]["versions"].items())
    return f"## Versions\n\n{versions}"
