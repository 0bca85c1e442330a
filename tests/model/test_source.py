"""A model that cannot be had: one sentence, which names what is wrong, one question to the hub, and never a
weight that starts at random."""

import io
import json
import logging
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import torch
import transformers
from rich.console import Console

from fastdpo.config.keys import Config
from fastdpo.errors import ModelError
from fastdpo.files.names import look_up
from fastdpo.model import source
from fastdpo.model.finding import Source
from fastdpo.model.loading import check_stored, load_model_config, load_policy, load_tokenizer
from tests.hub import REFUSALS, running
from tests.tiny import save_model, tokenizer

SHA = "a" * 40


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    return Path(save_model(tmp_path_factory.mktemp("good") / "good"))


@pytest.fixture
def folder(good, tmp_path, monkeypatch):
    """A copy of a good model, `good` in the working directory."""
    monkeypatch.chdir(tmp_path)
    return shutil.copytree(good, tmp_path / "good")


@pytest.fixture
def hub(tmp_path, monkeypatch):
    with running(monkeypatch, tmp_path / "hub") as hub:
        yield hub


def load(model, **keys):
    """As a run does: (the policy, the tokenizer, what was said)."""
    spec = Config(model=str(model), data="d", max_length=64, dtype="fp32", **keys)
    console = Console(file=io.StringIO(), width=1000)
    load_model_config(spec)
    check_stored(spec)
    own = load_tokenizer(spec)
    return load_policy(spec, console), own, console.file.getvalue()


def refused(model, **keys) -> str:
    with pytest.raises(ModelError) as caught:
        load(model, **keys)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_good_one_is_loaded(folder):
    policy, own, said = load("good")
    assert len(own) == policy.core.config.vocab_size and said == ""


def test_a_folder_of_the_home(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder.parent))
    load("~/good")


@pytest.mark.parametrize("name", ["./mymodel", "/nowhere/model", "a/b/c", "a b?", "~no_such_user/model"])
def test_a_path_that_is_not_there(name, folder, hub):
    assert refused(name) == (
        f"model: {name!r} does not exist here; give a folder that save_pretrained wrote, or a hub name"
    )
    assert not hub.asked


def test_a_name_like_that_of_a_folder(folder, hub):
    assert refused("./godo") == "model: './godo' does not exist here; did you mean 'good'?"
    assert refused("godo").endswith("; did you mean 'good'?") and len(hub.asked) == 1


def edit(folder, **changes):
    path = folder / "config.json"
    kept = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: value for name, value in kept.items() if value is not None}))


def only(folder, *names):
    for path in folder.iterdir():
        if path.name not in names:
            path.unlink()


def in_a_run(folder):
    shutil.copytree(folder, folder / "model")
    only_folders = [path.unlink() for path in folder.iterdir() if path.is_file()]
    assert only_folders


def in_the_cache(folder):
    shutil.copytree(folder, folder / "snapshots" / SHA)
    [path.unlink() for path in folder.iterdir() if path.is_file()]


def unfinished(folder):
    only(folder)
    (folder / "checkpoints").mkdir()


def of_llama(folder):
    (folder / "tokenizer.json").unlink()
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tokenizer_class": "LlamaTokenizer"}))


def remote(folder):
    edit(folder, model_type="frob", auto_map={"AutoConfig": "code.Frob", "AutoModelForCausalLM": "code.F"})
    (folder / "code.py").write_text("raise SystemExit('it ran')")


def in_shards(folder):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="100KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 2


def lost_shard(folder):
    in_shards(folder)
    min(folder.glob("model-*.safetensors")).unlink()


def write(name, content):
    return lambda folder: (folder / name).write_bytes(content)


def cut(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def index_of_nothing(folder):
    (folder / "model.safetensors").rename(folder / "model.safetensors.index.json")


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 1\n"
FOLDERS = {  # what becomes of a good folder -> what is said, after "model: 'good' "
    "empty": (only, "is an empty folder; give"),
    "no config": (lambda f: (f / "config.json").unlink(), "holds a tokenizer and no model: there is no conf"),
    "nothing of a model": (lambda f: (only(f), write("a.txt", b"")(f)), "holds no model: there is no config"),
    "a run": (in_a_run, "holds no config.json; the model is in good/model"),
    "a run without a model": (unfinished, "is the folder of a run that has no model yet; go on with it by"),
    "of the cache": (in_the_cache, f"holds no config.json; the model is in good/snapshots/{SHA}"),
    "broken JSON": (
        write("config.json", b'{"a": '),
        "has a config.json that cannot be read: JSONDec",
    ),
    "a list": (write("config.json", b"[1]"), "has a config.json that cannot be read: ValueError: it is no"),
    "a wrong value": (lambda f: edit(f, num_hidden_layers="two"), "has a config.json that cannot be read: "),
    "no type": (lambda f: edit(f, model_type=None), "has a config.json without model_type, so it is no mod"),
    "unknown type": (lambda f: edit(f, model_type="frob"), "is of model_type frob, which the installed tra"),
    "code of its own": (
        remote,
        "needs code of its own (trust_remote_code), and fastdpo never runs",
    ),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "has no weights: no model.safetensors, nor"),
    "cut": (cut, "has weights in model.safetensors that are cut short or damaged (SafetensorError: "),
    "no bytes": (write("model.safetensors", b""), "has weights in model.safetensors that are cut short or"),
    "git lfs": (
        write("model.safetensors", LFS),
        "has weights in model.safetensors that are a pointer",
    ),
    "a lost shard": (lost_shard, "lacks 1 of the "),
    "an index that is none": (index_of_nothing, "has a model.safetensors.index.json that cannot be read: "),
    "other shapes": (
        lambda f: edit(f, hidden_size=32),
        "has weights of other shapes than its",
    ),
    "more layers": (
        lambda f: edit(f, num_hidden_layers=3),
        "is not a whole LlamaForCausalLM: it lacks",
    ),
}
NO_VOCABULARY = "there is no vocabulary (tokenizer.json); copy the files of the model's tokenizer there"
TOKENIZERS = {  # the same, after "model: no tokenizer in 'good': "
    "none": (
        lambda f: only(f, "config.json", "model.safetensors"),
        NO_VOCABULARY,
    ),
    "no vocabulary": (lambda f: (f / "tokenizer.json").unlink(), NO_VOCABULARY),
    "one of nothing": (of_llama, NO_VOCABULARY),
    "damaged": (write("tokenizer.json", b"{"), "JSONDecodeError: "),
}


@pytest.mark.parametrize("name", FOLDERS)
def test_what_is_wrong_with_a_folder(name, folder):
    spoil, words = FOLDERS[name]
    spoil(folder)
    assert refused("good").startswith(f"model: 'good' {words}")


@pytest.mark.parametrize("name", TOKENIZERS)
def test_what_is_wrong_with_a_tokenizer(name, folder):
    spoil, words = TOKENIZERS[name]
    spoil(folder)
    assert refused("good").startswith(f"model: no tokenizer in 'good': {words}")


def test_shards_are_loaded(folder):
    in_shards(folder)
    load("good")


def test_weights_of_another_name_are_loaded(folder):
    (folder / "model.safetensors").rename(folder / "other.safetensors")
    edit(folder, transformers_weights="other.safetensors")
    load("good")
    (folder / "other.safetensors").unlink()
    assert refused("good").startswith("model: 'good' has no weights: no other.safetensors, nor")


def test_a_tokenizer_beside_an_adapter_runs_no_code_and_asks_nothing(folder, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("it asks"))
    path = folder / "tokenizer_config.json"
    kept = json.loads(path.read_text()) | {
        "tokenizer_class": "Own",
        "auto_map": {"AutoTokenizer": ["t.Own", None]},
    }
    path.write_text(json.dumps(kept))
    with pytest.raises(ModelError, match=r"needs code of its own .* never runs a model's code"):
        source.load_tokenizer(Source("good", "", folder), "model")


@pytest.mark.parametrize(
    "name, words",
    [
        ("good/model.safetensors", "is a file, not a folder; give its folder, good"),
        ("a.bin", "is a file, not a folder; give a folder that save_pretrained wrote, or a hub name"),
    ],
)
def test_a_file(name, words, folder):
    if not Path(name).exists():
        Path(name).write_bytes(b"weights")
    assert refused(name) == f"model: {name!r} {words}"


SIZES = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
BART = dict(d_model=32, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=32, decoder_ffn_dim=32)
BART |= dict(encoder_attention_heads=2, decoder_attention_heads=2)
T5 = dict(d_model=32, d_kv=16, d_ff=32, num_layers=1, num_heads=2)
OTHERS = {  # class -> (sizes, what is said)
    "BertForMaskedLM": (SIZES, "is an encoder (bert): it sees what follows a token"),
    "BertForSequenceClassification": (SIZES, "is an encoder (bert): it sees what follows a token"),
    "T5ForConditionalGeneration": (T5, "is of model_type t5, which is no causal LM"),
    "BartForConditionalGeneration": (BART, "is of model_type bart, which is no causal LM"),
    "ViTForImageClassification": (SIZES, "is of model_type vit, which is no causal LM"),
    "LlamaModel": (
        SIZES,
        "is not a whole LlamaForCausalLM: it lacks lm_head.weight, which",
    ),
    "LlamaForSequenceClassification": (
        SIZES | {"tie_word_embeddings": True},  # so that it would lack nothing
        "is a classifier, and writes nothing",
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_another_kind_of_model(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sizes, words = OTHERS[name]
    kind = getattr(transformers, name)
    more = {} if name.startswith("ViT") else {"vocab_size": len(tokenizer())}
    kind(kind.config_class(**sizes, **more)).save_pretrained("other")
    tokenizer().save_pretrained("other")
    assert refused("other").startswith(f"model: 'other' {words}")


def test_weights_that_are_no_part_of_the_model_are_told(folder, caplog, monkeypatch):
    theirs = logging.getLogger("transformers")
    monkeypatch.setattr(theirs, "handlers", [caplog.handler])
    edit(folder, num_hidden_layers=1)
    said = load("good")[2]
    assert said.startswith("good: not a part of LlamaForCausalLM, and left out: model.layers.1.")
    assert said.endswith(" and 7 more\n")
    assert not caplog.records  # and by transformers no more


def test_tied_weights_are_not_missed(tmp_path):
    load(save_model(tmp_path / "tied", tie_word_embeddings=True))
    load(save_model(tmp_path / "gpt2", "gpt2"))


@pytest.mark.parametrize(
    "name, words",
    [
        ("good", "is a whole model, not an adapter; give it as model, and leave adapter out"),
        (
            "nowhere/adapter",
            "does not exist here; give the folder of a peft adapter (one of the hub",
        ),
        ("gooed", "does not exist here; did you mean 'good'?"),
        ("bare", "holds no adapter_config.json"),
        ("run", "holds no adapter_config.json; the adapter is in run/model"),
    ],
)
def test_an_adapter_that_is_none(name, words, folder):
    Path("run/model").mkdir(parents=True)
    Path("run/model/adapter_config.json").write_text("{}")
    Path("bare").mkdir()
    assert refused("good", adapter=name).startswith(f"adapter: {name} {words}")


ANSWERS = {  # of the hub -> what is said, after "model: 'org/name' "
    "not there": "is neither a path here nor a model that the hub shows you; check the name, and for",
    "gated": "is gated: ask for access at http://127.0.0.1:",
    "no such file": "has no config.json on the hub: it is an adapter, no model, or of GGUF files; one",
    "down": "is neither a folder here nor in the hub's cache, and the hub, http://127.0.0.1:",
    None: "is neither a folder here nor in the hub's cache, and the hub, http://127.0.0.1:",
}


@pytest.mark.parametrize("answer", ANSWERS)
def test_the_hub_is_asked_once(answer, hub, monkeypatch):
    hub.answer = answer
    monkeypatch.setattr("time.sleep", lambda seconds: pytest.fail("it tries again"))
    said = refused("org/name")
    assert said.startswith(f"model: 'org/name' {ANSWERS[answer]}")
    assert hub.asked == ["HEAD /org/name/resolve/main/config.json"]
    more = {
        "down": " answers 503",
        None: "is out of reach: ",
        "gated": "/org/name, then log in by `hf auth login`",
    }
    assert more.get(answer, "") in said
    assert said.endswith("; give a folder, or download it first (`hf download org/name`)") == (
        answer in ("down", None)
    )


def test_a_slow_network_has_its_time(monkeypatch):
    """Only a connection must be there soon: answers take what HF_HUB_ETAG_TIMEOUT allows."""
    given = {}
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_ETAG_TIMEOUT", 77)
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", lambda url, **options: given.update(options))
    assert look_up("org/name", "model").found
    assert given["timeout"][:2] == (4, 77)


def test_a_hub_name_in_offline_mode(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    assert "nor in the hub's cache, and HF_HUB_OFFLINE is set; give a folder" in refused("org/name")


@pytest.mark.parametrize("answer", ["down", None])
def test_a_model_in_the_cache_needs_no_network(answer, good, hub, tmp_path, monkeypatch):
    """One question in all: for its config, its tokenizer and its weights."""
    hub.answer = answer
    monkeypatch.setattr("time.sleep", lambda seconds: pytest.fail("it tries again"))
    name = f"org/cached-{len(REFUSALS) if answer is None else answer}"
    place = tmp_path / "hub" / f"models--{name.replace('/', '--')}"
    shutil.copytree(good, place / "snapshots" / SHA)
    (place / "refs").mkdir()
    (place / "refs/main").write_text(SHA)
    policy, _, said = load(name)
    assert said.startswith(f"loading the weights of {name}\n{name}: the hub, {hub.address}, ")
    assert said.endswith("; it is read from the hub's cache\n")
    adapted = load(name, lora_rank=2)[0]
    assert adapted.model.peft_config["default"].base_model_name_or_path == name
    assert policy.core.config.name_or_path == name
    assert hub.asked == [f"HEAD /{name}/resolve/main/config.json"]
    expected = load(good)[0].core.state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in policy.core.state_dict().items())
    (place / "snapshots" / SHA / "model.safetensors").unlink()  # a download that was broken off
    assert refused(name).startswith(f"model: {name!r} has no weights")
