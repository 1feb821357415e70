"""What a model computes by one table, for comparison with another: this is how mutations of tables are detected.

Typed counterpart of `reshard.authoring.mutation_trial`, which starts it; torch is imported here and not there.
"""

import math
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from reshard.checkpoints.source import Source
from reshard.layout.cut import Layout, lay_out
from reshard.layout.mesh import Mesh
from reshard.tables import formats

from ..cast import Cast
from ..comm.collectives import World
from ..comm.threads import alone, run_threads
from ..model.decoder import HEAD, Decoder
from ..model.spec import Spec
from ..model.weights import Weights, rms_norm
from ..resharded import Reader


class Outcome(NamedTuple):
    """What a model computes: logits [prompts, tokens, vocab], and what all ranks' caches hold."""

    logits: Tensor
    kept: list[Tensor]


def run(source: Source, mesh: Mesh, ids: Tensor) -> Outcome:
    """A forward in float64 on ranks that are threads; shards are made on the fly, through the plan, as in loading."""
    model = source.layout.model
    layout = lay_out(formats.load("native").for_family(model.family.plain), model, mesh)

    def work(world: World) -> tuple[Tensor, list[Tensor]]:
        with torch.inference_mode():
            decoder = _decoder(source, layout, world)
            cache = decoder.new_cache(*ids.shape)
            logits = decoder(ids, cache=cache)
            return logits, [tensor for layer in sorted(cache.kept) for tensor in cache.kept[layer]]

    found = run_threads(mesh.world, work)
    return Outcome(found[0][0], [tensor for _, kept in found for tensor in kept])


def _decoder(source: Source, layout: Layout, world: World) -> Decoder:
    model = layout.model
    cast = Cast(layout, world.rank, torch.float64, None)
    state = Reader(source, layout, world.rank, cast, lambda: None, lambda _: True).run(1)
    decoder = Decoder(Spec.of(model.family, source.config, model), model, layout, world.rank, world)
    decoder.load_state_dict(state, strict=True, assign=True)
    return decoder.eval()


def apart(source: Source, ids: Tensor) -> Tensor | None:
    """Logits of a model with parallel attention and feed-forward, if they ran in sequence; None for other models.

    In parallel, the biases of both are one sum, which does not tell them apart.
    """
    model = source.layout.model
    layout = lay_out(formats.load("native").for_family(model.family.plain), model, Mesh())
    with torch.inference_mode():
        decoder = _decoder(source, layout, alone())
        if not decoder.spec.parallel:
            return None
        decoder.spec = replace(decoder.spec, parallel=False)
        logits: Tensor = decoder(ids)
        return logits


def ahead(source: Source, ids: Tensor) -> Tensor | None:
    """Logits of multi-token prediction, not run otherwise: each extra layer, on hidden states and next tokens.

    None for a model without. As in DeepSeek-V3: embedding and hidden state are normalised, joined and projected.
    """
    model = source.layout.model
    if not {"mtp.eh_proj", "mtp_eh_proj", "mtp.e_proj"} & model.tensors.keys():
        return None
    layout = lay_out(formats.load("native").for_family(model.family.plain), model, Mesh())
    with torch.inference_mode():
        decoder = _decoder(source, layout, alone())
        x: Tensor | None = None
        eps, offset, vocab, logits = decoder.spec.eps, decoder.spec.norm_offset, model.sizes["vocab"], []
        there, extra = dict(decoder.named_parameters()), range(model.main_layers, model.sizes["layer"])
        decoder.spec = replace(decoder.spec, roped=decoder.spec.roped | set(extra))
        joint = "e_h_proj" if "mtp.e_proj" in model.tensors else "eh_proj"
        for name, step in decoder.walk(ids):
            if name != HEAD:
                x = step(x)
        assert x is not None  # the walk starts with the embedding
        for layer in extra:

            def of(name: str, layer: int = layer) -> Tensor:
                """The layer's own weight, a shared one, or that of the main layers; a tied head is the embedding."""
                names = (f"layers.{layer}.mtp.{name}", f"mtp_{name}", name, "embed")
                name = next(one for one in names if one in there)
                return Weights(there).matrix(name, decoder.dtype) if f"{name}_scale" in there else there[name]

            def normed(x: Tensor, name: str) -> Tensor:
                return rms_norm(x, of(name), eps, offset)

            ids, hidden = ids[:, 1:], x[:, :-1]
            x = F.linear(
                torch.cat((normed(F.embedding(ids, of("embed")), "e_norm"), normed(hidden, "h_norm")), -1), of(joint)
            )
            for name, step in decoder.walk(ids, [layer]):
                if name.startswith("layer"):
                    x = step(x)
            logits.append(F.linear(normed(x, "norm"), of("head"))[..., :vocab])
        return torch.cat(logits, 1)


def distance(a: Tensor, b: Tensor) -> float:
    """The largest difference of two tensors; infinite if shapes differ or one is not finite."""
    if a.shape != b.shape:
        return math.inf
    found = float((a.double() - b.double()).abs().max()) if a.numel() else 0.0
    return found if math.isfinite(found) else math.inf
