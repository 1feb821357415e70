"""What `scripts/bench runtime` measures: each function is a program, `python scripts/bench_runs.py NAME ARGUMENT…`,
that prints JSON.

Times are seconds; those called `at` are time.monotonic(), which all processes of a machine share.
"""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any


def model(config_file: str, out: str) -> None:
    """A checkpoint of random bf16 weights, small enough that everything stays finite."""
    import torch
    from safetensors.torch import save_file
    from shapes import llama

    config = json.loads(Path(config_file).read_text())
    torch.manual_seed(0)
    state = {
        name: torch.ones(shape, dtype=torch.bfloat16)
        if len(shape) == 1
        else torch.empty(shape, dtype=torch.bfloat16).normal_(0, 0.02)
        for name, (_, shape) in llama(config).items()
    }
    folder = Path(out)
    folder.mkdir()
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))


def ours_open(out: str, touch: str) -> dict[str, float]:
    """load_shard of rank 0, and one byte of every page."""
    from reshard.runtime import load_shard

    return _opened(lambda: load_shard(out, 0), touch)


def theirs_open(file: str, touch: str) -> dict[str, float]:
    """safetensors.torch.load_file of the same file."""
    from safetensors.torch import load_file

    return _opened(lambda: load_file(file), touch)


def _opened(load: Any, touch: str) -> dict[str, float]:
    import torch

    began = time.perf_counter()
    tensors = load()
    opened = time.perf_counter() - began
    if touch == "touch":
        for tensor in tensors.values():
            tensor.view(-1).view(torch.uint8)[::4096].max()
    return {"seconds": opened if touch == "open" else time.perf_counter() - began}


def theirs_first(source: str, tokens: str) -> dict[str, float]:
    """transformers with tp_plan="auto", as torchrun starts it: when the imports were done, and when the first token was
    known.
    """
    import torch
    from torch import distributed
    from transformers import AutoModelForCausalLM

    imported = time.monotonic()
    model = AutoModelForCausalLM.from_pretrained(source, tp_plan="auto", dtype=torch.bfloat16)
    ids = torch.tensor([[int(token) for token in tokens.split()]])
    model.generate(ids, max_new_tokens=1, do_sample=False)
    found = {"imported_at": imported, "first_at": time.monotonic()}
    rank = distributed.get_rank()
    distributed.destroy_process_group()
    return found if rank == 0 else {}


def ours_imports() -> dict[str, float]:
    """What `reshard generate` imports before it does anything."""
    import torch.distributed  # noqa: F401

    from reshard.runtime import generate, job, load  # noqa: F401
    from reshard.runtime.comm import collectives  # noqa: F401
    from reshard.runtime.model import decoder  # noqa: F401

    return {"imported_at": time.monotonic()}


def theirs_decode(source: str, tokens: str, most: str, threads: str) -> dict[str, float]:
    """transformers in one process: tokens per second after the first."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.generation.streamers import BaseStreamer

    class Clock(BaseStreamer):
        def __init__(self) -> None:
            self.at: list[float] = []

        def put(self, value: Any) -> None:
            self.at.append(time.perf_counter())

        def end(self) -> None: ...

    torch.set_num_threads(int(threads))
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    ids = torch.tensor([[int(token) for token in tokens.split()]])
    clock = Clock()
    model.generate(ids, max_new_tokens=int(most), min_new_tokens=int(most), do_sample=False, streamer=clock)
    first, last = clock.at[1], clock.at[-1]  # at[0] is the prompt
    return {"rate": (len(clock.at) - 2) / (last - first)}


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    found = globals()[sys.argv[1]](*sys.argv[2:])
    if found:
        print(json.dumps(found))
