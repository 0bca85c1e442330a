"""Every loss against the research vectors (fp64, their gradients checked by central differences)."""

import json
from dataclasses import replace

import pytest
import torch

from fastdpo.objectives import batch, dpo, make, reference_free, shifted, tokens
from fastdpo.objectives.catalogue import CATALOGUE
from tests.data.shared_data import SHARED, needs_shared
from tests.objectives.losses import of_sums, of_tokens

pytestmark = needs_shared
TOLERANCE = dict(rtol=1e-11, atol=1e-9)  # the vectors have 12 digits


def mpo(logps):
    two = 0.8 * dpo.sigmoid(logps, beta=0.1) + 0.2 * dpo.bco_pair(logps, beta=0.1)
    return two + reference_free.nll_per_token(logps)


def cpo(logps, beta, cpo_alpha):
    return reference_free.cpo(logps, beta=beta) + cpo_alpha * reference_free.nll_per_token(logps)


def with_delta(logps, delta):
    return batch.bco(replace(logps, context={"sum": 3 * delta, "count": 3}), beta=0.1).view(2, -1).sum(0)


def kto(logps, z0):
    return batch.kto(replace(logps, context={"z0": torch.tensor(z0, dtype=torch.float64)}), beta=0.1)


LOSSES = {
    "dpo_beta0.1": (dpo.sigmoid, dict(beta=0.1)),
    "dpo_beta0.5": (dpo.sigmoid, dict(beta=0.5)),
    "cdpo_beta0.1_eps0.1": (dpo.sigmoid, dict(beta=0.1, label_smoothing=0.1)),
    "robust_beta0.1_eps0.1": (dpo.robust, dict(beta=0.1, label_smoothing=0.1)),
    "ipo_sum_beta0.1": (dpo.ipo_sum, dict(beta=0.1)),
    "ipo_avg_beta0.1": (dpo.ipo, dict(beta=0.1)),
    "hinge_beta0.5": (dpo.hinge, dict(beta=0.5)),
    "slic_delta1_lambda0.1_logp": (reference_free.slic, dict(delta=1, slic_lambda=0.1)),
    "reference_free_dpo_beta0.1": (reference_free.cpo, dict(beta=0.1)),
    "odpo_log_beta0.5_alpha1.0": (shifted.odpo, dict(beta=0.5)),
    "odpo_log_beta0.5_alpha0.5": (shifted.odpo, dict(beta=0.5, alpha=0.5)),
    "odpo_linear_beta0.5_alpha1": (shifted.odpo, dict(beta=0.5, scaling="linear")),
    "odpo_logdiff_beta0.5_alpha1": (shifted.odpo, dict(beta=0.5, scaling="log_difference")),
    "simpo_beta2_gamma1": (reference_free.simpo, dict(beta=2.0, simpo_gamma=1.0)),
    "orpo_lambda0.1_response_nll": (reference_free.orpo, dict(beta=0.1)),
    "cpo_beta0.1_alpha1": (cpo, dict(beta=0.1, cpo_alpha=1.0)),
    "bco_pair_beta0.1_delta0": (dpo.bco_pair, dict(beta=0.1)),
    "bco_beta0.1_delta0.05": (with_delta, dict(delta=0.05)),
    "apo_zero_beta0.1": (dpo.apo_zero, dict(beta=0.1)),
    "apo_down_beta0.1": (dpo.apo_down, dict(beta=0.1)),
    "exo_pair_beta0.1_eps0.01": (dpo.exo_pair, dict(beta=0.1, label_smoothing=0.01)),
    "nca_pair_beta0.1": (dpo.nca_pair, dict(beta=0.1)),
    "sppo_hard_beta0.1": (dpo.sppo_hard, dict(beta=0.1)),
    "discopop_beta0.05_tau0.05": (dpo.discopop, dict(beta=0.05, discopop_tau=0.05)),
    "aot_beta0.1": (batch.aot, dict(beta=0.1)),
    "aot_unpaired_beta0.1": (batch.aot_unpaired, dict(beta=0.1)),
    "dpop_beta0.1_lambda5": (shifted.dpop, dict(beta=0.1, dpop_lambda=5.0)),
    "rdpo_length_beta0.1_alpha0.01": (shifted.rdpo, dict(beta=0.1, length_alpha=0.01)),
    "sigmoid_norm_beta5": (dpo.sigmoid_norm, dict(beta=5.0)),
    "rpo_nll_beta0.1_alpha1": (shifted.rpo, dict(beta=0.1, rpo_alpha=1.0)),
    "reward_aware_rpo_beta0.5_eta1": (shifted.reward_rpo, dict(beta=0.5, eta=1.0)),
    "fdpo_forward_kl_beta0.1": (dpo.sigmoid, dict(beta=0.1, f_divergence_type="forward_kl")),
    "fdpo_js_beta0.1": (dpo.sigmoid, dict(beta=0.1, f_divergence_type="js_divergence")),
    "fdpo_alpha0.5_beta0.1": (
        dpo.sigmoid,
        dict(beta=0.1, f_divergence_type="alpha_divergence", f_alpha_divergence_coef=1 - 0.5),
    ),
    "kto_beta0.1_z0.3": (kto, dict(z0=0.3)),
    "mpo_beta0.1": (mpo, {}),
}
DRDPO = {f"drdpo_beta0.5_bp{text}": float(text) for text in ("1", "0.5", "0.1", "10000")}
SIDES = ["policy_chosen", "policy_rejected", "reference_chosen", "reference_rejected"]


def vectors():
    return json.loads((SHARED / "research/vectors.json").read_text())


def double(values):
    return torch.tensor(values, dtype=torch.float64)


def sequence_inputs(found):
    inputs, scores = found["sequence_inputs"], found["odpo_scores"]
    return of_sums(
        *(inputs[f"{side}_logps"] for side in SIDES),
        inputs["chosen_lengths"],
        inputs["rejected_lengths"],
        score=double([*scores["chosen"], *scores["rejected"]]),
    )


def check_gradient(logps, token_logp, want):
    """Each token of a response has the gradient of the response's sum."""
    expected = double([*want["grad_policy_chosen_logps"], *want["grad_policy_rejected_logps"]])
    torch.testing.assert_close(token_logp.grad, logps.per_token(expected), **TOLERANCE)


@pytest.mark.parametrize("name", LOSSES)
def test_loss_and_gradient(name):
    found = vectors()
    want, (losses, options) = found["sequence_losses"][name], LOSSES[name]
    logps, token_logp = sequence_inputs(found)
    got = losses(logps, **options)
    assert got.dtype == torch.float64
    torch.testing.assert_close(got, double(want["per_pair_losses"]), **TOLERANCE)
    torch.testing.assert_close(got.mean(), double(want["loss"]), **TOLERANCE)
    got.mean().backward()
    check_gradient(logps, token_logp, want)


@pytest.mark.parametrize("name", DRDPO)
def test_drdpo(name):
    found = vectors()
    want = found["sequence_losses"][name]
    objective = make("drdpo", beta=0.5, beta_prime=DRDPO[name])
    logps, token_logp = sequence_inputs(found)
    torch.testing.assert_close(objective.term.losses(logps), double(want["per_pair_losses"]), **TOLERANCE)
    loss = objective.whole(logps)
    torch.testing.assert_close(loss, double(want["loss"]), **TOLERANCE)
    again = batch.drdpo(objective.term.losses(logps), logps.weight, beta_prime=DRDPO[name])
    torch.testing.assert_close(again, loss, **TOLERANCE)
    loss.backward()
    check_gradient(logps, token_logp, want)


def test_no_vector_is_left_out():
    assert vectors()["sequence_losses"].keys() == LOSSES.keys() | DRDPO.keys()


def test_no_loss_is_without_values():
    """Each has vectors, or is named here: Dr. DPO and WPO have theirs below, the others are compared with
    TRL's code (test_trl_losses.py) or, BCO, with bco_pair (test_losses_limits.py); RLOO in test_rloo.py."""
    elsewhere = {"drdpo", "wpo", "kto", "apo_zero_unpaired", "bco", "sft", "rloo"}
    with_vectors = {loss for loss, _ in LOSSES.values()}
    assert {name for name, entry in CATALOGUE.items() if entry.losses not in with_vectors} == elsewhere


def test_drdpo_of_microbatches_is_the_authors_form():
    """Their code averages the formula over microbatches; over the batch the value is lower (Jensen)."""
    want = vectors()["drdpo_accumulation"]
    losses = double(want["per_pair_losses"])
    assert float(batch.drdpo(losses, torch.ones(4))) == pytest.approx(want["full_batch_loss"], abs=1e-9)
    parts = [float(batch.drdpo(part, torch.ones(2))) for part in losses.split(2)]
    assert parts == pytest.approx(want["microbatches_of_2"], abs=1e-9)
    assert sum(parts) / 2 == pytest.approx(want["author_code_accumulated_loss"], abs=1e-9)
    assert make("drdpo", scope=2).within == 2


def test_drdpo_weights_of_the_papers_toy():
    want = vectors()["drdpo_paper_toy"]
    losses = (-double(want["h"])).requires_grad_()  # the toy's loss is -h
    batch.drdpo(losses, torch.ones(2), beta_prime=want["beta_prime"]).backward()
    torch.testing.assert_close(2 * losses.grad, double(want["weights"]), **TOLERANCE)


def token_inputs(found):
    """(ResponseLogps, the policy's logits) of the token-level vectors, winners first."""
    inputs = found["token_inputs"]
    labels = torch.tensor(inputs["labels"])[:, 1:]
    scored = labels != -100

    def per_token(logits):
        scores = logits[:, :-1].log_softmax(-1)
        picked = scores.gather(2, labels.clamp(min=0)[..., None])[..., 0]
        return picked[scored], (2 * scores).logsumexp(-1)[scored].detach()

    logits = double(inputs["policy_logits"]).requires_grad_()
    token_logp, log_sum_sq = per_token(logits)
    ref, _ = per_token(double(inputs["reference_logits"]))
    relevant = double(found["weighted_dpo_radiology"]["relevant_mask_on_shifted_labels"])[scored]
    stats = {"log_sum_sq_probs": log_sum_sq}
    logps = of_tokens(scored.sum(1).tolist(), token_logp, ref, token_weight=relevant, token_stats=stats)
    return logps, logits


def check_token_case(objective, loss, gradient=None):
    logps, logits = token_inputs(vectors())
    got = objective.whole(logps)
    torch.testing.assert_close(got, double(loss), **TOLERANCE)
    got.backward()
    if gradient is not None:
        torch.testing.assert_close(logits.grad, double(gradient), **TOLERANCE)


def test_token_dpo():
    want = vectors()["token_dpo_beta0.5"]
    check_token_case(make("sigmoid", beta=0.5), want["loss"], want["grad_policy_logits"])


@pytest.mark.parametrize("gamma", [1.0, 0.5, 0.0])
def test_weighted_dpo(gamma):
    found = vectors()
    want = found["weighted_dpo_radiology"]["cases"][f"gamma{gamma}"]
    check_token_case(make("sigmoid", gamma=gamma), want["loss"], want["grad_policy_logits"])
    logps, _ = token_inputs(found)
    weighted = tokens.relevance_weighted(logps, gamma)
    torch.testing.assert_close(weighted.logp.detach(), double(want["weighted_logps_policy"]), **TOLERANCE)
    torch.testing.assert_close(weighted.ref_logp, double(want["weighted_logps_reference"]), **TOLERANCE)


def test_ld_dpo():
    want = vectors()["ld_dpo"]
    check_token_case(make("sigmoid", beta=want["beta"], ld_alpha=want["alpha"]), want["loss"])
    check_token_case(make("sigmoid", beta=want["beta"], ld_alpha=1), want["loss_alpha1"])


def test_wpo():
    found = vectors()
    want = found["wpo"]
    check_token_case(make("wpo"), want["loss_official_beta0_1"])
    logps, _ = token_inputs(found)
    got = tokens.on_policy_weight(logps)
    torch.testing.assert_close(got, double(want["pair_weight_unclamped"]), **TOLERANCE)
    assert not got.requires_grad


@pytest.mark.parametrize("clamp, key", [(False, "pair_weight_trl"), (True, "pair_weight_official")])
def test_wpo_clamp(clamp, key):
    """A response likelier than the policy's own average gives a weight above 1, unless clamped."""
    want = vectors()["wpo_clamp_case"]
    probs = double(want["probs"])
    token_logp = probs[[want["chosen_token"], want["rejected_token"]]].log()
    stats = {"log_sum_sq_probs": probs.square().sum().log().expand(2)}
    logps = of_tokens([1, 1], token_logp, token_logp, token_stats=stats)
    got = tokens.on_policy_weight(logps, clamp_weights=clamp)
    torch.testing.assert_close(got, double([want[key]]), **TOLERANCE)


def test_rewards_are_the_metrics_of_the_vectors():
    found = vectors()
    logps, _ = sequence_inputs(found)
    want = found["metrics_beta0.1"]
    rewards = make("sigmoid", beta=0.1).reward(logps).detach()
    torch.testing.assert_close(rewards, double([*want["rewards_chosen"], *want["rewards_rejected"]]))
