"""The reference's log-probs that the data itself brings: TRL's columns ref_chosen_logps and
ref_rejected_logps, one sum a response."""

import numpy as np
import torch
from torch import Tensor

from fastdpo.records import Groups, PreferenceGroup

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
        responses = sum(len(group.responses) for groups in sets for group in groups)
        self.account = {"source": "columns", "responses": responses}

    def of(self, groups: Groups) -> Tensor:
        """f32[M] on the CPU, in the order of pack(groups)."""
        if unknown := [group.row for group in groups if not _known(group)]:
            raise ValueError(f"row {unknown[0]}: not among the rows this reference was made for")
        responses = [response for group in groups for response in group.responses]
        lengths = np.array([int(response.target_mask.sum()) for response in responses])
        sums = np.array([response.ref_logp for response in responses], np.float64)
        return torch.from_numpy(np.repeat((sums / lengths).astype(np.float32), lengths))


def reference_columns(sets: list[Groups], console) -> ReferenceColumns | None:
    """The columns of the training rows and the held-out rows, where every one of them has them; says
    that they are used, or why not. None without a word where there are none."""
    rows = [(name, group) for name, groups in zip(("", "held-out "), sets) for group in groups]
    without = [(name, group.row) for name, group in rows if not _known(group)]
    if len(without) == len(rows):
        return None
    if without:
        shown = ", ".join(f"{name}{row}" for name, row in without[:_EXAMPLES])
        more = ", ..." if len(without) > _EXAMPLES else ""
        note = (
            f"[yellow]reference: ref_chosen_logps and ref_rejected_logps can be used in "
            f"{len(rows) - len(without):,} of {len(rows):,} rows (not in rows {shown}{more}, which lack them "
            "or are not scored whole): the reference is computed instead"
        )
    else:
        note = "reference: the ref_chosen_logps and ref_rejected_logps columns of the data "
        note += "(sums; no reference forward)"
    console.print(note, highlight=False, soft_wrap=True)
    return None if without else ReferenceColumns(sets)


def _known(group: PreferenceGroup) -> bool:
    return all(response.ref_logp is not None for response in group.responses)
