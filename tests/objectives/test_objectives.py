"""Objectives by name: what is made of a config, what is refused, how a step may be cut."""

import io
import math
from dataclasses import replace

import pytest
import torch
from rich.console import Console

from fastdpo.config.keys import Config
from fastdpo.data.packing import pack
from fastdpo.errors import ConfigError
from fastdpo.objectives import dpo, make, objectives_table, table
from fastdpo.objectives.catalogue import CATALOGUE, NAMES, options_of, rows
from fastdpo.objectives.make import same_objective
from fastdpo.objectives.names import SAME, spelled
from fastdpo.objectives.seam import Coupled, Decomposable, Rescaled
from fastdpo.objectives.tokens import transformed
from fastdpo.records import ResponseLogps
from fastdpo.training.job import objective_of, resolve
from fastdpo.training.metrics import Sums, add_pair_metrics
from tests.objectives.losses import of_sums, random_logps
from tests.tiny import group, groups


def config(**values):
    return Config(model="m", data="d", **values)


def defaults(name):
    return {option: found.default for option, found in options_of(name).items()}


def test_dpo_by_hand():
    """One pair, h = 1.5, beta = 0.1: -log sigmoid(0.15) and its gradient -beta * sigmoid(-0.15)."""
    logps, token_logp = of_sums([-12.0], [-14.0], [-13.0], [-13.5])
    loss = make("sigmoid").whole(logps)
    assert float(loss.detach()) == pytest.approx(math.log1p(math.exp(-0.15)), abs=1e-12)
    loss.backward()
    g = 0.1 / (1 + math.exp(0.15))
    torch.testing.assert_close(
        token_logp.grad, torch.tensor([-g, -g, g, g], dtype=torch.float64), rtol=1e-12, atol=0
    )


def test_weight_scales():
    logps, _ = random_logps()
    objective = make("sigmoid")
    doubled = objective.whole(replace(logps, weight=2 * logps.weight))
    torch.testing.assert_close(doubled, 2 * objective.whole(logps))


def test_response_sums_are_accurate():
    batch = pack([group(0, 2, [3000, 1500])])
    logp = -100 * torch.rand(len(batch.target))
    logps = ResponseLogps.of(batch, logp)
    bound = int(batch.cu_resp[1])
    truth = torch.stack([logp[:bound].double().sum(), logp[bound:].double().sum()])
    torch.testing.assert_close(logps.logp, truth.float(), rtol=1e-7, atol=0)
    assert logps.lengths.tolist() == batch.cu_resp.diff().tolist()


def test_sft_scores_the_chosen_tokens_only():
    objective = objective_of(config(objective="sft"))
    selected = objective.select(groups())
    assert [len(g.responses) for g in selected] == [1] * 5  # the others are not even computed
    batch = pack(selected)
    logp = -torch.rand(len(batch.target))
    torch.testing.assert_close(objective.whole(ResponseLogps.of(batch, logp)), -logp.mean())
    assert objective.counts(selected) == [len(batch.target)]


@pytest.mark.parametrize("name", [n for n in NAMES if isinstance(make(n), Decomposable)])
def test_any_cut_of_a_step_gives_the_same_sum(name):
    objective = make(name)
    selected = objective.select(scored_groups())
    counts = objective.counts(selected)

    def total(parts):
        return sum(float(objective.part(logps_of(part), counts)) for part in parts)

    whole = float(objective.whole(logps_of(selected)))
    assert total([[g] for g in selected]) == pytest.approx(whole, rel=1e-9)
    assert total([selected[:2], selected[2:]]) == pytest.approx(whole, rel=1e-9)


def scored_groups():
    """groups() that have pairs, with scores that fall along every pair."""
    out = []
    for some in groups():
        if some.pairs:
            n = len(some.responses)
            responses = tuple(replace(r, score=5.0 - 4 * i / n) for i, r in enumerate(some.responses))
            out.append(replace(some, responses=responses))
    return out


def logps_of(part):
    batch = pack(part)
    seeds = batch.target.double().sin()
    stats = {"log_sum_sq_probs": -seeds.abs() - 1}
    logps = ResponseLogps.of(batch, -seeds.abs(), seeds.cos(), stats)
    return replace(logps, context={"z0": torch.tensor(0.1)})


@pytest.mark.parametrize("name", NAMES)
def test_a_config_makes_every_objective_with_its_defaults(name):
    logps, _ = random_logps(graph=True)
    made, by_name = objective_of(config(objective=name)), make(name)
    assert made.name == name
    assert torch.equal(made.whole(logps), by_name.whole(logps))
    assert made.needs_reference == (name not in ("simpo", "cpo", "orpo", "slic", "sft"))
    assert made.mismatched == (name == "kto") and made.only_chosen == (name == "sft")
    if made.reward is None:
        assert name == "sft"
    else:
        assert made.reward(logps).shape == logps.score.shape
    if name in CATALOGUE:
        assert made.beta == defaults(name).get("beta")


@pytest.mark.parametrize("name", CATALOGUE)
def test_every_option_is_read(name):
    """Moved from its default, each option changes the loss (or which loss is taken of the step)."""
    moved = {
        "f_divergence_type": "js_divergence",
        "scaling": "linear",
        "base_loss": "ipo",
        "scope": 3,
        "use_weighting": True,
        "clamp_weights": not defaults(name).get("clamp_weights"),
        "ld_alpha": 0.3,
        "gamma": 0.4,
        "label_smoothing": 0.3,
    }
    along = {"f_alpha_divergence_coef": {"f_divergence_type": "alpha_divergence"}}
    along |= {"clamp_weights": {"use_weighting": True}} if name != "wpo" else {}
    logps, _ = random_logps(spread=0.3, graph=True)
    clampable = {"log_sum_sq_probs": 3 * logps.token_stats["log_sum_sq_probs"] - 2}
    logps = replace(logps, token_stats=clampable)
    for option, default in defaults(name).items():
        given = along.get(option, {})
        value = moved.get(option, 0.6 * default if isinstance(default, float) else None)
        before, after = make(name, **given), make(name, **{option: value, **given})
        if option == "scope":
            assert isinstance(before, Rescaled) and isinstance(after, Coupled) and after.within == 3
        else:
            assert abs(before.whole(logps) - after.whole(logps)) > 1e-9, option


def test_kinds():
    assert isinstance(make("drdpo"), Rescaled) and isinstance(make("aot"), Coupled)
    assert make("drdpo", beta_prime=0.3).temperature == 0.3
    assert make("bco").remember is not None and make("aot").remember is None
    assert make("wpo").stats == make("ipo", use_weighting=True).stats == ("log_sum_sq_probs",)
    assert make("drdpo", use_weighting=True).stats == ("log_sum_sq_probs",)
    assert make("sigmoid").stats == ()


@pytest.mark.parametrize("name", ["sigmoid", "drdpo", "aot", {"sft": 1, "sigmoid": 2}], ids=str)
def test_rewards_are_of_the_tokens_as_the_loss_weighs_them(name):
    """As TRL's rewards/* and logps/* under ld_alpha: its log-probs are weighted from the start."""
    logps = random_logps()[0].detached()
    objective, sums = make(name, beta=0.3, gamma=0.4, ld_alpha=0.5), Sums()
    add_pair_metrics(sums, objective.seen(logps), objective.reward)
    seen = transformed(logps, gamma=0.4, ld_alpha=0.5)
    margin = 0.3 * (seen.log_ratio[seen.winner] - seen.log_ratio[seen.loser])
    assert sums.means()["rewards/margins"] == pytest.approx(float(margin.mean()), rel=1e-6)
    assert sums.means()["logps/chosen"] == pytest.approx(float(seen.logp[seen.winner].mean()), rel=1e-6)
    plain = 0.3 * (logps.log_ratio[logps.winner] - logps.log_ratio[logps.loser])
    assert abs(margin.mean() - plain.mean()) > 1e-3


def test_a_sum_of_decomposables_is_one():
    logps, _ = random_logps()
    objective = objective_of(config(objective=[{"sigmoid": 0.5}, "sft", {"cpo": 2}], beta=0.3))
    assert isinstance(objective, Decomposable)
    assert objective.name == "0.5 sigmoid + 1 sft + 2 cpo" and objective.beta == 0.3
    assert not objective.only_chosen and objective.needs_reference
    parts = [make("sigmoid", beta=0.3), make("sft"), make("cpo", beta=0.3)]
    want = sum(weight * part.whole(logps) for weight, part in zip((0.5, 1, 2), parts))
    torch.testing.assert_close(objective.whole(logps), want)


def test_weights_multiply_a_parts_own():
    logps, _ = random_logps()
    both = make({"cpo": 2, "sigmoid": 1}, cpo_alpha=0.3).whole(logps)
    want = 2 * make("cpo", cpo_alpha=0.3).whole(logps) + make("sigmoid").whole(logps)
    torch.testing.assert_close(both, want)


def test_a_sum_with_a_coupled_one_is_coupled():
    logps, _ = random_logps()
    objective = make({"drdpo": 0.5, "kto": 1, "bco": 0.1})
    assert isinstance(objective, Coupled) and objective.mismatched and objective.remember
    memory = objective.remember(logps.detached(), {})
    logps = replace(logps, context=logps.context | memory)
    want = sum(w * make(n).whole(logps) for n, w in (("drdpo", 0.5), ("kto", 1), ("bco", 0.1)))
    torch.testing.assert_close(objective.whole(logps), want)


def test_an_option_goes_to_all_that_read_it():
    logps, _ = random_logps()
    both = make({"odpo": 1, "sft": 0.5, "sigmoid": 1}, alpha=0.3, ld_alpha=0.5)
    want = make("odpo", alpha=0.3, ld_alpha=0.5).whole(logps) + make("sigmoid", ld_alpha=0.5).whole(logps)
    torch.testing.assert_close(both.whole(logps), want + 0.5 * make("sft").whole(logps))


def test_presets_are_their_parts():
    logps, _ = random_logps()
    mpo = make("mpo", beta=0.2)
    assert mpo.name == "mpo" and [term.weight for term in mpo.terms] == [0.8, 0.2, 1.0]
    more = make(["mpo", {"sigmoid": 0.2}], beta=0.2)
    torch.testing.assert_close(
        more.whole(logps), mpo.whole(logps) + 0.2 * make("sigmoid", beta=0.2).whole(logps)
    )


def test_numbers_may_be_text_as_yaml_reads_them():
    logps, _ = random_logps()
    by_text = objective_of(config(objective="odpo", objective_args={"alpha": "1e-3"}))
    assert torch.equal(by_text.whole(logps), make("odpo", alpha=1e-3).whole(logps))


def test_nothing_given_is_the_default():
    logps, _ = random_logps()
    assert torch.equal(make("sigmoid", beta=None, ld_alpha=None).whole(logps), dpo.sigmoid(logps).mean())


@pytest.mark.parametrize(
    ("name", "ours"),
    [
        *SAME.items(),
        ("DPO", "sigmoid"),
        ("SLiC-HF", "slic"),
        ("Dr. DPO", "drdpo"),
        ("R-DPO", "rdpo"),
        ("dpo positive", "dpop"),
        ("APO-zero", "apo_zero"),
        ("SimPO", "simpo"),
    ],
)
def test_other_names_make_the_same_objective(name, ours):
    assert make(name).name == ours
    assert same_objective(name, ours) and not same_objective(name, "ipo")
    assert same_objective({name: 0.8, "sft": 0.2}, {ours: 0.8, "sft": 0.2})
    assert not same_objective({name: 0.8, "sft": 0.2}, {ours: 0.7, "sft": 0.2})


def test_other_names_are_shown_and_lead_to_one_loss():
    assert make("drdpo", base_loss="DPO").name == "drdpo"
    assert all(ours in NAMES for ours in SAME.values()) and not SAME.keys() & set(NAMES)
    assert len({spelled(name) for name in (*NAMES, *SAME)}) == len(NAMES) + len(SAME)
    console = Console(file=io.StringIO(), width=200)
    table(console)
    assert "dpo is sigmoid, " in console.file.getvalue() and "dpo is sigmoid, " in objectives_table()


@pytest.mark.parametrize(
    "values, message",
    [
        (dict(objective="sigmod"), r"objective: 'sigmod' is not one of .* Did you mean 'sigmoid'\?"),
        (dict(objective="dpoo"), r"objective: 'dpoo' is not one of .* Did you mean 'dpo'\?"),
        (dict(objective="cDPO"), "objective: 'cDPO' is sigmoid with label_smoothing: 0.1"),
        (dict(objective="ld-dpo"), "objective: 'ld-dpo' is sigmoid with objective_args: {ld_alpha: 0.5}"),
        (dict(objective="rDPO"), "objective: 'rDPO' is said of two losses: robust .* and rdpo"),
        (dict(objective="rso"), "objective: 'rso' is hinge"),
        (dict(objective="tdpo"), "objective: 'tdpo' is a loss that fastdpo does not have"),
        (dict(objective="GRPO"), "objective: 'GRPO' is a loss that fastdpo does not have; rloo"),
        (dict(objective="nca"), r"Did you mean 'nca_pair'\?"),
        (dict(objective="exo"), r"Did you mean 'exo_pair'\?"),
        (dict(objective={"dpo": 1, "sigmoid": 1}), "sigmoid is given twice"),
        (dict(objective=[]), "neither a name nor names with weights"),
        (dict(objective={"sigmoid": 0}), "the weight of sigmoid: 0 is not above 0"),
        (dict(objective={"sigmoid": "much"}), "the weight of sigmoid: 'much' is not a number"),
        (dict(objective=["sigmoid", "sigmoid"]), "sigmoid is given twice"),
        (dict(objective="slic", beta=0.1), "beta: slic does not read it. It reads delta, slic_lambda"),
        (dict(objective="ipo", label_smoothing=0.1), "label_smoothing: ipo does not read it"),
        (dict(objective_args={"gama": 1}), r"sigmoid does not read 'gama'. Did you mean 'gamma'\? It reads"),
        (dict(objective={"ipo": 1, "sft": 1}, objective_args={"alpha": 1}), "none of ipo, sft reads 'alpha'"),
        (dict(objective="aot", objective_args={"use_weighting": True}), "aot does not read 'use_weighting'"),
        (dict(objective="nca_pair", objective_args={"f_divergence_type": "forward_kl"}), "nca_pair does not"),
        (dict(objective_args={"ld_alpha": 1.5}), r"ld_alpha: 1.5 is not in \[0, 1\]"),
        (dict(objective_args={"gamma": True}), "gamma: True is not a number"),
        (dict(objective_args={"use_weighting": 1}), "use_weighting: 1 is neither true nor false"),
        (dict(objective_args={"clamp_weights": True}), "clamp_weights is read only with use_weighting: true"),
        (dict(objective_args={"f_divergence_type": "kl"}), "'kl' is not one of reverse_kl"),
        (
            dict(objective_args={"f_alpha_divergence_coef": 0.3}),
            "read only with f_divergence_type: alpha_div",
        ),
        (dict(beta=0.0), "beta: 0.0 is not above 0"),
        (dict(beta=0.1, objective_args={"beta": 0.2}), "beta: given twice"),
        (dict(objective="exo_pair", label_smoothing=0.0), "exo_pair needs it above 0"),
        (dict(objective="odpo", objective_args={"scaling": "square"}), "'square' is not one of log, linear"),
        (dict(objective="drdpo", objective_args={"base_loss": "aot"}), "base_loss: 'aot' is not one of sig"),
        (
            dict(objective="drdpo", objective_args={"base_loss": ["ipo"]}),
            r"base_loss: \['ipo'\] is not one of",
        ),
        (dict(objective="drdpo", objective_args={"scope": 0}), "scope: 0 is neither batch nor a number"),
        (dict(objective="drdpo", objective_args={"beta_prime": 0}), "beta_prime: 0 is not above 0"),
        (
            dict(objective={"drdpo": 1, "sft": 1}, objective_args={"scope": 4}),
            "scope: a number of groups need",
        ),
        (dict(objective="sigmoid", objective_args={"beta_prime": 1}), "sigmoid does not read 'beta_prime'"),
    ],
)
def test_bad_options(values, message):
    with pytest.raises(ConfigError, match=message):
        objective_of(config(**values))


@pytest.mark.parametrize(
    "objective", ["rloo", {"rloo": 1.0, "sft": 0.1}, ["sigmoid", {"rloo": 0.5}]], ids=str
)
def test_rloo_trains_on_samples_alone(objective):
    rounds = dict(objective=objective, rounds=2, reward="length")
    assert resolve(config(**rounds)).config.rounds == 2
    with pytest.raises(
        ConfigError, match=r"^objective: .*rloo.* trains on the policy's own samples; set rounds"
    ):
        resolve(config(objective=objective))
    with pytest.raises(
        ConfigError, match=r"^eval_data: .*rloo.* has a loss of the policy's own samples alone"
    ):
        resolve(config(eval_data="e", **rounds))
    assert resolve(
        config(eval_data="e", rounds=2, reward="length")
    )  # the held-out loss of pairs says something


def test_the_names_of_others_lead_to_rounds():
    for name in ("DR-PO", "online-dpo"):
        with pytest.raises(ConfigError, match=f"^objective: '{name}' is (rloo|sigmoid) with rounds"):
            make(name)


def test_token_options_need_the_reference_a_token():
    assert "per-token reference" in make("rloo").needs
    assert "per-token reference" not in make("rloo", clip=0).needs
    assert "per-token reference" in make("sigmoid", gamma=0.5).needs
    assert "per-token reference" in make("aot", ld_alpha=0.5).needs
    assert "per-token reference" in make("drdpo", ld_alpha=0.5).needs
    assert "per-token reference" not in make("ipo").needs


def test_a_name_is_its_function():
    for name, entry in CATALOGUE.items():
        assert entry.losses.__name__ == name and entry.losses.__doc__


def test_the_tables_name_every_objective_and_option():
    text = objectives_table()
    console = Console(width=200, record=True, file=io.StringIO())
    table(console)
    shown = console.export_text()
    for name in NAMES:
        assert f"| `{name}` |" in text and name in shown
    for name in CATALOGUE:
        for option in options_of(name):
            assert option in text and option in shown, option
    assert len(rows()) == len(NAMES) == text.count("\n| `")
