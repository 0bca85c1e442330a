"""eval.html: what the result says, in a page that loads and runs nothing."""

import copy
import re

import pytest

from fastdpo.evaluation.page import page
from tests.evaluation.runs import evaluated
from tests.report.test_report import BROWSER, HOSTILE, looked_at, words


@pytest.fixture(scope="module")
def made(place):
    keys = dict(samples=14, scorer="length", max_new_tokens=5, versus="full")
    return evaluated(place, output=place[0] / "page", **keys)


def test_it_shows_what_was_found(made):
    text = words(page(made))
    assert "30 rows, 29 prompts, 30 pairs; the longer response is the chosen one in" in text
    for said in (
        "Is it better?",
        "win rate over the reference",
        "By source",
        "14 prompts are too few to tell",
    ):
        assert said in text
    margin = made["numbers"]["model"]["rewards/margins"]
    assert f"reward margin {margin['value']:.4f} ± {margin['stderr']:.2g}"[:24] in text
    assert "2 more are in eval.json" in text and "scorer length" in text
    assert page(made).count("<article") == 12 and page(made).count("<svg") == 2


def test_it_loads_and_runs_nothing(made):
    text = page(made)
    assert "default-src 'none'" in text and "<script" not in text
    assert not re.search(r"""(src|href)\s*=\s*["'](?!#|data:,)""", text) and "url(http" not in text


def test_without_reference_answers_and_sources(place):
    made = evaluated(place, "model", "eval.jsonl", max_length=64)
    text = words(page(made))
    for said in ("there is nothing to test against", "neither margins nor scores", "None were asked for"):
        assert said in text
    assert "no reference that is known" in text and "no column source" in text


def test_hostile_text_stays_text(made):
    bad = copy.deepcopy(made)
    bad["names"] = dict.fromkeys(bad["names"], HOSTILE)
    bad["notes"], bad["settings"]["data"], bad["versions"][HOSTILE] = [HOSTILE], HOSTILE, HOSTILE
    bad["sources"][0]["source"] = HOSTILE
    for entry in bad["answers"]:
        entry |= {"prompt": HOSTILE, "turns": [{"role": HOSTILE, "content": HOSTILE}]}
        entry["answers"]["model"][0]["text"] = HOSTILE
    text = page(bad)
    assert "<script" not in text and "<img" not in text and "49 }}" not in text
    assert text.count("&lt;script&gt;alert(&#39;x&#39;)") >= 30


@pytest.mark.skipif(BROWSER is None, reason="no chromium, chromium-browser or google-chrome")
@pytest.mark.parametrize("size, dark", [("1400,2400", False), ("390,3000", True)])
def test_in_a_browser(made, tmp_path, size, dark):
    (tmp_path / "eval.html").write_text(page(made))
    dom = looked_at(tmp_path / "eval.html", size, dark)
    for section in ("tests", "numbers", "sources", "charts", "answers", "settings"):
        assert f'<section id="{section}"' in dom
