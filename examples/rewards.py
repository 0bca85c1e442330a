"""What scores answers in drpo.yaml and online_dpo.yaml: a function of prompts and answers, a number each."""

from fastdpo.demo import DISHES


def ingredients(prompts: list[str], answers: list[str]) -> list[float]:
    """The share of the dish's ingredients that the answer names."""
    return [_score(prompt, answer) for prompt, answer in zip(prompts, answers)]


def _score(prompt: str, answer: str) -> float:
    asked = [dish for dish in DISHES if dish in prompt]
    if not asked:
        return 0.0
    wanted = DISHES[asked[0]]
    return sum(ingredient in answer for ingredient in wanted) / len(wanted)
