"""Shard directories that an engine wrote itself: no manifest, no index, nothing that says how many ranks there are.

Read otherwise than a published checkpoint, because padding and repetition cannot be inferred from shapes: the mesh
follows from file names, the logical tensors from stored names, their true sizes from config.json and, where it is
silent, from one dimension; then the layout of exactly that model on that mesh must be what every header says. What the
checkpoint looked like before is nowhere recorded, so its original files are taken to be those that transformers would
write, down to the header bytes. Opens headers only.
"""

import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise, product
from pathlib import Path

from ..containers.container import of_file
from ..containers.entry import Entry
from ..engine.worker import Key
from ..errors import Problems, ReshardError
from ..inputs import decode, limits
from ..layout.cut import Layout, Slot, lay_out
from ..layout.mesh import Mesh
from ..model.sizes import axis_size
from ..model.understand import Model, understand
from ..store.digest import of
from ..store.local import Stamp
from ..tables import formats
from ..tables.config import Config
from ..tables.families import Family
from ..tables.formats import Format
from ..tables.notation import fold
from ..tables.row import Constant
from .companions import beside
from .hf_split import loaded_order, resplit
from .published import (
    WEIGHTS,
    Original,
    Published,
    Tally,
    family_table,
    index_map,
    natural,
    origin_of,
    read_header,
    read_json,
    stamps_of,
    understood,
)
from .source_kinds import EngineSource

MAX_FILE_SIZE = 50 * 10**9  # bytes: what save_pretrained of transformers 5 splits by when nothing else is asked for
NS = 10**9

Place = tuple[Path, Entry]
Held = dict[str, dict[int, str]]  # logical tensor → layer (-1: belongs to none) → dtype


def recognised(root: Path) -> Format | None:
    """The format of which a directory holds shards, by their file names; None where there are none, or published
    weights beside them.

    An index counts as published weights only if one of its files is there: engines copy indexes along with config.json.
    """
    names = sorted(path.name for path in root.iterdir())
    for name in formats.shipped():
        table = formats.load(name)
        if table.engine and any(pattern.fullmatch(name) for pattern in _patterns(table).values() for name in names):
            return None if _has_published(root, names) else table
    return None


def open_shards(root: Path, table: Format, family: Family | None = None) -> EngineSource:
    """Understand a directory that `recognised` gave a format for; `family` instead of the one that config.json names.

    Raises ReshardError for ranks that are missing, keys that are missing, doubled or unexpected, and every shape or
    dtype that is not what config.json and the number of ranks make of it.
    """
    where = str(root)
    files, tp, pp = _ranks(root, table)
    earlier = stamps_of([root / "config.json"])
    config = Config(read_json(root / "config.json", missing="every checkpoint has one; is this the right directory?"))
    places, stamps = _read(root, files, tp)
    if not places:
        raise ReshardError(f"{where}: the shards hold no tensors", "is the copy complete?")
    if family is None:
        family = family_table(
            Published(where, root, config, (), {name: (0, entry) for (_, name), (_, entry) in places.items()})
        )
    # what the engine requires it has checked itself; here sizes are yet to be found
    known = replace(table.for_family(family.plain), requires=())
    reading = _Reading(where, known, family, config.with_defaults(family.defaults), places)
    mesh = Mesh(tp, pp, layers=reading.stages(tp, pp))
    try:
        model = reading.model(mesh)
        reading.check(reading.lay_out(model, mesh))
    except ReshardError as error:
        raise ReshardError(error.message, reading.advice(mesh) or error.hint) from None
    originals, tensors, residues = _as_transformers_would(model, _one_time(stamps))
    carried, left = beside(root, {path.name for path in stamps})
    published = Published(where, root, config, originals, tensors, carried, left, origin_of(root))
    model, originals = understood(published, family)
    return EngineSource(
        where=where,
        root=root,
        config=config,
        layout=lay_out(reading.format, model, mesh),
        places=places,
        originals=originals,
        tensors=tensors,
        carried=carried,
        left=left,
        origin=published.origin,
        stamps=stamps_of(root / file.name for file in carried) | earlier | stamps,
        residues=residues,
    )


# --- files ------------------------------------------------------------------------------------------------------------


def _patterns(table: Format) -> dict[str, re.Pattern[str]]:
    """The names of a format's files: numbers without leading zeros; a part may be called anything, as to the engine's
    own glob.
    """

    def pattern(text: str) -> re.Pattern[str]:
        pieces = re.split(r"\{(\w+)\}", text)  # literal text and placeholders by turns
        holes = [".*" if hole == "part" else rf"(?P<{hole}>0|[1-9][0-9]{{0,4}})" for hole in pieces[1::2]]
        return re.compile("".join(re.escape(text) + hole for text, hole in zip(pieces[::2], [*holes, ""], strict=True)))

    return {kind: pattern(text) for kind, text in table.files.items()}


def _has_published(root: Path, names: Iterable[str]) -> bool:
    def held(index: str) -> bool:
        return index in names and any(
            (root / file).exists() for file in set(index_map(decode.read(root / index, limits.INDEX), index).values())
        )

    return any(single in names or held(index) for single, index in WEIGHTS)


def _ranks(root: Path, table: Format) -> tuple[dict[tuple[int, int], list[str]], int, int]:
    """The files of each (stage, tensor-parallel rank), and how many there are of both; ReshardError for gaps."""
    found: dict[str, dict[tuple[int, int], list[str]]] = {}
    patterns = _patterns(table)
    for name in sorted((path.name for path in root.iterdir()), key=natural):
        for kind, pattern in patterns.items():
            if match := pattern.fullmatch(name):
                numbers = match.groupdict()
                at = int(numbers.get("pp") or 0), int(numbers.get("tp") or numbers["rank"])
                found.setdefault(kind, {}).setdefault(at, []).append(name)
    if len(found) > 1:
        one, other = (next(iter(files.values()))[0] for files in found.values())
        raise ReshardError(
            f"{root}: holds {one} and {other}, which come from two saves", "move the files of one of them away"
        )
    ((kind, files),) = found.items()
    pp, tp = (1 + max(at[axis] for at in files) for axis in (0, 1))
    if len(files) < pp * tp:
        stage, rank = next(at for at in product(range(pp), range(tp)) if at not in files)
        name = table.files[kind].format(rank=rank, tp=rank, pp=stage, part="*")
        raise ReshardError(
            f"{root}: {name} is missing: by their names the files are of {Mesh(tp, pp)}, {len(files)} of "
            f"{pp * tp} ranks are there",
            "the copy is not complete: fetch the missing files",
        )
    return files, tp, pp


def _read(
    root: Path, files: Mapping[tuple[int, int], Iterable[str]], tp: int
) -> tuple[dict[Key, Place], dict[Path, Stamp]]:
    """Where every key of every rank lies, and what the files were like when they said so."""
    places: dict[Key, Place] = {}
    stamps: dict[Path, Stamp] = {}
    tally = Tally()
    for (stage, rank), names in sorted(files.items()):
        for name in names:
            path = root / name
            entries, stamps[path] = read_header(path, str(path), tally)
            for key, entry in entries.items():
                other = places.setdefault((stage * tp + rank, key), (path, entry))[0]
                if other != path:
                    raise ReshardError(
                        f"{root}: {key} is in both {other.name} and in {name}",
                        "parts of an earlier save are left over: move those away that do not belong to this one",
                    )
    return places, stamps


# --- understanding ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Reading:
    """One directory, with everything about it that does not depend on how many ranks one takes it for."""

    where: str
    format: Format
    family: Family
    config: Config
    places: Mapping[Key, Place]

    def stages(self, tp: int, pp: int) -> tuple[int, ...] | None:
        """Layers of each pipeline stage, given by the first layer of each; None where they are equal,
        or there is one stage.
        """
        firsts = [
            min((layer for layer, _, _ in self.keys(rank) if layer >= 0), default=-1) for rank in range(0, pp * tp, tp)
        ]
        ends = [*firsts, self.sizes()["layer"]]
        if pp > 1 and (ends[0] != 0 or not all(low < high for low, high in pairwise(ends))):
            raise ReshardError(
                f"{self.where}: the stages begin with layers {', '.join(map(str, firsts))}, config.json says "
                f"{ends[-1]} layers",
                "each stage holds layers of its own, in order, the first stage from 0 on; are the files those "
                "of one save?",
            )
        counts = tuple(high - low for low, high in pairwise(ends))
        return counts if len(set(counts)) > 1 else None

    def lay_out(self, model: Model, mesh: Mesh) -> Layout:
        try:
            return lay_out(self.format, model, mesh)
        except ReshardError as error:
            raise ReshardError(f"{self.where}: {error.message}", error.hint) from None

    def keys(self, rank: int | None = None) -> Iterator[tuple[int, tuple[str, ...], Entry]]:
        """(layer or -1, logical tensors, entry) of every key, of one rank or of all, that some row of the format
        describes.
        """
        rows = {row.name.folded: row for row in reversed(self.format.rows)}  # where two share a name, the first counts
        for (at, name), (_, entry) in self.places.items():
            if rank is not None and at != rank:
                continue
            folded, numbers = fold(name)
            row = rows.get(name) or rows.get(folded)
            if row is not None and len(numbers) >= len(row.name.axes):  # a name may hold braces itself
                yield numbers[row.name.axes.index("layer")] if "layer" in row.name.axes else -1, row.leaves, entry

    def axes(self) -> set[str]:
        return {axis for row in self.family.rows for path in (row.name.axes, *row.pattern.axes) for axis in path}

    def sizes(self) -> dict[str, int]:
        """Sizes that config.json gives, and those of the parts of a compound axis that follow from it."""
        given = {axis: self.config.size(expression) for axis, expression in self.family.sizes.items()}
        sizes = {axis: size for axis, size in given.items() if size is not None}
        for name, atoms in self.family.axes.items():
            missing = [atom for atom in atoms if atom not in sizes]
            if name in sizes and len(missing) == 1:
                known = math.prod(sizes[atom] for atom in atoms if atom in sizes)
                if not known or sizes[name] % known:
                    others = " × ".join(atom for atom in atoms if atom in sizes)
                    raise ReshardError(
                        f"{self.where}: config.json: {name} is {sizes[name]}, which is not a multiple of {others} "
                        f"= {known}"
                    )
                sizes[missing[0]] = sizes[name] // known
        for axis in ("layer", *self.format.pad, *self.format.replicate):  # padding and repetition hide these
            if axis not in sizes and (axis == "layer" or axis in self.axes()):
                raise ReshardError(
                    f"{self.where}: config.json has no {self.family.sizes.get(axis, axis)}, and shapes cannot "
                    f"tell the size of axis {axis}",
                    "take config.json from the checkpoint that was served",
                )
        if sizes["layer"] > len(self.places):
            raise ReshardError(
                f"{self.where}: config.json says {sizes['layer']} layers, the shards hold {len(self.places)} "
                f"tensors in all"
            )
        return sizes

    def model(self, mesh: Mesh) -> Model:
        """The model of which these are the shards on that mesh, if they are any."""
        sizes = self.sizes()
        unknown = sorted(self.axes() - sizes.keys())
        guess = sizes | dict.fromkeys(unknown, mesh.tp)  # a size that every cut divides
        model = understand(self.family, self.config, self._published(guess), self.where)
        return self._solved(model, mesh, [axis for axis in unknown if axis in model.sizes])

    def _published(self, sizes: Mapping[str, int]) -> dict[str, Entry]:
        """Tensors of the published checkpoint, by the family table: what every such model has, and what these shards
        have besides.
        """
        held: Held = defaultdict(dict)
        for layer, leaves, entry in self.keys():
            for leaf in leaves:
                held[leaf].setdefault(layer, entry.dtype)
        usual = Counter(entry.dtype for _, entry in self.places.values()).most_common(1)[0][0]
        kinds = [self._kinds(layer, held) for layer in range(sizes["layer"])]
        tied = self.family.tied
        if self.config.tied:  # transformers writes the embedding, whichever name the engine keeps
            for head, embed in tied.items():
                held[embed] = held.pop(head, {}) | held.get(embed, {}) or {-1: usual}
        prefix = next(iter(self.family.prefixes), "")
        tensors = {}
        for row in self.family.rows:
            if (row.tags or {*tied, *tied.values()} & {*row.leaves}) and not all(held.get(leaf) for leaf in row.leaves):
                continue
            if "layer" not in row.name.axes and (row.kinds or row.either) and not any(map(row.within, kinds)):
                continue
            dtypes = {-1: usual} | held.get(row.leaves[0], {})
            layers = [layer for layer, kind in enumerate(kinds) if row.within(kind)] if "layer" in row.name.axes else []
            ranges = [layers if axis == "layer" else range(sizes[axis]) for axis in row.name.axes]
            if (count := math.prod(map(len, ranges))) > limits.TENSORS:
                raise ReshardError(
                    f"{self.where}: config.json promises {count} tensors {row.name.text}", "is it this checkpoint's?"
                )
            shape, _ = row.pattern.measure(lambda _, axis: axis_size(axis, sizes))
            for numbers in product(*ranges):
                point = dict(zip(row.name.axes, numbers, strict=True))
                name = row.name.name(point).replace("~", prefix, 1)
                tensors[name] = Entry(dtypes.get(point.get("layer", -1), usual), shape, 0, 0)
        return tensors

    def _kinds(self, layer: int, held: Held) -> set[str]:
        """Of which kinds a layer is: of every set the first of which it has some row."""
        found = {
            kind
            for row in self.family.rows
            if all(layer in held.get(leaf, {}) for leaf in row.leaves)
            for kind in row.kinds
        }
        return {next(kind for kind in group if kind in found) for group in self.family.one_of if found & {*group}}

    def _solved(self, model: Model, mesh: Mesh, unknown: list[str]) -> Model:
        """The model with the sizes that config.json does not give.

        A stored dimension is linear in each axis: two layouts, one with the axis twice as large, show how it grows.
        """
        sizes = dict(model.sizes)

        def shapes(changed: dict[str, int]) -> list[Slot]:
            seen: dict[int, Slot] = {}
            for slot in self.lay_out(_sized(model, sizes | changed), mesh).slots:
                seen.setdefault(slot.row, slot)
            return list(seen.values())

        while unknown:
            here = shapes({})
            there = {axis: shapes({axis: 2 * sizes[axis]}) for axis in unknown}
            solution = self._first_solution(here, there, sizes)
            if solution is None:
                break  # none of the keys that would tell is there: `check` names them
            solved, size = solution
            sizes[solved] = size
            unknown = [axis for axis in unknown if axis != solved]
        return _sized(model, sizes)

    def _first_solution(
        self, here: list[Slot], there: Mapping[str, list[Slot]], sizes: Mapping[str, int]
    ) -> tuple[str, int] | None:
        for at, slot in enumerate(here):
            found = Counter(
                self.places[key][1].shape
                for point in slot.points()
                if (key := (slot.rank, slot.name(point))) in self.places
            ).most_common(1)
            for d, (size, stored) in enumerate(zip(slot.shape, found[0][0] if found else (), strict=False)):
                growth = {axis: grown for axis, slots in there.items() if (grown := slots[at].shape[d] - size)}
                if len(growth) != 1:
                    continue
                ((axis, grown),) = growth.items()
                fit, rest = divmod(sizes[axis] * (stored - size + grown), grown)
                if rest or fit < 1:
                    raise ReshardError(
                        f"{self.where}: {slot.template.name.text}: dimension {d} is {stored}: no size of {axis} fits"
                    )
                return axis, fit
        return None

    def check(self, layout: Layout, ranks: Iterable[int] | None = None) -> None:
        """Every key that the layout wants is there, in its shape and dtype, and no other; of all ranks, or of some."""
        problems = Problems()
        some = range(layout.mesh.world) if ranks is None else ranks
        wanted = {
            (slot.rank, slot.name(point)): (slot, layout.dtype(slot, point))
            for slot in (*layout.slots, *layout.constants)
            if slot.rank in some
            for point in slot.points()
        }
        for key, (slot, dtype) in wanted.items():
            text, example = slot.template.name.text, f"{key[1]} of rank {key[0]}"
            if key not in self.places:
                problems.add(f"missing {text}", example)
                continue
            entry = self.places[key][1]
            if entry.shape != slot.shape:
                problems.add(
                    f"{text}: shape {list(entry.shape)}, config.json and {layout.mesh} make it {list(slot.shape)}",
                    example,
                )
            elif entry.dtype != dtype:
                kind = "the engine" if isinstance(slot.template, Constant) else "other ranks or parts"
                problems.add(f"{text}: dtype {entry.dtype}, {dtype} in {kind}", example)
        for rank, name in self.places:
            if rank in some and (rank, name) not in wanted:
                problems.add(f"unexpected {fold(name)[0]}", f"{name} of rank {rank}")
        engine = f"{self.format.engine['name']} {', '.join(map(str, self.format.engine['versions']))}"
        problems.raise_if_any(
            f'{self.where}: is no "{self.format.name}" directory of a {self.family.name} model on {layout.mesh}:',
            f"the format is {engine}'s: other versions, and expert parallelism, store other names and shapes",
        )

    def advice(self, mesh: Mesh) -> str | None:
        """For shards that do not fit their number: how many ranks the first of them would fit."""
        for tp in (*range(1, 17), 24, 32, 48, 64):
            try:
                if tp != mesh.tp:
                    other = Mesh(tp, mesh.pp, layers=mesh.layers)
                    self.check(self.lay_out(self.model(other), other), ranks=(0,))
                    problem = (
                        "files of some ranks are missing" if tp > mesh.tp else "files of another save are among them"
                    )
                    return f"the first rank fits TP {tp}, and there are files of TP {mesh.tp}: {problem}"
            except ReshardError:
                continue
        return None


def _sized(model: Model, sizes: dict[str, int]) -> Model:
    """The same model with other sizes."""
    tensors = {
        name: replace(tensor, sizes=tuple(axis_size(axis, sizes) for axis in tensor.axes))
        for name, tensor in model.tensors.items()
    }
    return replace(model, sizes=sizes, tensors=tensors)


# --- what it was ------------------------------------------------------------------------------------------------------


def _one_time(stamps: Mapping[Path, Stamp]) -> int:
    """One time for files made of many, in ns: the second of the newest; below it, whatever changes when any of them
    does.
    """
    text = "".join(f"{path.name} {stamp.size} {stamp.mtime_ns}\n" for path, stamp in sorted(stamps.items()))
    second = max(stamp.mtime_ns for stamp in stamps.values()) // NS
    return second * NS + int(of(text.encode()), 16) % NS


def _as_transformers_would(
    model: Model, mtime_ns: int
) -> tuple[tuple[Original, ...], dict[str, tuple[int, Entry]], dict[str, bytes]]:
    """The files that transformers would write of a model it loaded, where each tensor is in them, and their bytes that
    are no tensors.
    """
    layout = lay_out(model.family.published, model, Mesh(), model.active)
    stored = {
        slot.name(point): (layout.dtype(slot, point), slot.shape) for slot in layout.slots for point in slot.points()
    }
    files, index = resplit([(name, *stored[name]) for name in loaded_order(stored)], MAX_FILE_SIZE)
    tensors = {name: (at, entry) for at, file in enumerate(files) for name, entry in file.tensors}
    residues = {file.name: file.header for file in files}
    sizes = {file.name: len(file.header) + sum(entry.nbytes for _, entry in file.tensors) for file in files}
    originals = [Original(name, size, of_file(name).name, mtime_ns) for name, size in sizes.items()]
    if index is not None:
        name = WEIGHTS[0][1]
        residues[name] = index
        originals.append(Original(name, len(index), "plain", mtime_ns))
    return tuple(originals), tensors, residues
