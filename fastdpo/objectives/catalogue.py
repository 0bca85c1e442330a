"""Every objective by name: what it is, what it reads, where it comes from. The one place for all of that."""

import inspect
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass, field
from functools import partial
from typing import Annotated

from torch import Tensor

from fastdpo.objectives import batch, dpo, on_policy, reference_free, shifted, tokens
from fastdpo.objectives.names import NOTE, same
from fastdpo.objectives.options import NotBelow0, Option, Scope, Switch, one_of
from fastdpo.objectives.seam import Reward

LOG_RATIO: Reward = lambda logps: logps.log_ratio
LOGP: Reward = lambda logps: logps.logp
AVERAGE: Reward = reference_free.average_logp
BaseLoss = Annotated[str, lambda key, value: one_of(*BASES)(key, same(value, BASES) or value)]


@dataclass(frozen=True)
class Entry:
    """One objective, by the name of its function. Its options are the function's keyword arguments, `extra`,
    and what `sums` allows."""

    losses: Callable[..., Tensor]  # of ResponseLogps; Dr. DPO's alone is of other losses
    about: str
    source: str = ""  # an arXiv id
    offset: bool = False  # reads a pair's own offset
    _: KW_ONLY
    kind: str = "terms"  # terms | rescaled | coupled, see seam.py
    unit: str = "pair"  # a key of UNITS
    reward: Reward | None = LOG_RATIO  # times beta, for the metrics
    sums: bool = True  # of sums over tokens: reads the token options, and, a term, the weighting's
    stats: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()  # of rows, beside what the unit needs; see checks.py
    extra: dict[str, Option] = field(default_factory=dict)  # what the loss function itself does not see
    mismatched: bool = False  # reads the step's z0
    remember: Callable[..., dict[str, float]] | None = None  # see seam.Coupled; it is given beta

    @property
    def reference(self) -> bool:
        return self.reward is LOG_RATIO


def own_options(function: Callable) -> dict[str, Option]:
    """The options of a loss: its keyword-only arguments, and, where it hands on **divergence, f-DPO's."""
    own: dict[str, Option] = {}
    for p in inspect.signature(function).parameters.values():
        if p.kind is p.KEYWORD_ONLY:
            own[p.name] = Option(p.default, p.annotation)
        elif p.kind is p.VAR_KEYWORD:
            own |= DIVERGENCE_OPTIONS
    return own


DIVERGENCE_OPTIONS = own_options(dpo.scores)
TOKEN_OPTIONS = own_options(tokens.transformed)
WEIGHT_OPTIONS = {"use_weighting": Option(False, Switch)} | own_options(tokens.on_policy_weight)

_free = partial(Entry, sums=False)  # of reference
_judged = partial(Entry, sums=False, unit="judged response")
_ENTRIES = (
    Entry(dpo.sigmoid, "DPO; conservative DPO with label_smoothing", "2305.18290", True),
    Entry(dpo.sigmoid_norm, "DPO of log-ratios a token (Tulu 3: beta 5)", "2411.15124", True),
    Entry(dpo.robust, "robust DPO: unbiased when a known share is flipped", "2403.00409", True),
    Entry(dpo.hinge, "hinge on the log-ratios (RSO)", "2309.06657", True),
    Entry(dpo.ipo, "IPO of log-ratios a token, as TRL", "2310.12036"),
    Entry(dpo.ipo_sum, "IPO of summed log-ratios, as written", "2310.12036"),
    Entry(dpo.exo_pair, "EXO: reverse KL from the smoothed label", "2402.00856", True),
    Entry(dpo.nca_pair, "NCA: also holds the winner's likelihood", "2402.05369"),
    Entry(dpo.bco_pair, "BCO of pairs, without a shift", "2404.04656"),
    Entry(dpo.sppo_hard, "SPPO with certain winners", "2405.00675"),
    Entry(dpo.apo_zero, "APO: winner up, loser down", "2408.06266"),
    Entry(dpo.apo_down, "APO: both down, the loser further", "2408.06266"),
    Entry(dpo.discopop, "DiscoPOP: logistic and exponential, mixed", "2406.08414", True),
    Entry(
        shifted.odpo,
        "DPO with a margin by the scores' gap",
        "2402.10571",
        True,
        needs=("scores", "ordered scores"),
    ),
    Entry(shifted.dpop, "DPO-Positive (Smaug): the winner stays likely", "2402.13228", True),
    Entry(shifted.rdpo, "R-DPO: length-regularised", "2403.19159", True),
    Entry(
        shifted.reward_rpo,
        "reward-aware RPO: match the scores' gap",
        "2406.11704",
        True,
        needs=("scores",),
    ),
    Entry(
        shifted.rpo,
        "iterative RPO: DPO and the winner's likelihood a token",
        "2404.19733",
        True,
        sums=False,
    ),
    Entry(
        dpo.wpo,
        "WPO: DPO weighted by how on-policy a pair is, weights clamped at 1",
        "2406.11827",
        True,
        sums=False,
        stats=("log_sum_sq_probs",),
    ),
    Entry(
        batch.drdpo,
        "Dr. DPO: pairs of low loss count more, exact over the step",
        "2407.07880",
        kind="rescaled",
        sums=False,
        extra={"base_loss": Option("sigmoid", BaseLoss), "scope": Option("batch", Scope)},
    ),
    Entry(
        batch.aot,
        "AOT on pairs: sorted margins against the reference's",
        "2406.05882",
        kind="coupled",
    ),
    Entry(batch.aot_unpaired, "AOT: sorted winners against sorted losers", "2406.05882", kind="coupled"),
    _judged(batch.kto, "KTO, on unpaired judged rows or on pairs", "2402.01306", mismatched=True),
    _judged(batch.apo_zero_unpaired, "APO-zero, on either", "2408.06266"),
    _judged(
        batch.bco,
        "BCO with its running shift, on either",
        "2404.04656",
        kind="coupled",
        remember=batch.bco_remember,
    ),
    Entry(
        on_policy.rloo,
        "RLOO: scored samples of the policy, against the others of their prompt; needs `rounds`",
        "2402.14740",
        unit="response",
        sums=False,
    ),
    _free(
        reference_free.simpo,
        "SimPO: likelihood a token, with a margin",
        "2405.14734",
        True,
        reward=AVERAGE,
    ),
    _free(
        reference_free.cpo,
        "CPO, with likelihood",
        "2401.08417",
        True,
        reward=LOGP,
        extra={"cpo_alpha": Option(1.0, NotBelow0)},
    ),
    _free(reference_free.orpo, "ORPO: likelihood and odds ratio", "2403.07691", reward=AVERAGE),
    _free(reference_free.slic, "SLiC-HF: hinge and likelihood", "2305.10425", reward=LOGP),
    _free(
        reference_free.sft,
        "the likelihood of the chosen responses",
        "",
        True,
        unit="chosen token",
        reward=None,
    ),
)
CATALOGUE = {entry.losses.__name__: entry for entry in _ENTRIES}
BASES = tuple(name for name, entry in CATALOGUE.items() if entry.sums and entry.kind == "terms")
# name -> (its parts, what it is, where it comes from)
MIXTURES = {"mpo": ({"sigmoid": 0.8, "bco_pair": 0.2, "sft": 1.0}, "MPO (InternVL)", "2411.10442")}
NAMES = (*CATALOGUE, *MIXTURES)


def options_of(name: str, base_loss: str = "sigmoid") -> dict[str, Option]:
    """All options that an objective reads. Dr. DPO reads its base loss's too."""
    entry = CATALOGUE[name]
    out = own_options(entry.losses) | entry.extra
    out |= TOKEN_OPTIONS if entry.sums else {}
    out |= WEIGHT_OPTIONS if name in BASES else {}
    return out | options_of(base_loss) if "base_loss" in out else out


def _options_text(name: str) -> str:
    """Options with defaults, the shared ones by the names under the table."""
    own = own_options(CATALOGUE[name].losses) | CATALOGUE[name].extra
    values = {option: own[option].default for option in own if option not in DIVERGENCE_OPTIONS}
    parts = [f"{k}={v:g}" if isinstance(v, float) else f"{k}={v}" for k, v in values.items()]
    parts += ["f-divergence"] if own.keys() >= DIVERGENCE_OPTIONS.keys() else []
    parts += ["token options"] if CATALOGUE[name].sums else []
    parts += ["weighting"] if name in BASES else []
    return ", ".join(parts + (["its base loss's"] if "base_loss" in own else []))


def rows() -> list[tuple[str, str, str, str]]:
    """(name, one line, options, arXiv id) of every objective."""
    out = [(name, e.about, _options_text(name), e.source) for name, e in CATALOGUE.items()]
    for name, (parts, about, source) in MIXTURES.items():
        sum_of = " + ".join(f"{weight:g} {part}" for part, weight in parts.items())
        out.append((name, f"{about}: {sum_of}", "what its parts read", source))
    return out


NOTES = (
    "f-divergence: f_divergence_type=reverse_kl (or forward_kl, js_divergence, alpha_divergence with "
    "f_alpha_divergence_coef=0.5), as TRL",
    "token options: ld_alpha (LD-DPO, 2409.06411: the weight of tokens past the shorter response) and gamma "
    "(weighted DPO, 2406.06496: the weight of tokens that the row's spans or token weights call irrelevant)",
    "weighting: use_weighting (WPO's weights, 2406.11827, as TRL) and clamp_weights (at 1, as its authors)",
    "several at once: `objective: {sigmoid: 1, sft: 0.2}`, summed; an option goes to all that read it",
    NOTE,
)


def objectives_table() -> str:
    """docs/objectives.md's table of objectives, in Markdown."""
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
