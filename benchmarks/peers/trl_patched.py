"""TRL's DPOTrainer after `fastdpo.integrations.trl.patch()`: the worker of trl_dpo.py, plus one line."""

import fastdpo.integrations.trl as fast
from benchmarks.peers.session import serve
from benchmarks.peers.trl_dpo import train

if __name__ == "__main__":
    fast.patch()
    serve(train)
