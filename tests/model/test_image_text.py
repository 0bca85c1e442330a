"""Models that see images: loaded with their processors, what of them trains, and saved again."""

import io
import json
import re

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForImageTextToText

from fastdpo.errors import ConfigError, ModelError
from fastdpo.model import processors
from fastdpo.model.finding import Source, find_source
from fastdpo.model.loading import (
    load_model_config,
    load_policy,
    load_tokenizer,
    restore_dropout,
    switch_off_dropout,
)
from fastdpo.model.processors import load_processor
from fastdpo.model.saving import save_model
from fastdpo.model.spec import ModelSpec
from fastdpo.model.towers import decoder_name, unquantised
from fastdpo.publish.merge import merge
from fastdpo.reference.fingerprint import reference_fingerprint
from fastdpo.sampling.generate import end_tokens
from fastdpo.training.samples import complete
from tests import images
from tests.hub import REFUSALS, running

QUIET = Console(quiet=True)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = {}

    def folder(family):
        if family not in made:
            made[family] = images.save(tmp_path_factory.mktemp("models") / family, family)
        return made[family]

    return folder


def loaded(**keys):
    spec = ModelSpec(**{"max_length": 64, "dtype": "fp32"} | keys)
    tokenizer = load_tokenizer(spec)
    processor = load_processor(spec, tokenizer)
    return load_policy(spec, QUIET, processor=processor), tokenizer


@pytest.mark.parametrize("family", images.FAMILIES)
def test_each_family_loads_with_its_processor_and_trains_its_language_model_alone(family, folders):
    policy, tokenizer = loaded(model=folders(family))
    assert policy.processor.tokenizer is tokenizer
    assert policy.processor.chat_template == tokenizer.chat_template is not None
    made = dict(images=[[images.picture(1)]], text=[f"a {images.PLACEHOLDER[family]} b"])
    got, expected = (p(**made, return_tensors="pt") for p in (policy.processor, images.processor(family)))
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[key], expected[key]) for key in expected)
    decoder = decoder_name(policy.core)
    trained = {name for name, weight in policy.core.named_parameters() if weight.requires_grad}
    assert trained and all(name.startswith((f"{decoder}.", "lm_head.")) for name in trained)
    frozen = {name for name, _ in policy.core.named_parameters()} - trained
    assert frozen and not any(name.startswith((f"{decoder}.", "lm_head.")) for name in frozen)


@pytest.mark.parametrize("family", images.FAMILIES)
@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "lm_head"]])
def test_a_lora_is_on_the_language_model_alone(family, targets, folders, tmp_path):
    policy, tokenizer = loaded(model=folders(family), lora_rank=2, lora_target_modules=targets)
    decoder = decoder_name(policy.core)
    on = [name for name, module in policy.core.named_modules() if hasattr(module, "lora_A")]
    layers = 2 * (7 if targets == "all-linear" else 1)
    assert len([name for name in on if name.startswith(f"{decoder}.")]) == layers
    assert [name for name in on if not name.startswith(f"{decoder}.")] == ["lm_head"] * (
        targets != "all-linear"
    )
    save_model(policy, tokenizer, tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"]
    assert isinstance(saved, str) and re.escape(decoder) in saved
    again, _ = loaded(model=str(tmp_path))
    assert again.processor is not None and len(again.trained()) == len(policy.trained())


def test_without_freeze_vision_all_trains(folders):
    policy, _ = loaded(model=folders("llava"), freeze_vision=False)
    assert all(weight.requires_grad for weight in policy.model.parameters())
    policy, _ = loaded(model=folders("llava"), freeze_vision=False, lora_rank=2)
    assert any("vision" in name for name, p in policy.model.named_parameters() if p.requires_grad)


def test_a_pattern_that_is_on_the_tower_contradicts_freeze_vision(folders):
    with pytest.raises(ConfigError, match="freeze_vision: the LoRA is also on what images go through"):
        loaded(model=folders("llava"), lora_rank=2, lora_target_modules=r".*\.q_proj")
    with pytest.raises(ConfigError, match="are modules of the vision tower alone"):
        loaded(model=folders("llava"), lora_rank=2, lora_target_modules=["fc1"])


@pytest.mark.parametrize("family", ["qwen2_5_vl", "smolvlm", "llava"])
def test_what_is_saved_loads_in_transformers_with_the_sources_processor(family, folders, tmp_path):
    policy, tokenizer = loaded(model=folders(family))
    save_model(policy, tokenizer, tmp_path)
    model = AutoModelForImageTextToText.from_pretrained(tmp_path)
    for name, tensor in policy.core.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name
    for name, text in processors._stored[policy.processor].items():
        assert (tmp_path / name).read_bytes() == text
    assert load_processor(ModelSpec(str(tmp_path)), tokenizer) is not None


@pytest.fixture
def hub(tmp_path, monkeypatch):
    with running(monkeypatch, tmp_path / "hub") as hub:
        yield hub


@pytest.mark.parametrize("answer", [*REFUSALS, None])
def test_a_processor_that_the_hub_does_not_give_is_not_one_that_is_not_there(answer, hub):
    hub.answer = answer
    found = Source("org/vlm", "model: 'org/vlm'", None)
    if answer is not None and "no such file" in answer:
        assert processors.stored_files(found) == {} and processors.template_beside(found) is None
        return
    with pytest.raises(ModelError) as caught:
        processors.stored_files(found)
    said = str(caught.value)
    assert said.startswith("model: 'org/vlm': processor_config.json cannot be had: ")
    assert said.endswith("; try again, or download it first (`hf download org/vlm`)") and "\n" not in said
    words = {
        "down": " answers 503",
        None: "is out of reach",
        "gated": "is gated",
        "not there": "neither a path",
    }
    assert words[answer] in said


def test_a_processor_that_is_not_in_the_cache_may_be_on_the_hub(hub, tmp_path):
    place, revision = tmp_path / "hub/models--org--cached-vlm", "c" * 40
    snapshot = place / "snapshots" / revision
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    (place / "refs").mkdir()
    (place / "refs/main").write_text(revision)
    found = find_source("org/cached-vlm", "model: 'org/cached-vlm'")
    with pytest.raises(ModelError) as caught:
        processors.stored_files(found)
    said = str(caught.value)
    assert said.startswith(
        f"model: 'org/cached-vlm': its processor is not in the hub's cache, and the hub, {hub.address}"
    )
    assert f"; give {snapshot} if the model has none, or download it first" in said
    assert processors.stored_files(find_source(str(snapshot), "model")) == {}
    (place / ".no_exist" / revision).mkdir(parents=True)
    for name in processors._FILES:  # the hub has said so
        (place / ".no_exist" / revision / name).touch()
    assert processors.stored_files(found) == {}
    (snapshot / "preprocessor_config.json").write_text("{}")
    assert processors.stored_files(found) == {"preprocessor_config.json": b"{}"}


def test_a_tower_counts_for_the_reference(folders):
    fingerprint = lambda policy, fresh=False: reference_fingerprint(policy, fresh).namespace
    policy, _ = loaded(model=folders("llava"))
    before = fingerprint(policy)
    lora, _ = loaded(model=folders("llava"), lora_rank=2)
    assert fingerprint(lora, fresh=True) == before
    assert fingerprint(lora) != before
    for part in ("vision_tower", "multi_modal_projector"):
        weight = next(p for name, p in policy.core.named_parameters() if part in name)
        with torch.no_grad():
            weight.view(-1)[0] += 1
        assert fingerprint(policy) != before
        with torch.no_grad():
            weight.view(-1)[0] -= 1
    policy.core.config.vision_config.image_size += 1
    assert fingerprint(policy) != before


def test_dropout_of_towers_is_off_and_comes_back(folders):
    config = images.config("llava")
    config.vision_config.attention_dropout, config.text_config.attention_dropout = 0.1, 0.2
    dropped = switch_off_dropout(config)
    assert dropped == {"attention_dropout": 0.2, "vision_config.attention_dropout": 0.1}
    assert config.vision_config.attention_dropout == config.text_config.attention_dropout == 0
    restore_dropout(config, dropped)
    assert (config.vision_config.attention_dropout, config.text_config.attention_dropout) == (0.1, 0.2)


def test_lengths_and_what_is_whole_in_4_bits(folders):
    spec = ModelSpec(folders("llava"), max_length=513)
    with pytest.raises(ConfigError, match="max_length: 513 is more than the 512 positions"):
        load_model_config(spec)
    config = load_model_config(ModelSpec(spec.model, max_length=8))
    assert unquantised(config) == ["lm_head", "model.vision_tower", "model.multi_modal_projector"]


def test_in_4_bits_is_the_language_model_alone(folders, tmp_path):
    bnb = pytest.importorskip("bitsandbytes")
    policy, _ = loaded(model=folders("llava"), load_in_4bit=True, lora_rank=2)
    decoder = decoder_name(policy.core)
    short = [name for name, m in policy.core.named_modules() if isinstance(m, bnb.nn.Linear4bit)]
    assert len(short) == 14 and all(name.startswith(f"{decoder}.") for name in short)
    assert len([m for m in policy.core.modules() if hasattr(m, "lora_A")]) == 14


def test_a_model_without_a_processor_is_one_for_text(folders, tmp_path):
    images.model("llava").save_pretrained(tmp_path)
    images.tokenizer("llava").save_pretrained(tmp_path)
    policy, _ = loaded(model=str(tmp_path))
    assert policy.processor is None


def test_a_processor_that_lacks_a_package_says_so(folders, monkeypatch):
    monkeypatch.setattr(processors, "_NEEDS", {"num2words": "no_such_package"})
    monkeypatch.setattr(processors, "without_video", lambda cls: 1 / 0)
    with pytest.raises(ModelError, match=r"the processor in .* cannot be loaded: ZeroDivisionError"):
        loaded(model=folders("smolvlm"))

    def lacks(cls):
        raise ImportError("Package `num2words` is required")

    monkeypatch.setattr(processors, "without_video", lacks)
    with pytest.raises(
        ModelError, match=r"the processor in .* needs num2words: pip install 'fastdpo\[vision\]'"
    ):
        loaded(model=folders("smolvlm"))


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_merging_an_adapter_gives_the_whole_model(family, folders, tmp_path):
    policy, tokenizer = loaded(model=folders(family), lora_rank=2)
    with torch.no_grad():
        for weight in policy.trained():
            weight.normal_(0, 0.1)
    save_model(policy, tokenizer, tmp_path / "adapter")
    out = merge(tmp_path / "adapter", console=QUIET)
    merged, _ = loaded(model=str(out))
    assert merged.processor is not None
    ids = torch.arange(40, 60)[None]
    with torch.no_grad():
        expected, got = (p.model.eval()(input_ids=ids).logits for p in (policy, merged))
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", images.FAMILIES)
def test_prompts_with_images_are_completed_as_by_the_models_own_generate(family, folders):
    policy, tokenizer = loaded(model=folders(family), max_length=256)
    groups = images.groups(family)
    told = Console(record=True, file=io.StringIO(), width=300)
    rows = complete(policy, tokenizer, groups, max_new_tokens=5, console=told)
    assert len(rows) == len(groups), told.export_text()
    model, processor = policy.core.eval(), images.processor(family)
    ends = end_tokens(policy, tokenizer, groups)
    for group, row in zip(groups, rows):
        given = {"input_ids": torch.from_numpy(group.prompt)[None]}
        if group.images:
            pictures = [[one.open() for one in group.images]]
            texts = ["the old cat" + f" {images.PLACEHOLDER[family]} sees a red bird" * len(group.images)]
            given = dict(processor(images=pictures, text=texts, return_tensors="pt"))
            assert given["input_ids"][0].tolist() == group.prompt.tolist()
        elif family == "paligemma":
            given["token_type_ids"] = torch.zeros_like(given["input_ids"])
        with torch.no_grad():
            given["attention_mask"] = torch.ones_like(given["input_ids"])
            how = dict(max_new_tokens=5, do_sample=False, eos_token_id=ends, pad_token_id=0)
            out = model.generate(**given, **how)
        new = out[0, len(group.prompt) :].tolist()
        until = next((i for i, token in enumerate(new) if token in ends), len(new))
        assert row["completion"] == tokenizer.decode(new[:until], skip_special_tokens=True).strip()


def test_loading_is_quiet(folders, capfd):
    loaded(model=folders("qwen2_5_vl"))
    out, err = capfd.readouterr()
    assert "torchvision" not in out + err
