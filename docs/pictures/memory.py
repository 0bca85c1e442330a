"""Where the bytes of a step go: `fastdpo plan`'s prediction for one model, key after key. No weight and no
data are read."""

from transformers import AutoConfig

from benchmarks.models import MODELS
from docs.pictures.canvas import MARGIN, RIGHT, SMALL, SOFT, Canvas
from fastdpo.config.keys import Config
from fastdpo.console.formatting import gigabytes
from fastdpo.planning import allocations as owners
from fastdpo.planning.prediction import Prediction, assumed_groups, predict, step_loads
from fastdpo.planning.target import Target
from fastdpo.report.plots import COLOURS

MODEL, CARD, MAX_LENGTH = "Llama-3.1-8B", "4090", 2048
RECOMPUTED = {"gradient_checkpointing": True}
OFFLOADED = RECOMPUTED | {"activation_offloading": True}
BIT8 = OFFLOADED | {"optim": "adamw_8bit"}
LEAN = BIT8 | {"pure_bf16": True, "optimizer_in_backward": True, "max_grad_norm": 0.0}
LORA = OFFLOADED | {"lora_rank": 16}
BARS = {
    "All weights, default settings": {},
    "+ gradient_checkpointing": RECOMPUTED,
    "+ activation_offloading": OFFLOADED,
    "+ optim: adamw_8bit": BIT8,
    "+ pure_bf16, optimizer_in_backward": LEAN,
    "+ optim: paged_adamw_8bit": LEAN | {"optim": "paged_adamw_8bit"},
    "LoRA: lora_rank: 16, with the first two keys": LORA,
    "QLoRA: + load_in_4bit": LORA | {"load_in_4bit": True},
}
PARTS = {  # what is drawn as one: (its owners, colour)
    "weights and copies": ((owners.WEIGHTS, owners.ADAPTERS, owners.COPIES), COLOURS["train"]),
    "gradients": ((owners.GRADIENTS,), "#86c1e6"),
    "optimizer states": ((owners.STATES,), "#e69f00"),
    "activations": ((owners.SAVED,), COLOURS["chosen"]),
    "workspace": ((owners.LAYER, owners.ATTENTION, owners.HEAD, owners.BATCH), COLOURS["ink"]),
}
ASSUMED, GREY = "CUDA, allocator", "#a9b1bb"
NOTES = [
    "Checkpointing and offloading change no number; 8-bit states,",
    "bf16 weights and LoRA do. Paged states lie in the host's memory.",
    "Grey, assumed: the CUDA context, what the allocator cannot use.",
]
TICKS = (24, 48, 80, 120, 160)  # GB
TOP, PITCH, BAR, GAP = 140, 37, 14, 8  # the first base line, from bar to bar, a bar, more before LoRA


def draw() -> str:
    """A few layers are simulated, which gives the same as all of them here, for they are alike."""
    model_config = AutoConfig.for_model(MODELS[MODEL].model_type, **MODELS[MODEL].config)
    target, predictions, tokens = Target.of_card(CARD), {}, {}
    for name, keys in BARS.items():
        config = Config(model=MODEL, data="none", max_length=MAX_LENGTH, **keys)
        loads = step_loads(config, model_config, assumed_groups(config), target)
        tokens[config.lora_rank] = sum(group.input_tokens for group in loads[0].groups)
        predictions[name] = predict(config, model_config, loads, target, exact=False)
    bottom = TOP + PITCH * len(BARS) + GAP - 8
    canvas = Canvas("What a DPO step of an 8B model takes of the GPU", bottom + 107)
    canvas.words(MARGIN, 52, "Predicted by fastdpo plan, not measured.", SMALL, bold=True)
    said = f"{MODEL}, rows of {MAX_LENGTH:,} tokens, --card {CARD}"
    canvas.notes(MARGIN, 69, [said])
    canvas.legend(93, {name: colour for name, (_, colour) in PARTS.items()} | {ASSUMED: GREY}, columns=3)
    scale = (RIGHT - MARGIN - 66) / max(p.total / 1e9 for p in predictions.values())
    for tick in TICKS:
        x = MARGIN + scale * tick
        canvas.words(x, bottom + 15, f"{tick} GB", SMALL, SOFT, anchor="middle")
    for i, (name, prediction) in enumerate(predictions.items()):
        draw_bar(canvas, TOP + PITCH * i + GAP * name.count("LoRA"), name, prediction, scale)
    largest = f"Largest microbatch: {tokens[None]:,} tokens, with a LoRA {tokens[LORA['lora_rank']]:,}."
    canvas.notes(MARGIN, bottom + 42, [*NOTES, largest])
    sizes = "; ".join(f"{name}: {gigabytes(p.total)}" for name, p in predictions.items())
    return canvas.svg(f"Peak memory of {MODEL}, predicted by fastdpo plan and not measured. {sizes}.")


def draw_bar(canvas: Canvas, y: float, name: str, prediction: Prediction, scale: float) -> None:
    sizes = [(sum(prediction.peak.bytes[o] for o in whose), colour) for whose, colour in PARTS.values()]
    sizes += [(prediction.slack + prediction.context, GREY)]
    x = MARGIN
    canvas.words(MARGIN, y, name)
    for tick in TICKS:
        canvas.box(MARGIN + scale * tick - 0.5, y + 3, 1, BAR + 6, COLOURS["grid"])
    for size, colour in sizes:
        width = scale * size / 1e9
        canvas.box(x, y + 6, width, BAR, colour)
        x += width
    canvas.words(x + 6, y + 6 + BAR / 2 + 5, gigabytes(prediction.total), bold=True)
