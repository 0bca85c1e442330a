"""The plan as people meet it: the command, `memory:` in a run, and after an out-of-memory error."""

import io
from dataclasses import replace
from functools import partial

import pytest
import torch
import yaml
from rich.console import Console

from fastdpo.api import train
from fastdpo.cli import main
from fastdpo.config.keys import Config
from fastdpo.data.packing import pack
from fastdpo.errors import ConfigError, TrainingError
from fastdpo.planning import command, show
from fastdpo.planning.choose import budget_of, choose
from fastdpo.planning.out_of_memory import explain
from fastdpo.planning.search import CHOSEN, Planner
from fastdpo.planning.target import Target
from fastdpo.training.failures import memory_guard
from fastdpo.training.stage import Stage
from tests.config.command_line import load_config
from tests.tiny import group, model_config, save_model, write_jsonl
from tests.tiny import rows as tiny_rows

GPU = Target()


def llama(**keys):
    return model_config("llama", num_hidden_layers=3, hidden_size=128, intermediate_size=512, **keys)


def config(**keys):
    return Config(model="random", data="none", max_tokens=2048, batch_size=16, **keys)


def rows():
    return [group(i, 100, [60, 40]) for i in range(32)]


def console():
    return Console(file=io.StringIO(), width=100)


def mb(size):
    return f"{size / 1e6:.3f}MB"


def test_a_run_that_fits_is_left_as_it_is():
    given, said = config(memory="24GB"), console()
    chosen = choose(given, llama(), rows(), said, GPU)
    # but that its lm_head has what was counted for it, on this card or at resume on another
    size = (512 << 20) + 4 * llama().vocab_size * llama().hidden_size
    assert replace(chosen, head_memory=None) == given and chosen.head_memory == f"{size}B"
    assert "fits" in said.file.getvalue()
    without = config()
    assert choose(without, llama(), rows(), said, GPU) is without


def test_a_run_chooses_what_fits_and_says_so():
    planner = Planner(llama(), rows(), GPU)
    most = planner.predict(config(gradient_checkpointing=True), exact=True).total
    assert most < planner.predict(config(), exact=True).total * 0.98
    budget, said = mb(1.005 * most), console()
    chosen = choose(config(memory=budget), llama(), rows(), said, GPU)
    changed = {name for name in vars(chosen) if getattr(chosen, name) != getattr(config(), name)}
    assert changed - {"memory"} <= set(CHOSEN)
    assert changed - {"memory"}
    assert chosen.max_tokens == 2048  # as it was set
    assert planner.predict(chosen, exact=True).total <= 1.005 * most
    assert "does not fit" in said.file.getvalue()
    assert "Chosen" in said.file.getvalue()
    assert choose(config(memory=budget), llama(), rows(), console(), GPU) == chosen


def test_more_memory_than_the_gpu_has_is_not_counted_on():
    card, said = Target(memory=10**9), console()
    assert choose(config(memory="24GB"), llama(), rows(), said, card).memory == "24GB"
    assert "24GB is more than the GPU has: 1.00 GB" in said.file.getvalue()
    assert "fits in 1.00 GB" in said.file.getvalue()
    with pytest.raises(ConfigError, match=r"fits random in 1\.00 MB"):
        choose(config(memory="24GB"), llama(), rows(), console(), Target(memory=10**6))
    assert budget_of(config(), card, said) == 10**9 and budget_of(config(memory="9MB"), card, said) == 9e6


def staged(*stages, **keys):
    return Config(model="random", data="none", stages=list(stages), **keys)


def test_a_stage_that_sets_a_key_keeps_it():
    """And is predicted with its own, not with what an earlier stage chose."""
    some = [group(i, 100, [60, 40]) for i in range(64)]
    planner = Planner(llama(), some, GPU)
    plain = Config(model="random", data="none", batch_size=64, max_tokens=2048)
    budget = 1.003 * planner.predict(plain, exact=True).total
    given = staged({"beta": 0.1}, {"max_tokens": 4096}, batch_size=64, memory=mb(budget))
    first, second = choose(given, llama(), some, console(), GPU).per_stage()
    assert second.max_tokens == 4096  # as set: other keys make it fit
    assert all(planner.predict(stage, exact=True).total <= budget for stage in (first, second))


def test_a_later_stage_may_need_more_than_an_earlier_one(monkeypatch):
    """What is chosen for it is no less than what the earlier one needed."""
    asked = []

    def fitting(self, config, budget):
        level = {"gradient_checkpointing": True} if asked else {"gradient_checkpointing": "selective"}
        asked.append((self.free, config.gradient_checkpointing))
        return self.option(config, level)

    monkeypatch.setattr(Planner, "fitting", fitting)
    monkeypatch.setattr(Planner, "checked", lambda self, config, found, budget: found)
    given = staged({"beta": 0.1}, {"beta": 0.2}, memory="1MB")
    assert choose(given, llama(), rows(), console(), GPU).gradient_checkpointing is True
    assert [level for _, level in asked] == [False, "selective"]
    assert all(free == frozenset(CHOSEN) for free, _ in asked)
    monkeypatch.undo()
    planner = Planner(llama(), rows(), GPU, frozenset(CHOSEN))
    done = config(gradient_checkpointing=True)
    found = planner.fitting(done, int(planner.predict(replace(done, **planner.least(done))).total * 1.001))
    assert found.changes.get("gradient_checkpointing", True) is True


def test_what_fits_with_states_on_the_host_is_said():
    planner = Planner(llama(), rows(), GPU)
    budget = planner.predict(replace(config(), **planner.least(config()))).total - 1e3  # mb rounds
    with pytest.raises(ConfigError) as caught:
        choose(config(memory=mb(budget)), llama(), rows(), console(), GPU)
    assert "offload_optimizer: true" in str(caught.value) and "with max_tokens as the config" in str(
        caught.value
    )


def test_keys_that_are_set_stay():
    planner = Planner(llama(), rows(), GPU)
    level = planner.predict(config(gradient_checkpointing=True, head_memory="64MiB"), exact=True).total
    fixed = config(gradient_checkpointing=False, head_memory="511MiB", memory=mb(1.005 * level))
    assert choose(fixed, llama(), rows(), console(), GPU).head_memory == "511MiB"
    with pytest.raises(ConfigError, match="no choice of max_tokens"):
        choose(replace(fixed, memory="1MB"), llama(), rows(), console(), GPU)


def test_states_on_the_host_are_tried_where_no_level_fits():
    planner = Planner(llama(), rows(), GPU)
    least = planner.least(config())
    budget = planner.predict(replace(config(), **least)).total - 1
    assert planner.fitting(config(), budget) is None
    (found,) = planner.offloaded(config(), budget)
    assert found.changes["offload_optimizer"] and found.same_learning and found.prediction.total <= budget
    assert planner.offloaded(config(), 1) == []
    assert planner.offloaded(config(offload_optimizer=True), budget) == []


def test_what_does_not_fit_is_told_with_the_owners():
    with pytest.raises(ConfigError) as caught:
        choose(config(memory="1MB"), llama(), rows(), console(), GPU)
    for word in ("optimizer states", "saved activations", "CUDA context"):
        assert word in str(caught.value)


def test_the_command_prints_tables_of_100_columns(tmp_path):
    llama(num_key_value_heads=2).save_pretrained(tmp_path)
    said = console()
    words = ["--model", str(tmp_path), "--data", "none.jsonl", "--max_length", "256", "--memory", "615MB"]
    command.plan(load_config(words), "RTX 4090", "cuda", said)
    text = said.file.getvalue()
    for word in (
        *("weights", "gradients", "does not fit", "TFLOP", "not measured", "next:", "assumed"),
        "estimated",
    ):
        assert word in text, word
    assert max(len(line) for line in text.splitlines() if "│" in line) <= 100


def test_the_exit_code_says_whether_it_fits(tmp_path, capsys):
    llama(num_key_value_heads=2).save_pretrained(tmp_path)
    plan = ["plan", "--model", str(tmp_path), "--data", "none.jsonl", "--max_length", "256", "--card=4090"]
    assert main(plan) == 0 and " are left" in capsys.readouterr().out
    assert main([*plan, "--memory", "730MB"]) == 0 and "does not fit" in capsys.readouterr().out
    assert main([*plan, "--memory", "1MB"]) == 3 and "nothing tried fits" in capsys.readouterr().out
    assert main([*plan, "--device=cpu"]) == 0  # no memory is known


def test_names_are_answered_before_anything_is_loaded(capsys):
    for flag, told in (("--lr_scheduler_type=cosin", "'cosine'"), ("--objective=dpoo", "'dpo'")):
        assert main(["plan", "--model=no/such-model", "--data=none.jsonl", flag]) == 2
        assert f"Did you mean {told}?" in capsys.readouterr().err


def test_no_table_without_a_candidate(monkeypatch):
    for way in ("singles", "offloaded", "other_learning"):
        monkeypatch.setattr(Planner, way, lambda *args: [])
    said = console()
    assert not command.plan_stage(config(), llama(), rows(), GPU, 1, said)
    assert "What would make it fit" not in said.file.getvalue() and "next:" in said.file.getvalue()


def test_what_changes_the_learning_comes_last_and_stays_in_its_order():
    planner = Planner(llama(), rows(), GPU)
    other = list(planner.other_learning(config(), 10**15))
    assert len(other) > 2 and not any(option.same_learning for option in other)
    same = list(planner.singles(config()))
    assert sorted([*other, *same], key=show.order)[-len(other) :] == other


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--card", "Voodoo 2"], "--card: 'Voodoo 2' is not one of RTX 3090"),
        (["--device", "tpu"], 'Invalid value "tpu" for --device'),
        (["--card"], "--card requires an argument"),
    ],
)
def test_wrong_words_are_refused(words, told, capsys):
    assert main(["plan", "--model", "x", "--data", "y", *words]) == 2
    assert told in capsys.readouterr().err


def explained(model_config):
    return partial(explain, config(), model_config, False)


def test_out_of_memory_ends_with_the_plan_and_what_to_try():
    batch = pack(rows()[:4])
    with (
        pytest.raises(TrainingError) as caught,
        memory_guard(7, batch, explained(llama())),
    ):
        raise torch.OutOfMemoryError("CUDA out of memory")
    text = str(caught.value)
    for word in (
        "step 7",
        "predicted for this microbatch",
        "saved activations",
        "measured",
        "next: max_tokens",
    ):
        assert word in text, word
    with pytest.raises(TrainingError, match="next: gradient_checkpointing"):
        with memory_guard(7, pack(rows()[:1]), explained(llama())):
            raise torch.OutOfMemoryError("CUDA out of memory")


def test_a_smaller_microbatch_is_not_advised_where_it_would_not_help():
    """Weights, gradients and states are nearly all of it."""
    wide = model_config("llama", num_hidden_layers=2, hidden_size=512, intermediate_size=2048)
    few = pack([group(i, 20, [12, 9]) for i in range(2)])
    with (
        pytest.raises(TrainingError) as caught,
        memory_guard(1, few, explained(wide)),
    ):
        raise torch.OutOfMemoryError("CUDA out of memory")
    assert "next:" in str(caught.value) and "next: max_tokens" not in str(caught.value)


def test_an_out_of_memory_error_without_a_plan_is_told_all_the_same():
    with pytest.raises(TrainingError, match="no plan of this microbatch"):
        with memory_guard(1, pack(rows()[:1]), explained(None)):
            raise torch.OutOfMemoryError("CUDA out of memory")


def flags_of_a_run(tmp_path, **keys):
    write_jsonl(tmp_path / "rows.jsonl", tiny_rows(12))
    small = {"data": str(tmp_path / "rows.jsonl"), "max_length": 64, "batch_size": 4, "max_steps": 2}
    small |= {"output_dir": str(tmp_path / "run"), "reference_cache": "off", "samples": 0, "save_steps": 1}
    return Config(model=str(save_model(tmp_path / "model")), **small | keys)


def test_a_run_trains_as_its_memory_let_it_choose(tmp_path, monkeypatch):
    given = flags_of_a_run(tmp_path, memory="24GB")
    chosen = replace(given, max_tokens=50, gradient_checkpointing=True)
    monkeypatch.setattr("fastdpo.api.choose", lambda config, *rest, **more: chosen)
    saved = yaml.safe_load((train(given, console()) / "config.yaml").read_text())
    assert (saved["max_tokens"], saved["gradient_checkpointing"]) == (50, True)


def test_a_run_out_of_memory_loses_nothing_and_says_what_to_do(tmp_path, monkeypatch):
    score, calls = Stage.score, []

    def fails_in_the_second_step(self, batch, stats=()):
        calls.append(batch)
        if len(calls) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return score(self, batch, stats)

    given = flags_of_a_run(tmp_path)
    monkeypatch.setattr(Stage, "score", fails_in_the_second_step)
    with pytest.raises(TrainingError) as caught:
        train(given, console())
    for word in ("step 2: out of GPU memory", "predicted for this microbatch", "next:", "step-1", "--resume"):
        assert word in str(caught.value), word
    monkeypatch.setattr(Stage, "score", score)
    assert (train(replace(given, resume=True), console()) / "model").is_dir()
