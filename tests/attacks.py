"""Attacks on a conversion at the boundary to the system: the n-th call fails, or the process is killed before it.

    calls_fail(folder, rounds, seed)    one call of a kind fails with an error that it can have
    kills(folder, rounds, seed)         killed before a call; with `again`, the next run is killed, too

Each round is a real conversion in a process of its own; nothing of reshard is replaced, only functions of `os` and of
files. After each the destination is absent or complete, the exit code is 3 or that of the kill, and a run without
faults gives the same bytes and leaves nothing else. They raise AssertionError, with what was done, for a round after
which that does not hold. Tests run a few rounds of a seed.
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

from running import Done, environment, llama, names, process, reshard, tree

# The calls, and what each may fail with. Only calls about the checkpoint, the destination and what is beside it are
# counted.
ERRORS = {
    "open": ("EIO", "EMFILE", "EACCES"),
    "preadv": ("EIO", "ESTALE"),
    "pwritev": ("ENOSPC", "EDQUOT", "EIO"),
    "rename": ("EIO",),
    "mkdir": ("ENOSPC", "EIO"),
    "utime": ("EIO",),
    "close": ("EIO",),
    "fsync": ("EIO", "ENOSPC"),
    "ftruncate": ("ENOSPC", "EFBIG"),
    "unlink": ("EIO",),
    "rmdir": ("EIO",),
}

# Lets the NUMBER-th call of CALL fail with ERROR, or kills the process before it. COUNT: the file that gets how many
# there were of each.
PROGRAM = """
import builtins, collections, errno, io, json, os, signal, sys, threading
wanted, number, error, where, count, calls = sys.argv[1:7]
place, made, lock, opened = os.path.realpath(where), collections.Counter(), threading.Lock(), io.open

def path_of(what):
    try:
        return os.fsdecode(os.readlink(f"/proc/self/fd/{what}") if isinstance(what, int) else os.path.realpath(what))
    except (OSError, ValueError, TypeError):
        return ""

def hit(call, path):
    if not path.startswith(place):
        return
    with lock:
        made[call] += 1
        now = call == wanted and made[call] == int(number)
    if now and error == "KILL":
        os.kill(os.getpid(), signal.SIGKILL)
    if now:
        raise OSError(getattr(errno, error), os.strerror(getattr(errno, error)))

def wrapped(call, function):
    def before(what, *more, **given):
        hit(call, path_of(what))
        return function(what, *more, **given)
    def after(what):
        path = path_of(what)
        if error == "KILL":
            hit(call, path)
        function(what)
        if error != "KILL":
            hit(call, path)  # the descriptor is closed whatever close says
    return after if call == "close" else before

for call in calls.split(","):
    setattr(os, call, wrapped(call, getattr(os, call)))
builtins.open = io.open = wrapped("open", opened)
sys.argv = ["reshard", *sys.argv[7:]]
from reshard.__main__ import main
try:
    main()
finally:
    with opened(count, "w") as file:
        json.dump(made, file)
"""

SCENES = ("absent", "empty", "overwrite", "hf")


class Place:
    """A checkpoint, shards of it and of another one, and the bytes that conversions give."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.work = folder, folder / "work"
        self.source, other = llama(folder / "source"), llama(folder / "other", vocab_size=300)
        for name, path in (("shards", self.source), ("old", other)):
            assert reshard("convert", path, folder / name, "--tp", "2").code == 0
        self.new = {"hf": tree(self.source)} | dict.fromkeys(("absent", "empty", "overwrite"), tree(folder / "shards"))

    def words(self, scene: str) -> list[str | Path]:
        words: list[str | Path] = ["convert", self.work / "source", self.work / "out", "--tp", "2", "--workers", "1"]
        if scene == "hf":
            words = ["convert", self.work / "shards", self.work / "out", "--to", "hf", "--workers", "1"]
        return [*words, *(["--overwrite"] if scene == "overwrite" else [])]

    def set_up(self, scene: str) -> None:
        shutil.rmtree(self.work, ignore_errors=True)
        self.work.mkdir()
        for name in ("source", "shards"):
            shutil.copytree(self.folder / name, self.work / name, copy_function=shutil.copy2)
        if scene == "empty":
            (self.work / "out").mkdir()
        if scene == "overwrite":
            shutil.copytree(self.folder / "old", self.work / "out")

    def run(self, scene: str, call: str, number: int, error: str) -> tuple[Done, dict[str, int]]:
        """How it ended, and how many calls there were of each kind; none where it was killed."""
        count = self.folder / "count"
        count.unlink(missing_ok=True)
        words = map(str, (call, number, error, self.work, count, ",".join(ERRORS), *self.words(scene), "-q"))
        done = process(*words, code=PROGRAM, env=environment(PYTHONDONTWRITEBYTECODE="1"))
        return done, json.loads(count.read_text()) if count.exists() else {}

    def check(self, scene: str, what: object) -> str:
        """What OUT is: nothing, the old, the new; or, in a directory that was there, entries of a commit without their
        manifest.
        """
        out = self.work / "out"
        found = {name: data for name, data in tree(out).items() if not name.startswith(".")} if out.exists() else {}
        if not found:
            return "nothing"
        if found == self.new[scene]:
            return "new"
        if scene == "empty" and "manifest.json" not in found:
            return "not yet"
        assert scene == "overwrite" and found == tree(self.folder / "old"), (what, sorted(found))
        return "old"

    def mend(self, scene: str, what: object) -> None:
        """A run without faults succeeds, with the same bytes, and nothing else is left."""
        done = reshard(*self.words(scene))
        assert done.code == 0, (what, done)
        assert tree(self.work / "out") == self.new[scene], what
        assert names(self.work) == ["out", "shards", "source"], (what, names(self.work))


def _counts(place: Place) -> dict[tuple[str, str], int]:
    """How many calls of each kind a conversion makes, by scene and call."""
    found = {}
    for scene in SCENES:
        place.set_up(scene)
        done, made = place.run(scene, "", 0, "")
        assert done.code == 0, (scene, done)
        found |= {(scene, call): n for call, n in made.items()}
    return found


def _rounds(folder: Path, rounds: int, seed: int, one: Callable[[Place, str, str, int, random.Random], None]) -> None:
    place, chance = Place(folder), random.Random(seed)
    counts = _counts(place)
    for _ in range(rounds):
        scene, call = chance.choice(sorted(counts))
        place.set_up(scene)
        one(place, scene, call, chance.randint(1, counts[scene, call]), chance)


def calls_fail(folder: Path, rounds: int, seed: int) -> None:
    """Exit 3 and an error in words, or 0 where the call did not matter; OUT is what it was, or complete."""

    def one(place: Place, scene: str, call: str, number: int, chance: random.Random) -> None:
        error = chance.choice(ERRORS[call])
        done, _ = place.run(scene, call, number, error)
        what = (scene, call, number, error, done)
        assert done.code in (0, 3) or (call == "open" and done.code == 2), what
        assert "Traceback" not in done.err and (done.code == 0 or done.err.startswith("error: ")), what
        state = place.check(scene, what)
        assert state == "new" if done.code == 0 else state in ("nothing", "old"), (state, what)
        place.mend(scene, what)

    _rounds(folder, rounds, seed, one)


def kills(folder: Path, rounds: int, seed: int, again: bool = False) -> None:
    """Killed before a call: OUT is absent, the old or complete; the next run, which may be killed, too, mends it."""

    def one(place: Place, scene: str, call: str, number: int, chance: random.Random) -> None:
        what: list[object] = [scene, call, number]
        done, _ = place.run(scene, call, number, "KILL")
        what.append(done)
        place.check(scene, what) if not again else None
        if again:
            other, second = chance.choice(sorted(ERRORS)), chance.randint(1, 20)
            done, _ = place.run(scene, other, second, "KILL")
            what += [other, second, done]
            assert done.code in (0, -9), what
        place.mend(scene, what)

    _rounds(folder, rounds, seed, one)
