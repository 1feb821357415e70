"""One decoder for all families: what differs among them are facts (spec.py), and which tensors a checkpoint has.

A rank holds its own heads, its part of each feed-forward, its experts, its rows of the vocabulary, the layers of its stage. Per layer its
partial sums meet twice, once where attention and feed-forward start from the same place; hidden states pass from stage to stage.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from reshard.errors import ReshardError
from reshard.layout import Layout
from reshard.model import Model

from .attention import Context, Heads, Latent, Sight, attention, seen, slopes
from .cache import Cache
from .experts import Share, feed_forward
from .linear import Linear, linear_attention
from .parallel import World
from .rope import angles
from .spec import Spec
from .weights import Weights, multiply, norm

EMBEDDING, HEAD = "the embedding", "the head"  # steps, see Decoder.walk
NORMS = ("attn_norm", "post_attn_norm")

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


class Decoder(nn.Module):
    """This rank's part of a model. Its parameters are its stored tensors, by stored name; built on `meta`, filled by assignment."""

    def __init__(self, spec: Spec, model: Model, layout: Layout, rank: int, world: World) -> None:
        super().__init__()
        self.spec, self.model, self.layout, self.rank, self.world = spec, model, layout, rank, world
        mesh = layout.mesh
        self.stage = mesh.stage(rank)
        self.ranks = tuple(range(self.stage * mesh.tp, (self.stage + 1) * mesh.tp))  # those that share this stage
        self.first, self.last = self.stage == 0, self.stage == mesh.pp - 1
        start, end = layout.stages[self.stage]
        self.mine = range(start, min(end, model.main_layers))
        for slot in layout.by_rank[rank]:
            for point in slot.points():
                _put(self, slot.name(point), torch.empty(slot.shape, dtype=DTYPES[layout.dtype(slot, point)], device="meta"))

    @cached_property
    def _by_layer(self) -> tuple[dict[str, Tensor], dict[int, Weights]]:
        """Parameters outside the layers, and those of each layer."""
        outside: dict[str, Tensor] = {}
        inside: dict[int, dict[str, Tensor]] = {layer: {} for layer in self.mine}
        for name, tensor in self.named_parameters():
            if name.startswith("layers."):
                _, layer, rest = name.split(".", 2)
                inside.setdefault(int(layer), {})[rest] = tensor
            else:
                outside[name] = tensor
        return outside, {layer: Weights(tensors) for layer, tensors in inside.items()}

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = True) -> Any:
        self.__dict__.pop("_by_layer", None)
        return super().load_state_dict(state_dict, strict, assign)

    def _apply(self, *arguments: Any, **more: Any) -> Any:
        self.__dict__.pop("_by_layer", None)
        return super()._apply(*arguments, **more)  # type: ignore[no-untyped-call]

    # What this rank has of each axis

    def _box(self, tensor: str, rank: int | None = None) -> dict[str, tuple[int, int]]:
        """Axis → range of a logical tensor on a rank; nothing where it has none of it."""
        for piece in self.layout.holding(tensor):
            if piece.slot.rank == (self.rank if rank is None else rank):
                return dict(zip(piece.tensor.axes, piece.box, strict=True))
        return {}

    @cached_property
    def heads(self) -> Heads:
        latent = "attn.kv_a" in self.model.tensors
        sizes = self.model.sizes
        box = self._box(next(name for name in ("attn.q", "attn.q_b", "attn.q_whole") if name in self.model.tensors))
        atoms = self.model.family.axes.get("heads", ("heads",))
        ids, total = _rows([box[axis] for axis in atoms], [sizes[axis] for axis in atoms]), sizes["heads"]
        whole, kv = total, len(ids)
        if "attn.k" in self.model.tensors:
            keys = self._box("attn.k")
            kept = [axis for axis in keys if axis not in ("layer", "head_dim", "hidden")]
            whole, kv = (math.prod(of) for of in ([sizes[axis] for axis in kept], [keys[axis][1] - keys[axis][0] for axis in kept]))
        size = sizes["qk_dim"] if latent else sizes["head_dim"]
        return Heads(ids, total, kv, whole, self.layout.repeats.get("kv", 1), size, sizes["head_dim"])

    @cached_property
    def latent(self) -> Latent | None:
        sizes = self.model.sizes
        if "attn.kv_a" not in self.model.tensors:
            return None
        q = sizes["q_lora"] if "attn.q_a" in self.model.tensors else None
        return Latent(q, sizes["kv_lora"], sizes["rope_dim"], sizes["nope_dim"])

    @cached_property
    def linear(self) -> Linear:
        keys, values = self._box("lin.k"), self._box("lin.v")
        count = [math.prod(high - low for axis, (low, high) in box.items() if axis not in ("layer", "hidden")) for box in (keys, values)]
        sizes = self.model.sizes["lk_dim"], self.model.sizes["lv_dim"]
        return Linear(count[0] // sizes[0], sizes[0], count[1] // sizes[1], sizes[1])

    @cached_property
    def share(self) -> Share | None:
        box = self._box("moe.down")
        return Share(*box["experts"], bias=box["moe_inter"][0] == 0) if box else None

    # Running

    def new_cache(self, batch: int, length: int) -> Cache:
        """Room for `length` tokens of each of `batch` sequences."""
        return Cache(batch, length, self.device)

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Of hidden states: that of the norms, or of what lies outside the layers, or of an output projection."""
        outside, inside = self._by_layer
        norms, outputs = ([w[name] for w in inside.values() for name in names if name in w] for names in (NORMS, ("attn.o",)))
        return next(iter((*norms, *outside.values(), *outputs))).dtype

    @torch.inference_mode()
    def forward(
        self, input_ids: Tensor, positions: Tensor | None = None, cache: Cache | None = None, all_ranks: bool = False
    ) -> Tensor | None:
        """Logits [batch, seq, vocab] of tokens [batch, seq], on the ranks of the last stage, or on all; None elsewhere.

        `positions` [batch, seq] go on from the cache by default; -1 is padding, at either side: it attends to nothing that counts, and
        nothing attends to it. Raises ReshardError for positions that the model does not have.
        """
        batch, seq = input_ids.shape
        if positions is None:
            start = cache.used if cache is not None else 0
            positions = torch.arange(start, start + seq, device=input_ids.device).expand(batch, seq)
        if self.spec.positions is not None and int(positions.max()) >= self.spec.positions:
            raise ReshardError(
                f"position {int(positions.max())} is wanted, the model has {self.spec.positions}", "shorten the prompt, or generate less"
            )
        context = self._context(positions, cache)
        if self.first:
            x = self._embed(input_ids, positions)
        else:
            x = self.world.recv((batch, seq, self.model.sizes["hidden"]), self.dtype, self.rank - len(self.ranks), "stage", self.device)
        for layer in self.mine:
            for step in self.steps(layer).values():
                x = step(x, context)
        if not self.last:
            self.world.send(x, self.rank + len(self.ranks), "stage")
        return self._logits(x, batch, seq, all_ranks)

    def _context(self, positions: Tensor, cache: Cache | None) -> Context:
        columns = cache.begin(positions) if cache is not None else positions
        at, spec = positions.clamp(min=0), self.spec
        far = Sight(seen(positions, columns), angles(spec.rope, at, self.dtype))
        near = Sight(seen(positions, columns, spec.window, spec.window_chunks), angles(spec.rope_near, at, self.dtype))
        growth = None
        if spec.growth is not None:
            steps = torch.log1p(((at + spec.growth.start) / spec.growth.span).floor())
            growth = (1 + spec.growth.by * steps)[:, None, :, None].to(self.dtype)
        bias = None
        if self.spec.alibi:
            steep = slopes(self.heads.total)[list(self.heads.ids)].to(columns.device)
            if self.spec.alibi_scaled:  # as it was trained
                steep = steep.to(torch.bfloat16)
            bias = (steep[None, :, None, None] * columns.clamp(min=0)[:, None, None, :]).to(self.dtype)
        return Context(positions >= 0, far, near, growth, bias, cache)

    def _embed(self, ids: Tensor, positions: Tensor) -> Tensor:
        outside, _ = self._by_layer
        low, high = self._box("embed")["vocab"]
        mine = (ids >= low) & (ids < high)
        rows = outside["embed"][(ids - low).clamp(0, max(high - low - 1, 0))]
        x = self._sum(rows.masked_fill(~mine[..., None], 0), "embed")
        if self.spec.embed_scale != 1.0:
            x = x * torch.tensor(self.spec.embed_scale, dtype=x.dtype, device=x.device)
        if self.spec.embed_factor is not None:
            x = x * self.spec.embed_factor
        if "embed_proj" in outside:
            x = multiply(x, outside["embed_proj"])
        if "embed_norm" in outside:
            x = self._norm(x, Weights(outside), "embed_norm")
        return x + outside["pos_embed"][positions.clamp(min=0) + self.spec.pos_offset] if "pos_embed" in outside else x

    def steps(self, layer: int) -> dict[str, Callable[[Tensor, Context], Tensor]]:
        """What a layer does, one after another, each time from [batch, seq, hidden] to the same."""
        if self.spec.parallel:
            return {"attention and feed-forward": partial(self._both, layer)}
        return {"attention": partial(self._attend, layer), "feed-forward": partial(self._feed, layer)}

    def _both(self, layer: int, x: Tensor, context: Context) -> Tensor:
        weights = self._by_layer[1][layer]
        h = self._norm(x, weights, "attn_norm")
        beside = self._norm(x, weights, "mlp_norm") if self._has(weights, "mlp_norm") else h
        both = self._sum(self._heads(layer, h, context) + feed_forward(beside, weights, self.spec, self.share), "hidden")
        return self._added(x, _biased(_biased(both, weights, "attn.o_bias"), weights, "mlp.down_bias"))

    def _attend(self, layer: int, x: Tensor, context: Context) -> Tensor:
        weights = self._by_layer[1][layer]
        h = self._sum(self._heads(layer, self._before(x, weights, "attn_norm"), context), "hidden")
        x = self._added(x, self._norm(_biased(h, weights, "attn.o_bias"), weights, "post_attn_norm"))
        return self._norm(x, weights, "attn_norm") if self.spec.post_norm else x

    def _feed(self, layer: int, x: Tensor, context: Context) -> Tensor:
        weights = self._by_layer[1][layer]
        h = self._sum(feed_forward(self._before(x, weights, "mlp_norm"), weights, self.spec, self.share), "hidden")
        x = self._added(x, self._norm(_biased(h, weights, "mlp.down_bias"), weights, "post_mlp_norm"))
        return self._norm(x, weights, "mlp_norm") if self.spec.post_norm else x

    def _before(self, x: Tensor, weights: Weights, norm: str) -> Tensor:
        """What a branch starts from."""
        return x if self.spec.post_norm else self._norm(x, weights, norm)

    def _added(self, x: Tensor, h: Tensor) -> Tensor:
        """What a layer adds."""
        return x + (h if self.spec.residual_factor is None else h * self.spec.residual_factor)

    def _heads(self, layer: int, h: Tensor, context: Context) -> Tensor:
        weights = self._by_layer[1][layer]
        if "lin.qkvz" in weights:
            return linear_attention(h, weights, layer, self.spec, self.linear, context)
        return attention(h, weights, layer, self.spec, self.heads, self.latent, context, lambda squares: self._sum(squares, "norm"))

    # Looking at it

    def routers(self) -> dict[int, Weights]:
        """The layers of this rank that have experts."""
        return {layer: weights for layer, weights in self._by_layer[1].items() if "moe.router" in weights}

    def walk(self, ids: Tensor) -> Iterator[tuple[str, Callable[[Tensor | None], Tensor]]]:
        """The steps of a forward of tokens [batch, seq] that this rank has a part in, each by a name in words and as a function.

        What the functions take is what the step before gave: tokens are embedded from nothing, the head gives logits. A step's weights are
        needed when it is called.
        """
        batch, seq = ids.shape
        positions = torch.arange(seq, device=ids.device).expand(batch, seq)
        context = self._context(positions, None)
        if self.first:
            yield EMBEDDING, lambda _: self._embed(ids, positions)
        for layer in self.mine:
            for name, step in self.steps(layer).items():
                yield f"layer {layer}, {name}", lambda x, step=step: step(x, context)  # type: ignore[misc]
        if self.last:
            yield HEAD, lambda x: self._logits(x, batch, seq, all_ranks=False)  # type: ignore[arg-type, misc, return-value]

    def _logits(self, x: Tensor, batch: int, seq: int, all_ranks: bool) -> Tensor | None:
        vocab, pp, tp = self.model.sizes["vocab"], self.layout.mesh.pp, len(self.ranks)
        logits = None
        if self.last:
            outside, _ = self._by_layer
            x = self._norm(x, Weights(outside), "norm")
            if "head_proj" in outside:
                x = multiply(x, outside["head_proj"])
            head = outside["head" if "head" in outside else "embed"]
            logits = multiply(x, F.normalize(head) if self.spec.head_norm else head, outside.get("head_bias"))
            logits = self.world.all_gather(logits, self.ranks, self._rows, -1, "logits")[..., :vocab]
            if self.spec.logit_factor is not None:
                logits = logits * self.spec.logit_factor
            if (cap := self.spec.logit_cap) is not None:
                logits = torch.tanh(logits / cap) * cap
        if not all_ranks or pp == 1:
            return logits
        if logits is None:
            return self.world.recv((batch, seq, vocab), self.dtype, self.rank % tp + (pp - 1) * tp, "logits", self.device)
        for stage in range(pp - 1):
            self.world.send(logits, self.rank % tp + stage * tp, "logits")
        return logits

    @cached_property
    def _rows(self) -> list[int]:
        """Rows of the vocabulary, padding among them, on each rank of the last stage."""
        pieces = self.layout.pieces.get("head") or self.layout.holding("head")
        rows = {piece.slot.rank: piece.slot.shape[0] for piece in self.layout.holding("embed")} | {
            p.slot.rank: p.slot.shape[0] for p in pieces
        }
        return [rows[rank] for rank in self.ranks]

    def _norm(self, x: Tensor, weights: Weights, name: str) -> Tensor:
        """The norm of that name, or nothing where the family has none there."""
        if not self._has(weights, name):
            return x
        return norm(x, self.spec.norm, weights.get(name), weights.get(f"{name}_bias"), self.spec.eps, self.spec.norm_offset)

    def _has(self, weights: Weights, norm: str) -> bool:
        return norm in weights or norm in self.spec.bare

    def _sum(self, x: Tensor, label: str) -> Tensor:
        return self.world.all_reduce(x, self.ranks, label)


def _rows(box: Sequence[tuple[int, int]], sizes: Sequence[int]) -> tuple[int, ...]:
    """Row-major numbers of what a box holds of axes of these sizes."""
    found = [0]
    for (low, high), size in zip(box, sizes, strict=True):
        found = [at * size + one for at in found for one in range(low, high)]
    return tuple(found)


def _biased(h: Tensor, weights: Weights, name: str) -> Tensor:
    bias = weights.get(name)
    return h if bias is None else h + bias


def _put(module: nn.Module, name: str, tensor: Tensor) -> None:
    """A parameter under a dotted name."""
    *path, leaf = name.split(".")
    for part in path:
        child = module._modules.get(part)
        if child is None:
            child = nn.Module()
            module.add_module(part, child)
        module = child
    module.register_parameter(leaf, nn.Parameter(tensor, requires_grad=False))
