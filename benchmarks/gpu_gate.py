"""Stage `gate`: the GPU tests. No speed claim stands on a red gate."""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import torch

from benchmarks.process import provenance


def main() -> int:
    """Runs `pytest -m gpu` (with --dry-run only collects) and records its verdict."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--dry-run", action="store_true")
    args = parser.parse_args()
    collect = ["--collect-only", "-q"] if args.dry_run else []
    start = time.perf_counter()
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-p", "no:cacheprovider", *collect]
    done = subprocess.run(command, capture_output=True, text=True)
    print(done.stdout[-6000:], done.stderr[-2000:])
    if not args.dry_run:
        passed = done.returncode == 0 and torch.cuda.is_available()  # all skipped is no pass
        record = {"passed": passed, "summary": done.stdout.splitlines()[-30:]}
        record |= {"seconds": time.perf_counter() - start} | provenance()
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(record, indent=1) + "\n")
        return 0 if passed else 1
    return done.returncode


if __name__ == "__main__":
    sys.exit(main())
