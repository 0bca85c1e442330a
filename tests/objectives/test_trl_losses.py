"""Our losses and gradients against TRL's own loss code, called on random log-probs with the smallest stand-in
for its trainer."""

from collections import defaultdict
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from fastdpo.objectives import make, reference_free
from fastdpo.objectives.batch import kto_z0
from tests.objectives.losses import of_tokens

dpo_trainer = pytest.importorskip("trl.trainer.dpo_trainer", reason="needs trl")
kto_trainer = pytest.importorskip("trl.trainer.kto_trainer", reason="needs trl")

PAIRS, WIDTH = 5, 9
DIVERGENT = ("sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "robust", "discopop")
PLAIN = ("nca_pair", "bco_pair", "sppo_hard", "apo_zero", "apo_down", "aot", "aot_unpaired", "sft")
SMOOTHED = ("robust", "exo_pair", "aot", "aot_unpaired")
F_TYPES = ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence")


class Batch:
    """Random padded rows as TRL's collator makes them: winners then losers, prompts of 1 to 3 tokens, and
    log-probs that are 0 where nothing is scored, as its fused head gives them."""

    def __init__(self, seed=0, dtype=torch.float64, rows=2 * PAIRS):
        draw = torch.Generator().manual_seed(seed)
        start = torch.randint(1, 4, (rows, 1), generator=draw)
        end = torch.minimum(start + torch.randint(1, 7, (rows, 1), generator=draw), torch.tensor(WIDTH))
        place = torch.arange(WIDTH)
        self.mask = ((place >= start) & (place < end)).long()
        self.scored = self.mask[:, 1:].bool()
        values = torch.rand(3, rows, WIDTH - 1, generator=draw, dtype=torch.float64)
        self.log_probs = (-3 * values[0]).masked_fill(~self.scored, 0).to(dtype).requires_grad_()
        self.ref = (-3 * values[1]).masked_fill(~self.scored, 0).to(dtype)
        self.log_sum_sq = (-3 * values[2]).to(dtype)
        self.inputs = {"input_ids": torch.ones_like(self.mask), "attention_mask": torch.ones_like(self.mask)}
        self.inputs["completion_mask"] = self.mask

    def outputs(self, log_probs):
        nothing = torch.zeros_like(self.log_sum_sq)
        out = dict(log_probs=log_probs, entropy=nothing, mean_logits=nothing, is_top1=nothing.bool())
        return SimpleNamespace(log_sum_sq_probs=self.log_sum_sq, **out)

    def ours(self):
        """(ResponseLogps, its token log-probs) of the same numbers."""
        token_logp = self.log_probs.detach()[self.scored].requires_grad_()
        stats = {"log_sum_sq_probs": self.log_sum_sq[self.scored]}
        lengths = self.scored.sum(1).tolist()
        return of_tokens(lengths, token_logp, self.ref[self.scored], token_stats=stats), token_logp


def stand_in(**fields):
    same = lambda value: value
    model = torch.nn.Module()
    model.is_gradient_checkpointing = False
    return SimpleNamespace(
        model=model,
        accelerator=SimpleNamespace(device="cpu", gather_for_metrics=same, gather=same),
        _metrics=defaultdict(lambda: defaultdict(list)),
        _total_train_tokens=0,
        _tp_size=1,
        aux_loss_enabled=False,
        precompute_ref_logps=False,
        **fields,
    )


def trl_dpo(batch, names, weights=(1.0,), beta=0.1, label_smoothing=0.0, **options):
    """TRL's loss of a batch and its gradient at the log-probs."""
    settings = dict(ld_alpha=None, use_weighting=False, f_divergence_type="reverse_kl")
    settings |= dict(f_alpha_divergence_coef=0.5) | options
    args = SimpleNamespace(
        gradient_checkpointing_kwargs=None, discopop_tau=settings.pop("discopop_tau", 0.05)
    )
    trainer = stand_in(
        ref_model=lambda **_: batch.outputs(batch.ref),
        args=args,
        loss_types=list(names),
        loss_weights=list(weights),
        beta=beta,
        label_smoothing=label_smoothing,
        **settings,
    )
    model = lambda **_: batch.outputs(batch.log_probs)
    loss = dpo_trainer.DPOTrainer._compute_loss(trainer, model, batch.inputs, False)
    metrics = trainer._metrics["train"]
    if settings["use_weighting"] and "hinge" in names:
        return loss.detach(), None, metrics  # TRL 1.16 scales relu's output in place: it has no backward
    (gradient,) = torch.autograd.grad(loss, batch.log_probs)
    return loss.detach(), gradient, metrics


def assert_same(batch, theirs, objective, rtol=1e-10):
    loss, gradient, *_ = theirs
    logps, token_logp = batch.ours()
    got = objective.whole(logps)
    got.backward()
    close = dict(rtol=rtol, atol=1e-12) if loss.dtype == torch.float64 else dict(rtol=2e-5, atol=1e-6)
    torch.testing.assert_close(got.detach().to(loss.dtype), loss, **close)
    if gradient is not None:
        torch.testing.assert_close(token_logp.grad, gradient[batch.scored], **close)


def variations(name):
    """(options that both have, TRL's spelling the same)."""
    out = [{}, dict(beta=0.7)] if name != "sft" else [{}]
    if name in SMOOTHED:
        out.append(dict(label_smoothing=0.2))
    if name != "sft":
        out += [dict(ld_alpha=0.4), dict(ld_alpha=0.0)]
    if name not in ("aot", "aot_unpaired", "sft"):
        out += [dict(use_weighting=True), dict(use_weighting=True, ld_alpha=0.3)]
    if name in DIVERGENT:
        out += [dict(f_divergence_type=kind) for kind in F_TYPES[:3]]
        out.append(dict(f_divergence_type="js_divergence", ld_alpha=0.3, use_weighting=True, beta=0.9))
    if name == "discopop":
        out.append(dict(discopop_tau=0.5))
    return out


@pytest.mark.parametrize("name", DIVERGENT + PLAIN)
def test_every_loss_type(name):
    for seed, options in enumerate(variations(name)):
        # our defaults where TRL's is 0, which it refuses (exo_pair) or which is plain DPO (robust)
        own = {"exo_pair": dict(label_smoothing=1e-3), "robust": dict(label_smoothing=0.1)}.get(name, {})
        for dtype in (torch.float64, torch.float32):
            batch = Batch(seed, dtype)
            theirs = trl_dpo(batch, [name], **(own | options))
            # TRL takes the logs of EXO's label smoothing in fp32
            assert_same(batch, theirs, make(name, **options), rtol=1e-6 if name == "exo_pair" else 1e-10)


@pytest.mark.parametrize("name", DIVERGENT)
@pytest.mark.parametrize("coef", [0.0, 0.5, 1.0, 2.0])
def test_alpha_divergence(name, coef):
    """In fp32: TRL's clamp knows no fp64."""
    batch = Batch(3, torch.float32)
    options = dict(f_divergence_type="alpha_divergence", f_alpha_divergence_coef=coef, beta=0.3)
    own = dict(label_smoothing=0.1) if name in ("exo_pair", "robust") else {}
    assert_same(batch, trl_dpo(batch, [name], **options, **own), make(name, **options, **own))


def test_alpha_divergence_clamp():
    """Log-ratios of hundreds: finite, and TRL's."""
    batch = Batch(3, torch.float32)
    batch.ref = 100 * batch.ref
    options = dict(f_divergence_type="alpha_divergence", f_alpha_divergence_coef=2.0)
    theirs = trl_dpo(batch, ["sigmoid"], **options)
    assert torch.isfinite(theirs[0])
    assert_same(batch, theirs, make("sigmoid", **options))


@pytest.mark.parametrize(
    "mixture", [{"sigmoid": 0.8, "bco_pair": 0.2, "sft": 1.0}, {"aot": 0.5, "ipo": 0.1, "sft": 0.3}]
)
def test_mixtures(mixture):
    batch = Batch(4)
    theirs = trl_dpo(batch, mixture.keys(), mixture.values(), beta=0.4)
    assert_same(batch, theirs, make(mixture, beta=0.4))
    if "bco_pair" in mixture:
        assert_same(batch, theirs, make("mpo", beta=0.4))


def test_trl_ignores_label_smoothing_in_sigmoid_and_we_do_not():
    batch = Batch(5)
    theirs = trl_dpo(batch, ["sigmoid"], label_smoothing=0.3)
    assert_same(batch, theirs, make("sigmoid"))
    logps, _ = batch.ours()
    assert abs(make("sigmoid", label_smoothing=0.3).whole(logps.detached()) - theirs[0]) > 1e-3


def test_rewards():
    batch = Batch(6)
    metrics = trl_dpo(batch, ["sigmoid"], beta=0.3)[2]
    logps, _ = batch.ours()
    rewards = make("sigmoid", beta=0.3).reward(logps.detached())
    assert float(rewards[:PAIRS].mean()) == pytest.approx(metrics["rewards/chosen"][0], rel=1e-12)
    assert float(rewards[PAIRS:].mean()) == pytest.approx(metrics["rewards/rejected"][0], rel=1e-12)


@pytest.mark.parametrize("name", ["kto", "apo_zero_unpaired"])
@pytest.mark.parametrize("seed", range(3))
def test_unpaired(name, seed):
    """z0 from mismatched responses of other lengths; seeds where it is above 0 and where it is clamped."""
    rows, aside = Batch(seed), Batch(seed + 50)
    aside.ref = aside.ref * (2 if seed else 0.5)
    labels = torch.arange(2 * PAIRS) % 3 != 0
    inputs = rows.inputs | {"label": labels, "ref_logps": rows.ref.sum(1), "ref_KL_logps": aside.ref.sum(1)}
    options = dict(beta=0.2, desirable_weight=1.5, undesirable_weight=0.7)
    trainer = stand_in(calculate_KL=name == "kto", loss_type=name, **options)
    trainer.precompute_ref_logps = True
    trainer._compute_kl_logps = lambda model, batch: aside.log_probs.detach().sum(1)
    model = lambda **_: rows.outputs(rows.log_probs)
    loss = kto_trainer.KTOTrainer._compute_loss(trainer, model, inputs, False)
    (gradient,) = torch.autograd.grad(loss, rows.log_probs)

    z0 = kto_z0(aside.ours()[0])
    assert float(z0) == pytest.approx(trainer._metrics["train"]["kl"][0], abs=1e-12) or name != "kto"
    logps, token_logp = rows.ours()
    judged = dict(desirable=labels.nonzero()[:, 0], undesirable=(~labels).nonzero()[:, 0])
    logps = replace(logps, context={"z0": z0}, pairs=logps.pairs[:0], **judged)
    got = make(name, **options).whole(logps)
    got.backward()
    torch.testing.assert_close(got.detach(), loss.detach(), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(token_logp.grad, gradient[rows.scored], rtol=1e-10, atol=1e-12)


def test_both_sides_of_the_clamp_of_z0_are_tried():
    signs = [float(kto_z0(replace_ref(Batch(seed + 50), 2 if seed else 0.5))) > 0 for seed in range(3)]
    assert True in signs and False in signs


def replace_ref(batch, factor):
    batch.ref = batch.ref * factor
    return batch.ours()[0]


@pytest.mark.parametrize("eps", [0.0, 0.1])
def test_cpo_and_simpo(eps):
    cpo_trainer = pytest.importorskip("trl.experimental.cpo.cpo_trainer", reason="needs trl's CPO")
    logps, _ = Batch(7).ours()
    sums, average = logps.logp.detach(), (logps.logp / logps.lengths).detach()
    accelerator = SimpleNamespace(device="cpu")
    for kind, values, objective, options in (
        ("sigmoid", sums, "cpo", {}),
        ("simpo", average, "simpo", dict(simpo_gamma=0.9)),
    ):
        trainer = SimpleNamespace(
            alpha=0.0, beta=0.8, loss_type=kind, label_smoothing=eps, accelerator=accelerator, **options
        )
        losses, *rewards = cpo_trainer.CPOTrainer.cpo_loss(trainer, values[:PAIRS], values[PAIRS:])
        ours = make(objective, beta=0.8, label_smoothing=eps, **options)
        torch.testing.assert_close(ours.terms[0].losses(logps).detach(), losses, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(ours.reward(logps).detach(), torch.cat(rewards), rtol=1e-12, atol=0)


def test_cpo_likelihood():
    """TRL's cross-entropy: the mean over all the winners' tokens, times cpo_alpha."""
    logps, token_logp = Batch(8).ours()
    winners = token_logp[: int(logps.cu_resp[PAIRS])]
    apart = make("cpo", cpo_alpha=0.3).whole(logps) - make("cpo", cpo_alpha=0.0).whole(logps)
    torch.testing.assert_close(apart, -0.3 * winners.mean(), rtol=1e-12, atol=0)


def test_orpo():
    orpo_trainer = pytest.importorskip("trl.experimental.orpo.orpo_trainer", reason="needs trl's ORPO")
    logps, _ = Batch(9).ours()
    average = (logps.logp / logps.lengths).detach()
    trainer = SimpleNamespace(beta=0.4, accelerator=SimpleNamespace(device="cpu"))
    theirs = orpo_trainer.ORPOTrainer.odds_ratio_loss(trainer, average[:PAIRS], average[PAIRS:])
    ours = make("orpo", beta=0.4)
    odds = ours.terms[0].losses(logps) - reference_free.nll_per_token(logps)
    torch.testing.assert_close(odds.detach().float(), -theirs[0], rtol=1e-5, atol=1e-6)  # theirs is fp32
    torch.testing.assert_close(ours.reward(logps).detach().float(), torch.cat(theirs[1:3]), rtol=1e-6, atol=0)
