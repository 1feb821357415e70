"""Progress on stderr: a bar on a terminal, plain lines with a heartbeat in a log, JSON lines for programs,
or nothing.
"""

import json
import os
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from types import TracebackType
from typing import Any, Literal, Protocol, TextIO

from .escapes import in_json, visible
from .units import decimal, duration

Kind = Literal["auto", "json", "none"]

BYTES = "B"


class Progress(Protocol):
    """Told how many bytes there are, or of what `unit` else, and how many more are done, from any thread."""

    def start(self, what: str, total: int, unit: str = BYTES) -> None: ...
    def advance(self, n: int) -> None: ...
    def finish(self) -> None: ...


class Silent:
    """Says nothing."""

    def start(self, what: str, total: int, unit: str = BYTES) -> None: ...
    def advance(self, n: int) -> None: ...
    def finish(self) -> None: ...


def until(stop: threading.Event, advance: Callable[[int], None]) -> Callable[[int], None]:
    """`advance`, which ends the worker that calls it once `stop` is set: what it is at may be a tensor of many GB."""

    def step(n: int) -> None:
        advance(n)
        if stop.is_set():
            raise InterruptedError("another worker failed, or the job was interrupted")

    return step


class _Counting:
    """Counts and calls `show(seconds, end)` every `every` seconds, and at the end."""

    every = 1.0
    first = 1.0

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream
        self.what, self.unit = "", BYTES
        self.total = self.done = 0
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None
        self._began = 0.0

    def start(self, what: str, total: int, unit: str = BYTES) -> None:
        self.what, self.unit, self.total, self.done, self._began = what, unit, total, 0, time.monotonic()
        self._ended.clear()
        self._thread = threading.Thread(target=self._beat, daemon=True)
        self._thread.start()

    def advance(self, n: int) -> None:
        with self._lock:
            self.done += n

    def _beat(self) -> None:
        wait = self.first
        while not self._ended.wait(wait):
            self.show(time.monotonic() - self._began, False)
            wait = self.every

    def finish(self) -> None:
        if self._thread is None:
            return
        self._ended.set()
        self._thread.join()
        self._thread = None
        self.show(time.monotonic() - self._began, True)

    def show(self, seconds: float, end: bool) -> None:
        raise NotImplementedError

    def say(self, line: str) -> None:
        """A line; where nobody can read it (a full disk, a reader that went away) the work goes on in silence."""
        try:
            print(visible(line), file=self.stream, flush=True)
        except OSError:
            hush(self.stream)

    def left(self, seconds: float) -> float | None:
        """Seconds left, if they can be told."""
        return seconds * (self.total - self.done) / self.done if self.done else None

    def __enter__(self) -> "_Counting":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()


class Lines(_Counting):
    """One line per heartbeat: the first after 10 seconds, so that short jobs are quiet."""

    every, first = 30.0, 10.0

    def show(self, seconds: float, end: bool) -> None:
        if end and seconds < self.first:
            return
        rate = self.done / max(seconds, 1e-9)
        left = self.left(seconds)
        tail = "" if end or left is None else f", {duration(left)} left"
        share = 100 * self.done / self.total if self.total else 100
        done, total, each = map(self._words, (self.done, self.total, rate))
        self.say(f"{self.what}: {done} of {total} ({share:.0f} %), {each}/s{tail}")

    def _words(self, n: float) -> str:
        return decimal(round(n)) if self.unit == BYTES else f"{n:,.0f}"


class Json(_Counting):
    """One JSON object per second: what, done, total, rate (per second), left (seconds), end; bytes,
    where `what` does not say of what.
    """

    def show(self, seconds: float, end: bool) -> None:
        left = self.left(seconds)
        record = {
            "what": self.what,
            "done": self.done,
            "total": self.total,
            "rate": round(self.done / max(seconds, 1e-9)),
            "left": None if left is None else round(max(left, 0), 1),
            "end": end,
        }
        self.say(in_json(json.dumps(record)))


class Bar(_Counting):
    """A bar on a terminal: what is done, rate, time left."""

    every = first = 0.1

    def start(self, what: str, total: int, unit: str = BYTES) -> None:
        from tqdm import tqdm

        try:
            known = os.get_terminal_size(self.stream.fileno()).columns > 0
        except (OSError, ValueError):
            known = False
        # a terminal in a container may not know its size
        width: dict[str, Any] = {"dynamic_ncols": True} if known else {"ncols": 80}
        counted: dict[str, Any] = {"unit": unit, "unit_scale": unit == BYTES}
        self._bar = tqdm(total=total, desc=visible(what), leave=False, file=self.stream, miniters=1, **counted, **width)
        super().start(what, total, unit)

    def show(self, seconds: float, end: bool) -> None:
        self._bar.update(self.done - self._bar.n)
        if end:
            self._bar.close()


def hush(stream: TextIO) -> None:
    """What a stream would not take is not tried again: the interpreter would do that at its end, and complain."""
    with suppress(OSError, ValueError):  # a stream that is no file
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def reporter(kind: Kind, stream: TextIO | None = None) -> Progress:
    """The progress that fits the stream: a bar on a terminal, lines elsewhere."""
    stream = stream or sys.stderr
    if kind == "none" or stream is None:  # closed: 2>&-
        return Silent()
    if kind == "json":
        return Json(stream)
    return Bar(stream) if stream.isatty() else Lines(stream)
