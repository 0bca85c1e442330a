"""Golden runs: what a change that is meant to change nothing must leave as it is, bit for bit.

    python tests/golden.py OUT              the runs and commands of golden.yaml -> OUT/golden.json
    python tests/golden.py --compare A B    every difference between two such folders; exits with 1 if any

It knows `fastdpo.Config`, `fastdpo.train` and the `fastdpo` command, and nothing else of the project: a copy
of it, with golden.yaml beside it, runs any tree, the one that PYTHONPATH names. Before and after a change, on
one machine (another CPU or torch rounds otherwise), three minutes of one core each:

    git worktree add ../before COMMIT
    PYTHONPATH=$PWD/../before:$PWD/../before/kernels .venv/bin/python tests/golden.py /tmp/before
    PYTHONPATH=$PWD:$PWD/kernels .venv/bin/python tests/golden.py /tmp/after
    .venv/bin/python tests/golden.py --compare /tmp/before /tmp/after

Recorded, of each run: metrics, events, samples, config and data report without times, speeds and memory; a
sha256 of each tensor of the model and of the checkpoints; the model card, the text of report.html without its
numbers, the names of all files; the reference cache's namespaces, keys and a sha256 of each value; what was
printed, and the error it ended with. Of each command: what it printed, and its exit code. Help and messages
are in it as text: where they change on purpose, that is a difference to look at. All files stay in OUT/work.
"""

import contextlib
import difflib
import hashlib
import io
import json
import os
import random
import re
import shlex
import shutil
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

os.environ.update(OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="", TOKENIZERS_PARALLELISM="false")
os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", COLUMNS="300", NO_COLOR="1")
os.environ.update(HF_TOKEN="", HUGGING_FACE_HUB_TOKEN="", HF_TOKEN_PATH="hf/token", HF_HUB_CACHE="hf/hub")
os.environ.update(HF_HOME="hf", MPLCONFIGDIR="mpl")  # in the current folder, which will be OUT/work
sys.path.pop(0)  # this folder, whose kernels/ would be Hugging Face's `kernels` to other libraries

import torch
import yaml
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

import fastdpo

WHAT = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text())
WORDS = "the a one red blue old cat dog bird house tree sees likes finds near under with no".split()
UNTIMED = set("tokens_per_second pairs_per_second peak_memory_gb time seconds versions device clock".split())
UNTIMED |= {"tflops_per_second", "idle_share", "idle_seconds", "seconds_left"}
UNTIMED |= {"bytes", "digest", "files", "config"}  # of files that hold such; and what config.yaml has
MASKS = (
    (r"━.*", "━"),  # how far a progress bar came, and how fast
    (r"[\d.,]+ (pairs/s|tokens/s|s;)", r"# \1"),
    (r"fastdpo \d[\w.+]*", "fastdpo #"),
)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE trained on WORDS, with a ChatML template."""
    special, letters = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], pre_tokenizers.ByteLevel.alphabet()
    bpe, sizes = Tokenizer(models.BPE()), {"vocab_size": 400, "show_progress": False}
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(special_tokens=special, initial_alphabet=letters, **sizes)
    bpe.train_from_iterator([" ".join(WORDS)] * 3, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=special[2], pad_token=special[0])
    tokenizer.chat_template = WHAT["texts"]["chatml.jinja"]
    return tokenizer


def write_data(name: str, rows: list, count: int) -> None:
    """NAME.jsonl; good answers end in 'cat' and bad ones in 'dog', so there is something to learn."""
    draw, lines = random.Random(name), []
    some = lambda most, end="": " ".join([*draw.choices(WORDS, k=draw.randint(1, most)), end]).strip()
    for i in range(max(count, len(rows))):
        row, words = rows[i % len(rows)], {"ASK": some(9), "GOOD": some(6, "cat"), "BAD": some(6, "dog")}
        line = row if isinstance(row, str) else json.dumps(row).replace('"LABEL"', json.dumps(i % 2 == 0))
        lines.append(re.sub("ASK|GOOD|BAD", lambda found, words=words: words[found[0]], line) + "\n")
    Path(f"{name}.jsonl").write_text("".join(lines))


@torch.no_grad()
def add_reference(file: str, model, tokenizer) -> None:
    """Gives each row of text the columns of TRL's precomputed reference, of this model."""
    rows = [json.loads(line) for line in Path(file).read_text().splitlines()]
    for row in rows:
        start = len(tokenizer(row["prompt"]).input_ids)
        for name in ("chosen", "rejected"):
            ids = tokenizer(row["prompt"] + row[name] + tokenizer.eos_token, return_tensors="pt").input_ids
            logp = model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[start - 1 :]
            row[f"ref_{name}_logps"] = float(logp.sum())
    Path(file).write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_inputs() -> None:
    """Models, data files and configs, in the current folder."""
    tokenizer = make_tokenizer()
    for name, keys in WHAT["models"].items():
        torch.manual_seed(0)
        config = AutoConfig.for_model(vocab_size=len(tokenizer), initializer_range=0.1, **keys)
        AutoModelForCausalLM.from_config(config).save_pretrained(name)
        tokenizer.save_pretrained(name)
    for name, rows in WHAT["data"].items():
        write_data(name, rows, 16)
    for name, (_, row) in WHAT["formats"].items():
        write_data(f"format_{name}", [row], 4)
    add_reference("columns.jsonl", AutoModelForCausalLM.from_pretrained("model"), tokenizer)
    texts = WHAT["texts"] | {name: json.dumps(keys) for name, keys in WHAT["configs"].items()}  # YAML too
    for name, text in texts.items():
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_text(text)
    Path("converted").mkdir()


def sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def masked(text: str) -> list[str]:
    """Lines without what differs from run to run: times, speeds, folders, loading bars."""
    text = text.replace(str(Path.cwd()), "WORK").replace(str(Path(fastdpo.__file__).parents[1]), "TREE")
    for pattern, instead in MASKS:
        text = re.sub(pattern, instead, text)
    return [line.rstrip() for line in re.split(r"[\r\n]+", text) if line.strip() and "%|" not in line]


def untimed(value):
    """JSON without the values in UNTIMED; peft writes a set of names in any order."""
    if isinstance(value, dict):
        kept = {name: untimed(inner) for name, inner in value.items() if name not in UNTIMED}
        return kept | {name: sorted(kept[name]) for name in kept if name == "target_modules"}
    return [untimed(inner) for inner in value] if isinstance(value, list) else value


def tensors(path: Path) -> dict[str, str]:
    """Dtype, shape and sha256 of each tensor of a safetensors file."""
    raw = lambda t: t.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return {name: f"{t.dtype} {list(t.shape)} {sha(raw(t))}" for name, t in sorted(load_file(path).items())}


def report_text(page: str) -> list[str]:
    """What a report says, without drawings, numbers and durations."""
    page = re.sub(r"(?s)<(svg|style|script)\b.*?</\1>|<[^>]*>", "\n", page)
    page = re.sub(r"( in)?( ?\b[\d.]+ (d|h|min|s)\b)+", "", page)
    page = re.sub(r"[−+]?\d[\d.,:]*( [GMk]B| bytes)?", "#", page)
    return [line.strip() for line in page.split("\n") if line.strip()]


def contents(path: Path):
    """A file as JSON; None for one of which only the name is recorded."""
    if path.suffix == ".png":
        return None
    if path.suffix == ".safetensors" and "checkpoints" not in path.parts:
        return tensors(path)
    if path.suffix == ".safetensors" or path.name == "tokenizer.json":
        return sha(path.read_bytes())
    text = path.read_text().replace(str(Path.cwd()), "WORK")
    if path.suffix == ".json":
        return untimed(json.loads(text))
    if path.suffix == ".jsonl":
        return [untimed(json.loads(line)) for line in text.splitlines()]
    return report_text(text) if path.suffix == ".html" else masked(text)


def folder(path: Path) -> dict:
    """Every file of a folder, by name."""
    return {str(file.relative_to(path)): contents(file) for file in sorted(path.rglob("*")) if file.is_file()}


def cache(path: Path) -> dict:
    """A reference cache: tables, namespaces with their parts, packs as keys with each value's sha256."""
    with contextlib.closing(sqlite3.connect(path)) as db:
        tables = sorted(sql for (sql,) in db.execute("SELECT sql FROM sqlite_master WHERE sql NOT NULL"))
        parts = {space.hex(): json.loads(of) for space, of in db.execute("SELECT id, parts FROM namespaces")}
        packs = []
        for space, keys, lengths, logps in db.execute("SELECT namespace, keys, lengths, logps FROM packs"):
            values, pack = io.BytesIO(logps), {"namespace": space.hex()}
            for i, n in enumerate(memoryview(lengths).cast("i")):
                pack[keys[16 * i : 16 * i + 16].hex()] = f"{n} {sha(values.read(4 * n))}"
            packs.append(pack)
    return {"tables": tables, "namespaces": parts, "packs": packs}


def run(output_dir: str, **keys) -> dict:
    """One training, from Python, with a cache of its own unless the keys name one; the record of it."""
    os.environ["XDG_CACHE_HOME"] = home = f"caches/{output_dir}"
    said, error = io.StringIO(), None
    torch.manual_seed(0)
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(io.StringIO()):
        try:
            fastdpo.train(fastdpo.Config(**WHAT["shared"] | {"output_dir": output_dir} | keys))
        except Exception as problem:
            error = masked(f"{type(problem).__name__}: {problem}")
    caches = [*Path(home).rglob("*.sqlite"), *Path(".").glob(keys.get("reference_cache", "none"))]
    return {
        "error": error,
        "said": masked(said.getvalue()),
        "folder": folder(Path(output_dir)),
        "caches": [cache(path) for path in caches if path.suffix == ".sqlite"],
    }


def resumed(output_dir: str, step: int, **keys) -> dict:
    """A run, and the same one again from its checkpoint at a step: later ones and the model are deleted."""
    whole = run(output_dir, save_total_limit=99, **keys)
    shutil.rmtree(f"{output_dir}/model")
    for path in Path(output_dir, "checkpoints").iterdir():
        if int(path.name.removeprefix("step-")) > step:
            shutil.rmtree(path)
    return {"whole": whole, "cut": run(output_dir, save_total_limit=99, resume=True, **keys)}


def command(words: str) -> dict:
    """`fastdpo WORDS` in a process of its own; all of them share a cache."""
    os.environ["XDG_CACHE_HOME"] = "caches/commands"
    argv = [sys.executable, "-m", "fastdpo.cli", *shlex.split(words)]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=300)
    return {"exit": done.returncode, "stdout": masked(done.stdout), "stderr": masked(done.stderr)}


def jobs():
    """(name, function, arguments, keys) of everything, in order: some build on what others left."""
    table = command("objectives")
    yield "command/objectives", dict, (table,), {}
    two_steps = {"data": "scored.jsonl", "max_steps": 2, "logging_steps": 2, "max_tokens": 60}
    for name in re.findall(r"(?m)^(\w+) {2,}\S", "\n".join(table["stdout"][1:])):
        yield f"objective/{name}", run, (f"runs/objective-{name}",), two_steps | {"objective": name}
    for name, keys in WHAT["runs"].items():
        yield f"run/{name}", run, (f"runs/{name}",), keys
    for name, (step, keys) in WHAT["resumed"].items():
        yield f"resumed/{name}", resumed, (f"runs/resumed-{name}", step), keys
    for name, (keys, _) in WHAT["formats"].items():
        one_step = {"data": f"format_{name}.jsonl", "eval_data": None, "max_steps": 1}
        yield f"format/{name}", run, (f"runs/format-{name}",), one_step | keys
    for number, keys in enumerate(WHAT["refused"]):
        yield f"refused/{json.dumps(keys)}", run, (), {"output_dir": f"runs/refused-{number}"} | keys
    for words in WHAT["commands"]:
        yield f"command/{words}", command, (words,), {}
    for name in ("runs/command", "runs/trl", "runs/lora-merged", "converted"):
        yield f"folder/{name}", folder, (Path(name),), {}
    yield "commands' cache", cache, (Path("caches/commands/fastdpo/reference.sqlite"),), {}


def record(out: Path) -> None:
    """Everything, into OUT/golden.json."""
    path, work, golden = out.resolve() / "golden.json", out.resolve() / "work", {}
    if work.exists():
        sys.exit(f"{work} exists already: remove it, or name another folder")
    work.mkdir(parents=True)
    os.chdir(work)
    script = [sys.executable, "-c", "import fastdpo; print(fastdpo.__file__)"]
    if subprocess.run(script, capture_output=True, text=True).stdout.strip() != fastdpo.__file__:
        sys.exit("the commands would run another fastdpo: give PYTHONPATH in absolute paths")
    torch.set_num_threads(1)
    write_inputs()
    start = time.perf_counter()
    for name, make, arguments, keys in jobs():
        golden[name] = make(*arguments, **keys)
        print(f"{time.perf_counter() - start:6.1f} s  {name}", flush=True)
    path.write_text(json.dumps(golden, indent=1, ensure_ascii=False) + "\n")


def differences(a, b, where: str = ""):
    """Lines that say where two records differ, and how."""
    if all(isinstance(v, list) and any(isinstance(inner, dict) for inner in v) for v in (a, b)):
        a, b = dict(enumerate(a)), dict(enumerate(b))
    if isinstance(a, dict) and isinstance(b, dict):
        for name in dict.fromkeys((*a, *b)):
            if name in a and name in b:
                yield from differences(a[name], b[name], f"{where} > {name}" if where else name)
            else:
                yield f"{where} > {name}: only in the {'first' if name in a else 'second'}"
    elif isinstance(a, list) and isinstance(b, list) and a != b:
        changed = list(difflib.unified_diff([str(v) for v in a], [str(v) for v in b], n=0, lineterm=""))[2:]
        yield "\n".join([f"{where}:", *(f"    {line}" for line in changed if line[0] != "@")])
    elif a != b:
        yield f"{where}: {a!r} -> {b!r}"


def compare(a: Path, b: Path) -> int:
    """Prints the differences; the exit code."""
    first, second = (json.loads((path / "golden.json").read_text()) for path in (a, b))
    found = list(differences(first, second))
    print("\n".join(found) or f"equal: {len(first)} records")
    return bool(found)


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["--compare", a, b]:
            sys.exit(compare(Path(a), Path(b)))
        case [out] if not out.startswith("-"):
            record(Path(out))
        case _:
            sys.exit(__doc__)
