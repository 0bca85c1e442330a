"""The reference's log-probs that the data itself brings: TRL's columns ref_chosen_logps and
ref_rejected_logps, one sum a response."""

import numpy as np
import torch
from torch import Tensor

from fastdpo.data.store.facts import Facts
from fastdpo.data.store.stored import facts_of
from fastdpo.records import Groups

_EXAMPLES = 5


class ReferenceColumns:
    """The columns, in the place of a reference that is computed.

    Known are the sums over responses only. `of` spreads each evenly over its tokens so that they add up
    to it again (within 1.2e-7 of it: one rounding to fp32 of a token's share, and one of the sum), so
    what it says of a single token means nothing: `per_token` is False, and whatever looks at single
    tokens of the reference must refuse it.
    """

    per_token = False

    def __init__(self, sets: list[Groups]):
        responses = sum(len(facts_of(groups).key) for groups in sets)
        self.account = {"source": "columns", "responses": responses}

    def of(self, groups: Groups) -> Tensor:
        """f32[M] on the CPU, in the order of pack(groups)."""
        for group in groups:
            if any(response.ref_logp is None for response in group.responses):
                raise ValueError(f"row {group.row}: not among the rows this reference was made for")
        responses = [response for group in groups for response in group.responses]
        lengths = np.array([int(response.target_mask.sum()) for response in responses])
        sums = np.array([response.ref_logp for response in responses], np.float64)
        return torch.from_numpy(np.repeat((sums / lengths).astype(np.float32), lengths))


def reference_columns(sets: list[Groups], console) -> ReferenceColumns | None:
    """The columns of the training rows and the held-out rows, where every one of them has them; says
    that they are used, or why not. None without a word where there are none."""
    facts = [facts_of(groups) for groups in sets[:2]]
    rows, without = sum(map(len, facts)), [_rows_without(some) for some in facts]
    unknown = sum(map(len, without))
    if unknown == rows:
        return None
    if unknown:
        named = [(name, row) for name, some in zip(("", "held-out "), without) for row in some[:_EXAMPLES]]
        shown = ", ".join(f"{name}{row}" for name, row in named[:_EXAMPLES])
        more = ", ..." if unknown > _EXAMPLES else ""
        note = (
            f"[yellow]reference: ref_chosen_logps and ref_rejected_logps can be used in "
            f"{rows - unknown:,} of {rows:,} rows (not in rows {shown}{more}, which lack them "
            "or are not scored whole): the reference is computed instead"
        )
    else:
        note = "reference: the ref_chosen_logps and ref_rejected_logps columns of the data "
        note += "(sums; no reference forward)"
    console.print(note, highlight=False, soft_wrap=True)
    return None if unknown else ReferenceColumns(sets)


def _rows_without(facts: Facts) -> np.ndarray:
    """The rows of the groups that lack one."""
    return facts.row[facts.per_group(np.isnan(facts.ref_logp)) > 0]
