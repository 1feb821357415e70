"""Readers while OUT is replaced: what they get is of one conversion, or they say that it was replaced;
never a mixture, never FAILED.
"""

from __future__ import annotations

import shutil
import subprocess
from collections import Counter
from pathlib import Path

import pytest
from running import environment, llama, llama_tensors, names, reshard, start, tree

from reshard import api
from reshard.checkpoints import manifest, source
from reshard.errors import MismatchError, PlaceError, Replaced
from reshard.store.directory import Directory, reading, unchanged

# Two fine-tunes take turns in OUT, so many times.
WRITER = """
import sys
from pathlib import Path
from reshard import api
from reshard.store import publish
out, one, other, how, turns = sys.argv[1:]
if how == "inside":
    publish._mounted = lambda path: True  # as on a volume that is mounted at OUT
if how == "aside":
    publish._rename_exchange = lambda *paths: False  # as on a file system that cannot exchange
for turn in range(int(turns)):
    api.convert((other, one)[turn % 2], out, tp=2, overwrite=True, fsync=False)
"""
WAYS = ["exchanged", "aside", "inside"]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two fine-tunes, one and other, and what converting each gives."""
    place = tmp_path_factory.mktemp("replaced")
    for seed, name in enumerate(("one", "other")):
        llama(place / name, llama_tensors(seed=seed))
        api.convert(place / name, place / f"{name}-tp2", tp=2)
    return place


def writer(models: Path, out: Path, how: str, turns: int) -> subprocess.Popen[bytes]:
    shutil.copytree(models / "one-tp2", out)
    return start(out, models / "one", models / "other", how, str(turns), code=WRITER, env=environment())


def ended(job: subprocess.Popen[bytes]) -> None:
    _, err = job.communicate(timeout=120)
    assert job.returncode == 0, err.decode()


@pytest.mark.parametrize("how", WAYS)
def test_ranks_that_name_a_root_never_load_two_conversions(how: str, models: Path, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    from reshard.runtime import load_shard

    out = tmp_path / "out"
    known = {}
    for name in ("one", "other"):
        state = [load_shard(models / f"{name}-tp2", rank) for rank in (0, 1)]
        known[manifest.load(models / f"{name}-tp2").root] = state
    job, seen = writer(models, out, how, 16), Counter[str]()
    while job.poll() is None:
        for verify in (None, "hash"):
            try:
                root = source.open_source(out).root_digest
                for rank in (0, 1):
                    found = load_shard(out, rank, verify, root=root)
                    wanted = known[root][rank]
                    assert all(
                        torch.equal(found[key].view(torch.uint8), wanted[key].view(torch.uint8)) for key in wanted
                    ), (how, rank)
                seen[root] += 1
            except PlaceError as error:
                assert "replaced" in error.message, error
                seen["replaced"] += 1
    ended(job)
    assert seen


@pytest.mark.parametrize("how", WAYS)
def test_a_good_directory_is_never_said_to_be_damaged(how: str, models: Path, tmp_path: Path) -> None:
    """`verify`, `inspect`, `fingerprint` and converting from it: right, or exit 3 and "replaced"."""
    out = tmp_path / "out"
    back = {name: tree(models / name) for name in ("one", "other")}
    prints = {reshard("fingerprint", models / name).out for name in ("one-tp2", "other-tp2")}
    job, codes = writer(models, out, how, 16), Counter[tuple[str, int]]()
    while job.poll() is None:
        for words in (["verify"], ["inspect"], ["fingerprint"], ["convert", "back"]):
            shutil.rmtree(tmp_path / "back", ignore_errors=True)
            done = reshard(words[0], out, *([tmp_path / "back", "--to", "hf", "--no-fsync"] if words[1:] else []))
            assert done.code in (0, 3), (words, done)
            if done.code == 3:
                assert "replaced" in done.err, done.err
            elif words == ["fingerprint"]:
                assert done.out in prints
            elif words[1:]:
                assert tree(tmp_path / "back") in back.values()
            codes[words[0], done.code] += 1
    ended(job)
    assert sum(codes.values()) and names(tmp_path / "out") == names(models / "one-tp2")


@pytest.mark.parametrize("verify", [None, "hash"])
def test_a_model_is_of_the_root_that_its_ranks_agreed_on(
    verify: str | None, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """OUT is replaced after the ranks have agreed and before they map, or just after: no model comes of it."""
    pytest.importorskip("torch")
    from reshard.runtime import load

    out = tmp_path / "out"
    state = load.Opened.state
    for before in (True, False):
        shutil.rmtree(out, ignore_errors=True)
        api.convert(models / "one", out, tp=1)

        def late(self: load.Opened, *a: object, before: bool = before, **k: object) -> object:
            found = None if before else state(self, *a, **k)  # type: ignore[arg-type]
            api.convert(models / "other", out, tp=1, overwrite=True)
            return found if found is not None else state(self, *a, **k)  # type: ignore[arg-type]

        monkeypatch.setattr(load.Opened, "state", late)
        with pytest.raises(PlaceError, match="replaced"):
            load.load_model(out, verify=verify)
        monkeypatch.setattr(load.Opened, "state", state)
    assert load.load_model(out, verify=verify) is not None


def test_a_shard_of_another_root_is_refused(models: Path, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    from reshard.runtime import load_shard

    other = manifest.load(models / "other-tp2").root
    with pytest.raises(PlaceError, match=other) as caught:
        load_shard(models / "one-tp2", 0, root=other)
    assert manifest.load(models / "one-tp2").root in caught.value.message
    assert load_shard(models / "other-tp2", 0, root=other)


# A directory's identity


def replace_by(out: Path, new: Path, how: str) -> None:
    """What a commit does to OUT."""
    if how == "inside":
        for name in names(new):
            shutil.copytree(new / name, out / f"{name}.new") if (new / name).is_dir() else shutil.copy2(
                new / name, out / f"{name}.new"
            )
            if (out / name).is_dir():
                shutil.rmtree(out / name)
            (out / f"{name}.new").rename(out / name)
        return
    shutil.copytree(new, out.with_name("new"))
    out.rename(out.with_name("old"))
    out.with_name("new").rename(out)
    shutil.rmtree(out.with_name("old"))


@pytest.mark.parametrize("how", ["exchanged", "inside"])
def test_a_directory_knows_that_it_was_replaced(how: str, models: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(models / "one-tp2", tmp_path / "out"))
    held = Directory(out)
    held.check()
    replace_by(out, models / "one-tp2", how)  # by the very same content, even
    with pytest.raises(Replaced):
        held.check()
    with pytest.raises(Replaced), unchanged(held):
        raise MismatchError("what a mixture led to")
    Directory(out).check()


def test_a_commit_point_that_was_away_for_a_while_is_noticed(models: Path, tmp_path: Path) -> None:
    """A commit inside OUT that failed has put everything back;
    what was read meanwhile may have been of the other one.
    """
    out = Path(shutil.copytree(models / "one-tp2", tmp_path / "out"))
    held = Directory(out)
    (out / "manifest.json").rename(tmp_path / "manifest.json")
    (tmp_path / "manifest.json").rename(out / "manifest.json")
    with pytest.raises(Replaced):
        held.check()


def test_an_edited_file_is_no_replaced_directory(models: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(models / "one-tp2", tmp_path / "out"))
    held = Directory(out)
    (out / "config.json").write_text("{}")
    held.check()


def test_a_directory_holds_its_descriptors_as_long_as_it_lives(models: Path) -> None:
    before = len(names(Path("/proc/self/fd")))
    held = [Directory(models / "one-tp2") for _ in range(5)]
    assert len(names(Path("/proc/self/fd"))) > before
    del held
    assert len(names(Path("/proc/self/fd"))) == before
    with pytest.raises(FileNotFoundError):
        Directory(models / "nowhere")
    assert len(names(Path("/proc/self/fd"))) == before


def test_reading_begins_anew_and_gives_up(models: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(models / "one-tp2", tmp_path / "out"))
    reads = 0

    def read(_: Directory, most: int) -> int:
        nonlocal reads
        reads += 1
        if reads <= most:
            replace_by(out, models / "other-tp2", "exchanged")
        return reads

    assert reading(out, lambda directory: read(directory, 1)) == 2
    reads = 0
    with pytest.raises(Replaced, match="was replaced while being read"):
        reading(out, lambda directory: read(directory, 99))
    assert 2 <= reads < 10
