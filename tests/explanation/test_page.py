"""explain.html, its summary and the console's tables: what the result says, no more, whatever is missing."""

import copy
import io
import re

import numpy as np
import pytest
from markupsafe import Markup
from rich.console import Console

from fastdpo.explanation import plots
from fastdpo.explanation.inside import spelt
from fastdpo.explanation.page import page
from fastdpo.explanation.show import show
from fastdpo.explanation.summary import summary
from fastdpo.explanation.words import beginning, kind_names, of_effect
from tests.explanation.made import LAYERS, made, no_direction, nothing_changed
from tests.report.test_report import BROWSER, HOSTILE, looked_at, words

PARTS = ("weights", "behaviour", "direction", "where", "neurons", "causes")
SECTIONS = (*PARTS, "settings")
_draw = plots.render


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Charts as empty pictures, for tests of the words around them."""
    monkeypatch.setattr(plots, "render", lambda *_: Markup("<svg></svg>"))


@pytest.fixture
def drawn(monkeypatch, quick):
    monkeypatch.setattr(plots, "render", _draw)


def cell(result, name, column="margins"):
    return next(row for row in result["causes"]["rows"] if row["name"] == name)[column]


def told_share(result, name):
    return of_effect(cell(result, name))


def test_the_summary_is_made_of_the_numbers():
    result = made()
    said = summary(result)
    assert said["Weights"].startswith("The weights moved by 0.017% of their size; 43% of the entries differ")
    assert said["Behaviour"] == (
        "The margin between chosen and rejected grew by 5.32 ± 0.29 nats "
        "(chosen −3.10 ± 0.31 nats, rejected −8.42 ± 0.44 nats)."
    )
    assert "strongest at the beginning: the first 8 tokens of a response" in said["Shallow?"]
    assert (
        "71.2% of the pairs of 250 prompts that it was not fitted on (95%: 66% to 76%)" in said["Direction"]
    )
    where = result["where"]
    assert f"the MLPs +{sum(where['mlp']):.2f}, attention +{sum(where['attention']):.2f}" in said["Where"]
    lowering = sum(group["count"] for group in result["neurons"]["groups"] if group["lowers"])
    assert said["Neurons"].startswith(f"{lowering} of 768 neurons write more towards the chosen than before")
    four = ("all four, token", "all four, constant", "random like all four, token")
    token, constant, control = (told_share(result, name) for name in four)
    assert said["Patched"] == (
        "Giving the model before what the model after has in the four groups of neurons that moved towards "
        f"the chosen brings {token} of the effect on the margin token by token; random sets of as many "
        f"neurons {control}. Their means alone bring {constant}."
    )
    assert told_share(result, "50 most along it, at 0") in said["Switched off"]


def test_what_breaks_the_model_is_said_to():
    result = made()
    for name in ("50 most along it, at 0", "all four, constant"):
        cell(result, name, "kl")["value"] = 0.4
        cell(result, name, "perplexity")["value"] = 9.5
    said = summary(result)
    assert said["Patched"].endswith("but that breaks the model (KL 0.40 where training's is 0.029).")
    assert told_share(result, "10 most along it, at 0") in said["Switched off"]  # the other one is whole
    assert "breaks" not in said["Switched off"] and "broken: KL 0.40 where" in page(result)
    cell(result, "10 most along it, at 0", "kl")["value"] = 0.4
    cell(result, "10 most along it, at 0", "perplexity")["value"] = 9.5
    said = summary(result)["Switched off"]
    assert told_share(result, "50 most along it, at 0") in said and "breaks the model" in said
    cell(result, "all four, constant", "perplexity")["value"] = 8.3  # no worse than after
    assert "breaks" not in summary(result)["Patched"]


def test_a_direction_is_held_against_what_was_wanted_and_length():
    result = made()
    result["direction"]["length_correlation"] = 0.1
    said = summary(result)["Direction"]
    assert "--direction" not in said and "--match_length" not in said
    result["direction"] |= {"after": -9.0, "length_correlation": -0.8}
    said = summary(result)["Direction"]
    assert "not where it should have gone (--direction down looks at it the other way)" in said
    assert "goes with the response's length (correlation −0.80)" in said


def test_what_random_sets_do_too_is_not_told_apart():
    result = made()
    control = cell(result, "random like all four, token")
    control["share"] = cell(result, "all four, token")["share"] - 0.1
    assert "not told apart" in summary(result)["Patched"]  # 0.1 is less than two of the joint error
    control["share"] -= 0.1
    assert "not told apart" not in summary(result)["Patched"]
    control["spread"] = 0.3 * result["causes"]["effect"]["margins"]["value"]
    assert "not told apart" in summary(result)["Patched"]


def test_no_share_of_an_effect_that_is_not_told():
    result = made()
    result["causes"]["effect"]["margins"]["told"] = False
    said = summary(result)
    assert "effect on the score" in said["Patched"] and "margin" not in said["Patched"]
    for effect in result["causes"]["effect"].values():
        effect["told"] = False
    said = summary(result)
    assert said["Patched"].startswith("No number of the causes changed") and "Switched off" not in said
    result["behaviour"]["numbers"]["margins"] = {"value": 0.3, "error": 0.2}
    assert "is not told from 0" in summary(result)["Behaviour"]


def test_a_shrinking_margin_and_other_directions():
    result = made()
    result["behaviour"]["numbers"]["margins"]["value"] = -2.0
    assert "shrank by 2.00 ± 0.29 nats" in summary(result)["Behaviour"]
    result["direction"] |= {"kind": "labels", "towards": "down"}
    said = summary(result)
    assert "tells label 1 from label 0" in said["Direction"]
    assert "write more towards label 0" in said["Neurons"] and "towards label 0" in said["Patched"]
    assert "point towards label 1; mean activation 0 or above, lower after" in words(page(result))
    result["direction"] |= {"kind": "vector", "accuracy": None, "interval": None, "tested": 0}
    assert "the vector that was given" in summary(result)["Direction"]
    assert "against the vector" in words(page(result))


@pytest.mark.parametrize("kls, how", [((4, 1), "strongest"), ((1, 1), "not confined"), ((1, 4), "weaker")])
def test_whether_it_is_shallow(kls, how):
    bins = [dict(first=1, last=8, tokens=10, kl=kls[0]), dict(first=9, last=None, tokens=30, kl=kls[1])]
    found = beginning({"by_position": bins})
    assert found["last"] == 8 and found["tokens"] == 0.25 and found["times"] == kls[0] / kls[1]
    assert found["kl"] == pytest.approx(10 * kls[0] / (10 * kls[0] + 30 * kls[1]))
    result = made()
    result["behaviour"]["by_position"] = [one | {"margin_part": 0.0} for one in bins]
    assert how in summary(result)["Shallow?"]
    assert beginning({"by_position": bins[:1]}) is None and beginning(None) is None


def test_it_shows_what_was_found(drawn):
    result = made()
    text = page(result)
    for section in SECTIONS:
        assert f'<section id="{section}"' in text and f'href="#{section}"' in text
    assert text.count('class="is"') == len(PARTS) and text.count("<svg") == 9
    said = words(text)
    for one in summary(result).values():
        assert one in said
    for group in result["neurons"]["groups"]:
        assert f"{group['name']} {group['paper']} point towards" in said
    assert "they differ by 2.0e-13" in said and "correlation −0.61" in said
    assert "the effect: after less before" in said and "not told" in said
    assert said.count("(3 seeds)") == 2 and "±" in said
    assert "var(--train)" in text and "#0072b2" not in text.split("</style>")[-1]


def test_it_loads_and_runs_nothing():
    text = page(made())
    assert "default-src 'none'" in text and "<script" not in text
    assert not re.search(r"""(src|href)\s*=\s*["'](?!#|data:,)""", text) and "url(http" not in text


@pytest.mark.parametrize("part", PARTS)
def test_without_a_part(part):
    text = page(made(part))
    gone = {"where", "neurons", "causes"} if part == "direction" else set()
    for section in SECTIONS:
        assert (f'<section id="{section}"' in text) == (section not in gone)
    assert text.count('class="empty"') == 1
    show(made(part), Console(quiet=True))


def test_without_any_part():
    result = made(*PARTS, "settings", "versions", "seconds", "data", "notes")
    assert summary(result) == {} and words(page(result)).count(" not ") >= 2
    show(result, Console(quiet=True))


@pytest.mark.parametrize("part", ["weights", "where", "neurons", "causes"])
def test_why_a_part_is_not_there(part):
    result = made(**{part: {"reason": "experts <b>: not looked at"}})
    assert "experts <b>: not looked at" in words(page(result))
    show(result, Console(quiet=True))


def test_parts_may_lack_numbers():
    result = made()
    result["weights"] |= {"changed": None, "kind": "lora"}
    for module in result["weights"]["modules"]:
        module["changed"] = None
    result["direction"] |= {"interval": None, "length_correlation": None}
    result["behaviour"] |= {"by_position": [], "tokens": []}
    result["behaviour"]["numbers"]["perplexity/after"] = {"value": None, "error": None}
    result["causes"]["columns"].remove("score")
    for row in result["causes"]["rows"]:
        del row["score"]
    said = words(page(result))
    assert "was not merged" in said and "perplexity of chosen, after no number" in said
    assert "entries differ at all" not in said and "Share of the effect: score" not in said


def test_it_stops_where_no_direction_was_found():
    said = words(page(no_direction()))
    assert said.count("No direction found") == 2 and "Neurons" not in said and "nothing is told" in said
    assert list(summary(no_direction())) == ["Weights", "Behaviour", "Shallow?", "Direction"]
    forced = words(page(no_direction(forced=True)))
    assert "looks along it all the same" in forced and "Neurons" in forced


def test_nothing_changed():
    result = nothing_changed()
    text = page(result)
    assert list(summary(result)) == ["Nothing changed"] and "<svg" not in text
    said = words(text)
    assert "gross 0, raised 0" in said and "they differ by 0.0e+00" in said and 'class="share"' not in text
    assert "768 that did not change are in none" in said


def test_hostile_text_stays_text(drawn):
    bad = copy.deepcopy(made())
    bad["names"] = dict.fromkeys(bad["names"], HOSTILE)
    bad["notes"], bad["settings"]["data"], bad["versions"][HOSTILE] = [HOSTILE], HOSTILE, HOSTILE
    bad["data"]["source"] = bad["direction"]["space"] = HOSTILE
    bad["weights"]["modules"][0] |= {"name": HOSTILE, "kind": HOSTILE, "relative": 1.0}
    bad["neurons"]["top"]["RP-"][0]["tokens"] = ["<script>", "</td>", "{{ 7 * 7 }}", "\ud800"]
    bad["causes"]["rows"][1]["name"] = HOSTILE
    bad["causes"]["columns"][0] = HOSTILE
    text = page(bad)
    assert "<script" not in text and "<img" not in text and "49 }}" not in text
    text.encode()  # no lone surrogate
    assert text.count("&lt;script&gt;alert(&#39;x&#39;)") >= 8 and "&lt;script&gt;</code>" in text


def test_tokens_can_be_seen():
    seen = {" I": "·I", "\n": "\\n", "\u202e": "\\u202e", "": "(empty)", "\x1b[31m": "\\x1b[31m", "é": "é"}
    assert {token: spelt(token) for token in seen} == seen
    assert spelt("x" * 99) == "x" * 24 + "…"


def test_modules_are_told_apart():
    names = ["h.0.attn.c_proj", "h.0.mlp.c_proj", "h.0.mlp.c_fc", "wte", "h.0.mlp.experts.3.up_proj"]
    modules = [{"name": name, "kind": name.split(".")[-1]} for name in names]
    assert kind_names(modules) == ["attn.c_proj", "mlp.c_proj", "c_fc", "wte", "up_proj"]


def test_the_map_has_a_row_each_kind(monkeypatch):
    seen = []
    monkeypatch.setattr(plots, "weights_map", lambda *given: seen.append(given))
    result = made()
    modules = result["weights"]["modules"]
    page(result)
    (kinds, layers, relative), *_ = seen
    assert layers == list(range(LAYERS)) and relative.shape == (7, LAYERS)
    at = next(one for one in modules if one["name"] == "layers.3.mlp.down_proj")
    assert relative[kinds.index("down_proj"), 3] == pytest.approx(at["relative"])
    assert "input_layernorm" not in kinds


@pytest.mark.parametrize("relative", [np.zeros((2, 3)), np.full((2, 3), np.nan)])
def test_a_map_of_nothing_is_not_drawn(relative):
    assert plots.weights_map(["q", "k"], [0, 1, 2], relative) is None


def test_the_console_is_short():
    console = Console(width=150, record=True, file=io.StringIO())
    result = made()
    result["causes"]["rows"][1]["name"] = "[red]the first[/]\x1b[31m"
    show(result, console)
    text = console.export_text()
    assert "[red]the first[/]\\x1b[31m" in text and "\x1b[31m" not in text
    said = " ".join(text.split())
    assert f"{told_share(result, 'all four, token')} of the effect on the margin" in said
    assert "share of the effect" in said
    assert "perplexity" not in text  # its effect is not told
    assert text.count("\n") < 70


@pytest.mark.skipif(BROWSER is None, reason="no chromium, chromium-browser or google-chrome")
@pytest.mark.parametrize("size, dark", [("1400,2400", False), ("500,3000", True)])
def test_in_a_browser(drawn, tmp_path, size, dark):
    (tmp_path / "explain.html").write_text(page(made()))
    dom = looked_at(tmp_path / "explain.html", size, dark)
    for section in SECTIONS:
        assert f'<section id="{section}"' in dom
