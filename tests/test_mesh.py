"""The mesh numbers ranks as it says, and cuts axes without loss: exactly, by weight,
with repetition or with padding.
"""

import math
import re
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import law

from reshard.errors import ReshardError
from reshard.layout.mesh import Coordinate, Mesh, Range, Rule, cut, cut_compound, shares

WEIGHTS = st.lists(st.integers(1, 9), min_size=1, max_size=8).map(tuple)


def cuts(size: int, n: int, rule: Rule | None = None, weights: tuple[int, ...] | None = None) -> list[Range]:
    return [cut("heads", size, Coordinate(k, n, weights), rule or Rule()) for k in range(n)]


# Ranks


def test_stages_come_first_and_tensor_parallel_ranks_lie_together() -> None:
    mesh = Mesh(tp=4, pp=2, ep=2)
    assert (mesh.world, mesh.etp) == (8, 2)
    assert [mesh.stage(rank) for rank in range(8)] == [0, 0, 0, 0, 1, 1, 1, 1]
    along = {axis: [mesh.coordinate(axis, rank).index for rank in range(8)] for axis in ("tp", "pp", "ep", "etp")}
    assert along == {
        "tp": [0, 1, 2, 3, 0, 1, 2, 3],
        "pp": [0, 0, 0, 0, 1, 1, 1, 1],
        "ep": [0, 0, 1, 1, 0, 0, 1, 1],
        "etp": [0, 1, 0, 1, 0, 1, 0, 1],
    }
    assert {axis: mesh.coordinate(axis, 0).count for axis in along} == {"tp": 4, "pp": 2, "ep": 2, "etp": 2}


def test_weights_of_expert_groups_are_the_sums_of_their_ranks() -> None:
    mesh = Mesh(tp=4, ep=2, weights=(3, 1, 2, 2))
    assert mesh.coordinate("tp", 1) == Coordinate(1, 4, (3, 1, 2, 2))
    assert mesh.coordinate("ep", 1) == Coordinate(0, 2, (4, 4))
    assert mesh.coordinate("etp", 3) == Coordinate(1, 2, (2, 2))
    assert mesh.coordinate("etp", 0) == Coordinate(0, 2, (3, 1))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"tp": 0}, "--tp 0 is not a number of ranks"),
        ({"pp": -1}, "--pp -1 is not a number of ranks"),
        ({"tp": 65537}, "--tp 65537 is not a number of ranks"),
        ({"tp": 1024, "pp": 1024}, "makes 1048576 ranks, at most 65536"),
        ({"tp": 4, "ep": 3}, "--ep 3 does not divide --tp 4"),
        ({"tp": 2, "ep": 4}, "--ep 4 does not divide --tp 2"),
        ({"tp": 3, "weights": (1, 2)}, "--split 1:2 names 2 ranks, --tp is 3"),
        ({"tp": 2, "weights": (1, 0)}, "give one positive weight per rank"),
        ({"pp": 2, "layers": (3,)}, "--pp-layers 3 names 1 stages, --pp is 2"),
        ({"pp": 2, "layers": (3, 0)}, "give one positive number of layers per stage"),
    ],
)
def test_an_impossible_mesh_is_refused_with_both_numbers(arguments: dict[str, object], words: str) -> None:
    with pytest.raises(ReshardError, match=re.escape(words)) as caught:
        Mesh(**arguments)  # type: ignore[arg-type]
    assert caught.value.hint or "at most" in words


@pytest.mark.parametrize(
    ("mesh", "text"),
    [
        (Mesh(), "TP 1"),
        (Mesh(tp=8), "TP 8"),
        (Mesh(pp=2), "TP 1 × PP 2"),
        (Mesh(tp=4, pp=2, ep=2), "TP 4 × PP 2 × EP 2"),
        (Mesh(tp=3, weights=(3, 3, 2)), "TP 3, split 3:3:2"),
    ],
)
def test_a_mesh_is_written_as_people_write_it(mesh: Mesh, text: str) -> None:
    assert str(mesh) == text


# Shares


@given(st.integers(0, 200), WEIGHTS, st.integers(1, 8))
@law(200)
def test_shares_are_consecutive_and_within_one_unit_of_proportion(
    size: int, weights: tuple[int, ...], unit: int
) -> None:
    found = shares(size, weights, unit)
    assert [low for low, _ in found] == [0, *(high for _, high in found[:-1])]
    assert found[-1][1] == size
    units = -(-size // unit)
    for (low, high), weight in zip(found, weights, strict=True):
        assert low % unit == 0 or low == size
        assert abs(-(-high // unit) - (-(-low // unit)) - Fraction(units * weight, sum(weights))) < 1


@pytest.mark.parametrize(
    ("size", "weights", "counts"),
    [
        (8, (3, 3, 2), [3, 3, 2]),
        (331, (2, 1, 1), [165, 83, 83]),  # 165.5, 82.75, 82.75: two are left, the larger remainders get them
        (5, (1, 1, 1), [2, 2, 1]),  # a tie goes to the earlier one
        (7, (1, 1, 1, 1), [2, 2, 2, 1]),
        (1, (1, 9), [0, 1]),
        (61, (1,) * 4, [16, 15, 15, 15]),
        (0, (2, 1), [0, 0]),
    ],
)
def test_what_is_left_goes_to_the_largest_remainders(size: int, weights: tuple[int, ...], counts: list[int]) -> None:
    assert [high - low for low, high in shares(size, weights)] == counts


def test_the_last_unit_may_be_short() -> None:
    assert shares(300, (1, 1), 128) == ((0, 256), (256, 300))


# Cuts


@given(st.integers(1, 48), st.integers(1, 12))
@law(200)
def test_an_exact_cut_is_equal_consecutive_and_whole_or_refused(size: int, n: int) -> None:
    if size % n:
        with pytest.raises(ReshardError, match=f"axis heads: {size} cannot be split over {n} ranks"):
            cuts(size, n)
    else:
        assert cuts(size, n) == [(k * size // n, (k + 1) * size // n) for k in range(n)]


@given(st.integers(1, 12), st.integers(1, 24))
@law(150)
def test_a_small_axis_is_shared_by_consecutive_coordinates(size: int, n: int) -> None:
    if size < n and n % size == 0:
        assert cuts(size, n, Rule(replicate=True)) == [(k * size // n, k * size // n + 1) for k in range(n)]
    elif size % n:
        with pytest.raises(ReshardError):
            cuts(size, n, Rule(replicate=True))


@given(st.integers(1, 100), st.integers(1, 8), st.sampled_from([1, 2, 4, 7, 8, 64]))
@law(200)
def test_a_padded_cut_is_equal_and_covers_the_axis(size: int, n: int, pad: int) -> None:
    stored = math.ceil(size / pad) * pad
    if stored % n:
        with pytest.raises(ReshardError, match=f"{stored} cannot be split over {n} ranks"):
            cuts(size, n, Rule(pad=pad))
        return
    found = cuts(size, n, Rule(pad=pad))
    assert {high - low for low, high in found} == {stored // n}
    assert found[0][0] == 0 and found[-1][1] == stored


@given(st.integers(1, 60), WEIGHTS, st.sampled_from([1, 2, 5]))
@law(200)
def test_a_weighted_cut_is_that_of_shares_and_leaves_no_rank_without(
    size: int, weights: tuple[int, ...], unit: int
) -> None:
    if len(weights) == 1:
        return
    wanted = shares(size, weights, unit)
    if any(low == high for low, high in wanted):
        with pytest.raises(ReshardError, match=r"leaves rank \d of --split with nothing"):
            cuts(size, len(weights), Rule(unit=unit), weights)
    else:
        assert cuts(size, len(weights), Rule(unit=unit), weights) == list(wanted)


def test_an_uneven_axis_gives_its_remainder_to_the_first_coordinates() -> None:
    assert [high - low for low, high in cuts(61, 4, Rule(uneven=True))] == [16, 15, 15, 15]
    with pytest.raises(ReshardError):
        cuts(3, 4, Rule(uneven=True))


# Compounds


@given(st.integers(1, 8), st.integers(1, 6), st.integers(1, 24))
@law(300)
def test_a_compound_is_cut_by_whole_groups_and_then_inside_them(kv: int, group: int, n: int) -> None:
    """Each coordinate has as many heads as any other, they follow one another, and no group is shared while there are
    enough.
    """
    possible = kv % n == 0 if n <= kv else n % kv == 0 and group % (n // kv) == 0
    try:
        found = [cut_compound(("kv", "group"), (kv, group), Coordinate(k, n), Rule()) for k in range(n)]
    except ReshardError:
        assert not possible
        return
    assert possible
    heads = [[a * group + b for a in range(*first) for b in range(*second)] for first, second in found]
    assert [head for mine in heads for head in mine] == list(range(kv * group))
    assert len({len(mine) for mine in heads}) == 1
    assert all(second == (0, group) for _, second in found) == (n <= kv or group == 1 or n == kv)


def test_a_compound_is_weighted_by_whole_groups() -> None:
    found = [cut_compound(("kv", "group"), (4, 2), Coordinate(k, 3, (2, 1, 1)), Rule()) for k in range(3)]
    assert found == [((0, 2), (0, 2)), ((2, 3), (0, 2)), ((3, 4), (0, 2))]


def test_a_compound_of_three_axes_is_cut_inside_the_second_before_the_third() -> None:
    found = [cut_compound(("a", "b", "c"), (2, 2, 3), Coordinate(k, 12), Rule()) for k in range(12)]
    assert found == [((a, a + 1), (b, b + 1), (c, c + 1)) for a in range(2) for b in range(2) for c in range(3)]


def test_ranks_that_are_no_multiple_of_the_groups_are_refused() -> None:
    with pytest.raises(ReshardError, match=r"axis kv: 6 ranks are not a multiple of 4"):
        cut_compound(("kv", "group"), (4, 2), Coordinate(0, 6), Rule())
