"""Running the command line, and small checkpoints written byte by byte: what tests of the front door share.

`reshard(...)` runs a command in this process; a traceback there fails the test. `process(...)` runs it in one of its
own, to be killed, starved or measured. Checkpoints are written here without `reshard`, torch or the safetensors
library.
"""

from __future__ import annotations

import io
import json
import math
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest
import xxhash

from reshard import cli

ROOT = Path(__file__).parent.parent
BITS = {
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "BOOL": 8,
    "U8": 8,
    "I8": 8,
    "F8_E4M3": 8,
    "F8_E5M2": 8,
    "F8_E8M0": 8,
    "I16": 16,
    "U16": 16,
}
BITS |= {"F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32, "F64": 64, "I64": 64, "U64": 64, "C64": 64}

# seconds after which something hangs, however busy the machine is; below pytest's own limit for a test
WATCHDOG = 280.0

Shape = tuple[int, ...]
Tensors = dict[str, tuple[str, Shape, bytes]]  # name → dtype, shape, data


# Running


@dataclass(frozen=True)
class Done:
    """How a command ended."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


class _Stream(io.TextIOWrapper):
    """A stream like those of a process: text that cannot be encoded is an error."""

    def __init__(self) -> None:
        super().__init__(io.BytesIO(), encoding="utf-8", errors="strict", write_through=True)

    def text(self) -> str:
        self.flush()
        return self.buffer.getvalue().decode()  # type: ignore[attr-defined,no-any-return]


def reshard(*words: str | os.PathLike[str]) -> Done:
    """Run a command in this process. A traceback fails the test.

    The numeric check takes seconds, and has tests of its own: elsewhere it is left out.
    """
    if words[:1] == ("verify",) and "--against" in words and not {"--only", "--numerics"} & {*map(str, words)}:
        words = (*words, "--no-numerics")
    out, err, code = _Stream(), _Stream(), 0
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    with redirect_stdout(out), redirect_stderr(err):
        try:
            cli.main([os.fspath(word) for word in words])
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
    assert code != cli.DEFECT, err.text() + Path(re.findall(r"in (\S+\.txt)", err.text())[-1]).read_text()
    return Done(code, out.text(), err.text())


def command(*words: str | os.PathLike[str]) -> list[str]:
    return [sys.executable, "-m", "reshard", *map(os.fspath, words)]


def environment(**more: str) -> dict[str, str]:
    return os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])} | more


def process(*words: str | os.PathLike[str], code: str | None = None, **options: Any) -> Done:
    """Run a command in a process of its own; `code` is a program to run instead of `python -m reshard`."""
    line = command(*words) if code is None else [sys.executable, "-c", code, *map(os.fspath, words)]
    options.setdefault("env", environment())
    done = subprocess.run(line, capture_output=True, timeout=WATCHDOG, **options)
    return Done(done.returncode, done.stdout.decode(errors="replace"), done.stderr.decode(errors="replace"))


def start(*words: str | os.PathLike[str], code: str | None = None, **options: Any) -> subprocess.Popen[bytes]:
    """Begin a command in a process of its own."""
    line = command(*words) if code is None else [sys.executable, "-c", code, *map(os.fspath, words)]
    options.setdefault("env", environment())
    return subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)


STEPPED = """
import itertools, os, pathlib, signal, sys, threading, time
from reshard.store import local as files
from reshard.cli import main

folder, numbers, lock = pathlib.Path(os.environ["STEPS"]), itertools.count(1), threading.Lock()

def step():
    with lock:
        number = next(numbers)
        with (folder / "reached").open("ab") as file:
            file.write(b".")
    while os.stat(folder / "allowed").st_size < number:
        time.sleep(0.005)

def noted(number, handler, install=signal.signal):
    def note(*arguments):
        with (folder / "signals").open("ab") as file:
            file.write(b".")
        return handler(*arguments)
    return install(number, note if callable(handler) else handler)

signal.signal = noted
"""
TRANSFERS = """
transfer = files.Pool._transfer
def stepped(*arguments):
    step()
    return transfer(*arguments)
files.Pool._transfer = stepped
main(sys.argv[1:])
"""


class Stepped:
    """A command whose every transfer of data waits until it is allowed: so a test meets it where it wants to, on a
    machine of any speed.

    `code` installs `step()`, which waits; by default in each read and write of tensors. Nothing is allowed at first.
    """

    def __init__(self, *words: str | os.PathLike[str], code: str = TRANSFERS, **more: str) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="steps-"))
        for name in ("reached", "allowed", "signals"):
            (self.folder / name).touch()
        self.job = start(*words, code=STEPPED + code, env=environment(STEPS=str(self.folder), **more))

    def __enter__(self) -> Stepped:
        return self

    def __exit__(self, *_: object) -> None:
        self.job.kill()
        self.job.communicate()
        shutil.rmtree(self.folder)

    def count(self, what: str) -> int:
        return (self.folder / what).stat().st_size

    def until(self, number: int, what: str = "reached") -> None:
        """Wait for the `number`th step to be reached, or signal to be handled."""
        while self.count(what) < number:
            assert self.job.poll() is None, self.job.communicate()
            time.sleep(0.005)

    def allow(self, number: int = 1 << 40) -> None:
        """Let steps up to this one be taken, or all."""
        os.truncate(self.folder / "allowed", number)

    def advance(self, done: Callable[[], bool]) -> None:
        """One step after another, until `done` is true while a step waits."""
        step = 1
        self.until(step)
        while not done():
            self.allow(step)
            step += 1
            self.until(step)

    def end(self) -> Done:
        """Let it go on to its end."""
        self.allow()
        out, err = self.job.communicate(timeout=WATCHDOG)
        return Done(self.job.returncode, out.decode(), err.decode())


def lines_run(work: Callable[[], object]) -> int:
    """How many lines of Python `work` runs in this thread: how much it does, whatever the machine does beside it."""
    count = 0

    def trace(frame: FrameType, event: str, argument: object) -> Any:
        nonlocal count
        count += event == "line"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        work()
    finally:
        sys.settrace(before)
    return count


def refused(done: Done, code: int, *parts: str) -> Done:
    """Assert that a command ended with this code and an error in words: each of `parts` in it, no traceback,
    nothing on stdout.
    """
    assert done.code == code, (done.code, done.err)
    assert done.err.startswith("error: "), done.err
    assert "Traceback" not in done.err, done.err
    assert done.out == ""
    missing = [part for part in parts if part not in done.err]
    assert not missing, f"{missing} not in: {done.err}"
    return done


# Directories


def tree(directory: Path) -> dict[str, bytes]:
    """All files below a directory: relative path → content."""
    return {
        str(path.relative_to(directory)): path.read_bytes() for path in sorted(directory.rglob("*")) if path.is_file()
    }


def stamps(directory: Path) -> dict[str, tuple[int, ...]]:
    """What changes of a path below a directory, and of itself, if anything touches it."""
    found = {}
    for path in [directory, *sorted(directory.rglob("*"))]:
        status = path.lstat()
        found[str(path.relative_to(directory))] = (
            status.st_ino,
            status.st_size,
            status.st_mtime_ns,
            status.st_ctime_ns,
        )
    return found


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


@contextmanager
def mounted(place: Path, *options: str) -> Iterator[Path]:
    """A small file system at `place`; the test is skipped where none can be mounted."""
    place.mkdir(exist_ok=True)
    mount = shutil.which("mount")
    done = subprocess.run([mount or "mount", *options, str(place)], capture_output=True) if mount else None
    if done is None or done.returncode:
        pytest.skip(f"nothing can be mounted here: {done.stderr.decode().strip() if done else 'no mount command'}")
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


def tmpfs(place: Path, size: int) -> Any:
    """A file system of `size` bytes."""
    return mounted(place, "-t", "tmpfs", "-o", f"size={size}", "tmpfs")


# Checkpoints


def header(
    tensors: Mapping[str, tuple[str, Shape, int]],
    order: Sequence[str] | None = None,
    metadata: Any = None,
    align: int = 8,
) -> bytes:
    """The length word and the JSON for tensors (dtype, shape, bytes) that lie as they are given; the JSON in another
    `order`.
    """
    text: dict[str, Any] = {} if metadata is None else {"__metadata__": metadata}
    at = 0
    for name, (dtype, shape, size) in tensors.items():
        text[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    if order is not None:
        text = {name: text[name] for name in order}
    raw = json.dumps(text).encode()
    raw += b" " * (-(8 + len(raw)) % align)
    return struct.pack("<Q", len(raw)) + raw


def save(path: Path, tensors: Tensors, **options: Any) -> None:
    """A safetensors file."""
    head = header({name: (dtype, shape, len(data)) for name, (dtype, shape, data) in tensors.items()}, **options)
    path.write_bytes(head + b"".join(data for _, _, data in tensors.values()))


def save_index(directory: Path, files: Mapping[str, Tensors]) -> None:
    """Several safetensors files and the index of them."""
    for name, tensors in files.items():
        save(directory / name, tensors)
    weight_map = {tensor: name for name, tensors in files.items() for tensor in tensors}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def noise(dtype: str, *shape: int, seed: int = 0) -> tuple[str, Shape, bytes]:
    """A tensor of random bytes."""
    size = math.prod(shape) * BITS[dtype] // 8
    return dtype, shape, np.random.default_rng([seed, *shape]).bytes(size)


LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "num_hidden_layers": 3,
    "hidden_size": 56,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 10,
    "intermediate_size": 88,
    "vocab_size": 331,
    "tie_word_embeddings": False,
}


def llama_shapes(config: Mapping[str, Any]) -> dict[str, Shape]:
    """Names and shapes of a Llama."""
    hidden, inter, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    q, kv = (config[key] * config["head_dim"] for key in ("num_attention_heads", "num_key_value_heads"))
    shapes: dict[str, Shape] = {"model.embed_tokens.weight": (vocab, hidden)}
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}."
        for name, shape in {
            "input_layernorm": (hidden,),
            "self_attn.q_proj": (q, hidden),
            "self_attn.k_proj": (kv, hidden),
            "self_attn.v_proj": (kv, hidden),
            "self_attn.o_proj": (hidden, q),
            "post_attention_layernorm": (hidden,),
            "mlp.gate_proj": (inter, hidden),
            "mlp.up_proj": (inter, hidden),
            "mlp.down_proj": (hidden, inter),
        }.items():
            shapes[f"{at}{name}.weight"] = shape
    shapes["model.norm.weight"] = (hidden,)
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (vocab, hidden)
    return shapes


def llama_tensors(config: Mapping[str, Any] = LLAMA, seed: int = 0, dtype: str = "BF16") -> Tensors:
    """The tensors of a Llama, every one of other random bytes."""
    return {
        name: noise(dtype, *shape, seed=1000 * seed + at)
        for at, (name, shape) in enumerate(llama_shapes(config).items())
    }


def llama(directory: Path, tensors: Tensors | None = None, **changes: Any) -> Path:
    """A small Llama in one file; `changes` to its config."""
    directory.mkdir(parents=True, exist_ok=True)
    config = {key: value for key, value in (LLAMA | changes).items() if value is not None}
    (directory / "config.json").write_text(json.dumps(config, indent=2))
    save(
        directory / "model.safetensors",
        llama_tensors(LLAMA | changes) if tensors is None else tensors,
        metadata={"format": "pt"},
    )
    return directory


def big_llama(directory: Path, megabytes: int, sparse: bool = False, files: int = 4) -> Path:
    """A Llama of about so many MB in several files: random bytes, or none at all (`sparse`)."""
    config = LLAMA | {
        "hidden_size": 1024,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 96,
        "intermediate_size": 2816,
    }
    config |= {"vocab_size": 8190}
    layer = 2 * (2 * 1024 + 1024 * 96 * (2 * 16 + 2 * 8) + 3 * 1024 * 2816)
    config["num_hidden_layers"] = max(1, round((megabytes * 1e6 - 4 * 1024 * 8190) / layer))
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(config, indent=2))
    shapes = list(llama_shapes(config).items())
    generator = np.random.default_rng(7)
    weight_map = {}
    for number in range(files):
        part = dict(shapes[number * len(shapes) // files : (number + 1) * len(shapes) // files])
        name = f"model-{number + 1:05}-of-{files:05}.safetensors"
        weight_map |= dict.fromkeys(part, name)
        sizes = {key: ("BF16", shape, 2 * math.prod(shape)) for key, shape in part.items()}
        with (directory / name).open("wb") as file:
            file.write(header(sizes, metadata={"format": "pt"}))
            if sparse:
                file.truncate(file.tell() + sum(size for _, _, size in sizes.values()))
            else:
                for _, _, size in sizes.values():
                    file.write(generator.bytes(size))
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return directory


# Shard directories


def digest(data: bytes) -> str:
    return xxhash.xxh3_128_hexdigest(data)


def sign(out: Path, tensors: bool = True) -> None:
    """Make every digest and size of a shard directory right again, as docs/format.md has them, whatever was done to its
    files.

    With `tensors` also those in each tensors.json, from the bytes that are there.
    """
    manifest = json.loads((out / "manifest.json").read_text())
    for rank in manifest["ranks"]:
        index = json.loads((out / rank["tensors"]["file"]).read_text())
        data = (out / rank["weights"]["file"]).read_bytes()
        if tensors:
            for tensor in index["tensors"]:
                part = data[tensor["offset"] : tensor["offset"] + tensor["nbytes"]]
                blocks = [
                    xxhash.xxh3_128_digest(part[at : at + index["block"]]) for at in range(0, len(part), index["block"])
                ]
                tensor["digest"] = digest(b"".join(blocks))
                if len(blocks) > 1:
                    tensor["blocks"] = [block.hex() for block in blocks]
            (out / rank["tensors"]["file"]).write_text(json.dumps(index))
        start = min(tensor["offset"] for tensor in index["tensors"])
        sums = [digest(data[:start]), *(tensor["digest"] for tensor in index["tensors"])]
        rank["weights"] |= {"size": len(data), "digest": digest(b"".join(map(bytes.fromhex, sums)))}
    pairs = [rank["tensors"] for rank in manifest["ranks"]]
    for file in [*pairs, *manifest["carried"], *manifest["source"]]:
        content = (out / file["file"]).read_bytes()
        file |= {"size": len(content), "digest": digest(content)}
    (out / "manifest.json").write_text(root_signed(manifest))


def root_signed(manifest: dict[str, Any]) -> str:
    """The text of a manifest with the root digest that it must have."""
    text = json.dumps(manifest | {"root": ""}, indent=1, ensure_ascii=False) + "\n"
    files = [
        *manifest["carried"],
        *manifest["source"],
        *(rank[key] for rank in manifest["ranks"] for key in ("weights", "tensors")),
    ]
    every = [(file["file"], file["size"], file["digest"]) for file in files] + [
        ("manifest.json", len(text.encode()), digest(text.encode()))
    ]
    root = digest("".join(f"{name} {size} {summed}\n" for name, size, summed in sorted(every)).encode())
    return json.dumps(manifest | {"root": root}, indent=1, ensure_ascii=False) + "\n"
