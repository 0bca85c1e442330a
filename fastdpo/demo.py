"""`fastdpo demo`: a small Llama learns to answer, then learns which answers are wanted.

No network and no files from outside: the questions, the answers, the tokenizer and the model are made
here. The first training (SFT) teaches helpful and rude answers alike; the second (DPO) sees pairs of
them. Held-out dishes never appear in a pair.
"""

import itertools
import json
import shutil
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from fastdpo.api import train
from fastdpo.config.keys import Config
from fastdpo.errors import ConfigError, Stopped

DISHES = {
    "pancakes": ("flour", "milk", "eggs"),
    "tomato soup": ("tomatoes", "onions", "basil"),
    "lemonade": ("lemons", "sugar", "water"),
    "guacamole": ("avocados", "limes", "salt"),
    "apple pie": ("apples", "butter", "cinnamon"),
    "omelette": ("eggs", "cheese", "chives"),
    "pesto": ("basil", "pine nuts", "oil"),
    "hummus": ("chickpeas", "tahini", "garlic"),
    "fried rice": ("rice", "eggs", "peas"),
    "bread": ("flour", "yeast", "water"),
    "potato salad": ("potatoes", "mustard", "onions"),
    "hot chocolate": ("milk", "cocoa", "sugar"),
    "curry": ("lentils", "coconut milk", "ginger"),
    "salsa": ("tomatoes", "chillies", "limes"),
    "porridge": ("oats", "milk", "honey"),
    "gazpacho": ("tomatoes", "cucumber", "bread"),
}
QUESTIONS = (
    "How do I make {dish}?",
    "What goes into {dish}?",
    "Can you help me cook {dish}?",
    "I would like to make {dish} tonight.",
    "Tell me about {dish}, please.",
    "My friends want {dish}. What do I buy?",
)
HELPFUL = (
    "Happy to help! For {dish} you need {a}, {b} and {c}. Enjoy!",
    "Of course! Take {a}, {b} and {c}, and your {dish} will be lovely.",
    "Good choice! Buy {a}, {b} and {c}. I hope you like it.",
)
RUDE = (
    "Again {dish}? Look it up yourself, I am busy.",
    "I do not care about {dish}. Leave me alone now.",
    "What a silly question. Everybody knows about {dish}.",
)
RATINGS = dict(zip(HELPFUL + RUDE, (5, 4, 4, 2, 1, 2)))  # for losses that read scores
HELD_OUT = ("gazpacho", "porridge", "salsa", "curry")
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def demo(folder: str | Path) -> dict[str, float]:
    """Runs the demo into `folder`, replacing an earlier demo there and nothing else; returns the numbers
    it prints. Raises ConfigError where the folder holds something that no demo wrote."""
    folder, console = Path(folder), Console()
    mark = folder / ".fastdpo-demo"
    if folder.exists() and not mark.exists() and (folder.is_file() or any(folder.iterdir())):
        raise ConfigError(f"demo: {folder} exists and holds no demo; name a new folder")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    mark.touch()
    write_data(folder / "data")
    make_model(folder / "start")
    try:
        _train_both(folder, console)
    except Stopped as stop:  # its own way on is that of `fastdpo train`
        stop.args = (f"the demo was stopped by {stop.signal.name}; the same command starts it over",)
        raise
    return show_result(folder, console)


def _train_both(folder: Path, console: Console) -> None:
    """SFT, then DPO from what it made."""
    at = lambda name: str(folder / name)
    shared: dict = dict(max_length=128, batch_size=32, dtype="fp32")
    console.rule("1/2  SFT: the model learns to answer, politely or not")
    paths: dict = dict(model=at("start"), data=at("data/sft.jsonl"), output_dir=at("sft"))
    how: dict = dict(objective="sft", learning_rate=3e-3, warmup_steps=20, num_epochs=8, logging_steps=50)
    train(Config(**paths, **how, **shared), console)
    console.rule("2/2  DPO: pairs say which answers are wanted")
    data: dict = dict(data=at("data/train.jsonl"), eval_data=at("data/held_out.jsonl"))
    how = dict(learning_rate=1e-4, num_epochs=2, logging_steps=5)
    train(Config(model=at("sft/model"), output_dir=at("dpo"), **data, **how, **shared), console)


def write_data(folder: Path) -> None:
    """sft.jsonl (all dishes, each answer chosen once), train.jsonl and held_out.jsonl (pairs)."""
    files: dict[str, list[dict]] = {"sft": [], "train": [], "held_out": []}
    for (dish, (a, b, c)), question in itertools.product(DISHES.items(), QUESTIONS):
        values = {"dish": dish, "a": a, "b": b, "c": c}
        for helpful, rude in itertools.product(HELPFUL, RUDE):
            answers = [_turn("assistant", text.format(**values)) for text in (helpful, rude)]
            row = {"prompt": _turn("user", question.format(**values))}
            pair = row | {"chosen": answers[0], "rejected": answers[1]}
            scores = {"score_chosen": RATINGS[helpful], "score_rejected": RATINGS[rude]}
            files["held_out" if dish in HELD_OUT else "train"].append(pair | scores)
            files["sft"] += [pair, row | {"chosen": answers[1], "rejected": answers[0]}]
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in files.items():
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")


def _turn(role, content):
    return [{"role": role, "content": content}]


def make_model(folder: Path) -> None:
    """A byte-level BPE tokenizer trained on the demo's own text, and a small random Llama."""
    texts = [
        text.format(dish=d, a=a, b=b, c=c)
        for d, (a, b, c) in DISHES.items()
        for text in (*QUESTIONS, *HELPFUL, *RUDE)
    ]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    options: dict = dict(vocab_size=640, special_tokens=special, initial_alphabet=alphabet)
    bpe.train_from_iterator(texts, trainers.BpeTrainer(show_progress=False, **options))
    ends = dict(eos_token="<|im_end|>", pad_token="<|endoftext|>")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, **ends)
    tokenizer.chat_template = TEMPLATE
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=256,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@torch.no_grad()
def complete(folder: Path, prompts: list[str]) -> list[str]:
    """One sampled completion (temperature 1, fixed seed) a prompt."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    texts = [
        tokenizer.apply_chat_template(_turn("user", p), tokenize=False, add_generation_prompt=True)
        for p in prompts
    ]
    inputs = tokenizer(texts, return_tensors="pt", padding=True, return_token_type_ids=False)
    torch.manual_seed(0)
    out = model.generate(**inputs, max_new_tokens=40, do_sample=True, top_k=0)
    new = out[:, inputs["input_ids"].shape[1] :]
    return [text.strip() for text in tokenizer.batch_decode(new, skip_special_tokens=True)]


def show_result(folder: Path, console: Console) -> dict[str, float]:
    """Completions side by side, and what changed on the held-out dishes."""
    prompts = [q.format(dish=dish) for dish in HELD_OUT for q in QUESTIONS]
    before, after = (complete(folder / name / "model", prompts) for name in ("sft", "dpo"))
    table = Table("held-out question", "before DPO", "after DPO", show_lines=True)
    for row in list(zip(prompts, before, after))[::5]:
        table.add_row(*row)
    console.print(table)
    lines = (folder / "dpo/metrics.jsonl").read_text(encoding="utf-8").splitlines()
    held_out = [r for r in map(json.loads, lines) if "eval_loss" in r]
    first, last = held_out[0], held_out[-1]
    rude = [text.split("{")[0].strip() for text in RUDE]
    polite = lambda texts: sum(not t.startswith(tuple(rude)) for t in texts) / len(texts)
    result = {
        "accuracy_before": first["eval_logps/accuracies"],
        "accuracy_after": last["eval_logps/accuracies"],
        "margin_after": last["eval_rewards/margins"],
        "polite_before": polite(before),
        "polite_after": polite(after),
    }
    console.print(
        "held-out preference accuracy (the chosen answer is the likelier one): "
        f"{result['accuracy_before']:.0%} -> [bold]{result['accuracy_after']:.0%}[/]\n"
        f"sampled answers that are not rude: {result['polite_before']:.0%} -> "
        f"[bold]{result['polite_after']:.0%}[/]\n"
        f"reward margin over the reference: 0 -> {result['margin_after']:+.2f}\n"
        f"the report: {folder / 'dpo/report.html'}   the model: {folder / 'dpo/model'}",
        highlight=False,
    )
    return result
