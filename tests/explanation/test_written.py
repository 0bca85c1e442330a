"""What `fastdpo explain` writes, and when; the command; runs that are told by other names."""

import shutil

import pytest

import fastdpo
from fastdpo.cli import main
from fastdpo.errors import ConfigError
from fastdpo.explanation import explain as module
from fastdpo.explanation import result
from fastdpo.files import durable
from tests.explanation.runs import json_of, rows
from tests.explanation.test_explain import WRITTEN
from tests.training.test_samples import silent


def argv(place, *flags, run="lora"):
    return ["explain", str(place.folder / run), "--causes", "0", *flags]


def names(folder):
    return {path.name for path in folder.iterdir()}


def test_the_command(place, capsys):
    """Into the run, where nothing else is said."""
    assert main(argv(place, "--pairs", "20", "--groups", "v3")) == 0
    said, folder = capsys.readouterr().out, place.folder / "lora/explain"
    assert "Behaviour" in said and "written:" in said and names(folder) == WRITTEN
    made = json_of(folder)
    assert made["settings"]["pairs"] == 20 and made["neurons"]["definition"] == "v3"
    assert made["names"] == {"before": str(place.folder / "model"), "after": str(place.folder / "lora")}
    shutil.rmtree(folder)


def test_the_command_of_two_models(place, capsys, tmp_path):
    folder = place.folder
    two = ["explain", str(folder / "model"), str(folder / "full/model"), "--data", str(folder / "rows.jsonl")]
    flags = ["--causes", "8", "--random_sets", "1", "--direction", "down", "--plain"]
    command = [*two, *flags, "--max_length", "64", "--output", str(tmp_path / "out")]
    assert main(command) == 0 and "all four" in capsys.readouterr().out
    made = json_of(tmp_path / "out")
    assert (made["direction"]["towards"], made["direction"]["space"]) == ("down", "plain")
    assert made["names"] == {"before": two[1], "after": two[2]} and made["causes"]["pairs"] == 8


def test_a_model_of_no_run_has_a_folder_of_its_own(place, tmp_path, monkeypatch):
    """runs/explain/NAME"""
    shutil.copytree(place.folder / "lora/model", tmp_path / "mine")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(module, "page", lambda made: "no page")
    how = dict(data=place.folder / "rows.jsonl", max_length=64, causes=0, console=silent())
    found = fastdpo.explain("mine", **how)
    assert names(tmp_path / "runs/explain/mine") == WRITTEN
    assert found["names"] == {"before": str(place.folder / "model"), "after": "mine"}


def test_the_same_settings_again_replace_and_others_refuse(place, tmp_path):
    how = dict(output=tmp_path / "out", overwrite=False)
    first, again = place("lora", **how), place("lora", **how)
    assert json_of(tmp_path / "out") == again and again["neurons"] == first["neurons"]
    with pytest.raises(ConfigError, match=r"holds an explanation of other settings .seed 0.* --overwrite"):
        place("lora", **how, seed=3)
    assert json_of(tmp_path / "out") == again
    place("lora", **how | {"overwrite": True}, seed=3)
    assert json_of(tmp_path / "out")["settings"]["seed"] == 3 and names(tmp_path / "out") == WRITTEN


def test_no_table_of_another_explanation_is_left(place, tmp_path):
    """One that does not look at neurons, in the place of one that did."""
    output = tmp_path / "out"
    place("lora", output=output)
    assert names(output) == WRITTEN
    found = place("lora", output=output, data="few.jsonl")
    assert found["neurons"] is None and names(output) == WRITTEN - {"neurons.parquet"}


@pytest.fixture(autouse=True, scope="module")
def few(place):
    """Rows that are too few to find a direction."""
    from tests import tiny

    tiny.write_jsonl(place.folder / "few.jsonl", rows(4, seed=2))


@pytest.mark.parametrize(
    "where, error",
    [("_see_before", ConfigError), ("_see_after", KeyboardInterrupt), ("_causes", KeyboardInterrupt)],
)
def test_a_failure_in_the_middle_leaves_nothing(place, tmp_path, monkeypatch, where, error):
    """Not even where a record of the model after lies on the disk, and it does then."""
    seen, own = [], getattr(module.Explanation, where)

    def fail(self, *given):
        seen.extend(path.name for path in self.work.iterdir())
        own(self, *given)
        raise error("stop")

    monkeypatch.setattr(module.Explanation, where, fail)
    with pytest.raises(error):
        place("full", output=tmp_path / "out", causes=2, random_sets=1)
    assert not (tmp_path / "out").exists()
    recorded = {"before.safetensors", "00000.safetensors"}
    expected = {"_see_before": set(), "_see_after": {"before.safetensors"}}
    assert set(seen) == expected.get(where, recorded)


def test_a_failure_while_it_writes_leaves_no_result(place, tmp_path, monkeypatch):
    """Nor half a table; the next one makes it whole."""

    def half(_, path):
        path.write_text("half of a tab")
        raise OSError("no space left")

    output = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr("fastdpo.explanation.attribute.pq.write_table", half)
        with pytest.raises(ConfigError, match=r"cannot write .*neurons.parquet: no space left"):
            place("lora", output=output)
    assert not output.exists()
    with monkeypatch.context() as patch:
        patch.setattr(module, "page", lambda _: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            place("lora", output=output, page=True)
    assert "explain.json" not in names(output)
    (output / ".work.part").mkdir()  # of a process that was killed
    (output / ".work.part/before.safetensors").write_text("")
    place("lora", output=output)
    assert names(output) == WRITTEN


def test_another_process_in_the_folder(place, tmp_path):
    """It goes on with what it had put there."""
    work = tmp_path / "out/.work.part"
    work.mkdir(parents=True)
    with durable.held(tmp_path / "out"):
        with pytest.raises(ConfigError, match=r"output: another process is explaining into .*out; wait"):
            place("lora", output=tmp_path / "out", overwrite=True)
        assert work.exists()
    place("lora", output=tmp_path / "out")
    assert names(tmp_path / "out") == WRITTEN


def test_a_folder_that_cannot_be_written(place, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="output: cannot write into the folder"):
        place("lora", output=tmp_path / "file/explain")


# ---- names of runs


def as_run(place, folder, **changed):
    """A copy of the LoRA run, with other keys in its config."""
    shutil.copytree(place.folder / "lora", folder)
    config = (folder / "config.yaml").read_text().splitlines()
    kept = [line for line in config if line.partition(":")[0] not in changed]
    kept += [f"{name}: {value}" for name, value in changed.items() if value is not None]
    (folder / "config.yaml").write_text("\n".join(kept) + "\n")
    return folder


def test_the_demo_is_its_dpo_run(place, tmp_path):
    as_run(place, tmp_path / "demo/dpo")
    (tmp_path / "demo/.fastdpo-demo").touch()
    found = place(tmp_path / "demo", output=None)
    assert names(tmp_path / "demo/dpo/explain") == WRITTEN
    assert found["names"]["after"] == str(tmp_path / "demo/dpo")
    assert found["neurons"] == place("lora")["neurons"]


def test_the_held_out_part_of_a_run(place, tmp_path):
    """The rows that the run did not train on, whatever part of its data that was."""
    data = str(place.folder / "rows.jsonl")
    run = as_run(place, tmp_path / "part", data=data, eval_data=0.4)
    found = place(run, force=True)
    assert found["data"]["source"] == f"the held-out part of {data}"
    assert found["data"]["rows"] < 15


def test_a_folder_of_the_run_is_the_run(place):
    """Its model's, whose run is around it."""
    found, run = place("lora/model"), place("lora")
    parts = ("weights", "behaviour", "direction", "where", "neurons", "data")
    assert all(found[part] == run[part] for part in parts)


def test_what_the_settings_say_where_nothing_does():
    assert result.folder_of(None, "org/name", None).parts == ("runs", "explain", "name")
    assert result.Settings("a").towards == "up"
    assert result.Settings("a", probe="labels.jsonl").towards == "down"
    assert result.Settings("a", probe="labels.jsonl", direction="up").towards == "up"
