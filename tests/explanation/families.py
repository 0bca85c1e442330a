"""Tiny models of the families that fastdpo explain is tested on, and a second one of each."""

import torch

from fastdpo.explanation.places import find_places
from tests import tiny

# The norms that follow these models' MLPs compute in fp32, whatever the model's dtype.
POST_NORM = ("gemma2", "gemma3_text", "olmo2", "glm4", "hyperclovax")
FAMILIES = {
    "gpt2": {},
    "llama": {},
    "qwen2": {},
    "mistral": {},
    "gemma2": dict(head_dim=16),
    "gemma3_text": dict(head_dim=16),
    "olmo2": {},
    "glm4": {},
    "phi": {},  # parallel parts
    "phi3": {},
    "granite": dict(residual_multiplier=0.3, embedding_multiplier=3.0),
    "gpt_neox": {},
    "opt": {},  # no module of its own for the MLP
    "nanochat": {},  # its final norm is before the first layer, too
    "hyperclovax": dict(residual_multiplier=0.3),
}
MIXTURE = dict(num_local_experts=4, experts_implementation="eager")  # whose matmuls have an fp64


def limit(family):
    """How far an identity may be off, in units of the numbers' size."""
    return 1e-6 if family in POST_NORM else 1e-10


def policy_of(family, share=True, dtype=torch.float64, seed=0, **overrides):
    """(a policy, its places); every weight is away from where a fresh model has it: biases, norms."""
    policy = tiny.policy(family, dtype, **(FAMILIES.get(family, {}) | overrides))
    moved(policy, seed)
    policy.set_sharing(share)
    return policy, find_places(policy)


def moved(policy, seed):
    torch.manual_seed(seed)
    for parameter in policy.model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)


def hooks_on(policy):
    """How many hooks a model has."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return sum(len(getattr(module, kind)) for module in policy.model.modules() for kind in kinds)


def far(ours, theirs):
    """The largest difference, in units of the largest entry."""
    return float((ours.double() - theirs.double()).abs().max() / theirs.double().abs().max())
