"""What the tables of habits_*.py are made of: rules for one key, and parts that read several keys."""

from collections.abc import Callable
from dataclasses import dataclass, field

import yaml

from fastdpo.errors import ConfigError

SPEED = "it changes speed or memory only"
LOOKS = "it changes what is shown or stored only"
NO_SUCH = "fastdpo does not have it, and training would not be the same; remove it"
NO_DROPOUT = "fastdpo trains LoRA without dropout; set it to 0"
NO_CODE = "fastdpo runs no code of a model's repository; set it to false"
QUANTISED = "fastdpo quantises to 4 bits only; set load_in_4bit: true"
OPTIMIZERS = {
    "adamw_torch": "adamw_torch_fused",
    "adamw_hf": "adamw_torch_fused",
    "adamw_bnb_8bit": "adamw_8bit",
    "paged_adamw": "paged_adamw_32bit",
    "ao_adamw_8bit": "adamw_torch_8bit",
    "ao_adamw_4bit": "adamw_torch_4bit",
}


@dataclass
class Draft:
    """A config on its way: theirs that are not read yet, ours so far, and what became of each key."""

    tool: str
    left: dict
    ours: dict = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    defaults: dict = field(default_factory=dict)  # of theirs, where they differ from ours

    def __post_init__(self):
        self.said = {key for key, value in self.left.items() if value is not None}

    def take(self, key: str, default=None):
        """The value of a key of theirs, which is then read; what is null or missing has their default."""
        value = self.left.pop(key, None)
        return self.defaults.get(key, default) if value is None else value

    def given(self, key: str) -> bool:
        return self.left.get(key) is not None

    def set(self, name: str, value, source: str) -> None:
        """Our key and where its value comes from."""
        self.ours[name] = value
        if source != (ours := f"{name} {_word(value)}"):
            self.notes.append(f"{source} -> {ours}")

    def check(self, note: str) -> None:
        """A note on what is not exactly the same and cannot be told from the config."""
        self.notes.append(f"check: {note}")

    def refuse(self, key: str, value, way_out: str):
        raise ConfigError(f"{key}: {_word(value)}: {way_out}")

    def word(self, key: str, value) -> str:
        """`key value`, and whether the value is only their default."""
        return f"{key} {_word(value)}" + ("" if key in self.said else f" ({self.tool}'s default)")


Rule = Callable[[Draft, str], None]


@dataclass(frozen=True, eq=False)
class Tool:
    """One tool's config: the keys only it has, its defaults where ours differ, and the table of its keys."""

    name: str
    marks: frozenset[str]
    defaults: dict
    rules: dict[str, Rule]
    read: frozenset[str]  # the keys that its parts read, some of them keys of ours too
    parts: tuple[Callable[[Draft], None], ...]  # read several keys at once; before the rules


def to(name: str, values: dict | None = None) -> Rule:
    """Our key with the same value, or with what `values` has for it."""

    def rule(draft: Draft, key: str) -> None:
        value = draft.take(key)
        if value is None:
            return
        ours = values.get(value, value) if values and isinstance(value, str) else value
        draft.set(name, ours, draft.word(key, value))

    return rule


def unread(why: str) -> Rule:
    """A key that changes nothing about training here."""

    def rule(draft: Draft, key: str) -> None:
        if (value := draft.take(key)) is not None:
            draft.notes.append(f"{key} {_word(value)}: left out, {why}")

    return rule


def only(*values, otherwise: str) -> Rule:
    """A key that would change training, with values that are what fastdpo does anyway."""

    def rule(draft: Draft, key: str) -> None:
        value = draft.take(key)
        if value is None:
            return
        if value not in values:
            draft.refuse(key, value, otherwise)
        draft.notes.append(f"{key} {_word(value)}: left out, it is so here")

    return rule


COMMON = frozenset(  # what batch, epochs, warmup, precision, saving, upload and trackers read
    "gradient_accumulation_steps max_steps warmup_steps warmup_ratio bf16 fp16 save_strategy save_steps "
    "eval_strategy evaluation_strategy eval_steps load_best_model_at_end report_to push_to_hub "
    "hub_model_id".split()
)


def part_of(what: str) -> Rule:
    """A key that one of the tool's parts has read where it means something."""
    return unread(f"without {what} it has no meaning")


def plain(value):
    """A flag's string, or YAML 1.1's "1e-6", as the value it spells."""
    if not isinstance(value, str):
        return value
    try:
        parsed = yaml.safe_load(value)
    except yaml.YAMLError:
        return value
    if not isinstance(parsed, str):
        return parsed if isinstance(parsed, int | float | bool | list | dict) else value or None
    try:
        return float(parsed)
    except ValueError:
        return value


def _word(value) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)


# ---- parts: several keys, one of ours


def batch(size_key: str, accumulation_key: str = "gradient_accumulation_steps"):
    def part(draft: Draft) -> None:
        if not (draft.given(size_key) or draft.given(accumulation_key) or size_key in draft.defaults):
            return
        size = draft.take(size_key, 8 if size_key.startswith("per_device") else 1)
        steps = draft.take(accumulation_key, 1)
        for key, value in ((size_key, size), (accumulation_key, steps)):
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                draft.refuse(key, value, "a whole number of at least 1 is needed")
        draft.set("batch_size", size * steps, f"{draft.word(size_key, size)} x {accumulation_key} {steps}")

    return part


def warmup(draft: Draft) -> None:
    """warmup_steps, or warmup_ratio as transformers 5 writes it: steps below 1 are a share."""
    steps, ratio = draft.take("warmup_steps"), draft.take("warmup_ratio")
    if steps is not None:
        draft.ours["warmup_steps"] = steps
    elif ratio:
        draft.set("warmup_steps", float(ratio), f"{draft.word('warmup_ratio', ratio)} (a share of all steps)")


def precision(draft: Draft) -> None:
    bf16, fp16 = draft.take("bf16"), draft.take("fp16")
    if fp16 and fp16 != "auto":
        draft.refuse("fp16", fp16, "fastdpo computes in bf16 or fp32: set bf16: true instead")
    if bf16 in ("auto", None):
        return
    draft.set("dtype", "bf16" if bf16 else "fp32", f"bf16 {_word(bf16)}")


def loading_dtype(key: str):
    """The dtype that weights are loaded in: trained weights are fp32 here whatever it says."""

    def part(draft: Draft) -> None:
        value = draft.take(key)
        if key == "dtype" and value in ("bf16", "fp32"):  # our own word
            draft.ours[key] = value
        elif value not in (None, "auto", "float32", "fp32"):
            draft.check(
                f"{key} {value}: left out; weights that train are kept in fp32 here, computed with in dtype"
            )

    return part


def epochs(key: str):
    """Passes over the data, and the steps that overrule them."""

    def part(draft: Draft) -> None:
        steps = draft.take("max_steps")
        if steps is not None and steps > 0:
            draft.ours["max_steps"] = steps
        value = draft.take(key)
        if value is not None and "max_steps" in draft.ours:
            draft.notes.append(f"{draft.word(key, value)}: left out, max_steps says when to stop")
        elif value is not None:
            draft.set("num_epochs", float(value), draft.word(key, value))

    return part


def saving(draft: Draft) -> None:
    """When to save and evaluate, which changes nothing about training."""
    for strategy, steps in (("save_strategy", "save_steps"), ("eval_strategy", "eval_steps")):
        when = draft.take(strategy)
        if strategy == "eval_strategy":
            when = draft.take("evaluation_strategy") or when
        value = draft.take(steps)
        if when in ("epoch", "best"):
            draft.notes.append(f"{strategy} {when}: left out; {steps} counts steps here, always with the end")
        elif isinstance(value, float) and value < 1:
            draft.notes.append(f"{steps} {value}: left out; it is a number of steps here")
        elif value and when not in ("no", False):  # YAML reads no as false
            draft.ours[steps] = int(value)
    if draft.take("load_best_model_at_end"):
        metric, greater = draft.take("metric_for_best_model"), draft.take("greater_is_better")
        if metric not in (None, "loss", "eval_loss") or greater:
            draft.refuse(
                "metric_for_best_model", metric, "load_best goes by the held-out loss; set eval_loss"
            )
        draft.set("load_best", True, "load_best_model_at_end true")


def trackers(draft: Draft) -> None:
    said = draft.take("report_to")
    names = [said] if isinstance(said, str) else said or []
    known = [name for name in names if name in ("tensorboard", "wandb", "trackio")]
    for name in names:
        if name not in (*known, "none"):
            draft.notes.append(f"report_to {name}: left out, metrics.jsonl has it all")
    if known:
        draft.ours["report_to"] = known


def upload(draft: Draft) -> None:
    """Their push_to_hub is yes or no, and hub_model_id the name; in Axolotl the name alone is a yes."""
    said, name = draft.take("push_to_hub"), draft.take("hub_model_id")
    if isinstance(said, str):  # our own key
        draft.ours["push_to_hub"] = said
    elif said and not name:
        draft.refuse("push_to_hub", said, "name the repository: push_to_hub: me/my-model")
    elif name and (said or draft.tool == "Axolotl"):
        draft.set("push_to_hub", name, f"hub_model_id {name}")
    elif name:
        draft.notes.append(f"hub_model_id {name}: left out, push_to_hub is not set")


def modules(value) -> str | list[str]:
    """LoRA's target modules in our words."""
    names = [name.strip() for name in value.split(",")] if isinstance(value, str) else list(value)
    return "all-linear" if names in (["all"], ["all-linear"]) else names


def objective(draft: Draft, parts: dict[str, float], options: dict) -> None:
    """Our objective of weighted losses, with those options that one of them reads. Options are theirs by our
    names: (their key, value, what it means that no loss reads it: unread in theirs too, or an error)."""
    from fastdpo.objectives.catalogue import NAMES
    from fastdpo.objectives.make import options_read

    for name in parts:
        if name not in NAMES:
            raise ConfigError(f"{name}: fastdpo has no loss of that name; `fastdpo objectives` lists all")
    if list(parts.values()) == [1]:
        draft.set("objective", next(iter(parts)), f"loss {next(iter(parts))}")
    else:
        draft.set("objective", parts, f"losses {' + '.join(parts)}")
    read, args = options_read(draft.ours["objective"]), {}
    for name, (key, value, needed) in options.items():
        if value is None:
            continue
        if name not in read:
            if needed:
                draft.refuse(key, value, f"the loss ({', '.join(parts)}) does not read it here; remove it")
            draft.notes.append(
                f"{key} {_word(value)}: left out, the loss ({', '.join(parts)}) does not read it"
            )
        elif name in ("beta", "label_smoothing"):
            draft.set(name, float(value), draft.word(key, value))
        else:
            args[name] = value
            draft.notes.append(f"{draft.word(key, value)} -> objective_args: {name}")
    if args:
        draft.ours["objective_args"] = args
