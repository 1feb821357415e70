"""Publishing: OUT is whole or it is what it was before, whatever kills, fills or disturbs the job; the next job mends
what is left.
"""

from __future__ import annotations

import errno
import io
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pytest
from running import (
    TRANSFERS,
    Stepped,
    big_llama,
    environment,
    llama,
    mounted,
    names,
    process,
    refused,
    reshard,
    stamps,
    tmpfs,
    tree,
)

from reshard import api, cli
from reshard.store import local as files
from reshard.store import publish

# audit events of the system calls that publishing consists of
MOVES = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link")
WRITES = (*MOVES, "open", "os.truncate", "os.utime")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return llama(tmp_path_factory.mktemp("publish") / "model")


@pytest.fixture(scope="module")
def outputs(source: Path) -> dict[str, dict[str, bytes]]:
    """What OUT holds after a whole conversion at TP 2 ("old") and at TP 4 ("new")."""
    for name, tp in (("old", "2"), ("new", "4")):
        assert reshard("convert", source, source.parent / name, "--tp", tp).code == 0
    return {name: tree(source.parent / name) for name in ("old", "new")}


@pytest.fixture(scope="module")
def big(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    place = tmp_path_factory.mktemp("big") / "model"
    yield big_llama(place, 60)
    shutil.rmtree(place)


def content(directory: Path) -> dict[str, bytes]:
    """What a reader finds in OUT: everything but the work."""
    return (
        {name: data for name, data in tree(directory).items() if not name.startswith(".reshard-")}
        if directory.is_dir()
        else {}
    )


# Every system call of a conversion


class Scene:
    """A way to publish: what OUT is before, and how the job publishes it."""

    def __init__(
        self, name: str, before: str | None, overwrite: bool, patch: Callable[[pytest.MonkeyPatch], None] | None = None
    ) -> None:
        self.name, self.before, self.overwrite, self.patch = name, before, overwrite, patch

    def words(self, source: Path, out: Path) -> list[str]:
        return ["convert", str(source), str(out), "--tp", "4", "--workers", "1"] + ["--overwrite"] * self.overwrite

    def set_up(self, source: Path, out: Path) -> None:
        if out.parent.exists():
            shutil.rmtree(out.parent)
        out.parent.mkdir()
        if self.before == "empty":
            out.mkdir()
        elif self.before == "old":
            assert reshard("convert", source, out, "--tp", "2", "--workers", "1").code == 0


SCENES = [
    Scene("absent", None, False),
    Scene("empty", "empty", False),
    Scene("exchanged", "old", True),
    Scene("aside", "old", True, lambda patch: patch.setattr(publish, "_rename_exchange", lambda *_: False)),
    Scene("inside", "old", True, lambda patch: patch.setattr(publish, "_mounted", lambda _: True)),
]


def disturbed(
    words: list[str], out: Path, number: int, disturb: Callable[[], None], events: tuple[str, ...] = WRITES
) -> tuple[int, list[str]]:
    """Run a command in a child of this process, in which `disturb` is called before the `number`th change of a path
    near OUT.

    The exit status (-9: killed), and what each change was.
    """
    read, write = os.pipe()
    child = os.fork()
    if not child:
        changes: list[str] = []
        near = os.fsencode(out.parent)

        def hook(event: str, arguments: tuple[Any, ...]) -> None:
            if event not in events or (
                event == "open" and not int(arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            ):
                return
            if any(near in os.fsencode(a) for a in arguments if isinstance(a, str | bytes | os.PathLike)):
                changes.append(event)
                if len(changes) == number:
                    disturb()

        code = 99
        try:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            sys.addaudithook(hook)
            with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
                cli.main(words)
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 0
        finally:
            os.write(write, " ".join(changes).encode())
            os._exit(code)
    os.close(write)
    _, status = os.waitpid(child, 0)
    changed = os.read(read, 65536).decode().split()
    os.close(read)
    return os.waitstatus_to_exitcode(status), changed


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def fail() -> None:
    raise OSError(errno.EIO, "Input/output error")


def moments(changes: list[str]) -> list[int]:
    """Every change from just before the first rename on, which begins the commit, and some of those before."""
    first = max(1, (changes.index("os.rename") if "os.rename" in changes else len(changes)) - 3)
    return [*range(1, first, 12), *range(first, len(changes) + 1)]


@pytest.mark.parametrize("scene", SCENES, ids=lambda scene: scene.name)
@pytest.mark.parametrize("how", [kill, fail], ids=["killed", "failing"])
def test_out_is_whole_or_as_before_at_every_moment(
    how: Callable[[], None],
    scene: Scene,
    source: Path,
    outputs: dict[str, dict[str, bytes]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Killed, or refused a system call, at any step: a reader finds nothing, the old or the new; the next job puts
    everything right.
    """
    if scene.patch is not None:
        scene.patch(monkeypatch)
    out = tmp_path / "place" / "out"
    words = scene.words(source, out)
    scene.set_up(source, out)
    code, changes = disturbed(words, out, 0, how)
    assert (code, content(out)) == (0, outputs["new"])
    before = outputs["old"] if scene.before == "old" else {}
    seen = set()
    for number in moments(changes):
        scene.set_up(source, out)
        code, _ = disturbed(words, out, number, how)
        assert code == -signal.SIGKILL if how is kill else code in (0, 3), (number, code)
        found = content(out)
        if "manifest.json" in found or scene.name != "inside":
            partial = scene.name == "empty" and "manifest.json" not in found
            assert partial or found in (before, outputs["new"]) or (scene.name == "aside" and not out.exists()), (
                number,
                sorted(found),
            )
        seen.add(found == outputs["new"])
        # A job that may not overwrite mends as well, and answers as it would have before or after.
        gentle = reshard(*(word for word in words if word != "--overwrite"))
        assert gentle.code == (0 if found == outputs["new"] or scene.before != "old" else 2), (number, gentle)
        assert content(out) == (outputs["new"] if gentle.code == 0 else outputs["old"]), number
        if number % 4 == 0:
            again = reshard(*words)
            assert (again.code, content(out)) == (0, outputs["new"]), (number, again.err)
        assert names(out.parent) == ["out"], number
        assert not [name for name in names(out) if name.startswith(".")], number
    assert False in seen and (True in seen or scene.name == "absent")  # there the last change is the one that publishes


@pytest.mark.parametrize("name", ["aside", "inside"])
def test_mending_may_itself_be_killed(
    name: str, source: Path, outputs: dict[str, dict[str, bytes]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed in the middle of a commit, then at each step of clearing up after that: the third job still finds the old
    one whole.
    """
    scene = next(scene for scene in SCENES if scene.name == name)
    assert scene.patch is not None
    scene.patch(monkeypatch)
    out = tmp_path / "place" / "out"
    words = scene.words(source, out)
    gentle = words[:-1]
    scene.set_up(source, out)
    _, changes = disturbed(words, out, 0, kill)
    first, last = changes.index("os.rename"), len(changes) - changes[::-1].index("os.rename")
    # while the old is set aside, while the new is published
    middles = [last] if name == "aside" else [first + 3, last - 1]
    for middle in middles:
        scene.set_up(source, out)
        assert disturbed(words, out, middle, kill)[0] == -signal.SIGKILL
        assert not (out / "manifest.json").exists()
        shutil.copytree(out.parent, tmp_path / "kept", symlinks=True)
        code, steps = disturbed(gentle, out, 0, kill)
        assert (code, content(out)) == (2, outputs["old"])
        for step in range(1, len(steps) + 1):
            shutil.rmtree(out.parent)
            shutil.copytree(tmp_path / "kept", out.parent, symlinks=True)
            assert disturbed(gentle, out, step, kill)[0] == -signal.SIGKILL
            assert reshard(*gentle).code == 2, (middle, step, steps)
            assert tree(out) == outputs["old"], (middle, step, steps)
            assert names(out.parent) == ["out"], (middle, step)
        shutil.rmtree(tmp_path / "kept")


def test_the_manifest_is_renamed_last_and_set_aside_first(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Inside an existing directory a reader that waits for manifest.json never sees a part."""
    monkeypatch.setattr(publish, "_mounted", lambda _: True)
    renames: list[tuple[str, str]] = []
    rename = Path.rename
    monkeypatch.setattr(
        Path,
        "rename",
        lambda self, target: (renames.append((self.name, Path(target).parent.name)), rename(self, target))[1],
    )
    (tmp_path / "out").mkdir()
    assert reshard("convert", source, tmp_path / "out", "--tp", "2").code == 0
    assert renames[-1] == ("manifest.json", "out") and len(renames) > 3
    renames.clear()
    assert reshard("convert", source, tmp_path / "out", "--tp", "4", "--overwrite").code == 0
    assert renames[0] == ("manifest.json", "old")
    assert renames[-1] == ("manifest.json", "out")


# Signals


def test_killed_at_any_time_it_leaves_no_out(big: Path, tmp_path: Path) -> None:
    """SIGKILL of a real process, from its first transfer of data to its last; a later run works, and clears up."""
    out, words = tmp_path / "out", ("convert", big, tmp_path / "out", "--tp", "8")
    with Stepped(*words) as whole:
        assert whole.end().code == 0
        count = whole.count("reached")
    shutil.rmtree(out)
    for step in (1, 2, count // 3, count // 2, count - 1, count):
        with Stepped(*words) as job:
            job.allow(step - 1)
            job.until(step)
            job.job.kill()
        assert not out.exists(), step
    assert reshard(*words).code == 0
    assert names(tmp_path) == ["out"]
    assert reshard("verify", out, "--against", big).code == 0


FEW = 20  # transfers that are still begun before a signal is heeded; there would be hundreds


@pytest.mark.parametrize(("sign", "times"), [(signal.SIGTERM, 1), (signal.SIGINT, 3), (signal.SIGHUP, 1)])
def test_a_signal_ends_it_at_once_and_leaves_nothing(
    sign: signal.Signals, times: int, big: Path, tmp_path: Path
) -> None:
    """Exit 128 + its number although a tensor is being written, and few more transfers; also when the signal comes
    again.
    """
    out = tmp_path / "above" / "it" / "out"
    words = ("convert", big, out, "--tp", "1", "--workers", "1", "--progress", "json")
    with Stepped(*words, code=TRANSFERS.replace("step()", "step(); time.sleep(0.02)", 1)) as job:
        job.allow(3)
        job.until(4)
        job.job.send_signal(sign)
        job.until(1, "signals")
        for _ in range(times - 1):
            job.job.send_signal(sign)
        done = job.end()
        assert job.count("reached") < FEW, "it went on with its tensor"
    assert done.code == 128 + sign
    assert done.err.rstrip().endswith("\n\nerror: interrupted; unfinished output was removed")
    assert names(tmp_path) == []


def test_no_worker_goes_on_after_an_interrupt(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From Python: when `convert` has raised KeyboardInterrupt nothing of it runs any more, so that no closed
    descriptor is used.
    """
    transfer, moved, handled = files.Pool._transfer, [], threading.Event()

    def slow(self: files.Pool, *arguments: Any) -> None:
        if threading.current_thread() is not threading.main_thread():
            if not handled.is_set():
                os.kill(os.getpid(), signal.SIGALRM)
            handled.wait()  # the interrupt arrives while this transfer is under way
            moved.append(arguments[0])
        transfer(self, *arguments)

    def interrupt(*_: object) -> None:
        handled.set()
        raise KeyboardInterrupt

    monkeypatch.setattr(files.Pool, "_transfer", slow)
    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        with pytest.raises(KeyboardInterrupt):
            api.convert(source, tmp_path / "out", tp=2)
        count = len(moved)
    finally:
        signal.signal(signal.SIGALRM, before)
    for thread in threading.enumerate():
        if thread.name.startswith("reshard-"):
            thread.join()
    assert len(moved) == count > 0
    assert names(tmp_path) == []


def test_a_signal_while_hashing_ends_it_at_once(big: Path, tmp_path: Path) -> None:
    """Before anything is written, a file of any size is being read to its end."""
    slowly = TRANSFERS.replace("step()", "step(); time.sleep(0.02)", 1)
    with Stepped("convert", big, tmp_path / "out", "--tp", "2", "--workers", "1", "--sha256", code=slowly) as job:
        job.allow(1)
        job.until(2)
        assert names(tmp_path) == []
        job.job.terminate()
        job.until(1, "signals")
        assert job.end().code == 143
        assert job.count("reached") < FEW
    assert names(tmp_path) == []


def test_a_signal_while_overwriting_keeps_the_old(
    source: Path, outputs: dict[str, dict[str, bytes]], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    shutil.copytree(source.parent / "old", out)
    before = stamps(out)
    with Stepped("convert", source, out, "--tp", "4", "--overwrite") as job:
        job.until(1)
        job.job.terminate()
        job.until(1, "signals")
        assert job.end().code == 143
    assert stamps(out) == before
    assert names(tmp_path) == ["out"]


def test_a_signal_during_the_commit_waits_for_it(
    source: Path, outputs: dict[str, dict[str, bytes]], tmp_path: Path
) -> None:
    """SIGINT at each rename of a commit inside OUT: the new is whole, nothing is left over."""
    out = tmp_path / "place" / "out"
    scene = next(scene for scene in SCENES if scene.name == "empty")
    scene.set_up(source, out)
    words = scene.words(source, out)
    _, renames = disturbed(words, out, 0, lambda: None, ("os.rename",))
    assert len(renames) > 5
    for number in range(1, len(renames) + 1):
        scene.set_up(source, out)
        code, _ = disturbed(words, out, number, lambda: signal.raise_signal(signal.SIGINT), ("os.rename",))
        assert code == 0  # it is done, and says so
        assert content(out) == tree(out) == outputs["new"]


# Two jobs


@pytest.mark.parametrize("before", ["absent", "empty", "old"])
def test_of_two_jobs_with_one_destination_the_second_is_refused(before: str, source: Path, tmp_path: Path) -> None:
    """Exit 3, and the first goes on undisturbed."""
    out = tmp_path / "out"
    if before == "empty":
        out.mkdir()
    elif before == "old":
        shutil.copytree(source.parent / "old", out)
    words = ["convert", source, out, "--tp", "4", *(["--overwrite"] if before == "old" else [])]
    with Stepped(*words) as first:
        first.until(1)
        refused(process(*words), 3, str(out), "another job is writing it")
        refused(reshard("convert", source, out, "--tp", "2"), 3, "another job is writing it")
        done = first.end()
    assert done.code == 0, done.err
    assert reshard("verify", out, "--against", source).code == 0
    assert names(tmp_path) == ["out"]


def test_what_appears_while_the_job_runs_is_not_replaced(source: Path, tmp_path: Path) -> None:
    for before in ("absent", "empty"):
        out = tmp_path / before
        if before == "empty":
            out.mkdir()
        with Stepped("convert", source, out, "--tp", "2") as job:
            job.until(1)
            out.mkdir(exist_ok=True)
            (out / "mine.txt").write_text("precious")
            refused(job.end(), 3, "appeared while the job ran")
        assert tree(out) == {"mine.txt": b"precious"}
        assert names(tmp_path) == sorted({"absent", before})


# Full, read-only and mounted places


def test_too_little_space_is_refused_before_anything_is_written(source: Path, tmp_path: Path) -> None:
    with tmpfs(tmp_path / "disk", 200_000) as disk:
        done = refused(
            reshard("convert", source, disk / "out", "--tp", "2"), 3, "are needed", "are free", "free some space"
        )
        numbers = [int(word.strip("(")) for word in done.err.split() if word.strip("(").isdigit()]
        assert numbers[0] > 250_000 > 210_000 > numbers[1]
        assert names(disk) == []


def test_space_that_a_killed_job_holds_counts_as_free(source: Path, tmp_path: Path) -> None:
    with tmpfs(tmp_path / "disk", 400_000) as disk:
        with Stepped("convert", source, disk / "out", "--tp", "2", "--workers", "1") as job:
            job.advance(lambda: shutil.disk_usage(disk).used >= 200_000)
            job.job.kill()
        assert names(disk) == [".out.reshard"]
        assert reshard("convert", source, disk / "out", "--tp", "2").code == 0
        assert names(disk) == ["out"]


@pytest.mark.parametrize("where", ["absent", "mounted", "old"])
def test_a_disk_that_fills_up_meanwhile(
    where: str, source: Path, outputs: dict[str, dict[str, bytes]], tmp_path: Path
) -> None:
    """Another process takes the space after it was checked: exit 3 in words, and nothing is left but what was there."""
    with tmpfs(tmp_path / "disk", 900_000) as disk:
        out = disk if where == "mounted" else disk / "out"
        if where == "old":
            shutil.copytree(source.parent / "old", out)
        words = ["convert", source, out, "--tp", "4", "--workers", "1", *(["--overwrite"] if where == "old" else [])]
        with Stepped(*words) as job:
            job.until(1)
            with (disk / "hog").open("wb", buffering=0) as hog:
                try:
                    while True:
                        hog.write(bytes(4096))
                except OSError as error:
                    assert error.errno == errno.ENOSPC
            done = refused(job.end(), 3, "No space left on device\n\nhint: free some space")
        (disk / "hog").unlink()
        assert done.err.startswith("error: writing ")
        assert names(disk) == (["out"] if where == "old" else [])
        if where == "old":
            assert tree(out) == outputs["old"]


def test_a_limit_on_the_size_of_files(source: Path, tmp_path: Path) -> None:
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))

    refused(process("convert", source, tmp_path / "out", "--tp", "2", preexec_fn=limit), 3, "File too large")
    assert names(tmp_path) == []


def test_few_open_files_are_enough(source: Path, tmp_path: Path) -> None:
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (16, 16))

    done = process("convert", source, tmp_path / "out", "--tp", "8", preexec_fn=limit)
    if done.code:
        refused(done, 3, "open files", "ulimit -n")
        assert names(tmp_path) == []


def test_a_place_that_cannot_be_written_to(source: Path, tmp_path: Path) -> None:
    with tmpfs(tmp_path / "disk", 1_000_000) as disk:
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        refused(reshard("convert", source, disk / "out", "--tp", "2"), 3, "Read-only file system", "mounted read-only")
        refused(reshard("convert", source, disk, "--tp", "2"), 3, "Read-only file system")
    (tmp_path / "file").write_text("")
    refused(reshard("convert", source, tmp_path / "file" / "out", "--tp", "2"), 2, f"{tmp_path / 'file'} is a file")
    refused(reshard("convert", source, tmp_path / "file", "--tp", "2"), 2, "is a file")


def test_the_same_job_again_works_where_nothing_can_be_written(source: Path, tmp_path: Path) -> None:
    with tmpfs(tmp_path / "disk", 1_000_000) as disk:
        for out in (disk / "out", disk):
            subprocess.run(["mount", "-o", "remount,rw", str(disk)], check=True)
            shutil.rmtree(disk / "out", ignore_errors=True)
            assert reshard("convert", source, out, "--tp", "2").code == 0
            subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
            assert reshard("convert", source, out, "--tp", "2", "--json").json["already"] is True


@pytest.mark.parametrize("kind", ["tmpfs", "bind"])
def test_a_mount_point(kind: str, source: Path, outputs: dict[str, dict[str, bytes]], tmp_path: Path) -> None:
    """OUT is a mounted volume, of its own file system or of the same: written, left alone, overwritten,
    always inside it.
    """
    place, backing = tmp_path / "above" / "out", tmp_path / "backing"
    place.mkdir(parents=True)
    backing.mkdir()
    with tmpfs(place, 4_000_000) if kind == "tmpfs" else mounted(place, "--bind", str(backing)) as out:
        (out / "lost+found").mkdir()
        assert reshard("convert", source, out, "--tp", "2").code == 0
        assert content(out) == outputs["old"]
        assert reshard("convert", source, out, "--tp", "2", "--json").json["already"] is True
        refused(reshard("convert", source, out, "--tp", "4"), 2, "is not empty", "--overwrite")
        assert reshard("convert", source, out, "--tp", "4", "--overwrite").code == 0
        assert content(out) == outputs["new"]
        assert "lost+found" in names(out)
        assert not [name for name in names(out) if name.startswith(".")]
        assert names(place.parent) == ["out"]


# What --overwrite may delete


@pytest.mark.parametrize("kind", ["shards", "published"])
@pytest.mark.parametrize(
    "thing", ["notes.txt", "thesis.docx", "photos/cat.jpg", "rank-00000/notes.txt", ".git/config", "model.py", "link"]
)
@pytest.mark.usefixtures("outputs")
def test_overwrite_never_deletes_what_is_no_checkpoint(kind: str, thing: str, source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(source.parent / "old" if kind == "shards" else source, out)
    (out / thing).parent.mkdir(exist_ok=True)
    if thing == "link":
        (out / thing).symlink_to(source)
    else:
        (out / thing).write_text("precious")
    before = stamps(out)
    refused(reshard("convert", source, out, "--tp", "4", "--overwrite"), 2, str(out), thing, "not part of a checkpoint")
    assert stamps(out) == before


@pytest.mark.parametrize(
    "files",
    [("config.json", "main.rs"), ("README.md",), ("a/b.txt",), ("manifest.json",), ("manifest.json", "config.json")],
)
def test_overwrite_never_deletes_a_directory_that_only_resembles_one(
    files: tuple[str, ...], source: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    for name in files:
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text('{"reshard": "1.0"}' if name == "manifest.json" else "{}")
    before = stamps(out)
    refused(reshard("convert", source, out, "--tp", "4", "--overwrite"), 2, str(out))
    refused(reshard("convert", source, out, "--tp", "4"), 2, "is not empty")
    assert stamps(out) == before


def test_overwrite_replaces_checkpoints_of_any_kind(
    source: Path, outputs: dict[str, dict[str, bytes]], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    for step in (
        ["--to", "vllm", "--tp", "2"],
        ["--to", "hf"],
        ["--to", "hf", "--max-file-size", "100KB"],
        ["--tp", "4"],
    ):
        done = reshard("convert", source, out, *step, "--overwrite")
        assert done.code == 0, done.err
        assert reshard("convert", source, out, *step, "--json").json["already"] is True
    assert tree(out) == outputs["new"]
    (out / "rank-00001" / "model.safetensors").unlink()  # also one that is not whole
    assert reshard("convert", source, out, "--tp", "2", "--overwrite").code == 0
    assert tree(out) == outputs["old"]
    assert names(tmp_path) == ["out"]


# Links


def test_a_destination_behind_a_link(source: Path, outputs: dict[str, dict[str, bytes]], tmp_path: Path) -> None:
    """The link stays, the directory that it leads to is written and replaced."""
    (tmp_path / "real").mkdir()
    link = tmp_path / "link"
    link.symlink_to("real")
    assert reshard("convert", source, link, "--tp", "2").code == 0
    assert reshard("convert", source, link, "--tp", "4", "--overwrite").code == 0
    assert link.is_symlink()
    assert tree(tmp_path / "real") == outputs["new"]
    assert names(tmp_path) == ["link", "real"]
    (tmp_path / "dangling").symlink_to("nowhere")
    refused(reshard("convert", source, tmp_path / "dangling", "--tp", "2"), 2, "dangling", "nowhere", "does not exist")
    (tmp_path / "loop").symlink_to("loop")
    refused(reshard("convert", source, tmp_path / "loop", "--tp", "2"), 2, "loop")
    refused(reshard("convert", source, tmp_path / "loop" / "out", "--tp", "2"), 3, "loop")


def test_source_and_destination_apart_also_through_links(tmp_path: Path) -> None:
    """The destination is not the source, not inside it, does not hold it, whatever way leads there."""
    source = llama(tmp_path / "store" / "model")
    (tmp_path / "alias").symlink_to(source)
    (tmp_path / "above").symlink_to(source.parent)
    before = stamps(tmp_path)
    for words in (
        (source, tmp_path / "alias"),
        (tmp_path / "alias", source),
        (source, source),
        (source, tmp_path / "above" / "model"),
    ):
        refused(reshard("convert", *words, "--tp", "2"), 2, "is the source itself")
    for words in (
        (source, tmp_path / "alias" / "out"),
        (tmp_path / "alias", source / "out"),
        (source, tmp_path / "above" / "model" / "a" / "b"),
    ):
        refused(reshard("convert", *words, "--tp", "2", "--overwrite"), 2, "lies inside the source")
    for words in ((source, source.parent), (tmp_path / "alias", tmp_path), (source, tmp_path / "above")):
        refused(reshard("convert", *words, "--tp", "2", "--overwrite"), 2, "holds the source")
    assert stamps(tmp_path) == before
    assert reshard("convert", tmp_path / "alias", tmp_path / "out", "--tp", "2").code == 0


def test_a_destination_that_is_the_source_by_another_mount_is_refused(tmp_path: Path) -> None:
    """--overwrite would delete the only copy of the weights."""
    source = llama(tmp_path / "store" / "model")
    with mounted(tmp_path / "out", "--bind", str(source)):
        refused(reshard("convert", source, tmp_path / "out", "--tp", "2", "--overwrite"), 2, "is the source itself")
        refused(
            reshard("convert", source, tmp_path / "out" / "x", "--tp", "2", "--overwrite"), 2, "lies inside the source"
        )
    with mounted(tmp_path / "out", "--bind", str(source.parent)):
        refused(reshard("convert", source, tmp_path / "out", "--tp", "2", "--overwrite"), 2, "holds the source")


def test_a_destination_that_holds_what_the_source_has_links_to_is_refused(tmp_path: Path) -> None:
    store, source = llama(tmp_path / "store"), tmp_path / "source"
    source.mkdir()
    shutil.copy(store / "config.json", source)
    (source / "model.safetensors").symlink_to(store / "model.safetensors")
    before = stamps(tmp_path)
    refused(
        reshard("convert", source, store, "--tp", "2", "--overwrite"),
        2,
        "holds model.safetensors of the source",
        "a link",
    )
    assert stamps(tmp_path) == before
    assert reshard("convert", source, tmp_path / "out", "--tp", "2").code == 0


def test_a_failed_job_takes_the_directories_away_that_it_made(source: Path, tmp_path: Path) -> None:
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))

    (tmp_path / "mine").mkdir()
    done = process("convert", source, tmp_path / "mine" / "a" / "b" / "out", "--tp", "2", preexec_fn=limit)
    assert done.code == 3
    assert names(tmp_path) == ["mine"]
    assert names(tmp_path / "mine") == []


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")
@pytest.mark.usefixtures("outputs")
def test_what_is_read_only_is_not_replaced(source: Path, tmp_path: Path) -> None:
    """Told before anything is written, not when the old directory cannot be deleted."""
    out = Path(shutil.copytree(source.parent / "old", tmp_path / "out"))
    for path in (*source.parents, *out.parents):
        if path.stat().st_uid == 0 and path.stat().st_mode & 0o777 == 0o700:
            path.chmod(0o711)
    for path in (tmp_path, out, *out.rglob("*")):
        os.chown(path, 65534, -1)
    (out / "rank-00001").chmod(0o555)
    before = tree(out)
    demote = "import os, sys\nfrom reshard import api, cli\nfrom reshard.jobs import convert, plan\n"
    demote += "os.setresuid(65534, 65534, 65534)\ncli.main(sys.argv[1:])"
    words = [sys.executable, "-c", demote, "convert", str(source), str(out), "--tp", "4", "--overwrite"]
    done = subprocess.run(words, capture_output=True, text=True, env=environment(), check=False)
    assert done.returncode == 3 and "rank-00001: is read-only" in done.stderr, done
    assert tree(out) == before and [path.name for path in tmp_path.iterdir()] == ["out"]
