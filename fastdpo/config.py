"""One flat config: YAML keys, flags, `--help` and the README's table all come from the fields below."""

import dataclasses
import math
import typing
from dataclasses import dataclass, field

from fastdpo.errors import ConfigError
from fastdpo.key_types import as_type, nearest


def _key(default, doc):
    return field(default=default, metadata={"doc": doc})


@dataclass(frozen=True)
class Config:
    """Everything a run depends on. Unknown keys are errors; see `fastdpo train --help`."""

    model: str = _key("", "model to train: a folder or a hub name (required)")
    adapter: str | None = _key(
        None, "a peft adapter folder to start from: it is trained on, and the reference is model + adapter"
    )
    data: str = _key(
        "",
        "preference rows (required): a .jsonl/.json/.csv/.parquet file, a folder, or a hub name; "
        "NAME:CONFIG picks a hub configuration, FOLDER:NAME a data set of FOLDER/dataset_info.json, #SPLIT a "
        "split, as in data.jsonl#train[:100]",
    )
    data_format: str | dict | None = _key(
        None,
        "how rows are read where their columns do not tell: a format's name (see the README's table), or "
        "{our column: the rows' own name, ...}, as in {prompt: question, chosen: better, rejected: worse}",
    )
    eval_data: str | float | None = _key(
        None, "held-out rows: like data, or a fraction of data (0.05) split off by seed"
    )
    output_dir: str = _key("runs/fastdpo", "the run folder")
    chat_template: str | None = _key(None, "a Jinja file that replaces the tokenizer's chat template")
    objective: str | dict | list = _key(
        "sigmoid",
        "the loss: sigmoid is DPO, sft trains on the chosen responses, `fastdpo objectives` lists all; "
        "or several with their weights: {sigmoid: 0.8, sft: 0.2}",
    )
    objective_args: dict | None = _key(None, "the objective's options, as `fastdpo objectives` lists them")
    beta: float | None = _key(
        None, "strength of the pull towards the reference (default: the objective's own, mostly 0.1)"
    )
    label_smoothing: float | None = _key(
        None, "the assumed share of flipped pairs, 0 <= x < 0.5, where the objective reads it"
    )
    pairs: str = _key(
        "all",
        "the pairs of a ranked row that train: all (every pair whose scores differ), best_worst, or easy, "
        "medium, hard: the best response against the last, the middle one, the second (Curry-DPO's stages)",
    )
    pair_gap: str = _key(
        "rating", "what easy and hard are told by: the rating, or logp (how far apart the reference has them)"
    )
    flip_pairs: float = _key(
        0.0,
        "noise, to study robustness: this share of the training pairs is flipped, by seed; never held-out",
    )
    learning_rate: float = _key(1e-6, "peak learning rate (1e-5 or more suits LoRA)")
    warmup_steps: float = _key(0, "linear warm-up steps; below 1, a share of all steps")
    lr_scheduler_type: str = _key(
        "linear", "schedule, by transformers' names: linear, cosine, constant_with_warmup, ..."
    )
    optim: str = _key("adamw_torch_fused", "optimizer: adamw_torch_fused (torch's AdamW)")
    weight_decay: float = _key(0.0, "AdamW's decay of matrices (never of norms and biases)")
    max_grad_norm: float = _key(1.0, "clip the gradient to this norm; 0 switches clipping off")
    batch_size: int = _key(8, "prompt groups an optimizer step")
    max_tokens: int = _key(
        8192, "token cap of a microbatch: memory only, never the result; a larger group goes alone"
    )
    max_length: int = _key(1024, "longest prompt + response in tokens")
    truncation: str = _key(
        "keep_start",
        "rows over max_length: keep_start cuts the response's end, keep_end the prompt's start, "
        "drop leaves the row out; all counted",
    )
    num_epochs: float = _key(1.0, "passes over the data")
    max_steps: int | None = _key(None, "stop after this many optimizer steps, whatever num_epochs")
    eval_steps: int | None = _key(None, "evaluate every so many steps (always at start and end)")
    logging_steps: int = _key(10, "write metrics every so many steps")
    save_steps: int | None = _key(
        100, "write a checkpoint every so many steps (always at a stage's end, and when stopped)"
    )
    save_total_limit: int = _key(2, "how many of the newest checkpoints to keep, besides the best one")
    load_best: bool = _key(
        False,
        "end a stage with its checkpoint of the lowest held-out loss, not with the last; "
        "evaluates at every checkpoint",
    )
    report_to: str | list[str] | None = _key(
        None, "where metrics go besides metrics.jsonl: tensorboard, wandb, trackio (any that are installed)"
    )
    samples: int = _key(
        4, "held-out prompts (or training ones) completed before and after, for the report; 0 for none"
    )
    seed: int = _key(0, "seed of the data order and of LoRA's start")
    dtype: str = _key(
        "auto",
        "compute dtype: bf16, fp32, or auto (bf16 where the GPU has it, else fp32); "
        "trained weights are kept in fp32",
    )
    gradient_checkpointing: bool = _key(False, "recompute layers in the backward to save memory")
    lora_rank: int | None = _key(None, "train a LoRA of this rank instead of all weights")
    lora_alpha: float | None = _key(None, "LoRA's alpha (default: twice the rank)")
    lora_target_modules: str | list[str] = _key(
        "all-linear", "modules that get a LoRA: names, or all-linear (all but the lm_head)"
    )
    reference_cache: str = _key(
        "auto",
        "SQLite file that keeps the reference's log-probs for every later run with the same start weights; "
        "auto is ~/.cache/fastdpo/reference.sqlite (or under $XDG_CACHE_HOME), off computes them anew, "
        "whatever columns the data brings",
    )
    strict: bool = _key(False, "stop at the first dropped, truncated, identical or malformed row")
    resume: bool = _key(
        False, "go on from the newest whole checkpoint in output_dir (from the start where there is none)"
    )
    overwrite: bool = _key(
        False, "replace the run that output_dir already holds (with resume: only where it cannot go on)"
    )
    stages: list[dict] | None = _key(
        None,
        "runs one after the other, each a set of keys that override these (objective, beta, "
        "learning_rate, num_epochs, ...); each starts from, and refers to, the one before",
    )

    def __post_init__(self):
        for name in ("model", "data", "output_dir"):
            if not getattr(self, name):
                raise ConfigError(f"{name}: missing. Give it in the YAML file or as --{name} VALUE")
        for name in FIELDS:
            value = getattr(self, name)
            if isinstance(value, float) and not math.isfinite(value):
                raise ConfigError(f"{name}: {value} is not a finite number")
        for name, low in _AT_LEAST.items():
            value = getattr(self, name)
            if value is not None and value < low:
                raise ConfigError(f"{name}: {value} is below {low}")
        if self.warmup_steps > 1 and self.warmup_steps != int(self.warmup_steps):
            raise ConfigError(
                f"warmup_steps: {self.warmup_steps} is neither a whole number nor a share below 1"
            )
        if self.num_epochs == 0:
            raise ConfigError("num_epochs: 0 would train nothing")
        if self.seed >= 2**32:
            raise ConfigError(f"seed: {self.seed} is not below 2^32")
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise ConfigError(f"{name}: {getattr(self, name)!r} is not one of {', '.join(choices)}")
        if self.load_best and self.eval_data is None:
            raise ConfigError("load_best: needs held-out rows to judge by; set eval_data")
        unknown = [name for name in self.trackers if name not in _TRACKERS]
        if unknown:
            raise ConfigError(f"report_to: {unknown[0]!r} is not one of {', '.join(_TRACKERS)}")
        if not 0 <= (self.label_smoothing or 0) < 0.5:
            raise ConfigError(f"label_smoothing: {self.label_smoothing} is not in [0, 0.5)")
        if self.flip_pairs > 1:
            raise ConfigError(f"flip_pairs: {self.flip_pairs} is a share, not over 1")
        if isinstance(self.eval_data, float) and not 0 < self.eval_data < 1:
            raise ConfigError(
                f"eval_data: {self.eval_data} is neither a data set nor a fraction between 0 and 1"
            )
        from fastdpo.layouts import layout_of  # it reads this module itself

        layout_of(self.data_format)
        self.per_stage()  # a bad stage shows before any work

    @property
    def trackers(self) -> list[str]:
        """The names in report_to."""
        names = [self.report_to] if isinstance(self.report_to, str) else self.report_to or []
        return [name for name in names if name != "none"]

    def per_stage(self) -> list["Config"]:
        """One config a stage; without `stages`, this one."""
        plain = dataclasses.asdict(self) | {"stages": None}
        if not self.stages:
            return [self]
        out = []
        for number, overrides in enumerate(self.stages, 1):
            if not isinstance(overrides, dict) or not overrides:
                raise ConfigError(f"stages: stage {number} is not a set of keys: {overrides!r}")
            for name in overrides:
                if name not in STAGE_KEYS:
                    raise ConfigError(
                        f"stages: stage {number} sets {name!r}. {nearest(name, STAGE_KEYS)}"
                        f"A stage can set: {', '.join(STAGE_KEYS)}"
                    )
            try:
                values = {name: coerce(name, value) for name, value in overrides.items()}
                out.append(Config(**_inherited(plain, values)))
            except ConfigError as error:
                raise ConfigError(f"stages: stage {number}: {error}") from None
        self._check_options_reach(out)
        return out

    def _check_options_reach(self, stages: list["Config"]) -> None:
        """Raises ConfigError for an option above the stages that none of them reads."""
        for name in ("beta", "label_smoothing"):
            if getattr(self, name) is not None and all(getattr(stage, name) is None for stage in stages):
                raise ConfigError(f"{name}: no stage's objective reads it")
        for name in self.objective_args or {}:
            if not any(name in (stage.objective_args or {}) for stage in stages):
                raise ConfigError(f"objective_args: no stage's objective reads {name!r}")


def _inherited(above: dict, overrides: dict) -> dict:
    """A stage's keys: its own over those above the stages, objective_args option by option. Options above
    that its objective does not read are for the other stages."""
    from fastdpo.objectives.make import options_read  # it reads configs itself

    own_args = overrides.get("objective_args") or {}
    args = (above["objective_args"] or {}) | own_args
    read = options_read((above | overrides)["objective"], args.get("base_loss"))
    kept = {name: above[name] for name in above if name in read or name not in ("beta", "label_smoothing")}
    args = {name: value for name, value in args.items() if name in read or name in own_args}
    return kept | overrides | {"objective_args": args or None}


STAGE_KEYS = (
    "objective",
    "objective_args",
    "beta",
    "label_smoothing",
    "pairs",
    "learning_rate",
    "warmup_steps",
    "lr_scheduler_type",
    "weight_decay",
    "max_grad_norm",
    "batch_size",
    "max_tokens",
    "num_epochs",
    "max_steps",
    "eval_steps",
    "logging_steps",
    "save_steps",
)
_TRACKERS = ("tensorboard", "wandb", "trackio")
_CHOICES = {
    "truncation": ("keep_start", "keep_end", "drop"),
    "dtype": ("auto", "bf16", "fp32"),
    "optim": ("adamw_torch_fused",),
    "pairs": ("all", "best_worst", "easy", "medium", "hard"),
    "pair_gap": ("rating", "logp"),
}
_AT_LEAST = {
    "beta": 0,
    "flip_pairs": 0,
    "learning_rate": 0,
    "warmup_steps": 0,
    "weight_decay": 0,
    "max_grad_norm": 0,
    "batch_size": 1,
    "max_tokens": 1,
    "max_length": 2,
    "num_epochs": 0,
    "max_steps": 1,
    "eval_steps": 1,
    "logging_steps": 1,
    "save_steps": 1,
    "save_total_limit": 1,
    "samples": 0,
    "lora_rank": 1,
    "seed": 0,
}
FIELDS = {f.name: f for f in dataclasses.fields(Config)}
TYPES = typing.get_type_hints(Config)


def coerce(name, value):
    """Checks one key and brings its value (a YAML value or a flag's string) to the field's type."""
    if name not in FIELDS:
        raise ConfigError(f"unknown key {name!r}. {nearest(name, FIELDS)}`--help` lists all keys.")
    return as_type(name, value, TYPES[name])
