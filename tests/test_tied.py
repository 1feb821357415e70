"""Tied embeddings where an engine ties by config.json; names with braces."""

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

import reshard
from reshard.checkpoints.source import open_source
from reshard.errors import ReshardError
from reshard.model.understand import Config, understand
from reshard.tables import families


def names(directory: Path) -> set[str]:
    """Stored names of a shard directory."""
    return {name for _, name in open_source(directory).places}


def same(one: Path, other: Path) -> bool:
    return subprocess.run(["diff", "-r", one, other], capture_output=True, check=False).returncode == 0


@pytest.fixture
def engine(checkpoint: Callable[[str], Path], tmp_path: Path) -> tuple[Path, Path]:
    """A checkpoint that stores embedding and head though config.json says that they are tied, and its vLLM shards."""
    source, out = checkpoint("qwen3_tied_stored"), tmp_path / "vllm"
    reshard.convert(source, out, tp=2, to="vllm")
    return source, out


def test_an_engine_that_ties_gets_one_name_of_two_equal_tensors(engine: tuple[Path, Path]) -> None:
    source, out = engine
    assert {"model.embed_tokens.weight", "lm_head.weight"} & names(out) == {"lm_head.weight"}
    assert json.loads((out / "manifest.json").read_text())["tied"] == {"head": "embed"}
    assert reshard.verify(out, against=source, numerics=False).ok


def test_both_are_restored_from_the_one(engine: tuple[Path, Path], tmp_path: Path) -> None:
    source, out = engine
    reshard.convert(out, tmp_path / "back", to="hf")
    assert same(source, tmp_path / "back")


def test_the_way_over_the_engine_s_shards_changes_nothing(engine: tuple[Path, Path], tmp_path: Path) -> None:
    """native keeps both; of the engine's meshes only one stage ties."""
    source, out = engine
    for number, (mesh, to) in enumerate((({"tp": 2}, "native"), ({"tp": 4}, "vllm"), ({"tp": 1, "pp": 3}, "vllm"))):
        reshard.convert(source, tmp_path / f"direct{number}", to=to, **mesh)
        reshard.convert(out, tmp_path / f"over{number}", to=to, **mesh)
        assert same(tmp_path / f"direct{number}", tmp_path / f"over{number}")
    assert {"embed", "head"} <= names(tmp_path / "direct0")
    assert {"model.embed_tokens.weight", "lm_head.weight"} <= names(tmp_path / "direct2")


def altered(source: Path, copy: Path, name: str) -> Path:
    """A copy in which one bit of the last element of a tensor is another one."""
    shutil.copytree(source, copy)
    path, entry = open_source(copy).locate((0, name))
    with path.open("r+b") as file:
        file.seek(entry.offset + entry.nbytes - 1)
        last = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([last ^ 1]))
    return copy


@pytest.mark.parametrize("name", ["lm_head.weight", "model.embed_tokens.weight"])
def test_tensors_that_differ_are_refused_before_anything_is_written(
    engine: tuple[Path, Path], tmp_path: Path, name: str
) -> None:
    bad = altered(engine[0], tmp_path / "bad", name)
    with pytest.raises(
        ReshardError, match=r"tie_word_embeddings, but embed and head are not equal.*first at byte"
    ) as refused:
        reshard.convert(bad, tmp_path / "out", tp=2, to="vllm")
    assert "false" in (refused.value.hint or "")
    assert not (tmp_path / "out").exists()
    reshard.convert(bad, tmp_path / "native", tp=2)  # keeps both


@pytest.mark.parametrize("name", ["lm_head.weight", "model.embed_tokens.weight"])
def test_verify_notices_another_copy_of_either(engine: tuple[Path, Path], tmp_path: Path, name: str) -> None:
    """Also the one of which the shards have no copy of its own."""
    source, out = engine
    verdict = reshard.verify(out, against=altered(source, tmp_path / "bad", name))
    assert not verdict.ok
    assert any(name in failure or "lm_head" in failure for failure in verdict.failures)


def test_what_is_stored_once_in_the_original_is_in_the_manifest_too(
    checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    for to, kept in (("native", "embed"), ("vllm", "lm_head.weight")):
        reshard.convert(checkpoint("qwen3_tied"), tmp_path / to, tp=2, to=to)
        assert json.loads((tmp_path / to / "manifest.json").read_text())["tied"] == {"head": "embed"}
        assert kept in names(tmp_path / to)


def test_a_name_with_braces_is_no_row(checkpoint: Callable[[str], Path]) -> None:
    """A stored name that reads like a folded one is unclaimed, not an IndexError."""
    source = open_source(checkpoint("llama"))
    stored = {name: entry for name, (_, entry) in source.tensors.items()}
    stored["model.layers.{}.mlp.down_proj.weight"] = stored["model.layers.0.mlp.down_proj.weight"]
    with pytest.raises(ReshardError, match="no row claims"):
        understand(families.load("llama"), Config(source.config.data), stored)
