"""What is installed as `vllm` by the tests of its engine: it takes a request as vLLM does, notes it, and
answers without a model. A package of its own, for a process to find."""

from pathlib import Path

SOURCE = """
import json, os, sys
from pathlib import Path
from types import SimpleNamespace

HERE = Path(__file__).parent
MODE = (HERE / "mode").read_text()
noted = {"pid": os.getpid(), "multiprocessing": os.environ.get("VLLM_ENABLE_V1_MULTIPROCESSING")}
noted["environment"], noted["imported"] = sorted(os.environ), sorted(sys.modules)


class SamplingParams:
    def __init__(self, *, n=1, temperature=1.0, top_p=1.0, top_k=0, seed=None, stop_token_ids=None,
                 max_tokens=16, detokenize=True):
        self.__dict__.update(vars(), self=None)


class LLM:
    def __init__(self, model, *, tokenizer=None, dtype="auto", max_model_len=None, generation_config="auto",
                 gpu_memory_utilization=0.9, enable_lora=False, max_lora_rank=16):
        noted["llm"] = {name: value for name, value in vars().items() if name != "self"}
        if MODE == "raises":
            print("loading it", file=sys.stderr)
            raise ValueError("No available memory for the cache blocks.")
        if MODE == "dies":
            os.abort()
        if MODE == "hangs":
            with open(HERE / "pipe", "w") as pipe:  # open as long as this process lives
                pipe.write("ready\\n")
                pipe.flush()
                while True:
                    import signal
                    signal.pause()
        if MODE == "loads":
            from transformers import AutoModelForCausalLM, AutoTokenizer
            loaded = AutoModelForCausalLM.from_pretrained(model)
            noted["logits"] = loaded(input_ids=loaded.dummy_inputs["input_ids"]).logits.flatten().tolist()[:9]
            noted["tokens"] = len(AutoTokenizer.from_pretrained(tokenizer))

    def generate(self, prompts, sampling_params, *, use_tqdm=True, lora_request=None):
        noted["prompts"] = [prompt["prompt_token_ids"] for prompt in prompts]
        noted["sampling"] = [vars(one) for one in sampling_params]
        noted["lora"] = lora_request and [lora_request.name, lora_request.id, lora_request.path]
        if lora_request:
            noted["files"] = sorted(os.listdir(lora_request.path))
        (HERE / "noted.json").write_text(json.dumps(noted))
        made = []
        for prompt, how in zip(prompts, sampling_params):
            answer = lambda index: [3 + how.seed % 90, 3 + index, *how.stop_token_ids, 9][: how.max_tokens]
            n = how.n - (MODE == "too few")
            # the last first: who asked has to put them in order
            outputs = [SimpleNamespace(index=i, token_ids=tuple(answer(i))) for i in reversed(range(n))]
            made.append(SimpleNamespace(outputs=outputs))
        return made[1:] if MODE == "misses one" else made
"""
REQUEST = """
class LoRARequest:
    def __init__(self, lora_name, lora_int_id, lora_path):
        self.name, self.id, self.path = lora_name, lora_int_id, lora_path
"""


def install(folder: Path, mode: str = "answers") -> Path:
    """The package in a folder; in it is noted.json, once it was asked."""
    package = folder / "vllm"
    (package / "lora").mkdir(parents=True)
    (package / "__init__.py").write_text(SOURCE)
    (package / "lora/__init__.py").write_text("")
    (package / "lora/request.py").write_text(REQUEST)
    (package / "mode").write_text(mode)
    return package
