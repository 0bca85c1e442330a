"""Every objective by name: what it is, what it reads, where it comes from. The one place for all of that."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from fastdpo.objectives import batch, dpo, reference_free, shifted
from fastdpo.objectives.seam import Reward

LOG_RATIO: Reward = lambda logps: logps.log_ratio
LOGP: Reward = lambda logps: logps.logp
AVERAGE: Reward = reference_free.average_logp
TOKEN_OPTIONS = {"ld_alpha": None, "gamma": None}
WEIGHT_OPTIONS = {"use_weighting": False, "clamp_weights": False}
DIVERGENCE_OPTIONS = ("f_divergence_type", "f_alpha_divergence_coef")


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One objective. Its options are the keyword arguments of `losses`, `extra`'s and the shared ones."""

    about: str
    source: str
    losses: Callable[..., Tensor]  # of ResponseLogps; Dr. DPO's alone is of other losses
    kind: str = "terms"  # terms | rescaled | coupled, see seam.py
    unit: str = "pair"
    reference: bool = True
    reward: Reward | None = LOG_RATIO  # times beta, for the metrics
    sums: bool = False  # a pair loss of sums over tokens: reads ld_alpha and gamma
    weighting: bool = False  # reads use_weighting and clamp_weights
    offset: bool = False  # reads a pair's own offset
    stats: tuple[str, ...] = ()
    needs: tuple[str, ...] = ("pairs",)
    extra: dict[str, Any] = field(default_factory=dict)  # options that the loss function itself does not see


def _pair(losses, about, source, offset=False, needs=()) -> Entry:
    """A loss of each pair's log-ratios, with all that the sums over tokens allow."""
    shared = dict(sums=True, weighting=True, offset=offset, needs=("pairs", *needs))
    return Entry(about=about, source=source, losses=losses, **shared)


def _free(losses, about, source, reward, offset=False, **more) -> Entry:
    """A loss of each pair without a reference."""
    shared = dict(reference=False, reward=reward, offset=offset)
    return Entry(about=about, source=source, losses=losses, **shared, **more)


def _judged(losses, about, source, **more) -> Entry:
    """A loss of each judged response."""
    return Entry(about=about, source=source, losses=losses, unit="judged response", needs=("judged",), **more)


CATALOGUE: dict[str, Entry] = {
    "sigmoid": _pair(dpo.sigmoid, "DPO; conservative DPO with label_smoothing", "2305.18290", True),
    "sigmoid_norm": _pair(dpo.sigmoid_norm, "DPO of log-ratios a token (Tulu 3: beta 5)", "2411.15124", True),
    "robust": _pair(dpo.robust, "robust DPO: unbiased when a known share is flipped", "2403.00409", True),
    "hinge": _pair(dpo.hinge, "hinge on the log-ratios (RSO)", "2309.06657", True),
    "ipo": _pair(dpo.ipo, "IPO of log-ratios a token, as TRL", "2310.12036"),
    "ipo_sum": _pair(dpo.ipo_sum, "IPO of summed log-ratios, as written", "2310.12036"),
    "exo_pair": _pair(dpo.exo_pair, "EXO: reverse KL from the smoothed label", "2402.00856", True),
    "nca_pair": _pair(dpo.nca_pair, "NCA: also holds the winner's likelihood", "2402.05369"),
    "bco_pair": _pair(dpo.bco_pair, "BCO of pairs, without a shift", "2404.04656"),
    "sppo_hard": _pair(dpo.sppo_hard, "SPPO with certain winners", "2405.00675"),
    "apo_zero": _pair(dpo.apo_zero, "APO: winner up, loser down", "2408.06266"),
    "apo_down": _pair(dpo.apo_down, "APO: both down, the loser further", "2408.06266"),
    "discopop": _pair(dpo.discopop, "DiscoPOP: logistic and exponential, mixed", "2406.08414", True),
    "odpo": _pair(
        shifted.odpo, "DPO with a margin by the scores' gap", "2402.10571", True, ("ordered scores",)
    ),
    "dpop": _pair(shifted.dpop, "DPO-Positive (Smaug): the winner stays likely", "2402.13228", True),
    "rdpo": _pair(shifted.rdpo, "R-DPO: length-regularised", "2403.19159", True),
    "reward_rpo": _pair(
        shifted.reward_rpo, "reward-aware RPO: match the scores' gap", "2406.11704", True, ("scores",)
    ),
    "rpo": Entry(
        about="iterative RPO: DPO and the winner's likelihood a token",
        source="2404.19733",
        losses=shifted.rpo,
        offset=True,
    ),
    "wpo": Entry(
        about="WPO: DPO weighted by how on-policy a pair is, weights clamped at 1",
        source="2406.11827",
        losses=dpo.wpo,
        stats=("log_sum_sq_probs",),
        offset=True,
    ),
    "drdpo": Entry(
        about="Dr. DPO: pairs of low loss count more, exact over the step",
        source="2407.07880",
        losses=batch.drdpo,
        kind="rescaled",
        extra={"base_loss": "sigmoid", "scope": "batch"},
    ),
    "aot": Entry(
        about="AOT on pairs: sorted margins against the reference's",
        source="2406.05882",
        losses=batch.aot,
        kind="coupled",
        sums=True,
    ),
    "aot_unpaired": Entry(
        about="AOT: sorted winners against sorted losers",
        source="2406.05882",
        losses=batch.aot_unpaired,
        kind="coupled",
        sums=True,
    ),
    "kto": _judged(batch.kto, "KTO, on unpaired judged rows or on pairs", "2402.01306"),
    "apo_zero_unpaired": _judged(batch.apo_zero_unpaired, "APO-zero, on either", "2408.06266"),
    "bco": _judged(batch.bco, "BCO with its running shift, on either", "2404.04656", kind="coupled"),
    "simpo": _free(
        reference_free.simpo, "SimPO: likelihood a token, with a margin", "2405.14734", AVERAGE, True
    ),
    "cpo": _free(
        reference_free.cpo, "CPO, with likelihood", "2401.08417", LOGP, True, extra={"cpo_alpha": 1.0}
    ),
    "orpo": _free(reference_free.orpo, "ORPO: likelihood and odds ratio", "2403.07691", AVERAGE),
    "slic": _free(reference_free.slic, "SLiC-HF: hinge and likelihood", "2305.10425", LOGP),
    "sft": Entry(
        about="the likelihood of the chosen responses",
        source="",
        losses=reference_free.sft,
        unit="chosen token",
        reference=False,
        reward=None,
        offset=True,
        needs=(),
    ),
}
MIXTURES: dict[str, dict[str, float]] = {"mpo": {"sigmoid": 0.8, "bco_pair": 0.2, "sft": 1.0}}
_MIXTURE_TEXTS = {"mpo": ("MPO (InternVL)", "2411.10442")}
BASES = tuple(name for name, entry in CATALOGUE.items() if entry.sums and entry.kind == "terms")
NAMES = (*CATALOGUE, *MIXTURES)


def own_options(losses: Callable) -> dict[str, Any]:
    """The options of a loss function and their defaults: its keyword-only arguments."""
    parameters = inspect.signature(losses).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY}


def options_of(name: str, base_loss: str = "sigmoid") -> dict[str, Any]:
    """All options that an objective reads, with their defaults. Dr. DPO reads its base loss's too."""
    entry = CATALOGUE[name]
    out = own_options(entry.losses) | entry.extra
    out |= TOKEN_OPTIONS if entry.sums else {}
    out |= WEIGHT_OPTIONS if entry.weighting else {}
    return out | options_of(base_loss) if "base_loss" in entry.extra else out


def _options_text(name: str) -> str:
    """Options with defaults, the shared ones by the names under the table."""
    if name in MIXTURES:
        return "what its parts read"
    entry = CATALOGUE[name]
    own = own_options(entry.losses) | entry.extra
    parts = [f"{k}={v:g}" if isinstance(v, float) else f"{k}={v}" for k, v in own.items() if k not in _SHARED]
    parts += ["f-divergence"] if "f_divergence_type" in own else []
    parts += ["token options"] if entry.sums else []
    parts += ["weighting"] if entry.weighting else []
    return ", ".join(parts + (["its base loss's"] if "base_loss" in own else []))


def rows() -> list[tuple[str, str, str, str]]:
    """(name, one line, options, arXiv id) of every objective."""
    out = [(name, e.about, _options_text(name), e.source) for name, e in CATALOGUE.items()]
    for name, parts in MIXTURES.items():
        about, source = _MIXTURE_TEXTS[name]
        sum_of = " + ".join(f"{weight:g} {part}" for part, weight in parts.items())
        out.append((name, f"{about}: {sum_of}", _options_text(name), source))
    return out


_SHARED = DIVERGENCE_OPTIONS
NOTES = (
    "f-divergence: f_divergence_type=reverse_kl (or forward_kl, js_divergence, alpha_divergence with "
    "f_alpha_divergence_coef=0.5), as TRL",
    "token options: ld_alpha (LD-DPO, 2409.06411: the weight of tokens past the shorter response) and gamma "
    "(weighted DPO, 2406.06496: the weight of tokens that the row's spans or token weights call irrelevant)",
    "weighting: use_weighting (WPO's weights, 2406.11827, as TRL) and clamp_weights (at 1, as its authors)",
    "several at once: `objective: {sigmoid: 1, sft: 0.2}`, summed; an option goes to all that read it",
)


def objectives_table() -> str:
    """The README's table of objectives, in Markdown."""
    lines = ["| objective | what it is | options | paper |", "|---|---|---|---|"]
    for name, about, options, source in rows():
        paper = f"[{source}](https://arxiv.org/abs/{source})" if source else ""
        lines.append(f"| `{name}` | {about} | {options} | {paper} |")
    return "\n".join([*lines, "", *(f"- {note}" for note in NOTES)]) + "\n"


def table(console) -> None:
    """Prints what `fastdpo objectives` shows."""
    from rich.table import Table

    out = Table("objective", "what it is", "options", "arXiv", box=None, pad_edge=False)
    for row in rows():
        out.add_row(*row)
    console.print(out)
    for note in NOTES:
        console.print(f"\n{note}", markup=False, highlight=False)
