"""A job of `reshard generate`: what each rank does, from prompts to text, and the statistics that rank 0 prints.

The only module that knows about text, ranks and models at once. stdout has the text, or one JSON object; stderr the
statistics.
"""

import json
import os
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reshard.errors import ReshardError, unusable
from reshard.layout.mesh import Mesh
from reshard.store.directory import Directory
from reshard.text.escapes import in_json, visible

from .comm.launch import Report
from .prompts import Prompt, encoded, read_prompts
from .statistics import lines, statistics
from .text import Stream, Tokenizer, generation_config, stop_tokens

if TYPE_CHECKING:
    from .comm.collectives import World
    from .generate import Generated

_LONGEST = 1_000_000  # seconds of a timeout


@dataclass(frozen=True)
class Job:
    """A request. A prompt is a text, or a list of token ids or of messages; None: they are read from `file`."""

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
            raise ReshardError(
                f"--timeout {self.timeout:g}: must be above 0 and at most {_LONGEST} seconds", "60 is the default"
            )

    def read(self) -> "Job":
        """The job with its prompts."""
        return self if self.prompts is not None else replace(self, prompts=read_prompts(self.file or "-"))

    def encode(self) -> tuple[Prompt, ...]:
        """Its prompts as token ids. Runs the chat template, for which no rank waits: it may take `timeout`."""
        return encoded(self.prompts or (), cache(lambda: Tokenizer(self.out)), self.chat, self.timeout)


def ranks_wanted(job: Job) -> int:
    """How many ranks a job on this machine has, by its mesh or the directory. Raises ReshardError if there is none."""
    from reshard.checkpoints import manifest
    from reshard.store import hub

    if not job.out.is_dir():
        text = str(job.out)
        if hub.is_id(text):
            raise ReshardError(
                f"{text}: no such directory; a model on the Hub must be converted first",
                f"reshard convert {text} OUT --tp 2, then reshard generate OUT",
            )
        raise ReshardError(
            f"{text}: no such directory", "pass a directory written by `reshard convert`, or a published checkpoint"
        )
    if job.mesh is not None:
        return job.mesh.world
    return manifest.load(job.out).mesh.world if manifest.present(job.out) else 1


def start(job: Job) -> None:
    """Run all ranks on this machine, or this one rank if torchrun started it.

    Prompts are encoded before ranks meet: a chat template that runs too long is an error of its own, not a lost rank.
    """
    if {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys():
        prompts = job.read().encode() if os.environ["RANK"] == "0" else ()
        _torch()
        one_rank(job, prompts, None, lambda _: None)
        return
    from .comm.launch import launch

    job = job.read()
    size = ranks_wanted(job)
    prompts = job.encode()
    _torch()
    launch(size, lambda rank, report: one_rank(job, prompts, size, report), job.timeout)


def _torch() -> None:
    """Import torch, so that forked ranks need not. Raises ReshardError if it is missing."""
    if (why := unusable("torch.distributed", "PyTorch")) is not None:
        raise ReshardError(f"running a model needs PyTorch: {why}", "pip install 'reshard[runtime]'")
    import torch.distributed

    if not torch.distributed.is_available():
        raise ReshardError("this PyTorch was built without torch.distributed", "pip install 'reshard[runtime]'")


def one_rank(job: Job, prompts: Sequence[Prompt], forked: int | None, report: Report) -> None:
    """Everything that one rank does. `prompts`: rank 0 needs them; `forked`: the number of ranks, if they are forks."""
    from .comm.processes import joined

    report("start")
    device = _device(job.device, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    with joined("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", forked, job.timeout) as world:
        _work(job, prompts, world, device, report)


def _device(name: str, ranks: int) -> Any:
    import torch

    if name == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ReshardError("--device cuda: PyTorch finds no GPU", "--device cpu")
    number, count = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if ranks > count:
        raise ReshardError(
            f"--device cuda: {ranks} ranks on this machine, but only {count} GPUs",
            f"--tp {count} reshards the model on load",
        )
    torch.cuda.set_device(number)
    return torch.device("cuda", number)


def _work(job: Job, given: Sequence[Prompt], world: "World", device: Any, report: Report) -> None:
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
    console = _Console(job, given) if world.rank == 0 else None
    prompts: list[list[int]] = gathered(world, [prompt.ids for prompt in given] if console else None, "prompts")[0]
    report("load")
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
    directory.check()  # the tokenizer and config belong to the model that was loaded
    limit = decoder.spec.positions or next((int(config[key]) for key in POSITIONS if config.get(key)), None)
    check(prompts, decoder.model.sizes["vocab"], limit)
    options = Options(job.most, sampling, stop_tokens(said, config, job.out, decoder.model.sizes["vocab"]), limit)
    try:
        done = generate(decoder, prompts, options, console.token if console else None, report)
    except ReshardError:
        if console is not None:
            console.stop()
        raise
    ended = time.monotonic()
    report("report")
    times = {
        "start": joined - job.began,
        "load": loaded - joined,
        "first_token": done.first,
        "decode": done.decoding,
        "total": ended - job.began,
    }
    about = statistics(decoder, world, done, prompts, times)
    if console is not None:
        console.end(done, sampling, about)


def _config(root: Path) -> dict[str, Any]:
    """config.json, overlaid with its `text_config`."""
    from reshard.checkpoints.published import read_json

    found = read_json(root / "config.json")
    return found | (found.get("text_config") or {})


class _Console:
    """The console of rank 0: prompts in, text out as it arrives, one text at a time; later ones are buffered."""

    def __init__(self, job: Job, prompts: Sequence[Prompt]) -> None:
        self.job = job
        self.prompts = prompts
        self.live, self.waiting = 0, [prompt.echo for prompt in prompts]
        self.over = [False] * len(prompts)
        self._tokenizer: Tokenizer | None = None
        with suppress(ReshardError):
            self._tokenizer = Tokenizer(job.out)
        self._streams = [Stream(self._tokenizer) if self._tokenizer else None for _ in prompts]
        self._shown = False
        # On a terminal, control characters of a text are escaped.
        self._terminal = sys.stdout is not None and sys.stdout.isatty()

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
        """End the output, so that what is printed next starts on a new line."""
        if self._shown:
            with suppress(OSError):
                print(flush=True)

    def end(self, done: "Generated", sampling: Any, about: dict[str, Any]) -> None:
        if self.job.as_json:
            texts = [
                {
                    "prompt": prompt.text,
                    "prompt_tokens": prompt.ids,
                    "text": self._tokenizer.decode(tokens) if self._tokenizer else None,
                    "tokens": tokens,
                    "finish": reason,
                }
                for prompt, tokens, reason in zip(self.prompts, done.tokens, done.reasons, strict=True)
            ]
            drawn = {key: getattr(sampling, key) for key in ("temperature", "top_k", "top_p", "seed")}
            print(
                in_json(
                    json.dumps(
                        {"model": str(self.job.out), "texts": texts, "sampling": drawn} | about,
                        indent=1,
                        ensure_ascii=False,
                    )
                ),
                flush=True,
            )
        elif not self.job.quiet:
            print(visible("\n" + "\n".join(lines(about))), file=sys.stderr, flush=True)
