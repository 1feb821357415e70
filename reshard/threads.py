"""Threads: work on many items by a few threads, each taking the next item when it is free."""

import os
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


def count(asked: int = 0) -> int:
    """How many threads there are to be: as many as were asked for, or as there are cores for, at most eight."""
    return asked or min(8, len(os.sched_getaffinity(0)))


def each(items: Iterable[T], work: Callable[[T], None], threads: int) -> None:
    """`work` on every item; items are made when they are taken. What the first to fail raises is raised, once all have ended."""
    waiting, lock, stop = iter(items), threading.Lock(), threading.Event()

    def run() -> None:
        while not stop.is_set():
            with lock:
                item = next(waiting, None)
            if item is None:
                return
            work(item)

    with ThreadPoolExecutor(threads) as executor:
        running = [executor.submit(run) for _ in range(threads)]
        try:
            for future in running:
                future.result()
        finally:
            stop.set()  # the executor waits for what is under way
