"""Converting again: the same job is recognised, anything else is refused by name; a source that changes under the job is noticed."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

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
    save,
    save_index,
    stamps,
    tree,
)

from reshard import api, files, publish
from reshard import inspect as api_inspect
from reshard.errors import ReshardError

Target = tuple[str, ...]
TARGETS: list[Target] = [("--tp", "2"), ("--tp", "2", "--to", "vllm"), ("--to", "hf"), ("--to", "hf", "--max-file-size", "60KB")]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Two files and an index, with a tokenizer."""
    place = llama(tmp_path / "model")
    (place / "model.safetensors").unlink()
    rewrite(place)
    (place / "tokenizer.json").write_text('{"a": 1}')
    return place


def rewrite(source: Path, seed: int = 0, keep_times: bool = False) -> None:
    """Weights of the same shapes and sizes, of other values if the seed is another."""
    before = {path: path.stat() for path in source.iterdir()}
    tensors = list(llama_tensors(seed=seed).items())
    save_index(source, {"a.safetensors": dict(tensors[:12]), "b.safetensors": dict(tensors[12:])})
    for path, status in before.items():
        if keep_times:
            os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
        assert path.stat().st_size == status.st_size


def seeded(source: Path, seed: int, keep_times: bool) -> None:
    """Replace b.safetensors alone."""
    path = source / "b.safetensors"
    status = path.stat()
    save(path, dict(list(llama_tensors(seed=seed).items())[12:]))
    assert path.stat().st_size == status.st_size
    if keep_times:
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


@pytest.mark.parametrize("target", TARGETS, ids=" ".join)
def test_the_same_job_again_reads_no_tensor_and_touches_nothing(
    target: Target, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    assert reshard("convert", source, out, *target).code == 0
    root = tmp_path
    before = stamps(root)

    def reads(self: files.Pool, path: Path, *_: object) -> None:
        raise AssertionError(f"{path} was read")

    monkeypatch.setattr(files.Pool, "read_into", reads)
    monkeypatch.setattr(files.Pool, "scatter", reads)
    for more in ((), ("--overwrite",), ("--workers", "3"), ("--fsync",)):
        done = reshard("convert", source, out, *target, *more, "--json")
        assert done.code == 0, done.err
        assert done.json["already"] is True and done.json["bytes_read"] == done.json["bytes_written"] == 0
        assert stamps(root) == before
    assert "is already what this job would write" in reshard("convert", source, out, *target).out


@pytest.mark.parametrize("target", TARGETS, ids=" ".join)
def test_other_values_of_the_same_shapes_and_sizes_are_refused_by_name(target: Target, source: Path, tmp_path: Path) -> None:
    """Tonight's fine-tune with yesterday's shapes is never answered "already done"."""
    out = tmp_path / "out"
    assert reshard("convert", source, out, *target).code == 0
    seeded(source, 1, keep_times=False)
    before = stamps(out)
    resplit = "--max-file-size" in target  # there the files of the source are not those of OUT
    refused(
        reshard("convert", source, out, *target), 2, str(out), "is not empty", "model-0000" if resplit else "b.safetensors", "--overwrite"
    )
    assert stamps(out) == before
    assert reshard("convert", source, out, *target, "--overwrite").code == 0
    assert reshard("verify", out, "--against", source).code == 0


@pytest.mark.parametrize("target", TARGETS, ids=" ".join)
def test_checksum_finds_other_values_although_the_times_are_kept(target: Target, source: Path, tmp_path: Path) -> None:
    """Without --checksum sizes and times decide, as in make and rsync."""
    out = tmp_path / "out"
    assert reshard("convert", source, out, *target).code == 0
    assert reshard("convert", source, out, *target, "--checksum", "--json").json["already"] is True
    seeded(source, 1, keep_times=True)
    assert reshard("convert", source, out, *target, "--json").json["already"] is True
    before = stamps(out)
    refused(reshard("convert", source, out, *target, "--checksum"), 2, str(out), "other contents", "differs from the source")
    assert stamps(out) == before
    assert reshard("convert", source, out, *target, "--checksum", "--overwrite").code == 0
    assert reshard("verify", out, "--against", source).code == 0


@pytest.mark.parametrize("target", TARGETS, ids=" ".join)
def test_checksum_forgives_other_times(target: Target, source: Path, tmp_path: Path) -> None:
    """The same bytes downloaded again: refused by their times, the same job with --checksum."""
    out = tmp_path / "out"
    assert reshard("convert", source, out, *target).code == 0
    rewrite(source)
    refused(reshard("convert", source, out, *target), 2, "is not empty")
    done = reshard("convert", source, out, *target, "--checksum", "--json")
    assert done.code == 0 and done.json["already"] is True


def spoil_header(source: Path) -> None:
    """White space in the header, in the same number of bytes."""
    path = source / "b.safetensors"
    status, data = path.stat(), path.read_bytes()
    n = int.from_bytes(data[:8], "little")
    text = data[8 : 8 + n].decode()
    path.write_bytes(data[:8] + text.replace(": ", ":", 1).ljust(n).encode() + data[8 + n :])
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def spoil_tokenizer(source: Path) -> None:
    status = (source / "tokenizer.json").stat()
    (source / "tokenizer.json").write_text('{"a": 2}')
    os.utime(source / "tokenizer.json", ns=(status.st_atime_ns, status.st_mtime_ns))


@pytest.mark.parametrize(("spoil", "name"), [(spoil_header, "b.safetensors"), (spoil_tokenizer, "tokenizer.json")])
@pytest.mark.parametrize("target", TARGETS[:3], ids=" ".join)
def test_checksum_also_compares_what_is_no_tensor(
    target: Target, spoil: Callable[[Path], None], name: str, source: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    assert reshard("convert", source, out, *target).code == 0
    spoil(source)
    assert reshard("convert", source, out, *target, "--json").json["already"] is True
    refused(reshard("convert", source, out, *target, "--checksum"), 2, name)


@pytest.mark.parametrize("target", TARGETS[1:], ids=" ".join)
@pytest.mark.parametrize("checksum", [False, True])
def test_shards_replaced_by_other_values_between_two_runs(checksum: bool, target: Target, source: Path, tmp_path: Path) -> None:
    """The source is a shard directory: as with files. With --checksum also where all times were kept."""
    shards, other = tmp_path / "shards", tmp_path / "other"
    assert reshard("convert", source, shards, "--tp", "4").code == 0
    assert reshard("convert", shards, tmp_path / "out", *target).code == 0
    assert reshard("convert", shards, tmp_path / "out", *target, "--json").json["already"] is True
    rewrite(source, seed=1, keep_times=checksum)
    assert reshard("convert", source, other, "--tp", "4").code == 0
    shutil.rmtree(shards)
    other.rename(shards)
    if checksum:
        assert reshard("convert", shards, tmp_path / "out", *target, "--json").json["already"] is True
    refused(reshard("convert", shards, tmp_path / "out", *target, *(["--checksum"] if checksum else [])), 2, "is not empty")


def touch(path: Path) -> None:
    os.utime(path, (1, 1))


CHANGES: list[tuple[str, Callable[[Path], object], str]] = [
    ("time of a weights file", lambda source: touch(source / "a.safetensors"), "a.safetensors"),
    ("time of the index", lambda source: touch(source / "model.safetensors.index.json"), "model.safetensors.index.json"),
    ("time of config.json", lambda source: touch(source / "config.json"), "config.json"),
    ("a file more beside", lambda source: (source / "merges.txt").write_text("a b"), "merges.txt"),
    ("a file fewer beside", lambda source: (source / "tokenizer.json").unlink(), "tokenizer.json"),
    ("a longer file beside", lambda source: (source / "tokenizer.json").write_text('{"a": 100}'), "tokenizer.json"),
]


@pytest.mark.parametrize(("change", "name"), [pytest.param(change, name, id=what) for what, change, name in CHANGES])
@pytest.mark.parametrize("target", TARGETS[:3], ids=" ".join)
def test_any_change_of_the_source_is_refused_by_name(
    target: Target, change: Callable[[Path], object], name: str, source: Path, tmp_path: Path
) -> None:
    assert reshard("convert", source, tmp_path / "out", *target).code == 0
    change(source)
    refused(reshard("convert", source, tmp_path / "out", *target), 2, "is not empty", name)


@pytest.mark.parametrize(
    ("target", "parts"),
    [
        (("--tp", "4"), ("llama, native, TP 2",)),
        (("--tp", "2", "--pp", "3"), ("llama, native, TP 2",)),
        (("--split", "3:1"), ("llama, native, TP 2",)),
        (("--tp", "2", "--to", "vllm"), ("llama, native, TP 2",)),
        (("--to", "hf"), ("lacks", "a.safetensors")),
    ],
)
def test_another_job_is_refused_with_what_is_there(target: Target, parts: tuple[str, ...], source: Path, tmp_path: Path) -> None:
    assert reshard("convert", source, tmp_path / "out", "--tp", "2").code == 0
    before = stamps(tmp_path)
    refused(reshard("convert", source, tmp_path / "out", *target), 2, str(tmp_path / "out"), *parts, "--overwrite")
    assert stamps(tmp_path) == before


def test_another_revision_of_one_model_is_another_job(tmp_path: Path) -> None:
    """Same names, sizes and times in the Hub's cache, another commit; and the same commit with another SHA-256."""
    source = llama(tmp_path / "source")
    one, other = (tmp_path / "models--org--name" / "snapshots" / (digit * 40) for digit in "ab")
    shutil.copytree(source, one)
    shutil.copytree(source, other)
    assert reshard("convert", one, tmp_path / "out", "--tp", "2").code == 0
    refused(reshard("convert", other, tmp_path / "out", "--tp", "2"), 2, "commit " + "a" * 40)
    status = (one / "model.safetensors").stat()
    for digit in "cd":
        blob = tmp_path / "models--org--name" / "blobs" / (digit * 64)
        blob.parent.mkdir(exist_ok=True)
        shutil.copy2(source / "model.safetensors", blob)
        os.utime(blob, ns=(status.st_atime_ns, status.st_mtime_ns))
        (one / "model.safetensors").unlink()
        (one / "model.safetensors").symlink_to(f"../../blobs/{blob.name}")
        done = reshard("convert", one, tmp_path / "linked", "--tp", "2")
        assert done.code == (0 if digit == "c" else 2)
    refused(done, 2, "model.safetensors has SHA-256 dddd", "made from cccc")


def test_sha256_asked_for_later_is_another_job(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert reshard("convert", source, out, "--tp", "2").code == 0
    refused(reshard("convert", source, out, "--tp", "2", "--sha256"), 2, "--sha256", "a.safetensors")
    assert reshard("convert", source, out, "--tp", "2", "--sha256", "--overwrite").code == 0
    for more in ((), ("--sha256",)):
        assert reshard("convert", source, out, "--tp", "2", *more, "--json").json["already"] is True


@pytest.mark.parametrize("damage", ["missing", "truncated", "manifest", "more"])
def test_a_damaged_output_is_not_taken_for_done(damage: str, source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert reshard("convert", source, out, "--tp", "2").code == 0
    whole = tree(out)
    path = out / "rank-00001" / "model.safetensors"
    if damage == "missing":
        path.unlink()
    elif damage == "truncated":
        os.truncate(path, 5000)
    elif damage == "manifest":
        (out / "manifest.json").write_text((out / "manifest.json").read_text().replace('"tp": 2', '"tp": 4'))
    elif damage == "more":
        (out / "rank-00002").mkdir()
    again = reshard("convert", source, out, "--tp", "2")
    if damage == "more":
        assert again.code == 0  # an empty directory is nothing
        return
    refused(again, 2, "is not empty")
    if damage != "manifest":
        assert reshard("convert", source, out, "--tp", "2", "--overwrite").code == 0
        assert tree(out) == whole


# A source that changes under the job


def appended(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"x")


MEANWHILE: list[tuple[str, str, Callable[[Path], object]]] = [
    ("weights rewritten", "b.safetensors", lambda path: path.write_bytes(bytes(path.stat().st_size))),
    ("weights replaced", "b.safetensors", lambda path: Path(shutil.copy(path, f"{path}.new")).replace(path)),
    ("weights truncated", "b.safetensors", lambda path: os.truncate(path, 4000)),
    ("weights longer", "a.safetensors", appended),
    ("weights deleted", "b.safetensors", lambda path: path.unlink()),
    ("tokenizer rewritten", "tokenizer.json", lambda path: path.write_text('{"a": 5}')),
]


@pytest.mark.parametrize(("name", "change"), [pytest.param(name, change, id=what) for what, name, change in MEANWHILE])
def test_a_source_that_changes_while_it_is_read(name: str, change: Callable[[Path], object], source: Path, tmp_path: Path) -> None:
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
        job.advance(lambda: any((tmp_path / ".out.reshard").glob("*.safetensors")))
        path = shards / "rank-00001" / "model.safetensors"
        path.write_bytes(bytes(path.stat().st_size))
        refused(job.end(), 3, "rank-00001/model.safetensors: was changed while it was being read")
    assert names(tmp_path) == ["model", "shards"]


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
        os, "fsync", lambda descriptor: (synced.append(str(Path(f"/proc/self/fd/{descriptor}").readlink())), fsync(descriptor))[1]
    )
    monkeypatch.setattr(Path, "rename", lambda self, target: (synced.append("rename"), rename(self, target))[1])
    assert reshard("convert", source, tmp_path / "out", "--tp", "2", "--fsync").code == 0
    at = synced.index("rename")
    work = str(tmp_path / ".out.reshard")
    assert {f"{work}/{name}" for name in tree(tmp_path / "out")} <= set(synced[:at])
    assert {work, f"{work}/rank-00000", f"{work}/source"} <= set(synced[:at])
    assert str(tmp_path) in synced[at:]
    synced.clear()
    assert reshard("convert", source, tmp_path / "other", "--tp", "2").code == 0
    assert synced == ["rename"]


def test_nothing_is_written_when_anything_can_be_refused_before(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even a work directory: sizes, quantization, place and space are looked at first."""

    def enter(_: publish.Publication) -> None:
        raise AssertionError("work was begun")

    monkeypatch.setattr(publish.Publication, "__enter__", enter)
    refused(reshard("convert", source, tmp_path / "out", "--tp", "3"), 2)
    refused(reshard("convert", source, tmp_path / "out", "--tp", "8", "--no-repeat"), 2)
    monkeypatch.setattr(publish, "check_space", lambda out, needed: (_ for _ in ()).throw(publish.PlaceError("no space")))
    refused(reshard("convert", source, tmp_path / "out", "--tp", "2"), 3, "no space")
    (source / "config.json").write_text(json.dumps(LLAMA | {"quantization_config": {"quant_method": "gptq"}}))
    refused(reshard("convert", source, tmp_path / "out", "--tp", "2"), 2, "gptq")
    assert names(tmp_path) == ["model"]


def test_equal_bytes_in_another_order_are_no_other_checkpoint(tmp_path: Path) -> None:
    """The plan does not depend on how tensors lie in the source: rank files are equal, only the residue is not."""
    tensors = llama_tensors()
    source, other = llama(tmp_path / "a", tensors), llama(tmp_path / "b", dict(sorted(tensors.items(), key=lambda item: item[1][2])))
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
