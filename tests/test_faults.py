"""Planted faults are found by the checks that must find them; scripts/plant_faults asks the same of every family."""

from __future__ import annotations

from pathlib import Path

import pytest
from faults import DOUBTS
from planted import ADD, doubted, planted

SAMPLE = {
    "llama": ["a KV head repeated wrongly", "config.json edited", "one bit flipped"],
    "mixtral": ["one expert swapped with another", "gate and up exchanged"],
}


DOUBTED = ["names exchanged in the table; transformers missing", "names exchanged in the table; wrappers in names"]


@pytest.mark.parametrize("words", DOUBTED)
def test_a_reference_that_is_none_proves_nothing(words: str, tmp_path: Path) -> None:
    assert doubted(words, tmp_path) == (DOUBTS[words].status, False)


def test_the_table_of_faults_has_all_of_them() -> None:
    """docs/faults.md is what scripts/plant_faults printed."""
    said = (Path(__file__).parent.parent / "docs" / "faults.md").read_text()
    assert [words for words in DOUBTS if f"| {words} | {DOUBTS[words].status} |" not in said] == []


@pytest.mark.parametrize("name", SAMPLE)
def test_every_check_finds_what_it_must(name: str, tmp_path: Path) -> None:
    results = list(planted(name, tmp_path, SAMPLE[name]))
    assert {fault for fault, _, _, _ in results} == set(SAMPLE[name])
    missed = [
        (fault, signed, check) for fault, signed, check, caught in results if check in ADD[fault, signed] and not caught
    ]
    assert missed == []
    consistent = {
        signed: caught for fault, signed, check, caught in results if (fault, check) == ("one bit flipped", "integrity")
    }
    assert consistent in ({}, {False: True, True: False}), (
        "digests made right hide a fault from check 1: what the other checks are for"
    )
