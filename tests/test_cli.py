"""What a user meets at the command line: bad input ends in a message that names the row or field and the
way out, and in an exit code; never in a traceback, and never silently."""

import json
import os
import shlex
import shutil
import subprocess
import sys

import pytest
from datasets import Dataset

import fastdpo
from benchmarks.process import ROOT
from fastdpo.cli import app, main
from tests.tiny import rows, save_model, write_jsonl

TURN = {"role": "user", "content": "the cat"}
ANSWER = [{"role": "assistant", "content": "the dog"}]
OTHER = [{"role": "assistant", "content": "the bird"}]
GOOD = {"prompt": [TURN], "chosen": ANSWER, "rejected": OTHER}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model") / "model")


@pytest.fixture
def run(model, tmp_path, capsys, monkeypatch):
    """Runs `fastdpo COMMAND` on rows (or a data spec) -> (exit code, everything printed on one line)."""
    monkeypatch.setenv("COLUMNS", "300")

    def go(data, *flags, command="train", model=model):
        if isinstance(data, list):
            data = write_jsonl(tmp_path / "rows.jsonl", data)
        argv = [command, "--model", model, "--data", str(data), "--output_dir", str(tmp_path / "run")]
        code = main([*argv, "--max_length", "64", "--max_steps", "2", "--dtype", "fp32", *flags])
        out, err = capsys.readouterr()
        assert "Traceback" not in out + err
        return code, out + err

    return go


def broken(**changes):
    return {name: value for name, value in (GOOD | changes).items() if value is not None}


# a row that cannot be used -> what the report and the strict error must say of it
BAD_ROWS = {
    "missing column": (broken(rejected=None), ["rejected"]),
    "wrong role": (broken(prompt=[{"role": "robot", "content": "x"}]), ["prompt", "robot"]),
    "answer by the user": (broken(chosen=[TURN]), ["chosen", "assistant"]),
    "non-string turn": (broken(chosen=[{"role": "assistant", "content": 7}]), ["chosen", "content"]),
    "chosen is rejected": (broken(rejected=ANSWER), ["chosen and rejected", "the same"]),
    "empty prompt": (broken(prompt=[]), ["prompt"]),
    "messages as text": (broken(chosen="[{'role': 'assistant', 'content': 'x'}]"), ["chosen", "JSON lines"]),
    "long prompt": (broken(prompt=[{"role": "user", "content": "cat dog " * 60}]), ["max_length=64"]),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_bad_row_is_counted_and_the_run_goes_on(run, tmp_path, name):
    bad, words = BAD_ROWS[name]
    code, said = run([GOOD, GOOD, bad, GOOD])
    assert code == 0
    assert all(word in said for word in words), said
    report = json.loads((tmp_path / "run/data_report.json").read_text())["data"]
    assert report["kept"]["rows"] == 3
    assert [tally["examples"] for tally in report["dropped"].values()] == [[2]]


@pytest.mark.parametrize("name", BAD_ROWS)
def test_bad_row_stops_a_strict_run(run, tmp_path, name):
    bad, words = BAD_ROWS[name]
    code, said = run([GOOD, GOOD, bad, GOOD], "--strict")
    assert code == 1 and said.count("error:") == 1
    assert "row 2" in said and all(word in said for word in words), said
    assert not (tmp_path / "run/model").exists()


@pytest.mark.parametrize(
    "content, words",
    [
        ("", ["no rows"]),
        ("not json\n", ["line 1", "JSON"]),
        ("[1, 2]\n", ["row"]),
    ],
)
def test_unusable_file(run, tmp_path, content, words):
    path = tmp_path / "broken.jsonl"
    path.write_text(content)
    code, said = run(path)
    assert code == 1 and "error:" in said
    assert all(word in said for word in words), said


def test_missing_file_names_the_accepted_forms(run):
    code, said = run("nowhere.jsonl")
    assert code == 1 and "nowhere.jsonl" in said and ".parquet" in said


def test_binary_file(run, tmp_path):
    path = tmp_path / "weights.jsonl"
    path.write_bytes(bytes(range(256)) * 10)
    code, said = run(path)
    assert code == 1 and "error:" in said and "weights.jsonl" in said


def test_conversations_need_a_chat_template(run, tmp_path):
    plain = save_model(tmp_path / "plain", chat=False)
    code, said = run([GOOD], model=plain)
    assert code == 1 and "chat template" in said and "chat_template" in said
    template = tmp_path / "t.jinja"
    template.write_text("{% for m in messages %}{{ m['content'] }}<|im_end|>{% endfor %}")
    assert run([GOOD], "--chat_template", str(template), "--overwrite", model=plain)[0] == 0


def test_model_that_cannot_share_runs_and_says_so(run, tmp_path):
    code, said = run(rows(4), model=save_model(tmp_path / "bloom", "bloom", n_layer=2, n_head=4))
    assert code == 0 and "prompts are not shared" in said


def test_nan_stops_with_the_rows_and_a_way_out(run, tmp_path):
    code, said = run(rows(16), "--learning_rate", "1e30", "--max_steps", "5")
    assert code == 1 and "step 2" in said and "rows" in said and "lower learning_rate" in said
    assert "the same command" not in said  # which would end the same way
    assert not (tmp_path / "run/model").exists()


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--bta", "1"], ["unknown key 'bta'", "'beta'"]),
        (["--lr_scheduler_type", "linaer"], ["lr_scheduler_type", "Did you mean 'linear'?"]),
        (["--lora_rank", "2", "--lora_target_modules", "[nothing]"], ["lora_target_modules"]),
        (["--lora_rank", "2", "--lora_target_modules", "q_proj,v_prog"], ["'v_prog'", "mean 'v_proj'?"]),
        (["--objective", "dpoo"], ["objective", "sigmoid, sigmoid_norm", "Did you mean 'dpo'?"]),
        (["--objective", "cdpo"], ["'cdpo' is sigmoid with label_smoothing: 0.1"]),
        (["--max_length", "4096"], ["max_length", "256"]),
        (["--chat_template", "none.jinja"], ["chat_template"]),
        (["--lr_scheduler_type", "reduce_lr_on_plateau"], ["lr_scheduler_type", "no function of the step"]),
        (["--stages", "[{objective: sft}, {lr_scheduler_type: linaer}]"], ["lr_scheduler_type"]),
        (["--beta", ".nan"], ["beta", "finite"]),
        (["--num_epochs", "0"], ["num_epochs"]),
        (["--output_dir", "/dev/null/run"], ["output_dir", "cannot write"]),
        (["--lora_rank", "2", "--lora_target_modules", "[1]"], ["lora_target_modules"]),
    ],
)
def test_wrong_config_exits_with_2(run, tmp_path, flags, words):
    code, said = run(rows(4), *flags)
    assert code == 2 and all(word in said for word in words), said
    assert not (tmp_path / "run/config.yaml").exists()  # a corrected second try is not refused


def test_missing_model(run):
    code, said = run(rows(4), model="no/such-model")
    assert code == 1 and "no/such-model" in said


def test_a_second_run_does_not_overwrite_the_first(run):
    assert run(rows(4))[0] == 0
    code, said = run(rows(4))
    assert code == 2 and "already holds a run" in said and "--overwrite" in said
    assert run(rows(4), "--overwrite")[0] == 0


def test_overwrite_never_deletes_what_the_run_starts_from(run, tmp_path):
    assert run(rows(4))[0] == 0
    code, said = run(rows(4), "--overwrite", model=str(tmp_path / "run/model"))
    assert code == 2 and "would replace model" in said
    assert (tmp_path / "run/model/model.safetensors").exists()


def test_broken_models_are_named(run, tmp_path, model):
    broken_model = shutil.copytree(model, tmp_path / "broken")
    (broken_model / "model.safetensors").write_bytes(b"12345678")
    code, said = run(rows(4), model=str(broken_model))
    assert code == 1 and "weights in model.safetensors that are cut short or damaged" in said
    assert "reading rows" not in said  # before anything else is read


def test_a_run_goes_on_from_an_adapter(run, tmp_path):
    assert run(rows(4), "--lora_rank", "2", "--output_dir", str(tmp_path / "lora"))[0] == 0
    adapter = str(tmp_path / "lora/model")
    code, said = run(rows(4), model=adapter)
    assert code == 0 and f"starting from the adapter {adapter}" in said
    code, said = run(rows(4), "--lora_rank", "2", "--overwrite", model=adapter)
    assert code == 2 and "lora_rank: the adapter" in said


def test_template_that_fails_like_a_program(run, tmp_path):
    template = tmp_path / "t.jinja"
    template.write_text("{{ 1 / 0 }}")
    code, said = run([GOOD], "--chat_template", str(template))
    assert code == 1 and "template_error" in said and "division" in said


def test_turns_after_the_last_answer_are_counted(run, tmp_path):
    row = broken(chosen=[*ANSWER, TURN])
    assert run([row, GOOD])[0] == 0
    report = json.loads((tmp_path / "run/data_report.json").read_text())["data"]
    assert report["notes"]["trailing_turns"]["examples"] == [0]
    code, said = run([row, GOOD], "--strict", "--overwrite")
    assert code == 1 and "row 0" in said and "last assistant turn" in said


def test_demo_deletes_nothing_of_the_users(tmp_path, capsys):
    (tmp_path / "data").mkdir()
    (tmp_path / "data/thesis.txt").write_text("precious")
    assert main(["demo", str(tmp_path)]) == 2
    assert (tmp_path / "data/thesis.txt").read_text() == "precious"
    assert main(["demo", "--output_dir", str(tmp_path)]) == 2
    assert "name a new folder" in capsys.readouterr().err


def test_tokenizer_of_another_model(run, tmp_path):
    other = save_model(tmp_path / "small", vocab_size=50)
    code, said = run(rows(4), model=other)
    assert code == 1 and "row 0" in said and "50" in said


def test_data_shows_rows_without_training(run, tmp_path):
    code, said = run([GOOD, broken(rejected=ANSWER)], command="data")
    assert code == 0 and "identical" in said and "«the dog<|im_end|>»" in said
    assert not (tmp_path / "run").exists()


def test_help_and_unknown_commands(capsys):
    assert main(["--help"]) == 0 and main([]) == 2
    assert "reference's log-probs" in capsys.readouterr().out
    assert main(["trian"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and "trian" in said and "'train'" in said.replace('"', "'")
    assert main(["merge", "x", "--ouput", "y"]) == 2 and "--output?" in capsys.readouterr().err
    assert main(["objectives", "now"]) == 2
    assert "unexpected argument 'now': `fastdpo objectives --help` says what there" in capsys.readouterr().err


def test_the_version(capsys):
    assert main(["--version"]) == 0 and capsys.readouterr().out == f"fastdpo {fastdpo.__version__}\n"


@pytest.mark.parametrize("command", [name for name in app if not name.startswith("-")])
def test_each_command_has_help(command, capsys):
    assert main([command, "--help"]) == main([command, "-h"]) == 0
    assert f"Usage: fastdpo {command}" in capsys.readouterr().out


def test_the_installed_command_runs():
    done = subprocess.run([sys.executable, "-m", "fastdpo", "data"], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: 2 problems\n  model: missing")


@pytest.mark.parametrize(
    "argv, told",
    [(["cache", "/no/such"], "there is no file"), (["train", "--modle", "m"], "Did you mean 'model'")],
)
def test_what_is_wrong_is_told_without_torch(argv, told):
    script = "import sys; from fastdpo.cli import main; assert main(sys.argv[1:]) == 2; "
    script += "assert not {'torch', 'transformers'} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", script, *argv], capture_output=True, text=True)
    assert done.returncode == 0 and told in done.stderr, done.stderr


def test_help_is_quick():
    """Nothing is imported that takes long; CPU seconds, for the machine may be busy: 0.25 where it is not."""
    script = "import sys; from fastdpo.cli import main; main(['train', '--help']); "
    script += "assert not {'torch', 'transformers', 'datasets', 'numpy'} & set(sys.modules)"
    before = os.times()
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    after = os.times()
    assert done.returncode == 0, done.stderr
    assert after.children_user + after.children_system - before.children_user - before.children_system < 1


def test_completion_knows_commands_and_keys(capsys):
    for shell in ("bash", "zsh", "fish"):
        assert main(["completion", shell]) == 0
        script = capsys.readouterr().out
        assert "learning_rate" in script and "objectives" in script
    assert main(["completion", "tcsh"]) == 2 and "zsh" in capsys.readouterr().err


def quiet(*words):
    """Runs Python from the repository's root, whose folder `kernels` some libraries take for a package."""
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""


@pytest.mark.parametrize(
    "words",
    [
        ["objectives"],
        ["data"],
        ["plan", "--device=cpu"],
        ["ref"],
        ["train", "--lora_rank=2", "--eval_data=0.2"],
        ["train", "--max_length=40", "--samples=1"],
        ["train", "--lora_rank=2", "--load_in_4bit"],
        ["train", "--optim=adamw_torch_8bit"],
    ],
    ids=" ".join,
)
def test_commands_are_quiet(words, model, tmp_path):
    """Nothing comes to stderr: no bars of libraries, no kernels that they could not load, no deprecations."""
    for word, library in (("--load_in_4bit", "bitsandbytes"), ("--optim=adamw_torch_8bit", "torchao")):
        if word in words:
            pytest.importorskip(library)
    write_jsonl(tmp_path / "rows.jsonl", rows(12))
    config = f"model: {model}\ndata: {tmp_path}/rows.jsonl\noutput_dir: {tmp_path}/run\nsamples: 0\n"
    (tmp_path / "c.yaml").write_text(config + "max_length: 64\nmax_steps: 1\ndtype: fp32\n")
    command, *flags = words
    quiet("-m", "fastdpo.cli", command, *([tmp_path / "c.yaml"] * (command != "objectives")), *flags)
    if "--lora_rank=2" in words and "--load_in_4bit" not in words:
        quiet("-m", "fastdpo.cli", "merge", tmp_path / "run")


def test_a_parquet_file_is_read_quietly(model, tmp_path):
    Dataset.from_list(rows(12)).to_parquet(tmp_path / "rows.parquet")
    flags = ["--model", model, "--data", tmp_path / "rows.parquet", "--max_length", "64"]
    quiet("-m", "fastdpo.cli", "data", *flags)


def test_the_import_is_quiet_and_hides_no_warnings():
    quiet("-c", "import fastdpo; [getattr(fastdpo, name) for name in fastdpo.__all__]")
    script = "import fastdpo, logging; log = logging.getLogger('torchao'); log.warning('this one matters')"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stderr == "this one matters\n"


def test_a_run_ends_with_where_to_look_next(run, tmp_path):
    code, said = run([GOOD] * 4, "--samples", "0")
    assert code == 0 and f"the model is in {tmp_path}/run/model; open {tmp_path}/run/report.html" in said
    where = lambda name: shlex.quote(str(tmp_path / name))
    push = lambda name: f"fastdpo push {where(name)} --to me/NAME shares it on the Hugging Face hub\n"
    merge = lambda name: f"fastdpo merge {where(name)} makes one model of adapter and base; {push(name)}"
    assert f"\nnext: {push('run')}" in said
    _, said = run([GOOD] * 4, "--samples", "0", "--lora_rank", "2", "--overwrite", "true")
    assert f"\nnext: {merge('run')}" in said
    on = ["--samples", "0", "--output_dir", str(tmp_path / "a second")]
    _, said = run([GOOD] * 4, *on, model=str(tmp_path / "run/model"))
    assert f"\nnext: {merge('a second')}" in said
