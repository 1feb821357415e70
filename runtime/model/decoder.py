"""One decoder for all families: they differ in values (spec.py) and in which tensors a checkpoint has.

A rank holds its own heads, its part of each feed-forward, its experts, its rows of the vocabulary, the layers of its
stage. Each layer has two all-reduces, or one where attention and feed-forward run in parallel; hidden states pass from
stage to stage.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from reshard.errors import ReshardError
from reshard.layout.cut import Layout
from reshard.model.understand import Model

from ..comm.collectives import World
from ..dtypes import DTYPES
from .attention import Context, Sight, attention, seen, slopes
from .cache import Cache
from .experts import ACTIVATIONS, dense, experts, feed_forward
from .linear_attention import linear_attention
from .local_shapes import Holdings, language
from .moe_attention import mixed_attention
from .rope import angles
from .spec import Spec
from .stage_transfer import Carried, Place, Whole
from .weights import Router, Weights, multiply, norm

EMBEDDING, HEAD = "the embedding", "the head"  # names of steps, see Decoder.walk
OWN = "per-layer input"  # the last step of some layers
# Parts of a step, next to its norms, see Decoder._shown.
ATTENTION, FEED_FORWARD, RESIDUAL = "attention", "feed-forward", "residual"
PARTIAL = "partial sums"  # of one rank, before the all-reduce
Step = Callable[[Tensor, Context], Tensor]
NORMS = ("attn_norm", "post_attn_norm")


class Decoder(nn.Module):
    """This rank's part of a model. Parameters are the stored tensors by stored name, built on `meta`, then assigned."""

    def __init__(self, spec: Spec, model: Model, layout: Layout, rank: int, world: World) -> None:
        super().__init__()
        self.spec, self.model, self.layout, self.rank, self.world = spec, model, layout, rank, world
        self.has = Holdings(model, layout, rank)
        self.watch: Callable[[str, Tensor], None] | None = None  # is passed intermediate results, see `_shown`
        for slot in language(layout, rank):
            for point in slot.points():
                _put(
                    self,
                    slot.name(point),
                    torch.empty(slot.shape, dtype=DTYPES[layout.dtype(slot, point)], device="meta"),
                )

    @cached_property
    def _by_layer(self) -> tuple[dict[str, Tensor], dict[int, Weights]]:
        """Parameters outside the layers, and those of each layer."""
        outside: dict[str, Tensor] = {}
        inside: dict[int, dict[str, Tensor]] = {layer: {} for layer in self.has.layers}
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

    @cached_property
    def carried(self) -> Carried:
        return Carried(
            self.model.sizes["hidden"], self.model.main_layers, "ple.proj" in self.model.tensors, self.spec.lenders
        )

    @cached_property
    def _whole(self) -> Whole:
        def gather(x: Tensor, counts: list[int]) -> Tensor:
            return self.world.all_gather(x, self.has.ranks, counts, 1, "keys")

        return Whole(lambda layer: self.has.heads(layer).size, self.has.key_heads, gather, self.has.number)

    # Running

    def new_cache(self, batch: int, length: int) -> Cache:
        """Room for `length` tokens of each of `batch` sequences."""
        return Cache(batch, length, self.device)

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of hidden states: that of the norms, else of what is outside the layers, else of outputs."""
        outside, inside = self._by_layer
        norms, outputs = (
            [w[name] for w in inside.values() for name in names if name in w] for names in (NORMS, ("attn.o",))
        )
        return next(iter((*norms, *outside.values(), *outputs))).dtype

    @torch.inference_mode()
    def forward(
        self, input_ids: Tensor, positions: Tensor | None = None, cache: Cache | None = None, all_ranks: bool = False
    ) -> Tensor | None:
        """Logits [batch, seq, vocab] of tokens [batch, seq], on the ranks of the last stage, or on all; None elsewhere.

        `positions` [batch, seq] continue the cache by default; -1 is padding, on either side: nothing attends to it.
        Raises ReshardError for positions that the model does not have.
        """
        batch, seq = input_ids.shape
        if positions is None:
            start = cache.used if cache is not None else 0
            positions = torch.arange(start, start + seq, device=input_ids.device).expand(batch, seq)
        if self.spec.positions is not None and int(positions.max()) >= self.spec.positions:
            raise ReshardError(
                f"position {int(positions.max())} is out of range: the model has {self.spec.positions} positions",
                "shorten the prompt, or generate fewer tokens",
            )
        context = self._context(input_ids, positions, cache)
        if self.has.first:
            x = self._embed(context, positions)
        else:
            x = self._received((batch, seq), context)
        for layer in self.has.layers:
            for step in self.steps(layer).values():
                x = step(x, context)
        if not self.has.last:
            self._sent(x, context)
        return self._logits(x, batch, seq, all_ranks)

    def _sent(self, x: Tensor, context: Context) -> None:
        """Send hidden states, and what the next stage needs next to them, after the widths of the latter."""
        place, to = (self.has.layers[-1] + 1, False), self.rank + len(self.has.ranks)
        if lent := self.carried.lent(place):
            self.world.send(
                torch.tensor([context.lent[layer].shape[-1] for layer in lent], device=x.device), to, "stage"
            )
        self.world.send(self.carried.give(x, place, context), to, "stage")

    def _received(self, shape: tuple[int, int], context: Context) -> Tensor:
        place, before = (self.has.layers[0], False), self.rank - len(self.has.ranks)
        lent, widths = self.carried.lent(place), []
        if lent:
            widths = self.world.recv((len(lent),), torch.int64, before, "stage", self.device).tolist()
        x = self.world.recv(
            (*shape, self.carried.features(place) + sum(widths)), self.dtype, before, "stage", self.device
        )
        return self.carried.take(x, place, context, widths)

    def _context(self, ids: Tensor, positions: Tensor, cache: Cache | None) -> Context:
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
            heads = self.has.heads(self.has.layers[0])
            steep = slopes(heads.total)[list(heads.ids)].to(columns.device)
            if self.spec.alibi_scaled:  # as in training
                steep = steep.to(torch.bfloat16)
            bias = (steep[None, :, None, None] * columns.clamp(min=0)[:, None, None, :]).to(self.dtype)
        return Context(ids, positions >= 0, far, near, growth, bias, cache)

    def _embed(self, context: Context, positions: Tensor) -> Tensor:
        outside, _ = self._by_layer
        x = self._looked_up(outside["embed"], context.ids, self.has.box("embed")["vocab"])
        if self.spec.embed_scale != 1.0:
            x = x * torch.tensor(self.spec.embed_scale, dtype=x.dtype, device=x.device)
        if self.spec.embed_factor is not None:
            x = x * self.spec.embed_factor
        if "embed_proj" in outside:
            x = multiply(x, outside["embed_proj"])
        if "embed_norm" in outside:
            x = self._norm(x, Weights(outside), "embed_norm")
        context.embedded = x
        return x + outside["pos_embed"][positions.clamp(min=0) + self.spec.pos_offset] if "pos_embed" in outside else x

    def _looked_up(self, table: Tensor, ids: Tensor, mine: tuple[int, int]) -> Tensor:
        """Rows of a table, some of which are on this rank."""
        low, high = mine
        rows = table[(ids - low).clamp(0, max(high - low - 1, 0))].flatten(2)
        return self._sum(rows.masked_fill(~((ids >= low) & (ids < high))[..., None], 0), "embed")

    def steps(self, layer: int) -> dict[str, Step]:
        """The steps of a layer in order, each from [batch, seq, hidden] to the same shape."""
        if self.spec.parallel:
            return {"attention and feed-forward": partial(self._both, layer)}
        found: dict[str, Step] = {ATTENTION: partial(self._attend, layer), FEED_FORWARD: partial(self._feed, layer)}
        if {"ple.gate", "factor"} & self._by_layer[1][layer].tensors.keys():
            found[OWN] = partial(self._end, layer)
        return found

    def _both(self, layer: int, x: Tensor, context: Context) -> Tensor:
        weights = self._by_layer[1][layer]
        h = self._norm(x, weights, "attn_norm")
        beside = self._norm(x, weights, "mlp_norm") if self._has(weights, "mlp_norm") else h
        attended, fed = self._heads(layer, h, context), feed_forward(beside, weights, self.spec, self.has.share)
        self._shown(ATTENTION, attended, weights, "attn.o_bias")
        self._shown(FEED_FORWARD, fed, weights, "mlp.down_bias")
        both = self._sum(attended + fed, "hidden")
        return self._added(x, _biased(_biased(both, weights, "attn.o_bias"), weights, "mlp.down_bias"))

    def _attend(self, layer: int, x: Tensor, context: Context) -> Tensor:
        weights = self._by_layer[1][layer]
        h = self._sum(self._heads(layer, self._before(x, weights, "attn_norm"), context), "hidden")
        h = self._shown(ATTENTION, _biased(h, weights, "attn.o_bias"))
        x = self._shown(RESIDUAL, self._added(x, self._norm(h, weights, "post_attn_norm")))
        return self._norm(x, weights, "attn_norm") if self.spec.post_norm else x

    def _feed(self, layer: int, x: Tensor, context: Context) -> Tensor:
        weights = self._by_layer[1][layer]
        if "mlp.post_norm" in weights:
            h = self._apart(x, weights)
        else:
            h = self._sum(
                feed_forward(self._before(x, weights, "mlp_norm"), weights, self.spec, self.has.share), "hidden"
            )
        h = self._shown(
            FEED_FORWARD, _biased(h, weights, "shared.down_bias" if "shared.down" in weights else "mlp.down_bias")
        )
        x = self._shown(RESIDUAL, self._added(x, self._norm(h, weights, "post_mlp_norm")))
        return self._norm(x, weights, "mlp_norm") if self.spec.post_norm else x

    def _apart(self, x: Tensor, weights: Weights) -> Tensor:
        """A dense feed-forward and experts in parallel, each with its own norms before and after."""
        spec = self.spec
        assert spec.routing is not None and self.has.share is not None
        one = self._sum(dense(self._norm(x, weights, "mlp_norm"), weights, "mlp", spec), "hidden")
        seen, given = x.flatten(0, 1), self._norm(x, weights, "moe.norm").flatten(0, 1)
        other = self._sum(experts(given, weights, spec, spec.routing, self.has.share, seen), "hidden").view_as(x)
        return self._norm(one, weights, "mlp.post_norm") + self._norm(other, weights, "moe.post_norm")

    def _end(self, layer: int, x: Tensor, context: Context) -> Tensor:
        """The layer's own input from the tokens, and a factor on the layer's output."""
        weights = self._by_layer[1][layer]
        if "ple.gate" in weights:
            gate = ACTIVATIONS[self.spec.activation](weights.linear(x, "ple.gate"))
            own = self._own(context)[:, :, layer - self.has.layers[0]]
            x = x + self._norm(weights.linear(gate * own, "ple.out"), weights, "ple.norm")
        return x * weights["factor"] if "factor" in weights else x

    def _own(self, context: Context) -> Tensor:
        """This stage's per-layer inputs [batch, seq, layers, features]: an embedding plus a projection."""
        if context.own is None:
            outside, hidden = self._by_layer[0], self.model.sizes["hidden"]
            table, projection = outside["ple_embed"], outside["ple_proj"]
            assert context.embedded is not None
            looked_up = self._looked_up(table, context.ids, self.has.box("ple.embed")["ple_vocab"])
            own = (looked_up * torch.tensor(math.sqrt(table.shape[-1]), dtype=table.dtype)).unflatten(
                -1, table.shape[1:]
            )
            seen = multiply(context.embedded, projection.flatten(0, 1)) * hidden**-0.5
            seen = self._norm(seen.unflatten(-1, projection.shape[:2]), Weights(outside), "ple_proj_norm")
            context.own = (seen + own) * 2**-0.5
        return context.own

    def _before(self, x: Tensor, weights: Weights, norm: str) -> Tensor:
        """The input of a branch."""
        return x if self.spec.post_norm else self._norm(x, weights, norm)

    def _added(self, x: Tensor, h: Tensor) -> Tensor:
        """The residual addition."""
        return x + (h if self.spec.residual_factor is None else h * self.spec.residual_factor)

    def _heads(self, layer: int, h: Tensor, context: Context) -> Tensor:
        weights = self._by_layer[1][layer]
        if "moa.q" in weights:
            return mixed_attention(h, weights, layer, self.spec, self.has.heads(layer), context)
        if "lin.qkvz" in weights:
            return linear_attention(h, weights, layer, self.spec, self.has.linear, context)
        return attention(
            h,
            weights,
            layer,
            self.spec,
            self.has.heads(layer),
            self.has.latent,
            context,
            lambda squares: self._sum(squares, "norm"),
        )

    # Inspection

    def routers(self) -> dict[tuple[int, str], Router]:
        """The routers of this rank, by layer and part."""
        return {
            (layer, part): router
            for layer, weights in self._by_layer[1].items()
            for part, router in weights.routers.items()
        }

    def walk(
        self, ids: Tensor, layers: Sequence[int] | None = None
    ) -> Iterator[tuple[str, Callable[[Tensor | None], Tensor]]]:
        """The steps of a forward of tokens [batch, seq] that this rank takes part in: a name in words, and a function.

        Each function takes the result of the step before: the embedding takes None, the head returns logits. A step's
        weights are needed only when it is called. Next to hidden states, a result contains what later steps need of
        earlier ones, for all heads of the stage.
        """
        batch, seq = ids.shape
        positions = torch.arange(seq, device=ids.device).expand(batch, seq)
        context, carried, whole = self._context(ids, positions, None), self.carried, self._whole
        if self.has.first:
            yield EMBEDDING, lambda _: carried.give(self._embed(context, positions), (0, False), context)
        for layer in self.has.layers if layers is None else layers:
            steps = list(self.steps(layer).items())
            for at, (name, step) in enumerate(steps):
                places = (layer, at > 0), (layer, True) if at + 1 < len(steps) else (layer + 1, False)

                def done(x: Tensor | None, step: Step = step, places: tuple[Place, Place] = places) -> Tensor:
                    assert x is not None
                    before, after = map(carried.lent, places)
                    x = carried.take(x, places[0], context, [whole.width(lender) for lender in before])
                    whole.keep(context, before)
                    return carried.give(step(x, context), places[1], whole.spread(context, after))

                yield f"layer {layer}, {name}", done
        if self.has.last:
            yield HEAD, lambda x: self._logits(x, batch, seq, all_ranks=False)  # type: ignore[arg-type, misc, return-value]

    def _logits(self, x: Tensor, batch: int, seq: int, all_ranks: bool) -> Tensor | None:
        vocab, pp, tp = self.model.sizes["vocab"], self.layout.mesh.pp, len(self.has.ranks)
        logits = None
        if self.has.last:
            outside, _ = self._by_layer
            x = self._norm(x, Weights(outside), "norm")
            if "head_proj" in outside:
                x = multiply(x, outside["head_proj"])
            head = outside["head" if "head" in outside else "embed"]
            logits = multiply(x, F.normalize(head) if self.spec.head_norm else head, outside.get("head_bias"))
            logits = self.world.all_gather(logits, self.has.ranks, self.has.vocabulary, -1, "logits")[..., :vocab]
            if self.spec.logit_factor is not None:
                logits = logits * self.spec.logit_factor
            if (cap := self.spec.logit_cap) is not None:
                logits = torch.tanh(logits / cap) * cap
        if not all_ranks or pp == 1:
            return logits
        if logits is None:
            return self.world.recv(
                (batch, seq, vocab), self.dtype, self.rank % tp + (pp - 1) * tp, "logits", self.device
            )
        for stage in range(pp - 1):
            self.world.send(logits, self.rank % tp + stage * tp, "logits")
        return logits

    def _norm(self, x: Tensor, weights: Weights, name: str) -> Tensor:
        """Apply the norm of that name, if the family has one there."""
        if not self._has(weights, name):
            return x
        normed = norm(
            x, self.spec.norm, weights.get(name), weights.get(f"{name}_bias"), self.spec.eps, self.spec.norm_offset
        )
        return self._shown(name, normed)

    def _has(self, weights: Weights, norm: str) -> bool:
        return norm in weights or norm in self.spec.bare

    def _sum(self, x: Tensor, label: str) -> Tensor:
        self._shown(PARTIAL, x)
        return self.world.all_reduce(x, self.has.ranks, label)

    def _shown(self, part: str, x: Tensor, weights: Weights | None = None, bias: str = "") -> Tensor:
        """x, which `watch` is passed with that bias: norms under their own names, parts of a step under theirs."""
        if self.watch is not None:
            self.watch(part, x if weights is None else _biased(x, weights, bias))
        return x


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
