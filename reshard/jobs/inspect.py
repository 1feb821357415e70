"""`reshard inspect`: what a directory or Hub id is, as data and as text. Prints nothing."""

import os
from collections import Counter
from pathlib import Path
from typing import Annotated, Any

from msgspec import UNSET, Struct, UnsetType

from ..checkpoints import remote
from ..checkpoints.opening import open_any
from ..checkpoints.published import Published, open_published
from ..checkpoints.source import Source
from ..errors import PlaceError, ReshardError
from ..inputs.decode import about
from ..model.storage import parameters, ways
from ..model.understand import Config, Model
from ..store import location
from ..store.workfolder import in_words, left_by_killed
from ..tables import schemes
from ..tables.notation import bases, fold
from ..text.escapes import in_line
from ..text.units import decimal
from .json_result import as_json
from .plan import facts

# What facts are called in the text, where not by their keys.
LABELS = {
    "around": "wraps",
    "towers": "components",
    "kept_aside": "buffers",
    "carried": "copied as is",
    "left": "left behind",
    "root": "root digest",
    "killed": "leftovers",
}


class Description(Struct, frozen=True, kw_only=True):
    """reshard inspect --json, version 2."""

    source: str
    layout: Annotated[str | UnsetType, about("Published, or a format and its mesh.")] = UNSET
    family: str | UnsetType = UNSET
    around: Annotated[str | UnsetType | None, about("The family of the language model inside.")] = UNSET
    model: Annotated[str | UnsetType | None, about("Id on the Hub.")] = UNSET
    commit: str | UnsetType | None = UNSET
    license: str | UnsetType | None = UNSET
    bytes: Annotated[int | UnsetType, about("Of the weights files.")] = UNSET
    files: int | UnsetType = UNSET
    tensors: int | UnsetType = UNSET
    kinds: Annotated[list[str] | UnsetType, about("Names without numbers, and how many of each; without a table.")] = (
        UNSET
    )
    parameters: int | UnsetType = UNSET
    dtypes: Annotated[dict[str, int] | UnsetType, about("Tensors of each dtype.")] = UNSET
    sizes: Annotated[dict[str, int] | UnsetType, about("Of each axis.")] = UNSET
    tied: list[str] | UnsetType = UNSET
    quantization: Annotated[str | UnsetType | None, about("The method, as config.json names it.")] = UNSET
    stored: Annotated[list[str] | UnsetType, about("Of a quantised checkpoint, which matrices are stored how.")] = UNSET
    towers: Annotated[list[str] | UnsetType, about("Components other than the language model.")] = UNSET
    kept_aside: Annotated[int | UnsetType, about("Buffers that engines recompute.")] = UNSET
    carried: Annotated[list[str] | UnsetType, about("Files that are copied as they are.")] = UNSET
    left: Annotated[list[str] | UnsetType, about("Files and folders that are not copied.")] = UNSET
    root: Annotated[str | UnsetType | None, about("The digest over all files of a shard directory.")] = UNSET
    killed: Annotated[list[str], about("What killed conversions left.")]
    refused: Annotated[str | None, about("Why it cannot be converted.")] = None

    def to_json(self) -> dict[str, Any]:
        found: dict[str, Any] = as_json(self)
        return found

    def text(self) -> str:
        lines = []
        for key, value in self.to_json().items():
            if value in (None, [], {}, "") or key == "refused" or (key, value) == ("kept_aside", 0):
                continue
            if key == "kept_aside":
                value = f"{value} that engines recompute: skipped, but restored by --to hf"
            name = LABELS.get(key, key)
            if key in ("bytes",):
                value = decimal(value)
            if isinstance(value, list):
                lines += [
                    f"{name + ':':<14}{in_line(str(item))}" if not n else f"{'':14}{in_line(str(item))}"
                    for n, item in enumerate(value)
                ]
            elif isinstance(value, dict):
                lines += _wrap(name, [in_line(f"{k} {v}") for k, v in value.items()])
            else:
                lines.append(f"{name + ':':<14}{in_line(str(value))}")
        if self.refused:
            lines += ["", f"cannot be converted: {self.refused}"]
        return "\n".join(lines)


def _wrap(name: str, items: list[str], width: int = 80) -> list[str]:
    lines = [f"{name + ':':<14}"]
    for n, item in enumerate(items):
        word = item + ("," if n < len(items) - 1 else "")
        if len(lines[-1]) + 1 + len(word) > width and lines[-1].strip():
            lines.append(" " * 14)
        lines[-1] += ("" if lines[-1].endswith(" ") else " ") + word
    return lines


def describe(src: str | Path, revision: str | None = None, family: str | None = None) -> Description:
    """Describe a source, and what killed conversions left in it and next to it.

    A checkpoint that no table fits is described by its headers, with the reason; so is a directory that is no
    checkpoint if there are leftovers in it.
    """
    killed = _killed(Path(src))
    try:
        return Description(**_understood(open_any(src, revision, family), str(src)), killed=killed)
    except PlaceError:
        raise  # it says nothing about the source
    except ReshardError as error:
        refused = error.with_traceback(None)  # whose frames hold what was read
        refused.__context__ = None
    try:
        return Description(**_headers(published(str(src), revision)), killed=killed, refused=str(refused))
    except ReshardError:
        if killed:
            return Description(source=str(src), killed=killed, refused=str(refused))
        raise refused from None


def _killed(path: Path) -> list[str]:
    """What killed conversions have left in a directory, or of a conversion to it."""
    if not path.is_dir():
        return []
    out = Path(os.path.realpath(path))
    next_to_it = [folder for folder in left_by_killed(out.parent) if folder.out == out and not folder.inside]
    return [in_words(folder) for folder in (*next_to_it, *left_by_killed(out))]


def published(src: str, revision: str | None) -> Published:
    """Headers and config.json of a published checkpoint, here or in a store."""
    location.source(src)
    if location.scheme(src) is None and Path(src).exists():
        return open_published(Path(src))
    return remote.published(location.opened(src, revision, keep=False), src)


def _understood(source: Source, name: str) -> dict[str, Any]:
    model, layout, about = source.layout.model, source.layout, facts(source, name)
    beside = {row.leaves[0] for row in model.family.rows if row.tower}
    own = {
        base for name, tensor in model.tensors.items() if name not in beside for base in bases(tensor.axes)
    } | model.family.sizes.keys()
    atoms = {axis for axis in model.sizes if axis in own and (axis not in model.family.axes or axis == "heads")}
    atoms = {axis for axis in atoms if not schemes.OWN.fullmatch(axis)}
    return {
        "source": name,
        "layout": f"{layout.format.name}, {layout.mesh}" if layout.format.cut else "published (Hugging Face)",
        "family": model.family.plain,
        "around": model.family.around or None,
        "model": source.origin.id,
        "commit": source.origin.commit,
        "license": source.origin.license,
        "bytes": about.nbytes,
        "files": about.files,
        "tensors": about.tensors,
        "parameters": parameters(model),
        "dtypes": dict(about.dtypes),
        "sizes": {axis: model.sizes[axis] for axis in sorted(atoms)},
        "tied": [f"{name} is {other}" for name, other in model.alias.items()],
        "quantization": _quantization(source.config),
        "stored": ways(model),
        "towers": _towers(model),
        "kept_aside": len(model.aside),
        "carried": [file.name for file in source.carried],
        "left": [file.name for file in source.left],
        "root": source.root_digest,
    }


def _towers(model: Model) -> list[str]:
    """Components next to the language model, and how many parameters each has."""
    parameters: Counter[str] = Counter()
    for row in model.family.rows:
        if row.tower:
            parameters[row.tower] += model.tensors[row.leaves[0]].elements
    return [f"{name}, {count:,} parameters" for name, count in parameters.items()]


def _headers(published: Published) -> dict[str, Any]:
    kinds = Counter(fold(name)[0] for name in published.tensors)
    return {
        "source": published.where,
        "family": f"unknown (model_type {published.config.model_type})",
        "bytes": published.bytes,
        "files": sum(not original.plain for original in published.originals),
        "tensors": len(published.tensors),
        "kinds": [f"{count} × {kind}" for kind, count in kinds.items()],
        "dtypes": dict(Counter(entry.dtype for _, entry in published.tensors.values())),
        "quantization": _quantization(published.config),
    }


def _quantization(config: Config) -> str | None:
    said = config.quantization
    return None if said is None else str(said.get("quant_method") or said.get("quant_algo") or "unnamed")
