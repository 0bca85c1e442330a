"""Scripts and notebooks of Python as configs: read, never run."""

import json

import pytest

from fastdpo.cli import main
from fastdpo.convert.convert import read
from fastdpo.convert.draft import Unresolved
from fastdpo.errors import ConfigError
from tests.convert.translated import translate

NOTEBOOK = [
    "%%capture\n!pip install unsloth \\\n  trl\nmax_seq_length = 1024",
    "%%bash\nthis is no Python",
    "from unsloth import FastLanguageModel\n%matplotlib inline\nif True:\n    !ls\n",
    """
model, tokenizer = FastLanguageModel.from_pretrained(
    model_name = "unsloth/model-bnb-4bit", max_seq_length = max_seq_length, dtype = None, token = "secret",
)
model = FastLanguageModel.get_peft_model(model, r = 8, lora_alpha = 2 * 8, use_gradient_checkpointing = True)
""",
    "if False:\n    model = FastLanguageModel.from_pretrained(model_name = 'lora_model')",
    "dataset = load_dataset('org/data')['train_prefs'].map(lambda row: row)",
    """
trainer = ORPOTrainer(
    model = model, ref_model = None, train_dataset = dataset, tokenizer = tokenizer,
    args = ORPOConfig(
        beta = 0.2, max_length = max_seq_length // 2, learning_rate = -(-1e-5), output_dir = "out",
        bf16 = is_bfloat16_supported(), fp16 = not is_bfloat16_supported(),
    ),
)
trainer.train()
""",
    "model = FastLanguageModel.from_pretrained(model_name = 'lora_model')  # to try it",
]
SCRIPT = """
import os
BETA = 0.3
class Settings:
    rank = 4
    name = "org/model"
settings = Settings()
def run(rate, data, out=None):
    bnb = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    model = AutoModelForCausalLM.from_pretrained(
        settings.name, quantization_config=bnb, torch_dtype=torch.bfloat16, device_map="auto"
    )
    ref = AutoModelForCausalLM.from_pretrained(settings.name)
    rows = load_dataset("json", data_files={"train": data}, split="train[:50%]")
    lora = LoraConfig(r=Settings.rank, target_modules=["q_proj"], task_type="CAUSAL_LM", bias="none")
    args = TrainingArguments(
        output_dir=os.environ["OUT"], learning_rate=rate, max_steps=7, seed=settings.rank
    )
    trainer = DPOTrainer(model, ref, args=args, train_dataset=rows, peft_config=lora, beta=BETA)
    trainer.train()
if __name__ == "__main__":
    rate = 1e-5
    run(rate, data="rows.jsonl")
"""


def written(folder, text, name="dpo.py"):
    path = folder / name
    if isinstance(text, list):
        cells = [{"cell_type": "markdown", "source": ["# no code"]}]
        cells += [{"cell_type": "code", "source": source.splitlines(keepends=True)} for source in text]
        text, path = json.dumps({"cells": cells}), folder / "dpo.ipynb"
    path.write_text(text, encoding="utf-8")
    return path


def test_a_notebook(tmp_path):
    values = read(written(tmp_path, NOTEBOOK))
    assert values == {
        "model_name": "unsloth/model-bnb-4bit", "max_seq_length": 1024, "r": 8, "lora_alpha": 16,
        "use_gradient_checkpointing": True, "beta": 0.2, "max_length": 512, "learning_rate": 1e-5,
        "output_dir": "out", "bf16": "is_bfloat16_supported()", "fp16": "not is_bfloat16_supported()",
        "loss_type": "orpo", "dataset_name": "org/data", "dataset_train_split": "train_prefs", "map": "map",
    }  # fmt: skip
    ours, notes = translate(values)
    assert ours["objective"] == "orpo" and ours["data"] == "org/data#train_prefs" and "dtype" not in ours
    assert {"bf16", "fp16", "map"} <= {note.split()[1] for note in notes if note.startswith("check: ")}


def test_a_script(tmp_path):
    values = read(written(tmp_path, SCRIPT))
    ours, notes = translate(values)
    assert notes[0] == "read as a config of TRL"
    small = {"batch_size": 8, "max_steps": 7, "learning_rate": 1e-5, "seed": 4, "beta": 0.3}
    lora = {"lora_rank": 4, "lora_alpha": 8.0, "lora_target_modules": ["q_proj"], "load_in_4bit": True}
    names = {"model": "org/model", "data": "rows.jsonl#train[:50%]", "objective": "sigmoid"}
    assert ours == small | lora | names  # output_dir is not known, and ours is as good
    assert any(
        note.startswith("check: output_dir os.environ['OUT']: left out, only running") for note in notes
    )


@pytest.mark.parametrize(
    "old, new, text",
    [
        ("beta=BETA", "beta=args.beta", "beta: args.beta: only running the file would tell"),
        ("beta=BETA", "beta=-[1]", "beta: -[1]: only running the file would tell"),
        ("beta=BETA", "beta={[1]: 2}", "beta: {[1]: 2}: only running the file would tell"),
        ("beta=BETA", "**more", "DPOTrainer(**): more: only running the file would tell"),
        ("BETA = 0.3", "BETA = 0.3\nBETA = 0.4", "beta: BETA: only running"),
        ("BETA = 0.3", "BETA = 0.3\nfor BETA in (1, 2): pass", "beta: BETA: only running"),
        ("rate = 1e-5", "rate = float('1e-5')", "learning_rate: rate: only running"),
        ('    run(rate, data="rows.jsonl")', "    main()", "data: {'train': data}#train[:50%]: only running"),
        ("Settings()", "Settings(rank=9)", "model_name_or_path: settings.name: only running"),
        (
            "from_pretrained(settings.name)",
            "from_pretrained('o/r')",
            "ref_model: ref: the reference is the model",
        ),
        ("bias=", "lora_magic=True, bias=", "lora_magic: true: not a key that is known of TRL"),
    ],
)
def test_what_is_no_literal_is_listed(tmp_path, old, new, text):
    assert old in SCRIPT
    with pytest.raises(ConfigError) as error:
        translate(read(written(tmp_path, SCRIPT.replace(old, new))))
    assert text in str(error.value)


def test_calls_that_do_not_agree(tmp_path):
    branch = SCRIPT.replace("    ref = Auto", "    model = Auto").replace("model, ref,", "model,")
    other = branch.replace("from_pretrained(settings.name)", "from_pretrained('org/other')")
    values = read(written(tmp_path, other))
    assert values["model_name_or_path"] == "org/model or org/other"
    assert isinstance(values["model_name_or_path"], Unresolved)
    assert read(written(tmp_path, branch))["model_name_or_path"] == "org/model"


@pytest.mark.parametrize(
    "load, data",
    [
        ("load_dataset('o/d', 'en', split='train[:9]')", "o/d:en#train[:9]"),
        ("load_dataset('o/d', split='train'), load_dataset('o/d', split='test')", "o/d"),
        ("load_dataset('o/d')['prefs'], load_dataset('o/d')['test_prefs']", "o/d#prefs"),
        ("load_dataset('o/d', data_dir='data/rl')", "o/d:data/rl"),
        ("load_dataset('json', data_files=['a.jsonl'])", "a.jsonl"),
        ("load_from_disk('rows')", "rows"),
    ],
)
def test_where_the_rows_are(tmp_path, load, data):
    there = 'load_dataset("json", data_files={"train": data}, split="train[:50%]")'
    assert there in SCRIPT
    assert translate(read(written(tmp_path, SCRIPT.replace(there, load))))[0]["data"] == data


@pytest.mark.parametrize(
    "trainer, options, loss",
    [
        ("KTOTrainer", "", "kto"),
        ("BCOTrainer", "", "bco"),
        ("CPOTrainer", "", "cpo"),
        ("CPOTrainer", "loss_type='simpo', ", "simpo"),
        ("DPOTrainer", "loss_type='ipo', ", "ipo"),
        ("DPOTrainer", "", None),
    ],
)
def test_the_trainer_says_the_objective(tmp_path, trainer, options, loss):
    text = SCRIPT.replace("DPOTrainer(model, ref,", f"{trainer}(model, None, {options}")
    assert read(written(tmp_path, text)).get("loss_type") == loss


@pytest.mark.parametrize(
    "old, new, text",
    [
        ("DPOTrainer", "SFTTrainer", "dpo.py: one of DPOTrainer, ORPOTrainer, CPOTrainer, KTOTrainer"),
        ("trainer.train()", "KTOTrainer()", "is to be called; here it is DPOTrainer and KTOTrainer"),
        ("beta=BETA", "loss_type='hinge'", "loss_type: CPOTrainer's hinge is not to be had"),
        ("import os", "import", "dpo.py cannot be read as Python: "),
    ],
)
def test_what_no_config_can_be_read_from(tmp_path, old, new, text):
    with pytest.raises(ConfigError) as error:
        cpo = SCRIPT.replace("DPOTrainer", "CPOTrainer") if "hinge" in new else SCRIPT
        read(written(tmp_path, cpo.replace(old, new)))
    assert text in str(error.value)


def test_a_notebook_without_cells(tmp_path):
    (tmp_path / "old.ipynb").write_text('{"worksheets": []}')
    with pytest.raises(ConfigError, match="cannot be read as Python: no notebook of version 4"):
        read(tmp_path / "old.ipynb")


def test_convert_takes_it_and_runs_nothing(tmp_path, capsys):
    path = written(tmp_path, [*NOTEBOOK, f"open({str(tmp_path / 'ran')!r}, 'w')"])
    assert main(["convert", str(path)]) == 0
    assert "objective: orpo" in capsys.readouterr().out and not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "code, becomes, note",
    [
        (
            "tokenizer = get_chat_template(tokenizer, chat_template = 'llama-3')",
            "llama3",
            "get_chat_template",
        ),
        ("tokenizer = get_chat_template(tokenizer, 'qwen-2.5')", None, "check: get_chat_template qwen-2.5: "),
        ("tokenizer.chat_template = TEXT", None, "check: tokenizer.chat_template the code's own: "),
        ("tokenizer = get_chat_template(tokenizer, chat_template = (TEXT, EOS))", None, "check: tokenizer."),
    ],
)
def test_templates(tmp_path, code, becomes, note):
    values = read(written(tmp_path, [*NOTEBOOK, code])) | {"bf16": True, "fp16": False}
    ours, notes = translate(values)
    assert ours.get("chat_template") == becomes
    assert any(one.startswith(note) for one in notes)
