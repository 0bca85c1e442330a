"""Log-probs for the tests of losses, from sums or from tokens, without a model."""

import torch

from fastdpo.records import ResponseLogps


def of_tokens(lengths, token_logp, ref_token_logp=None, pairs=None, **fields):
    """ResponseLogps of responses of these lengths. Without `pairs`: winners first, then their losers."""
    cu_resp = torch.tensor([0, *lengths]).cumsum(0)
    half = len(lengths) // 2
    pairs = [(i, half + i) for i in range(half)] if pairs is None else pairs
    paired_tokens = sum(lengths[winner] + lengths[loser] for winner, loser in pairs)
    pairs = torch.tensor(pairs, dtype=torch.int64).view(-1, 2)
    values = dict(
        offset=torch.zeros(len(pairs)),
        weight=torch.ones(len(pairs)),
        chosen=torch.tensor(sorted(set(range(len(lengths))) - set(pairs[:, 1].tolist())), dtype=torch.int64),
        desirable=pairs[:, 0],
        undesirable=pairs[:, 1],
        paired_tokens=paired_tokens,
        score=torch.full((len(lengths),), torch.nan),
        group=torch.zeros(len(lengths), dtype=torch.int64),
        old_token_logp=None,
        token_weight=None,
        token_stats={},
    )
    return ResponseLogps(
        token_logp=token_logp,
        ref_token_logp=ref_token_logp,
        cu_resp=cu_resp,
        pairs=pairs,
        **(values | fields),
    )


def of_sums(policy_w, policy_l, ref_w, ref_l, lengths_w=None, lengths_l=None, dtype=torch.float64, **fields):
    """(ResponseLogps, its token log-probs) of pairs by the sums of their responses, split over their tokens
    unevenly; the reference split differently."""
    count = len(policy_w)
    lengths = [*(lengths_w or [2] * count), *(lengths_l or [2] * count)]
    draw = torch.Generator().manual_seed(0)

    def split(sums):
        out = []
        for total, n in zip(sums, lengths):
            share = torch.rand(n, generator=draw, dtype=torch.float64) + 0.1
            out.append(total * share / share.sum())
        return torch.cat(out).to(dtype)

    token_logp = split([*policy_w, *policy_l]).requires_grad_()
    return of_tokens(lengths, token_logp, split([*ref_w, *ref_l]), **fields), token_logp


def random_logps(seed=0, n_pairs=6, dtype=torch.float64, spread=1.0, graph=False, stats=True):
    """(ResponseLogps, its token log-probs): pairs, or with `graph` any pair graph over a few responses, with
    ordered scores, token weights and statistics."""
    draw = torch.Generator().manual_seed(seed)
    n = 2 * n_pairs
    lengths = torch.randint(1, 9, (n,), generator=draw).tolist()
    rand = lambda size: torch.rand(size, generator=draw, dtype=torch.float64)
    total = sum(lengths)
    token_logp = (-3 * rand(total)).to(dtype).requires_grad_()
    ref = (token_logp.detach() + spread * torch.randn(total, generator=draw).double()).to(dtype)
    score = (5 * rand(n) + 0.1).sort(descending=True).values
    pairs = None
    if graph:
        every = [(i, j) for i in range(n) for j in range(i + 1, n)]
        keep = rand(len(every)) < 0.3
        pairs = [pair for pair, kept in zip(every, keep) if kept] or [(0, 1)]
    fields = dict(score=score.to(dtype), token_weight=rand(total).to(dtype))
    if stats:
        fields["token_stats"] = {"log_sum_sq_probs": (-3 * rand(total)).to(dtype)}
    return of_tokens(lengths, token_logp, ref, pairs, context={"z0": torch.tensor(0.3)}, **fields), token_logp


def bits(objective, logps, token_logp):
    """The loss and its gradient."""
    loss = objective.whole(logps)
    return loss.detach(), torch.autograd.grad(loss, token_logp)[0]
