"""Does a real assistant learn the same as by TRL? 20 steps in fp32, of a LoRA and of all weights.

    python -m benchmarks.learning.real.parity [--dry-run] [--out DIR]

As benchmarks.learning.parity: the same rows (the demo's) in the same order, the same start weights; the loss
of every step must be TRL's within its LIMIT, and fall.
"""

import sys
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.learning import parity
from benchmarks.learning.real.start import QUIET, absent, installed
from benchmarks.results import stage_arguments, write_result
from fastdpo.model.adapters import add_lora
from fastdpo.model.loading import load_policy, load_tokenizer
from fastdpo.model.spec import ModelSpec

STEPS, RATES = 20, {"LoRA": 3e-4, "all weights": 1e-5}


def setting(name: str, dry_run: bool) -> parity.Setting:
    """The assistant's; of a dry run the demo's model."""
    if dry_run:
        with tempfile.TemporaryDirectory() as folder:
            model, tokenizer = parity.demo_start(Path(folder))
    else:
        spec = ModelSpec(model=str(installed()), dtype="fp32")
        model = load_policy(spec, QUIET).model.cpu()
        tokenizer = parity.without_space_after_turns(load_tokenizer(spec))
    if name == "LoRA":
        model = add_lora(model, ModelSpec(model="in memory", lora_rank=16))
    return parity.Setting(model, tokenizer, torch.float32, RATES[name], 2 if dry_run else STEPS)


def main() -> int:
    """Each of RATES, on one order of the rows."""
    args = stage_arguments(__doc__)
    if not args.dry_run and (why := absent(None)):
        print(why)
        return 2
    results = {}
    for name in RATES:
        results[name] = parity.measure(setting(name, args.dry_run), 1, until=time.monotonic())
        print(parity.tell(name, results[name]))
        write_result("parity_real", {"limit": parity.LIMIT, "results": results}, args.out)
    return 1 if not args.dry_run and any(r["same"] is False for r in results.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
