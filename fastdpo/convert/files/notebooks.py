"""Scripts and notebooks of Python as configs: what they give to FastLanguageModel, LoraConfig, DPOConfig,
DPOTrainer and the like, read and never run."""

import ast
import json
import re
from pathlib import Path

from fastdpo.convert.draft import Unresolved
from fastdpo.convert.files.literals import Code, name_of
from fastdpo.errors import ConfigError

_TRAINERS = ("DPOTrainer", "ORPOTrainer", "CPOTrainer", "KTOTrainer", "BCOTrainer")
_LOSSES = {"ORPOTrainer": "orpo", "KTOTrainer": "kto", "BCOTrainer": "bco"}
_OF_CPO = {"sigmoid": "cpo", "simpo": "simpo"}
_PASSED = "model ref_model model_ref tokenizer processing_class train_dataset args peft_config".split()
_SECRET = "token use_auth_token hub_token".split()
_ROWS = "map filter select take skip train_test_split rename_column rename_columns".split()
# transformers' and peft's own defaults, where TRL's tables have others
_ARGUMENTS = {"learning_rate": 5e-5}
_MORE_ARGUMENTS = {  # beside Unsloth, which has its own for TRL's configs only
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 1,
    "warmup_ratio": 0.0,
    "weight_decay": 0.0,
    "optim": "adamw_torch",
}
_LORA = {"use_peft": True, "lora_r": 8, "lora_alpha": 8, "lora_dropout": 0.0}
_RENAMED = {
    "r": "lora_r",
    "target_modules": "lora_target_modules",
    "modules_to_save": "lora_modules_to_save",
    "task_type": "lora_task_type",
    "revision": "model_revision",
    "model_name": "model_name_or_path",
}


def read_code(path: Path) -> dict:
    """The keys of a script (.py) or notebook (.ipynb), by TRL's and Unsloth's names for them. Raises
    ConfigError."""
    try:
        text = path.read_text(encoding="utf-8")
        tree = ast.parse(_code(text) if path.suffix == ".ipynb" else text)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the config file {path}: {error}") from None
    except (ValueError, KeyError, TypeError, SyntaxError) as error:
        raise ConfigError(f"{path} cannot be read as Python: {error}") from None
    code = Code(tree)
    trainers = [call for call in code.calls if name_of(call) in _TRAINERS]
    if len({name_of(call) for call in trainers}) != 1:
        called = " and ".join(sorted({name_of(call) for call in trainers})) or "none of them"
        raise ConfigError(f"{path}: one of {', '.join(_TRAINERS)} is to be called; here it is {called}")
    return _keys(code, trainers)


def _code(text: str) -> str:
    """The code of a notebook, without its magics."""
    notebook = json.loads(text)
    if "cells" not in notebook:
        raise ValueError("no notebook of version 4, which has cells")
    cells = [cell["source"] for cell in notebook["cells"] if cell["cell_type"] == "code"]
    sources = ["".join(source) for source in cells]
    python = [source for source in sources if not re.match(r"\s*%%(?!capture|time)", source)]
    return re.sub(r"(?m)^([ \t]*)[!%](.*\\\n)*.*$", r"\1pass", "\n".join(python))


def _owner(call: ast.Call) -> str:
    """`x` of x.f(...)."""
    return getattr(call.func.value, "id", "") if isinstance(call.func, ast.Attribute) else ""


def _keys(code: Code, trainers: list[ast.Call]) -> dict:
    end = trainers[0].lineno
    before = [call for call in code.calls if call.lineno < end]  # after it the model is loaded to be tried

    def called(*names: str, of: str = "") -> list[ast.Call]:
        fits = lambda call: name_of(call) in names and re.fullmatch(of or ".*", _owner(call))
        return list(filter(fits, before)) or list(filter(fits, code.calls))

    kind, passed = name_of(trainers[0]), code.said(trainers, "model", "ref_model", "args")
    loaded = called("from_pretrained", of=r"Fast\w*Model|\w*ForCausalLM")
    is_unsloth = any(_owner(call).startswith("Fast") for call in loaded)
    nodes = _arguments(trainers[0])
    reference = code.made(nodes.get("ref_model"))
    models = [call for call in loaded if call not in reference] or loaded
    said = code.said(models, "model_name", leave_out=("quantization_config",))
    said |= code.said(called("BitsAndBytesConfig"))
    lora = code.said(called("get_peft_model", "LoraConfig"), "model", leave_out=_PASSED)
    configs = [call for trainer in trainers for call in code.made(_arguments(trainer).get("args"))]
    own = {key: value for key, value in passed.items() if key not in _PASSED}
    said |= lora | own | code.said(configs, "output_dir")
    if isinstance(passed.get("model"), str) and not isinstance(passed["model"], Unresolved):
        said.setdefault("model_name", passed["model"])
    if nodes.get("ref_model") is not None and passed.get("ref_model") is not None:
        if code.said(reference, "model_name").get("model_name", ...) != said.get("model_name"):
            said["ref_model"] = str(passed["ref_model"])
    said = _with_defaults(said, is_unsloth, bool(lora), {name_of(call) for call in configs})
    said = {key: value for key, value in said.items() if key not in _SECRET}
    return said | _loss(kind, said) | _rows(code, called, passed) | _template(code, called)


def _arguments(trainer: ast.Call) -> dict[str, ast.expr]:
    given = {keyword.arg: keyword.value for keyword in trainer.keywords if keyword.arg}
    given = dict(zip(("model", "ref_model", "args"), trainer.args)) | given
    return {"ref_model": given["model_ref"]} | given if "model_ref" in given else given


def _with_defaults(said: dict, is_unsloth: bool, has_lora: bool, configs: set[str]) -> dict:
    """By the names of the tool that it is, and what the classes say by themselves."""
    arguments = _ARGUMENTS | (_MORE_ARGUMENTS if is_unsloth else {}) if "TrainingArguments" in configs else {}
    if is_unsloth:
        return arguments | said
    said = {_RENAMED.get(key, key): value for key, value in said.items()}
    if said.pop("bnb_4bit_use_double_quant", None):
        said["use_bnb_nested_quant"] = True
    return arguments | (_LORA if has_lora else {}) | said


def _loss(trainer: str, said: dict) -> dict:
    if trainer == "CPOTrainer":
        loss = said.get("loss_type", "sigmoid")
        if loss not in _OF_CPO:
            raise ConfigError(
                f"loss_type: CPOTrainer's {loss} is not to be had; known are {', '.join(_OF_CPO)}"
            )
        return {"loss_type": _OF_CPO[loss]}
    return {"loss_type": said.get("loss_type", _LOSSES[trainer])} if trainer in _LOSSES else {}


def _rows(code: Code, called, passed: dict) -> dict:
    """Where the rows are that are trained on, and that code changes them."""
    held_out = lambda split: re.search("test|val", str(split))
    loads = called("load_dataset", "load_from_disk")
    loads = [call for call in loads if not held_out(code.said([call]).get("split"))] or loads
    said = code.said(loads, "path", "name")
    name, files, split = said.get("path"), said.get("data_files"), said.get("split")
    if isinstance(files, dict | list) and len(files) == 1:
        (files,) = files.values() if isinstance(files, dict) else files
    parts = [node for node in code.nodes if isinstance(node, ast.Subscript) and node.value in loads]
    splits = {part for part in (code.or_text(node.slice) for node in parts) if not held_out(part)}
    if split is None and len(splits) == 1:
        (split,) = splits
    if files is not None:
        data = files if split in (None, "train") else f"{files}#{split}"
        out = {"data": Unresolved(data) if Unresolved in (type(files), type(split)) else data}
    elif loads and name_of(loads[0]) == "load_from_disk":
        out = {"data": name}
    elif isinstance(name, Unresolved):
        out = {"dataset_name": name}
    else:
        folder = said.get("data_dir")
        config = folder if "/" in str(folder) else said.get("name")
        out = {"dataset_name": name, "dataset_config": config, "dataset_train_split": split}
        out["data_dir"] = None if "/" in str(folder) else folder
    changed = [ast.unparse(call.func).rpartition(".")[2] for call in called(*_ROWS, of=r"(?!tokenizer).*")]
    out["map"] = ", ".join(dict.fromkeys(changed)) or None
    if passed.get("eval_dataset") is not None:
        out |= {"eval_dataset": str(passed["eval_dataset"]), "dataset_test_split": False}
    return {key: value for key, value in out.items() if value is not None}


def _template(code: Code, called) -> dict:
    given = code.said(called("get_chat_template"), "tokenizer", "chat_template").get("chat_template")
    of = lambda node: [t.attr for t in getattr(node, "targets", ()) if isinstance(t, ast.Attribute)]
    if isinstance(given, str) and not isinstance(given, Unresolved):
        return {"get_chat_template": given}
    is_set = given is not None or any("chat_template" in of(node) for node in code.nodes)
    return {"tokenizer.chat_template": "the code's own"} if is_set else {}
