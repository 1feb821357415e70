"""Local shapes: what one rank holds of a model: layers, heads, experts, rows of the vocabulary."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from reshard.layout.cut import Layout, Slot
from reshard.model.understand import Model, Tensor
from reshard.tables.row import Row

from .attention import Heads, Latent
from .experts import Share
from .linear_attention import Linear

Box = Mapping[str, tuple[int, int]]  # axis → range

# Axes of queries and keys that do not count heads.
_NOT_HEADS = ("layer", "head_dim", "value_dim", "qk_dim", "hidden", "q_lora", "query_experts")


def language(layout: Layout, rank: int) -> list[Slot]:
    """The slots of the language model on a rank: all but other components, which the decoder does not run."""
    return [slot for slot in layout.by_rank[rank] if not (isinstance(slot.template, Row) and slot.template.tower)]


@dataclass(frozen=True, eq=False)
class Holdings:
    """The local shapes of one rank.

    `layers`: of its stage, without multi-token prediction; `ranks`: those of its stage; `number`: its index in them.
    """

    model: Model
    layout: Layout
    rank: int
    _heads: dict[str, Heads] = field(default_factory=dict, init=False, repr=False)  # by the name of their queries

    @cached_property
    def stage(self) -> int:
        return self.layout.mesh.stage(self.rank)

    @cached_property
    def layers(self) -> range:
        start, end = self.layout.stages[self.stage]
        return range(start, min(end, self.model.main_layers))

    @cached_property
    def ranks(self) -> tuple[int, ...]:
        tp = self.layout.mesh.tp
        return tuple(range(self.stage * tp, (self.stage + 1) * tp))

    @property
    def number(self) -> int:
        return self.rank % len(self.ranks)

    @property
    def first(self) -> bool:
        return self.stage == 0

    @property
    def last(self) -> bool:
        return self.stage == self.layout.mesh.pp - 1

    def box(self, tensor: str, rank: int | None = None) -> Box:
        """The box of a logical tensor on a rank, by default this one; {} where it has none of it."""
        for piece in self.layout.holding(tensor):
            if piece.slot.rank == (self.rank if rank is None else rank):
                return self.layout.ranges(piece)
        return {}

    def heads(self, layer: int) -> Heads:
        """The heads of a layer; layers with the same kind of queries share them."""
        queries = next(
            t
            for name in ("attn.q", "attn.q_b", "attn.q_whole", "moa.q")
            if (t := self.model.form(name, layer)) is not None
        )
        if queries.name not in self._heads:
            self._heads[queries.name] = self._counted(queries, layer)
        return self._heads[queries.name]

    def _counted(self, queries: Tensor, layer: int) -> Heads:
        sizes, box, counted = self.model.sizes, self._near(queries.name), _counting_heads(queries)
        ids = _numbers([box[axis] for axis in counted], [sizes[axis] for axis in counted])
        keys, values = (self.model.form(name, layer) for name in ("attn.k", "attn.o"))
        own = box if keys is None else self._near(keys.name)
        kept = [axis for axis in counted if not axis.startswith("group")] if keys is None else _counting_heads(keys)
        whole, kv = (
            math.prod(of) for of in ([sizes[axis] for axis in kept], [own[axis][1] - own[axis][0] for axis in kept])
        )
        copies = 1 if keys is None else self.layout.repeats.get(kept[0], 1)
        size, value = (_features(tensor, sizes) for tensor in (queries, values or queries))
        return Heads(ids, math.prod(sizes[axis] for axis in counted), kv, whole, copies, size, value)

    def _near(self, tensor: str) -> Box:
        """The box of a tensor on this rank, or on the corresponding rank of a stage that has the tensor."""
        others = range(self.number, self.layout.mesh.world, len(self.ranks))
        return self.box(tensor) or next(box for rank in others if (box := self.box(tensor, rank)))

    def key_heads(self, layer: int) -> list[tuple[int, ...]]:
        """The key heads of a layer of any stage, by index, on each rank of that stage."""
        keys = self.model.form("attn.k", layer)
        assert keys is not None
        first = len(self.ranks) * next(
            stage for stage, (low, high) in enumerate(self.layout.stages) if low <= layer < high
        )
        counted = _counting_heads(keys)
        boxes = [self.box(keys.name, first + number) for number in range(len(self.ranks))]
        return [
            _numbers([box[axis] for axis in counted], [self.model.sizes[axis] for axis in counted]) for box in boxes
        ]

    @cached_property
    def latent(self) -> Latent | None:
        sizes = self.model.sizes
        if "attn.kv_a" not in self.model.tensors:
            return None
        q = sizes["q_lora"] if "attn.q_a" in self.model.tensors else None
        return Latent(q, sizes["kv_lora"], sizes["rope_dim"], sizes["nope_dim"])

    @cached_property
    def linear(self) -> Linear:
        boxes = self.box("lin.k"), self.box("lin.v")
        counts = [
            math.prod(high - low for axis, (low, high) in box.items() if axis not in ("layer", "hidden"))
            for box in boxes
        ]
        sizes = self.model.sizes["lk_dim"], self.model.sizes["lv_dim"]
        return Linear(counts[0] // sizes[0], sizes[0], counts[1] // sizes[1], sizes[1])

    @cached_property
    def share(self) -> Share | None:
        """This rank's experts, or its part of each."""
        box = self.box("moe.down") or self.box("moe.down_packed")
        inner = next((part for axis, part in box.items() if axis.startswith("moe_inter")), (0, 0))
        return Share(*box["experts"], bias=inner[0] == 0) if box else None

    @cached_property
    def vocabulary(self) -> list[int]:
        """Rows of the vocabulary, padding included, on each rank of this stage."""
        pieces = [*self.layout.holding("embed"), *(self.layout.pieces.get("head") or self.layout.holding("head"))]
        rows = {piece.slot.rank: piece.slot.shape[0] for piece in pieces}
        return [rows[rank] for rank in self.ranks]


def _counting_heads(tensor: Tensor) -> list[str]:
    return [axis for axis in tensor.axes if axis.partition("@")[0] not in _NOT_HEADS]


def _features(tensor: Tensor, sizes: Mapping[str, int]) -> int:
    """Features of a head."""
    return next(sizes[axis] for axis in tensor.axes if axis.partition("@")[0] in ("value_dim", "qk_dim", "head_dim"))


def _numbers(box: Sequence[tuple[int, int]], sizes: Sequence[int]) -> tuple[int, ...]:
    """The row-major indices of the elements of a box, for axes of these sizes."""
    found = [0]
    for (low, high), size in zip(box, sizes, strict=True):
        found = [at * size + one for at in found for one in range(low, high)]
    return tuple(found)
