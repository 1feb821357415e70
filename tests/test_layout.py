"""Layouts put every box of every tensor where the format says: by tensor and never by row, padded, repeated,
staged, or refused.
"""

import json
import re
from typing import Any

import pytest
from fixtures import FIXTURES
from strategies import invented, model_of

from reshard.errors import ReshardError
from reshard.layout.cut import Layout, Piece, lay_out
from reshard.layout.mesh import Mesh
from reshard.model.understand import Config, Model, Tensor, understand
from reshard.tables import families, formats


def native(name: str, **mesh: Any) -> Layout:
    return lay_out(formats.load("native"), model_of(name), Mesh(**mesh))


def box(layout: Layout, tensor: str, rank: int) -> dict[str, tuple[int, int]]:
    """The one box of a logical tensor on a rank, but for the layers."""
    (piece,) = [piece for piece in layout.pieces[tensor] if piece.slot.rank == rank]
    return {axis: span for axis, span in zip(piece.tensor.axes, piece.box, strict=True) if axis != "layer"}


def names(layout: Layout, rank: int) -> set[str]:
    return {slot.name(point) for slot in layout.by_rank[rank] for point in slot.points()}


def shape(layout: Layout, rank: int, name: str) -> tuple[int, ...]:
    (found,) = {slot.shape for slot in layout.by_rank[rank] for point in slot.points() if slot.name(point) == name}
    return found


# A small model of one's own, and formats for it.

TENSORS = {
    "embed": ("vocab", "hidden"),
    "q": ("layer", "kv", "group", "head_dim"),
    "k": ("layer", "kv", "head_dim"),
    "up": ("layer", "inter", "hidden"),
    "gate": ("layer", "inter", "hidden"),
    "expert": ("layer", "experts", "inter", "hidden"),
    "norm": ("hidden",),
}
SIZES = {"layer": 3, "vocab": 10, "hidden": 6, "kv": 2, "group": 4, "head_dim": 3, "inter": 8, "experts": 4, "heads": 8}


def model(without: str = "", **changes: Tensor) -> Model:
    family = families.parse('name = "f"\nrows = []\n[axes]\nheads = "kv group"', "f")
    tensors = {
        name: Tensor(name, axes, tuple(SIZES[axis] for axis in axes), ("BF16",), (0, 1, 2) if "layer" in axes else None)
        for name, axes in TENSORS.items()
        if name not in without.split()
    }
    return Model(family, tensors | changes, SIZES, {}, {}, 3)


ROWS = {
    "embed": ["embed", "vocab hidden", "embed", "first"],
    "q k": ["l.{layer}.qk", "(heads head_dim + kv head_dim)", "q k"],
    "up gate": ["l.{layer}.gu", "(inter + inter) hidden", "up gate"],
    "expert": ["l.{layer}.e", "experts inter hidden", "expert"],
    "norm": ["norm", "hidden", "norm", "last"],
}
CUT = '[cut]\ntp = ["heads", "kv", "inter", "vocab"]\nep = ["experts"]\npp = ["layer"]\n'


def laid(
    mesh: Mesh | None = None,
    rows: dict[str, list[str]] | None = None,
    head: str = 'replicate = ["kv"]\nuneven = ["layer"]',
    cut: str = CUT,
    **kwargs: Any,
) -> Layout:
    every = ROWS | (rows or {})
    text = f'name = "x"\n{head}\nrows = {json.dumps([row for row in every.values() if row])}\n{cut}'
    return lay_out(formats.parse(text, "x"), kwargs.get("model") or model(), mesh or Mesh())


# Cuts


def test_key_value_heads_inside_a_fused_tensor_are_repeated_by_their_own_axes() -> None:
    """The trap: decided per row, k and v at TP 8 with 4 heads would be cut with q, or all be on every rank."""
    layout = native("llama", tp=8)
    assert layout.repeats == {"kv": 2}
    for rank in range(8):
        rest = {"kv": (rank // 2, rank // 2 + 1), "head_dim": (0, 10), "hidden": (0, 56)}
        assert box(layout, "attn.q", rank) == {"group": (rank % 2, rank % 2 + 1), **rest}
        assert box(layout, "attn.k", rank) == box(layout, "attn.v", rank) == rest
        assert shape(layout, rank, "layers.2.attn.qkv") == (30, 56)


def test_key_value_heads_are_cut_with_their_groups_while_there_are_enough() -> None:
    layout = native("llama", tp=2)
    assert layout.repeats == {}
    assert box(layout, "attn.q", 1) == {"kv": (2, 4), "group": (0, 2), "head_dim": (0, 10), "hidden": (0, 56)}
    assert box(layout, "attn.k", 1) == {"kv": (2, 4), "head_dim": (0, 10), "hidden": (0, 56)}
    assert shape(layout, 1, "layers.0.attn.qkv") == (80, 56)


def test_a_single_key_value_head_is_on_every_rank() -> None:
    layout = native("falcon_7b", tp=8)
    assert layout.repeats == {"kv": 8}
    assert {box(layout, "attn.k", rank)["kv"] for rank in range(8)} == {(0, 1)}
    assert [box(layout, "attn.q", rank)["group"] for rank in range(8)] == [(rank, rank + 1) for rank in range(8)]


def test_latent_attention_has_nothing_to_repeat() -> None:
    layout = native("deepseek_v3", tp=4)
    assert layout.repeats == {}
    assert box(layout, "attn.k_b", 3) == {"heads": (6, 8), "nope_dim": (0, 10), "kv_lora": (0, 28)}
    assert {box(layout, "attn.kv_a", rank)["kv_lora"] for rank in range(4)} == {(0, 28)}


def test_an_uneven_split_cuts_heads_by_whole_groups_and_the_rest_in_proportion() -> None:
    """2:1:1 of 4 groups, of 88 and of 331 rows: nothing is padded then."""
    layout = native("llama", tp=3, weights=(2, 1, 1))
    assert [box(layout, "attn.q", rank)["kv"] for rank in range(3)] == [(0, 2), (2, 3), (3, 4)]
    assert {box(layout, "attn.q", rank)["group"] for rank in range(3)} == {(0, 2)}
    assert [box(layout, "mlp.up", rank)["inter"] for rank in range(3)] == [(0, 44), (44, 66), (66, 88)]
    assert [box(layout, "embed", rank)["vocab"] for rank in range(3)] == [(0, 165), (165, 248), (248, 331)]
    assert layout.padding == {}


def test_the_vocabulary_is_padded_and_only_what_is_real_is_a_piece() -> None:
    layout = native("llama", tp=8)
    assert layout.padding == {"vocab": (331, 336)}
    assert [box(layout, "embed", rank)["vocab"] for rank in (0, 6, 7)] == [(0, 42), (252, 294), (294, 331)]
    assert {shape(layout, rank, "embed") for rank in range(8)} == {(42, 56)}


def test_a_rank_may_hold_nothing_but_padding() -> None:
    """Vocabulary 10 in units of 64 at TP 8: ranks 2 to 7 store rows that are all zero."""
    layout = laid(Mesh(tp=8), head='replicate = ["kv"]', cut=CUT + '[pad]\nvocab = "64"')
    assert [box(layout, "embed", rank)["vocab"] for rank in (0, 1, 2, 7)] == [(0, 8), (8, 10), (10, 10), (10, 10)]
    assert shape(layout, 7, "embed") == (8, 6)
    assert sum(piece.elements for piece in layout.distinct("embed")) == 60


def test_expert_parallelism_leaves_the_rest_of_tensor_parallelism_to_the_inside_of_experts() -> None:
    """TP 4, EP 2: two groups of two; attention and the dense layers are cut by all four."""
    layout = native("qwen3_moe", tp=4, ep=2)
    for rank in range(4):
        assert box(layout, "moe.up", rank)["experts"] == (rank // 2 * 2, rank // 2 * 2 + 2)
        assert box(layout, "moe.up", rank)["moe_inter"] == (rank % 2 * 20, rank % 2 * 20 + 20)
        assert box(layout, "mlp.up", rank)["inter"] == (rank * 22, rank * 22 + 22)
        assert box(layout, "moe.router", rank)["routes"] == (0, 4)


def test_blocks_are_cut_where_their_weights_are() -> None:
    """FP8 at TP 2: half of 2560 rows, and half of the 20 rows of scales."""
    layout = native("deepseek_v3_fp8", tp=2)
    assert box(layout, "mlp.up", 1)["inter"] == (1280, 2560)
    assert box(layout, "mlp.up_scale", 1) == {"inter/128": (10, 20), "hidden/128": (0, 2)}
    assert box(layout, "attn.q_b_scale", 1)["heads qk_dim/128"] == (6, 12)


@pytest.mark.parametrize(
    ("mesh", "words"), [({"tp": 8}, "splits a block of 128"), ({"tp": 8, "ep": 2}, "splits a block of 128")]
)
def test_a_cut_that_tears_a_block_is_refused(mesh: dict[str, int], words: str) -> None:
    with pytest.raises(ReshardError, match=words):
        native("deepseek_v3_fp8", **mesh)


def test_a_weighted_split_falls_on_borders_of_blocks() -> None:
    layout = native("deepseek_v3_fp8", tp=3, weights=(2, 1, 1))
    cuts = [box(layout, "mlp.up", rank)["inter"] for rank in range(3)]
    assert cuts == [(0, 1280), (1280, 1920), (1920, 2560)]
    assert [box(layout, "moe.up", rank)["moe_inter"] for rank in range(3)] == [(0, 256), (256, 384), (384, 512)]


# Words


def test_a_row_is_cut_unless_it_is_whole() -> None:
    usual, whole = laid(Mesh(tp=2)), laid(Mesh(tp=2), {"up gate": [*ROWS["up gate"], "whole"]})
    assert shape(usual, 1, "l.0.gu") == (8, 6) and shape(whole, 1, "l.0.gu") == (16, 6)
    assert box(whole, "up", 1)["inter"] == box(whole, "up", 0)["inter"] == (0, 8)
    assert shape(whole, 1, "l.0.qk") == shape(usual, 1, "l.0.qk")


def test_a_row_that_is_cut_elsewhere_is_cut_there_alone() -> None:
    layout = laid(Mesh(tp=2), {"up gate": [*ROWS["up gate"], "cut=hidden"]})
    assert shape(layout, 1, "l.0.gu") == (16, 3)
    assert box(layout, "up", 1) == {"inter": (0, 8), "hidden": (3, 6)}
    with pytest.raises(ReshardError, match="axis hidden: 6 cannot be split over 4 ranks"):
        laid(Mesh(tp=4), {"up gate": [*ROWS["up gate"], "cut=hidden"]})


def test_a_row_that_is_zero_elsewhere_has_its_content_on_rank_0_alone() -> None:
    layout = laid(Mesh(tp=2), {"norm": ["norm", "hidden", "norm", "zero"]})
    assert [shape(layout, rank, "norm") for rank in (0, 1)] == [(6,), (6,)]
    assert [piece.slot.rank for piece in layout.pieces["norm"]] == [0]


@pytest.mark.parametrize(("word", "ranks"), [("first", [0, 1]), ("last", [4, 5]), ("every", [0, 1, 2, 3, 4, 5])])
def test_a_row_without_layers_is_on_the_stage_that_it_names(word: str, ranks: list[int]) -> None:
    layout = laid(Mesh(tp=2, pp=3), {"norm": ["norm", "hidden", "norm", word]})
    assert [piece.slot.rank for piece in layout.pieces["norm"]] == ranks


def test_names_count_from_zero_inside_the_rank_where_the_table_says_so() -> None:
    rows = {"up gate": ["l.{layer:local}.gu", *ROWS["up gate"][1:]]}
    layout = laid(Mesh(pp=3), rows)
    assert [sorted(name for name in names(layout, rank) if "gu" in name) for rank in range(3)] == [["l.0.gu"]] * 3
    assert [sorted(name for name in names(layout, rank) if "qk" in name) for rank in range(3)] == [
        ["l.0.qk"],
        ["l.1.qk"],
        ["l.2.qk"],
    ]


# Stages


@pytest.mark.parametrize(
    ("mesh", "stages"),
    [
        (Mesh(pp=2), ((0, 3), (3, 5))),
        (Mesh(pp=3), ((0, 2), (2, 4), (4, 5))),
        (Mesh(pp=5), ((0, 1), (1, 2), (2, 3), (3, 4), (4, 5))),
        (Mesh(pp=2, layers=(1, 4)), ((0, 1), (1, 5))),
        (Mesh(), ((0, 5),)),
    ],
)
def test_earlier_stages_get_the_layers_that_are_left_over_unless_told(
    mesh: Mesh, stages: tuple[tuple[int, int], ...]
) -> None:
    layout = lay_out(formats.load("native"), model_of("llama"), mesh)
    assert layout.stages == stages
    for rank, (low, high) in enumerate(stages):
        assert {name.split(".")[1] for name in names(layout, rank) if "layers" in name} == {
            str(layer) for layer in range(low, high)
        }


def test_the_layer_of_multi_token_prediction_is_on_the_last_stage() -> None:
    layout = native("deepseek_v3", pp=4)
    assert layout.stages == ((0, 1), (1, 2), (2, 3), (3, 5))
    assert "layers.4.mtp.eh_proj" in names(layout, 3)


def test_layers_of_another_kind_are_only_where_they_are() -> None:
    """qwen3_moe: layers 0 and 3 are dense."""
    layout = native("qwen3_moe", pp=5)
    assert [f"layers.{rank}.mlp.down" in names(layout, rank) for rank in range(5)] == [True, False, False, True, False]
    assert [f"layers.{rank}.moe.down" in names(layout, rank) for rank in range(5)] == [False, True, True, False, True]


@pytest.mark.parametrize(
    ("name", "mesh", "words"),
    [
        ("llama", {"pp": 6}, "--pp 6 leaves a stage empty: the model has 5 layers"),
        ("llama", {"pp": 2, "layers": (2, 2)}, "--pp-layers 2,2 is 4 layers, the model has 5"),
        ("llama", {"tp": 2, "ep": 2}, '--ep 2 cuts nothing of this model in format "native"'),
        ("llama", {"tp": 16}, "axis group: 2 cannot be split over 4 ranks"),
        ("llama", {"tp": 5}, "axis kv: 5 ranks are not a multiple of 4"),
        ("llama", {"tp": 3}, "axis kv: 4 cannot be split over 3 ranks"),
        ("mixtral", {"tp": 3, "ep": 3}, "axis experts: 8 cannot be split over 3 ranks"),
        ("llama", {"tp": 5, "weights": (1, 1, 1, 1, 1)}, "axis kv: 5 ranks are not a multiple of 4"),
        (
            "llama",
            {"tp": 4, "weights": (97, 1, 1, 1)},
            "axis kv: 4 in units of 1 leaves rank 1 of --split with nothing",
        ),
    ],
)
def test_a_mesh_that_does_not_fit_is_refused_with_the_numbers(name: str, mesh: dict[str, Any], words: str) -> None:
    with pytest.raises(ReshardError, match=re.escape(words)) as caught:
        native(name, **mesh)
    assert caught.value.message.startswith(f'format "native" on {Mesh(**mesh)} does not fit this model:')


def test_all_that_does_not_fit_is_told_at_once() -> None:
    with pytest.raises(ReshardError) as caught:
        laid(Mesh(tp=3, pp=4))
    lines = caught.value.message.splitlines()[1:]
    assert len(lines) >= 4 and all(any(axis in line for line in lines) for axis in ("stage", "kv", "inter", "vocab"))


@pytest.mark.parametrize(
    ("mesh", "axis"), [(Mesh(tp=2), "--tp 2"), (Mesh(pp=3), "--pp 3"), (Mesh(tp=2, ep=2), "--ep 2")]
)
def test_a_mesh_axis_that_cuts_nothing_is_refused(mesh: Mesh, axis: str) -> None:
    """Else every rank would hold everything, and nobody would be told."""
    cut = {"--tp 2": 'pp = ["layer"]', "--pp 3": 'tp = ["vocab"]', "--ep 2": 'tp = ["vocab"]'}[axis]
    with pytest.raises(ReshardError, match=f'{axis} cuts nothing of this model in format "x"'):
        laid(mesh, cut=f"[cut]\n{cut}")


def test_unequal_ranks_and_stages_are_refused_where_the_format_has_none() -> None:
    with pytest.raises(ReshardError, match=r'format "x" wants equal ranks: --split cannot be used'):
        laid(Mesh(tp=2, weights=(3, 1)))
    with pytest.raises(
        ReshardError,
        match=r"3 layers cannot be split evenly over 2 stages; format \"x\" then needs --pp-layers, e\.g\. 2,1",
    ):
        laid(Mesh(pp=2), head='replicate = ["kv"]')
    assert laid(Mesh(pp=2, layers=(1, 2)), head="").stages == ((0, 1), (1, 3))


def test_repetition_that_the_format_does_not_allow_is_refused() -> None:
    cut = CUT.replace(', "vocab"', "")
    assert laid(Mesh(tp=4), cut=cut).repeats == {"kv": 2}
    with pytest.raises(ReshardError, match="axis kv: 2 cannot be split over 4 ranks"):
        laid(Mesh(tp=4), head="", cut=cut)


def test_one_dimension_of_memory_cannot_be_cut_twice() -> None:
    """A scale per 2 of two axes that are both cut: what a rank holds is not contiguous in blocks."""
    scale = Tensor("up", ("layer", "vocab inter/2"), (3, 40), ("F32",), (0, 1, 2))
    rows = {"up gate": [], "up": ["l.{layer}.s", "(vocab inter)/2", "up"]}
    with pytest.raises(ReshardError, match="cut twice, blocks of 2 would be split"):
        laid(Mesh(tp=2), rows, model=model("gate up", up=scale))


# Rows


def test_a_logical_tensor_goes_to_the_first_row_whose_tensors_all_exist() -> None:
    rows = {"up gate": ROWS["up gate"], "up": ["l.{layer}.u", "inter hidden", "up"]}
    assert "l.0.gu" in names(laid(rows=rows), 0) and "l.0.u" not in names(laid(rows=rows), 0)
    alone = laid(rows=rows, model=model("gate"))
    assert "l.0.u" in names(alone, 0) and "l.0.gu" not in names(alone, 0)


def test_a_logical_tensor_without_a_row_is_refused_with_its_axes() -> None:
    with pytest.raises(ReshardError, match=r"no row for the logical tensor norm \(e\.g\. norm hidden\)"):
        laid(rows={"norm": []})


def test_tensors_of_different_dtypes_or_layers_are_not_fused() -> None:
    other = Tensor("gate", TENSORS["gate"], (3, 8, 6), ("F32",), (0, 1, 2))
    with pytest.raises(
        ReshardError, match=r"\.gu cannot hold tensors of different dtypes, cast them to one before: up BF16, gate F32"
    ):
        laid(model=model(gate=other))
    fewer = Tensor("gate", TENSORS["gate"], (3, 8, 6), ("BF16",), (0, 2))
    with pytest.raises(ReshardError, match=r"no row for the logical tensor up .* in layers 1"):
        laid(model=model(gate=fewer))


def test_a_row_of_other_axes_than_the_tensor_is_refused_with_both() -> None:
    with pytest.raises(ReshardError, match=r"norm: stores norm by \(vocab\), the family table says \(hidden\)"):
        laid(rows={"norm": ["norm", "vocab", "norm"]})


def test_a_dtype_of_its_own_in_one_layer_is_kept() -> None:
    mixed = Tensor("expert", TENSORS["expert"], (3, 4, 8, 6), ("BF16", "F32", "BF16"), (0, 1, 2))
    layout = laid(model=model(expert=mixed))
    (slot,) = [slot for slot in layout.slots if slot.template.name.text == "l.{layer}.e"]
    assert [layout.dtype(slot, point) for point in slot.points()] == ["BF16", "F32", "BF16"]


# Tied


@pytest.mark.parametrize(
    ("name", "format", "pp", "first", "last"),
    [
        ("llama_tied", "native", 1, {"embed"}, {"embed"}),
        ("llama_tied", "native", 2, {"embed"}, {"head"}),
        ("llama_tied", "vllm", 1, {"lm_head.weight"}, {"lm_head.weight"}),
        ("llama_tied", "vllm", 3, {"model.embed_tokens.weight"}, {"lm_head.weight"}),
        ("llama", "native", 1, {"embed", "head"}, {"embed", "head"}),
        ("qwen3_tied_stored", "native", 1, {"embed", "head"}, {"embed", "head"}),
    ],
)
def test_of_two_tied_tensors_on_one_rank_one_is_stored(
    name: str, format: str, pp: int, first: set[str], last: set[str]
) -> None:
    """On different stages both are; where both were published they are two, whatever config says."""
    layout = lay_out(formats.load(format).for_family("llama" if format == "vllm" else ""), model_of(name), Mesh(pp=pp))
    ends = {"embed", "head", "lm_head.weight", "model.embed_tokens.weight"}
    assert names(layout, 0) & ends == first and names(layout, pp - 1) & ends == last


def test_a_head_that_is_stored_alone_serves_as_embedding() -> None:
    config, stored = invented(
        "llama", {"layer": 2, "kv": 2, "group": 2, "head_dim": 3, "hidden": 5, "inter": 8, "vocab": 9}
    )
    only = {key: value for key, value in stored.items() if "embed" not in key}
    found = understand(families.load("llama"), Config(config | {"tie_word_embeddings": True}), only)
    assert found.alias == {"embed": "head"}
    layout = lay_out(formats.load("native"), found, Mesh())
    assert "embed" in names(layout, 0) and "head" not in names(layout, 0)


# Constants, counts


def test_constants_stand_beside_their_tensor_in_every_layer_of_every_rank() -> None:
    layout = lay_out(formats.load("vllm").for_family("llama"), model_of("llama"), Mesh(tp=2))
    for rank in range(2):
        mine = {name for name in names(layout, rank) if "attn.attn._" in name}
        assert mine == {
            f"model.layers.{layer}.self_attn.attn._{part}_scale"
            for layer in range(5)
            for part in ("q", "k", "v", "prob")
        }
    assert {slot.shape for slot in layout.constants} == {()}
    assert {layout.dtype(slot, point) for slot in layout.constants for point in slot.points()} == {"F32"}


@pytest.mark.parametrize("name", FIXTURES)
def test_the_ranks_together_hold_each_tensor_once_but_for_replicas(name: str) -> None:
    tp = max(FIXTURES[name].tp)
    layout = native(name, tp=tp, pp=2)
    for logical, tensor in model_of(name).tensors.items():
        assert sum(piece.elements for piece in layout.distinct(logical)) == tensor.elements, logical
    for slot in layout.slots:
        assert slot.count() == len(list(slot.points())) > 0
        assert slot.elements >= sum(
            count(piece) for leaf in slot.template.leaves for piece in layout.pieces[leaf] if piece.slot is slot
        )


def count(piece: Piece) -> int:
    """Elements of a piece in one stored tensor."""
    found = 1
    for (low, high), stride in zip(piece.box, piece.strides, strict=True):
        found *= high - low if stride is not None else 1
    return found
