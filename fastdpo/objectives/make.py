"""From a name, or names with weights, and options to an Objective."""

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor

from fastdpo.errors import ConfigError
from fastdpo.objectives import options as given_options
from fastdpo.objectives.batch import bco_remember, drdpo
from fastdpo.objectives.catalogue import CATALOGUE, TOKEN_OPTIONS, Entry, options_of, own_options
from fastdpo.objectives.seam import Coupled, Decomposable, Objective, Rescaled, Reward, Term
from fastdpo.objectives.tokens import on_policy_weight, transformed
from fastdpo.records import ResponseLogps


def make(objective: str | dict | list = "sigmoid", **options) -> Objective:
    """An objective by name, or names with weights. Options, beta and label_smoothing too, that are None are
    each one's own default."""
    return make_objective(objective, options)


def options_read(objective: str | dict | list, base_loss: str | None = None) -> set[str]:
    """The names of all options that an objective reads, beta and label_smoothing among them."""
    base = given_options.checked("base_loss", base_loss or "sigmoid")
    return {option for name in given_options.parts_of(objective) for option in options_of(name, base)}


def make_objective(objective: str | dict | list, given: dict[str, Any]) -> Objective:
    """The same, from a dict of options. Raises ConfigError for what is unknown, unread or out of range."""
    parts = given_options.parts_of(objective)
    given = {option: value for option, value in given.items() if value is not None}
    base = given_options.checked("base_loss", given.get("base_loss", "sigmoid"))
    reads = {name: options_of(name, base) for name in parts}
    given_options.check_read(given, reads)
    given = {option: given_options.checked(option, value) for option, value in given.items()}
    given_options.check_together(given, {*parts, base})
    made = [_one(name, {k: v for k, v in given.items() if k in reads[name]}) for name in parts]
    if list(parts.values()) == [1.0]:
        return made[0]
    name = " + ".join(f"{weight:g} {part}" for part, weight in parts.items())
    if isinstance(objective, str):  # a preset
        name = objective
    return _sum(name, made, list(parts.values()), given)


def _one(name: str, options: dict[str, Any]) -> Objective:
    """One entry of the catalogue with its options bound."""
    entry = CATALOGUE[name]
    beta = options.get("beta", options_of(name, options.get("base_loss", "sigmoid")).get("beta"))
    common = dict(name=name, beta=beta, options=options, reward=_reward(entry, beta))
    if entry.kind == "rescaled":
        return _drdpo(common, options)
    tokens = _only(options, TOKEN_OPTIONS) if entry.sums else {}
    common |= dict(
        needs_reference=entry.reference,
        seen=partial(transformed, **tokens),
        stats=entry.stats or (("log_sum_sq_probs",) if options.get("use_weighting") else ()),
        needs=_needs(entry, options),
    )
    losses = _losses(entry, options, tokens)
    if entry.kind == "coupled":
        remember = partial(bco_remember, beta=beta) if name == "bco" else None
        return Coupled(loss=lambda logps: losses(logps).mean(), remember=remember, **common)
    terms = (Term(name, losses, entry.unit),)
    if "cpo_alpha" in entry.extra:
        weight = options.get("cpo_alpha", entry.extra["cpo_alpha"])
        likelihood = Term("sft", CATALOGUE["sft"].losses, CATALOGUE["sft"].unit, weight)
        terms += (likelihood,) if weight else ()
    return Decomposable(terms=terms, only_chosen=name == "sft", mismatched=name == "kto", **common)


def _losses(
    entry: Entry, options: dict[str, Any], tokens: dict[str, float]
) -> Callable[[ResponseLogps], Tensor]:
    """The entry's function of log-probs alone: options bound, tokens weighted before, pairs after."""
    bound = partial(entry.losses, **_only(options, own_options(entry.losses)))
    plain = (lambda logps: bound(transformed(logps, **tokens))) if tokens else bound
    if not (entry.weighting and options.get("use_weighting")):
        return plain
    clamp = options.get("clamp_weights", False)
    return lambda logps: on_policy_weight(logps, clamp_weights=clamp) * plain(logps)


def _drdpo(common: dict[str, Any], options: dict[str, Any]) -> Objective:
    """Dr. DPO over its base loss: of the whole step, or the authors' form, of every `scope` groups."""
    name = options.get("base_loss", "sigmoid")
    base = _one(name, _only(options, options_of(name)))
    common |= dict(stats=base.stats, needs=base.needs, seen=base.seen)
    (term,) = base.terms
    own = _only(options, own_options(drdpo))
    scope = options.get("scope", "batch")
    if scope == "batch":
        temperature = own.get("beta_prime", own_options(drdpo)["beta_prime"])
        return Rescaled(term=term, temperature=temperature, **common)
    loss = lambda logps: drdpo(term.losses(logps), logps.weight, **own)
    return Coupled(loss=loss, within=scope, **common)


def _sum(name: str, made: list[Objective], weights: list[float], options: dict[str, Any]) -> Objective:
    """A weighted sum. Decomposable where all parts are; else one function of the whole step."""
    if any(isinstance(part, Coupled) and part.within for part in made):
        raise ConfigError("objective_args: scope: a number of groups needs drdpo alone; use scope: batch")
    shown = next((part for part in made if part.reward), made[0])  # the metrics are of one part
    common = dict(
        name=name,
        beta=next((part.beta for part in made if part.beta is not None), None),
        options=options,
        needs_reference=any(part.needs_reference for part in made),
        mismatched=any(part.mismatched for part in made),
        stats=tuple(dict.fromkeys(stat for part in made for stat in part.stats)),
        needs=frozenset().union(*(part.needs for part in made)),
        seen=shown.seen,
        reward=shown.reward,
    )
    if all(isinstance(part, Decomposable) for part in made):
        terms = tuple(
            Term(term.name, term.losses, term.unit, weight * term.weight)
            for part, weight in zip(made, weights)
            for term in part.terms
        )
        return Decomposable(terms=terms, only_chosen=all(part.only_chosen for part in made), **common)
    remember = next((part.remember for part in made if isinstance(part, Coupled) and part.remember), None)
    loss = lambda logps: sum(weight * part.whole(logps) for part, weight in zip(made, weights))
    return Coupled(loss=loss, remember=remember, **common)


def _reward(entry: Entry, beta: float | None) -> Reward | None:
    scale = 1.0 if beta is None else beta
    return None if entry.reward is None else lambda logps: scale * entry.reward(logps)


def _needs(entry: Entry, options: dict[str, Any]) -> frozenset[str]:
    """What every row must have (checks.py) and the reference must be."""
    needs = set(entry.needs)
    if not entry.offset:
        needs.add("no offsets")
    if options.get("scaling") == "log_difference":
        needs.add("positive scores")
    if "gamma" in options:
        needs |= {"token weights", "per-token reference"}
    if "ld_alpha" in options:
        needs.add("per-token reference")
    return frozenset(needs)


def _only(options: dict[str, Any], names) -> dict[str, Any]:
    return {name: value for name, value in options.items() if name in names}
