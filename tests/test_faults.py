"""Planted faults are found by the rungs that must find them; scripts/plant_faults asks the same of every family."""

from __future__ import annotations

from pathlib import Path

import pytest
from planted import ADD, planted

SAMPLE = {
    "llama": ["a KV head repeated wrongly", "config.json edited", "one bit flipped"],
    "mixtral": ["one expert swapped with another", "gate and up exchanged"],
}


@pytest.mark.parametrize("name", SAMPLE)
def test_every_rung_finds_what_it_must(name: str, tmp_path: Path) -> None:
    results = list(planted(name, tmp_path, SAMPLE[name]))
    assert {fault for fault, _, _, _ in results} == set(SAMPLE[name])
    missed = [(fault, signed, rung) for fault, signed, rung, caught in results if rung in ADD[fault, signed] and not caught]
    assert missed == []
    consistent = {signed: caught for fault, signed, rung, caught in results if (fault, rung) == ("one bit flipped", "integrity")}
    assert consistent in ({}, {False: True, True: False}), "digests made right hide a fault from rung 1: what the other rungs are for"
