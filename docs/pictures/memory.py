"""Where the bytes of a step go: `fastdpo plan`'s prediction for one model, key after key. No weight and no
data are read."""

from transformers import AutoConfig

from benchmarks.models import MODELS
from docs.pictures.canvas import LARGE, MARGIN, PALE, RIGHT, SMALL, SOFT, Canvas
from fastdpo.config.keys import Config
from fastdpo.console.formatting import significant
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
    "LoRA, checkpointing and offloading": LORA,
    "QLoRA: + load_in_4bit": LORA | {"load_in_4bit": True},
}
PARTS = {  # what is drawn as one: (its owners, colour)
    "weights and copies": ((owners.WEIGHTS, owners.ADAPTERS, owners.COPIES), COLOURS["train"]),
    "gradients": ((owners.GRADIENTS,), COLOURS["rejected"]),
    "optimizer states": ((owners.STATES,), "#e69f00"),
    "activations": ((owners.SAVED,), COLOURS["chosen"]),
    "workspace": ((owners.LAYER, owners.ATTENTION, owners.HEAD, owners.BATCH), COLOURS["ink"]),
}
ASSUMED, GREY = "CUDA, allocator", "#a9b1bb"
TICKS = (24, 48, 80, 120, 160)
TOP, PITCH, BAR = 130, 37, 14


def draw() -> str:
    """A few layers are simulated, which gives the same as all of them here, for they are alike."""
    model_config = AutoConfig.for_model(MODELS[MODEL].model_type, **MODELS[MODEL].config)
    target, predictions = Target.of_card(CARD), {}
    for name, keys in BARS.items():
        config = Config(model=MODEL, data="none", max_length=MAX_LENGTH, **keys)
        loads = step_loads(config, model_config, assumed_groups(config), target)
        predictions[name] = predict(config, model_config, loads, target, exact=False)
    bottom = TOP + PITCH * len(BARS) - 8
    canvas = Canvas("What a DPO step of an 8B model takes of the GPU", bottom + 78)
    tokens = sum(group.input_tokens for group in loads[0].groups)
    canvas.words(MARGIN, 52, "Predicted by fastdpo plan, not measured.", SMALL, bold=True)
    canvas.notes(MARGIN, 69, [f"{MODEL}, rows of {MAX_LENGTH:,} tokens, microbatches of {tokens:,}; --card {CARD}"])
    canvas.legend(92, {name: colour for name, (_, colour) in PARTS.items()} | {ASSUMED: GREY}, columns=3)
    scale = (RIGHT - MARGIN - 58) / max(p.total for p in predictions.values())
    for tick in TICKS:
        x = MARGIN + scale * tick * 1e9
        canvas.line((x, TOP + 4), (x, bottom), COLOURS["grid"])
        canvas.words(x + 12, bottom + 15, f"{tick} GB" if tick == TICKS[0] else str(tick), SMALL, SOFT, right=True)
    for i, (name, prediction) in enumerate(predictions.items()):
        draw_bar(canvas, TOP + PITCH * i, name, prediction, scale)
    notes = [
        "Checkpointing and offloading change no number; what follows them does.",
        "Paged states lie in the host's memory. CUDA, allocator: assumed, not planned.",
    ]
    canvas.notes(MARGIN, bottom + 42, notes)
    sizes = "; ".join(f"{name}: {gigabytes(p.total)}" for name, p in predictions.items())
    return canvas.svg(f"Peak memory of {MODEL}, predicted by fastdpo plan and not measured. {sizes}.")


def draw_bar(canvas: Canvas, y: float, name: str, prediction: Prediction, scale: float) -> None:
    sizes = [(sum(prediction.peak.bytes[o] for o in whose), colour) for whose, colour in PARTS.values()]
    sizes += [(prediction.slack + prediction.context, GREY)]
    x = MARGIN
    canvas.words(MARGIN, y, name)
    for size, colour in sizes:
        canvas.box(x, y + 6, scale * size, BAR, colour)
        x += scale * size
    canvas.words(x + 6, y + 6 + BAR / 2 + 5, gigabytes(prediction.total), bold=True)


def gigabytes(size: int) -> str:
    return f"{significant(size / 1e9, 2 if size < 1e10 else 3 if size > 1e11 else 2)} GB"
