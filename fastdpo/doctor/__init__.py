"""Is what computes here right? Small problems against fp64, each in a process that may die of it.

`settle_backends` is the trainer's: before anything is computed on a GPU it leaves out what is wrong there.
`fastdpo doctor` (command.py) shows all of it.
"""

import torch


def settle_backends(console) -> None:
    """On a GPU: leaves the head's and the attention's ways that fail or are inexact here to others, aloud;
    see ladder.settle. Without one nothing is done, and nothing imported."""
    if torch.cuda.is_available():
        from fastdpo.doctor.ladder import settle

        settle(console)
