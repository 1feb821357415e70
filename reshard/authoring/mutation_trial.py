"""Trials: a mutated table on a checkpoint, next to the table as it is, until some check tells them apart.

A wrong table that fits is consistent: what it converts, it merges back, so that `verify` finds nothing by digests,
weights or files. It is caught only where it does not fit a checkpoint, or where the model is run.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

from ..checkpoints.published import Published, open_published
from ..checkpoints.source import Source, from_published
from ..errors import ReshardError
from ..layout.cut import Layout, Piece, lay_out
from ..layout.join import plan
from ..layout.mesh import Mesh
from ..model.understand import Model
from ..tables import families, formats
from ..tables.families import Family
from .mutations import Mutation

# What can catch a mutation, in the order tried, and what that means.
CHECKS = {
    "reading": "the table contradicts itself: it cannot be read",
    "opening": "the table does not fit the checkpoint: it cannot be opened",
    "planning": "tensors have axes that the formats do not know",
    "numerics": "fits and merges back bit by bit, but the model computes other logits",
    "beyond": "as numerics, but in something that verify --numerics does not check",
}
EQUIVALENT, MISSED, OPEN = "equivalent", "NOT CAUGHT", "not run"

LARGEST = 50_000_000  # elements of a given checkpoint that is run, in float64, for every mutation
MESHES = (Mesh(), Mesh(2), Mesh(3), Mesh(4), Mesh(8), Mesh(2, 2), Mesh(4, ep=2), Mesh(3, weights=(2, 1, 1)))
TIMES, FLOOR = 16.0, 1e-7  # × the rounding between one rank and two; × the largest logit
TRUE = 4.0  # × what transformers changes between float32 and float64: the bound of verify --numerics
PROMPTS, LENGTH = 2, 24


@dataclass(frozen=True)
class Trial:
    """One mutation, in words, what caught it, and how."""

    name: str
    by: str
    words: str = ""
    checkpoint: str = ""


def tried(mutation: Mutation, table: Family, benches: Sequence["Bench"]) -> Trial:
    """One mutation: read, then tried on the checkpoints that have its rows, until one tells it from the true table."""
    name = mutation.name
    mutated: Family | None = None
    if mutation.data is not None:
        try:
            mutated = families.of_chain(table.chain, mutation.data)
        except ReshardError as error:
            return Trial(name, "reading", _line(error))
    own = set(mutation.rows)
    having = sorted((bench for bench in benches if own & bench.active), key=lambda bench: -len(own & bench.active))
    found = [] if having else [Trial(name, MISSED, "no checkpoint has these rows")]
    for bench in having:
        trial = _on(bench, mutation, mutated)
        if trial.by in CHECKS:
            return trial
        found.append(trial)
    return max(found, key=lambda trial: (EQUIVALENT, OPEN, MISSED).index(trial.by))


def _on(bench: "Bench", mutation: Mutation, mutated: Family | None) -> Trial:
    """One mutation on one checkpoint."""
    name = mutation.name
    if mutated is None:
        assert mutation.shift is not None
        leaf, axis = mutation.shift
        displaced = bench.displaced(leaf, axis) if leaf else bench.renumbered(mutation.rows[0], axis)
        if displaced is None:
            return Trial(name, EQUIVALENT, "nothing to shift: an axis of size 1", bench.name)
        source = displaced
    else:
        try:
            source = bench.open(mutated)
        except ReshardError as error:
            return Trial(name, "opening", _line(error), bench.name)
        if meaning(source.layout) == bench.meaning:
            return Trial(name, EQUIVALENT, "means the same for every element", bench.name)
    try:
        plan(source.layout, lay_out(bench.native, source.layout.model, bench.mesh))
    except ReshardError as error:
        return Trial(name, "planning", _line(error), bench.name)
    trial = Trial(name, OPEN, bench.why, bench.name) if bench.why else bench.judge(source, name)
    if trial.by not in CHECKS and mutated is not None and bench.shards(source) == bench.shards():
        return Trial(name, EQUIVALENT, "gives the same shards on every mesh", bench.name)
    return trial


def _line(error: ReshardError) -> str:
    """The first thing that an error says is wrong."""
    lines = [line.strip() for line in error.message.splitlines()]
    return lines[1] if len(lines) > 1 and lines[0].endswith(":") else lines[0]


class Bench:
    """A checkpoint on which mutations are tried, opened once with the true table."""

    def __init__(self, name: str, root: Path, table: Family, skipped: str | None) -> None:
        self.name, self.table = name, table
        self.published: Published = open_published(root, name)
        self.source = from_published(self.published, table)
        model = self.source.layout.model
        self.active = set(model.active)
        self.meaning = meaning(self.source.layout)
        self.native = formats.load("native").for_family(table.name)
        self.mesh = Mesh(2)
        self._shards: list[Any] | None = None
        self.first: Any = None  # runtime.used.Used: where the table as it is begins to be wrong
        try:
            lay_out(self.native, model, self.mesh)
        except ReshardError:
            self.mesh = Mesh()
        lay_out(self.native, model, self.mesh)
        elements = sum(tensor.elements for held, tensor in model.tensors.items() if held not in model.alias)
        self.why = skipped or (
            f"{name} is too large to run: {elements} elements, at most {LARGEST}" if elements > LARGEST else ""
        )
        self.rounding = 0.0
        if not self.why:
            try:
                self._prepare(model)
            except Exception as error:  # a family that the runtime does not know
                self.why = (
                    f"the runtime cannot run {name}: {type(error).__name__}: {' '.join(str(error).split())[:100]}"
                )
        about = ", ".join(f"{axis} {size}" for axis, size in sorted(model.sizes.items()) if axis in self.table.sizes)
        self.words = f"{name} ({len(self.published.tensors)} tensors; {about})"

    def _prepare(self, model: Model) -> None:
        """What the true table makes of it on one rank, and how far two ranks are from that."""
        import torch

        length = min(LENGTH, model.sizes.get("pos", LENGTH))
        self.ids = torch.randint(0, model.sizes["vocab"], (PROMPTS, length), generator=torch.Generator().manual_seed(0))
        self.wanted = _mutated().run(self.source, Mesh(), self.ids).logits
        self.same = _mutated().run(self.source, self.mesh, self.ids)
        self.ahead, self.apart = _mutated().ahead(self.source, self.ids), _mutated().apart(self.source, self.ids)
        largest, own = float(self.wanted.abs().max()), _mutated().distance(self.same.logits, self.wanted)
        self.rounding = max(TIMES * own, FLOOR * largest)
        if not own < largest / 1000:
            raise ReshardError(
                f"two ranks compute other logits than one: off by {own:.3g}, the largest is {largest:.3g}"
            )

    def against_transformers(self) -> tuple[str, bool | None]:
        """What an independent implementation says of the table as it is, and whether that is that it is right;
        None: there is none.
        """
        import torch

        if self.why or self.published.root is None:
            return "", None
        references = import_module("reshard.runtime.proof.reference")
        with torch.inference_mode():
            reference = references.reference_for(self.source)
            if not reference.independent:
                hint = f": {reference.hint}" if reference.hint else ""
                return f"the table itself: no independent reference, only {reference.name}{hint}", None
            exact, own = (reference.logits(self.ids, dtype) for dtype in (torch.float64, torch.float32))
            if not (error := references.relative(own, exact)) <= references.FINE:
                words = (
                    f"{reference.name} is off by {error:.2g} of the scale of its logits, more than rounding explains"
                )
                return f"the table itself: no independent reference: {words}", None
            off, bound = _mutated().distance(self.wanted, exact), TRUE * _mutated().distance(own, exact)
            words = (
                f"the table itself: logits differ from {reference.name} by {off:.2g}, its own rounding "
                f"allows {bound:.2g}"
            )
            if not off > bound:
                return words, True
            self.first = import_module("reshard.runtime.proof.first_difference").first_to_differ(
                self.source, reference, self.ids
            )
        where = f"; the first step to differ is {self.first.name}" if self.first is not None else ""
        return f"WRONG: {words}{where}", False

    def open(self, table: Family) -> Source:
        """The checkpoint by another table. Raises ReshardError where it does not fit."""
        return from_published(self.published, table)

    def shards(self, source: Source | None = None) -> list[Any]:
        """What every mesh would make of this checkpoint by the table of a source, by the true one: every copy,
        or that it does not fit.
        """
        if source is None:
            if self._shards is None:
                self._shards = self.shards(self.source)
            return self._shards
        found: list[Any] = []
        for mesh in MESHES:
            try:
                joined = plan(source.layout, lay_out(self.native, source.layout.model, mesh))
            except ReshardError:
                found.append(None)
                continue
            copies = ((c.src_name, c.src_offset, c.dst.rank, c.dst_name, c.dst_offset, c.dims) for c in joined.copies())
            found.append(sorted(copies))
        return found

    def renumbered(self, at: int, axis: str) -> Source | None:
        """The checkpoint with every tensor of a row taken for its neighbour along an axis of its name;
        None where there is none.
        """
        places = dict(self.source.places)
        for slot in self.source.layout.slots:
            if slot.row != at:
                continue
            points = list(slot.points())
            order = sorted({point[axis] for point in points})
            if len(order) < 2:
                return None
            for point in points:
                after = order[(order.index(point[axis]) + 1) % len(order)]
                places[0, slot.name(point)] = self.source.places[0, slot.name(point | {axis: after})]
        return replace(self.source, places=places)

    def displaced(self, leaf: str, axis: str) -> Source | None:
        """The checkpoint with a tensor read one further along an axis, around;
        None where there is nothing to displace.
        """
        layout = self.source.layout
        pieces: list[Piece] = []
        held = layout.pieces.get(leaf, ())
        for piece in held:
            at = piece.tensor.axes.index(axis) if axis in piece.tensor.axes else -1
            stride = piece.strides[at] if at >= 0 else None
            # as in layers where names count what others have stacked
            if stride is None or piece.box[at][1] - piece.box[at][0] < 2:
                pieces.append(piece)
                continue
            low, high = piece.box[at]
            parts = (((low, high - 1), piece.offset + stride), ((high - 1, high), piece.offset))
            for part, offset in parts:
                pieces.append(replace(piece, box=(*piece.box[:at], part, *piece.box[at + 1 :]), offset=offset))
        if len(pieces) == len(held):
            return None
        return replace(self.source, layout=replace(layout, pieces=layout.pieces | {leaf: tuple(pieces)}))

    def judge(self, source: Source, name: str) -> Trial:
        """What running the model says of a table that fits."""
        mutated = _mutated()
        try:
            got = mutated.run(source, self.mesh, self.ids)
        # whatever the runtime stumbles over: tensors that it needs are not what they should be
        except Exception as error:
            words = " ".join(str(error).split())[:100]
            return Trial(name, "numerics", f"the model cannot be run: {type(error).__name__}: {words}", self.name)
        if (off := mutated.distance(got.logits, self.wanted)) > self.rounding:
            return Trial(name, "numerics", f"logits differ by {off:.3g}", self.name)
        kept = max((mutated.distance(a, b) for a, b in zip(got.kept, self.same.kept, strict=True)), default=0.0)
        if kept > self.rounding:
            return Trial(
                name, "beyond", f"the same logits, by softmax; keys in the cache differ by {kept:.3g}", self.name
            )
        branches = ("branches one after the other", mutated.apart, self.apart)
        for what, compute, wanted in (("multi-token prediction", mutated.ahead, self.ahead), branches):
            if wanted is None:
                continue
            try:
                off = mutated.distance(compute(source, self.ids), wanted)
            except Exception as error:
                off, words = math.inf, f" ({type(error).__name__})"
            else:
                words = ""
            if off > self.rounding:
                return Trial(name, "beyond", f"the same logits; those of {what} differ by {off:.3g}{words}", self.name)
        return Trial(
            name, MISSED, f"the same logits: they differ by {off:.3g}, rounding is {self.rounding:.3g}", self.name
        )


def meaning(layout: Layout) -> dict[str, Any]:
    """What a layout says, however it was written: of each logical tensor its sizes, and where its elements lie."""
    found: dict[str, Any] = {}
    for name, tensor in layout.model.tensors.items():
        pieces = []
        for piece in layout.holding(name):
            own = {
                a: (box, s)
                for a, box, s in zip(tensor.axes, piece.box, piece.strides, strict=True)
                if box[1] - box[0] > 1 or s is None
            }
            slot = piece.slot
            pieces.append((slot.template.name.text, slot.shape, slot.layers, piece.offset, tuple(sorted(own.items()))))
        axes = sorted(zip(tensor.axes, tensor.sizes, strict=True))
        found[name] = (axes, tensor.dtypes, tensor.layers, sorted(pieces, key=repr))
    model = layout.model
    return found | {"": (sorted(model.alias.items()), model.main_layers, dict(model.sizes), model.aside)}


@contextmanager
def one_thread() -> Iterator[None]:
    """Torch on one thread: the models are small, and ranks are threads already."""
    import torch

    was = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(was)


def _mutated() -> Any:
    """What runs a model, in the runtime: it needs torch."""
    return import_module("reshard.runtime.proof.mutated")
