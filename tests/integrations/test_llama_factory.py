"""LLaMA-Factory's DPO with and without `fastdpo.integrations.llama_factory`.

What does not need LLaMA-Factory runs everywhere, on a stand-in for its CustomDPOTrainer. The rest starts
LLaMA-Factory itself, on its own YAML path, and skips where it is not installed. It was run on a CPU so, with
torch 2.13 and an empty module in the place of torchaudio, which is only imported here:

    python3.11 -m venv lf && . lf/bin/activate
    pip install torch torchaudio torchvision --index-url https://download.pytorch.org/whl/cpu
    pip install llamafactory==0.9.5 transformers==5.6.0 trl==0.24.0 peft==0.18.1 pytest pytest-timeout
    pip install --no-deps -e .
    python -m pytest tests/integrations/test_llama_factory.py tests/integrations/test_packed_forward.py
"""

import importlib.util
import json
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

import fastdpo.integrations.llama_factory as fast
from benchmarks.process import python_path
from fastdpo.errors import ConfigError

needs_it = pytest.mark.skipif(
    importlib.util.find_spec("llamafactory") is None,
    reason="needs LLaMA-Factory, whose pins exclude this environment's",
)
CASES = {
    "sigmoid": {},
    "smoothed": {"dpo_label_smoothing": 0.1, "gradient_accumulation_steps": 2},
    "hinge": {"pref_loss": "hinge"},
    "ipo": {"pref_loss": "ipo"},
    "kto_pair": {"pref_loss": "kto_pair"},
    "orpo": {"pref_loss": "orpo"},
    "simpo": {"pref_loss": "simpo"},
    "pref_ftx": {"pref_ftx": 0.5},
    "bco": {"pref_bco_weight": 0.3},
    "ld_alpha": {"ld_alpha": 0.3},
    "no checkpointing": {"disable_gradient_checkpointing": True},
    "cut": {"cutoff_len": 12},
    "explicit reference": {"ref_model": "llama"},
    "evaluation": {"val_size": 4, "eval_strategy": "steps", "eval_steps": 1},
    "lora": {"finetuning_type": "lora", "lora_rank": 4, "learning_rate": 2e-2},
    "lora on the lm_head": {
        "finetuning_type": "lora",
        "lora_target": "q_proj,lm_head",
        "learning_rate": 2e-2,
    },
    "lm_head trained": {"finetuning_type": "lora", "additional_target": "lm_head", "learning_rate": 2e-2},
    "dora on the lm_head": {
        **{"finetuning_type": "lora", "lora_target": "q_proj,lm_head", "use_dora": True},
        "learning_rate": 2e-2,
    },
    "softcap": {"model_name_or_path": "gemma2"},
    "logit scale": {"model_name_or_path": "cohere"},
}


def write_inputs(folder: Path) -> None:
    """Tiny models and a data set as LLaMA-Factory reads them."""
    from tests.integrations.test_packed_forward import SCALED, SOFTCAP
    from tests.tiny import rows, save_model

    for name, more in (("llama", {}), ("gemma2", SOFTCAP), ("cohere", SCALED)):
        save_model(folder / name, name, **more)
    pairs = [
        {"instruction": r["prompt"], "input": "", "chosen": r["chosen"], "rejected": r["rejected"]}
        for r in rows(16)
    ]
    (folder / "rows.json").write_text(json.dumps(pairs))
    columns = {"prompt": "instruction", "query": "input", "chosen": "chosen", "rejected": "rejected"}
    info = {"pairs": {"file_name": "rows.json", "ranking": True, "columns": columns}}
    (folder / "dataset_info.json").write_text(json.dumps(info))


def settings(folder: Path, out: str, **more) -> dict:
    base = dict(stage="dpo", do_train=True, finetuning_type="full", model_name_or_path="llama")
    base |= dict(dataset="pairs", dataset_dir=str(folder), template="empty", cutoff_len=64)
    base |= dict(output_dir=str(folder / out), per_device_train_batch_size=4, max_steps=3, seed=7)
    base |= dict(
        learning_rate=1e-3, logging_steps=1, save_strategy="no", report_to="none", overwrite_output_dir=True
    )
    base |= more
    for key in ("model_name_or_path", "ref_model"):
        if key in base:
            base[key] = str(folder / base[key])
    return base


def history(folder: Path, out: str) -> list[dict]:
    return json.loads((folder / out / "trainer_state.json").read_text())["log_history"]


def run_all(folder: Path) -> None:
    """Every case, stock and patched, by LLaMA-Factory's own run_exp; called in a process of its own."""
    from llamafactory.train.tuner import run_exp

    from fastdpo.integrations.packed_forward import PackedForward

    ways = []
    decide = PackedForward.decide
    PackedForward.decide = lambda *args: ways.append(decide(*args)) or ways[-1]
    results = {}
    for name, case in CASES.items():
        stock, ours = f"stock, {name}", f"ours, {name}"
        fast.unpatch()
        run_exp(settings(folder, stock, **case))
        fast.patch()
        ways.clear()
        run_exp(settings(folder, ours, **case))
        results[name] = (history(folder, stock), history(folder, ours), list(ways))
    (folder / "results.json").write_text(json.dumps(results))


def start(*command: str, **env):
    env = os.environ | {"OMP_NUM_THREADS": "1"} | python_path() | env
    env["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), env["PATH"]])  # torchrun
    done = subprocess.run([sys.executable, *command], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-1500:]
    return done.stderr


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llamafactory")
    write_inputs(folder)
    log = start("-m", "tests.integrations.test_llama_factory", str(folder))
    return json.loads((folder / "results.json").read_text()), log


def same(stock: list[dict], ours: list[dict]) -> None:
    """All metrics by name, and but for the mean logits by value."""
    assert len(stock) == len(ours) > 2
    for theirs, mine in zip(stock, ours):
        assert list(theirs) == list(mine)
        kept = [k for k in theirs if not any(w in k for w in ("runtime", "per_second", "flos", "logits/"))]
        for key in [k for k in kept if k.endswith("rewards/accuracies")]:
            if abs(theirs[key.replace("accuracies", "margins")]) < 1e-5:  # who is ahead is rounding
                kept.remove(key)
        assert [mine[k] for k in kept] == pytest.approx([theirs[k] for k in kept], rel=1e-4, abs=1e-4)
    assert max(log.get("grad_norm", 0) for log in stock) > 1e-3


@needs_it
@pytest.mark.parametrize("name", CASES)
def test_the_real_trainer(real, name):
    stock, ours, ways = real[0][name]
    same(stock, ours)
    assert set(ways) == {"shared"}
    if name == "dora on the lm_head":  # the policy; the reference runs without it
        assert len(ways) == 1
        assert real[1].count("fastdpo: the lm_head's adapter is not one plain LoRA") == 1


@needs_it
@pytest.mark.parametrize("torchrun", ["0", "1"])
def test_the_real_command(tmp_path, torchrun):
    """`python -m fastdpo.integrations.llama_factory train config.yaml`, alone and in torchrun's processes."""
    write_inputs(tmp_path)
    for out, module in (("stock", "llamafactory.cli"), ("ours", "fastdpo.integrations.llama_factory")):
        config = tmp_path / f"{out}.yaml"
        config.write_text(json.dumps(settings(tmp_path, out, per_device_train_batch_size=2)))
        start("-m", module, "train", str(config), FORCE_TORCHRUN=torchrun, NPROC_PER_NODE="2")
    same(history(tmp_path, "stock"), history(tmp_path, "ours"))
    logits = [[log["logits/chosen"] for log in history(tmp_path, out)[:-1]] for out in ("stock", "ours")]
    assert logits[0] != logits[1]  # else ours did not run


class Stock:
    """What LLaMA-Factory's CustomDPOTrainer is to us: attributes, and log-probs as its docs define them."""

    is_fsdp_enabled, ld_alpha = False, None

    def __init__(self, model, ref_model, loss_type="sigmoid"):
        self.model, self.ref_model, self.loss_type = model, ref_model, loss_type

    def concatenated_forward(self, model, batch, is_ref_model=False):
        from tests.integrations.test_packed_forward import plain

        values, scored = plain(model, batch)["logp"], batch["labels"][:, 1:] != -100
        pairs = len(scored) // 2
        sums, lengths = [], scored.sum(1).tolist()
        for row in range(2 * pairs):
            total, alpha = 0.0, None if is_ref_model else self.ld_alpha
            start = scored[row].nonzero()[0, 0]
            cut = start + min(lengths[row % pairs], lengths[row % pairs + pairs])
            for position in scored[row].nonzero()[:, 0]:
                total += values[row, position] * (alpha if alpha is not None and position >= cut else 1)
            sums.append(total / (lengths[row] if self.loss_type in ("ipo", "orpo", "simpo") else 1))
        chosen, rejected = torch.stack(sums).chunk(2)
        average = chosen if self.loss_type == "ipo" else chosen / torch.tensor(lengths[:pairs])
        return {"chosen_logps": chosen, "rejected_logps": rejected, "chosen_logps_avg": average}


@pytest.mark.parametrize("reference", [False, True])
@pytest.mark.parametrize("loss, alpha", [("sigmoid", None), ("sigmoid", 0.3), ("ipo", None)])
def test_what_the_trainer_gives(loss, alpha, reference):
    from transformers import AutoModelForCausalLM

    from tests.integrations.test_packed_forward import batch, plain
    from tests.tiny import model_config

    model = AutoModelForCausalLM.from_config(model_config("llama"))
    rows = batch(131)
    stock = Stock(model, None, loss)
    stock.ld_alpha = alpha
    truth = stock.concatenated_forward(model, dict(rows), reference)
    means = plain(model, rows)["mean_logit"]
    trainer = fast.trainer_class(Stock)(model, None, loss)
    trainer.ld_alpha = alpha
    found = trainer.concatenated_forward(model, rows, is_ref_model=reference)
    for name, value in truth.items():
        torch.testing.assert_close(found[name], value, atol=2e-5, rtol=2e-5)
    scored = rows["labels"][:, 1:] != -100
    for name, half, mask in zip(("chosen", "rejected"), means.chunk(2), scored.chunk(2)):
        torch.testing.assert_close(found[f"{name}_logits"].mean(), half[mask].mean())
    assert "labels" in rows  # the reference needs them again
    trainer.is_fsdp_enabled, trainer.accelerator = True, types.SimpleNamespace(is_fsdp2=True)
    trainer.concatenated_forward(model, rows)
    trainer.accelerator.is_fsdp2 = False
    with pytest.raises(ConfigError, match="fsdp: FSDP1"):
        trainer.concatenated_forward(model, rows)


@pytest.mark.parametrize("wanted", [True, False])
def test_a_balance_loss_that_is_not_added_is_said(caplog, wanted):
    """moe_aux_loss_coef sets output_router_logits in the model's config, and its DPO reads only logits."""
    from tests.tiny import policy

    model = policy("mixtral", num_local_experts=4, output_router_logits=wanted).model
    fast.trainer_class(Stock)(model, None)
    said = [m for m in caplog.messages if "balance loss is off: LLaMA-Factory's DPO adds none" in m]
    assert len(said) == wanted


@pytest.fixture
def fake(monkeypatch):
    """An importable llamafactory with the names that we touch."""
    made = {}
    for name in ("", ".extras.env", ".train.dpo.trainer", ".train.tuner", ".cli", ".launcher"):
        parts = f"llamafactory{name}".split(".")
        for i in range(1, len(parts) + 1):
            path = ".".join(parts[:i])
            if path not in made:
                made[path] = types.ModuleType(path)
                made[path].__path__ = []
                monkeypatch.setitem(sys.modules, path, made[path])
                if i > 1:
                    setattr(made[".".join(parts[: i - 1])], parts[i - 1], made[path])
    made["llamafactory.extras.env"].VERSION = "0.9.5"
    made["llamafactory.train.dpo.trainer"].CustomDPOTrainer = Stock
    return made


def test_patch_and_back(fake):
    module = fake["llamafactory.train.dpo.trainer"]
    fast.patch()
    fast.patch()
    assert module.CustomDPOTrainer.__mro__[1:3] == (Stock, object)
    fast.unpatch()
    fast.unpatch()
    assert module.CustomDPOTrainer is Stock


def test_what_we_do_not_know_is_said(fake, monkeypatch):
    fake["llamafactory.extras.env"].VERSION = "0.9.6"
    with pytest.raises(ConfigError, match=r"0\.9\.6 is installed.*llamafactory==0\.9\.5"):
        fast.patch()
    fake["llamafactory.extras.env"].VERSION = "0.9.5"
    monkeypatch.setenv("USE_V1", "1")
    with pytest.raises(ConfigError, match=r"USE_V1.*v1 trainers"):
        fast.patch()
    monkeypatch.delenv("USE_V1")
    for name in fake:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "llamafactory", None)
    with pytest.raises(ConfigError, match="not installed"):
        fast.patch()


def test_main(fake, monkeypatch):
    """The launcher, and the processes that its torchrun starts."""
    calls = []
    fake["llamafactory.cli"].main = lambda: calls.append(("cli", sys.argv[1:]))
    fake["llamafactory.train.tuner"].run_exp = lambda: calls.append(("run_exp", sys.argv[1:]))
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.setattr(sys, "argv", ["fastdpo", "train", "config.yaml"])
    fast.main()
    assert fake["llamafactory.launcher"].__file__.split() == ["-m", fast.__name__, "train"]
    monkeypatch.setenv("LOCAL_RANK", "1")
    fast.main()
    assert calls == [("cli", ["train", "config.yaml"]), ("run_exp", ["config.yaml"])]
    monkeypatch.setattr(sys, "argv", ["fastdpo", "webui"])
    with pytest.raises(SystemExit, match="usage"):
        fast.main()


if __name__ == "__main__":
    run_all(Path(sys.argv[1]))
