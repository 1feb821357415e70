"""Every further family goes through one gauntlet: it converts, comes back byte for byte, and runs as `transformers`
runs it.

What runs always is a mesh or two of each; all of them with RESHARD_ALL_MESHES=1. A family whose table says that it does
not run converts all the same.
"""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from fixtures import FIXTURES, Fixture, checkpoint, zoo
from gauntlet import convert_and_back, reference_of, run_like, run_meshes
from strategies import unused_rows

from reshard.checkpoints.source import open_source
from reshard.tables import families

# Rows that no checkpoint of ours has, and why.
UNSEEN: dict[str, set[str]] = {}
ALL = bool(os.environ.get("RESHARD_ALL_MESHES"))


def meshes(fixture: Fixture) -> list[dict[str, Any]]:
    """All, or the one that asks for most: stages, repeated key-value heads, experts on several ranks."""
    if ALL:
        return list(fixture.meshes())
    if 2 in fixture.ep and 4 in fixture.tp:
        return [{"tp": 4, "ep": 2, "pp": 2}]
    return [{"tp": max(fixture.tp), "pp": 2}]


@pytest.mark.parametrize("name", zoo())
def test_it_converts_verifies_and_comes_back_byte_for_byte(name: str, tmp_path: Path) -> None:
    convert_and_back(checkpoint(name), meshes(zoo()[name]), tmp_path)


@pytest.mark.parametrize(
    "family", sorted({fixture.family for fixture in zoo().values()} - {fixture.family for fixture in FIXTURES.values()})
)
def test_every_row_of_a_family_is_in_use_in_some_fixture(family: str) -> None:
    """Else nothing is known about it. Rows taken over by `like` are tested where they were written."""
    table = families.load(family)
    models = [open_source(checkpoint(name)).layout.model for name, fixture in zoo().items() if fixture.family == family]
    like = {row.name.text for parent in table.texts if parent != family for row in families.load(parent).rows}
    assert unused_rows(table, models) - like - UNSEEN.get(family, set()) == set()


def runs() -> list[str]:
    """Fixtures of the families whose tables say how to run them."""
    return [name for name, fixture in zoo().items() if fixture.runs and families.load(fixture.family).runs]


@pytest.mark.parametrize("name", runs())
def test_logits_and_tokens_are_those_of_transformers(name: str) -> None:
    torch.set_num_threads(1)
    wanted = reference_of(zoo()[name])
    for mesh in run_meshes(zoo()[name], ALL):
        run_like(checkpoint(name), mesh, wanted)


def test_what_the_readme_says_of_families_was_seen_and_held() -> None:
    """docs/gauntlet.json is what scripts/gauntlet saw: of tables as they are now, nothing failed."""
    seen = json.loads((Path(__file__).parent.parent / "docs" / "gauntlet.json").read_text())
    current = {name: result for name, result in seen.items() if result["table"] == families.digest(name)}
    assert {name: result["failed"] for name, result in current.items() if result["failed"]} == {}
    assert all(bool(result["runs"]) <= families.load(name).runs for name, result in current.items())
