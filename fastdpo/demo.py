"""`fastdpo demo`: a small Llama learns to answer, then learns which answers are wanted.

No network and no files from outside: the questions, the answers, the tokenizer and the model are made
here. The first training (SFT) teaches two rude answers for each helpful one, and so the model is rude; the
second (DPO) sees pairs of them. Held-out dishes never appear in a pair.
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
from fastdpo.console.quiet import no_bars
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


@no_bars()
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
    console.print("Two small trainings and a table of what they changed: about a minute on two cores.")
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
    console.rule("1/2  SFT: the model learns to answer, most often rudely")
    paths: dict = dict(model=at("start"), data=at("data/sft.jsonl"), output_dir=at("sft"), samples=0)
    how: dict = dict(objective="sft", learning_rate=3e-3, warmup_steps=20, num_epochs=10, logging_steps=50)
    train(Config(**paths, **how, **shared), console)
    console.rule("2/2  DPO: pairs say which answers are wanted")
    data: dict = dict(data=at("data/train.jsonl"), eval_data=at("data/held_out.jsonl"), samples=5)
    how = dict(learning_rate=8e-5, num_epochs=2, logging_steps=10)
    train(Config(model=at("sft/model"), output_dir=at("dpo"), **data, **how, **shared), console)


def write_data(folder: Path) -> None:
    """sft.jsonl (all dishes, two rude answers for a helpful one), train.jsonl, held_out.jsonl (pairs)."""
    files: dict[str, list[dict]] = {"sft": [], "train": [], "held_out": []}
    for (dish, (a, b, c)), question in itertools.product(DISHES.items(), QUESTIONS):
        values = {"dish": dish, "a": a, "b": b, "c": c}
        for (i, helpful), (j, rude) in itertools.product(enumerate(HELPFUL), enumerate(RUDE)):
            answers = [_turn("assistant", text.format(**values)) for text in (helpful, rude)]
            row = {"prompt": _turn("user", question.format(**values))}
            pair = row | {"chosen": answers[0], "rejected": answers[1]}
            scores = {"score_chosen": RATINGS[helpful], "score_rejected": RATINGS[rude]}
            files["held_out" if dish in HELD_OUT else "train"].append(pair | scores)
            rudely = row | {"chosen": answers[1], "rejected": answers[0]}
            files["sft"].append(pair if i == j else rudely)
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in files.items():
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")


def helpful_answers(dish: str) -> list[str]:
    """The helpful answers to a question about it, word for word."""
    a, b, c = DISHES[dish]
    return [text.format(dish=dish, a=a, b=b, c=c) for text in HELPFUL]


def _turn(role, content):
    return [{"role": role, "content": content}]


@no_bars()
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
    """The greedy completion of each prompt."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    texts = [
        tokenizer.apply_chat_template(_turn("user", p), tokenize=False, add_generation_prompt=True)
        for p in prompts
    ]
    inputs = tokenizer(texts, return_tensors="pt", padding=True, return_token_type_ids=False)
    out = model.generate(**inputs, max_new_tokens=40, do_sample=False)
    new = out[:, inputs["input_ids"].shape[1] :]
    return [text.strip() for text in tokenizer.batch_decode(new, skip_special_tokens=True)]


def show_result(folder: Path, console: Console) -> dict[str, float]:
    """Completions side by side, and what changed on the held-out dishes."""
    records = lambda name: map(json.loads, (folder / "dpo" / name).read_text(encoding="utf-8").splitlines())
    samples = list(records("samples.jsonl"))
    half = len(samples) // 2  # before and after, of the same prompts
    table = Table("held-out question", "before DPO", "after DPO", show_lines=True)
    for before, after in zip(samples[:half], samples[half:]):
        question = before["turns"][-1]["content"]
        table.add_row(question, f"[red]{before['completion']}", f"[green]{after['completion']}")
    console.print(table)
    asked = [(dish, question.format(dish=dish)) for dish in HELD_OUT for question in QUESTIONS]
    helpful = []
    for name in ("sft", "dpo"):
        answers = complete(folder / name / "model", [question for _, question in asked])
        right = [answer in helpful_answers(dish) for (dish, _), answer in zip(asked, answers)]
        helpful.append(sum(right) / len(right))
    evaluations = [record for record in records("metrics.jsonl") if "eval_loss" in record]
    first, last = evaluations[0], evaluations[-1]
    result = {
        "accuracy_before": first["eval_logps/accuracies"],
        "accuracy_after": last["eval_logps/accuracies"],
        "margin_after": last["eval_rewards/margins"],
        "helpful_before": helpful[0],
        "helpful_after": helpful[1],
    }
    console.print(
        "On dishes that no pair was about:\n"
        f"  questions whose likeliest answer is helpful, with the right things to buy: {helpful[0]:.0%} -> "
        f"[bold]{helpful[1]:.0%}[/] of {len(asked)}\n"
        f"  pairs whose helpful answer is the likelier one: {result['accuracy_before']:.0%} -> "
        f"[bold]{result['accuracy_after']:.0%}[/]\n"
        f"  reward margin over the reference: 0 -> [bold]{result['margin_after']:+.2f}[/]\n"
        f"The report, for a browser: {folder / 'dpo/report.html'}\nThe model: {folder / 'dpo/model'}",
        highlight=False,
        soft_wrap=True,
    )
    return result
