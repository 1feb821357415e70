"""Every row of every family against a second opinion: what each rank stores equals tests/torch_reference.py, and every
way back is exact.

The meshes below run always; all of them, some 300, with RESHARD_ALL_MESHES=1 (two minutes).
"""

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fixtures import FIXTURES, Fixture, checkpoint
from safetensors.torch import load_file
from strategies import differing, table_of
from torch_reference import differences, expected

from reshard.checkpoints.source import open_source
from reshard.jobs import verify
from reshard.jobs.convert import Options, convert, prepare
from reshard.layout.mesh import Mesh
from reshard.store.destination import LocalDestination
from reshard.tables.families import Family

OPTIONS = Options(workers=2)


def few(fixture: Fixture) -> list[dict[str, Any]]:
    """An even mesh, one where key-value heads repeat, an uneven one, pipeline stages, expert parallelism,
    and all of these at once.
    """
    found: list[dict[str, Any]] = [{"tp": 2}, {"tp": max(fixture.tp)}, {"tp": 2, "pp": 2}]
    if fixture.weights:
        found.append({"tp": 3, "weights": (2, 1, 1)})
    if fixture.ep != (1,):
        found += [{"tp": 2, "ep": 2}, {"tp": 4, "ep": 2, "pp": 2}]
    return found


def cases() -> list[Any]:
    full = os.environ.get("RESHARD_ALL_MESHES")
    return [
        pytest.param(name, list(fixture.meshes()) if full else few(fixture), id=name)
        for name, fixture in FIXTURES.items()
    ]


@pytest.mark.parametrize(("name", "meshes"), cases())
def test_each_rank_stores_what_the_reference_says_and_every_way_back_is_exact(
    name: str, meshes: list[dict[str, Any]], tmp_path: Path
) -> None:
    """Stored tensors bit for bit; `verify --against`; the merge; and the reshape from the mesh before,
    equal to the direct conversion.
    """
    original, family = checkpoint(name), FIXTURES[name].family
    before: Path | None = None
    for number, arguments in enumerate(meshes):
        mesh, out = Mesh(**arguments), tmp_path / str(number)
        convert(prepare(open_source(original), "native", mesh, OPTIONS), LocalDestination(out), OPTIONS)
        stored = [load_file(out / f"rank-{rank:05}" / "model.safetensors") for rank in range(mesh.world)]
        assert differences(expected(original, family, **arguments), stored) == [], arguments
        report = verify.verify(out, open_source(original))
        assert report.ok and [check.name for check in report.checks if check.skipped is None] == [
            "integrity",
            "weights",
        ], (
            arguments,
            report,
        )
        merged = tmp_path / f"{number}-merged"
        convert(prepare(open_source(out), "hf", Mesh(), OPTIONS), LocalDestination(merged), OPTIONS)
        assert differing(original, merged) == [], arguments
        if before is not None:
            reshaped = tmp_path / f"{number}-reshaped"
            convert(prepare(open_source(before), "native", mesh, OPTIONS), LocalDestination(reshaped), OPTIONS)
            assert differing(out, reshaped) == [], arguments
        before = out


def test_the_few_meshes_are_among_all_and_hold_each_kind() -> None:
    every = [mesh for name, fixture in FIXTURES.items() for mesh in few(fixture) if mesh in list(fixture.meshes())]
    assert len(every) == sum(len(few(fixture)) for fixture in FIXTURES.values())
    repeated = {name for name, fixture in FIXTURES.items() for mesh in few(fixture) if fixture.kv < mesh["tp"]}
    uneven = {name for name, fixture in FIXTURES.items() for mesh in few(fixture) if fixture.layers % mesh.get("pp", 1)}
    assert {FIXTURES[name].family for name in repeated} >= {
        "llama",
        "mistral",
        "falcon",
        "gemma2",
        "olmo2",
        "phi3",
        "gpt_oss",
        "mixtral",
    }
    assert len(uneven) > 10


@pytest.mark.parametrize("name", ["llama", "gpt_oss", "deepseek_v3", "falcon_rw", "gpt_neox", "phi3"])
def test_two_logical_names_exchanged_in_a_table_are_seen_by_the_reference(name: str, tmp_path: Path) -> None:
    """What no shape and no round trip can see: k and v, gate and up, the two norms. Else the test above would prove
    nothing.
    """
    table = table_of(name)
    swaps = [("attn.k", "attn.v"), ("mlp.gate", "mlp.up"), ("moe.gate", "moe.up"), ("attn_norm", "mlp_norm")]
    leaves = {leaf for row in table.rows for leaf in row.leaves}
    for number, (one, two) in enumerate((a, b) for a, b in swaps if {a, b} <= leaves):
        out = tmp_path / str(number)
        source = open_source(checkpoint(name), exchanged(table, one, two))
        convert(prepare(source, "native", Mesh(tp=2), OPTIONS), LocalDestination(out), OPTIONS)
        stored = [load_file(out / f"rank-{rank:05}" / "model.safetensors") for rank in range(2)]
        assert differences(expected(checkpoint(name), FIXTURES[name].family, tp=2), stored), (one, two)


def exchanged(table: Family, one: str, two: str) -> Family:
    swap = {one: two, two: one}
    rows = tuple(row._replace(leaves=tuple(swap.get(leaf, leaf) for leaf in row.leaves)) for row in table.rows)
    return replace(table, rows=rows)
