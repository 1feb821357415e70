"""Frames: the memory through which the ranks of a group exchange small tensors, a hundred times per token.

    Sent      each rank's frame goes to the others by gloo: about 100 µs on one machine
    Shared    the frames are in memory shared by ranks on one machine: each writes its own and waits: about 10 µs

A frame is a head of 64 bytes and a fixed payload, so that ranks that diverge still exchange messages of one size: gloo
aborts a process that receives more than it expects. The head identifies the contents. Knows nothing about models.
"""

import mmap
import os
import platform
import secrets
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

HEAD = 64  # bytes: turn, what
ROOM = 16 << 10  # bytes, all sent each time: up to this size they cost next to nothing
SHARED_ROOM = 256 << 10  # bytes: pages that are never touched cost nothing

_SPIN = 100e-6  # seconds of busy waiting before a rank sleeps: it may keep the others off the CPU
_NAP = 50e-6  # seconds
_MEMORY = Path("/dev/shm")


class Sent:
    """Frames of ranks on any machines; `parities`: how many sets of frames there are."""

    parities, room = 1, ROOM

    def __init__(self, group: Any, me: int, count: int) -> None:
        self.group, self.me, self.count = group, me, count
        self._mine, self._every = (
            torch.empty(HEAD + ROOM, dtype=torch.uint8),
            torch.empty(count, HEAD + ROOM, dtype=torch.uint8),
        )
        self._flat = self._every.view(-1)
        self._head = _words(self._mine)
        self._heads = [_words(row) for row in self._every]

    def mine(self, parity: int) -> Tensor:
        """[room] this rank's bytes."""
        return self._mine[HEAD:]

    def every(self, parity: int) -> list[Tensor]:
        """Each rank's bytes."""
        return [row[HEAD:] for row in self._every]

    def swap(self, turn: int, what: int) -> bool:
        """Exchange `mine`. Returns whether all ranks were at the same turn, with the same kind of contents."""
        self._head[0], self._head[1] = turn, what
        # The group's method, not the public one, which logs and was renamed.
        self.group._allgather_base(self._flat, self._mine).wait()
        return all(head[0] == turn and head[1] == what for head in self._heads)


def _words(x: Tensor) -> memoryview:
    view: Any = x.numpy()
    return memoryview(view).cast("q")


class Shared:
    """Frames of ranks on one machine. Two sets are used in turn: a rank writes one again only after all ranks
    have written the other, and so have read this one.

    Only where stores become visible in program order (x86): the turn is written last.
    """

    parities, room = 2, SHARED_ROOM

    def __init__(self, memory: mmap.mmap, me: int, count: int, wait: float, check: Callable[[], None]) -> None:
        self.me, self.count, self.wait, self.check = me, count, wait, check
        size = HEAD + SHARED_ROOM
        self._frames = torch.frombuffer(memory, dtype=torch.uint8).view(2, count, size)
        self._heads = [
            [memoryview(memory)[at * size : at * size + HEAD].cast("q") for at in range(p * count, (p + 1) * count)]
            for p in (0, 1)
        ]

    def mine(self, parity: int) -> Tensor:
        return self._frames[parity, self.me, HEAD:]

    def every(self, parity: int) -> list[Tensor]:
        return [frame[HEAD:] for frame in self._frames[parity]]

    def swap(self, turn: int, what: int) -> bool:
        heads = self._heads[turn % 2]
        mine = heads[self.me]
        mine[1] = what
        mine[0] = turn
        began = time.perf_counter()
        for head in heads:
            looked = 0
            while head[0] < turn:
                looked += 1
                if looked % 32:
                    continue
                now = time.perf_counter() - began
                if now > self.wait:
                    raise RuntimeError(f"timed out after {self.wait:g} s")
                self.check()
                time.sleep(0 if now < _SPIN else _NAP)
        return all(head[0] == turn and head[1] == what for head in heads)


def shared(
    store: Any, name: str, group: Any, me: int, count: int, wait: float, check: Callable[[], None]
) -> Shared | None:
    """Shared memory of a group on one machine; None, on all ranks, if one of them cannot map it."""
    memory, path = None, None
    size = 2 * count * (HEAD + SHARED_ROOM)
    if platform.machine() == "x86_64":
        with suppress(OSError, RuntimeError):
            if me == 0:
                path = _MEMORY / f"reshard-{secrets.token_hex(8)}"
                descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
                try:
                    os.posix_fallocate(descriptor, 0, size)  # a lack of memory is an error now, not a signal later
                    memory = mmap.mmap(descriptor, size)
                finally:
                    os.close(descriptor)
                store.set(name, str(path))
            else:
                store.wait([name], timedelta(seconds=wait))
                descriptor = os.open(store.get(name).decode(), os.O_RDWR | os.O_CLOEXEC)
                try:
                    memory = mmap.mmap(descriptor, size)
                finally:
                    os.close(descriptor)
    try:
        if me == 0 and memory is None:
            store.set(name, "")
        have = torch.empty(count, dtype=torch.uint8)
        group._allgather_base(have, torch.tensor([memory is not None], dtype=torch.uint8)).wait()
    finally:
        if path is not None:
            with suppress(OSError):  # already gone, or on a read-only file system
                path.unlink()
    return Shared(memory, me, count, wait, check) if memory is not None and bool(have.all()) else None


class Exchange:
    """One kind of exchange: cached views of the frames as the tensors of each rank."""

    def __init__(self, frames: "Sent | Shared", dtype: torch.dtype, shapes: Sequence[Sequence[int]]) -> None:
        sizes = [torch.Size(shape).numel() * dtype.itemsize for shape in shapes]
        me = frames.me
        self.mine = [_view(frames.mine(parity), dtype, sizes[me], shapes[me]) for parity in range(frames.parities)]
        self.every = [
            [
                _view(part, dtype, size, shape)
                for part, size, shape in zip(frames.every(parity), sizes, shapes, strict=True)
            ]
            for parity in range(frames.parities)
        ]


def _view(part: Tensor, dtype: torch.dtype, size: int, shape: Sequence[int]) -> Tensor:
    return part[:size].view(dtype).view(torch.Size(shape))
