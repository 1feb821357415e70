"""Converting: a source that changes under the job is noticed, what is written does not depend on how. Re-runs:
test_same_job.py.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from running import (
    LLAMA,
    Stepped,
    big_llama,
    llama,
    llama_tensors,
    names,
    noise,
    refused,
    reshard,
    save_index,
    tree,
)

from reshard import api
from reshard import inspect as api_inspect
from reshard.errors import ReshardError
from reshard.jobs import convert, verify_sha256
from reshard.store import destination, publish


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Two files and an index, with a tokenizer."""
    place = llama(tmp_path / "model")
    (place / "model.safetensors").unlink()
    tensors = list(llama_tensors().items())
    save_index(place, {"a.safetensors": dict(tensors[:12]), "b.safetensors": dict(tensors[12:])})
    (place / "tokenizer.json").write_text('{"a": 1}')
    return place


# A source that changes under the job


def rewritten(path: Path) -> None:
    """Other bytes in the same file, its size and mtime kept."""
    status = path.stat()
    path.write_bytes(bytes(status.st_size))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def exchanged(path: Path) -> None:
    """Another file of the same size and mtime in its place."""
    other = path.with_name("other")
    other.write_bytes(bytes(path.stat().st_size))
    shutil.copystat(path, other)
    other.replace(path)


def appended(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"x")


MEANWHILE: list[tuple[str, str, Callable[[Path], object]]] = [
    ("weights rewritten", "b.safetensors", lambda path: path.write_bytes(bytes(path.stat().st_size))),
    ("weights replaced", "b.safetensors", lambda path: Path(shutil.copy(path, f"{path}.new")).replace(path)),
    ("weights rewritten, mtime kept", "b.safetensors", rewritten),
    ("weights replaced, mtime kept", "b.safetensors", exchanged),
    ("weights truncated", "b.safetensors", lambda path: os.truncate(path, 4000)),
    ("weights longer", "a.safetensors", appended),
    ("weights deleted", "b.safetensors", lambda path: path.unlink()),
    ("tokenizer rewritten", "tokenizer.json", lambda path: path.write_text('{"a": 5}')),
    ("tokenizer replaced, mtime kept", "tokenizer.json", exchanged),
]


@pytest.mark.parametrize(("name", "change"), [pytest.param(name, change, id=what) for what, name, change in MEANWHILE])
def test_a_source_that_changes_while_it_is_read(
    name: str, change: Callable[[Path], object], source: Path, tmp_path: Path
) -> None:
    """Exit 3, since a retry may help; the file is named; nothing is left."""
    with Stepped("convert", source, tmp_path / "out", "--tp", "2", "--workers", "1") as job:
        job.allow(3)
        job.until(4)
        change(source / name)
        refused(job.end(), 3, name)
    assert names(tmp_path) == ["model"]


def test_shards_that_change_while_they_are_read(source: Path, tmp_path: Path) -> None:
    shards = tmp_path / "shards"
    assert reshard("convert", source, shards, "--tp", "2").code == 0
    with Stepped("convert", shards, tmp_path / "out", "--to", "hf", "--workers", "1") as job:
        job.advance(lambda: any((tmp_path / ".out.reshard").glob("new/*.safetensors")))
        path = shards / "rank-00001" / "model.safetensors"
        path.write_bytes(bytes(path.stat().st_size))
        refused(job.end(), 3, "rank-00001/model.safetensors: was changed while it was being read")
    assert names(tmp_path) == ["model", "shards"]


@pytest.mark.parametrize("kind", ["published", "shards"])
@pytest.mark.parametrize("moment", ["opened", "hashed", "laid"])
def test_a_file_that_is_replaced_after_it_was_opened(
    moment: str, kind: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between two passes over the source, with size and mtime kept; also where the first file is back in the end,
    unchanged.
    """
    if kind == "shards":
        assert reshard("convert", source, tmp_path / "shards", "--tp", "2").code == 0
    path = source / "b.safetensors" if kind == "published" else tmp_path / "shards" / "rank-00001" / "model.safetensors"
    module, name = {"opened": (api, "open_any"), "hashed": (verify_sha256, "hashed"), "laid": (convert, "lay")}[moment]
    step, finish, kept = getattr(module, name), convert.seal, tmp_path / "kept"

    def replaced(*arguments: Any, **given: Any) -> Any:
        found = step(*arguments, **given)
        kept.hardlink_to(path)
        exchanged(path)
        return found

    def back(*arguments: Any) -> Any:
        kept.replace(path)
        return finish(*arguments)

    monkeypatch.setattr(module, name, replaced)
    monkeypatch.setattr(convert, "seal", back)
    given = source if kind == "published" else tmp_path / "shards"
    refused(
        reshard("convert", given, tmp_path / "out", "--tp", "4", "--sha256"),
        3,
        f"{path}: was changed while it was being read",
    )
    assert not (tmp_path / "out").exists()


def test_damaged_shards_are_not_converted(source: Path, tmp_path: Path) -> None:
    """What opening can see costs nothing and is always seen: sizes, headers, exchanged files, every small file."""
    shards = tmp_path / "shards"
    assert reshard("convert", source, shards, "--tp", "2").code == 0
    whole = tree(shards)
    for name, data in whole.items():
        (shards / name).unlink()
        done = reshard("convert", shards, tmp_path / "out", "--to", "hf")
        assert done.code in (1, 2), name
        assert name in done.err or name == "manifest.json", (name, done.err)
        (shards / name).write_bytes(data[:-9])
        done = reshard("convert", shards, tmp_path / "out", "--to", "hf")
        assert done.code in (1, 2), name
        assert name in done.err, (name, done.err)
        (shards / name).write_bytes(data)
    one, other = (shards / f"rank-0000{rank}" / "model.safetensors" for rank in (0, 1))
    one.write_bytes(whole["rank-00001/model.safetensors"])
    done = reshard("convert", shards, tmp_path / "out", "--to", "hf")
    assert done.code == 1 and "says rank 1, wanted is rank 0" in done.err
    assert names(tmp_path) == ["model", "shards"]
    assert other.exists()


# What is written


def test_workers_and_routes_do_not_change_a_byte(tmp_path: Path) -> None:
    source = big_llama(tmp_path / "model", 40)
    assert reshard("convert", source, tmp_path / "one", "--tp", "4", "--workers", "1").code == 0
    assert reshard("convert", source, tmp_path / "many", "--tp", "4", "--workers", "9").code == 0
    assert reshard("convert", source, tmp_path / "way", "--split", "3:4:1").code == 0
    assert reshard("convert", tmp_path / "way", tmp_path / "indirect", "--tp", "4").code == 0
    wanted = tree(tmp_path / "one")
    assert tree(tmp_path / "many") == wanted
    assert tree(tmp_path / "indirect") == wanted
    assert reshard("convert", tmp_path / "indirect", tmp_path / "back", "--to", "hf").code == 0
    assert tree(tmp_path / "back") == tree(source)


def test_fsync_forces_every_file_before_the_rename_and_the_directory_after(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[str] = []
    fsync, rename = os.fsync, Path.rename
    monkeypatch.setattr(
        os,
        "fsync",
        lambda descriptor: (synced.append(str(Path(f"/proc/self/fd/{descriptor}").readlink())), fsync(descriptor))[1],
    )
    monkeypatch.setattr(Path, "rename", lambda self, target: (synced.append("rename"), rename(self, target))[1])
    assert reshard("convert", source, tmp_path / "out", "--tp", "2").code == 0
    at = synced.index("rename")
    work = str(tmp_path / ".out.reshard" / "new")
    assert {f"{work}/{name}" for name in tree(tmp_path / "out")} <= set(synced[:at])
    assert {work, f"{work}/rank-00000", f"{work}/source"} <= set(synced[:at])
    assert str(tmp_path) in synced[at:]
    synced.clear()
    assert reshard("convert", source, tmp_path / "other", "--tp", "2", "--no-fsync").code == 0
    assert synced == ["rename"]


def test_nothing_is_written_when_anything_can_be_refused_before(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even a work directory: sizes, quantization, place and space are looked at first."""

    def enter(_: publish.Publication) -> None:
        raise AssertionError("work was begun")

    monkeypatch.setattr(publish.Publication, "__enter__", enter)
    refused(reshard("convert", source, tmp_path / "out", "--tp", "3"), 2)
    refused(reshard("convert", source, tmp_path / "out", "--tp", "8", "--no-repeat"), 2)
    monkeypatch.setattr(
        destination, "check_space", lambda out, needed: (_ for _ in ()).throw(publish.PlaceError("no space"))
    )
    refused(reshard("convert", source, tmp_path / "out", "--tp", "2"), 3, "no space")
    (source / "config.json").write_text(json.dumps(LLAMA | {"quantization_config": {"quant_method": "gptq"}}))
    refused(reshard("convert", source, tmp_path / "out", "--tp", "2"), 2, "gptq")
    assert names(tmp_path) == ["model"]


def test_equal_bytes_in_another_order_are_no_other_checkpoint(tmp_path: Path) -> None:
    """The plan does not depend on how tensors lie in the source: rank files are equal, only the residue is not."""
    tensors = llama_tensors()
    source, other = (
        llama(tmp_path / "a", tensors),
        llama(tmp_path / "b", dict(sorted(tensors.items(), key=lambda item: item[1][2]))),
    )
    for place in (source, other):
        assert reshard("convert", place, tmp_path / f"out-{place.name}", "--tp", "2").code == 0
    for rank in ("rank-00000", "rank-00001"):
        assert tree(tmp_path / "out-a" / rank) == tree(tmp_path / "out-b" / rank)
    assert noise("F32", 3) == noise("F32", 3)


# As a library


def test_numbers_that_are_none_are_refused_by_the_library_too(source: Path, tmp_path: Path) -> None:
    for words, given in (
        ("--workers -1", {"workers": -1}),
        ("--workers 257", {"workers": 257}),
        ("split = '1:1'", {"split": "1:1"}),
        ("pp_layers = '1,2'", {"pp_layers": "1,2"}),
        ("--max-file-size 0", {"to": "hf", "max_file_size": 0}),
    ):
        with pytest.raises(ReshardError, match=words):
            api.convert(source, tmp_path / "no", **given)  # type: ignore[arg-type]
        assert not (tmp_path / "no").exists()
    with pytest.raises(ReshardError, match="--workers -1"):
        api.verify(source, against=source, workers=-1)


def test_lists_are_as_good_as_tuples_and_say_how_many_ranks_there_are(source: Path, tmp_path: Path) -> None:
    api.convert(source, tmp_path / "out", split=[1, 1])
    assert reshard("inspect", tmp_path / "out", "--json").json == api_inspect(tmp_path / "out").to_json()
    assert api.plan(source, pp_layers=[1, 2]).to_json()["mesh"]["pp"] == 2
