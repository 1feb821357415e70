"""The work folder: only reshard's own is touched, a killed job's is told of, and OUT next to it or around it reads as
what it is.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
from pathlib import Path

import pytest
from running import TRANSFERS, Stepped, llama, names, refused, reshard, stamps, tree
from test_publish import SCENES, Scene, content, disturbed, kill

from reshard.checkpoints import manifest
from reshard.store import publish


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("work")
    llama(place / "model")
    for name, tp in (("old", "2"), ("new", "4")):
        assert reshard("convert", place / "model", place / name, "--tp", tp).code == 0
    return place / "model"


def old(source: Path, out: Path) -> Path:
    return Path(shutil.copytree(source.parent / "old", out))


def set_up(scene: Scene, source: Path, out: Path) -> None:
    shutil.rmtree(out.parent, ignore_errors=True)
    out.parent.mkdir()
    if scene.before == "old":
        old(source, out)
    elif scene.before == "empty":
        out.mkdir()


# What is not reshard's own


def a_link(folder: Path) -> str:
    victim = folder.parent / "victim"
    victim.mkdir()
    (victim / "thesis.tex").write_text("precious")
    folder.symlink_to(victim)
    return "is a link"


def a_dangling_link(folder: Path) -> str:
    folder.symlink_to("nowhere")
    return "is a link"


def a_file(folder: Path) -> str:
    folder.write_text("precious")
    return "is a file"


def a_folder(folder: Path) -> str:
    folder.mkdir()
    (folder / "thesis.tex").write_text("precious")
    return "holds thesis.tex"


def a_folder_with_our_names(folder: Path) -> str:
    (folder / "new").mkdir(parents=True)
    (folder / "new" / "thesis.tex").write_text("precious")
    return "holds new"


def a_marked_folder_with_more(folder: Path) -> str:
    folder.mkdir()
    (folder / "reshard.marker").write_text("")
    (folder / "thesis.tex").write_text("precious")
    return "holds thesis.tex"


def a_marked_folder_with_a_link(folder: Path, name: str) -> str:
    victim = folder.parent / "victim"
    victim.mkdir()
    (victim / "thesis.tex").write_text("precious")
    folder.mkdir()
    (folder / "reshard.marker").write_text("")
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(victim if name in ("old", "new") else victim / "thesis.tex")
    return f"holds {name}"


def whose_old_is_a_link(folder: Path) -> str:
    return a_marked_folder_with_a_link(folder, "old")


def whose_new_is_a_link(folder: Path) -> str:
    return a_marked_folder_with_a_link(folder, "new")


def whose_marker_is_a_link(folder: Path) -> str:
    return a_marked_folder_with_a_link(folder, "reshard.marker")


def whose_listing_is_a_link(folder: Path) -> str:
    return a_marked_folder_with_a_link(folder, "entries.json")


def whose_marker_has_another_name_too(folder: Path) -> str:
    folder.mkdir()
    victim = folder.parent / "thesis.tex"
    victim.write_text("precious")
    (folder / "reshard.marker").hardlink_to(victim)
    return "holds reshard.marker"


FOREIGN = [a_link, a_dangling_link, a_file, a_folder, a_folder_with_our_names, a_marked_folder_with_more]
FOREIGN += [
    whose_old_is_a_link,
    whose_new_is_a_link,
    whose_marker_is_a_link,
    whose_listing_is_a_link,
    whose_marker_has_another_name_too,
]


@pytest.mark.parametrize("where", ["beside", "inside"])
@pytest.mark.parametrize("make", FOREIGN, ids=lambda make: make.__name__)
def test_what_is_not_reshards_own_is_refused_and_not_touched(
    make: object, where: str, source: Path, tmp_path: Path
) -> None:
    """By every job, also one that would be refused for something else, or has nothing to do."""
    assert callable(make)
    for before in ("absent", "old") if where == "beside" else ("empty", "old"):
        place = tmp_path / before
        place.mkdir()
        out = place / "out"
        if before == "old":
            old(source, out)
        elif before == "empty":
            out.mkdir()
        folder = place / ".out.reshard" if where == "beside" else out / ".reshard-work"
        says = make(folder)
        untouched = stamps(place)
        for words in (["--tp", "2"], ["--tp", "4", "--overwrite"], ["--tp", "4"]):
            refused(reshard("convert", source, out, *words), 2, str(folder), says, "move it away")
            assert stamps(place) == untouched, words
        if before == "old":
            assert reshard("verify", out).code == 0


@pytest.mark.parametrize(
    "said", ['["../thesis.tex"]', '["..", "a/../../thesis.tex"]', "[5]", '["a\\u0000b"]', "[" * 100_000]
)
def test_a_strangers_listing_of_a_commit_moves_nothing_out_of_its_place(
    said: str, source: Path, tmp_path: Path
) -> None:
    """As it may come with a directory that was downloaded, and that is converted to."""
    out = old(source, tmp_path / "out")
    (tmp_path / "thesis.tex").write_text("precious")
    folder = out / ".reshard-work"
    (folder / "new" / "waiting").mkdir(parents=True)
    (folder / "reshard.marker").write_text("")
    (folder / "entries.json").write_text(said)
    for words in (["--tp", "2"], ["--tp", "4", "--overwrite"]):
        assert reshard("convert", source, out, *words).code == 0
    assert (tmp_path / "thesis.tex").read_text() == "precious"
    assert names(tmp_path) == ["out", "thesis.tex"]


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give a folder away")
def test_the_folder_of_another_user_is_refused(source: Path, tmp_path: Path) -> None:
    folder = tmp_path / ".out.reshard"
    folder.mkdir()
    (folder / "reshard.marker").write_text("")
    os.chown(folder, 65534, -1)
    refused(
        reshard("convert", source, tmp_path / "out", "--tp", "2"), 2, str(folder), "belongs to another user (uid 65534)"
    )
    assert names(folder) == ["reshard.marker"]


def test_an_empty_folder_is_one_whose_job_was_killed_at_once(source: Path, tmp_path: Path) -> None:
    (tmp_path / ".out.reshard").mkdir()
    assert reshard("convert", source, tmp_path / "out", "--tp", "2").code == 0
    assert names(tmp_path) == ["out"]


# OUT, as long as a job works in it and when it was killed


def test_out_reads_as_what_it_is_while_a_job_works_inside(source: Path, tmp_path: Path) -> None:
    """On a mounted volume the work lies in OUT: it is no part of what is there. Also when the job was killed,
    which `inspect` says.
    """
    out = old(source, tmp_path / "out")
    inside = f"from reshard.store import publish\npublish._mounted = lambda path: True\n{TRANSFERS}"
    with Stepped("convert", source, out, "--tp", "4", "--overwrite", code=inside) as job:
        job.allow(2)
        job.until(3)
        for state in ("running", "killed"):
            assert reshard("verify", out).code == 0, state
            found = reshard("inspect", out)
            assert found.code == 0 and ("killed conversion" in found.out) == (state == "killed"), found
            job.job.kill()
            job.job.wait()
    assert str(out / ".reshard-work") in reshard("inspect", out).out
    assert reshard("convert", source, out, "--tp", "2", "--json").json["already"] is True
    assert tree(out) == tree(source.parent / "old")


def test_what_a_killed_job_left_is_told_by_inspect_and_by_the_next_job_nearby(source: Path, tmp_path: Path) -> None:
    with Stepped("convert", source, tmp_path / "out", "--tp", "2", "--workers", "1") as job:
        job.allow(2)
        job.until(3)
        running = reshard("convert", source, tmp_path / "early", "--tp", "2", "--json").json
        refused(reshard("verify", tmp_path / "out"), 3, "does not exist yet: a conversion is writing it")
        job.job.kill()
        job.job.wait()
    folder = tmp_path / ".out.reshard"
    assert running["notes"] == []
    near = reshard("convert", source, tmp_path / "near", "--tp", "2")
    assert (
        near.code == 0
        and f"note: a killed conversion to {tmp_path / 'out'} left " in near.out
        and str(folder) in near.out
    )
    assert len(reshard("convert", source, tmp_path / "near", "--tp", "2", "--json").json["notes"]) == 1
    for command in ("inspect", "verify", "plan"):
        refused(
            reshard(command, tmp_path / "out"), 3, "does not exist: the conversion to it was killed", f"rm -r {folder}"
        )
    assert str(folder) in reshard("inspect", tmp_path).out
    old(source, tmp_path / "out")
    assert str(folder) in reshard("inspect", tmp_path / "out").out
    assert reshard("convert", source, tmp_path / "out", "--tp", "2").code == 0
    assert reshard("convert", source, tmp_path / "near", "--tp", "2", "--json").json["notes"] == []
    assert names(tmp_path) == ["early", "near", "out"]


@pytest.mark.parametrize("name", ["aside", "inside"])
def test_killed_while_publishing_out_says_where_the_old_is(
    name: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At every rename of a commit: a reader gets the old, the new, or exit 3 and where the old one is;
    never FAILED, never "not there".
    """
    scene = next(scene for scene in SCENES if scene.name == name)
    assert scene.patch is not None
    scene.patch(monkeypatch)
    out = tmp_path / "place" / "out"
    set_up(scene, source, out)
    _, renames = disturbed(scene.words(source, out), out, 0, kill, ("os.rename",))
    roots = {manifest.load(out).root, manifest.load(source.parent / "old").root}
    torn = 0
    for number in range(1, len(renames) + 1):
        set_up(scene, source, out)
        assert disturbed(scene.words(source, out), out, number, kill, ("os.rename",))[0] == -signal.SIGKILL
        done = reshard("verify", out)
        if done.code == 0:
            assert manifest.load(out).root in roots
        else:
            refused(done, 3, "was killed while it replaced this directory", "start a conversion to")
            refused(reshard("inspect", out), 3, "old")
            torn += 1
        if number % 3 == 0:
            refused(reshard("convert", source, out, "--tp", "1"), 2, "--overwrite")
            assert reshard("verify", out).code == 0
            assert tree(out) == tree(source.parent / "old")
    assert torn == len(renames) - 1  # before the first of them the old is whole


# Power cuts


def test_nothing_is_published_that_is_not_on_the_device(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At each rename into OUT every file and folder that it publishes was synced after its last change, whatever the
    way to publish.

    So is the directory that has the new name, before the old is deleted.
    """
    fsync = os.fsync
    synced: dict[int, object] = {}
    published: list[Path] = []

    def state(path: Path) -> object:
        return tuple(names(path)) if path.is_dir() else path.read_bytes()

    def note(descriptor: int) -> None:
        fsync(descriptor)
        path = Path(f"/proc/self/fd/{descriptor}")
        synced[os.fstat(descriptor).st_ino] = state(path)

    def check(path: Path) -> None:
        published.append(path)
        for each in (path, *path.rglob("*")):
            assert synced.get(each.stat().st_ino) == state(each), f"{each} is published and was not synced"

    rename, exchange, unlink = Path.rename, publish._rename_exchange, os.unlink

    def renamed(self: Path, target: Path) -> Path:
        if self.parent.name == "new" or self.name == "new":
            check(self)
            if self.name == "manifest.json":  # everything else has its name
                assert synced[target.parent.stat().st_ino] == state(target.parent)
        return rename(self, target)

    def exchanged(one: Path, other: Path) -> bool:
        check(one)
        return exchange(one, other)

    def unlinked(path: object, *a: object, **k: object) -> None:
        if published:
            place = out if scene.name in ("inside", "empty") else out.parent
            assert synced[place.stat().st_ino] == state(place), (
                "the old is deleted before the new has its name for good"
            )
        unlink(path, *a, **k)  # type: ignore[arg-type]

    for scene in SCENES:
        with monkeypatch.context() as patch:
            out = tmp_path / scene.name / "out"
            set_up(scene, source, out)
            synced.clear()
            published.clear()
            patch.setattr(os, "fsync", note)
            patch.setattr(Path, "rename", renamed)
            patch.setattr(publish, "_rename_exchange", exchanged)
            if scene.patch is not None:
                scene.patch(patch)
            patch.setattr(os, "unlink", unlinked)
            assert reshard(*scene.words(source, out)).code == 0
        assert published, scene.name


def test_without_fsync_nothing_is_synced(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda descriptor: pytest.fail("it was"))
    assert reshard("convert", source, tmp_path / "out", "--tp", "2", "--no-fsync").code == 0


@pytest.mark.parametrize("call", ["fsync", "close"])
@pytest.mark.parametrize("scene", SCENES, ids=lambda scene: scene.name)
def test_a_sync_or_close_that_fails_publishes_nothing(
    scene: Scene, call: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The n-th of them: exit 3 in words, and OUT is what it was; or what failed had no part in it, exit 0,
    and OUT is the new one.
    """
    real, count, wanted = getattr(os, call), 0, 0

    def failing(descriptor: int) -> None:
        nonlocal count
        count += 1
        real(descriptor)
        if count == wanted:
            raise OSError(errno.EIO, "Input/output error")

    if scene.patch is not None:
        scene.patch(monkeypatch)
    out, new = tmp_path / "place" / "out", tree(source.parent / "new")
    set_up(scene, source, out)
    before = content(out)
    with monkeypatch.context() as patch:
        patch.setattr(os, call, failing)
        assert reshard(*scene.words(source, out)).code == 0
    calls, codes = count, set()
    for wanted in [*range(1, calls - 4, 9), *range(max(calls - 4, 1), calls + 1)]:
        set_up(scene, source, out)
        count = 0
        with monkeypatch.context() as patch:
            patch.setattr(os, call, failing)
            done = reshard(*scene.words(source, out))
        assert (done.code, content(out)) in ((3, before), (0, new)), (wanted, calls, done)
        if done.code:
            refused(done, 3, "Input/output error")
        codes.add(done.code)
        if done.code:
            assert ".out.reshard" not in names(out.parent), wanted
    assert 3 in codes


@pytest.mark.parametrize("torn", ["empty", "zeros", "half", "missing"])
def test_a_torn_conversion_is_broken_and_can_be_replaced(torn: str, source: Path, tmp_path: Path) -> None:
    """What a power cut leaves of a conversion that was not synced: files of zeros, an empty manifest."""
    out = old(source, tmp_path / "out")
    path = out / "manifest.json"
    data = path.read_bytes()
    path.write_bytes({"empty": b"", "zeros": bytes(len(data)), "half": data[: len(data) // 2], "missing": b""}[torn])
    if torn == "missing":
        path.unlink()
    (out / "rank-00001" / "model.safetensors").write_bytes(bytes(1000))
    assert reshard("verify", out).code == 1
    refused(reshard("convert", source, out, "--tp", "2"), 1, "manifest.json: is missing or damaged", "--overwrite")
    (out / "rank-00001" / "thesis.tex").write_text("precious")
    refused(reshard("convert", source, out, "--tp", "2", "--overwrite"), 2, "thesis.tex", "not part of a checkpoint")
    (out / "rank-00001" / "thesis.tex").unlink()
    assert reshard("convert", source, out, "--tp", "2", "--overwrite").code == 0
    assert tree(out) == tree(source.parent / "old")


@pytest.mark.parametrize(
    "change", [{"ranks": "x"}, {"carried": [5]}, {"plan": None}, {"mesh": {"tp": 2.0, "pp": 1, "ep": 1}}]
)
def test_a_conversion_whose_manifest_is_of_no_form_can_be_replaced(
    change: dict[str, object], source: Path, tmp_path: Path
) -> None:
    out = old(source, tmp_path / "out")
    path = out / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    assert reshard("verify", out).code == 1
    (out / "rank-00001" / "thesis.tex").write_text("precious")
    refused(reshard("convert", source, out, "--tp", "2", "--overwrite"), 2, "thesis.tex", "not part of a checkpoint")
    (out / "rank-00001" / "thesis.tex").unlink()
    assert reshard("convert", source, out, "--tp", "2", "--overwrite").code == 0
    assert tree(out) == tree(source.parent / "old")
