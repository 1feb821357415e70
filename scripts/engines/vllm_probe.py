"""Asks vLLM what it holds: loads checkpoints the ordinary way at given sizes, and writes what each rank holds then.

Runs in vLLM's environment, which `learn_format` makes; knows nothing of reshard.

    python vllm_probe.py JOBS        a line of JSON each: {"model", "tp", "pp", "ep", "stages", "out"}

Of each job OUT.R.safetensors (R = pp_rank · tp + tp_rank) has what vLLM's own sharded_state loader would look for on
that rank; OUT.error says why there is none. vLLM is imported once; the ranks of a job are forked from there, on CPUs
with gloo. The compiled extension is replaced by an empty module: nothing here runs a kernel.
"""

import importlib
import json
import os
import sys
import tempfile
import time
import traceback
import types
from pathlib import Path
from typing import Any

sys.modules.setdefault("vllm._C", types.ModuleType("vllm._C"))
os.environ |= {
    "VLLM_LOGGING_LEVEL": "ERROR",
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_PLUGINS": "",
    "VLLM_CONFIGURE_LOGGING": "0",
    "TOKENIZERS_PARALLELISM": "false",
}
PATIENCE = 180  # seconds for one job


def held(job: dict[str, Any], rank: int, meeting: str) -> dict[str, Any]:
    """The tensors that the sharded_state loader would look for on this rank, after the ordinary load."""
    import torch
    from vllm.config import set_current_vllm_config
    from vllm.distributed import ensure_model_parallel_initialized, init_distributed_environment
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.model_loader import get_model_loader
    from vllm.model_executor.model_loader.sharded_state_loader import ShardedStateLoader
    from vllm.model_executor.model_loader.utils import initialize_model
    from vllm.utils.torch_utils import set_default_torch_dtype

    tp, pp = job["tp"], job["pp"]
    torch.set_num_threads(1)
    known(json.loads((Path(job["model"]) / "config.json").read_text()))
    config = EngineArgs(
        model=job["model"],
        tokenizer=None,
        skip_tokenizer_init=True,
        load_format="auto",
        tensor_parallel_size=tp,
        pipeline_parallel_size=pp,
        enable_expert_parallel=job["ep"],
        dtype=job.get("dtype", "float32"),
        enforce_eager=True,
        max_model_len=32,
        trust_remote_code=False,
        distributed_executor_backend="mp",
    ).create_engine_config()
    with set_current_vllm_config(config):
        init_distributed_environment(
            world_size=tp * pp,
            rank=rank,
            distributed_init_method=f"file://{meeting}",
            local_rank=rank,
            backend="gloo",
        )
        ensure_model_parallel_initialized(tp, pp)
        with set_default_torch_dtype(config.model_config.dtype):
            model = initialize_model(vllm_config=config)
        # what the load does not reach keeps these bits, and is told by them
        for tensor in model.state_dict().values():
            if tensor.numel() and tensor.is_floating_point() and tensor.dim() and tensor.is_contiguous():
                tensor.data.view(-1).view(torch.uint8).fill_(0x7F)
        get_model_loader(config.load_config).load_weights(model, config.model_config)
        return {
            name: tensor.detach().clone().contiguous()
            for name, tensor in ShardedStateLoader._filter_subtensors(model.state_dict()).items()
        }


def one_rank(rank: int, job: dict[str, Any], meeting: str) -> None:
    """Never returns to the caller's code: what goes wrong is written down."""
    from safetensors.torch import save_file

    ranks = job["tp"] * job["pp"]
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_RANK=str(rank))
    if job["pp"] > 1 and job.get("stages"):
        os.environ["VLLM_PP_LAYER_PARTITION"] = ",".join(map(str, job["stages"]))
    try:
        tensors = held(job, rank, meeting)
        temporary = f"{job['out']}.{rank}.tmp"
        save_file(tensors, temporary)
        Path(temporary).rename(f"{job['out']}.{rank}.safetensors")
    except BaseException as error:
        at = [f"{Path(frame.filename).name}:{frame.lineno}" for frame in traceback.extract_tb(error.__traceback__)]
        text = " ".join("".join(traceback.format_exception_only(error)).split())
        temporary = Path(f"{job['out']}.{rank}.tmp")
        temporary.write_text(json.dumps({"error": text[:2000], "at": at[-6:], "rank": rank}))
        temporary.rename(f"{job['out']}.error")
        os._exit(1)
    os._exit(0)


class Anything(types.ModuleType):
    """A module that has whatever is asked of it, none of which works."""

    __path__ = ()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return Anything(name)


def known(config: dict[str, Any]) -> None:
    """Let transformers read a config.json whose class would come with the checkpoint, as code: its keys as they are."""
    from transformers import CONFIG_MAPPING, AutoConfig, PretrainedConfig
    from vllm.transformers_utils.config import _CONFIG_REGISTRY

    kind = config["model_type"]
    if kind not in CONFIG_MAPPING and kind not in _CONFIG_REGISTRY:
        AutoConfig.register(kind, type("Published", (PretrainedConfig,), {"model_type": kind}))


def without_kernels() -> None:
    """What asks the machine for a kernel, or starts a process to look at a class, is answered here: nothing is run.

    Parameters are as they are created, before an engine's kernels want them otherwise: which kernel would be chosen
    does not matter to them.
    """
    import torch
    from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts
    from vllm.model_executor.layers.fused_moe.oracle.unquantized import UnquantizedMoeBackend
    from vllm.model_executor.models import registry

    registry._run_in_subprocess = lambda look: look()
    for name in ("torchvision", "torchvision.transforms", "torchvision.transforms.v2"):
        sys.modules.setdefault(name, Anything(name))  # image processors ask for it, which nobody will call
    for name in ("gelu_new", "gelu_fast", "gelu_quick"):
        if not hasattr(torch.ops._C, name):
            setattr(torch.ops._C, name, None)
    method = importlib.import_module("vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method")
    method.select_unquantized_moe_backend = lambda **_: (UnquantizedMoeBackend.CPU, CPUUnquantizedExperts)


def run(job: dict[str, Any]) -> str:
    """Fork the ranks of one job and wait for them; what went wrong, or nothing."""
    ranks = job["tp"] * job["pp"]
    with tempfile.TemporaryDirectory() as folder:
        children = {}
        for rank in range(ranks):
            pid = os.fork()
            if pid == 0:
                one_rank(rank, job, f"{folder}/meeting")
            children[pid] = rank
        end, failed = time.monotonic() + PATIENCE, False
        while children and time.monotonic() < end and not failed:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                time.sleep(0.02)
                continue
            children.pop(pid, None)
            failed |= status != 0
        for pid in children:
            os.kill(pid, 9)
            os.waitpid(pid, 0)
        path = Path(f"{job['out']}.error")
        if (failed or children) and not path.exists():
            path.write_text(json.dumps({"error": "killed, or no answer in time", "at": [], "rank": -1}))
        return json.loads(path.read_text())["error"] if path.exists() else ""


def main() -> None:
    import torch  # noqa: F401 - imported once, then forked
    import vllm.engine.arg_utils
    import vllm.model_executor.model_loader
    import vllm.model_executor.models.llama
    import vllm.model_executor.models.mixtral  # noqa: F401

    without_kernels()
    lines = Path(sys.argv[1]).read_text().splitlines()
    os.chdir(tempfile.gettempdir())
    for line in lines:
        job, start = json.loads(line), time.monotonic()
        wrong = run(job)
        print(f"{Path(job['out']).name}: {wrong[:150] or 'ok'} ({time.monotonic() - start:.1f} s)", flush=True)


if __name__ == "__main__":
    main()
