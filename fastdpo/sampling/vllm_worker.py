"""The process that vLLM runs in: `python -m fastdpo.sampling.vllm_worker REQUEST.json`. A request in, answers
out, and it ends; it imports nothing of fastdpo's.

REQUEST.json: {"parent": the process that asks, "llm": arguments of vllm.LLM, "sampling": of
vllm.SamplingParams, "lora": an adapter's folder or null, "prompts": [{"ids", "seed"}], "answers": the file
that is written, a JSON line a prompt: the ids of each answer}.
"""

import ctypes
import json
import os
import signal
import sys
from pathlib import Path

_PR_SET_PDEATHSIG = 1


def answer(request: dict) -> list[list[list[int]]]:
    """The ids of each answer to each prompt."""
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    llm = LLM(**request["llm"])
    prompts = [{"prompt_token_ids": prompt["ids"]} for prompt in request["prompts"]]
    how = [SamplingParams(**request["sampling"], seed=prompt["seed"]) for prompt in request["prompts"]]
    lora = LoRARequest("policy", 1, request["lora"]) if request["lora"] else None
    made = llm.generate(prompts, how, use_tqdm=False, lora_request=lora)
    in_order = lambda outputs: sorted(outputs, key=lambda output: output.index)
    return [[list(output.token_ids) for output in in_order(one.outputs)] for one in made]


def end_with(parent: int) -> None:
    """Lets the kernel end this process when its parent ends, however that may be."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it has ended already
        sys.exit(1)


def main(path: str) -> None:
    request = json.loads(Path(path).read_text(encoding="utf-8"))
    end_with(request["parent"])
    # Scheduling is then as deterministic as vLLM can have it, and no process of its engine outlives this one.
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    lines = "".join(json.dumps(ids) + "\n" for ids in answer(request))
    part = Path(request["answers"] + ".part")
    part.write_text(lines, encoding="utf-8")
    os.replace(part, request["answers"])


if __name__ == "__main__":
    main(sys.argv[1])
