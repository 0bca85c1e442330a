"""report.html: the values of the run folder's files, whatever state they are in, in a page that a browser
shows and that loads nothing."""

import html
import itertools
import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from markupsafe import Markup
from PIL import Image

from fastdpo.config.keys import Config
from fastdpo.config.reading import to_yaml
from fastdpo.console import formatting
from fastdpo.data.report import DataReport
from fastdpo.data.rows import RowProblem
from fastdpo.data.store.facts import Facts
from fastdpo.files import durable
from fastdpo.report.history import Series, read_run
from fastdpo.report.page import write_report
from fastdpo.report.plots import smoothed, thinned
from tests import tiny

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
HOSTILE = "</pre><script>alert('x')</script><img src=x onerror=alert(1)> & {{ 7 * 7 }}"
VERSIONS = {"python": "3.12.3", "fastdpo": "0.1.0", "torch": "2.13.0"}


def train_line(stage, step, pairs=True, **values):
    rng = np.random.default_rng(step)
    line = {"stage": stage, "step": step, "epoch": step / 50, "loss": 0.7 - step / 500}
    line |= {"logps/chosen": -40 - step / 10, "grad_norm": 0.5 + rng.random(), "learning_rate": 1e-6 * step}
    line |= {"num_tokens": 100 * step, "tokens_per_second": 900.0 + step, "peak_memory_gb": 1.25}
    line |= {"tflops_per_second": 12.34, "mfu": 0.412, "idle_share": 0.03, "seconds_left": 90 * (100 - step)}
    if pairs:
        line |= {"logps/rejected": -45 - step / 5, "rewards/margins": step / 100, "kl": step / 1e4}
        line |= {"rewards/chosen": -step / 100, "rewards/rejected": -step / 50, "pairs_per_second": 8.5}
        line |= {"rewards/accuracies": 0.5 + step / 400, "logps/accuracies": 0.6}
    return line | values


def eval_line(stage, step, loss, **values):
    line = {"eval_loss": loss, "eval_logps/chosen": -41.0, "eval_rewards/margins": step / 100}
    line |= {"eval_rewards/accuracies": 0.0 if step == 0 else 0.8125, "eval_kl": step / 1e4}
    return {"stage": stage, "step": step, **line, **values}


def event(minute, name, **values):
    return {"time": f"2026-03-04T05:{minute:02d}:00+00:00", "event": name, **values}


def data_report():
    report = DataReport("pairs.jsonl")
    for row in range(40):
        report.note(row, {"truncated": 1} if row < 3 else {})
    report.keep(Facts.of(tiny.group(row, 5 + row % 7, [3, 9]) for row in range(40)))
    for row in range(40, 47):
        report.drop(row, RowProblem("identical", "rejected", "the same text as chosen"))
    return {"data": report.to_dict(), "eval_data": {"split_off": 2, "rows": [7, 11]}}


def write_run(run, lines=None, events=None, samples=None, **config):
    """A run folder as the trainer leaves it; None: as of a finished DPO run."""
    run.mkdir(parents=True, exist_ok=True)
    config = dict(model="models/tiny", data="pairs.jsonl", output_dir=str(run)) | config
    (run / "config.yaml").write_text(to_yaml(Config(**config)))
    (run / "data_report.json").write_text(json.dumps(data_report()))
    if lines is None:
        lines = [train_line(0, step) for step in range(1, 101)]
        lines += [eval_line(0, 0, math.log(2)), eval_line(0, 50, 0.5123), eval_line(0, 100, 0.5456)]
    if events is None:
        events = [
            event(0, "start", versions=VERSIONS, device="NVIDIA H200", skipped={}),
            event(1, "stage", **STAGE),
        ]
        events += [event(2, "reference", stage=0, source="cache", file="/c/ref.sqlite", hits=80, misses=14)]
        events += [event(2, "drift", stage=0, max_nats=0.0, bound=0.01)]
        events += [
            event(
                9,
                "checkpoint",
                step=50,
                folder="step-50",
                bytes=2.5e7,
                seconds=0.4,
                eval_loss=0.5123,
                best=True,
            )
        ]
        events += [event(30, "done", seconds=1800.0)]
    if samples is None:
        row = {"row": 3, "prompt": "Is it <b>bold</b>?", "chosen": "It is."}
        samples = [{"when": "start", "stage": 0, "step": 0, "completion": "the the the", **row}]
        samples += [{"when": "end", "stage": 0, "step": 100, "completion": "Yes, very.", **row}]
    for name, records in (("metrics", lines), ("events", events), ("samples", samples)):
        (run / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    (run / "model").mkdir(exist_ok=True)
    (run / "model/model.safetensors").write_bytes(b"")
    return run


STAGE = dict(stage=0, objective="sigmoid", steps=100, groups=38, pairs=38, responses=76, shared=True)
STAGE |= dict(first_step_microbatches=2, first_step_tokens=1234, first_step_separate_tokens=2345)
STAGE |= dict(head_plan="keep, 6MVD, at most 3 MB")


@pytest.fixture
def quick(monkeypatch):
    """Charts as empty pictures, for tests of the words around them."""
    for name in ("draw", "draw_lengths"):
        monkeypatch.setattr(f"fastdpo.report.page.{name}", lambda *_: Markup("<svg></svg>"))


def page_of(run):
    return write_report(run).read_text(encoding="utf-8")


def words(page):
    """What a reader sees, on one line."""
    page = re.sub(r"<(style|title|svg)\b.*?</\1>", " ", page, flags=re.S)
    return re.sub(r"\s+", " ", html.unescape(re.sub(r"<[^>]*>", " ", page)))


def test_values_are_those_of_the_files(tmp_path, quick):
    page = page_of(write_run(tmp_path / "nightly", lora_rank=8, beta=0.25))
    text = words(page)
    for said in (
        *("nightly", "DPO on models/tiny , LoRA of rank 8", "Finished in 30 min", "finished"),
        *(
            "The lowest held-out loss was 0.5123 at step 50, the last 0.5456 at step 100",
            "load_best: true would",
        ),
        *("The adapter (peft) is in", "model/ beside this page", "0.6931", "81.2%", "all ties"),
        "The chosen responses did not become less likely",
        *(
            "40 rows kept of 47 read",
            "identical",
            "7 (14.9%)",
            "40, 41, 42, 43, 44, ...",
            "3 responses whose sequence",
        ),
        *("2 prompts split off", "rows 7, 11", "1,234", "2,345", "keep, 6MVD", "80", "14", "ref.sqlite"),
        *(
            "0 nats a token at most (rounding explains 0.010)",
            "step-50, 25.0 MB in 0.4 s, held-out loss 0.5123, the best so far",
        ),
        *("the the the", "Yes, very.", "Is it <b>bold</b>?", "It is.", "NVIDIA H200", "2.13.0", "0.25"),
    ):
        assert said in text, said
    assert "What this report lacks" not in text and "1 of 1 completion changed." in text
    assert '<a href="model/">' in page
    saved = 1 - data_report()["data"]["shared_forward_tokens"] / data_report()["data"]["separate_rows_tokens"]
    assert f"{saved:.1%} saved" in text


def test_charts_are_inline_svg_and_png_files(tmp_path):
    run = write_run(tmp_path / "run")
    page = page_of(run)
    names = {"loss", "margin", "accuracy", "logps", "rewards", "kl", "grad_norm", "learning_rate"}
    names |= {"pairs_per_second", "tokens_per_second", "mfu", "idle_share", "memory", "lengths"}
    assert {path.stem for path in (run / "plots").iterdir()} == names
    for path in (run / "plots").iterdir():
        with Image.open(path) as image:
            assert image.format == "PNG" and image.width > 500
            assert len(set(image.convert("L").resize((64, 64)).getdata())) > 3  # something is drawn
    assert page.count("<svg viewBox") == page.count('role="img"') == len(names)
    ids = re.findall(r'\sid="([^"]*)"', page)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'href="#([^"]*)"|url\(#([^)]*)\)', page)) <= {(i, "") for i in ids} | {
        ("", i) for i in ids
    }
    assert 'aria-label="Loss, steps 0 to 100: training from 0.6980 to 0.5000; held-out from 0.6931' in page
    assert "#0072b2" not in re.sub(r"<style>.*?</style>", "", page, flags=re.S)  # all follow the theme


def test_what_changed_comes_first_behind_its_roles(tmp_path, quick):
    turns = [{"role": "system", "content": "Be <short>."}, {"role": "user", "content": "Why?"}]
    samples = []
    for row, (before, after) in enumerate(
        [("same", "same"), ("old", "new"), ("still", "still"), ("cut", None)]
    ):
        one = {
            "stage": 0,
            "row": row,
            "prompt": f"prompt {row}",
            "chosen": None,
            "turns": turns if row else None,
        }
        samples += [one | {"when": "start", "step": 0, "completion": before}]
        samples += [one | {"when": "end", "step": 100, "completion": after}] if after else []
    page = page_of(write_run(tmp_path / "run", samples=samples))
    text = words(page)
    assert "1 of 3 completions changed." in text
    assert [int(row) for row in re.findall(r'aria-label="Row (\d)"', page)] == [1, 0, 2, 3]
    assert "system: Be <short>. user: Why?" in text and "prompt 0" in text and "prompt 1" not in text
    unchanged = [sample for sample in samples if sample["row"] in (0, 2)]
    assert "None of 2 completions changed." in words(page_of(write_run(tmp_path / "run", samples=unchanged)))


def test_rounding_is_0(tmp_path, quick):
    """At the reference rewards are what rounding leaves; small losses and learning rates are none of it."""
    lines = [train_line(0, step) for step in range(1, 31)]
    noise = {"eval_rewards/chosen": -5.39e-14, "eval_rewards/rejected": 3e-7, "eval_kl": 1e-15}
    moved = {"eval_rewards/chosen": 1.25, "eval_rewards/rejected": -2.0, "eval_kl": 0.5}
    lines += [eval_line(0, 0, 0.7, **noise), eval_line(0, 30, 1e-9, **moved)]
    run = write_run(tmp_path / "run", lines)
    text = words(page_of(run))
    assert "reward of the chosen 0 1.250 +1.25" in text and "reward of the rejected 0 −2.000" in text
    assert "KL from the reference, nats a token 0 0.5000" in text and "1e-09" in text
    assert read_run(run).series("eval_loss").value[-1] == 1e-9


def test_two_evaluations_are_points_and_three_a_line(tmp_path):
    dashed = "stroke-dasharray: 6.4"
    for steps, there in (((0, 100), False), ((0, 50, 100), True)):
        lines = [train_line(0, step) for step in range(1, 101)]
        lines += [eval_line(0, step, 0.7 - step / 1000) for step in steps]
        loss = (
            page_of(write_run(tmp_path / "run", lines))
            .partition('aria-label="Loss')[2]
            .partition("</figure>")[0]
        )
        assert (dashed in loss) == there and "xlink" not in loss


def test_no_absolute_path(tmp_path, quick, monkeypatch):
    """A page that is sent on does not tell where it was made."""
    monkeypatch.chdir(tmp_path)
    events = [event(0, "start"), event(1, "stage", **STAGE)]
    file = f"{tmp_path}/.cache/fastdpo/reference.sqlite"
    events += [event(2, "reference", stage=0, source="cache", file=file, hits=1, misses=0)]
    page = page_of(write_run(Path("runs/first"), events=events))
    assert str(tmp_path) not in page and "<code>reference.sqlite</code>" in page


def test_keys_that_were_ignored_are_named(tmp_path, quick):
    run = write_run(tmp_path / "run", ignore={"lora_dropout": 0.1, "datasets.odd": True})
    said = "Went on without lora_dropout: 0.1, datasets.odd: true of the config it was given"
    assert said in words(page_of(run))
    assert "Went on without" not in words(page_of(write_run(tmp_path / "other")))


def test_falling_chosen_logps_are_pointed_out(tmp_path, quick):
    lines = [train_line(0, step) for step in range(1, 101)]
    text = words(page_of(write_run(tmp_path / "run", lines)))
    assert "The chosen responses became less likely too, by 9.900 nats (training)" in text
    assert "well-known symptom of DPO" in text and "No held-out rows" in text
    assert "In training, as no rows were held out" in text


def test_stages_and_a_resume_are_marked(tmp_path):
    lines = [train_line(0, step, pairs=False) for step in range(10, 101, 10)]
    lines += [train_line(1, 100 + step) for step in range(10, 101, 10)]
    lines += [eval_line(0, 0, 2.5), eval_line(0, 100, 1.5), eval_line(1, 100, 0.7), eval_line(1, 200, 0.6)]
    sft = {**STAGE, "stage": 0, "objective": "sft", "pairs": 0}
    events = [event(0, "start", versions=VERSIONS, device="GPU A"), event(1, "stage", **sft)]
    events += [event(5, "stage", **STAGE | {"stage": 1}), event(8, "stopped", signal="SIGTERM", step=150)]
    skipped = {"step-160": "weights.safetensors was changed after it was written"}
    resumed = dict(step=150, checkpoint="step-150", skipped=skipped, versions=VERSIONS, device="GPU B")
    events += [event(30, "resume", **resumed), event(33, "done", seconds=180)]
    stages = [{"objective": "sft"}, {"objective": "sigmoid"}]
    run = write_run(tmp_path / "run", lines, events, stages=stages)
    page = page_of(run)
    text = words(page)
    for said in (
        "SFT then DPO",
        "Finished in 11 min",
        "Stage 1, sft.",
        "Stage 2, sigmoid.",
        "GPU A",
        "GPU B",
    ):
        assert said in text, said
    assert "from step-150; passed over step-160: weights.safetensors was changed" in text
    assert ">resumed</text>" in page and ">sft</text>" in page and ">sigmoid</text>" in page
    assert [stage["objective"] for stage in read_run(run).stages()] == ["sft", "sigmoid"]


@pytest.mark.parametrize(
    "last, said",
    [
        (event(9, "stopped", signal="SIGTERM"), "Stopped by SIGTERM at step 100 of 100 after 9 min"),
        (event(9, "error", message="step 7: out of <GPU> memory"), "step 7: out of <GPU> memory"),
        (event(9, "checkpoint", step=50, folder="step-50", bytes=1, seconds=0.1), "had not ended when"),
    ],
)
def test_how_it_ended(tmp_path, quick, last, said):
    events = [event(0, "start"), event(1, "stage", **STAGE), last]
    assert said in words(page_of(write_run(tmp_path / "run", events=events)))


def test_how_long_it_will_take_and_how_fast_it_went(tmp_path, quick):
    lines = [train_line(0, step) for step in (10, 20)]
    events = [event(0, "start"), event(1, "stage", **STAGE)]
    events += [event(9, "checkpoint", step=20, folder="step-20", bytes=1, seconds=0.1)]
    text = words(page_of(write_run(tmp_path / "run", lines, events)))
    assert "At step 20 of 100 after 9 min, about 2 h left" in text
    assert "8.50 pairs/s, 915 tokens/s, 12.3 TFLOP/s, model FLOP utilisation 41%, idle 3%." in text
    lines = [train_line(0, 20), *(train_line(1, step) for step in (30, 40))]
    events += [event(10, "stage", **STAGE | {"stage": 1})]
    two = write_run(tmp_path / "two", lines, events, stages=[{"objective": "sft"}, {"beta": 0.2}])
    assert "about 1 h 30 min left of stage 2" in words(page_of(two))
    done = write_run(tmp_path / "done", lines, [*events, event(12, "done", seconds=1.0)])
    assert " left of stage" not in words(page_of(done))


def test_sft_without_pairs_eval_or_samples(tmp_path, quick):
    lines = [train_line(0, step, pairs=False) for step in range(10, 101, 10)]
    text = words(page_of(write_run(tmp_path / "run", lines, [], [], objective="sft")))
    assert "SFT on" in text and "Reward margin" not in text and "samples.jsonl" in text
    assert "does not say whether the run ended" in text


def test_a_run_that_has_logged_nothing(tmp_path, quick):
    text = words(page_of(write_run(tmp_path / "run", [], [event(0, "start")], [])))
    assert "Nothing to draw yet" in text and "No step was logged yet" in text


def test_numbers_logged_once_are_said(tmp_path, quick):
    run = write_run(tmp_path / "run", [train_line(0, 42), eval_line(0, 0, 0.69), eval_line(0, 42, 0.6)])
    text = words(page_of(run))
    assert "not drawn: accuracy 0.6050 (training, step 42), 0.8125 (held-out, step 42); rewards" in text
    assert "learning rate 4.2e-05 (training, step 42)" in text


def test_one_logged_line_has_no_before(tmp_path, quick):
    """A run stopped early: saved after the only line it logged, so it stands where it was saved."""
    saved = event(4, "checkpoint", step=82, folder="step-82", bytes=1, seconds=0.1)
    events = [event(0, "start"), event(1, "stage", **STAGE), saved, event(5, "stopped", signal="SIGINT")]
    text = words(page_of(write_run(tmp_path / "run", [train_line(0, 50)], events)))
    assert "Stopped by SIGINT at step 82 of 100" in text and "0.6000 at step 50" in text
    assert "step 50 change" not in text


def test_numbers_that_are_none(tmp_path, quick):
    lines = [train_line(0, step) for step in range(1, 31)]
    lines[10]["loss"], lines[12]["grad_norm"] = math.nan, math.inf
    text = words(page_of(write_run(tmp_path / "run", lines)))
    assert "loss is not a number at step 11." in text and "grad_norm is not a number at step 13." in text


def test_of_a_step_logged_twice_the_last_counts(tmp_path):
    lines = [train_line(0, 10, loss=9.0), train_line(0, 20, loss=8.0), train_line(0, 20, loss=0.5)]
    assert read_run(write_run(tmp_path / "run", lines)).series("loss").value.tolist() == [9.0, 0.5]


def test_hostile_text_stays_text(tmp_path):
    row = {"when": "start", "stage": 0, "step": 0, "row": HOSTILE, "prompt": HOSTILE, "chosen": HOSTILE}
    events = [
        event(0, "start", device=HOSTILE, versions={HOSTILE: HOSTILE}),
        event(1, "error", message=HOSTILE),
    ]
    events += [
        event(1, "stage", **STAGE | {"objective": HOSTILE}),
        {"time": HOSTILE, "event": HOSTILE, "x": HOSTILE},
    ]
    run = write_run(
        tmp_path / "run", None, events, [row | {"completion": HOSTILE}], data=HOSTILE, model=HOSTILE
    )
    report = data_report()
    report["data"]["source"] = HOSTILE
    report["data"]["dropped"][HOSTILE] = {"rows": 1, "items": 1, "examples": [HOSTILE], "message": HOSTILE}
    (run / "data_report.json").write_text(json.dumps(report))
    page = page_of(run)
    assert "<script" not in page and "<img" not in page and "49 }}" not in page
    assert page.count("&lt;script&gt;alert(&#39;x&#39;)") >= 12 and words(page).count("{{ 7 * 7 }}") >= 12


@pytest.mark.parametrize("name", ["config.yaml", "data_report.json", "metrics.jsonl", "events.jsonl"])
def test_missing_and_damaged_files_are_named(tmp_path, quick, name):
    run = write_run(tmp_path / "run")
    whole = (run / name).read_bytes()
    (run / name).write_bytes(whole[:-20])  # as a kill leaves it
    if name != "config.yaml":  # which reads well without its end
        assert f"{name}" in words(page_of(run)).partition("What this report lacks")[2][:200]
    for content in (
        b"[1, 2]",
        b"\xff\x00{",
        b'{"data": 3, "stage": "x", "step": "y", "event": ["z"], "stages": 7}\n',
    ):
        (run / name).write_bytes(content)
        page_of(run)
    (run / name).unlink()
    assert f"{name} is missing" in words(page_of(run))


def test_an_empty_folder_and_a_missing_one(tmp_path):
    (tmp_path / "empty").mkdir()
    assert words(page_of(tmp_path / "empty")).count("is missing") == 4
    with pytest.raises(OSError):
        write_report(tmp_path / "none")


def test_an_old_report_survives_a_crash_in_the_middle(tmp_path, quick, monkeypatch):
    run = write_run(tmp_path / "run")
    before = write_report(run).read_bytes()
    for where in ("sync", "os.replace"):
        with monkeypatch.context() as patch:
            owner = durable.os if "." in where else durable
            patch.setattr(owner, where.rpartition(".")[2], crash)
            with pytest.raises(OSError, match="no space"):
                write_report(run)
        assert (run / "report.html").read_bytes() == before
        assert not [path for path in run.rglob("*part*")]


def crash(*_):
    raise OSError("no space left")


def test_many_lines_are_quick_and_light(tmp_path):
    """Twice as many lines are twice as much work, and no larger a page."""
    line = json.dumps(train_line(0, 0, loss=0.123456789)).replace('"step": 0', '"step": %d')
    run = write_run(tmp_path / "run", [])
    work, sizes = [], []
    for lines in (2000, 2000, 4000, 8000):  # the first one imports
        (run / "metrics.jsonl").write_text("".join(line % step + "\n" for step in range(lines)))
        calls = itertools.count()
        sys.setprofile(lambda frame, event, arg, calls=calls: next(calls) if "call" in event else None)
        try:
            sizes.append(write_report(run).stat().st_size)
        finally:
            sys.setprofile(None)
        work.append(next(calls))
    assert work[3] - work[2] < 2.2 * (work[2] - work[1])
    assert sizes[3] < sizes[1] + 20_000


def test_thinning_keeps_spikes_and_smoothing_keeps_lines():
    value = np.zeros(50_000)
    value[31_234] = 7.0
    thin = thinned(Series(np.zeros(50_000), np.arange(50_000), value))
    assert len(thin) <= 403 and thin.value.max() == 7 and thin.step[0] == 0 and thin.step[-1] == 49_999
    line = np.linspace(3, 5, 1000)
    assert np.allclose(smoothed(line), line)


@pytest.mark.parametrize(
    "written, said",
    [
        (formatting.significant(0.693147), "0.6931"),
        (formatting.significant(-120.34), "−120.3"),
        (formatting.significant(123456.7), "123,457"),
        (formatting.significant(1e-6), "1e-06"),
        (formatting.significant(-5.39e-14), "0"),
        (formatting.signed(-5.39e-14), "0"),
        (formatting.significant(math.nan), "nan"),
        (formatting.signed(0.1234), "+0.123"),
        (formatting.duration(3.21), "3.2 s"),
        (formatting.duration(312), "5 min 12 s"),
        (formatting.duration(90_000), "1 d 1 h"),
        (formatting.duration(3600), "1 h"),
        (formatting.gigabytes(1.734e9), "1.73 GB"),
        (formatting.gigabytes(12), "12 bytes"),
        (formatting.counted(1, "row"), "1 row"),
        (formatting.first_few([1, 2, 3], most=2), "1, 2, ..."),
    ],
)
def test_formatting(written, said):
    assert written == said


def browse(url, folder, *options):
    """(stdout, console messages) of a headless browser that cannot reach any network."""
    flags = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-background-networking",
        "--no-first-run",
    ]
    flags += ["--disable-component-update", "--hide-scrollbars", "--host-resolver-rules=MAP * ~NOTFOUND"]
    flags += ["--enable-logging=stderr", f"--user-data-dir={folder / 'profile'}"]
    done = subprocess.run([BROWSER, *flags, *options, url], capture_output=True, text=True, timeout=300)
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


def looked_at(page, size, dark):
    """A page's elements, once a browser has shown it without complaint, light or dark."""
    look = ["--blink-settings=preferredColorScheme=0"] if dark else []
    shot = page.with_name("shot.png")
    _, console = browse(page.as_uri(), page.parent, f"--screenshot={shot}", f"--window-size={size}", *look)
    assert not console
    with Image.open(shot) as image:
        grey = np.asarray(image.convert("L"), float)
    assert grey.std() > 10 and (grey.mean() < 90 if dark else grey.mean() > 180)
    dom, console = browse(page.as_uri(), page.parent, "--dump-dom")
    assert not console
    return dom


@pytest.mark.skipif(BROWSER is None, reason="no chromium, chromium-browser or google-chrome")
@pytest.mark.parametrize("size, dark", [("1400,2400", False), ("390,3000", False), ("1400,2400", True)])
def test_in_a_browser(tmp_path, size, dark):
    """The page forbids itself every request, and the browser would complain of one on its console."""
    dom = looked_at(write_report(write_run(tmp_path / "run")), size, dark)
    for section in ("numbers", "charts", "samples", "data", "computed", "timeline", "config"):
        assert f'<section id="{section}"' in dom
    assert dom.count("<svg") == 14


@pytest.mark.skipif(BROWSER is None, reason="no chromium, chromium-browser or google-chrome")
def test_the_browser_would_have_complained(tmp_path):
    page = write_report(write_run(tmp_path / "run"))
    bad = page.read_text().replace("<main>", '<main><img src="https://example.com/x.png"><script>1</script>')
    page.write_text(bad)
    assert len(browse(page.as_uri(), tmp_path, "--dump-dom")[1]) == 2
