"""A job of `reshard generate`: what each rank does, from prompts to text, and the statistics that rank 0 prints.

The only module that knows about text, ranks and models at once. stdout has the text, or one JSON object; stderr the
statistics.
"""

import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reshard.errors import ReshardError
from reshard.layout.mesh import Mesh
from reshard.store.directory import Directory
from reshard.text.escapes import in_json, visible

from .comm.launch import Tell
from .statistics import lines, statistics
from .text import Stream, Tokenizer, generation_config, stop_tokens

if TYPE_CHECKING:
    from .comm.collectives import World
    from .generate import Generated

_LONGEST = 1_000_000  # seconds of a timeout


@dataclass(frozen=True)
class Job:
    """A request. A prompt is a text, or a list of token ids or of messages; None: rank 0 reads them from `file`."""

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

    def ready(self) -> "Job":
        """The job with its prompts read."""
        return self if self.prompts is not None else replace(self, prompts=read_prompts(self.file or "-"))


def read_prompts(file: str) -> tuple[Any, ...]:
    """The prompts in a file, one per line, or on stdin for `-`.

    A line that starts with `{` is JSON: {"prompt": …}, {"tokens": […]} or {"messages": […]}.
    """
    try:
        text = sys.stdin.read() if file == "-" else Path(file).read_text(encoding="utf-8")
    except OSError as error:
        raise ReshardError(f"{file}: {error.strerror}", "pass a file with one prompt per line") from None
    except UnicodeDecodeError as error:
        raise ReshardError(f"{file}: not UTF-8: {error.reason} at byte {error.start}") from None
    found: list[Any] = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        found.append(_from_json(line, f"{file}: line {number}") if line.startswith("{") else line)
    if not found:
        raise ReshardError(f"{file}: no prompts", "write one per line")
    return tuple(found)


def _from_json(line: str, where: str) -> Any:
    hint = (
        'a JSON line is {"prompt": "…"}, {"tokens": [1, 2, …]} or {"messages": [{"role": "user", "content": "…"}, …]}'
    )
    try:
        data = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ReshardError(f"{where}: invalid JSON: {error}", hint) from None
    for key, fits in _FORMS.items():
        if key in data:
            if not fits(data[key]):
                raise ReshardError(f"{where}: invalid {key}: {json.dumps(data[key])[:100]}", hint)
            return data[key]
    raise ReshardError(f"{where}: has none of {', '.join(_FORMS)}", hint)


def _every(kind: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and bool(value) and all(map(kind, value))


_FORMS: dict[str, Callable[[Any], bool]] = {
    "prompt": lambda value: isinstance(value, str),
    "tokens": _every(lambda token: type(token) is int),
    "messages": _every(lambda message: isinstance(message, dict) and "role" in message and "content" in message),
}


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
    if any(
        not isinstance(prompt, list) or isinstance(prompt[0] if prompt else 0, dict) for prompt in job.prompts or ("",)
    ):
        Tokenizer(job.out)  # raises errors early
    if job.mesh is not None:
        return job.mesh.world
    return manifest.load(job.out).mesh.world if manifest.present(job.out) else 1


def start(job: Job) -> None:
    """Run all ranks on this machine, or this one rank if torchrun started it."""
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
    """Import torch, so that forked ranks need not. Raises ReshardError if it is missing."""
    try:
        import torch.distributed
    except ImportError:
        words = "running a model needs PyTorch, which is not installed"
        raise ReshardError(words, "pip install 'reshard[runtime]'") from None
    if not torch.distributed.is_available():
        raise ReshardError("this PyTorch was built without torch.distributed", "pip install 'reshard[runtime]'")


def one_rank(job: Job, forked: int | None, tell: Tell) -> None:
    """Everything that one rank does. `forked`: the number of ranks, if they are forks of one process."""
    from .comm.processes import joined

    tell("start")
    device = _device(job.device, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    with joined("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", forked, job.timeout) as world:
        _work(job, world, device, tell)


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
    console = _Console(job) if world.rank == 0 else None
    prompts: list[list[int]] = gathered(world, console.encoded() if console else None, "prompts")[0]
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
    directory.check()  # the tokenizer and config belong to the model that was loaded
    limit = decoder.spec.positions or next((int(config[key]) for key in POSITIONS if config.get(key)), None)
    check(prompts, decoder.model.sizes["vocab"], limit)
    options = Options(job.most, sampling, stop_tokens(said, config, job.out, decoder.model.sizes["vocab"]), limit)
    try:
        done = generate(decoder, prompts, options, console.token if console else None, tell)
    except ReshardError:
        if console is not None:
            console.stop()
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
    about = statistics(decoder, world, done, prompts, times)
    if console is not None:
        console.end(prompts, done, sampling, about)


def _config(root: Path) -> dict[str, Any]:
    """config.json, overlaid with its `text_config`."""
    from reshard.checkpoints.published import read_json

    found = read_json(root / "config.json")
    return found | (found.get("text_config") or {})


class _Console:
    """The console of rank 0: prompts in, text out as it arrives, one text at a time; later ones are buffered."""

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
        # On a terminal, control characters of a text are escaped.
        self._terminal = sys.stdout is not None and sys.stdout.isatty()

    def encoded(self) -> list[list[int]]:
        """The token ids of every prompt."""
        found: list[list[int]] = []
        chats: dict[int, list[dict[str, Any]]] = {}  # index of a prompt → a conversation
        for number, prompt in enumerate(self.prompts):
            found.append(prompt if isinstance(prompt, list) else [])
            if isinstance(prompt, list) and not any(isinstance(part, dict) for part in prompt):
                continue
            tokenizer = self._tokenizer or Tokenizer(self.job.out)  # raises if there is none
            if isinstance(prompt, list):
                chats[number] = prompt
            elif self.chat:
                chats[number] = [{"role": "user", "content": prompt}]
            else:
                found[number] = tokenizer.encode(prompt)
                self.waiting[number] = prompt  # the output starts with the prompt
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
        """End the output, so that what is printed next starts on a new line."""
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
