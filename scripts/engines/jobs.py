"""Numbered checkpoints for an engine to load, the sizes at which it loads them, and what it held afterwards.

A case is a tiny checkpoint of the tests, in float32, each element its own number: as it is, with and without a head of
its own, and without the layers that predict ahead, which engines leave to another model.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file
from safetensors.torch import load_file

from reshard.authoring.learn import Array, Numbers, held
from reshard.checkpoints.source import open_source
from reshard.checkpoints.source_kinds import Source
from reshard.errors import ReshardError
from reshard.layout.mesh import Mesh

HERE = Path(__file__).resolve().parent
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "reshard-engines"


@dataclass(frozen=True)
class Case:
    """A numbered checkpoint. `layers`: of the main model; `tied`: as config.json says."""

    name: str
    family: str
    directory: Path
    source: Source
    numbers: Numbers
    tp: tuple[int, ...]
    experts: int
    first: bool

    def meshes(self) -> Iterator[Mesh]:
        """Sizes to load it at: each TP, two stages, experts on ranks of their own; fewer for further cases."""
        layers = self.source.layout.model.main_layers
        for tp in self.tp:
            yield Mesh(tp)
        if layers > 1:
            for tp in (1, 2) if self.first else (1,):
                yield Mesh(tp, 2, layers=(layers - layers // 2, layers // 2))
        for tp in (2, 4):
            if self.experts and self.experts % tp == 0 and tp in self.tp:
                yield Mesh(tp, ep=tp)


@dataclass(frozen=True)
class Loaded:
    """What an engine held after loading a case: name → array for each rank, or why it refused."""

    case: Case
    mesh: Mesh
    ranks: tuple[dict[str, Array], ...]
    error: str

    @property
    def name(self) -> str:
        return f"{self.case.name} {label(self.mesh)}"


def label(mesh: Mesh) -> str:
    return f"tp{mesh.tp}" + (f"-pp{mesh.pp}" if mesh.pp > 1 else "") + ("-ep" if mesh.ep > 1 else "")


def spellings() -> dict[str, dict[str, Any]]:
    """Keys that published files of a family have and those of the tests lack, by family."""
    return tomllib.loads((HERE / "published_keys.toml").read_text())


def cases(families: Iterable[str], scratch: Path) -> Iterator[Case]:
    """Numbered checkpoints of these families, written below `scratch`."""
    from fixtures import FIXTURES, checkpoint, zoo

    wanted = set(families)
    seen: set[tuple[str, str]] = set()
    for fixture in [*FIXTURES.values(), *zoo().values()]:
        if fixture.family not in wanted:
            continue
        plain = checkpoint(fixture.name)
        config = json.loads((plain / "config.json").read_text())
        if "quantization_config" in config or "compression_config" in config:
            continue
        for suffix, edit in VARIANTS.items():
            made = _made(plain, config, fixture.family, scratch / f"{fixture.name}{suffix}", edit)
            if made is None:
                continue
            source, numbers = made
            key = fixture.family, suffix
            if key in seen and suffix in ("-tied", "-untied"):
                continue
            first = key not in seen and suffix in ("", "-main")
            seen.add(key)
            most = 8 if first else 2 if suffix in ("-tied", "-untied") else 4
            yield Case(
                f"{fixture.name}{suffix}",
                fixture.family,
                scratch / f"{fixture.name}{suffix}",
                source,
                numbers,
                tuple(n for n in fixture.tp if n <= most),
                fixture.experts if suffix in ("", "-main") else 0,
                first,
            )


Stored = dict[str, tuple[int, ...]]


def _as_it_is(stored: Stored, config: dict[str, Any], source: Source) -> bool:
    return not source.layout.model.family.extra or source.layout.model.sizes["layer"] == source.layout.model.main_layers


def _main(stored: Stored, config: dict[str, Any], source: Source) -> bool:
    """Without the layers that predict ahead."""
    model = source.layout.model
    beyond = {
        slot.name(point)
        for slot in source.layout.slots
        for point in slot.points()
        if point.get("layer", 0) >= model.main_layers
        or any(leaf.startswith(("mtp", "draft")) for leaf in slot.template.leaves)
    }
    for name in beyond:
        stored.pop(name, None)
    for key in model.family.extra.values():
        for one in key.split(" | "):
            if one in config:
                config[one] = 0
    return bool(beyond)


def _tied(stored: Stored, config: dict[str, Any], source: Source) -> bool:
    head = _head(source)
    if head is None or head not in stored or not _as_it_is(stored, config, source):
        return False
    del stored[head]
    config["tie_word_embeddings"] = True
    return True


def _untied(stored: Stored, config: dict[str, Any], source: Source) -> bool:
    head, model = _head(source), source.layout.model
    if head is None or head in stored or not model.alias or not _as_it_is(stored, config, source):
        return False
    stored[head] = model.tensors["embed"].sizes
    config["tie_word_embeddings"] = False
    return True


VARIANTS = {"": _as_it_is, "-main": _main, "-tied": _tied, "-untied": _untied}


def _head(source: Source) -> str | None:
    """The stored name of the head where it can be tied to the embeddings."""
    family = source.layout.model.family
    if family.tied.get("head") != "embed":
        return None
    row = next((row for row in family.rows if row.leaves == ("head",) and not row.name.axes), None)
    return row.name.text.replace("~", next(iter(family.prefixes), ""), 1) if row else None


def _made(
    plain: Path, config: dict[str, Any], family: str, directory: Path, edit: Any
) -> tuple[Source, Numbers] | None:
    source = open_source(plain)
    twice = source.layout.model.tensors.keys() >= {"head", "embed"} and not source.layout.model.alias
    if twice and config.get("tie_word_embeddings"):
        return None  # an engine takes one of them
    stored = {slot.name(point): slot.shape for slot in source.layout.slots for point in slot.points()}
    config = {key: value for key, value in config.items() if key != "torch_dtype"} | {"dtype": "float32"}
    if not edit(stored, config, source):
        return None
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(config, indent=1, sort_keys=True))
    blank = {name: np.zeros(shape, np.float32) for name, shape in stored.items()}
    save_file(blank, directory / "model.safetensors", {"format": "pt"})
    try:
        made = open_source(directory)
        numbers = Numbers(made.layout.model)
    except ReshardError:
        return None  # the family has no such variant, or it is too large
    values = {name: array.astype(np.float32) for _, name, array in held(made.layout, numbers)}
    save_file(values, directory / "model.safetensors", {"format": "pt"})
    added = spellings().get(family, {})
    config = {
        key: config.get(value[1:]) if isinstance(value, str) and value.startswith("=") else value
        for key, value in added.items()
    } | config
    (directory / "config.json").write_text(json.dumps(config, indent=1, sort_keys=True))
    return made, numbers


# --- running ----------------------------------------------------------------------------------------------------------


def environment(engine: str, version: str) -> Path:
    """The interpreter of an environment in which the engine can be imported, made if it is not there."""
    venv = CACHE / f"{engine}-{version}"
    python = venv / "bin" / "python"
    if not (venv / "ready").exists():
        recipe = HERE / f"{engine}-{version}.sh"
        if not recipe.exists():
            raise SystemExit(f"no recipe {recipe.name} in {HERE}")
        subprocess.run(["bash", recipe, venv], check=True)
        (venv / "ready").touch()
    return python


def load(engine: str, python: Path, made: Iterable[Case], scratch: Path) -> list[Loaded]:
    """What the engine holds of each case at each of its meshes. What was asked before is not asked again."""
    asked = []
    for case in made:
        told = hashlib.sha256((case.directory / "config.json").read_bytes())
        told.update((case.directory / "model.safetensors").read_bytes())
        for mesh in case.meshes():
            out = scratch / "held" / f"{case.name}.{label(mesh)}.{told.hexdigest()[:12]}"
            asked.append((case, mesh, out))
    (scratch / "held").mkdir(exist_ok=True)
    todo = [one for one in asked if not _done(one[2], one[1])]
    if todo:
        jobs = scratch / "jobs.jsonl"
        jobs.write_text(
            "".join(
                json.dumps(
                    {
                        "model": str(case.directory),
                        "tp": mesh.tp,
                        "pp": mesh.pp,
                        "ep": mesh.ep > 1,
                        "stages": mesh.layers,
                        "out": str(out),
                    }
                )
                + "\n"
                for case, mesh, out in todo
            )
        )
        with (scratch / "probe.log").open("w") as log:
            command = [str(python), str(HERE / f"{engine}_probe.py"), str(jobs)]
            child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)
            for number, line in enumerate(child.stdout or (), 1):
                print(f"[{number}/{len(todo)}] {line.rstrip()[:180]}", file=sys.stderr, flush=True)
            if child.wait():
                raise SystemExit(f"{engine} could not be asked: see {scratch / 'probe.log'}")
    return [_read(*one) for one in asked]


def _done(out: Path, mesh: Mesh) -> bool:
    return Path(f"{out}.error").exists() or all(
        Path(f"{out}.{rank}.safetensors").exists() for rank in range(mesh.world)
    )


def _read(case: Case, mesh: Mesh, out: Path) -> Loaded:
    wrong = Path(f"{out}.error")
    if wrong.exists():
        return Loaded(case, mesh, (), json.loads(wrong.read_text())["error"])
    ranks = [load_file(f"{out}.{rank}.safetensors") for rank in range(mesh.world)]
    return Loaded(case, mesh, tuple({name: held.float().numpy() for name, held in rank.items()} for rank in ranks), "")
