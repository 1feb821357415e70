"""One rank's tensors, read through the plan from a directory of any other layout, each rank reading only what it needs.

Long runs are read straight into place, the rest through the engine's buffers. Knows nothing about models.
"""

import math
import mmap
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reshard.containers.entry import Entry

from .cast import Cast
from .mapped import State, view

if TYPE_CHECKING:
    from reshard.checkpoints.source import Source
    from reshard.engine.worker import Key
    from reshard.layout.cut import Layout, Point
    from reshard.layout.join import Component, Copy, Plan

_DIRECT = 128  # bytes: the shortest run read by a system call of its own; shorter ones are read with what is between
_HUGE = 2 << 20  # bytes


class Reader:
    """Reads the tensors of one rank of a layout from any source, straight into place; `read` counts bytes."""

    def __init__(
        self,
        source: "Source",
        layout: "Layout",
        rank: int,
        cast: Cast,
        check: Callable[[], None],
        only: Callable[[str], bool],
    ) -> None:
        from reshard.checkpoints.shards import Shards

        self.source, self.layout, self.rank, self.cast, self.check, self.only = source, layout, rank, cast, check, only
        self.shard = Shards(layout).shard(rank)
        self.entries = self.shard.header.entries
        self.read = 0
        self._state: State = {}
        self._lock = threading.Lock()
        self._filled: dict[str, memoryview] = {}
        self._memory: dict[str, mmap.mmap] = {}

    def run(self, threads: int) -> State:
        """Read everything, with this many threads."""
        from reshard.layout.join import plan
        from reshard.store.local import Pool

        joined: Plan = plan(self.source.layout, self.layout, ranks=[self.rank])
        self._pool: Pool = Pool()
        self._own = threading.local()
        stop = threading.Event()

        def work(component: "Component", at: "Point") -> None:
            if not stop.is_set():
                try:
                    self.check()
                    self._job([copy for copy in component.copies(at) if self.only(copy.dst_name)])
                except BaseException:
                    stop.set()
                    raise

        try:
            with ThreadPoolExecutor(threads, "load") as executor:
                jobs = [
                    executor.submit(work, component, at) for component in joined.components for at in component.points()
                ]
                try:
                    for job in jobs:
                        job.result()
                finally:
                    stop.set()
        finally:
            self._pool.close()
        names = [name for name, _, _ in self.shard.tensors if self.only(name)]
        self._finish(name for name in names if name not in self._state)  # all padding, or empty
        return {name: self._state[name] for name in names}

    def _job(self, copies: "list[Copy]") -> None:
        """All copies into some tensors: long runs directly, the rest through the engine's buffers."""
        from reshard.engine.worker import Worker

        rest = [copy for copy in copies if not self._direct(copy)]
        if rest:
            worker = getattr(self._own, "worker", None)
            if worker is None:
                worker = self._own.worker = Worker(self.source, self, self, self._pool, self._count)
            worker.job(rest)
        self._finish(dict.fromkeys(copy.dst_name for copy in copies))

    def _direct(self, copy: "Copy") -> bool:
        from reshard.engine.items import in_items

        path, entry = self.source.locate((copy.src.rank, copy.src_name))
        start, to, dims, item = in_items(copy, entry, self.entries[copy.dst_name])
        *outer, (run, src, dst) = dims or ((1, 1, 1),)
        if (src, dst) != (1, 1) or (run * item < _DIRECT and outer):
            return False
        buffer = self._buffer(copy.dst_name)
        for at in product(*(range(n) for n, _, _ in outer)):
            offset = start + sum(i * s for i, (_, s, _) in zip(at, outer, strict=True))
            place = (to + sum(i * d for i, (_, _, d) in zip(at, outer, strict=True))) * item
            self._pool.read_into(path, entry.offset + offset * item, buffer[place : place + run * item])
        self._count(math.prod(n for n, _, _ in dims) * item)
        return True

    def _count(self, nbytes: int) -> None:
        with self._lock:
            self.read += nbytes

    def _buffer(self, name: str) -> memoryview:
        """A tensor's memory, zero at first, in pages that the system provides when they are touched."""
        with self._lock:
            if name not in self._memory:
                memory = self._memory[name] = mmap.mmap(-1, self.entries[name].nbytes)
                if len(memory) >= _HUGE and hasattr(mmap, "MADV_HUGEPAGE"):
                    memory.madvise(mmap.MADV_HUGEPAGE)
                self._filled[name] = memoryview(memory)
            return self._filled[name]

    def _finish(self, names: Iterable[str]) -> None:
        for name in names:
            entry = self.entries[name]
            if entry.nbytes:
                self._buffer(name)
            with self._lock:
                memory = self._memory.pop(name, None)
                self._filled.pop(name, None)
            self._state[name] = self.cast(name, view(memory, entry, 0))

    # The interface that the engine's worker needs.

    def locate(self, key: "Key") -> tuple[Path, Entry]:
        return Path(), self.entries[key[1]]

    def put(self, key: "Key", offset: int, data: memoryview) -> None:
        self._buffer(key[1])[offset : offset + len(data)] = data

    def done(self, keys: Any) -> None:
        """The job finishes tensors, once the direct reads are done too."""
