"""Fuzzing what reads strangers' files: each target mutates a good file and reads it, as often as it is told, from a
seed.

    header(rounds=1000, seed=0)         or, for as long as wanted:  python tests/fuzz.py TARGET|all SECONDS [SEED]

A mutation opens, or ends in a ReshardError (MismatchError and PlaceError are some), within SECONDS of CPU time and
MEMORY more bytes. Anything else raises `Found`, with the seed of the round, which `TARGETS[name](1, seed)` repeats.
"""

from __future__ import annotations

import copy
import io
import json
import pickle
import random
import resource
import shutil
import struct
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from running import llama, llama_tensors, save

from reshard import api
from reshard.checkpoints import manifest, published
from reshard.checkpoints.blocks import Blocks
from reshard.checkpoints.source import check_small_files, open_source
from reshard.containers import safetensors, torch_zip
from reshard.errors import ReshardError
from reshard.jobs import fingerprint
from reshard.tables import families, formats
from reshard.tables.config import Config

SECONDS, MEMORY = 10.0, 512 << 20  # of CPU time for one file; of memory for all of a target's
Target = Callable[[int, int], int]
TARGETS: dict[str, Target] = {}
ODD: list[Any] = [
    None,
    True,
    False,
    0,
    1,
    -1,
    2,
    255,
    2**31,
    2**63 - 1,
    2**63,
    10**30,
    1.5,
    2.0,
    float("inf"),
    float("nan"),
    "",
    "x",
    "\ud800",
]
ODD += [
    "\u0661",
    "01",
    "../x",
    "/etc/passwd",
    "a\0b",
    "\x1b[31m",
    "9" * 5000,
    [],
    [[]],
    [1],
    {},
    {"a": 1},
    ["x"] * 50,
    "x" * 10_000,
]
SNIPPETS = [
    b"[",
    b"]",
    b"{",
    b"}",
    b'"',
    b",",
    b":",
    b"0",
    b"-",
    b"1e999",
    b"null",
    b"[" * 300,
    b"\\ud800",
    b"\xff",
    b"\0",
    b"9" * 30,
    b"\n",
]


class Found(AssertionError):
    """Something that a file must not do."""


def target(run: Callable[[random.Random], Callable[[], object]]) -> Target:
    """A target: `run` makes a mutation, and gives the function that reads it."""

    def rounds(count: int, seed: int = 0) -> int:
        """How many of the mutations opened."""
        opened, before = 0, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for at in range(seed, seed + count):
            read = run(random.Random(at))
            began = time.process_time()
            try:
                read()
                opened += 1
            except ReshardError as error:
                if not error.message:
                    raise Found(f"{run.__name__}, seed {at}: an error without words") from error
            except Exception as error:
                raise Found(f"{run.__name__}, seed {at}: {type(error).__name__}: {error}") from error
            if (took := time.process_time() - began) > SECONDS:
                raise Found(f"{run.__name__}, seed {at}: {took:.1f} s of CPU time, at most {SECONDS} are allowed")
        if (more := (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) << 10) > MEMORY:
            raise Found(
                f"{run.__name__}, seeds {seed} to {seed + count}: {more} bytes of memory, at most {MEMORY} are allowed"
            )
        return opened

    TARGETS[run.__name__] = rounds
    return rounds


# Mutations


def mutated(data: bytes, dice: random.Random) -> bytes:
    """Some bytes changed, removed, doubled, moved, or replaced by what means something."""
    for _ in range(dice.choice((1, 1, 1, 2, 5))):
        at = dice.randrange(len(data) + 1)
        to = min(len(data), at + dice.choice((0, 1, 2, 8, 100)))
        part = data[at:to]
        new = dice.choice(
            (
                b"",
                part + part,
                bytes(byte ^ 1 << dice.randrange(8) for byte in part),
                dice.randbytes(len(part)),
                dice.choice(SNIPPETS),
                data[(other := dice.randrange(len(data) + 1)) : other + 20],
            )
        )
        data = data[:at] + new + data[to:]
    return data


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The paths of everything inside of a value."""
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield (*path, key)
        yield from places(value[key], (*path, key))


def changed(value: Any, dice: random.Random) -> Any:
    """The same with one to three things inside replaced, removed, or doubled."""
    value = json.loads(json.dumps(value))
    for _ in range(dice.choice((1, 1, 2, 3))):
        paths = list(places(value))
        if not paths:
            return copy.deepcopy(dice.choice(ODD))
        *way, last = dice.choice(paths)
        inside = value
        for key in way:
            inside = inside[key]
        match dice.randrange(5):
            case 0:
                del inside[last]
            case 1 if isinstance(inside, list):
                inside.append(copy.deepcopy(inside[last]))
            case 2 if isinstance(inside[last], int):
                inside[last] += dice.choice((-1, 1, 1 << 40))
            case 3 if isinstance(inside, dict):
                inside[dice.choice(("x", "\u0661", "01", "", "tp"))] = copy.deepcopy(inside[last])
            case _:
                inside[last] = copy.deepcopy(dice.choice(ODD))
    return value


def spoiled(data: bytes, dice: random.Random) -> bytes:
    """A JSON text with another value, or with other bytes."""
    if dice.random() < 0.3:
        return mutated(data, dice)
    return json.dumps(changed(json.loads(data), dice)).encode()


# What is mutated


@cache
def _folder() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="reshard-fuzz-"))
    import atexit

    atexit.register(shutil.rmtree, folder, True)
    llama(folder / "source", hidden_size=16, intermediate_size=12, vocab_size=8, num_hidden_layers=2, head_dim=2)
    api.convert(str(folder / "source"), str(folder / "out"), tp=2)
    return folder


@cache
def _file() -> bytes:
    path = _folder() / "small.safetensors"
    save(path, dict(list(llama_tensors().items())[:4]), metadata={"format": "pt"})
    return path.read_bytes()


@contextmanager
def _instead(path: Path, data: bytes) -> Iterator[Path]:
    """The directory of shards with one file changed, for a moment."""
    good = path.read_bytes()
    path.write_bytes(data)
    try:
        yield _folder() / "out"
    finally:
        path.write_bytes(good)


def _signed(
    name: str, dice: random.Random, read: Callable[[Path], object], spoil: Callable[[bytes, random.Random], bytes]
) -> None:
    """Read the shards with a file spoiled, once as it is, which must be noticed, and once signed again,
    as anybody can do.
    """
    out = _folder() / "out"
    data, listed = spoil((out / name).read_bytes(), dice), (out / "manifest.json").read_bytes()
    if data == (out / name).read_bytes():
        return
    with _instead(out / name, data):
        try:
            check_small_files(out, manifest.load(out))
        except ReshardError:
            pass
        else:
            raise AssertionError(f"{name} was changed, and nothing noticed")
        try:
            _sign(out)
            read(out)
        finally:
            (out / "manifest.json").write_bytes(listed)


def _sign(out: Path) -> None:
    from running import digest, root_signed

    data = json.loads((out / "manifest.json").read_text())
    for file in [*(rank["tensors"] for rank in data["ranks"]), *data["carried"], *data["source"]]:
        content = (out / file["file"]).read_bytes()
        file |= {"size": len(content), "digest": digest(content)}
    (out / "manifest.json").write_text(root_signed(data))


# Targets


@target
def headers(dice: random.Random) -> Callable[[], object]:
    file = _file()
    size = struct.unpack("<Q", file[:8])[0]
    text = spoiled(file[8 : 8 + size], dice)
    return lambda: safetensors.parse(text, 8 + len(text) + len(file) - 8 - size, "f")


@target
def lengths(dice: random.Random) -> Callable[[], object]:
    file = mutated(_file()[:9], dice) + _file()[9:]
    return lambda: safetensors.parse(file[8 : 8 + safetensors.length(file[:8], len(file), "f")], len(file), "f")


@target
def indexes(dice: random.Random) -> Callable[[], object]:
    names = list(llama_tensors())
    text = json.dumps(
        {
            "metadata": {"total_size": 5},
            "weight_map": {name: f"model-{at % 2}.safetensors" for at, name in enumerate(names)},
        }
    )
    data = spoiled(text.encode(), dice)
    return lambda: [published.natural(file) for file in published.index_map(data, "f").values()]


@target
def configs(dice: random.Random) -> Callable[[], object]:
    path = _folder() / "source" / "config.json"
    data = spoiled(path.read_bytes(), dice)

    def read() -> None:
        with _instead(path, data):
            open_source(path.parent)

    return read


@target
def manifests(dice: random.Random) -> Callable[[], object]:
    out = _folder() / "out"
    data = spoiled((out / "manifest.json").read_bytes(), dice)

    def read() -> None:
        good = manifest.load(out)
        with _instead(out / "manifest.json", data):
            known = manifest.load(out)
            if known != good and manifest.root_of(out, known) == known.root:
                raise AssertionError("the manifest was changed, and its digest is right")
            open_source(out)

    return read


@target
def tensors(dice: random.Random) -> Callable[[], object]:
    def read(out: Path) -> None:
        first = manifest.load(out).ranks[0]
        weights, said = first.weights, first.tensors
        blocks = Blocks.read(out, weights, said)
        list(blocks.contradictions()), list(blocks)

    return lambda: _signed("rank-00000/tensors.json", dice, read, spoiled)


@target
def originals(dice: random.Random) -> Callable[[], object]:
    return lambda: _signed("source/files.json", dice, open_source, spoiled)


@target
def family_tables(dice: random.Random) -> Callable[[], object]:
    def spoil(data: bytes, dice: random.Random) -> bytes:
        lines = data.decode().split("\n")
        at = dice.randrange(len(lines))
        lines[at : at + 1] = [[], [lines[at]] * 2, [lines[at], dice.choice(lines)]][dice.randrange(3)]
        return mutated(data, dice) if dice.random() < 0.6 else "\n".join(lines).encode()

    return lambda: _signed("source/families/llama.toml", dice, open_source, spoil)


@target
def shipped_tables(dice: random.Random) -> Callable[[], object]:
    kind = dice.choice((families, formats))
    shipped = kind._SHIPPED
    text = mutated(shipped.text(dice.choice(shipped.names())).encode(), dice).decode(errors="replace")
    return lambda: kind.parse(text, "f", shipped.text)


@target
def shares(dice: random.Random) -> Callable[[], object]:
    data = spoiled(json.dumps(_share()).encode(), dice)
    path = _folder() / "share.json"
    path.write_bytes(data)
    return lambda: fingerprint.read_share(path)


@cache
def _share() -> Any:
    return fingerprint.of_rank(_folder() / "out", 0).to_json()


@target
def pickles(dice: random.Random) -> Callable[[], object]:
    data = mutated(dice.choice(_pickles()), dice)
    return lambda: torch_zip.read(lambda length, offset: data[offset : offset + length], len(data), "f")


@cache
def _pickles() -> tuple[bytes, ...]:
    import torch

    state = {
        "a.0.weight": torch.arange(6.0).reshape(2, 3),
        "b": torch.ones(4, dtype=torch.bfloat16),
        "c": torch.zeros(3, 3).t(),
    }
    files = []
    for new in (True, False):
        for protocol in (2, 4):
            out = io.BytesIO()
            torch.save(state, out, pickle_protocol=protocol, _use_new_zipfile_serialization=new)
            files.append(out.getvalue())
    return (*files, pickle.dumps({"a": [1, 2]}))


@target
def config_keys(dice: random.Random) -> Callable[[], object]:
    config = Config({"a": dice.choice(ODD), "b": {"c": dice.choice(ODD)}})
    words = "".join(
        dice.choice(("a", "b.c", " == ", " != ", "1", "\u0661", "\u00b2", "=x", "!", ".any.", "9" * 5000))
        for _ in range(4)
    )
    return lambda: config.says(words)


def main(name: str, seconds: str, seed: str = "0") -> None:
    names, at = list(TARGETS) if name == "all" else [name], int(seed)
    for each in names:
        until, first, opened = time.monotonic() + float(seconds) / len(names), at, 0
        rounds = TARGETS[each]
        while time.monotonic() < until:
            opened += rounds(100, first)
            first += 100
        print(f"{each}: {first - at} rounds from seed {at}, {opened} opened", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
