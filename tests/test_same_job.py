"""Re-runs: content decides whether OUT is what the job would write; a damaged OUT is told from another source;
facts are added.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from running import big_llama, llama, llama_tensors, names, refused, reshard, save, save_index, stamps, tmpfs, tree
from test_publish import content, disturbed, kill

from reshard.checkpoints import manifest
from reshard.engine import worker
from reshard.jobs import verify, verify_sha256
from reshard.store import publish

Target = tuple[str, ...]
TARGETS: list[Target] = [
    ("--tp", "2"),
    ("--tp", "2", "--to", "vllm"),
    ("--to", "hf"),
    ("--to", "hf", "--max-file-size", "60KB"),
]
SHARDS = TARGETS[:2]
EMBED = "model.embed_tokens.weight"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Two files and an index, with a tokenizer."""
    place = llama(tmp_path / "model")
    (place / "model.safetensors").unlink()
    write(place, llama_tensors())
    (place / "tokenizer.json").write_text('{"a": 1}')
    return place


def write(source: Path, tensors: dict[str, tuple[str, tuple[int, ...], bytes]]) -> None:
    rest = list(tensors.items())
    save_index(source, {"a.safetensors": dict(rest[:12]), "b.safetensors": dict(rest[12:])})


def in_1970(directory: Path) -> None:
    """Every time as image layers have it: size and mtime tell nothing."""
    for path in directory.rglob("*"):
        os.utime(path, (0, 0))


def flip(path: Path, at: int, keep_times: bool = True) -> None:
    """Another bit in a file; by default of the same mtime, as in bit rot."""
    status = path.stat()
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 1]))
    if keep_times:
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def touch(path: Path) -> None:
    os.utime(path, (1, 1))


def convert(source: Path, out: Path, *words: str) -> None:
    done = reshard("convert", source, out, *words)
    assert done.code == 0, done.err


def decided(source: Path, out: Path, *words: str) -> str:
    """What told that nothing is to be written."""
    done = reshard("convert", source, out, *words, "--json")
    assert done.code == 0, done.err
    assert done.json["already"] is True and done.json["bytes_read"] == done.json["bytes_written"] == 0
    assert done.json["checked"] is (
        "--no-check" not in words or (done.json["decided_by"] == "content" and "hf" in words)
    )
    by: str = done.json["decided_by"]
    return by


# A finished conversion


@pytest.mark.parametrize("target", TARGETS, ids=" ".join)
def test_a_finished_conversion_is_a_no_op(target: Target, source: Path, tmp_path: Path) -> None:
    """Hugging Face files have no digests, so that checking them is comparing everything."""
    out = tmp_path / "out"
    convert(source, out, *target)
    before = stamps(tmp_path)
    usual = "content" if "hf" in target else "sample"
    for more, by in {
        (): usual,
        ("--workers", "3"): usual,
        ("--no-check",): "sample",
        ("--checksum",): "content",
    }.items():
        assert decided(source, out, *target, *more) == by
        assert stamps(tmp_path) == before
    said = " ".join(reshard("convert", source, out, *target).out.split())
    assert "is up to date" in said and "OUT was not checked" not in said
    assert "OUT was not checked" in " ".join(reshard("convert", source, out, *target, "--no-check").out.split())


@pytest.mark.parametrize("target", TARGETS, ids=" ".join)
def test_overwrite_always_writes(target: Target, source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    convert(source, out, *target)
    before, wanted = stamps(out), tree(out)
    assert reshard("convert", source, out, *target, "--overwrite", "--json").json["already"] is False
    assert tree(out) == wanted
    assert not set(stamps(out).values()) & set(before.values())


@pytest.mark.parametrize("linked", [True, False])
def test_a_snapshot_of_the_hub_is_known_by_its_digests_or_its_commit(
    linked: bool, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Then no weights of the source are read, and OUT is only checked."""
    place = tmp_path / "models--org--name" / "snapshots" / ("a" * 40)
    shutil.copytree(source, place)
    for number, path in enumerate(sorted(place.glob("*.safetensors")) * linked):
        blob = place.parent.parent / "blobs" / (str(number) * 64)
        blob.parent.mkdir(exist_ok=True)
        path.rename(blob)
        path.symlink_to(f"../../blobs/{blob.name}")
    convert(place, tmp_path / "out", "--tp", "2")

    def run(*_: object, **__: object) -> None:
        raise AssertionError("weights were read")

    monkeypatch.setattr(worker, "run", run)
    assert decided(place, tmp_path / "out", "--tp", "2") == ("sha256" if linked else "commit")
    assert decided(place, tmp_path / "out", "--tp", "2", "--no-check") == ("sha256" if linked else "commit")


def test_another_revision_of_one_model_is_another_job(tmp_path: Path) -> None:
    """Same names, sizes and times in the Hub's cache, another commit; and the same commit with another SHA-256."""
    source = llama(tmp_path / "source")
    one, other = (tmp_path / "models--org--name" / "snapshots" / (digit * 40) for digit in "ab")
    shutil.copytree(source, one)
    shutil.copytree(source, other)
    convert(one, tmp_path / "out", "--tp", "2")
    refused(reshard("convert", other, tmp_path / "out", "--tp", "2"), 2, "commit " + "a" * 40)
    for digit in "cd":
        blob = tmp_path / "models--org--name" / "blobs" / (digit * 64)
        blob.parent.mkdir(exist_ok=True)
        shutil.copy2(source / "model.safetensors", blob)
        (one / "model.safetensors").unlink()
        (one / "model.safetensors").symlink_to(f"../../blobs/{blob.name}")
        done = reshard("convert", one, tmp_path / "linked", "--tp", "2")
        assert done.code == (0 if digit == "c" else 2)
    refused(done, 2, "model.safetensors has SHA-256 dddd", "made from cccc")


# Other weights


@pytest.mark.parametrize("target", TARGETS, ids=" ".join)
@pytest.mark.parametrize("times", ["new", "1970"])
def test_another_fine_tune_of_the_same_shapes_is_refused_by_name(
    times: str, target: Target, source: Path, tmp_path: Path
) -> None:
    """Tonight's fine-tune with yesterday's shapes is never answered "already", whatever its times say."""
    out = tmp_path / "out"
    if times == "1970":
        in_1970(source)
    convert(source, out, *target)
    save(source / "b.safetensors", dict(list(llama_tensors(seed=1).items())[12:]))
    if times == "1970":
        in_1970(source)
    before = stamps(out)
    for more in ((), ("--no-check",), ("--checksum",)):
        done = reshard("convert", source, out, *target, *more)
        refused(
            done,
            2,
            str(out),
            "is not empty",
            "b.safetensors: ",
            "lm_head.weight",
            "differs from the source",
            "--overwrite",
        )
    assert stamps(out) == before
    convert(source, out, *target, "--overwrite")
    assert reshard("verify", out, "--against", source).code == 0


@pytest.mark.parametrize("target", [*TARGETS[:3], ("--tp", "4", "--pp", "3"), ("--split", "3:1")], ids=" ".join)
def test_every_tensor_is_in_the_sample(target: Target, source: Path, tmp_path: Path) -> None:
    """One tensor retrained alone, all times kept."""
    out, tensors = tmp_path / "out", llama_tensors()
    in_1970(source)
    convert(source, out, *target)
    for name, values in llama_tensors(seed=1).items():
        write(source, tensors | {name: values})
        in_1970(source)
        refused(
            reshard("convert", source, out, *target, "--no-check"),
            2,
            f".safetensors: {name}" if "vllm" not in target else name,
        )
    write(source, tensors)
    in_1970(source)
    assert decided(source, out, *target, "--no-check") == "sample"


@pytest.mark.parametrize("form", ["bin", "shards", "engine"])
def test_another_fine_tune_in_other_forms_of_sources(form: str, tmp_path: Path) -> None:
    """`.bin` files with a transposed storage; a directory of shards; an engine's own."""
    import torch

    def made(seed: int) -> Path:
        """At one path, with one time: what differs is the values."""
        place = tmp_path / "source"
        shutil.rmtree(place, ignore_errors=True)
        plain = llama(tmp_path / f"plain-{seed}", llama_tensors(seed=seed))
        if form == "bin":
            plain.rename(place)
            (place / "model.safetensors").unlink()
            found = {
                name: torch.frombuffer(bytearray(data), dtype=torch.bfloat16).reshape(shape)
                for name, (_, shape, data) in llama_tensors(seed=seed).items()
            }
            torch.save(
                {n: t.t().contiguous().t() if "q_proj" in n else t for n, t in found.items()},
                place / "pytorch_model.bin",
            )
        else:
            convert(plain, place, "--tp", "2", *(["--to", "vllm"] * (form == "engine")))
            if form == "engine":
                (place / "manifest.json").unlink()
                shutil.rmtree(place / "source")
                for rank in (0, 1):
                    shutil.rmtree(place / f"rank-0000{rank}")
        in_1970(place)
        return place

    source, outs = made(0), {"native": ("--tp", "4"), "vllm": ("--tp", "4", "--to", "vllm"), "hf": ("--to", "hf")}
    for name, words in outs.items():
        convert(source, tmp_path / name, *words)
        assert decided(source, tmp_path / name, *words, "--no-check") == "sample"
    made(1)
    for name, words in outs.items():
        refused(reshard("convert", source, tmp_path / name, *words, "--no-check"), 2, "is not empty")


def test_a_sample_is_no_proof_and_checksum_is(source: Path, tmp_path: Path) -> None:
    """What is said of a sample is that it is one."""
    out = tmp_path / "out"
    convert(source, out, "--tp", "1")
    tensors = llama_tensors()
    dtype, shape, data = tensors[EMBED]
    unseen = 0
    for at in range(4200, len(data) - 4200, 4000):
        changed = bytearray(data)
        changed[at] ^= 1
        before = {path: path.stat() for path in source.iterdir()}
        write(source, tensors | {EMBED: (dtype, shape, bytes(changed))})
        for path, status in before.items():
            os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
        done = reshard("convert", source, out, "--tp", "1")
        if done.code == 0:
            assert "by a sample" in " ".join(done.out.split())
            unseen += 1
        refused(reshard("convert", source, out, "--tp", "1", "--checksum"), 2, EMBED)
    assert unseen, "a sample that reads everything"


@pytest.mark.parametrize("which", ["lm_head.weight", EMBED])
def test_a_tensor_that_out_stores_under_another_name_counts(
    which: str, checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    """The source has head and embedding, equal; the engine's shards have one of them."""
    source = tmp_path / "model"
    shutil.copytree(checkpoint("qwen3_tied_stored"), source)
    in_1970(source)
    words = ("--tp", "2", "--to", "vllm")
    convert(source, tmp_path / "out", *words)
    assert decided(source, tmp_path / "out", *words) == "sample"
    from reshard.checkpoints.source import open_source

    path, entry = open_source(source).locate((0, which))
    flip(path, entry.offset)
    refused(reshard("convert", source, tmp_path / "out", *words), 2, "embed")


# The same weights, other times


@pytest.mark.parametrize("target", TARGETS, ids=" ".join)
@pytest.mark.parametrize("how", ["touched", "copied", "written again"])
def test_other_times_of_the_same_content_are_forgiven_and_remembered(
    how: str, target: Target, source: Path, tmp_path: Path
) -> None:
    """`touch`, `cp -r`, another download. Remembered, so that the next re-run need not read everything;
    no byte of OUT changes.
    """
    out = tmp_path / "out"
    convert(source, out, *target)
    wanted = tree(out)
    if how == "touched":
        for path in source.iterdir():
            touch(path)
    elif how == "copied":
        shutil.copytree(source, tmp_path / "copy", copy_function=shutil.copy)
        source = tmp_path / "copy"
    else:
        write(source, llama_tensors())
    assert decided(source, out, *target, "--no-check") == "content"
    assert decided(source, out, *target, "--no-check") == "sample"
    assert tree(out) == wanted


def test_a_touched_source_where_nothing_can_be_remembered(source: Path, tmp_path: Path) -> None:
    """OUT is read-only: every re-run compares contents."""
    import subprocess

    with tmpfs(tmp_path / "disk", 1_000_000) as disk:
        convert(source, disk / "out", "--tp", "2")
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        touch(source / "a.safetensors")
        for _ in range(2):
            assert decided(source, disk / "out", "--tp", "2") == "content"


def test_one_touched_file_of_other_content_is_noticed_where_the_sample_would_not(source: Path, tmp_path: Path) -> None:
    """Times that differ make every byte count."""
    convert(source, tmp_path / "out", "--tp", "1")
    for at in (9000, 14000, 19000):
        flip(source / "a.safetensors", at, keep_times=False)
        refused(
            reshard("convert", source, tmp_path / "out", "--tp", "1"), 2, "a.safetensors: model.embed_tokens.weight"
        )
        flip(source / "a.safetensors", at, keep_times=False)


# What is no tensor


def spoil_header(source: Path) -> None:
    """White space in the header, in the same number of bytes."""
    path = source / "b.safetensors"
    status, data = path.stat(), path.read_bytes()
    n = int.from_bytes(data[:8], "little")
    text = data[8 : 8 + n].decode()
    path.write_bytes(data[:8] + text.replace(": ", ":", 1).ljust(n).encode() + data[8 + n :])
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


CHANGES: list[tuple[str, Callable[[Path], object], str]] = [
    ("header", spoil_header, "b.safetensors"),
    ("tokenizer", lambda source: flip(source / "tokenizer.json", 3), "tokenizer.json"),
    ("index", lambda source: flip(source / "model.safetensors.index.json", 3), "model.safetensors.index.json"),
    ("a file more beside", lambda source: (source / "merges.txt").write_text("a b"), "merges.txt"),
    ("a file fewer beside", lambda source: (source / "tokenizer.json").unlink(), "tokenizer.json"),
    ("a longer file beside", lambda source: (source / "tokenizer.json").write_text('{"a": 100}'), "tokenizer.json"),
]


@pytest.mark.parametrize(("change", "name"), [pytest.param(change, name, id=what) for what, change, name in CHANGES])
@pytest.mark.parametrize("target", TARGETS[:3], ids=" ".join)
def test_any_other_change_of_the_source_is_refused_by_name(
    target: Target, change: Callable[[Path], object], name: str, source: Path, tmp_path: Path
) -> None:
    """Although size and time are the same; also without the check of OUT."""
    convert(source, tmp_path / "out", *target)
    change(source)
    for more in ((), ("--no-check",)):
        refused(reshard("convert", source, tmp_path / "out", *target, *more), 2, "is not empty", name)


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
def test_another_job_is_refused_with_what_is_there(
    target: Target, parts: tuple[str, ...], source: Path, tmp_path: Path
) -> None:
    convert(source, tmp_path / "out", "--tp", "2")
    before = stamps(tmp_path)
    refused(reshard("convert", source, tmp_path / "out", *target), 2, str(tmp_path / "out"), *parts, "--overwrite")
    assert stamps(tmp_path) == before


# A damaged OUT


@pytest.mark.parametrize("target", SHARDS, ids=" ".join)
def test_damaged_shards_are_told_from_another_source_and_repaired(target: Target, source: Path, tmp_path: Path) -> None:
    """A bit of any file: exit 1, the file is named, and --overwrite writes it anew.
    manifest.json may be past reading.
    """
    out = tmp_path / "out"
    convert(source, out, *target)
    wanted = tree(out)
    for name, data in wanted.items():
        flip(out / name, len(data) * 2 // 3)
        before = stamps(out)
        done = reshard("convert", source, out, *target)
        refused(
            done,
            done.code if name == "manifest.json" else 1,
            name.split("/")[-1],
            "--overwrite" if name != "manifest.json" else "",
        )
        assert done.code in (1, 2) and stamps(out) == before
        if name != "manifest.json":
            assert "is damaged" in done.err
            convert(source, out, *target, "--overwrite")
            assert tree(out) == wanted
        flip(out / name, len(data) * 2 // 3) if name == "manifest.json" else None
    assert decided(source, out, *target) == "sample"
    assert reshard("verify", out, "--against", source).code == 0


@pytest.mark.parametrize("damage", ["missing", "truncated", "grown", "exchanged", "empty folder"])
def test_shards_that_are_not_whole(damage: str, source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    convert(source, out, "--tp", "2")
    whole, path = tree(out), out / "rank-00001" / "model.safetensors"
    if damage == "missing":
        path.unlink()
    elif damage == "truncated":
        os.truncate(path, 5000)
    elif damage == "grown":
        os.truncate(path, path.stat().st_size + 1)
    elif damage == "exchanged":
        other = out / "rank-00000" / "model.safetensors"
        one, two = path.read_bytes(), other.read_bytes()
        path.write_bytes(two)
        other.write_bytes(one)
    else:
        (out / "rank-00002").mkdir()
        assert decided(source, out, "--tp", "2") == "sample"  # an empty directory is nothing
        return
    refused(reshard("convert", source, out, "--tp", "2"), 1, "is damaged", "model.safetensors")
    if damage != "exchanged":
        refused(reshard("convert", source, out, "--tp", "2", "--no-check"), 1, "is damaged", "model.safetensors")
    convert(source, out, "--tp", "2", "--overwrite")
    assert tree(out) == whole


@pytest.mark.parametrize("target", TARGETS[2:], ids=" ".join)
def test_damaged_hugging_face_files_are_noticed_and_repaired(target: Target, source: Path, tmp_path: Path) -> None:
    """They have no digests: everything is compared with the source, times say nothing."""
    shards, out = tmp_path / "shards", tmp_path / "back"
    convert(source, shards, "--tp", "2")
    convert(shards, out, *target)
    wanted = tree(out)
    for name, data in wanted.items():
        flip(out / name, len(data) * 2 // 3)
        refused(reshard("convert", shards, out, *target), 2, "is not empty", name, "--overwrite")
        convert(shards, out, *target, "--overwrite")
        assert tree(out) == wanted
    assert decided(shards, out, *target) == "content"


# Adding facts


@pytest.mark.parametrize("target", SHARDS, ids=" ".join)
def test_sha256_is_added_to_a_finished_directory(target: Target, source: Path, tmp_path: Path) -> None:
    """The same bytes as if it had been asked for at once; weights are not written again; what else is there stays."""
    out = tmp_path / "out"
    convert(source, tmp_path / "wanted", *target, "--sha256")
    convert(source, out, *target)
    (out / "notes.txt").write_text("mine")
    (out / "notes.txt").chmod(0o640)
    (out / "link").symlink_to("notes.txt")
    before = stamps(out)
    done = reshard("convert", source, out, *target, "--sha256", "--json")
    assert done.code == 0, done.err
    assert (done.json["already"], done.json["decided_by"], done.json["added"]) == (True, "sha256", ["SHA-256"])
    assert done.json["root"] == manifest.load(tmp_path / "wanted").root
    assert (out / "link").is_symlink() and (out / "notes.txt").stat().st_mode & 0o777 == 0o640
    after = stamps(out)
    for name in before:
        if name.endswith(("model.safetensors", ".residue", "config.json", "notes.txt")):
            assert after[name][:3] == before[name][:3], name  # the same file
    (out / "link").unlink()
    (out / "notes.txt").unlink()
    assert tree(out) == tree(tmp_path / "wanted")
    assert reshard("verify", out, "--only", "sha256").code == 0
    before = stamps(out)
    assert decided(source, out, *target) == "sample"
    assert decided(source, out, *target, "--sha256") == "sample"  # there is nothing to add any more
    assert stamps(out) == before
    assert names(tmp_path) == ["model", "out", "wanted"]


def test_sha256_that_the_source_shards_know_is_added_too(source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "shards", "--tp", "2")
    convert(tmp_path / "shards", tmp_path / "out", "--tp", "4")
    convert(source, tmp_path / "shards", "--tp", "2", "--sha256")
    convert(tmp_path / "shards", tmp_path / "out", "--tp", "4", "--sha256")
    convert(source, tmp_path / "wanted", "--tp", "4", "--sha256")
    assert tree(tmp_path / "out") == tree(tmp_path / "wanted")


def test_sha256_of_other_weights_is_not_added(source: Path, tmp_path: Path) -> None:
    """Although times are the same, and the sample does not see the difference."""
    out = tmp_path / "out"
    convert(source, out, "--tp", "1")
    wanted = tree(out)
    for at in range(9000, 25000, 4000):
        flip(source / "a.safetensors", at)
        if reshard("convert", source, out, "--tp", "1").code == 0:
            break
        flip(source / "a.safetensors", at)
    else:
        raise AssertionError("a sample that reads everything")
    refused(reshard("convert", source, out, "--tp", "1", "--sha256"), 2, "is not empty", "a.safetensors", "SHA-256")
    assert tree(out) == wanted
    assert names(tmp_path) == ["model", "out"]


def fail() -> None:
    raise OSError(5, "Input/output error")


@pytest.mark.parametrize(
    ("how", "place"),
    [
        pytest.param(kill, "beside", id="killed, beside"),
        pytest.param(kill, "aside", id="killed, aside"),
        pytest.param(kill, "inside", id="killed, inside"),
        pytest.param(fail, "inside", id="failing, inside"),
    ],
)
def test_adding_is_whole_or_not_at_all(
    how: Callable[[], None], place: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed, or refused a system call, at any change of a path: a reader finds OUT with or without;
    the next job adds it.
    """
    if place == "inside":
        monkeypatch.setattr(publish, "_mounted", lambda _: True)
    elif place == "aside":
        monkeypatch.setattr(publish, "_rename_exchange", lambda *_: False)
    (tmp_path / "place").mkdir()
    out = tmp_path / "place" / "out"
    words = ["convert", str(source), str(out), "--tp", "1", "--workers", "1", "--sha256"]
    convert(source, tmp_path / "old", "--tp", "1")
    convert(source, tmp_path / "new", "--tp", "1", "--sha256")
    old, new = tree(tmp_path / "old"), tree(tmp_path / "new")

    def set_up() -> None:
        shutil.rmtree(out.parent)
        shutil.copytree(tmp_path / "old", out)

    set_up()
    code, changes = disturbed(words, out, 0, how)
    assert (code, content(out)) == (0, new)
    first = changes.index("os.rename") if "os.rename" in changes else len(changes)
    for number in sorted({*range(1, first, 7), *range(max(1, first - 4), len(changes) + 1)}):
        set_up()
        code, _ = disturbed(words, out, number, how)
        assert code == -signal.SIGKILL if how is kill else code in (0, 3), (number, code)
        found = content(out)
        if place == "beside" or "manifest.json" in found:
            assert found in (old, new), number
        convert(source, out, *words[3:])
        assert tree(out) == new, number
        assert names(out.parent) == ["out"], number


def test_a_source_replaced_between_hashing_and_adding(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashed = verify_sha256.hashed

    def then_replaced(*arguments: object) -> object:
        found = hashed(*arguments)  # type: ignore[arg-type]
        flip(source / "b.safetensors", 9000)
        return found

    convert(source, tmp_path / "out", "--tp", "2")
    wanted = tree(tmp_path / "out")
    monkeypatch.setattr(verify_sha256, "hashed", then_replaced)
    refused(
        reshard("convert", source, tmp_path / "out", "--tp", "2", "--sha256"),
        3,
        "b.safetensors: was changed while it was being read",
    )
    assert tree(tmp_path / "out") == wanted


# Cost


def test_a_re_run_reads_out_once_and_little_of_the_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 30 MB a sample reads less than a tenth."""
    source = big_llama(tmp_path / "model", 30)
    convert(source, tmp_path / "out", "--tp", "4")
    read: list[int] = []

    class Counting(verify.Comparer):
        def put(self, key: worker.Key, offset: int, data: memoryview) -> None:
            read.append(len(data))
            super().put(key, offset, data)

    monkeypatch.setattr(verify, "Comparer", Counting)
    assert decided(source, tmp_path / "out", "--tp", "4") == "sample"
    assert 0 < sum(read) < 3e6
    assert json.loads(reshard("verify", tmp_path / "out", "--json").out)["ok"]
