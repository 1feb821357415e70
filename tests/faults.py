"""Faults planted in good shards, one at a time: what a wrong table, a wrong engine, a bad disk or a careless person
makes of them.

    plant(fault, out)     True if the fault is possible there, and is there now
    DOUBTS                what is wrong with the table, or with what shards are compared with, and what numerics must
                          then say

A fault works on the stored bytes, through the layout; it knows no file format. `running.sign` makes the digests right
again.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from fixtures import State
from running import ROOT

from reshard.checkpoints.source import Source, open_source
from reshard.layout.cut import Piece

Array = np.ndarray[Any, Any]
FAULTS: dict[str, Callable[[Path], bool]] = {}

SIZES = {"BF16": 2, "F16": 2, "F32": 4, "F64": 8, "F8_E4M3": 1}
EXPONENT = {"BF16": 1 << 7, "F16": 1 << 10, "F32": 1 << 23}


def fault(words: str) -> Callable[[Callable[[Path], bool]], Callable[[Path], bool]]:
    def add(plant: Callable[[Path], bool]) -> Callable[[Path], bool]:
        FAULTS[words] = plant
        return plant

    return add


def views(
    source: Source, name: str, layer: int | None = None
) -> Iterator[tuple[int, dict[str, int], tuple[str, ...], Array]]:
    """The parts of a logical tensor in every stored tensor: rank, point, the axes in memory, and a view of them that
    can be written to.
    """
    for piece in source.layout.pieces.get(name, ()):
        for point in piece.slot.points():
            if layer is None or point.get("layer") in (None, layer):
                axes, view = _view(source, piece, point)
                yield piece.slot.rank, point, axes, view


def _view(source: Source, piece: Piece, point: dict[str, int]) -> tuple[tuple[str, ...], Array]:
    path, entry = source.locate((piece.slot.rank, piece.slot.name(point)))
    size = SIZES[entry.dtype]
    axes, shape, strides = [], [], []
    for axis, (low, high), stride in zip(piece.tensor.axes, piece.box, piece.strides, strict=True):
        if stride is not None:
            axes.append(axis)
            shape.append(high - low)
            strides.append(stride * size)
    memory = np.memmap(path, np.uint8, "r+", entry.offset, (entry.nbytes,))
    return tuple(axes), np.ndarray(tuple(shape), f"u{size}", memory, piece.offset * size, tuple(strides))


def first_layer(source: Source, *names: str) -> int | None:
    """The first layer that has all of some tensors."""
    tensors = [source.layout.model.tensors.get(name) for name in names]
    if any(tensor is None or not tensor.layers for tensor in tensors):
        return None
    common = set.intersection(*(set(tensor.layers or ()) for tensor in tensors if tensor is not None))
    return min(common, default=None)


def exchange(one: Array, other: Array) -> None:
    one[...], other[...] = other.copy(), one.copy()


def pairs(source: Source, one: str, other: str, layer: int) -> Iterator[tuple[Array, Array]]:
    """The parts of two tensors on each rank, where they have the same shape."""
    theirs = {(rank, tuple(point.items())): view for rank, point, _, view in views(source, other, layer)}
    for rank, point, _, view in views(source, one, layer):
        match = theirs.get((rank, tuple(point.items())))
        if match is not None:
            yield view, match


def exchanged(out: Path, *choices: tuple[str, str]) -> bool:
    source = open_source(out)
    for one, other in choices:
        layer, done = first_layer(source, one, other), False
        for a, b in pairs(source, one, other, layer) if layer is not None else ():
            if a.shape == b.shape:
                exchange(a, b)
                done = True
        if done:
            return True
    return False


@fault("one bit flipped")
def flipped(out: Path) -> bool:
    source = open_source(out)
    layer = first_layer(source, name := next(n for n in ("mlp.up", "moe.up") if n in source.layout.model.tensors))
    *_, (_, _, _, view) = views(source, name, layer)
    view[(0,) * view.ndim] ^= 1 << (4 if view.itemsize > 1 else 2)
    return True


@fault("two ranks' files exchanged")
def swapped_files(out: Path) -> bool:
    one, other = (out / f"rank-{rank:05}" / "model.safetensors" for rank in (0, 1))
    one.rename(out / "aside")
    other.rename(one)
    (out / "aside").rename(other)
    return True


@fault("q and k exchanged")
def q_and_k(out: Path) -> bool:
    source = open_source(out)
    layer = first_layer(source, "attn.q", "attn.k")
    done = False
    theirs = {rank: (axes, view) for rank, _, axes, view in views(source, "attn.k", layer)} if layer is not None else {}
    for rank, _, axes, view in views(source, "attn.q", layer) if layer is not None else ():
        if rank in theirs and "group" in axes and "kv" in theirs[rank][0]:
            exchange(np.moveaxis(view, axes.index("group"), 0)[0], theirs[rank][1])
            done = True
    return done


@fault("k and v exchanged")
def k_and_v(out: Path) -> bool:
    return exchanged(out, ("attn.k", "attn.v"))


@fault("gate and up exchanged")
def gate_and_up(out: Path) -> bool:
    return exchanged(out, ("mlp.gate", "mlp.up"), ("moe.gate", "moe.up"))


@fault("rotary halves interleaved")
def interleaved(out: Path) -> bool:
    source = open_source(out)
    if {"pos_embed"} & source.layout.model.tensors.keys() or source.config.get("alibi"):
        return False
    name = "attn.k_rope" if "attn.k_rope" in source.layout.model.tensors else "attn.k"
    axis = "rope_dim" if name == "attn.k_rope" else "head_dim"
    layer = first_layer(source, name)
    for _, _, axes, view in views(source, name, layer):
        moved = np.moveaxis(view, axes.index(axis), 0)
        n = len(moved)
        moved[...] = moved.copy()[[i // 2 + (i % 2) * (n // 2) for i in range(n)]]
    return True


@fault("one expert swapped with another")
def swapped_experts(out: Path) -> bool:
    source = open_source(out)
    layer = first_layer(source, "moe.down")
    if layer is None:
        return False
    for rank, _, axes, view in views(source, "moe.down", layer):
        if rank == 0:
            parts = np.moveaxis(view, axes.index("experts"), 0)
            exchange(parts[0], parts[1])
    return True


@fault("a row-parallel bias multiplied by TP")
def bias_times_tp(out: Path) -> bool:
    source = open_source(out)
    name = next(
        (n for n in ("attn.o_bias", "mlp.down_bias", "moe.down_bias") if n in source.layout.model.tensors), None
    )
    if name is None:
        return False
    dtype = source.layout.model.tensors[name].dtypes[0]
    for _, _, _, view in views(source, name, first_layer(source, name)):
        view += np.where(
            view << 1 != 0, np.array(EXPONENT[dtype] * (source.layout.mesh.tp // 2), view.dtype), 0
        ).astype(view.dtype)
    return True


@fault("a norm of another layer")
def other_norm(out: Path) -> bool:
    source = open_source(out)
    name = next(n for n in ("attn_norm", "post_attn_norm") if n in source.layout.model.tensors)
    layers = source.layout.model.tensors[name].layers or ()
    theirs = {rank: view.copy() for rank, _, _, view in views(source, name, layers[1])}
    for rank, _, _, view in views(source, name, layers[0]):
        view[...] = theirs[rank]
    return True


@fault("a KV head repeated wrongly")
def wrong_repeat(out: Path) -> bool:
    source = open_source(out)
    if source.layout.repeats.get("kv", 1) < 2 or source.layout.model.sizes["kv"] < 2:
        return False
    found = False
    for name in ("attn.k", "attn.v"):
        boxes = [(piece.slot.rank, piece.box[piece.tensor.axes.index("kv")]) for piece in source.layout.pieces[name]]
        rank, box = boxes[-1]
        other = next((r for r, b in boxes if b != box), None)
        layer = first_layer(source, name)
        held = {r: view for r, _, _, view in views(source, name, layer)}
        if other is not None:
            held[rank][...] = held[other]
            found = True
    return found


@fault("the vocabulary shifted by one")
def shifted(out: Path) -> bool:
    for _, _, axes, view in views(open_source(out), "embed"):
        rows = np.moveaxis(view, axes.index("vocab"), 0)
        rows[...] = np.roll(rows.copy(), 1, axis=0)
    return True


@fault("a shard truncated by a page")
def truncated_page(out: Path) -> bool:
    return _truncated(out, 4096)


@fault("a shard truncated by 100 bytes")
def truncated(out: Path) -> bool:
    return _truncated(out, 100)


def _truncated(out: Path, by: int) -> bool:
    path = out / "rank-00001" / "model.safetensors"
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - by)
    return True


@fault("a manifest of another model")
def other_manifest(out: Path) -> bool:
    other = out.parent / "other"
    if not other.is_dir():
        return False
    shutil.copy(other / "manifest.json", out / "manifest.json")
    return True


@fault("config.json edited")
def edited(out: Path) -> bool:
    path = out / "config.json"
    config = json.loads(path.read_text())
    for key in ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon"):
        if key in config:
            path.write_text(json.dumps(config | {key: 0.5}))
            return True
    return False


def plant(words: str, out: Path) -> bool:
    """Plant a fault; False where it is not possible."""
    return FAULTS[words](out)


# --- what shards are compared with ------------------------------------------------------------------------------------

EXCHANGED = {"attn.k": "attn.v", "attn.v": "attn.k", "mlp.gate": "mlp.up", "mlp.up": "mlp.gate"}
WRAPPED = {"model.layers.{layer}.": "model.layers.{layer}._checkpoint_wrapped_module."}
UNKNOWN = {"up_proj": "w3"}


class Doubt(NamedTuple):
    """A llama: what is done to its tensors, how the table spells their names, which of its logical names are exchanged,
    and whether transformers can be imported; then the status that numerics must have."""

    edit: Callable[[State], State] = lambda state: state
    names: Mapping[str, str] = {}
    exchanged: Mapping[str, str] = {}
    installed: bool = True
    status: str = "self-consistent"


def wrapped(state: State) -> State:
    """As activation checkpointing under FSDP leaves them."""
    return {
        re.sub(r"\.layers\.(\d+)\.", r".layers.\1._checkpoint_wrapped_module.", name): tensor
        for name, tensor in state.items()
    }


def unknown(state: State) -> State:
    return {name.replace("up_proj", "w3"): tensor for name, tensor in state.items()}


def much_in_common(state: State) -> State:
    """Logits that float32 can hardly tell apart."""
    state["lm_head.weight"][:, 0] = 2.0**17
    return state


def biased(state: State) -> State:
    """Biases of the feed-forward, which config.json does not know."""
    parts = [name for name in state if re.search(r"\.mlp\.\w+_proj\.weight$", name)]
    return state | {
        name.replace("weight", "bias"): torch.ones(len(state[name]), dtype=state[name].dtype) for name in parts
    }


DOUBTS = {
    "right table": Doubt(status="ok"),
    "names exchanged in the table": Doubt(exchanged=EXCHANGED, status="failed"),
    "right table; transformers missing": Doubt(installed=False),
    "names exchanged in the table; transformers missing": Doubt(exchanged=EXCHANGED, installed=False),
    "right table; wrappers in names": Doubt(wrapped, WRAPPED, status="ok"),
    "names exchanged in the table; wrappers in names": Doubt(wrapped, WRAPPED, EXCHANGED, status="failed"),
    "right table; names that transformers would fill at random": Doubt(unknown, UNKNOWN),
    "names exchanged in the table; names that transformers would fill at random": Doubt(unknown, UNKNOWN, EXCHANGED),
    "right table; tensors that transformers leaves out": Doubt(biased),
    "right table; a reference that is off by more than rounding": Doubt(much_in_common),
}


def respelled(path: Path, names: dict[str, str], leaves: dict[str, str]) -> Path:
    """The llama table, for names that are spelled otherwise, and with logical names exchanged."""
    text = (ROOT / "reshard/families/llama.toml").read_text()
    lines = []
    for line in text.replace('name = "llama"', 'name = "mine"').splitlines():
        for old, new in names.items():
            line = line.replace(old, new)
        found = re.match(r'( *\["[^"]*", *"[^"]*", *")([a-z_.]+)(".*)', line)
        lines.append(f"{found[1]}{leaves.get(found[2], found[2])}{found[3]}" if found else line)
    path.write_text("\n".join(lines))
    return path
