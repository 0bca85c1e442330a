"""torchtune's DPO configs as ours."""

import copy

import pytest
import yaml

from fastdpo.config.keys import from_values
from fastdpo.convert.convert import recognise
from fastdpo.errors import ConfigError
from tests.convert.translated import translate

LORA = yaml.safe_load("""
output_dir: out
model:
  _component_: torchtune.models.llama3_1.lora_llama3_1_8b
  lora_attn_modules: [q_proj, output_proj]
  apply_lora_to_mlp: true
  lora_rank: 8
  lora_alpha: 16
  lora_dropout: 0.0
tokenizer: {_component_: torchtune.models.llama3.llama3_tokenizer, path: x/tokenizer.model, max_seq_len: 512}
checkpointer:
  _component_: torchtune.training.FullModelHFCheckpointer
  checkpoint_dir: /models/Llama-3.1-8B/
  checkpoint_files: [a.safetensors]
  output_dir: ${output_dir}
dataset: {_component_: torchtune.datasets.stack_exchange_paired_dataset}
batch_size: 4
gradient_accumulation_steps: 8
optimizer: {_component_: torch.optim.AdamW, lr: 5e-4, fused: true}
loss: {_component_: torchtune.rlhf.loss.DPOLoss, beta: 0.05}
epochs: 2
max_steps_per_epoch: null
metric_logger: {_component_: torchtune.training.metric_logging.WandBLogger, project: p}
dtype: bf16
seed: null
shuffle: true
""")


def config(**changes):
    """LORA with changes: `loss__beta=1` is loss.beta; None as a whole part takes it out."""
    values = copy.deepcopy(LORA)
    for key, value in changes.items():
        part, _, name = key.partition("__")
        if name:
            values.setdefault(part, {})[name.replace("component", "_component_")] = value
        elif value is None:
            values.pop(part, None)
        else:
            values[part] = value
    return values


def problems(values) -> str:
    with pytest.raises(ConfigError) as error:
        translate(values)
    return str(error.value)


def test_a_lora_config():
    ours, notes = translate(LORA)
    from_values(ours)
    assert notes[0] == "read as a config of torchtune"
    modules = ["q_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    data_format = {
        "format": "intel",
        "question": "question",
        "chosen": "response_j",
        "rejected": "response_k",
    }
    assert ours == {
        "output_dir": "out", "model": "/models/Llama-3.1-8B", "data_format": data_format,
        "data": "lvwerra/stack-exchange-paired:data/rl", "batch_size": 32, "num_epochs": 2.0,
        "lora_rank": 8, "lora_alpha": 16.0, "lora_target_modules": modules,
        "dtype": "bf16", "optim": "adamw_torch_fused", "learning_rate": 5e-4, "weight_decay": 0.01,
        "lr_scheduler_type": "constant", "max_grad_norm": 0.0, "max_length": 512, "report_to": "wandb",
        "objective": "sigmoid", "beta": 0.05,
    }  # fmt: skip
    assert "loss.beta 0.05 -> beta 0.05" in notes
    assert "optimizer.weight_decay 0.01 (torchtune's default) -> weight_decay 0.01" in notes
    assert "clip_grad_norm is not given -> max_grad_norm 0" in notes
    assert "checkpointer.output_dir out: left out, output_dir has it" in notes  # ${output_dir} is put in


def test_all_weights():
    full = config(
        model={"_component_": "torchtune.models.llama2.llama2_7b"},
        ref_checkpointer={"checkpoint_dir": "/models/Llama-3.1-8B/"},
        clip_grad_norm=1.5,
        optimizer_in_bwd=False,
        max_steps_per_epoch=100,
    )
    ours, notes = translate(full)
    assert "lora_rank" not in ours and ours["pure_bf16"] and ours["max_grad_norm"] == 1.5
    assert ours["max_steps"] == 200 and "num_epochs" not in ours
    assert any(note.startswith("check: optimizer.weight_decay 0.01") for note in notes)
    assert any(note.startswith("check: batch_size 4: it is one device's") for note in notes)
    full["ref_checkpointer"]["checkpoint_dir"] = "/models/other"
    assert problems(full).startswith("ref_checkpointer.checkpoint_dir: /models/other: the reference is")


def test_lora_recipes_do_not_clip():
    ours, notes = translate(config(clip_grad_norm=1.0))
    assert ours["max_grad_norm"] == 0
    assert "clip_grad_norm 1: left out, torchtune's LoRA recipes do not read it, and do not clip" in notes


@pytest.mark.parametrize(
    "tokenizer, template, around",
    [
        ("llama2.llama2_tokenizer", None, "[INST] {prompt} [/INST] "),
        (
            "llama2.llama2_tokenizer",
            "torchtune.data.QuestionAnswerTemplate",
            "Question: {prompt}\n\nAnswer: ",
        ),
        ("mistral.mistral_tokenizer", {"user": ["Q: ", "\nA: "]}, "Q: {prompt}\nA: "),
    ],
)
def test_tokenizers_that_write_turns_as_text(tokenizer, template, around):
    values = config(tokenizer__component=f"torchtune.models.{tokenizer}", tokenizer__prompt_template=template)
    names = {"prompt": "question", "chosen": "response_j", "rejected": "response_k"}
    assert translate(values)[0]["data_format"] == names | {"prompt_format": around}


def test_an_optimizer_s_betas_and_epsilon():
    ours, _ = translate(config(optimizer__betas=[0.8, 0.95], optimizer__eps="1e-7"))
    assert (ours["adam_beta1"], ours["adam_beta2"], ours["adam_epsilon"]) == (0.8, 0.95, 1e-7)


def test_other_data():
    pairs = "torchtune.datasets.preference_dataset"
    values = config(dataset={"_component_": pairs, "source": "json", "data_files": "a.jsonl"})
    ours, _ = translate(values)
    assert ours["data"] == "a.jsonl" and "data_format" not in ours
    values["dataset"]["column_map"] = {"chosen": "good", "rejected": "bad"}
    values["dataset"] |= {"data_files": ["a.jsonl", "b.jsonl"], "split": "train[:9]"}
    ours, _ = translate(values)
    assert ours["data"] == ["a.jsonl#train[:9]", "b.jsonl#train[:9]"]
    assert ours["data_format"] == {"chosen": "good", "rejected": "bad"}
    ours, _ = translate(config(dataset={"_component_": pairs, "source": "me/pairs", "name": "en"}))
    assert ours["data"] == "me/pairs:en"
    ours, _ = translate(config(dataset={"_component_": "torchtune.datasets.hh_rlhf_helpful_dataset"}))
    assert ours["data"] == "RLHFlow/HH-RLHF-Helpful-standard"


def test_quantised():
    ours, _ = translate(config(model__component="torchtune.models.llama3_1.qlora_llama3_1_8b"))
    assert ours["load_in_4bit"] and ours["lora_rank"] == 8
    assert translate(config(model__quantize_base=True))[0]["load_in_4bit"]


@pytest.mark.parametrize(
    "changes, text",
    [
        ({"model__lora_dropout": 0.1}, "model.lora_dropout: 0.1: fastdpo trains LoRA without dropout"),
        ({"loss__component": "torchtune.rlhf.loss.SimPOLoss"}, "known are DPOLoss, RSOLoss"),
        ({"optimizer__component": "torch.optim.Adamax"}, "optimizer._component_: torch.optim.Adamax: known"),
        ({"lr_scheduler__component": "torch.optim.lr_scheduler.StepLR"}, "lr_scheduler._component_: torch"),
        ({"dataset__component": "mine.pairs"}, "dataset._component_: mine.pairs: known are stack_exchange_"),
        ({"dataset": [{}, {}]}, "dataset: [{}, {}]: give the data sets as data"),
        ({"dataset__train_on_input": True}, "dataset.train_on_input: true: responses are what is scored"),
        ({"dataset__new_system_prompt": "S"}, "dataset.new_system_prompt: S: give rows a system column"),
        ({"shuffle": False}, "shuffle: false: rows are shuffled by seed"),
        (
            {"tokenizer__prompt_template": "torchtune.data.QuestionAnswerTemplate"},
            "tokenizer.prompt_template",
        ),
        (
            {"checkpointer__component": "torchtune.training.FullModelTorchTuneCheckpointer"},
            "checkpointer._component_: torchtune.training.FullModelTorchTuneCheckpointer: a folder in",
        ),
    ],
)
def test_what_cannot_be_had(changes, text):
    found = problems(config(**changes))
    assert text in found and "\n" not in found


def test_rso_and_metas_checkpoints():
    ours, _ = translate(
        config(
            loss={"_component_": "torchtune.rlhf.loss.RSOLoss", "gamma": 0.2},
            checkpointer={
                "_component_": "torchtune.training.FullModelMetaCheckpointer",
                "checkpoint_dir": "/models/Llama-3-8B/original/",
            },
        )
    )
    assert (ours["objective"], ours["beta"], ours["model"]) == ("hinge", 0.2, "/models/Llama-3-8B")


def test_it_is_told_by_components_alone():
    assert recognise(LORA).name == "torchtune"
    assert recognise({"model": "m", "data": "d"}) is None
