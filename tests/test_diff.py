"""Differences: equal is equal in any layout; planted differences are counted, measured and found; what cannot be
compared is told.
"""

from __future__ import annotations

import json
import math
import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import fixtures
import numpy as np
import pytest
import torch
from fixtures import FIXTURES
from test_engine_shards import saved

from reshard import api
from reshard.checkpoints.source import Source, open_source
from reshard.errors import ReshardError
from reshard.jobs.diff import Difference, Row, difference
from reshard.jobs.explain import explain
from reshard.model.understand import Tensor

State = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Shards of a fixture, converted once."""
    root = tmp_path_factory.mktemp("difference")

    @cache
    def made(name: str, tp: int = 2, pp: int = 1, to: str = "native") -> Path:
        out = root / f"{name}-{tp}-{pp}-{to}"
        api.convert(fixtures.checkpoint(name), out, tp=tp, pp=pp, to=to)
        return out

    return made


@cache
def published(name: str) -> Source:
    return open_source(fixtures.checkpoint(name))


def edited(name: str, directory: Path, edit: Callable[[State], Any], binary: bool = False) -> Source:
    """A copy of a fixture with other tensors: `edit` changes them in place."""

    def change(state: State) -> State:
        edit(state)
        return state

    copy = fixtures.copy(name, directory)
    fixtures.rewrite(copy, change, binary=binary)
    return open_source(copy)


def differing(found: Difference) -> list[Row]:
    return found.worst_first


# Equal


@pytest.mark.parametrize("name", FIXTURES)
def test_a_checkpoint_equals_its_shards_on_any_mesh(name: str, shards: Callable[..., Path]) -> None:
    """In both directions, and shards of one mesh those of another; every element has been compared."""
    tp = FIXTURES[name].tp[-1]
    one, two = open_source(shards(name, tp)), open_source(shards(name, 1, 2))
    for a, b in ((published(name), one), (one, published(name)), (one, two)):
        found = difference(a, b, 2)
        assert found.equal and not differing(found), found.lines()
        held = {key for key in a.layout.pieces if key in a.layout.model.tensors}
        wanted = sum(a.layout.model.tensors[key].elements for key in held | b.layout.pieces.keys())
        assert sum(row.elements for row in found.rows if not row.buffer) == wanted
        assert found.lines()[-2].startswith("equal: all") and max(map(len, found.lines()[2:])) <= 80


@pytest.mark.parametrize(
    ("name", "tp", "pp"), [("llama", 8, 1), ("llama_tied", 2, 2), ("qwen3_moe", 2, 1), ("phi3", 4, 1)]
)
def test_a_checkpoint_equals_what_vllm_saved_of_it(name: str, tp: int, pp: int, tmp_path: Path) -> None:
    foreign = open_source(saved(tmp_path / "v", name, tp, pp))
    assert difference(published(name), foreign, 2).equal
    assert difference(foreign, published(name), 2).equal


# Planted


def planted(state: State, key: str, random_: random.Random, count: int) -> None:
    """Other values for some elements, finite and of another bit pattern."""
    flat = state[key].view(-1)
    for at in random_.sample(range(flat.numel()), min(count, flat.numel())):
        before = flat[at].double().item()
        after = (
            before * random_.uniform(0.2, 0.6)
            if abs(before) > 1
            else before + random_.choice((-1, 1)) * random_.uniform(0.3, 2.0)
        )
        flat[at] = torch.tensor(after).to(flat.dtype)
        assert flat[at].double().item() != before


def measured(one: torch.Tensor, other: torch.Tensor) -> tuple[int, float, float]:
    """Differing elements, the largest difference, and rms, by torch."""
    count = int((fixtures.bits(one) != fixtures.bits(other)).sum())
    apart = (one.double() - other.double()).abs()
    return count, apart.max().item(), math.sqrt((apart**2).mean().item())


# Tensors that are one logical tensor each, in one layer
PLAIN = {
    "llama": (
        "model.layers.3.self_attn.k_proj.weight",
        "model.layers.1.mlp.down_proj.weight",
        "lm_head.weight",
        "model.norm.weight",
    ),
    "llama_bin": ("model.layers.2.self_attn.o_proj.weight", "model.embed_tokens.weight"),
    "gpt2_bare": ("h.1.mlp.c_fc.weight", "wpe.weight", "h.0.attn.bias"),
    "deepseek_v3_fp8": ("model.layers.0.mlp.down_proj.weight", "model.layers.0.mlp.down_proj.weight_scale_inv"),
}


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("tp", [1, 2, 4])
def test_planted_differences_are_counted_and_measured(
    name: str, tp: int, shards: Callable[..., Path], tmp_path: Path
) -> None:
    """Numbers are torch's, in bf16, fp16, fp32 and fp8, whichever side is sharded; the place named has the largest
    difference.
    """
    random_ = random.Random(f"{name} {tp}")
    one = fixtures.read(fixtures.checkpoint(name))

    def edit(state: State) -> None:
        for key in PLAIN[name]:
            planted(state, key, random_, 37)

    changed = edited(name, tmp_path / "changed", edit, binary=name == "llama_bin")
    two = fixtures.read(tmp_path / "changed")
    sharded = open_source(shards(name, tp))
    for a, b in ((sharded, changed), (changed, sharded)):
        found = difference(a, b, 2)
        rows = {}
        for row in differing(found):
            there = explain(b if row.side == "B" else a, row.worst)
            if there.parts:
                place = (there.parts[0].origins or there.parts[0].held)[0]
            else:
                assert there.here is not None  # a buffer
                place = there.here
            rows[place.tensor] = row
            assert (
                abs(one[place.tensor][place.first].double() - two[place.tensor][place.first].double()).item()
                == row.largest
            )
        assert rows.keys() == set(PLAIN[name])
        for key, row in rows.items():
            count, largest, rms = measured(one[key], two[key])
            assert (row.differing, row.largest, row.elements) == (count, largest, one[key].numel())
            assert row.rms == pytest.approx(rms, rel=1e-12)
        assert not found.equal and found.to_json()["counts"]["differs"] == len(rows)


@pytest.mark.parametrize(
    ("name", "key", "leaves"), [("phi3", "model.layers.2.self_attn.qkv_proj.weight", {"attn.q", "attn.k", "attn.v"})]
)
@pytest.mark.parametrize("strided", [False, True])
def test_each_part_of_a_fused_tensor_is_told_by_itself(
    name: str, key: str, leaves: set[str], strided: bool, tmp_path: Path
) -> None:
    """Also where a .bin file stores it transposed: one element changed in v is a difference of v."""
    index = (-3, 7)

    def edit(state: State) -> None:
        state[key][index] += 1
        if strided:
            state[key] = state[key].t().contiguous().t()

    copy = fixtures.copy(name, tmp_path / "copy")
    state = fixtures.read(copy)
    edit(state)
    for path in [*copy.glob("*.safetensors"), *copy.glob("*.index.json")]:
        path.unlink()
    torch.save(state, copy / "pytorch_model.bin")
    changed = open_source(copy)
    assert (changed.tensors[key][1].strides is not None) == strided
    found = difference(published(name), changed, 2)
    assert [(row.tensor, row.layer, row.differing) for row in differing(found)] == [("attn.v", 2, 1)]
    assert explain(changed, differing(found)[0].worst).here.first == (state[key].shape[0] - 3, 7)  # type: ignore[union-attr]
    assert [row.tensor for row in difference(changed, published(name), 2).worst_first] == ["attn.v"]
    assert leaves <= {row.tensor for row in found.rows if row.status == "equal" and row.layer == 1}


def test_experts_of_a_layer_are_one_tensor(shards: Callable[..., Path], tmp_path: Path) -> None:
    def edit(state: State) -> None:
        for expert in (0, 5):
            state[f"model.layers.1.block_sparse_moe.experts.{expert}.w3.weight"][4, 5] += expert + 1

    changed = edited("mixtral", tmp_path / "changed", edit)
    (row,) = differing(difference(open_source(shards("mixtral", 8)), changed, 2))
    assert (row.name, row.differing, row.worst) == (
        "moe.up layer 1",
        2,
        "model.layers.1.block_sparse_moe.experts.5.w3.weight[4,5]",
    )


# Equality is of bits


def test_nan_equals_nan_only_if_the_bits_are_equal(tmp_path: Path) -> None:
    """And infinities and NaN are counted, not measured."""
    key = "model.layers.1.mlp.up_proj.weight"

    def edit(bits: int, more: float) -> Callable[[State], None]:
        def change(state: State) -> None:
            fixtures.bits(state[key]).view(-1)[5] = bits
            state[key].view(-1)[9] = float("inf")
            state[key].view(-1)[11] = more

        return change

    one = edited("llama", tmp_path / "one", edit(0x7FC0, 1.0))
    same = edited("llama", tmp_path / "same", edit(0x7FC0, 1.0))
    other = edited("llama", tmp_path / "other", edit(0x7FC1, float("-inf")))
    assert difference(one, same, 1).equal
    (row,) = differing(found := difference(one, other, 1))
    assert (row.differing, row.odd, row.largest, row.rms) == (2, 2, 0.0, 0.0)
    assert row.worst == f"{key}[0,5]"
    json.dumps(found.to_json(), allow_nan=False)
    assert "2 are infinite or NaN" in " ".join(" ".join(found.lines()).split())


def test_zeros_of_either_sign_differ_by_nothing(tmp_path: Path) -> None:
    def edit(value: float) -> Callable[[State], None]:
        return lambda state: state["model.norm.weight"].__setitem__(3, value)

    one, other = edited("llama", tmp_path / "one", edit(0.0)), edited("llama", tmp_path / "other", edit(-0.0))
    (row,) = differing(difference(one, other, 1))
    assert (row.differing, row.odd, row.largest, row.rms) == (1, 0, 0.0, 0.0)


# What cannot be compared


def test_other_dtypes_are_told_and_the_rest_is_compared(tmp_path: Path) -> None:
    def edit(state: State) -> None:
        state["model.layers.2.mlp.down_proj.weight"] = state["model.layers.2.mlp.down_proj.weight"].float()
        state["model.norm.weight"][0] += 1

    found = difference(published("llama"), edited("llama", tmp_path / "copy", edit), 2)
    first, second = differing(found)
    assert (
        (first.name, first.status) == ("mlp.down layer 2", "dtype")
        and first.a.startswith("BF16")
        and first.b.startswith("F32")
    )
    assert (second.name, second.differing) == ("norm", 1)
    assert any("BF16" in line and "F32" in line for line in found.lines())


def test_layers_that_one_side_lacks_are_told_together(tmp_path: Path, shards: Callable[..., Path]) -> None:
    """Of models of three and of five layers the first three are compared."""

    def edit(state: State) -> None:
        for key in list(state):
            if ".layers.3." in key or ".layers.4." in key:
                del state[key]
        state["model.layers.2.self_attn.q_proj.weight"][0, 0] += 1

    fixtures.copy("llama", tmp_path / "short")
    fixtures.configure(tmp_path / "short", num_hidden_layers=3)
    shutil.copytree(tmp_path / "short", tmp_path / "cut")

    def change(state: State) -> State:
        edit(state)
        return state

    fixtures.rewrite(tmp_path / "cut", change)
    short = open_source(tmp_path / "cut")
    for long in (published("llama"), open_source(shards("llama", 2, 2))):
        for a, b, side in ((long, short, "A"), (short, long, "B")):
            found = difference(a, b, 2)
            statuses = {(row.layer, row.status) for row in differing(found)}
            assert statuses == {(3, f"only in {side}"), (4, f"only in {side}"), (2, "differs")}
            assert [row.name for row in differing(found) if row.status == "differs"] == ["attn.q layer 2"]
            assert sum("layers 3-4  only in" in line for line in found.lines()) == 9


def test_models_of_other_sizes_say_which_tensors_differ_in_shape() -> None:
    found = difference(published("llama"), published("llama_bias"), 2)
    statuses = {row.tensor: row.status for row in found.rows if row.layer in (0, None)}
    assert statuses["attn.q"] == statuses["norm"] == "shape" and statuses["attn.q_bias"] == "only in B"
    assert any("hidden 56" in line for line in found.lines()) and max(map(len, found.lines()[2:])) <= 80


def test_checkpoints_without_a_common_tensor_are_refused() -> None:
    a = published("llama")
    model = a.layout.model
    other = replace(
        a,
        layout=replace(
            a.layout, model=replace(model, tensors={f"x.{key}": tensor for key, tensor in model.tensors.items()})
        ),
    )
    with pytest.raises(ReshardError, match="they have none in common"):
        difference(a, other, 1)


def test_the_order_of_a_family_s_axes_does_not_matter(shards: Callable[..., Path]) -> None:
    """Another family may name the same axes in another order: the same logical tensor all the same."""
    sharded = open_source(shards("llama", 2))
    layout = sharded.layout

    def turned(tensor: Tensor) -> Tensor:
        return replace(tensor, axes=tensor.axes[::-1], sizes=tensor.sizes[::-1])

    tensors = {name: turned(tensor) for name, tensor in layout.model.tensors.items()}
    pieces = {
        name: tuple(replace(p, tensor=tensors[name], box=p.box[::-1], strides=p.strides[::-1]) for p in held)
        for name, held in layout.pieces.items()
    }
    other = replace(sharded, layout=replace(layout, model=replace(layout.model, tensors=tensors), pieces=pieces))
    found = difference(published("llama"), other, 2)
    assert found.equal and sum(row.elements for row in found.rows) == sum(
        tensor.elements for tensor in tensors.values()
    )


# Tied


def test_tied_tensors_are_compared_under_both_names(tmp_path: Path, shards: Callable[..., Path]) -> None:
    """A head that is stored equals a head that is tied if its bits do, in either direction."""
    vllm = open_source(shards("qwen3_tied_stored", 2, 1, "vllm"))
    for a, b in ((published("qwen3_tied_stored"), vllm), (vllm, published("qwen3_tied_stored"))):
        found = difference(a, b, 2)
        assert found.equal and {"head", "embed"} <= {row.tensor for row in found.rows}

    def edit(state: State) -> None:
        state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
        state["lm_head.weight"][300, 2] += 1

    stored = edited("llama_tied", tmp_path / "stored", edit)
    for a, b in (
        (published("llama_tied"), stored),
        (stored, published("llama_tied")),
        (stored, open_source(shards("llama_tied", 1, 2))),
    ):
        (row,) = differing(difference(a, b, 2))
        assert (row.tensor, row.differing) == ("head", 1)


# Buffers


def test_buffers_that_both_have_are_compared_and_others_are_noted(tmp_path: Path, shards: Callable[..., Path]) -> None:
    key = "model.layers.1.self_attn.rotary_emb.inv_freq"
    changed = edited(
        "llama_inv_freq", tmp_path / "changed", lambda state: state[key].add_(torch.tensor([0.0, 0, 0.5, 0, 0, 0]))
    )
    for a in (published("llama_inv_freq"), open_source(shards("llama_inv_freq", 2))):
        (row,) = differing(difference(a, changed, 2))
        assert (row.tensor, row.buffer, row.differing, row.worst) == (key, True, 1, f"{key}[2]")
        assert row.largest == pytest.approx(0.5)
    without = edited(
        "llama_inv_freq",
        tmp_path / "without",
        lambda state: [state.pop(name) for name in list(state) if "inv_freq" in name],
    )
    found = difference(changed, without, 2)
    assert found.equal and "only in A" in found.notes[0]


# As data


def test_the_result_does_not_depend_on_the_number_of_threads(tmp_path: Path, shards: Callable[..., Path]) -> None:
    random_ = random.Random(1)
    changed = edited("llama", tmp_path / "changed", lambda state: [planted(state, key, random_, 50) for key in state])
    texts = [
        json.dumps(difference(open_source(shards("llama", 8)), changed, threads).to_json()) for threads in (1, 2, 7)
    ]
    assert texts[0] == texts[1] == texts[2]


def test_the_worst_come_first_and_only_so_many(tmp_path: Path) -> None:
    random_ = random.Random(2)
    changed = edited("llama", tmp_path / "changed", lambda state: [planted(state, key, random_, 3) for key in state])
    found = difference(published("llama"), changed, 2)
    largest = [row.largest or 0.0 for row in differing(found)]
    assert len(largest) == 48 and largest == sorted(largest, reverse=True)
    lines = found.lines()
    assert sum(line.startswith("  worst in B at") for line in lines) == 20
    assert any("and 28 more" in line for line in lines)
    data = found.to_json()
    assert not data["equal"] and [row["max"] for row in data["rows"]] == largest


def test_large_pieces_are_decoded_in_small_parts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """However few elements are decoded at a time, the numbers are the same."""
    random_ = random.Random(3)

    def edit(state: State) -> None:
        for key in state:
            planted(state, key, random_, 50)
        state["model.embed_tokens.weight"] += 1

    changed = edited("llama", tmp_path / "changed", edit)
    whole = difference(published("llama"), changed, 2)
    monkeypatch.setattr("reshard.jobs.diff.CHUNK", 16)
    parts = difference(published("llama"), changed, 2)
    for one, other in zip(whole.rows, parts.rows, strict=True):
        assert replace(one, rms=None) == replace(other, rms=None)
        assert np.isclose(one.rms, other.rms, rtol=1e-12, atol=0)  # type: ignore[arg-type]
