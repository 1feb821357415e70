"""A job of `reshard generate`: what every rank does, from prompts to text, and the account of it that rank 0 gives.

The only module that knows text, ranks and models at once. stdout carries the text, or one JSON object; stderr the account.
"""

import json
import os
import resource
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reshard.errors import ReshardError
from reshard.layout.mesh import Mesh
from reshard.store.directory import Directory
from reshard.text.escapes import in_json, visible
from reshard.text.units import binary, decimal

from .comm.launch import Tell
from .text import Stream, Tokenizer, generation_config, stop_tokens

if TYPE_CHECKING:
    from .comm.collectives import World
    from .generate import Generated
    from .model.decoder import Decoder

_READ = 256 << 20  # bytes that each rank reads at most, to learn how fast the machine is
_PIECE = 4 << 10  # bytes of a tensor that are worth reading for that
_LONGEST = 1_000_000  # seconds of a timeout
DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Job:
    """What was asked for. A prompt is text, or a list of token ids, or a list of messages; None: rank 0 reads `file` first."""

    out: Path
    prompts: tuple[Any, ...] | None
    file: str | None = None
    mesh: Mesh | None = None
    most: int = 128
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0
    chat: bool | None = None
    dtype: str | None = None
    device: str = "cpu"
    verify: str | None = None
    timeout: float = 60.0
    as_json: bool = False
    quiet: bool = False
    began: float = 0.0  # time.monotonic()

    def __post_init__(self) -> None:
        if not 0 < self.timeout <= _LONGEST:
            raise ReshardError(f"--timeout {self.timeout:g}: a number of seconds is needed, at most {_LONGEST}", "60 is usual")

    def ready(self) -> "Job":
        """With the prompts read."""
        return self if self.prompts is not None else replace(self, prompts=read_prompts(self.file or "-"))


def read_prompts(file: str) -> tuple[Any, ...]:
    """A prompt per line of a file, or of stdin for `-`.

    A line that begins with `{` is JSON: {"prompt": …}, {"tokens": […]} or {"messages": […]}.
    """
    try:
        text = sys.stdin.read() if file == "-" else Path(file).read_text(encoding="utf-8")
    except OSError as error:
        raise ReshardError(f"{file}: cannot be read: {error.strerror}", "give a file of prompts, one per line") from None
    except UnicodeDecodeError as error:
        raise ReshardError(f"{file}: is no text in UTF-8: {error.reason} at byte {error.start}") from None
    found: list[Any] = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        found.append(_from_json(line, f"{file}: line {number}") if line.startswith("{") else line)
    if not found:
        raise ReshardError(f"{file}: has no prompt", "one per line is needed")
    return tuple(found)


def _from_json(line: str, where: str) -> Any:
    hint = 'a JSON line is {"prompt": "…"}, {"tokens": [1, 2, …]} or {"messages": [{"role": "user", "content": "…"}, …]}'
    try:
        data = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ReshardError(f"{where} begins like JSON and is none: {error}", hint) from None
    for key, fits in _FORMS.items():
        if key in data:
            if not fits(data[key]):
                raise ReshardError(f"{where}: {key} is not of the right form: {json.dumps(data[key])[:100]}", hint)
            return data[key]
    raise ReshardError(f"{where} has none of {', '.join(_FORMS)}", hint)


def _every(kind: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and bool(value) and all(map(kind, value))


_FORMS: dict[str, Callable[[Any], bool]] = {
    "prompt": lambda value: isinstance(value, str),
    "tokens": _every(lambda token: type(token) is int),
    "messages": _every(lambda message: isinstance(message, dict) and "role" in message and "content" in message),
}


def ranks_wanted(job: Job) -> int:
    """How many ranks a job on this machine has: as the mesh says, or the directory. Raises ReshardError where there is none."""
    from reshard.checkpoints import hub, manifest

    if not job.out.is_dir():
        text = str(job.out)
        if hub.is_id(text):
            raise ReshardError(
                f"{text}: there is no such directory, and a model on the Hub has to be converted first",
                f"reshard convert {text} OUT --tp 2, then reshard generate OUT",
            )
        raise ReshardError(f"{text}: no such directory", "give a directory that `reshard convert` wrote, or a published checkpoint")
    if any(not isinstance(prompt, list) or isinstance(prompt[0] if prompt else 0, dict) for prompt in job.prompts or ("",)):
        Tokenizer(job.out)  # an error that need not wait
    if job.mesh is not None:
        return job.mesh.world
    return manifest.load(job.out).mesh.world if manifest.present(job.out) else 1


def start(job: Job) -> None:
    """All ranks, on this machine; or this one rank, where torchrun started it."""
    if {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys():
        _torch()
        one_rank(job, None, lambda _: None)
        return
    from .comm.launch import launch

    job = job.ready()
    size = ranks_wanted(job)
    _torch()
    launch(size, lambda rank, tell: one_rank(job, size, tell), job.timeout)


def _torch() -> None:
    """Import it, so that ranks which are forked need not. Raises ReshardError where it is missing."""
    try:
        import torch.distributed
    except ImportError:
        raise ReshardError("running a model needs PyTorch, which is not installed", "pip install 'reshard[runtime]'") from None
    if not torch.distributed.is_available():
        raise ReshardError("this PyTorch was built without torch.distributed", "pip install 'reshard[runtime]'")


def one_rank(job: Job, forked: int | None, tell: Tell) -> None:
    """Everything that one rank does. `forked`: how many ranks there are, where they are forks of one process."""
    from .comm.collectives import joined

    tell("start")
    device = _device(job.device, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    with joined("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", forked, job.timeout) as world:
        _work(job, world, device, tell)


def _device(name: str, ranks: int) -> Any:
    import torch

    if name == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ReshardError("--device cuda: PyTorch finds no GPU here", "--device cpu")
    number, count = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if ranks > count:
        raise ReshardError(f"--device cuda: {ranks} ranks on this machine, {count} GPUs", f"--tp {count} reshards on load")
    torch.cuda.set_device(number)
    return torch.device("cuda", number)


def _work(job: Job, world: "World", device: Any, tell: Tell) -> None:
    import torch

    from .comm.collectives import gathered
    from .generate import Options, check, generate
    from .load import load_model
    from .model.spec import POSITIONS
    from .sampling import Sampling

    directory = Directory(job.out)
    said = generation_config(job.out)
    sampling = Sampling.of(said, job.temperature, job.top_k, job.top_p, job.seed, job.out)
    joined = time.monotonic()
    talk = _Talk(job) if world.rank == 0 else None
    prompts: list[list[int]] = gathered(world, talk.encoded() if talk else None, "prompts")[0]
    tell("load")
    decoder = load_model(
        job.out,
        getattr(torch, job.dtype) if job.dtype else None,
        device,
        mesh=job.mesh,
        world=world,
        verify=job.verify,
        timeout=job.timeout,
    )
    loaded = time.monotonic()
    config = _config(job.out)
    directory.check()  # the tokenizer and these are of the model that was loaded
    limit = decoder.spec.positions or next((int(config[key]) for key in POSITIONS if config.get(key)), None)
    check(prompts, decoder.model.sizes["vocab"], limit)
    options = Options(job.most, sampling, stop_tokens(said, config, job.out, decoder.model.sizes["vocab"]), limit)
    try:
        done = generate(decoder, prompts, options, talk.token if talk else None, tell)
    except ReshardError:
        if talk is not None:
            talk.stop()
        raise
    ended = time.monotonic()
    tell("report")
    times = {
        "start": joined - job.began,
        "load": loaded - joined,
        "first_token": done.first,
        "decode": done.decoding,
        "total": ended - job.began,
    }
    about = _account(decoder, world, done, prompts, times)
    if talk is not None:
        talk.end(prompts, done, sampling, about)


def _config(root: Path) -> dict[str, Any]:
    """config.json with what `text_config` has laid over it."""
    from reshard.checkpoints.published import read_json

    found = read_json(root / "config.json")
    return found | (found.get("text_config") or {})


class _Talk:
    """What rank 0 says: prompts in, text out as it comes. The first text that has not ended is shown live, the next ones wait."""

    def __init__(self, job: Job) -> None:
        self.job = job.ready()
        self.prompts: Sequence[Any] = self.job.prompts or ()
        self.live, self.waiting = 0, [""] * len(self.prompts)
        self.over = [False] * len(self.prompts)
        self._tokenizer: Tokenizer | None = None
        with suppress(ReshardError):
            self._tokenizer = Tokenizer(job.out)
        self._streams = [Stream(self._tokenizer) if self._tokenizer else None for _ in self.prompts]
        template = self._tokenizer is not None and self._tokenizer.template is not None
        self.chat = template if job.chat is None else job.chat
        self._shown = False
        self._terminal = sys.stdout is not None and sys.stdout.isatty()  # a text is data, and is shown so that it does no harm

    def encoded(self) -> list[list[int]]:
        """The token ids of every prompt."""
        found: list[list[int]] = []
        chats: dict[int, list[dict[str, Any]]] = {}  # number of a prompt → a conversation
        for number, prompt in enumerate(self.prompts):
            found.append(prompt if isinstance(prompt, list) else [])
            if isinstance(prompt, list) and not any(isinstance(part, dict) for part in prompt):
                continue
            tokenizer = self._tokenizer or Tokenizer(self.job.out)  # which says why there is none
            if isinstance(prompt, list):
                chats[number] = prompt
            elif self.chat:
                chats[number] = [{"role": "user", "content": prompt}]
            else:
                found[number] = tokenizer.encode(prompt)
                self.waiting[number] = prompt  # a text is shown from its beginning
        if chats and self._tokenizer:
            for number, ids in zip(chats, self._tokenizer.chats([*chats.values()], self.job.timeout), strict=True):
                found[number] = ids
        return found

    def token(self, prompt: int, token: int | None, reason: str | None) -> None:
        if self.job.as_json:
            return
        stream = self._streams[prompt]
        if token is None:
            self.over[prompt] = True
            self.waiting[prompt] += stream.end() if stream else ""
        else:
            self.waiting[prompt] += stream.put(token) if stream else f"{token} "
        self._show()

    def _show(self) -> None:
        while self.live < len(self.prompts):
            if not self._shown and len(self.prompts) > 1:
                print(f"--- {self.live + 1}", flush=True)
            self._shown = True
            text, self.waiting[self.live] = self.waiting[self.live], ""
            sys.stdout.write(visible(text) if self._terminal else text)
            if not self.over[self.live]:
                break
            sys.stdout.write("\n")
            self.live, self._shown = self.live + 1, False
        sys.stdout.flush()

    def stop(self) -> None:
        """What was shown is all that there will be: what is said next begins a line."""
        if self._shown:
            with suppress(OSError):
                print(flush=True)

    def end(self, prompts: Sequence[Sequence[int]], done: "Generated", sampling: Any, about: dict[str, Any]) -> None:
        if self.job.as_json:
            texts = [
                {
                    "prompt": prompt if isinstance(prompt, str) else None,
                    "prompt_tokens": ids,
                    "text": self._tokenizer.decode(tokens) if self._tokenizer else None,
                    "tokens": tokens,
                    "finish": reason,
                }
                for prompt, ids, tokens, reason in zip(self.prompts, prompts, done.tokens, done.reasons, strict=True)
            ]
            drawn = {key: getattr(sampling, key) for key in ("temperature", "top_k", "top_p", "seed")}
            print(
                in_json(json.dumps({"model": str(self.job.out), "texts": texts, "sampling": drawn} | about, indent=1, ensure_ascii=False)),
                flush=True,
            )
        elif not self.job.quiet:
            print(visible("\n" + "\n".join(_lines(about))), file=sys.stderr, flush=True)


# --- the account -----------------------------------------------------------------------------------------------------------------


def _account(
    decoder: "Decoder", world: "World", done: "Generated", prompts: Sequence[Sequence[int]], times: dict[str, float]
) -> dict[str, Any]:
    """Rates, memory, and what the machine can do, over all ranks; called by all of them."""
    import torch

    tensors = list({parameter.data_ptr(): parameter for parameter in decoder.parameters()}.values())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    mine = [sum(t.nbytes for t in tensors), done.cache, touched(decoder, len(prompts)), peak, done.exchanging, *_reading(tensors, world)]
    every = world.all_gather(torch.tensor([mine], dtype=torch.float64), range(world.size), [1] * world.size, 0, "account").tolist()
    weights, caches, per_step, peaks, exchanging, read, seconds = (list(column) for column in zip(*every, strict=True))
    machine = sum(read) / max(*seconds, 1e-9) if any(seconds) else None
    rate = done.steps / done.decoding if done.steps else None
    spent = done.first + done.decoding
    return {
        "mesh": str(decoder.layout.mesh),
        "ranks": world.size,
        "threads": torch.get_num_threads(),
        "device": str(tensors[0].device.type),
        "seconds": {name: round(value, 6) for name, value in times.items()},
        "prompt_tokens": sum(map(len, prompts)),
        "new_tokens": sum(map(len, done.tokens)),
        "tokens_per_second": done.rate,
        "steps": done.steps,
        "bytes_per_step": int(sum(per_step)),
        "bandwidth": rate and sum(per_step) * rate,
        "machine_bandwidth": machine,
        "share_of_machine": rate and machine and sum(per_step) * rate / machine,
        "share_in_collectives": max(exchanging) / spent if spent else 0.0,
        "memory": {"weights": list(map(int, weights)), "cache": list(map(int, caches)), "peak": list(map(int, peaks))},
        "balance": max(weights) / (sum(weights) / len(weights)),
    }


def touched(decoder: "Decoder", batch: int) -> int:
    """Bytes of this rank's weights that one step reads: all, but a row per text of the embedding, and the experts that can be chosen."""
    state = dict(decoder.named_parameters())
    sizes, total = decoder.model.sizes, 0.0
    routing = decoder.spec.routing
    for name, tensor in state.items():
        share = 1.0
        if name in ("embed", "pos_embed") and (name != "embed" or "head" in state or "head" not in decoder.model.alias):
            share = min(1.0, batch / max(1, tensor.shape[0]))
        elif ".moe." in name and tensor.dim() == 3 and routing is not None:
            share = min(1.0, batch * routing.top / sizes["experts"])
        total += tensor.nbytes * share
    return int(total)


def _reading(tensors: Sequence[Any], world: "World") -> tuple[float, float]:
    """Bytes that this rank read of its weights while all others did so too, and the seconds that it took.

    Matrices are multiplied with a vector, which reads as quickly as anything; what has other types is added up.
    """
    import torch

    parts: list[tuple[int, Callable[[], Any]]] = []
    left = _READ
    for tensor in tensors:
        if not tensor.is_contiguous() or min(tensor.nbytes, left) < _PIECE:
            continue
        if tensor.dim() == 2 and tensor.dtype in (torch.bfloat16, torch.float32):
            matrix = tensor.detach()[: max(1, left // tensor[0].nbytes)]
            parts.append((matrix.nbytes, partial(torch.mv, matrix, torch.ones_like(matrix[0]))))
        else:
            flat = tensor.detach().reshape(-1)[: left // tensor.element_size()]
            flat = flat[: flat.numel() // 8 * 8].view(torch.int64)
            parts.append((flat.nbytes, flat.sum))
        left -= parts[-1][0]
    if not parts:
        return 0.0, 0.0
    for _, look in parts:
        look()  # once, so that no page is mapped while the clock runs
    world.meet("measuring the machine")
    synchronize: Callable[[], object] = torch.cuda.synchronize if tensors[0].is_cuda else lambda: None
    synchronize()
    size, read, began = sum(nbytes for nbytes, _ in parts), 0, time.perf_counter()
    while read == 0 or time.perf_counter() - began < 0.05:
        for _, look in parts:
            look()
        read += size
    synchronize()
    return float(read), time.perf_counter() - began


def _lines(about: dict[str, Any]) -> list[str]:
    """The account, for people."""
    seconds, memory = about["seconds"], about["memory"]
    ranks = f"{about['ranks']} process{'es' if about['ranks'] > 1 else ''} on {about['device']}"
    lines = [
        f"job          {about['mesh']}: {ranks}, {about['threads']} thread{'s' if about['threads'] > 1 else ''} each",
        f"start        {seconds['start']:.2f} s, load {seconds['load']:.2f} s",
        f"first token  {seconds['first_token'] * 1000:.1f} ms for {about['prompt_tokens']} tokens of prompts",
    ]
    if about["tokens_per_second"]:
        lines.append(f"decode       {about['tokens_per_second']:,.1f} tokens/s ({about['new_tokens']} tokens, {about['steps']} steps)")
        machine = ""
        if about["machine_bandwidth"]:
            machine = f", {about['share_of_machine']:.0%} of the {decimal(int(about['machine_bandwidth']))}/s that these ranks can read"
        lines.append(f"bandwidth    {decimal(int(about['bandwidth']))}/s of weights{machine}")
    lines.append(f"collectives  {about['share_in_collectives']:.0%} of the time")
    kinds = [f"{name} {_folded(memory[name])}" for name in ("weights", "cache", "peak")]
    lines.append(f"memory       {', '.join(kinds)} per rank")
    lines.append(f"balance      {about['balance']:.3f} (largest over mean)")
    return lines


def _folded(sizes: Sequence[int]) -> str:
    low, high = binary(min(sizes)), binary(max(sizes))
    return low if low == high else f"{low} to {high}"
