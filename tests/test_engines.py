"""What engines were seen to load: the tables that were proven by them are those that are shipped, and whatever they
hold comes back byte for byte. No engine is started here; scripts/prove does that.
"""

import hashlib
import itertools
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
from fixtures import FIXTURES, Fixture, checkpoint, zoo
from strategies import differing

from reshard.checkpoints.source import open_source
from reshard.errors import ReshardError
from reshard.jobs.convert import Options, convert, prepare
from reshard.jobs.job import Job
from reshard.layout.mesh import Mesh
from reshard.store.destination import LocalDestination
from reshard.tables import families, formats

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts"))
from engines import jobs  # noqa: E402

KNOWN: dict[str, Any] = json.loads((ROOT / "docs" / "engines.json").read_text())
TABLES = sorted((ROOT / "reshard" / "formats").glob("*/*.toml"))
OPTIONS = Options(workers=2)


@pytest.mark.parametrize("path", TABLES, ids=lambda path: f"{path.parent.name} {path.stem}")
def test_a_table_is_as_it_was_proven(path: Path) -> None:
    """After a change to it, scripts/prove has to see it hold again."""
    record = KNOWN[f"{path.parent.name} {path.stem}"]
    assert hashlib.sha256(path.read_bytes()).hexdigest()[:32] == record["table"]
    table = formats.parse(path.read_text(), path.name)
    assert set(table.families) == record["families"].keys()
    assert set(families.shipped()) == record["families"].keys() | record["refused"].keys()


def test_a_family_that_changed_since_is_named() -> None:
    """Its own table decides what a row holds: the proof is of both."""
    changed = {
        name
        for record in KNOWN.values()
        for name, seen in record["families"].items()
        if seen["table"] != families.digest(name)
    }
    assert changed == set(), "scripts/prove vllm"


def test_every_proof_is_of_several_ranks() -> None:
    for record in KNOWN.values():
        for name, seen in record["families"].items():
            assert seen["loads"]["held"] > 0 and "tp1" in seen["meshes"], name
            assert not {"differs", "unloadable"} & seen["loads"].keys(), name


def representative(family: str) -> list[Fixture]:
    return [one for one in (*FIXTURES.values(), *zoo().values()) if one.family == family]


def widest(family: str, scratch: Path) -> tuple[Path, Job]:
    """The first checkpoint of a family that the format has names for, on the largest of a few meshes that fit it; of
    those that all predict ahead, one without these layers, which vLLM leaves to another model.
    """
    plain = [checkpoint(fixture.name) for fixture in representative(family)]
    for directory in itertools.chain(plain, (case.directory for case in jobs.cases([family], scratch))):
        source = open_source(directory)
        layers = source.layout.model.main_layers
        stages = (layers - layers // 2, layers // 2)
        for mesh in (Mesh(4, 2, layers=stages), Mesh(2, 2, layers=stages), Mesh(4), Mesh(2), Mesh()):
            try:
                return directory, prepare(source, "vllm", mesh, OPTIONS)
            except ReshardError:
                continue
    raise AssertionError(f"no checkpoint of {family} converts")


@pytest.mark.parametrize("family", formats.load("vllm").families[:: 1 if os.environ.get("RESHARD_ALL_MESHES") else 3])
def test_what_vllm_holds_comes_back_byte_for_byte(family: str, tmp_path: Path) -> None:
    original, job = widest(family, tmp_path / "cases")
    convert(job, LocalDestination(tmp_path / "out"), OPTIONS)
    convert(prepare(open_source(tmp_path / "out"), "hf", Mesh(), OPTIONS), LocalDestination(tmp_path / "back"), OPTIONS)
    assert differing(original, tmp_path / "back") == []
