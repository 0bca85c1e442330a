"""Parts of explain.json that two captured models and a direction say."""

from typing import Any

from torch import Tensor

from fastdpo.explanation.capture import Captured
from fastdpo.explanation.probe import Direction
from fastdpo.explanation.result import Settings


def direction_part(
    found: Direction, settings: Settings, old: Captured, new: Captured, u: Tensor
) -> dict[str, Any]:
    """The direction, how well it tells, and the mean projection on it, f64[D] u, of both."""
    return {
        "kind": found.kind,
        "towards": settings.towards,
        "space": "plain" if settings.plain else "folded",
        "found": found.found,
        "forced": settings.force and not found.found,
        "accuracy": found.accuracy,
        "interval": found.interval,
        "tested": found.tested,
        "fitted": found.used,
        "length_correlation": found.length_correlation,
        "C": found.C,
        "before": float(old.final @ u),
        "after": float(new.final @ u),
    }


def where_part(old: Captured, new: Captured, u: Tensor) -> dict[str, Any]:
    """The change of the mean projection on u, by what enters the residual stream."""
    along = lambda name: (getattr(new, name) - getattr(old, name)) @ u
    parts = {name: along(name) for name in ("embedding", "attention", "mlp")}
    total, whole = float(along("final")), float(sum(part.sum() for part in parts.values()))
    ends = {"before": float(old.final @ u), "after": float(new.final @ u)}
    named = {name: part.tolist() for name, part in parts.items()}
    return named | {"sum": whole, "total": total, "exact": abs(whole - total)} | ends
