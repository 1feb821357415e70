"""Threads: a few of them at one piece of work, or at many items, each taking the next when it is free."""

import os
import resource
import threading
from collections.abc import Callable, Iterable
from typing import TypeVar

from .errors import PlaceError, ReshardError

T = TypeVar("T")
MOST = 256
ADDRESSES = 512 << 20  # bytes of address space that numpy, stacks of threads and buffers fit into


def count(asked: int = 0) -> int:
    """How many threads to use: as many as were asked for, or as there are cores for, at most eight.

    Raises PlaceError where the address space (`ulimit -v`) is too small to start any: numpy's BLAS ends the process
    without a word when its own allocation fails, so this is found out before.
    """
    if not 0 <= asked <= MOST:
        raise ReshardError(
            f"--workers {asked} is not a number of threads", f"give 1 to {MOST}; 0 is one for each core, at most eight"
        )
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit != resource.RLIM_INFINITY and limit < ADDRESSES:
        raise PlaceError(
            f"the address space is limited to {limit >> 20} MiB, at least {ADDRESSES >> 20} MiB are needed",
            "raise the limit: ulimit -v unlimited",
        )
    return asked or min(8, len(os.sched_getaffinity(0)))


def together(work: Callable[[], None], threads: int, halt: threading.Event) -> None:
    """`work` in several threads at once. What the first to fail raises is raised, once all have ended; it sets `halt`
    for the others.

    So does a signal that arrives meanwhile. Not by concurrent.futures: importing it takes a tenth of starting up.
    """
    failures: list[BaseException] = []

    def run(ended: threading.Event) -> None:
        try:
            work()
        except BaseException as error:
            failures.append(error)
            halt.set()
        finally:
            ended.set()

    # Not Thread.join: until Python 3.12 a signal that interrupts it makes it take the thread for ended.
    ends: list[threading.Event] = []
    try:
        for n in range(threads):
            ended = threading.Event()
            threading.Thread(target=run, args=(ended,), name=f"reshard-{n}", daemon=True).start()
            ends.append(ended)
        for ended in ends:
            while not ended.wait(0.2):  # bounded, so that a signal is handled at once
                pass
    except BaseException:
        halt.set()
        for ended in ends:
            ended.wait()
        raise
    if failures:
        raise failures[0]


def each(items: Iterable[T], work: Callable[[T], None], threads: int, halt: threading.Event | None = None) -> None:
    """`work` on every item; items are made when they are taken. What the first to fail raises is raised,
    once all have ended.
    """
    waiting, lock, stop = iter(items), threading.Lock(), halt or threading.Event()

    def run() -> None:
        while not stop.is_set():
            with lock:
                item = next(waiting, None)
            if item is None:
                return
            work(item)

    together(run, threads, stop)
