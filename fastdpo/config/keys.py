"""One flat config: YAML keys, flags, `--help` and docs/keys.md all come from the fields below."""

import dataclasses
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any, Literal

from fastdpo.config.checks import of_objective, of_other_keys, problems, said, without
from fastdpo.config.names import ALSO_CALLED, Optimizer, in_our_words, meant
from fastdpo.config.rewards import MayTrainRewards
from fastdpo.config.rounds import SAMPLE_WORDS
from fastdpo.config.stages import stages_of
from fastdpo.errors import ConfigError
from fastdpo.values import as_list, as_type


def _key(default: Any, doc: str, low: int | None = None) -> Any:
    """A field. low: the least that its number may be."""
    return field(default=default, metadata={"doc": doc, "low": low})


@dataclass(frozen=True)
class Config(MayTrainRewards):
    """Everything a run depends on. Unknown keys are errors; see `fastdpo train --help`."""

    model: str = _key("", "model to train: a folder, a hub name or FOLDER:FILE.gguf (required)")
    adapter: str | None = _key(
        None, "a peft adapter folder to start from: it is trained on, and the reference is model + adapter"
    )
    data: str | list[str] = _key(
        "",
        "preference rows (required): a .jsonl/.json/.csv/.parquet file, a folder, or a hub name; "
        "NAME:CONFIG picks a hub configuration (NAME:DIR/DIR a folder of it), FOLDER:NAME a data set of "
        "FOLDER/dataset_info.json, #SPLIT a split, as in data.jsonl#train[:100]; or a list of them, read one "
        "after the other",
    )
    data_format: str | dict[str, Any] | None = _key(
        None,
        "how rows are read where their columns do not tell: a format's name (docs/data.md lists them), or "
        "{our column: the rows' own name, ...}, as in {prompt: question, chosen: better, rejected: worse}",
    )
    eval_data: str | list[str] | float | None = _key(
        None,
        "held-out rows: like data, or a fraction of data (0.05) or a number of its prompt groups (200) that "
        "is split off by seed",
    )
    output_dir: str = _key("runs/fastdpo", "the run folder")
    push_to_hub: str | None = _key(
        None, "the hub repository that `model/` is uploaded to in the end (me/my-dpo); a new one is private"
    )
    chat_template: str | None = _key(
        None,
        "what writes turns in place of the tokenizer's own: a Jinja file or text, or alpaca, chatml, gemma, "
        "llama2, llama3, mistral, phi3, vicuna or zephyr; default:chatml takes it only where there is none",
    )
    chat_template_kwargs: dict[str, Any] | None = _key(
        None,
        "what the chat template is given besides the messages, as in {enable_thinking: false}; a row's own "
        "win over it",
    )
    objective: str | dict[str, Any] | list[Any] = _key(
        "sigmoid",
        "the loss: sigmoid (or dpo) is DPO, sft trains on the chosen responses, `fastdpo objectives` lists "
        "all; or several with their weights: {sigmoid: 0.8, sft: 0.2}",
    )
    objective_args: dict[str, Any] | None = _key(None, "the objective's options, see `fastdpo objectives`")
    beta: float | None = _key(
        None, "strength of the pull towards the reference (default: the objective's own, mostly 0.1)", low=0
    )
    label_smoothing: float | None = _key(
        None, "the assumed share of flipped pairs, 0 <= x < 0.5, where the objective reads it"
    )
    router_aux_loss_coef: float | None = _key(
        None,
        "the weight of a mixture of experts' balance loss (default: what the model's config says); 0: none",
        low=0,
    )
    pairs: Literal["all", "best_worst", "easy", "medium", "hard"] = _key(
        "all",
        "the pairs of a ranked row that train: all (every pair whose scores differ), best_worst, or easy, "
        "medium, hard: the best response against the last, the middle one, the second (Curry-DPO's stages)",
    )
    pair_gap: Literal["rating", "logp"] = _key(
        "rating", "what easy and hard are told by: the rating, or logp (how far apart the reference has them)"
    )
    flip_pairs: float = _key(
        0.0,
        "noise, to study robustness: this share of the training pairs is flipped, by seed; never held-out",
        low=0,
    )
    rounds: int | None = _key(
        None,
        "on-policy: so often the model answers some prompts of data, `reward` scores that, and it trains",
        low=1,
    )
    sample: dict[str, Any] | None = _key(None, f"how a round samples: {SAMPLE_WORDS}")
    reward: str | None = _key(
        None, "what scores samples: FILE.py:function, vader, length, or a reward model's folder or hub name"
    )
    reference: str | None = _key(
        None,
        "of a round: the model that sampled (round, the default) or a fresh LoRA's base (start)",
    )
    learning_rate: float = _key(1e-6, "peak learning rate (1e-5 or more suits LoRA)", low=0)
    warmup_steps: float = _key(0, "linear warm-up steps; below 1, a share of all steps", low=0)
    lr_scheduler_type: str = _key("linear", "as in transformers: linear, cosine, constant_with_warmup, ...")
    lr_scheduler_kwargs: dict[str, Any] | None = _key(
        None, "the schedule's own options, as transformers has them: {min_lr_rate: 0.1} of cosine_with_min_lr"
    )
    optim: Optimizer = _key(
        "adamw_torch_fused",
        "optimizer, by transformers' names: adamw_torch_fused (torch's AdamW), adamw_8bit, paged_adamw_8bit, "
        "paged_adamw_32bit (bitsandbytes), adamw_torch_8bit, adamw_torch_4bit (torchao), adafactor, rmsprop, "
        "sgd",
    )
    offload_optimizer: bool = _key(False, "keep the optimizer's states in the host's memory and step there")
    optimizer_in_backward: bool = _key(
        False,
        "update each weight once its gradient is complete, so that one or two are there at a time (several "
        "microbatches' sum waits in the host's memory); needs max_grad_norm: 0",
    )
    pure_bf16: bool = _key(
        False, "keep trained weights in bf16, updated with stochastic rounding, instead of fp32"
    )
    adam_beta1: float = _key(0.9, "AdamW's decay of the mean of gradients", low=0)
    adam_beta2: float = _key(0.999, "AdamW's decay of the mean of their squares", low=0)
    adam_epsilon: float = _key(1e-8, "AdamW's addend to the root of that", low=0)
    weight_decay: float = _key(0.0, "AdamW's decay of matrices (never of norms and biases)", low=0)
    max_grad_norm: float = _key(1.0, "clip the gradient to this norm; 0 switches clipping off", low=0)
    batch_size: int = _key(8, "prompt groups an optimizer step", low=1)
    max_tokens: int = _key(
        8192,
        "token cap of a microbatch: memory only, never the result (but for router_aux_loss_coef); a larger "
        "group goes alone",
        low=1,
    )
    max_length: int = _key(1024, "longest prompt + response in tokens", low=2)
    truncation: Literal["keep_start", "keep_end", "drop"] = _key(
        "keep_start",
        "rows over max_length: keep_start cuts the response's end, keep_end the prompt's start, "
        "drop leaves the row out; all counted",
    )
    image_max_pixels: int | None = _key(
        None, "shrink larger images to so many pixels, before the model's own processor sees them", low=1
    )
    media_dir: str | None = _key(
        None,
        "a folder in which image paths may lie, and where relative ones are looked up, too; without it each "
        "lies in its data file's folder",
    )
    num_epochs: float = _key(1.0, "passes over the data", low=0)
    max_steps: int | None = _key(None, "stop after this many optimizer steps, whatever num_epochs", low=1)
    eval_steps: int | None = _key(None, "evaluate every so many steps (always at start and end)", low=1)
    logging_steps: int = _key(10, "write metrics every so many steps", low=1)
    save_steps: int | None = _key(
        100, "write a checkpoint every so many steps (always at a stage's end, and when stopped)", low=1
    )
    save_total_limit: int = _key(2, "how many of the newest checkpoints to keep, besides the best one", low=1)
    load_best: bool = _key(
        False,
        "end a stage with its checkpoint of the lowest held-out loss, not with the last; "
        "evaluates at every checkpoint",
    )
    report_to: str | list[str] | None = _key(
        None, "where metrics go besides metrics.jsonl: tensorboard, wandb, trackio (any that are installed)"
    )
    samples: int = _key(
        4, "held-out prompts (or training ones) completed before and after, for the report; 0 for none", low=0
    )
    seed: int = _key(0, "seed of the data order and of LoRA's start", low=0)
    dtype: Literal["auto", "bf16", "fp32"] = _key(
        "auto",
        "compute dtype: bf16, fp32, or auto (bf16 where the GPU has it, else fp32); "
        "trained weights are kept in fp32 unless pure_bf16",
    )
    memory: str | None = _key(
        None,
        "the GPU memory that a run may take, as in 24GB or 22GiB: it then chooses max_tokens, head_memory, "
        "gradient_checkpointing, activation_offloading and tiled_mlp where they are left at their defaults",
    )
    head_memory: str | None = _key(
        None,
        "what the lm_head may take for buffers above its gradients (default: 512MiB; where it trains that or "
        "its weights in fp32, and once these on top; on a GPU at most a quarter of what the model leaves)",
    )
    gradient_checkpointing: bool | int | str = _key(
        False,
        "recompute layers in the backward to save memory: true (every layer), a number k (layers 0, k, 2k, "
        "...), or selective (all but matrix products and attention)",
    )
    activation_offloading: bool = _key(
        False, "keep in the host's memory what layers save for the backward (recomputed ones: their inputs)"
    )
    tiled_mlp: bool = _key(False, "compute MLPs 8192 tokens at a time: for long rows")
    shard: bool | str = _key(
        "auto",
        "over several GPUs: true gives each a part of weights, gradients and states, false all, hybrid a "
        "part within each node; auto: true where all weights train and one GPU could not hold them",
    )
    load_in_4bit: bool = _key(False, "QLoRA: keep the frozen weights in 4 bits (bitsandbytes' NF4)")
    freeze_vision: bool = _key(
        True, "of a model that sees images, train the language model alone: not what images go through"
    )
    lora_rank: int | None = _key(None, "train a LoRA of this rank instead of all weights", low=1)
    lora_alpha: float | None = _key(None, "LoRA's alpha (default: twice the rank)")
    lora_target_modules: str | list[str] = _key(
        "all-linear", "modules that get a LoRA: names, all-linear (all but the lm_head), or peft (its choice)"
    )
    use_dora: bool = _key(False, "DoRA: a LoRA that learns the weights' magnitude apart (2402.09353)")
    use_rslora: bool = _key(False, "scale the LoRA by alpha / sqrt(rank), not alpha / rank (2312.03732)")
    data_cache: str = _key(
        "auto",
        "folder that keeps the tokenised rows for every later run with the same data, tokenizer, template "
        "and lengths; auto is ~/.cache/fastdpo/tokens (or under $XDG_CACHE_HOME), off tokenises in every run "
        "and keeps the tokens in memory",
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
    ignore: dict[str, Any] | list[str] | str | None = _key(
        None,
        "keys of another trainer's config to go on without, as in --ignore lora_dropout,datasets.roles; the "
        "run's config.yaml keeps what they said",
    )
    stages: list[dict[str, Any]] | None = _key(
        None,
        "runs one after the other, each a set of keys that override these (objective, beta, "
        "learning_rate, num_epochs, ...); each starts from, and refers to, the one before",
    )

    def __post_init__(self) -> None:
        for name in ALSO_CALLED:  # from Python, too
            object.__setattr__(self, name, in_our_words(name, getattr(self, name)))
        found = problems(self)
        if self.stages:  # a bad stage shows before any work
            found += said(stages_of, self, coerced, found)
        if found:
            raise ConfigError(*found)

    @property
    def trackers(self) -> list[str]:
        """The names in report_to."""
        return [name for name in as_list(self.report_to) if name != "none"]

    def per_stage(self) -> list["Config"]:
        """One config a stage; without `stages`, this one. Raises ConfigError."""
        return stages_of(self, coerced) if self.stages else [self]


FIELDS = {f.name: f for f in dataclasses.fields(Config)}


def coerce(name: str, value: Any) -> Any:
    """Checks one key and brings its value (a YAML value or a flag's string) to the field's type."""
    if "." in name and name.split(".")[0] in FIELDS:
        raise ConfigError(f"a key has no dots in it: {name}")
    if name not in FIELDS:
        raise ConfigError(f"unknown key {name!r}. {meant(name, FIELDS)}`--help` lists all keys.")
    if name == "push_to_hub" and str(value).lower() in ("true", "yes"):
        raise ConfigError("push_to_hub: name the repository, as in push_to_hub: me/my-model")
    field = FIELDS[name]
    return as_type(name, in_our_words(name, value), field.type, field.metadata["doc"])


def coerced(values: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """(the values that can be brought to their keys' types, what is wrong with the others)."""
    good: dict[str, Any] = {}
    found: list[str] = []
    for name, value in values.items():
        try:
            good[name] = coerce(name, value)
        except ConfigError as error:
            found += error.args
    return good, found


def from_values(values: dict[str, Any], wrong: Collection[str] = ()) -> Config:
    """The config of a YAML file's values and flags' strings. Raises ConfigError with all that is wrong, but
    for what may come of keys that are known to be `wrong`."""
    good, found = coerced(values)
    wrong = {*wrong, *(values.keys() - good.keys())}
    try:
        made = Config(**good)
        if not found:
            return made
    except ConfigError as error:
        found += without(error.args, wrong)
    found += of_other_keys(found, without(of_objective(good), wrong)) if "objective" not in wrong else []
    raise ConfigError(*found)
