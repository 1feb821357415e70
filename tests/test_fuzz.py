"""A short run of every fuzz target, always of the same seeds, and what longer runs have found; fuzz.py runs them for
longer.
"""

from __future__ import annotations

import random

import fuzz
import pytest

from reshard.errors import ReshardError

ROUNDS = {"configs": 60, "manifests": 80, "tensors": 120, "originals": 80, "family_tables": 60, "shipped_tables": 40}
CORPUS: list[tuple[str, int]] = []  # target, seed: what once ended otherwise


@pytest.mark.parametrize("name", fuzz.TARGETS)
def test_no_mutation_ends_otherwise_than_by_opening_or_a_refusal(name: str) -> None:
    fuzz.TARGETS[name](ROUNDS.get(name, 150), 0)


@pytest.mark.parametrize(("name", "seed"), CORPUS)
def test_what_once_ended_otherwise(name: str, seed: int) -> None:
    fuzz.TARGETS[name](1, seed)


def test_a_target_tells_what_it_finds() -> None:
    def strange(dice: random.Random) -> object:
        def read() -> None:
            raise KeyError(dice.random()) if dice.random() < 0.5 else ReshardError("fine")

        return read

    rounds = fuzz.target(strange)  # type: ignore[arg-type]
    del fuzz.TARGETS["strange"]
    with pytest.raises(fuzz.Found, match=r"strange, seed \d+: KeyError"):
        rounds(20, 0)
