"""A round's training step in plain torch, as a worker: what everybody's losses are held against.

Every response is a padded row behind a prompt of its own, its logits in full, and the loss is written as it
is defined. Options: pairs; keys (`objective`: sigmoid or rloo); batch_size (prompts a microbatch).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.peers.hf_plain import padded, train_on
from benchmarks.peers.jobs import BETA, RoundJob
from benchmarks.peers.session import Session, serve
from fastdpo.records import PreferenceGroup

CLIP, KL_COEF = 0.2, 0.05  # rloo's, fastdpo's defaults


def sigmoid(groups: list[PreferenceGroup], logps: Tensor, reference: Tensor) -> Tensor:
    """Rafailov et al. 2023, eq. 7, summed over the pairs. logps: f32[R, L], 0 outside of the responses."""
    reward, losses, first = BETA * (logps - reference).sum(-1), [], 0
    for group in groups:
        losses += [-F.logsigmoid(reward[first + w] - reward[first + l]) for w, l, *_ in group.pairs]
        first += len(group.responses)
    return torch.stack(losses).sum()


def rloo(groups: list[PreferenceGroup], logps: Tensor, reference: Tensor) -> Tensor:
    """Of Ahmadian et al. 2024, eq. 8, PPO's surrogate around the policy that sampled, summed over the
    responses."""
    ratio, kl, out, first = (logps - reference).exp(), (logps - reference).sum(-1).detach(), [], 0
    for group in groups:
        n, row = len(group.responses), slice(first, first + len(group.responses))
        reward = torch.tensor([r.score for r in group.responses], device=kl.device) - KL_COEF * kl[row]
        advantage = (reward - (reward.sum() - reward) / (n - 1))[:, None]
        gain = torch.minimum(ratio[row] * advantage, ratio[row].clamp(1 - CLIP, 1 + CLIP) * advantage)
        lengths = [len(response.ids) for response in group.responses]
        start = len(group.prompt) - 1  # which predicts the first token
        out += [-one[start : start + length].sum() for one, length in zip(gain, lengths)]
        first += n
    return torch.stack(out).sum()


def train(message: dict, session: Session) -> None:
    job = RoundJob(**message)
    is_rloo = job.keys.get("objective") == "rloo"
    whole = sum(len(group.responses if is_rloo else group.pairs) for group in job.groups[0])

    def collated(groups: list[PreferenceGroup]) -> dict[str, Tensor]:
        rows = [(group.prompt.tolist(), r.ids.tolist()) for group in groups for r in group.responses]
        return padded(rows, job.device)

    def part(groups: list[PreferenceGroup], logps: Tensor, reference: Tensor) -> Tensor:
        return (rloo if is_rloo else sigmoid)(groups, logps, reference) / whole

    train_on(job, job.groups, collated, part, session)


if __name__ == "__main__":
    serve(train)
