"""From a name, or names with weights, and options to an Objective; what is wrong in them is told before any
work."""

from collections.abc import Mapping
from dataclasses import fields, replace
from functools import partial
from typing import Any

from fastdpo.errors import ConfigError
from fastdpo.objectives.batch import drdpo
from fastdpo.objectives.catalogue import CATALOGUE, MIXTURES, NAMES, Entry, options_of, own_options
from fastdpo.objectives.names import ours
from fastdpo.objectives.options import above_0
from fastdpo.objectives.seam import Coupled, Decomposable, Objective, Rescaled, Term
from fastdpo.objectives.tokens import on_policy_weight, transformed
from fastdpo.values import nearest

_KEYS = ("beta", "label_smoothing")  # options that are keys of a config too


def make(objective: str | dict | list = "sigmoid", **options) -> Objective:
    """An objective by name, or names with weights. Options, beta and label_smoothing too, that are None are
    each one's own default."""
    return make_objective(objective, options)


def make_objective(objective: str | dict | list, given: dict[str, Any]) -> Objective:
    """The same, from a dict of options. Raises ConfigError for what is unknown, unread or out of range."""
    parts = _parts_of(objective)
    given = {option: value for option, value in given.items() if value is not None}
    base = _base_loss(given.get("base_loss", "sigmoid"))
    reads = {name: options_of(name, base) for name in parts}
    known = {option: found for options in reads.values() for option, found in options.items()}
    _check_read(given, list(parts), list(known))
    given = {option: known[option].check(_key(option), value) for option, value in given.items()}
    _check_together(given, {*parts, base})
    made = [
        _one(name, {o: given.get(o, found.default) for o, found in reads[name].items()}) for name in parts
    ]
    if list(parts.values()) == [1.0]:
        return made[0]
    together = " + ".join(f"{weight:g} {part}" for part, weight in parts.items())
    return _sum(objective if isinstance(objective, str) else together, made, list(parts.values()))


def same_objective(one, other) -> bool:
    """Whether two objectives of a config are the same loss under other names."""
    try:
        return _parts_of(one) == _parts_of(other)
    except ConfigError:
        return False


def options_read(objective: str | dict | list, base_loss: str | None = None) -> set[str]:
    """The names of all options that an objective reads, beta and label_smoothing among them."""
    base = _base_loss(base_loss or "sigmoid")
    return {option for name in _parts_of(objective) for option in options_of(name, base)}


def _parts_of(objective) -> dict[str, float]:
    """{name: weight} of a name, a mapping, or a list of either; presets as their parts."""
    items = objective if isinstance(objective, list | tuple) else [objective]
    if not items or not all(isinstance(item, str | Mapping) and item for item in items):
        raise ConfigError(f"objective: {objective!r} is neither a name nor names with weights")
    given = [pair for item in items for pair in ([(item, 1.0)] if isinstance(item, str) else item.items())]
    named = [(ours(name, NAMES), weight) for name, weight in given]
    out: dict[str, float] = {}
    for i, (name, weight) in enumerate(named):
        weight = above_0(f"objective: the weight of {name}", weight)
        if name in [other for other, _ in named[:i]]:
            raise ConfigError(f"objective: {name} is given twice")
        shares = MIXTURES[name][0] if name in MIXTURES else {name: 1.0}
        for part, share in shares.items():
            out[part] = out.get(part, 0.0) + weight * share
    return out


def _base_loss(given) -> str:
    """Dr. DPO's, which has a say in what options there are."""
    return CATALOGUE["drdpo"].extra["base_loss"].check(_key("base_loss"), given)


def _key(option: str) -> str:
    """What messages call an option."""
    return option if option in _KEYS else f"objective_args: {option}"


def _check_read(given: dict[str, Any], names: list[str], known: list[str]) -> None:
    """That each option given is known to at least one of the objectives."""
    for option in (option for option in given if option not in known):
        who = f"{names[0]} does not read" if len(names) == 1 else f"none of {', '.join(names)} reads"
        what = f"It reads {', '.join(known)}." if known else "It reads none."
        if option in _KEYS:
            raise ConfigError(f"{option}: {who} it. {what}")
        raise ConfigError(f"objective_args: {who} {option!r}. {nearest(option, known)}{what}")


def _check_together(given: dict[str, Any], names: set[str]) -> None:
    """What one option asks of another. `names`: of the objectives, and of Dr. DPO's base loss."""
    for option, other, value in (
        ("f_alpha_divergence_coef", "f_divergence_type", "alpha_divergence"),
        ("clamp_weights", "use_weighting", True),
    ):
        by_itself = option == "clamp_weights" and "wpo" in names
        if option in given and given.get(other) != value and not by_itself:
            raise ConfigError(f"objective_args: {option} is read only with {other}: {str(value).lower()}")
    if "exo_pair" in names and given.get("label_smoothing") == 0:
        raise ConfigError("label_smoothing: exo_pair needs it above 0 (its paper uses 1e-3)")


def _one(name: str, options: dict[str, Any]) -> Objective:
    """One entry of the catalogue, at these values of all its options."""
    entry = CATALOGUE[name]
    if entry.kind == "rescaled":
        return _drdpo(name, options)
    beta, reward, seen = options.get("beta"), entry.reward, _bound(transformed, options)
    plain, losses = _bound(entry.losses, options), lambda logps: plain(seen(logps))
    if weighted := options.get("use_weighting"):
        weight = _bound(on_policy_weight, options)
        losses = lambda logps: weight(logps) * plain(seen(logps))
    common: dict[str, Any] = dict(
        name=name,
        beta=beta,
        needs_reference=entry.reference,
        mismatched=entry.mismatched,
        stats=("log_sum_sq_probs",) if weighted else entry.stats,
        needs=_needs(entry, options),
        learns_from_ties=bool(options.get("kl_coef")),
        seen=seen,
        reward=reward and (lambda logps: (1.0 if beta is None else beta) * reward(logps)),
    )
    if entry.kind == "coupled":
        remember = entry.remember and partial(entry.remember, beta=beta)
        return Coupled(loss=lambda logps: losses(logps).mean(), remember=remember, **common)
    terms = [Term(losses, entry.unit)]
    if options.get("cpo_alpha"):
        likelihood = CATALOGUE["sft"]
        terms.append(Term(likelihood.losses, likelihood.unit, options["cpo_alpha"]))
    return Decomposable(terms=tuple(terms), only_chosen=entry.unit == "chosen token", **common)


def _bound(function, options: dict[str, Any]) -> partial:
    """A function of log-probs alone: with those options that it reads."""
    return partial(function, **{name: options[name] for name in own_options(function) if name in options})


def _drdpo(name: str, options: dict[str, Any]) -> Objective:
    """Dr. DPO over its base loss: of the whole step, or the authors' form, of every `scope` groups."""
    base_loss, scope, temperature = options["base_loss"], options["scope"], options["beta_prime"]
    base = _one(base_loss, {option: options[option] for option in options_of(base_loss)})
    common: dict[str, Any] = {f.name: getattr(base, f.name) for f in fields(Objective)} | {"name": name}
    assert isinstance(base, Decomposable)
    (term,) = base.terms
    if scope == "batch":
        return Rescaled(term=term, temperature=temperature, **common)
    loss = lambda logps: drdpo(term.losses(logps), logps.weight, beta_prime=temperature)
    return Coupled(loss=loss, within=scope, **common)


def _sum(name: str, made: list[Objective], weights: list[float]) -> Objective:
    """A weighted sum. Decomposable where all parts are; else one function of the whole step."""
    coupled = [part for part in made if isinstance(part, Coupled)]
    if any(part.within for part in coupled):
        raise ConfigError("objective_args: scope: a number of groups needs drdpo alone; use scope: batch")
    shown = next((part for part in made if part.reward), made[0])  # the metrics are of one part
    common: dict[str, Any] = dict(
        name=name,
        beta=next((part.beta for part in made if part.beta is not None), None),
        needs_reference=any(part.needs_reference for part in made),
        mismatched=any(part.mismatched for part in made),
        stats=tuple(dict.fromkeys(stat for part in made for stat in part.stats)),
        needs=frozenset().union(*(part.needs for part in made)),
        learns_from_ties=any(part.learns_from_ties for part in made),
        seen=shown.seen,
        reward=shown.reward,
    )
    plain = [part for part in made if isinstance(part, Decomposable)]
    if len(plain) == len(made):
        terms = [
            replace(term, weight=weight * term.weight)
            for part, weight in zip(plain, weights)
            for term in part.terms
        ]
        return Decomposable(terms=tuple(terms), only_chosen=all(part.only_chosen for part in made), **common)
    loss: Any = lambda logps: sum(weight * part.whole(logps) for part, weight in zip(made, weights))
    remember = next((part.remember for part in coupled if part.remember), None)
    return Coupled(loss=loss, remember=remember, **common)


def _needs(entry: Entry, options: dict[str, Any]) -> frozenset[str]:
    """What every row must have (checks.py) and the reference must be."""
    of_unit = {"pair": "pairs", "judged response": "judged", "response": "response scores"}
    needs = {*entry.needs, *([of_unit[entry.unit]] if entry.unit in of_unit else [])}
    if not entry.offset:
        needs.add("no offsets")
    if options.get("scaling") == "log_difference":
        needs.add("positive scores")
    if options.get("gamma") is not None:
        needs |= {"token weights", "per-token reference"}
    if options.get("ld_alpha") is not None or options.get("clip"):
        needs.add("per-token reference")
    return frozenset(needs)
