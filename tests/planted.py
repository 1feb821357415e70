"""Planting every fault in the shards of a family, or in what they are compared with, and asking every check; for
scripts/plant_faults and its test."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

import torch
from faults import DOUBTS, FAULTS, plant, respelled
from fixtures import FIXTURES, checkpoint, copy, rewrite
from running import environment, process, sign

import reshard
from reshard.checkpoints.source import Source
from reshard.errors import ReshardError
from reshard.jobs.verdict import CHECKS
from reshard.runtime.proof import reference

FAMILIES = {  # fixture → mesh: with repeated KV heads where there are some
    name: {"tp": max((tp for tp in about.tp if tp % max(about.kv, 1) == 0), default=2)}
    | ({"ep": 2} if 2 in about.ep else {})
    for name, about in FIXTURES.items()
}
ADD = {  # (fault, whether digests were made right) → the checks that must find it
    (name, signed): {"weights", "sha256", "numerics"} | (set() if signed else {"integrity"})
    for name in FAULTS
    for signed in (False, True)
}


class Remembered(reference.Reference):
    """The reference, asked the same question once."""

    def __init__(self, known: reference.Reference) -> None:
        super().__init__(known.name, known.load, known.independent, known.hint)
        self._kept, self._said = known.prepare(), {}

    def logits(self, ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        key = dtype, ids.numpy().tobytes()
        if key not in self._said:
            self._said[key] = super().logits(ids, dtype)
        return self._said[key]

    def greedy(self, starts: torch.Tensor, most: int, cached: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
        key = most, cached, starts.numpy().tobytes()
        if key not in self._said:
            self._said[key] = super().greedy(starts, most, cached)
        return self._said[key]


ORIGINAL = reference.reference_for
KNOWN: dict[Path, Remembered] = {}


def remembered(source: Source) -> Remembered:
    """The reference of a directory, made once."""
    assert source.root is not None
    if source.root not in KNOWN:
        KNOWN[source.root] = Remembered(ORIGINAL(source))
    return KNOWN[source.root]


def one_each() -> list[str]:
    """A fixture of each family."""
    return list({about.family: name for name, about in reversed(FIXTURES.items())}.values())[::-1]


def planted(name: str, folder: Path, faults: list[str] | None = None) -> Iterator[tuple[str, bool, str, bool]]:
    """(fault, signed, check, found) of each."""
    torch.set_num_threads(1)
    source, good, out = checkpoint(name), folder / "good", folder / "out"
    reshard.convert(source, good, **FAMILIES[name], sha256=True)
    reshard.convert(checkpoint("gpt2" if name != "gpt2" else "llama"), folder / "other", tp=2)
    for fault in faults or FAULTS:
        for signed in (False, True):
            shutil.copytree(good, out)
            possible = plant(fault, out)
            if possible and signed:
                try:
                    sign(out)
                except (OSError, KeyError, ValueError):
                    possible = False  # nothing to make right
            if possible:
                for check in CHECKS:
                    yield fault, signed, check, _found(out, source, check)
            shutil.rmtree(out)


def _found(out: Path, source: Path, check: str) -> bool:
    try:
        with patch.object(reference, "reference_for", remembered):
            return not reshard.verify(out, against=source, only=check).ok
    except ReshardError:
        return True


def without_transformers(folder: Path) -> dict[str, str]:
    """The environment of a process in which transformers cannot be imported."""
    folder.mkdir(exist_ok=True)
    (folder / "transformers.py").write_text("raise ModuleNotFoundError('not installed', name='transformers')\n")
    there = environment(OMP_NUM_THREADS="1")
    return there | {"PYTHONPATH": f"{folder}:{there['PYTHONPATH']}"}


def doubted(words: str, folder: Path) -> tuple[str, bool]:
    """What numerics says where something is wrong with what it compares with,
    and whether the shards count as proven.
    """
    doubt = DOUBTS[words]
    rewrite(source := copy("llama", folder / "model"), doubt.edit)
    family = str(respelled(folder / "mine.toml", doubt.names, doubt.exchanged))
    reshard.convert(source, folder / "out", tp=2, family=family, sha256=True)
    line = ("verify", folder / "out", "--against", source, "--family", family, "--json")
    there = environment(OMP_NUM_THREADS="1") if doubt.installed else without_transformers(folder / "bare")
    found = json.loads(process(*line, env=there).out)
    return found["checks"][3]["status"], found["proven"]
