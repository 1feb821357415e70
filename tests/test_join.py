"""The join of two layouts: every box meets its counterpart, the inverse is the arguments swapped, what lacks a source
is refused.
"""

from collections import defaultdict
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from fixtures import FIXTURES
from hypothesis import given
from hypothesis import strategies as st
from strategies import invented, law, model_of

from reshard.errors import ReshardError
from reshard.layout.cut import Layout, lay_out
from reshard.layout.join import Copy, collapse, plan
from reshard.layout.mesh import Mesh
from reshard.model.understand import Config, Model, understand
from reshard.tables import families, formats


def published(name: str) -> Layout:
    model = model_of(name)
    return lay_out(model.family.published, model, Mesh(), model.active)


def native(name: str, **mesh: Any) -> Layout:
    return lay_out(formats.load("native"), model_of(name), Mesh(**mesh))


def told(copy: Copy) -> tuple[Any, ...]:
    return copy.src.rank, copy.src_name, copy.src_offset, copy.dst.rank, copy.dst_name, copy.dst_offset, copy.dims


# What is copied where


def test_the_copies_of_one_layer_of_llama_at_tp_2_are_those_made_by_hand() -> None:
    """Heads 8 of 10, key-value heads 4, hidden 56, feed-forward 88; vocabulary 331, stored as 332."""
    at = "model.layers.1."
    found = {told(copy) for copy in plan(published("llama"), native("llama", tp=2)).copies() if copy.dst.rank == 1}
    mine = {copy for copy in found if copy[1].startswith(at) or copy[1] == "model.embed_tokens.weight"}

    def whole(src: str, start: int, dst: str, offset: int, n: int) -> tuple[Any, ...]:
        return 0, at + src, start, 1, f"layers.1.{dst}", offset, ((n, 1, 1),)

    assert mine == {
        whole("self_attn.q_proj.weight", 40 * 56, "attn.qkv", 0, 40 * 56),
        whole("self_attn.k_proj.weight", 20 * 56, "attn.qkv", 40 * 56, 20 * 56),
        whole("self_attn.v_proj.weight", 20 * 56, "attn.qkv", 60 * 56, 20 * 56),
        (0, f"{at}self_attn.o_proj.weight", 40, 1, "layers.1.attn.o", 0, ((56, 80, 40), (40, 1, 1))),
        whole("mlp.gate_proj.weight", 44 * 56, "mlp.gate_up", 0, 44 * 56),
        whole("mlp.up_proj.weight", 44 * 56, "mlp.gate_up", 44 * 56, 44 * 56),
        (0, f"{at}mlp.down_proj.weight", 44, 1, "layers.1.mlp.down", 0, ((56, 88, 44), (44, 1, 1))),
        whole("input_layernorm.weight", 0, "attn_norm", 0, 56),
        whole("post_attention_layernorm.weight", 0, "mlp_norm", 0, 56),
        (0, "model.embed_tokens.weight", 166 * 56, 1, "embed", 0, ((165 * 56, 1, 1),)),
    }


def test_a_transposition_is_one_copy_per_expert_and_half() -> None:
    """gpt-oss, expert 5 of 8 on one rank: [hidden 56, 2 × 88 in turns] becomes two halves [88, 56]."""
    copies = [
        told(c)
        for c in plan(published("gpt_oss"), native("gpt_oss")).copies()
        if c.src_name.endswith("1.mlp.experts.gate_up_proj")
    ]
    name, to = "model.layers.1.mlp.experts.gate_up_proj", "layers.1.moe.gate_up"
    stacked = 2 * 88 * 56
    assert sorted(copies) == [
        (0, name, half, 0, to, half * 88 * 56, ((8, stacked, stacked), (88, 2, 56), (56, 176, 1))) for half in (0, 1)
    ]


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox", "falcon_40b", "qwen3_moe", "deepseek_v3"])
def test_the_inverse_is_the_arguments_swapped(name: str) -> None:
    """The same set of copies with the sides exchanged, where nothing is replicated."""
    # GPT-2 is tied: each stage would have the embedding
    layouts = (published(name), native(name, pp=1 if name == "gpt2" else 2))
    there, back = ([told(copy) for copy in plan(*pair).copies()] for pair in (layouts, layouts[::-1]))
    turned = [(*copy[3:6], *copy[:3], tuple((n, b, a) for n, a, b in copy[6])) for copy in back]
    assert sorted((*copy[:6], sorted(copy[6])) for copy in there) == sorted(
        (*copy[:6], sorted(copy[6])) for copy in turned
    )


@pytest.mark.parametrize("name", FIXTURES)
def test_replicas_are_read_from_the_lowest_rank_that_holds_them(name: str) -> None:
    """Merging from the largest mesh: every element of the checkpoint is read once, and norms from tensor parallel rank
    0 alone.
    """
    tp = max(FIXTURES[name].tp)
    model = model_of(name)
    joined = plan(native(name, tp=tp), published(name))
    stored = sum(tensor.elements for logical, tensor in model.tensors.items() if logical not in model.alias)
    assert sum(copy.elements for copy in joined.copies()) == stored
    assert {
        copy.src.rank for copy in joined.copies() if "norm" in copy.dst_name and copy.src_name.endswith("attn_norm")
    } <= {0}


def test_the_destination_can_be_restricted_to_some_ranks() -> None:
    """What loading a rank needs: the same copies that it has in the whole plan, and no others."""
    src, dst = published("qwen3_moe"), native("qwen3_moe", tp=4, ep=2)
    every = defaultdict(set)
    for copy in plan(src, dst).copies():
        every[copy.dst.rank].add(told(copy))
    assert {told(copy) for copy in plan(src, dst, ranks=[2]).copies()} == every[2]
    assert {told(copy) for copy in plan(src, dst, ranks=[0, 3]).copies()} == every[0] | every[3]
    assert list(plan(src, dst, ranks=[]).copies()) == []


@pytest.mark.parametrize("name", ["llama", "mixtral", "gpt_oss", "deepseek_v3", "phi3"])
@pytest.mark.parametrize("back", [False, True])
def test_jobs_are_independent(name: str, back: bool) -> None:
    """No stored tensor of the destination is written by two of them, and each of its copies is in exactly one."""
    layouts = (published(name), native(name, tp=2, pp=2))
    joined = plan(*(reversed(layouts) if back else layouts))
    written: dict[tuple[int, str], tuple[int, str]] = {}
    copies = []
    for number, component in enumerate(joined.components):
        for point in component.points():
            for copy in component.copies(point):
                copies.append(told(copy))
                job = (number, str(point))
                assert written.setdefault((copy.dst.rank, copy.dst_name), job) == job
    assert len(set(copies)) == len(copies)
    assert sorted(copies) == sorted(told(copy) for copy in joined.copies())
    assert len(set(written.values())) > FIXTURES[name].layers


def test_a_logical_tensor_that_two_rows_hold_in_different_layers_is_joined_layer_by_layer() -> None:
    """A Falcon of two generations: the norm of layer 0 is `ln_attn`, that of layer 1 `input_layernorm`."""
    sizes = {"layer": 3, "kv": 2, "group": 2, "head_dim": 3, "hidden": 5, "inter": 8, "vocab": 9}
    config, stored = invented("falcon", sizes, [["new"], ["old"], ["new"]], parallel_attn=True)
    found = understand(families.load("falcon"), Config(config), stored)
    src, dst = (
        lay_out(found.family.published, found, Mesh(), found.active),
        lay_out(formats.load("native"), found, Mesh(tp=2)),
    )
    for a, b in ((src, dst), (dst, src)):
        copies = [copy for copy in plan(a, b).copies() if "attn_norm" in copy.src_name + copy.dst_name]
        held = {0: "ln_attn", 1: "input_layernorm", 2: "ln_attn"}
        norms = {
            True: {
                f"transformer.h.{layer}.{norm}.{part}" for layer, norm in held.items() for part in ("weight", "bias")
            },
            False: {f"layers.{layer}.attn_norm{ending}" for layer in held for ending in ("", "_bias")},
        }
        assert sorted(copy.src_name for copy in copies if copy.dst.rank == 0) == sorted(norms[a is src])
        assert {copy.src_name for copy in plan(a, b).copies()} <= {
            slot.name(p) for slot in a.slots for p in slot.points()
        }
        assert {copy.dst_name for copy in plan(a, b).copies()} == {
            slot.name(p) for slot in b.slots for p in slot.points()
        }


# What is refused


def test_a_tensor_that_the_source_lacks_is_refused_by_name() -> None:
    model = model_of("llama")
    poorer = replace(model, tensors={name: t for name, t in model.tensors.items() if name != "attn.o"})
    src = replace(published("llama"), model=poorer)
    with pytest.raises(ReshardError, match=r"attn\.o is wanted, the source has no such tensor"):
        plan(src, native("llama"))


@pytest.mark.parametrize("tp", [1, 2])
def test_a_source_that_lacks_a_piece_is_refused_with_both_counts(tp: int) -> None:
    whole = native("llama", tp=tp)
    for name, pieces in whole.pieces.items():
        lacking = replace(whole, pieces=whole.pieces | {name: pieces[1:]})
        if "norm" in name and tp > 1:
            plan(lacking, published("llama"))  # a replica is left
            continue
        with pytest.raises(
            ReshardError, match=rf"{name}: the layout holds \d+ of {model_of('llama').tensors[name].elements} elements"
        ):
            plan(lacking, published("llama"))


def test_a_destination_that_lacks_a_piece_is_refused_too() -> None:
    whole = native("llama", tp=2)
    with pytest.raises(ReshardError, match=r"embed: the layout holds 9296 of 18536 elements, each must be there once"):
        plan(published("llama"), replace(whole, pieces=whole.pieces | {"embed": whole.pieces["embed"][:1]}))


def test_pieces_that_overlap_are_refused() -> None:
    whole = native("llama", tp=2)
    one, two = whole.pieces["head"]
    wider = replace(two, box=((two.box[0][0] - 1, two.box[0][1]), two.box[1]))
    with pytest.raises(ReshardError, match=r"head: the layout holds 18592 of 18536 elements"):
        plan(replace(whole, pieces=whole.pieces | {"head": (one, wider)}), published("llama"))


def test_a_tied_name_without_pieces_is_read_from_the_other() -> None:
    """PP 2: the head on the last stage comes from the only embedding there is."""
    copies = {
        copy.dst_name: copy.src_name for copy in plan(published("llama_tied"), native("llama_tied", pp=2)).copies()
    }
    assert copies["head"] == copies["embed"] == "model.embed_tokens.weight"


# Collapsing


DIMS = st.lists(st.tuples(st.integers(1, 4), st.integers(0, 12), st.integers(1, 12)), max_size=4)


@given(DIMS)
@law(300)
def test_collapsing_changes_neither_the_elements_nor_their_partners(dims: list[tuple[int, int, int]]) -> None:
    merged = collapse(dims)
    assert pairs(merged) == pairs(dims)
    assert len(merged) <= len(dims) and list(merged) == sorted(merged, key=lambda dim: -dim[2])


def pairs(dims: Any) -> list[tuple[int, int]]:
    src, dst = np.zeros((), int), np.zeros((), int)
    for n, a, b in dims:
        src, dst = src[..., None] + np.arange(n) * a, dst[..., None] + np.arange(n) * b
    return sorted(zip(dst.ravel().tolist(), src.ravel().tolist(), strict=True))


@pytest.mark.parametrize(
    ("dims", "merged"),
    [
        ([(4, 10, 20), (10, 1, 2)], ((40, 1, 2),)),
        ([(4, 12, 10), (10, 1, 1)], ((4, 12, 10), (10, 1, 1))),
        ([(10, 1, 1), (4, 10, 10)], ((40, 1, 1),)),
        ([(2, 60, 60), (3, 20, 20), (5, 4, 4), (4, 1, 1)], ((120, 1, 1),)),
        ([(3, 1, 5), (5, 3, 1)], ((3, 1, 5), (5, 3, 1))),
        ([], ()),
    ],
)
def test_dimensions_that_run_on_become_one(
    dims: list[tuple[int, int, int]], merged: tuple[tuple[int, int, int], ...]
) -> None:
    assert collapse(dims) == merged


def test_a_plan_enumerates_nothing_before_it_is_asked() -> None:
    """A template per row and rank: the same number for 2 layers as for 5."""
    few, many = (plan(published(name), native(name, tp=4)) for name in ("llama_tied", "llama"))
    count = [sum(len(component.joins) for component in joined.components) for joined in (few, many)]
    assert count[1] - count[0] == 4  # the head
    assert sum(1 for _ in many.copies()) == 4 * count[1]  # 9 of 12 are in each of five layers


def test_models_are_left_as_they_were() -> None:
    model: Model = model_of("llama")
    before = (dict(model.tensors), dict(model.sizes), dict(model.alias))
    list(plan(published("llama"), native("llama", tp=8)).copies())
    assert (model.tensors, model.sizes, model.alias) == before
