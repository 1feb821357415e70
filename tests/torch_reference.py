"""What each rank must hold in the `native` format, said a second time in plain torch, with the whole model in memory.

Knows the architectures, the native names, and how tensor, pipeline and expert parallelism cut. Knows nothing of
`reshard`: no table, no plan, no notation, so that the two agree only where both are right. Naive on purpose: it is to
be read.

    expected(checkpoint("llama"), "llama", tp=4, pp=2)   eight dicts of native name to tensor; rank = pp_rank * tp +
                                                         tp_rank
    differences(expected, actual)                        what a test prints; [] when they agree bit for bit

Two steps. `FAMILIES[family]` reads a published checkpoint into parts: the projections apart, each as [out, in], q, k
and v ordered by head, experts stacked. Then one function per kind of layer cuts the parts for one rank and fuses them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

State = dict[str, torch.Tensor]

# Recomputed by an engine, so no rank holds them. gpt_neox's `attention.bias` and gpt2's `attn.bias` are masks.
BUFFERS = re.compile(
    r"(.*\.)?(rotary_emb\.inv_freq|attention\.bias|attention\.masked_bias|h\.\d+\.attn\.bias|h\.\d+\.attn\.masked_bias)"
)
BLOCK = 128


# Comparing


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """The storage seen as integers, so that equality is of bits: NaN equals itself, 0.0 is not -0.0,
    and FP8 can be compared at all.
    """
    return tensor.contiguous().view(
        {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    )


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal in dtype, shape and every bit."""
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(bits(a), bits(b))


def differences(want: Sequence[Mapping[str, torch.Tensor]], have: Sequence[Mapping[str, torch.Tensor]]) -> list[str]:
    """One line per rank or tensor that differs; a test asserts that there is none."""
    lines = [f"{len(want)} ranks expected, {len(have)} found"] if len(want) != len(have) else []
    for rank, (a, b) in enumerate(zip(want, have, strict=False)):
        lines += [f"rank {rank}: {name} is missing" for name in a.keys() - b.keys()]
        lines += [f"rank {rank}: {name} is not expected" for name in b.keys() - a.keys()]
        for name in sorted(a.keys() & b.keys()):
            if a[name].dtype != b[name].dtype or a[name].shape != b[name].shape:
                shapes = [f"{str(t.dtype).removeprefix('torch.')} {list(t.shape)}" for t in (a[name], b[name])]
                lines.append(f"rank {rank}: {name}: {shapes[0]} expected, {shapes[1]} found")
            elif not same(a[name], b[name]):
                lines.append(
                    f"rank {rank}: {name}: {int((bits(a[name]) != bits(b[name])).sum())} of {a[name].numel()} "
                    f"values differ"
                )
    return lines


# Reading


def load(directory: Path) -> State:
    """All tensors of a published checkpoint that mean something: not the buffers."""
    state: State = {}
    for path in sorted(directory.glob("*.safetensors")):
        state |= load_file(path)
    for path in sorted(directory.glob("*.bin")):
        state |= torch.load(path, weights_only=True)
    return {name: tensor for name, tensor in state.items() if not BUFFERS.fullmatch(name)}


class Source:
    """The tensors of a checkpoint, each taken once; what nobody took is a mistake in this file."""

    def __init__(self, directory: Path) -> None:
        self.left = load(directory)
        self.config: dict[str, Any] = json.loads((directory / "config.json").read_text())

    def take(self, name: str) -> torch.Tensor:
        return self.left.pop(name)

    def maybe(self, name: str) -> torch.Tensor | None:
        return self.left.pop(name, None)

    def linear(self, parts: State, part: str, name: str) -> None:
        """`name`.weight as `part`, with what belongs to it where it is there: the bias, and the scales of FP8."""
        parts[part] = self.take(name + ".weight")
        for ending, published in (("_bias", ".bias"), ("_scale", ".weight_scale_inv")):
            if (tensor := self.maybe(name + published)) is not None:
                parts[part + ending] = tensor


@dataclass
class Model:
    """A checkpoint in parts: `ends` for embedding, last norm and head, `layers` in order, `extra` for multi-token
    prediction.

    `kv` is how many key-value heads there are; 0 for latent attention, which has only `heads`.
    """

    heads: int
    kv: int
    ends: State
    layers: list[State]
    extra: list[State]


def model_of(
    source: Source, heads: int, kv: int, ends: Mapping[str, str], layers: Iterable[State], extra: Iterable[State] = ()
) -> Model:
    parts = {part: source.take(name) for part, name in ends.items() if part != "head"}
    if (head := source.maybe(ends["head"])) is not None:
        parts["head"] = head
    model = Model(heads, kv, parts, list(layers), list(extra))
    assert not source.left, sorted(source.left)
    return model


ENDS = {"embed": "model.embed_tokens.weight", "norm": "model.norm.weight", "head": "lm_head.weight"}


def stack(source: Source, names: Sequence[str]) -> State:
    """Experts [experts, out, in] under moe.gate, moe.up, moe.down; each of `names` has a place for the number of the
    expert.
    """
    result: State = {}
    for part, name in zip(("moe.gate", "moe.up", "moe.down"), names, strict=True):
        for ending, published in (("", ".weight"), ("_scale", ".weight_scale_inv")):
            experts = []
            while (tensor := source.maybe(name.format(len(experts)) + published)) is not None:
                experts.append(tensor)
            if experts:
                result[part + ending] = torch.stack(experts)
    return result


def norms(source: Source, prefix: str, names: Mapping[str, str]) -> State:
    """Norms by part, with their biases where there are any."""
    result: State = {}
    for part, name in names.items():
        source.linear(result, part, prefix + name)
    return result


LLAMA_NORMS = {"attn_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
SANDWICH_NORMS = {
    "attn_norm": "input_layernorm",
    "post_attn_norm": "post_attention_layernorm",
    "mlp_norm": "pre_feedforward_layernorm",
    "post_mlp_norm": "post_feedforward_layernorm",
}
POST_NORMS = {"post_attn_norm": "post_attention_layernorm", "post_mlp_norm": "post_feedforward_layernorm"}


def llama(source: Source, norm_names: Mapping[str, str] = LLAMA_NORMS, qk_norm: str = "") -> Model:
    """Llama, Mistral, Qwen, Mixtral, Gemma, OLMo: separate projections, and experts where a layer has them.

    `qk_norm`: how the native name of a norm on q and k ends, which says over what it runs: "" over head_dim, "_full"
    over all heads.
    """
    layers = []
    for i in range(source.config["num_hidden_layers"]):
        layer = f"model.layers.{i}."
        parts = norms(source, layer, norm_names)
        for name in "qkvo":
            source.linear(parts, f"attn.{name}", f"{layer}self_attn.{name}_proj")
        for name in "qk":
            if (norm := source.maybe(f"{layer}self_attn.{name}_norm.weight")) is not None:
                parts[f"attn.{name}_norm{qk_norm}"] = norm
        if f"{layer}mlp.gate.weight" in source.left:
            parts["moe.router"] = source.take(f"{layer}mlp.gate.weight")
            parts |= stack(source, [f"{layer}mlp.experts.{{}}.{name}_proj" for name in ("gate", "up", "down")])
        elif f"{layer}block_sparse_moe.gate.weight" in source.left:
            parts["moe.router"] = source.take(f"{layer}block_sparse_moe.gate.weight")
            # w2 is down
            parts |= stack(source, [f"{layer}block_sparse_moe.experts.{{}}.{name}" for name in ("w1", "w3", "w2")])
        else:
            for name in ("gate", "up", "down"):
                source.linear(parts, f"mlp.{name}", f"{layer}mlp.{name}_proj")
        layers.append(parts)
    return model_of(source, source.config["num_attention_heads"], source.config["num_key_value_heads"], ENDS, layers)


def gemma2(source: Source) -> Model:
    return llama(source, SANDWICH_NORMS)


def olmo2(source: Source) -> Model:
    return llama(source, POST_NORMS, "_full")


def phi3(source: Source) -> Model:
    heads, kv = source.config["num_attention_heads"], source.config["num_key_value_heads"]
    layers = []
    for i in range(source.config["num_hidden_layers"]):
        layer = f"model.layers.{i}."
        parts = norms(source, layer, LLAMA_NORMS)
        qkv = source.take(f"{layer}self_attn.qkv_proj.weight")
        head_dim = qkv.shape[0] // (heads + 2 * kv)
        parts["attn.q"], parts["attn.k"], parts["attn.v"] = qkv.split([heads * head_dim, kv * head_dim, kv * head_dim])
        source.linear(parts, "attn.o", f"{layer}self_attn.o_proj")
        parts["mlp.gate"], parts["mlp.up"] = source.take(f"{layer}mlp.gate_up_proj.weight").chunk(2)
        source.linear(parts, "mlp.down", f"{layer}mlp.down_proj")
        layers.append(parts)
    return model_of(source, heads, kv, ENDS, layers)


def gpt2(source: Source) -> Model:
    """Conv1D stores [in, out]."""
    prefix = "transformer." if "transformer.wte.weight" in source.left else ""
    layers = []
    for i in range(source.config["n_layer"]):
        layer = f"{prefix}h.{i}."
        parts = norms(source, layer, {"attn_norm": "ln_1", "mlp_norm": "ln_2"})
        parts["attn.q"], parts["attn.k"], parts["attn.v"] = source.take(f"{layer}attn.c_attn.weight").T.chunk(3)
        parts["attn.q_bias"], parts["attn.k_bias"], parts["attn.v_bias"] = source.take(
            f"{layer}attn.c_attn.bias"
        ).chunk(3)
        for part, name in (("attn.o", "attn.c_proj"), ("mlp.up", "mlp.c_fc"), ("mlp.down", "mlp.c_proj")):
            parts[part] = source.take(f"{layer}{name}.weight").T
            parts[part + "_bias"] = source.take(f"{layer}{name}.bias")
        layers.append(parts)
    ends = {"embed": "wte.weight", "pos_embed": "wpe.weight", "norm": "ln_f.weight", "norm_bias": "ln_f.bias"}
    ends = {part: prefix + name for part, name in ends.items()} | {"head": "lm_head.weight"}
    return model_of(source, source.config["n_head"], source.config["n_head"], ends, layers)


def by_group(fused: torch.Tensor, kv: int, group: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q, k and v of [kv groups of (the group's queries, its key, its value), ...]."""
    head_dim = fused.shape[0] // (kv * (group + 2))
    groups = fused.view(kv, group + 2, head_dim, *fused.shape[1:])
    return groups[:, :group].flatten(0, 2), groups[:, group].flatten(0, 1), groups[:, group + 1].flatten(0, 1)


def gpt_neox(source: Source) -> Model:
    heads = source.config["num_attention_heads"]
    layers = []
    for i in range(source.config["num_hidden_layers"]):
        layer = f"gpt_neox.layers.{i}."
        parts = norms(source, layer, LLAMA_NORMS)
        for ending, published in (("", "weight"), ("_bias", "bias")):
            fused = source.take(f"{layer}attention.query_key_value.{published}")
            by_head = fused.view(heads, 3, -1, *fused.shape[1:])  # heads, (q, k, v), head_dim, ...
            for n, name in enumerate("qkv"):
                parts[f"attn.{name}{ending}"] = by_head[:, n].flatten(0, 1)
        source.linear(parts, "attn.o", f"{layer}attention.dense")
        source.linear(parts, "mlp.up", f"{layer}mlp.dense_h_to_4h")
        source.linear(parts, "mlp.down", f"{layer}mlp.dense_4h_to_h")
        layers.append(parts)
    ends = {
        "embed": "gpt_neox.embed_in.weight",
        "norm": "gpt_neox.final_layer_norm.weight",
        "norm_bias": "gpt_neox.final_layer_norm.bias",
        "head": "embed_out.weight",
    }
    return model_of(source, heads, heads, ends, layers)


def falcon(source: Source) -> Model:
    config = source.config
    heads = config["num_attention_heads"]
    if config["new_decoder_architecture"]:
        kv = config["num_kv_heads"]
    elif config["multi_query"]:
        kv = 1
    else:
        kv = heads
    layers = []
    for i in range(config["num_hidden_layers"]):
        layer = f"transformer.h.{i}."
        if config["new_decoder_architecture"]:
            parts = norms(source, layer, {"attn_norm": "ln_attn", "mlp_norm": "ln_mlp"})
        elif config["parallel_attn"]:
            parts = norms(source, layer, {"attn_norm": "input_layernorm"})
        else:
            parts = norms(source, layer, LLAMA_NORMS)
        for ending, published in (("", "weight"), ("_bias", "bias")):
            if (fused := source.maybe(f"{layer}self_attention.query_key_value.{published}")) is not None:
                parts[f"attn.q{ending}"], parts[f"attn.k{ending}"], parts[f"attn.v{ending}"] = by_group(
                    fused, kv, heads // kv
                )
        source.linear(parts, "attn.o", f"{layer}self_attention.dense")
        source.linear(parts, "mlp.up", f"{layer}mlp.dense_h_to_4h")
        source.linear(parts, "mlp.down", f"{layer}mlp.dense_4h_to_h")
        layers.append(parts)
    ends = {"embed": "word_embeddings.weight", "norm": "ln_f.weight", "norm_bias": "ln_f.bias"}
    ends = {part: f"transformer.{name}" for part, name in ends.items()} | {"head": "lm_head.weight"}
    return model_of(source, heads, kv, ends, layers)


def gpt_oss(source: Source) -> Model:
    """Experts [experts, in, out], gate and up in turns; biases everywhere."""
    layers = []
    for i in range(source.config["num_hidden_layers"]):
        layer = f"model.layers.{i}."
        parts = norms(source, layer, LLAMA_NORMS)
        for name in "qkvo":
            source.linear(parts, f"attn.{name}", f"{layer}self_attn.{name}_proj")
        parts["attn.sinks"] = source.take(f"{layer}self_attn.sinks")
        source.linear(parts, "moe.router", f"{layer}mlp.router")
        gate_up = source.take(f"{layer}mlp.experts.gate_up_proj")
        parts["moe.gate"], parts["moe.up"] = gate_up[..., ::2].mT, gate_up[..., 1::2].mT
        gate_up_bias = source.take(f"{layer}mlp.experts.gate_up_proj_bias")
        parts["moe.gate_bias"], parts["moe.up_bias"] = gate_up_bias[..., ::2], gate_up_bias[..., 1::2]
        parts["moe.down"] = source.take(f"{layer}mlp.experts.down_proj").mT
        parts["moe.down_bias"] = source.take(f"{layer}mlp.experts.down_proj_bias")
        layers.append(parts)
    return model_of(source, source.config["num_attention_heads"], source.config["num_key_value_heads"], ENDS, layers)


def deepseek_v3(source: Source) -> Model:
    def layer_of(i: int) -> State:
        layer = f"model.layers.{i}."
        parts = norms(source, layer, LLAMA_NORMS)
        if f"{layer}self_attn.q_proj.weight" in source.left:
            source.linear(parts, "attn.q_whole", f"{layer}self_attn.q_proj")
        else:
            source.linear(parts, "attn.q_a", f"{layer}self_attn.q_a_proj")
            parts["attn.q_a_norm"] = source.take(f"{layer}self_attn.q_a_layernorm.weight")
            source.linear(parts, "attn.q_b", f"{layer}self_attn.q_b_proj")
        source.linear(parts, "attn.kv_a", f"{layer}self_attn.kv_a_proj_with_mqa")
        parts["attn.kv_a_norm"] = source.take(f"{layer}self_attn.kv_a_layernorm.weight")
        source.linear(parts, "attn.kv_b", f"{layer}self_attn.kv_b_proj")
        source.linear(parts, "attn.o", f"{layer}self_attn.o_proj")
        if i < source.config["first_k_dense_replace"]:
            for name in ("gate", "up", "down"):
                source.linear(parts, f"mlp.{name}", f"{layer}mlp.{name}_proj")
            return parts
        parts["moe.router"] = source.take(f"{layer}mlp.gate.weight")
        parts["moe.score_bias"] = source.take(f"{layer}mlp.gate.e_score_correction_bias")
        parts |= stack(source, [f"{layer}mlp.experts.{{}}.{name}_proj" for name in ("gate", "up", "down")])
        for name in ("gate", "up", "down"):
            source.linear(parts, f"shared.{name}", f"{layer}mlp.shared_experts.{name}_proj")
        return parts

    def mtp_of(i: int) -> State:
        names = {
            "mtp.embed": "embed_tokens",
            "mtp.eh_proj": "eh_proj",
            "mtp.e_norm": "enorm",
            "mtp.h_norm": "hnorm",
            "mtp.norm": "shared_head.norm",
            "mtp.head": "shared_head.head",
        }
        return layer_of(i) | {part: source.take(f"model.layers.{i}.{name}.weight") for part, name in names.items()}

    count = source.config["num_hidden_layers"]
    layers = [layer_of(i) for i in range(count)]
    extra = [mtp_of(i) for i in range(count, count + source.config["num_nextn_predict_layers"])]
    return model_of(source, source.config["num_attention_heads"], 0, ENDS, layers, extra)


FAMILIES: dict[str, Callable[[Source], Model]] = {
    "llama": llama,
    "mistral": llama,
    "qwen2": llama,
    "qwen3": llama,
    "mixtral": llama,
    "qwen3_moe": llama,
    "phi3": phi3,
    "gpt2": gpt2,
    "gpt_neox": gpt_neox,
    "falcon": falcon,
    "gemma2": gemma2,
    "olmo2": olmo2,
    "gpt_oss": gpt_oss,
    "deepseek_v3": deepseek_v3,
}


# Cutting


def shares(units: int, weights: Sequence[int]) -> list[int]:
    """Units in proportion to the weights: each the whole part, what is left one by one to the largest remainders,
    ties to the earlier.
    """
    total = sum(weights)
    counts = [units * weight // total for weight in weights]
    by_remainder = sorted(range(len(weights)), key=lambda rank: (-(units * weights[rank] % total), rank))
    for rank in by_remainder[: units - sum(counts)]:
        counts[rank] += 1
    return counts


@dataclass(frozen=True)
class Rank:
    """One rank's place in the mesh, and the cut of one axis for it."""

    tp: int
    tp_rank: int
    ep: int
    weights: Sequence[int] | None

    def piece(self, tensor: torch.Tensor, dim: int, units: int, ways: int = 0, index: int = 0) -> torch.Tensor:
        """This rank's part of dimension `dim`, which is `units` pieces that stay whole; `ways`, `index` if not TP's."""
        size, rest = divmod(tensor.shape[dim], units)
        assert not rest, (tensor.shape, dim, units)
        if self.weights is not None:
            return tensor.split([count * size for count in shares(units, self.weights)], dim)[self.tp_rank]
        ways, index = (ways, index) if ways else (self.tp, self.tp_rank)
        assert units % ways == 0, f"{units} do not divide into {ways}"
        return tensor.chunk(ways, dim)[index]

    def queries(self, tensor: torch.Tensor, heads: int, kv: int, dim: int = 0) -> torch.Tensor:
        """By heads; with weights by whole key-value groups."""
        return self.piece(tensor, dim, kv if self.weights is not None else heads)

    def keys(self, tensor: torch.Tensor, kv: int) -> torch.Tensor:
        """By key-value heads, or, if there are fewer than ranks, the one head that consecutive ranks share."""
        if self.tp <= kv:
            return self.piece(tensor, 0, kv)
        assert self.tp % kv == 0
        return tensor.chunk(kv)[self.tp_rank // (self.tp // kv)]

    def vocabulary(self, tensor: torch.Tensor) -> torch.Tensor:
        """Rows, filled up with zeros until the ranks are equal; not filled up where they need not be."""
        if self.weights is None and (missing := -tensor.shape[0] % self.tp):
            tensor = torch.cat([tensor, torch.zeros(missing, *tensor.shape[1:], dtype=tensor.dtype)])
        return self.piece(tensor, 0, tensor.shape[0])

    def width(self, tensor: torch.Tensor, dim: int) -> torch.Tensor:
        """By the width of a feed-forward; of FP8 weights and of their scales by whole blocks."""
        units = tensor.shape[dim] // (BLOCK if tensor.dtype == torch.float8_e4m3fn else 1)
        return self.piece(tensor, dim, units)

    def experts(self, tensor: torch.Tensor, dim: int | None) -> torch.Tensor:
        """Whole experts by EP rank, [experts, ...]; inside them dimension `dim` by the ranks that share the expert,
        None for not at all.
        """
        etp = self.tp // self.ep
        mine = tensor.chunk(self.ep)[self.tp_rank // etp]
        if dim is None:
            return mine
        units = mine.shape[dim] // (BLOCK if mine.dtype == torch.float8_e4m3fn else 1)
        return self.piece(mine, dim, units, etp, self.tp_rank % etp)


def attention(parts: State, model: Model, rank: Rank) -> State:
    heads, kv = model.heads, model.kv
    out: State = {}
    for ending in ("", "_bias"):
        if f"attn.q{ending}" in parts:
            q, k, v = (parts[f"attn.{name}{ending}"] for name in "qkv")
            out[f"attn.qkv{ending}"] = torch.cat([rank.queries(q, heads, kv), rank.keys(k, kv), rank.keys(v, kv)])
    out["attn.o"] = rank.queries(parts["attn.o"], heads, kv, dim=1)
    if "attn.o_bias" in parts:
        out["attn.o_bias"] = parts["attn.o_bias"]  # whole everywhere: the runtime adds it once
    if "attn.sinks" in parts:
        out["attn.sinks"] = rank.queries(parts["attn.sinks"], heads, kv)
    for name in ("attn.q_norm", "attn.k_norm"):
        if name in parts:
            out[name] = parts[name]
    if "attn.q_norm_full" in parts:  # a weight per channel of q and k: cut and repeated as these are
        out["attn.q_norm_full"] = rank.queries(parts["attn.q_norm_full"], heads, kv)
        out["attn.k_norm_full"] = rank.keys(parts["attn.k_norm_full"], kv)
    return out


def latent_attention(parts: State, model: Model, rank: Rank) -> State:
    """Everything before the up-projections is on every rank; no key-value head to repeat."""
    out: State = {}
    for name in ("attn.q_a_norm", "attn.kv_a_norm"):
        if name in parts:
            out[name] = parts[name]
    for ending in ("", "_scale"):
        if "attn.kv_a" + ending not in parts:
            continue
        if "attn.q_a" in parts:
            out["attn.qkv_a" + ending] = torch.cat([parts["attn.q_a" + ending], parts["attn.kv_a" + ending]])
        else:
            out["attn.kv_a" + ending] = parts["attn.kv_a" + ending]
        for name, dim in (("attn.q_whole", 0), ("attn.q_b", 0), ("attn.kv_b", 0), ("attn.o", 1)):
            if name in parts and not ending:
                out[name] = rank.piece(parts[name], dim, model.heads)
            elif name in parts:
                out[name + ending] = blocks_under(
                    parts[name + ending], parts[name], dim, lambda t, d: rank.piece(t, d, model.heads)
                )
    return out


def blocks_under(
    scale: torch.Tensor, weight: torch.Tensor, dim: int, cut: Callable[[torch.Tensor, int], torch.Tensor]
) -> torch.Tensor:
    """The scales of the blocks that a rank holds: write each block's number over its rows, cut those,
    and see which numbers are left.
    """
    numbers = torch.arange(weight.shape[dim]) // BLOCK
    mine = cut(numbers, 0)
    blocks, counts = mine.unique_consecutive(return_counts=True)
    assert torch.equal(counts, torch.bincount(numbers)[blocks]), "a cut inside a block"
    return scale.index_select(dim, blocks)


def feed_forward(parts: State, rank: Rank) -> State:
    out: State = {}
    for kind in ("mlp", "shared"):
        for ending in ("", "_scale", "_bias"):
            gate, up, down = (f"{kind}.{name}{ending}" for name in ("gate", "up", "down"))
            if gate in parts:
                out[f"{kind}.gate_up{ending}"] = torch.cat([rank.width(parts[gate], 0), rank.width(parts[up], 0)])
            elif up in parts:
                out[up] = rank.width(parts[up], 0)
            if down in parts:
                out[down] = parts[down] if ending == "_bias" else rank.width(parts[down], 1)
    return out


def experts(parts: State, rank: Rank) -> State:
    out: State = {}
    for name in ("moe.router", "moe.router_bias", "moe.score_bias"):
        if name in parts:
            out[name] = parts[name]
    for ending in ("", "_scale", "_bias"):
        gate, up, down = (f"moe.{name}{ending}" for name in ("gate", "up", "down"))
        if gate in parts:
            out[f"moe.gate_up{ending}"] = torch.cat([rank.experts(parts[gate], 1), rank.experts(parts[up], 1)], dim=1)
            out[down] = rank.experts(parts[down], None if ending == "_bias" else 2)
    return out


def layer_of_rank(parts: State, model: Model, rank: Rank) -> State:
    out = {name: tensor for name, tensor in parts.items() if re.fullmatch(r"(post_)?(attn|mlp)_norm(_bias)?", name)}
    out |= attention(parts, model, rank) if model.kv else latent_attention(parts, model, rank)
    out |= feed_forward(parts, rank) | experts(parts, rank)
    for name in ("mtp.eh_proj", "mtp.e_norm", "mtp.h_norm", "mtp.norm"):
        if name in parts:
            out[name] = parts[name]
    for name in ("mtp.embed", "mtp.head"):
        if name in parts:
            out[name] = rank.vocabulary(parts[name])
    return out


def expected(
    directory: Path, family: str, *, tp: int = 1, ep: int = 1, weights: Sequence[int] | None = None, pp: int = 1
) -> list[State]:
    """What every rank stores, by native name; rank = pp_rank * tp + tp_rank. `weights`: one number per TP rank,
    without EP.
    """
    assert tp % ep == 0 and (weights is None or (len(weights) == tp and ep == 1))
    model = FAMILIES[family](Source(directory))
    count = len(model.layers)
    assert pp <= count
    sizes = [count // pp + (stage < count % pp) for stage in range(pp)]
    ranks = []
    for stage in range(pp):
        first, last = stage == 0, stage == pp - 1
        begin = sum(sizes[:stage])
        mine = {i: model.layers[i] for i in range(begin, begin + sizes[stage])}
        if last:
            mine |= {count + i: parts for i, parts in enumerate(model.extra)}
        for tp_rank in range(tp):
            rank = Rank(tp, tp_rank, ep, weights)
            out: State = {}
            if first:
                out["embed"] = rank.vocabulary(model.ends["embed"])
                if "pos_embed" in model.ends:
                    out["pos_embed"] = model.ends["pos_embed"]
            for i, parts in mine.items():
                out |= {f"layers.{i}.{name}": tensor for name, tensor in layer_of_rank(parts, model, rank).items()}
            if last:
                out |= {name: model.ends[name] for name in ("norm", "norm_bias") if name in model.ends}
                if "head" in model.ends:
                    out["head"] = rank.vocabulary(model.ends["head"])
                elif not first:  # tied: the first stage has it as `embed`
                    out["head"] = rank.vocabulary(model.ends["embed"])
            ranks.append({name: tensor.contiguous() for name, tensor in out.items()})
    return ranks
