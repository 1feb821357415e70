"""The notation says what docs/notation.md says: patterns measured by hand, names folded, sizes evaluated;
the rest is refused.
"""

import math
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import law

from reshard.errors import ReshardError
from reshard.tables.expression import parse
from reshard.tables.notation import LONGEST, Pattern, block_of, derived, fold, parse_pattern, parse_template

HEADS = {"heads": ("kv", "group")}
SIZES = {
    "layer": 3,
    "kv": 2,
    "group": 3,
    "head_dim": 5,
    "hidden": 7,
    "inter": 11,
    "experts": 4,
    "nope_dim": 13,
    "moe_inter": 6,
}


def measured(text: str) -> tuple[tuple[int, ...], list[tuple[int, dict[str, int]]]]:
    pattern = parse_pattern(text, HEADS)
    shape, spans = pattern.measure(lambda _, axis: SIZES[axis])
    return shape, [(span.offset, dict(span.strides)) for span in spans]


# Patterns


@pytest.mark.parametrize(
    ("text", "shape"),
    [
        ("", ()),
        ("1", (1,)),
        ("hidden", (7,)),
        ("inter hidden", (11, 7)),
        ("hidden inter", (7, 11)),
        ("(inter) hidden", (11, 7)),
        ("1 hidden", (1, 7)),
        ("hidden (heads head_dim)", (7, 30)),
        ("(heads head_dim + kv head_dim + kv head_dim) hidden", (50, 7)),
        ("hidden (heads head_dim + kv head_dim + kv head_dim)", (7, 50)),
        ("(kv (group head_dim + head_dim + head_dim)) hidden", (50, 7)),
        ("(heads (head_dim + head_dim) + kv head_dim + kv head_dim) hidden", (80, 7)),
        ("(heads (nope_dim + head_dim)) hidden", (108, 7)),
        ("experts hidden (moe_inter (1 + 1))", (4, 7, 12)),
        ("experts hidden (moe_inter + moe_inter)", (4, 7, 12)),
        ("(experts moe_inter) hidden", (24, 7)),
        ("layer (experts inter) 1 hidden", (3, 44, 1, 7)),
    ],
)
def test_a_stored_tensor_has_the_shape_that_its_pattern_says(text: str, shape: tuple[int, ...]) -> None:
    assert measured(text)[0] == shape


def test_q_k_and_v_of_a_plain_fusion_lie_one_after_another() -> None:
    _, (q, k, v) = measured("(heads head_dim + kv head_dim + kv head_dim) hidden")
    assert q == (0, {"kv": 105, "group": 35, "head_dim": 7, "hidden": 1})
    assert k == (210, {"kv": 35, "head_dim": 7, "hidden": 1})
    assert v == (280, {"kv": 35, "head_dim": 7, "hidden": 1})


def test_q_k_and_v_of_a_group_lie_together() -> None:
    """A group is three heads of q, one of k, one of v: 25 rows of 7."""
    _, (q, k, v) = measured("(kv (group head_dim + head_dim + head_dim)) hidden")
    assert q == (0, {"kv": 175, "group": 35, "head_dim": 7, "hidden": 1})
    assert k == (105, {"kv": 175, "head_dim": 7, "hidden": 1})
    assert v == (140, {"kv": 175, "head_dim": 7, "hidden": 1})


def test_gate_and_up_take_turns_where_the_sum_is_innermost() -> None:
    _, (gate, up) = measured("experts hidden (moe_inter (1 + 1))")
    assert gate == (0, {"experts": 84, "hidden": 12, "moe_inter": 2})
    assert up == (1, {"experts": 84, "hidden": 12, "moe_inter": 2})


def test_seams_at_two_depths_nest() -> None:
    _, (q, gate, k, v) = measured("(heads (head_dim + head_dim) + kv head_dim + kv head_dim)")
    assert q == (0, {"kv": 30, "group": 10, "head_dim": 1})
    assert gate == (5, {"kv": 30, "group": 10, "head_dim": 1})
    assert (k[0], v[0]) == (60, 70)


def test_leaves_may_hold_different_amounts_of_an_axis_that_each_has_for_itself() -> None:
    """What a rank with a repeated key-value head has: two heads of q, one each of k and v."""
    sizes = [{"kv": 1, "group": 2, "head_dim": 5}, {"kv": 1, "head_dim": 5}, {"kv": 1, "head_dim": 5}]
    pattern = parse_pattern("(heads head_dim + kv head_dim + kv head_dim)", HEADS)
    shape, spans = pattern.measure(lambda leaf, axis: sizes[leaf][axis])
    assert shape == (20,) and [span.offset for span in spans] == [0, 10, 15]


def test_leaves_that_share_an_axis_in_memory_must_hold_the_same_of_it() -> None:
    pattern = parse_pattern("(kv (group + 1))", {})
    with pytest.raises(ReshardError, match="axis kv is shared in memory by tensors that hold 2 and 4 of it"):
        pattern.measure(lambda leaf, axis: {"kv": (2, 4)[leaf], "group": 3}[axis])


def test_a_compound_is_shorthand_for_its_parts_everywhere() -> None:
    assert parse_pattern("(heads head_dim) hidden", HEADS) == parse_pattern("(kv group head_dim) hidden", {})
    assert parse_pattern("heads", HEADS).dims == (("kv", "group"),)


def test_a_pattern_can_be_refined_later() -> None:
    """Two layouts meet at the atoms of both, inside sums and inside blocks."""
    for text in ("(heads head_dim + kv head_dim) hidden", "(heads head_dim)/128 hidden/128", "(hidden (1 + heads))"):
        assert parse_pattern(text, {}).refined(HEADS) == parse_pattern(text, HEADS)


def test_an_axis_per_block_is_one_axis_named_after_its_atoms() -> None:
    pattern = parse_pattern("hidden/128 (heads head_dim)/64", HEADS)
    assert pattern.axes == (("hidden/128", "kv group head_dim/64"),)
    assert block_of("kv group head_dim/64") == (("kv", "group", "head_dim"), 64)
    assert block_of(derived(("inter",), 128)) == (("inter",), 128)
    assert block_of("inter") is None


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("(heads hidden", "a parenthesis is not closed"),
        ("heads) hidden", 'unexpected ")"'),
        ("heads + hidden", 'unexpected "+"'),
        ("()", "an empty term"),
        ("(heads + )", "an empty term"),
        ("( + heads)", "an empty term"),
        ("heads ; hidden", "unexpected character ';' at position 6"),
        ("heads-hidden", "unexpected character '-'"),
        ("2 hidden", 'unexpected "2"'),
        ("hidden hidden", "axis hidden occurs twice in one leaf"),
        ("(hidden + inter) hidden", "axis hidden occurs twice in one leaf"),
        ("heads kv", "axis kv occurs twice in one leaf"),
        ("(hidden + inter) (kv + group)", "several sums along one product"),
        ("((hidden + inter) (kv + group) + experts)", "several sums along one product"),
        ("hidden/", '"/" wants axes before it and a block size'),
        ("hidden/1", '"/" wants axes before it and a block size'),
        ("hidden/x", '"/" wants axes before it and a block size'),
        ("1/128", '"/" wants axes before it and a block size'),
        ("(hidden + inter)/128", '"/" wants axes before it and a block size'),
        ("/128", 'unexpected "/"'),
        ("(" * 600, f"of 600 characters: at most {LONGEST} are read"),
    ],
)
def test_a_malformed_pattern_is_refused_with_the_place(text: str, words: str) -> None:
    with pytest.raises(ReshardError, match=re.escape(words)):
        parse_pattern(text, HEADS)


@given(
    st.lists(
        st.sampled_from(["(", ")", "+", "/", "1", "2", "128", "a", "b", "c", "heads", " ", "²", "٣", "é", "\n"]),
        max_size=30,
    )
)
@law(300)
def test_any_text_is_a_pattern_or_is_refused(tokens: list[str]) -> None:
    for text in ("".join(tokens), " ".join(tokens)):
        try:
            pattern = parse_pattern(text, HEADS)
        except ReshardError:
            continue
        shape, spans = pattern.measure(lambda _, axis: 2)
        assert len(spans) == len(pattern.axes) >= 1
        assert_filled(pattern, shape)


def test_a_pattern_of_the_greatest_length_is_no_burden() -> None:
    parse_pattern("(" * 120 + "a" + ")" * 120, {})
    with pytest.raises(ReshardError):
        parse_pattern("(" * LONGEST, {})


def assert_filled(pattern: Pattern, shape: tuple[int, ...]) -> None:
    """Every element of the stored tensor belongs to exactly one leaf."""
    seen = np.zeros(math.prod(shape), int)
    for span in pattern.measure(lambda _, axis: 2)[1]:
        at = np.array(span.offset)
        for stride in span.strides.values():
            at = at[..., None] + np.arange(2) * stride
        np.add.at(seen, at, 1)
    assert (seen == 1).all()


# Names


def test_a_template_names_a_tensor_at_a_point() -> None:
    template = parse_template("model.layers.{layer}.mlp.experts.{experts:local}.w1")
    assert template.axes == ("layer", "experts") and template.local == {"experts"}
    assert template.name({"layer": 3, "experts": 12}) == "model.layers.3.mlp.experts.12.w1"
    assert template.folded == "model.layers.{}.mlp.experts.{}.w1"
    assert parse_template("norm").name({}) == "norm"


def test_names_may_count_in_steps() -> None:
    both, first = (
        parse_template("blocks.{layer//2}.attn.{layer%2}.w"),
        parse_template("blocks.{layer//2}.experts.{experts}.w"),
    )
    assert both.axes == ("layer",) and first.axes == ("layer", "experts")
    assert [both.name({"layer": layer}) for layer in (0, 1, 5)] == [
        "blocks.0.attn.0.w",
        "blocks.0.attn.1.w",
        "blocks.2.attn.1.w",
    ]
    assert [both.numbers(holes) for holes in ((0, 0), (0, 1), (2, 1), (2, 2), (1,))] == [(0,), (1,), (5,), None, None]
    assert first.name({"layer": 4, "experts": 7}) == "blocks.2.experts.7.w" and first.numbers((2, 7)) == (4, 7)
    assert both.folded == first.folded.replace("experts", "attn") == "blocks.{}.attn.{}.w"
    assert [
        both.counts("layer", 3),
        first.counts("layer", 3),
        first.counts("layer", 2),
        first.counts("experts", 3),
    ] == [1, 0, 1, 1]


@pytest.mark.parametrize(
    "text", ["", "~", "x.{layer", "x.layer}", "x.{}", "x.{Layer}", "x.{layer!r}", "x.{0}", "x.{layer:03}",
    "{layer}.{layer}",
     "x.{layer%2}", "x.{layer//2}.{layer}", "x.{layer//2}.{layer%3}", "x.{layer//0}", "x.{layer//2}.{layer//2}"]
)  # fmt: skip
def test_a_malformed_template_is_refused(text: str) -> None:
    with pytest.raises(ReshardError, match="stored name"):
        parse_template(text)


@pytest.mark.parametrize(
    ("name", "kind", "numbers"),
    [
        ("model.layers.3.mlp.experts.12.w1.weight", "model.layers.{}.mlp.experts.{}.w1.weight", (3, 12)),
        ("0.weight", "{}.weight", (0,)),
        ("layers.7", "layers.{}", (7,)),
        ("1.2.3", "{}.{}.{}", (1, 2, 3)),
        ("w1.conv2d.x3", "w1.conv2d.x3", ()),
        ("layers.007.x", "layers.007.x", ()),
        ("layers.00.x", "layers.00.x", ()),
        ("layers.1234567890.x", "layers.1234567890.x", ()),
        ("layers.-1.x", "layers.-1.x", ()),
        ("layers.1_0.x", "layers.1_0.x", ()),
        ("", "", ()),
    ],
)
def test_whole_numbers_between_dots_are_folded_and_nothing_else(name: str, kind: str, numbers: tuple[int, ...]) -> None:
    assert fold(name) == (kind, numbers)


@given(
    st.lists(st.sampled_from(["a", "w1", "{layer}", "{experts}", "{kv}", "x_2"]), min_size=1, max_size=6),
    st.integers(0, 999999999),
)
@law(100)
def test_folding_undoes_naming(parts: list[str], number: int) -> None:
    holes = [part for part in parts if part[0] == "{"]
    if len(set(holes)) < len(holes):
        return
    template = parse_template(".".join(parts))
    point = {axis: number // (at + 1) for at, axis in enumerate(template.axes)}
    kind, numbers = fold(template.name(point))
    assert kind == template.folded and numbers == tuple(point[axis] for axis in template.axes)


# Sizes


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("a", 3),
        ("missing | a", 3),
        ("missing | gone", None),
        ("a + b", 7),
        ("a * b", 12),
        ("a + b * c.d", 23),
        ("a + missing | b", 4),
        ("missing * a | b", 4),
        ("c.d", 5),
        ("4096", 4096),
        ("missing | 7", 7),
        ("zero | a", 0),
        ("null | a", 3),
    ],
)
def test_a_size_is_the_first_alternative_whose_keys_exist(expression: str, value: int | None) -> None:
    config = {"a": 3, "b": 4, "c.d": 5, "zero": 0, "null": None}
    assert parse(expression).size(config.get) == value


@pytest.mark.parametrize("value", [True, 1.0, "3", -1, [3], {}])
def test_a_size_that_is_no_number_of_elements_is_refused_by_its_key(value: object) -> None:
    with pytest.raises(ReshardError, match=r"config\.json: a is .*, expected a non-negative integer"):
        parse("missing | a").size({"a": value}.get)
