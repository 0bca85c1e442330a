"""Sign classes, sums and shares of neurons against the papers' numbers, and the two parts of a change."""

import json
from dataclasses import fields, replace
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from fastdpo.errors import ConfigError, ModelError
from fastdpo.explanation.attribute import (
    Table,
    Written,
    by_layer,
    class_names,
    classes,
    concentration,
    grouped,
    joined,
    of_layer,
    summary,
    to_parquet,
    top,
)
from tests.data.shared_data import SHARED, needs_shared

LOWERING = ["TP-", "TN+", "AP+", "AN-"]


def table(before, after, q_before, q_after=None, layer=None) -> Table:
    before, q_before = np.array(before, float), np.array(q_before, float)
    columns = {field.name: np.zeros(len(before)) for field in fields(Table)}
    columns |= dict(before=before, after=np.array(after, float), q_before=q_before, cos=q_before / 4)
    columns |= dict(q_after=q_before if q_after is None else np.array(q_after, float))
    columns |= dict(neuron=np.arange(len(before)))
    return Table(**columns | dict(layer=np.array(layer or [0] * len(before))))


def eight() -> Table:
    """The research note's vector."""
    before, after = (0.5, -0.2, 0.1, -0.4, 0.3, -0.1, 0, 0.2), (0.3, -0.3, 0.2, -0.1, 0.4, 0.1, -0.2, 0.2)
    return table(before, after, (1, 0.5, -2, -1, 0.25, -0.5, 1, -1), layer=[0, 0, 0, 0, 1, 1, 1, 1])


def random(n=2000, seed=0) -> Table:
    """Value vectors change, too."""
    draw = np.random.default_rng(seed).standard_normal
    m, q = draw(n), draw(n)
    return table(m, m + 0.3 * draw(n), q, q + 0.1 * draw(n))


def of(groups, key):
    return {group["name"]: group[key] for group in groups}


# ---- vectors


def test_the_note_s_eight_neurons():
    rows = eight()
    expected = [0.2, 0.05, 0.2, 0.3, -0.025, 0.1, 0.2, 0]
    np.testing.assert_allclose(rows.reduction("down"), expected, atol=1e-15)
    names = np.array([*class_names("down"), "still"])
    assert names[classes(rows, "down", "v1")].tolist() == [*LOWERING, "TP+", "AN-", "TP-", "still"]
    groups = grouped(rows, "down", "v1")
    assert of(groups, "count") == {
        "TP-": 2,
        "TN+": 1,
        "AP+": 1,
        "AN-": 2,
        "TP+": 1,
        "TN-": 0,
        "AP-": 0,
        "AN+": 0,
    }
    assert list(of(groups, "sum").values()) == pytest.approx([0.4, 0.05, 0.2, 0.4, -0.025, 0, 0, 0])
    shares = [0.4 / 1.05, 0.05 / 1.05, 0.2 / 1.05, 0.4 / 1.05, 1, 0, 0, 0]
    assert list(of(groups, "share").values()) == pytest.approx(shares)
    told = summary(rows, "down", "v1", bias=0.5)
    totals = {key: told[key] for key in ("gross", "raised", "net", "activation", "value", "bias")}
    assert totals == pytest.approx(
        dict(gross=1.05, raised=-0.025, net=1.025, activation=1.025, value=0, bias=0.5)
    )
    assert (told["neurons"], told["still"]) == (8, 1)
    # .3 .2 .2 .2 .1 .05: half of 1.05 is more than .5
    assert told["concentration"] == [
        dict(share=0.5, neurons=3),
        dict(share=0.75, neurons=4),
        dict(share=0.99, neurons=6),
    ]
    lowered = [(one["lowered"], one["raised"]) for one in told["by_layer"]]
    assert lowered == [pytest.approx((0.75, 0)), pytest.approx((0.3, -0.025))]


@needs_shared
@pytest.mark.parametrize("definition", ["v1", "v3"])
def test_the_papers_groups(definition):
    vector = json.loads((SHARED / "research/vectors.json").read_text())["toxicity_neuron_groups"]
    cos, norm = np.array(vector["cosine_with_probe"]), np.array(vector["value_vector_norm"])
    rows = table(vector["pre_activation"], vector["post_activation"], cos * norm)
    np.testing.assert_allclose(rows.before * rows.q_before, vector["projection_pre"], atol=1e-12)
    np.testing.assert_allclose(rows.after * rows.q_after, vector["projection_post"], atol=1e-12)
    np.testing.assert_allclose(rows.reduction("down"), vector["projection_reduction"], atol=1e-12)
    assert summary(rows, "down", definition)["net"] == pytest.approx(vector["total_net_reduction"])
    names, number = class_names("down")[:4], classes(rows, "down", definition)
    lowering = [names[i] if i < 4 else None for i in number]
    assert lowering == vector["group_v1"]  # the value vectors stand still: both definitions agree
    assert [name and f"{name[:2]}_down" for name in lowering] == vector["group_v3"]
    groups = grouped(rows, "down", definition)[:4]
    assert of(groups, "sum") == pytest.approx(vector["reduction_by_group"])
    assert of(groups, "share") == pytest.approx(vector["share_of_reducing_groups"])


@needs_shared
def test_the_published_share_is_of_the_gross_reduction():
    """One neuron a class, with its sum, and one for all that raise."""
    vector = json.loads((SHARED / "research/vectors.json").read_text())["toxicity_neuron_groups"]
    published = vector["published_gpt2_medium"]
    sums = [published["sums"][name] for name in LOWERING]
    before, along = np.array([1, -1, 1, -1, 1]), np.array([1, 1, -1, -1, 1])
    change = np.array([*sums, published["increasing_sum"]]) * -along
    told = summary(table(before, before + change, along), "down", "v1")
    assert of(told["groups"][:4], "share") == pytest.approx(published["share"])
    assert round(100 * told["groups"][0]["share"], 2) == 31.82
    assert told["gross"] == pytest.approx(47.4838, abs=1e-4)
    assert told["net"] == pytest.approx(7.2164, abs=1e-4)  # 16 % of the gross


# ---- identities


def test_the_two_parts_are_the_change_exactly():
    rows = random()
    parts = rows.activation_part + rows.value_part
    np.testing.assert_allclose(parts, rows.change, rtol=0, atol=1e-14)
    assert np.abs(rows.value_part).max() > 0.1
    told = summary(rows, "up", "v1")
    assert told["activation"] + told["value"] == pytest.approx(told["net"], abs=1e-10)
    assert told["gross"] + told["raised"] == pytest.approx(told["net"], abs=1e-10)
    assert sum(one["lowered"] for one in told["by_layer"]) == pytest.approx(told["gross"])
    for group in told["groups"]:
        assert group["activation"] + group["value"] == pytest.approx(group["sum"], abs=1e-10)


@pytest.mark.parametrize("towards", ["down", "up"])
def test_at_fixed_value_vectors_the_groups_are_the_neurons_that_lower(towards):
    rows = random()
    rows = replace(rows, q_after=rows.q_before)
    v1, v3 = (classes(rows, towards, definition) for definition in ("v1", "v3"))
    assert (v1 == v3).all()
    assert ((v1 < 4) == (rows.reduction(towards) > 0)).all()
    groups = grouped(rows, towards, "v1")
    assert sum(group["share"] for group in groups[:4]) == pytest.approx(1)
    assert sum(group["share"] for group in groups[4:]) == pytest.approx(1)
    assert all(group["against"] == 0 for group in groups)


def test_definitions_differ_where_value_vectors_move():
    rows = random()
    v1, v3 = (classes(rows, "down", definition) for definition in ("v1", "v3"))
    assert (v1 != v3).any() and (v1 % 4 == v3 % 4).all()  # the same signs; another side
    groups = grouped(rows, "down", "v1")
    assert all(group["against"] < 0 for group in groups[:4])
    assert all(group["against"] > 0 for group in groups[4:])
    gross = sum(group["sum"] - group["against"] for group in groups[:4])
    gross += sum(group["against"] for group in groups[4:])
    assert gross == pytest.approx(summary(rows, "down", "v1")["gross"])
    assert all(group["against"] == 0 for group in grouped(rows, "down", "v3"))
    shares = [group["share"] for group in grouped(rows, "down", "v3")]
    assert sum(shares[:4]) == pytest.approx(1) and sum(shares[4:]) == pytest.approx(1)


def test_up_is_down_of_the_opposite_direction():
    rows = random()
    mirrored = replace(rows, cos=-rows.cos, q_before=-rows.q_before, q_after=-rows.q_after)
    up, down = grouped(rows, "up", "v1"), grouped(mirrored, "down", "v1")
    assert [one["name"] for one in up] == ["RP-", "RN+", "CP+", "CN-", "RP+", "RN-", "CP-", "CN+"]
    assert [one["paper"] for one in up] == [one["name"] for one in down]
    assert [one | dict(name="") for one in up] == [one | dict(name="") for one in down]
    assert concentration(rows, "up") == concentration(mirrored, "down")
    assert concentration(rows, "up") != concentration(rows, "down")
    assert by_layer(rows, "up") == by_layer(mirrored, "down")
    toward = [one["toward"] for one in up]
    assert toward == ["T", "T", "A", "A"] * 2 and [one["lowers"] for one in up] == [True] * 4 + [False] * 4


def test_v3_is_named_as_the_paper_draws_it():
    assert [one["paper"] for one in grouped(eight(), "down", "v3")][::4] == ["TP↓", "TP↑"]


def test_nothing_changed_is_zeros_everywhere():
    rows = random()
    same = replace(rows, after=rows.before, q_after=rows.q_before)
    told = summary(same, "down", "v1")
    assert told["still"] == told["neurons"] == 2000
    assert [told[key] for key in ("gross", "raised", "net", "activation", "value")] == [0] * 5
    assert all((group["count"], group["sum"], group["share"]) == (0, 0, 0) for group in told["groups"])
    assert [one["neurons"] for one in told["concentration"]] == [0, 0, 0]
    assert not any(told["top"].values())
    json.dumps(told, allow_nan=False)


# ---- what is told of single ones


@pytest.mark.parametrize("towards", ["down", "up"])
def test_the_top_of_a_class_is_its_largest(towards):
    rows = random()
    found, reduction = top(rows, towards, "v1", n=5), rows.reduction(towards)
    of_each = classes(rows, towards, "v1")
    assert list(found) == class_names(towards)
    for number, mine in enumerate(found.values()):
        best = np.sort(reduction[of_each == number] * (1 if number < 4 else -1))[::-1][:5]
        picked = np.array([one["neuron"] for one in mine])
        np.testing.assert_array_equal(reduction[picked] * (1 if number < 4 else -1), best)
        assert all(one["change"] == rows.change[one["neuron"]] for one in mine)
        assert mine[0].keys() == {
            "layer",
            "neuron",
            "cos",
            "before",
            "after",
            "change",
            "firing_before",
            "firing_after",
            "tokens",
        }
    json.dumps(found, allow_nan=False)


def test_the_file_holds_every_neuron(tmp_path):
    rows = eight()
    to_parquet(rows, tmp_path / "neurons.parquet", "down", "v1")
    got = pq.read_table(tmp_path / "neurons.parquet").to_pydict()
    assert got["group"] == [*LOWERING, "TP+", "AN-", "TP-", "still"]
    assert got["layer"] == [0] * 4 + [1] * 4 and got["neuron"] == list(range(8))
    fell = np.array(got["projection_before"]) - np.array(got["projection_after"])
    np.testing.assert_allclose(fell, rows.reduction("down"), atol=1e-15)
    np.testing.assert_array_equal(got["activation_part"], rows.activation_part)
    np.testing.assert_array_equal(got["raw_after"], rows.raw_after)
    to_parquet(rows, tmp_path / "plain.parquet")
    assert "group" not in pq.read_table(tmp_path / "plain.parquet").column_names
    with pytest.raises(ConfigError, match=r"output: cannot write .*absent/n.parquet: .*; name another"):
        to_parquet(rows, tmp_path / "absent/n.parquet")


def means(n, seed):
    draw = torch.Generator().manual_seed(seed)
    names = ("mean", "through", "size", "firing")
    return SimpleNamespace(**{name: torch.randn(n, generator=draw, dtype=torch.float64) for name in names})


def test_a_layer_s_rows_sum_to_the_projection_of_its_output():
    draw = torch.Generator().manual_seed(0)
    v, w = (torch.randn(7, 5, generator=draw, dtype=torch.float64) for _ in range(2))
    v[3] = 0
    u = torch.randn(5, generator=draw, dtype=torch.float64)
    u /= u.norm()
    before, after = means(7, 1), means(7, 2)
    rows = of_layer(4, before, after, Written.of(v, u), Written.of(w, u))
    change = after.through @ w @ u - before.through @ v @ u
    assert rows.change.sum() == pytest.approx(float(change), abs=1e-12)
    assert set(rows.layer) == {4} and rows.cos[3] == 0
    expected = torch.nn.functional.cosine_similarity(v, u[None]).numpy()
    np.testing.assert_allclose(rows.cos, expected, atol=1e-12)
    columns = dict(raw_before=before.mean, raw_after=after.mean, size_before=before.size)
    columns |= dict(size_after=after.size, firing_before=before.firing, firing_after=after.firing)
    for name, values in columns.items():
        np.testing.assert_array_equal(getattr(rows, name), values.numpy(), err_msg=name)
    both = joined([rows, eight()])
    assert len(both) == 15 and both.layer.tolist() == [4] * 7 + [0] * 4 + [1] * 4
    assert both.change.sum() == pytest.approx(rows.change.sum() + eight().change.sum())


# ---- what is refused


def test_refused():
    rows = eight()
    with pytest.raises(ModelError, match=r"neurons: after of layer 1, neuron 5 is nan; check the model"):
        replace(rows, after=np.where(rows.neuron == 5, np.nan, rows.after))
    with pytest.raises(ModelError, match=r"the column after is of shape \(3,\), layer is of \(8,\)"):
        replace(rows, after=np.zeros(3))
    with pytest.raises(ConfigError, match="towards: 'left' is not one of down, up"):
        grouped(rows, "left", "v1")
    with pytest.raises(ConfigError, match="groups: 'v2' is not one of v1, v3"):
        grouped(rows, "down", "v2")
    wrote = Written.of(torch.ones(7, 5).double(), torch.ones(5).double())
    with pytest.raises(ModelError, match=r"the column after is of shape \(6,\), layer is of \(7,\)"):
        of_layer(2, means(7, 0), means(6, 0), wrote, wrote)
