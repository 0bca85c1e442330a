"""The model card: README.md beside the weights, with the run's settings and metrics and nothing private."""

import json
import re
from pathlib import Path

from huggingface_hub import ModelCardData
from jinja2 import Template
from rich.console import Console
from rich.markup import escape

from fastdpo.config.reading import to_word
from fastdpo.data.chat.named import file_of, is_text
from fastdpo.errors import ConfigError
from fastdpo.files.names import gguf_path, is_gguf
from fastdpo.report.history import RunHistory, read_run
from fastdpo.report.rounds import kl_unknown, round_table, spec_of
from fastdpo.report.story import stage_tables
from fastdpo.sampling.scorers import is_model
from fastdpo.values import as_list

SETTINGS = "adapter_config.json"  # what makes a folder a peft adapter
_FILES = (".jsonl", ".json", ".csv", ".parquet")
_NO_SETTINGS = set(  # told elsewhere in the card, or of this machine alone
    "model adapter data eval_data output_dir push_to_hub data_cache reference_cache report_to logging_steps "
    "save_steps save_total_limit resume overwrite samples stages rounds sample reward reference".split()
)
_PROCESSOR = ("processor_config.json", "preprocessor_config.json")  # of a model that sees images
_VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # what its --max-lora-rank takes


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
    base, gguf = _in_gguf(base_of(settings) or config.get("model") or "")
    losses = _losses(history) if history else {}
    is_adapter = (Path(folder) / SETTINGS).exists()
    name = None if adapter else config.get("push_to_hub")
    rewards = settings.get("task_type") == "SEQ_CLS" or _is_classifier(Path(folder) / "config.json")
    images = any((Path(folder) / name).exists() for name in _PROCESSOR)
    loss_tags = ["dpo" if loss == "sigmoid" else loss for loss in losses]
    sources = as_list(config.get("data") or None)
    on_hub = [name for name in map(_data_set, sources) if name]
    data = ModelCardData(
        base_model=base if _is_on_hub(base) else None,
        datasets=on_hub or None,
        library_name="peft" if is_adapter else "transformers",
        pipeline_tag="text-classification"
        if rewards
        else "image-text-to-text"
        if images
        else "text-generation",
        tags=["fastdpo", *(["reward-model"] if rewards else loss_tags), *(["lora"] if is_adapter else [])],
    )
    text = Path(__file__).with_name("model_card.md.jinja").read_text(encoding="utf-8")
    return Template(text, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True).render(
        metadata=data.to_yaml(),
        title=_title(name, history, adapter),
        trained_on=", ".join(map(_data_link, sources)),
        rows_kept=history.rows_kept if history else None,
        merged=_read_json(Path(folder) / "config.json") if adapter else None,
        why_not_vllm=unserved_by_vllm(settings) if is_adapter else [],
        vllm_ranks=_VLLM_RANKS,
        **dict(name=name, history=history, config=config, settings=settings, losses=losses),
        **dict(base=base, gguf=gguf, images=images, rewards=rewards),
        **dict(is_adapter=is_adapter, is_on_hub=_is_on_hub, public=_public, link=_link),
        **dict(changed_settings=_changed_settings, tables=_tables, rounds=_rounds(history)),
    )


def _is_classifier(path: Path) -> bool:
    kinds = _read_json(path).get("architectures") or [] if path.exists() else []
    return any(kind.endswith("ForSequenceClassification") for kind in kinds)


def base_of(settings: dict) -> str:
    """The base model that an adapter_config.json names: a hub name, a path, or nothing."""
    return settings.get("base_model_name_or_path") or ""


def adapter_settings(folder: Path) -> dict:
    """A folder's adapter_config.json; empty where it holds no adapter."""
    path = Path(folder) / SETTINGS
    return _read_json(path) if path.exists() else {}


def _read_json(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def _in_gguf(base: str) -> tuple[str, str]:
    """(folder or repository, file in it) of a GGUF; (base, nothing) of any other."""
    base = gguf_path(base)
    if not is_gguf(base):
        return base, ""
    place, colon, file = base.rpartition(":")
    return (place, file) if colon and not Path(base).exists() else (str(Path(base).parent), Path(base).name)


def _is_on_hub(name: str) -> bool:
    return bool(re.fullmatch(r"(?!\.)[\w.-]+(/[\w.-]+)?", name)) and not Path(name).exists()


def _data_set(spec) -> str | None:
    """The hub's name of a data set, where it is one."""
    name = str(spec or "").partition("#")[0]
    found = re.fullmatch(r"(?!\.)([\w.-]+/[\w.-]+)(:[\w.-]+)?", name)
    local = not found or Path(found[1]).exists() or Path(name).exists() or name.endswith(_FILES)
    return None if local or not found else found[1]


def _data_link(spec: str) -> str:
    """A data set as the card names it: a link to the hub's, of a local path its last part."""
    name = _data_set(spec)
    return _link(name, "datasets/") if name else f"`{_public(spec)}`"


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


def _losses(history: RunHistory) -> dict:
    """Name -> catalogue entry of the losses in the stages' objectives, which may be weighted sums."""
    from fastdpo.objectives.catalogue import CATALOGUE

    words = [word for stage in history.stages() for word in re.findall(r"\w+", str(stage["objective"]))]
    return {word: CATALOGUE[word] for word in words if word in CATALOGUE}


def _title(name: str | None, history: RunHistory | None, adapter: Path | None) -> str:
    if not name:
        name = history.run.resolve().name if history else _public(adapter)
        name += ", merged" if adapter else ""
    return name.rpartition("/")[2]


def _rounds(history: RunHistory | None) -> dict | None:
    """How the model was sampled, scored and what it was held against; None of a run without rounds."""
    if history is None or not history.config.get("rounds"):
        return None
    reward = str(history.config.get("reward"))
    file, colon, function = reward.rpartition(":") if ".py:" in reward else (reward, "", "")
    return {
        "count": history.config["rounds"],
        "spec": spec_of(history),
        "reward": _link(file) if is_model(reward) else f"`{_public(file)}{colon}{function}`",
        "moves": history.reference_moves,
        "table": round_table(history),
        "kl_unknown": kl_unknown(history),
    }


def _changed_settings(history: RunHistory) -> list[tuple[str, str]]:
    """(key, value as a table's cell) of the settings that are not fastdpo's defaults, then of the stages."""
    rows = []
    for name, value in history.settings().items():
        is_path = isinstance(value, str) and value.startswith(("/", "~"))
        if name == "chat_template":
            is_path, value = file_of(value) is not None, "Jinja text" if is_text(value) else value
        if name not in _NO_SETTINGS:
            rows.append((name, to_word(_public(value) if is_path else value)))
    for number, stage in enumerate(history.config.get("stages") or [], 1):
        rows.append((f"stage {number}", ", ".join(f"{key}: {value}" for key, value in stage.items())))
    return [(name, " ".join(text.split()).replace("|", "\\|")) for name, text in rows]


def _tables(history: RunHistory) -> list[dict]:
    """Each stage's metrics by TRL's names, before and after, and at the best held-out loss."""
    out = []
    for table in stage_tables(history):
        steps = zip(("before", "best", "after"), table["steps"])
        columns = {name: f"step {int(step)}" for name, step in steps if step is not None}
        rows = [(row["metric"], [row[name] for name in columns]) for row in table["rows"]]
        out.append(table | {"heads": columns.values(), "rows": rows})
    return out


def unserved_by_vllm(settings: dict) -> list[str]:
    """What of an adapter_config.json keeps vLLM from serving the adapter on its base as it was trained: its
    vllm/lora/peft_helper.py refuses the first four, and reads one rank and one alpha for all modules."""
    names = "use_dora modules_to_save rank_pattern alpha_pattern lora_bias trainable_token_indices"
    found = [name for name in names.split() if settings.get(name)]
    if settings.get("bias", "none") != "none":
        found.append(f"bias: {settings['bias']}")
    if settings["r"] > _VLLM_RANKS[-1]:
        found.append(f"a rank over {_VLLM_RANKS[-1]}")
    return found
