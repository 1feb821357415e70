"""Launch one process per rank on this machine, and watch them until all have ended. Knows nothing about models.

torch is imported once and the ranks are forked, so that N ranks start as fast as one, and no file in the current
directory is imported in its place. The parent computes nothing and keeps no threads. No rank outlives it.
"""

import atexit
import ctypes
import json
import os
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from mmap import mmap
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from reshard.errors import PlaceError, ReshardError
from reshard.text.escapes import visible

from .lost import Lost

if TYPE_CHECKING:
    from .collectives import World

T = TypeVar("T")
Report = Callable[[str], None]
Work = Callable[[int, Report], None]

PHASES = ("start", "load", "prefill", "decode", "report", "end")
_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG: the signal that a process gets when its parent ends
_REPORT = 1000  # characters of a rank's error message: written to a pipe at once
_GRACE = 5.0  # seconds for the other ranks to report what they know about a lost rank
GONE = 141  # exit code: the reader of stdout is gone


@dataclass
class _Child:
    """A rank's process: the pipe for its error, and how it ended."""

    rank: int
    pid: int
    pipe: int
    words: bytes = b""
    code: int | None = None
    said: dict[str, Any] = field(default_factory=dict)


def launch(size: int, work: Work, timeout: float) -> None:
    """Run `work(rank, report)` in one process per rank, with the environment that torchrun sets.

    `report` is called with each phase. Raises what the first rank to fail raised, or PlaceError for one that was
    killed, with its phase; the other ranks are then ended.
    """
    if size > 1:
        _check_loopback()
    phases = mmap(-1, size)
    children: list[_Child] = []
    doors = os.pipe()  # passes the port on, once there is one
    sys.stdout.flush()
    sys.stderr.flush()
    try:
        children.extend(_fork(rank, size, work, phases, doors) for rank in range(size))
        os.close(doors[0])
        store = _store(size, timeout) if size > 1 else None
        with suppress(BrokenPipeError):
            os.write(doors[1], (store.port if store else 0).to_bytes(8, "little") * size)
        os.close(doors[1])
        _watch(children)
    finally:
        for child in children:
            if child.code is None:
                with suppress(ProcessLookupError):
                    os.kill(child.pid, signal.SIGKILL)
                _reap(child)
            os.close(child.pipe)
    _judge(children, [PHASES[number] for number in phases[:]])


def run_processes(size: int, work: "Callable[[World], T]", timeout: float) -> list[T]:
    """`work` once per rank, each in its own process, connected by gloo; the results in rank order.

    `run_threads` with real processes. Work and results are pickled. A separate process forks the ranks, since forks do
    not survive the threads that torch has started in this one. Raises as `launch` does.
    """
    import torch

    with tempfile.TemporaryDirectory(prefix="reshard-ranks-") as folder:
        torch.save(work, Path(folder, "work"))
        serving = "from reshard.runtime.comm import launch; launch.serve(*sys.argv[1:])"
        program = f"import sys; sys.path[:] = {sys.path!r}; {serving}"
        done = subprocess.run(
            [sys.executable, "-c", program, folder, str(size), str(timeout), str(os.getpid())], check=False
        )
        if (said := Path(folder, "error")).exists():
            words = json.loads(said.read_text(encoding="utf-8"))
            error: type[ReshardError] = PlaceError if words["code"] == 3 else ReshardError
            raise error(words["message"], words["hint"])
        if done.returncode:
            raise PlaceError(f"the process that starts the {size} ranks exited with code {done.returncode}")
        return [torch.load(Path(folder, f"rank-{rank}"), weights_only=False) for rank in range(size)]


def serve(folder: str, size: str, timeout: str, parent: str) -> None:
    """The process of `run_processes` that forks the ranks. Writes results, or an error, to files in the folder."""
    import torch

    _follow(int(parent))
    work = torch.load(Path(folder, "work"), weights_only=False)

    def one(rank: int, report: Report) -> None:
        from .processes import joined

        with joined("gloo", int(size), float(timeout)) as world:
            report("load")
            found = work(world)
        torch.save(found, Path(folder, f"rank-{rank}"))

    try:
        launch(int(size), one, float(timeout))
    except ReshardError as error:
        words = {"message": error.message, "hint": error.hint, "code": error.exit_code}
        Path(folder, "error").write_text(json.dumps(words), encoding="utf-8")


def _check_loopback() -> None:
    """The ranks rendezvous at 127.0.0.1; if that is unreachable, torch would try for a long time."""
    try:
        with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname(), 5.0):
            pass
    except OSError as error:
        raise PlaceError(
            f"cannot connect to 127.0.0.1, where the ranks rendezvous: {error.strerror or error}",
            "ip link set lo up; or use one rank: --tp 1",
        ) from None


def _store(size: int, timeout: float) -> Any:
    from datetime import timedelta

    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    try:
        return TCPStore(
            "127.0.0.1", 0, size, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=timeout)
        )
    except RuntimeError as error:
        raise PlaceError(f"cannot start the rendezvous of the ranks: {str(error).partition(chr(10))[0]}") from None


def _fork(rank: int, size: int, work: Work, phases: mmap, doors: tuple[int, int]) -> _Child:
    reading, writing = os.pipe()
    parent, pid = os.getpid(), os.fork()
    if pid:
        os.close(writing)
        return _Child(rank, pid, reading)
    code = 70
    try:
        os.close(reading)
        os.close(doors[1])
        _follow(parent)
        atexit._clear()  # the parent's handlers
        code = _run(rank, size, work, phases, doors[0], writing)
    except BaseException:
        sys.stderr.write(visible(traceback.format_exc()))
    finally:
        os._exit(code)


def _follow(parent: int) -> None:
    """Die with the parent, and leave Ctrl-C and hangups to it."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_DEATH_SIGNAL, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _run(rank: int, size: int, work: Work, phases: mmap, door: int, pipe: int) -> int:
    """Run one rank; returns its exit code. An error goes into `pipe`."""
    from . import heartbeat

    def report(phase: str) -> None:
        phases[rank] = PHASES.index(phase)

    def say(**words: Any) -> int:
        line = json.dumps({"time": time.monotonic()} | words | {"message": str(words["message"])[:_REPORT]})
        os.write(pipe, line.encode() + b"\n")
        return int(words["code"])

    heartbeat.report = lambda rank, verdict: say(message=verdict, hint=None, code=3, lost=True)

    port = int.from_bytes(os.read(door, 8), "little")
    os.close(door)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    if any(name == "lo" for _, name in socket.if_nameindex()):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # or else gloo resolves the host name
    if rank:
        os.dup2(2, 1)  # stdout belongs to rank 0
    code = 0
    try:
        work(rank, report)
        sys.stdout.flush()
        report("end")
    except BrokenPipeError:
        code = GONE
    except ReshardError as error:
        code = say(message=error.message, hint=error.hint, code=error.exit_code, lost=isinstance(error, Lost))
    except BaseException as error:
        if not isinstance(error, MemoryError):
            sys.stderr.write(visible(traceback.format_exc()))
        words = f"rank {rank} failed in {PHASES[phases[rank]]}: {type(error).__name__}: {error}"
        code = say(message=words, hint=None, code=3, lost=False)
    threads = [
        thread for thread in threading.enumerate() if thread is not threading.main_thread() and not thread.daemon
    ]
    if not threads:
        atexit._run_exitfuncs()
    sys.stderr.flush()
    return code


def _watch(children: list[_Child]) -> None:
    """Wait until all have ended; after a failure, the others have `_GRACE` to report the cause."""
    deadline: float | None = None
    with selectors.DefaultSelector() as selector:
        for child in children:
            selector.register(child.pipe, selectors.EVENT_READ, child)
        while selector.get_map():
            left = None if deadline is None else deadline - time.monotonic()
            if left is not None and left <= 0:
                return
            for key, _ in selector.select(left):
                child = key.data
                if data := os.read(child.pipe, 65536):
                    child.words += data
                    continue
                selector.unregister(child.pipe)
                _reap(child)
                if child.code:
                    deadline = min(deadline or float("inf"), time.monotonic() + (0 if child.code == GONE else _GRACE))


def _reap(child: _Child) -> None:
    with suppress(ChildProcessError):
        child.code = os.waitstatus_to_exitcode(os.waitpid(child.pid, 0)[1])
    said = [json.loads(line) for line in child.words.splitlines()]
    child.said = min(said, key=lambda words: (bool(words["lost"]), words["time"]), default={})


def _judge(children: list[_Child], phases: list[str]) -> None:
    """Raise the cause of failure: a rank's own error, else what other ranks report about one, else how it ended."""
    if any(child.code == GONE for child in children):
        raise BrokenPipeError
    said = sorted((child.said for child in children if child.said), key=lambda words: words["time"])
    for words in [*(words for words in said if not words.get("lost")), *said]:
        error: type[ReshardError] = PlaceError if words.get("code", 3) == 3 else ReshardError
        raised = error(words["message"], words.get("hint"))
        raised.exit_code = words.get("code", 3)
        raise raised
    for child in children:
        if child.code:
            how = f"was killed by {signal.Signals(-child.code).name}" if child.code < 0 else f"exited with {child.code}"
            hint = "the kernel's OOM killer does this when memory runs out" if child.code == -signal.SIGKILL else None
            raise PlaceError(f"rank {child.rank} {how} in {phases[child.rank]}", hint)
