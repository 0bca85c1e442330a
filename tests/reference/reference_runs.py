"""Loading a reference as a stage does, and counting what was computed for it."""

import os

from rich.console import Console

from fastdpo.data.beginnings import once
from fastdpo.data.packing import in_row_order
from fastdpo.reference.fill import load_reference
from tests import tiny

CAP = 60  # tokens of a pack: a few of the groups below


def make_groups(n, first=0, vocab=tiny.VOCAB):
    """n groups of 1 to 4 responses; rows from `first` on."""
    lengths = lambda row: [1 + (row * 7 + 3 * j) % 11 for j in range(1 + row % 4)]
    return [tiny.group(row, 1 + row % 13, lengths(row), vocab=vocab) for row in range(first, first + n)]


class Counted:
    """A policy that shares prompts, and how often it was asked."""

    def __init__(self, policy=None, share=True):
        self.policy, self.batches = policy or tiny.policy(), []
        self.policy.set_sharing(share)
        token_logp = self.policy.token_logp

        def counted(batch, *stats):
            self.batches.append(batch.rows)
            return token_logp(batch, *stats)

        self.policy.token_logp = counted

    def load(self, path, *sets, check=lambda: None, fresh_lora=False, max_tokens=CAP, **keys):
        """(the table, what was said)."""
        self.batches.clear()
        console = Console(record=True, file=open(os.devnull, "w"), width=1000)
        table = load_reference(
            self.policy,
            list(sets),
            path=path,
            fresh_lora=fresh_lora,
            max_tokens=max_tokens,
            console=console,
            check=check,
            **keys,
        )
        return table, console.export_text()


def packs_of(groups, cap=CAP):
    """The rows of each pack of training rows."""
    return [tuple(g.row for g in part) for part in in_row_order(once(groups)[0], cap)]
