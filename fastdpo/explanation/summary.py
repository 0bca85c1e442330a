"""The head of the page and of the console: what changed, in a few sentences."""

from fastdpo.explanation import words
from fastdpo.explanation.cause_words import patched, switched_off
from fastdpo.explanation.words import Made, looked_inside

_OUTSIDE = {
    "Weights": words.weights,
    "Behaviour": words.behaviour,
    "Shallow?": words.shallow,
    "Direction": words.direction,
}
_INSIDE = {
    "Where": words.where,
    "Neurons": words.neurons,
    "Patched": patched,
    "Switched off": switched_off,
}


def summary(made: Made) -> dict[str, str]:
    """{what it is about: a sentence}, those that there are numbers for."""
    if not made["changed"]:
        return {"Nothing changed": "Before and after are the same model, and the differences below are 0."}
    parts = _OUTSIDE | (_INSIDE if looked_inside(made) else {})
    return {name: sentence for name, part in parts.items() if (sentence := part(made))}
