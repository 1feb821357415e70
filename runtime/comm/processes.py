"""Ranks as processes: torch.distributed, with gloo or NCCL, watched by a heartbeat."""

import ctypes
import os
import zlib
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor

from .collectives import Ranks, Shape, World, text_of, uneven
from .heartbeat import WAIT, lifeline
from .lost import Lost
from .shm import ROOM, Exchange, Sent, Shared, shared
from .threads import alone

_HEAD = 16  # bytes in front of a message: what it is, and its number
_KINDS = 256  # kinds of exchange whose views are cached


class Processes(World):
    """A rank that is a process: torch.distributed, which must be initialised.

    `groups`: the groups of ranks to create now; others are created when first used. The processes watch each other
    (`heartbeat`): if one is lost, the others raise Lost or exit with 3 within `timeout` seconds. A collective times out
    after half of that.
    """

    def __init__(self, groups: Sequence[Sequence[int]] = (), timeout: float = 60.0) -> None:
        from torch import distributed

        super().__init__(distributed.get_rank(), distributed.get_world_size())
        self._dist: Any = distributed
        self._timeout = timeout
        self._groups: dict[Ranks, Any] = {}
        self._frames: dict[Ranks, Sent | Shared] = {}
        self._kinds: dict[Any, tuple[Exchange | None, str, int]] = {}
        self._turns: defaultdict[object, int] = defaultdict(int)
        self._life = lifeline(self.rank, self.size, timeout)
        for ranks in sorted({tuple(ranks) for ranks in groups if len(ranks) > 1 and self.rank in ranks}):
            with self._inside(ranks, f"make the group of ranks {ranks}"):
                self._group(ranks)

    def fail(self, error: BaseException) -> None:
        self._life.fail(error)

    def end(self) -> None:
        self._life.close()

    def check(self) -> None:
        self._life.steps += 1
        if (verdict := self._life.take()) is not None:
            raise Lost(verdict)

    def _meet(self, what: str) -> None:
        if (verdict := self._life.meet(what)) is not None:
            raise Lost(verdict)

    def _announce(self, phase: str) -> None:
        self._life.say(phase=phase)

    def _group(self, ranks: Ranks) -> "Sent | Shared":
        """The frames of some ranks, and their process group, created by these ranks alone when they first need it."""
        if ranks not in self._frames:
            wait, me = self._timeout * WAIT, ranks.index(self.rank)
            with _greetings_aside():
                group = self._dist.new_group(
                    list(ranks), timeout=timedelta(seconds=wait), use_local_synchronization=True
                )
            found: Sent | Shared | None = None
            if group.name() == "gloo" and self._life.near(ranks):
                name = f"reshard/frames/{self._life.job}/{next(self._life.numbers[ranks])}/{ranks}"
                found = shared(self._life.store, name, group, me, len(ranks), wait, self._look)
            self._groups[ranks], self._frames[ranks] = group, found or Sent(group, me, len(ranks))
        return self._frames[ranks]

    def _look(self) -> None:
        if self._life.verdict is not None:
            raise RuntimeError("the job is lost")

    @contextmanager
    def _inside(self, ranks: Ranks, text: str, turn: int = 0) -> Iterator[None]:
        """A watched collective: if it fails, or the job is lost, raises Lost with the cause."""
        self.check()
        self._life.enter(text, turn)
        try:
            yield
        except RuntimeError as error:
            raise Lost(self._life.why(ranks, text, turn, error)) from error
        finally:
            self._life.leave()

    def _gathered(
        self, x: Tensor, dtype: torch.dtype, ranks: Ranks, shapes: Sequence[Shape], what: str
    ) -> list[Tensor]:
        if x.device.type != "cpu":
            return self._gathered_elsewhere(x.to(dtype), ranks, shapes, what)
        kind = (ranks, what, dtype, tuple(map(tuple, shapes)))
        exchange, text, code = self._kinds.get(kind) or self._kind(kind)
        turn = self._turns[ranks] = self._turns[ranks] + 1
        with self._inside(ranks, text, turn):
            if x.shape != torch.Size(shapes[ranks.index(self.rank)]):
                raise RuntimeError(f"rank {self.rank} has {list(x.shape)}")
            frames = self._frames[ranks]
            if exchange is None:  # too large for a frame: exchanged separately, once all ranks agree on what it is
                if not frames.swap(turn, code):
                    raise RuntimeError("the ranks brought different things")
                return self._gathered_elsewhere(x.to(dtype), ranks, shapes, what)
            parity = turn % frames.parities
            exchange.mine[parity].copy_(x)
            if not frames.swap(turn, code):
                raise RuntimeError("the ranks brought different things")
            return exchange.every[parity]

    def _kind(
        self, kind: tuple[Ranks, str, torch.dtype, tuple[tuple[int, ...], ...]]
    ) -> "tuple[Exchange | None, str, int]":
        """Create the views of a new kind of exchange, its text, and a checksum of that."""
        ranks, what, dtype, shapes = kind
        text = text_of(what, () if uneven(shapes) else shapes[0], dtype)
        with self._inside(ranks, f"make the group of ranks {ranks}"):
            frames = self._group(ranks)
        small = max(torch.Size(shape).numel() for shape in shapes) * dtype.itemsize <= frames.room
        if len(self._kinds) >= _KINDS:
            self._kinds.clear()
        code = zlib.crc32(f"{text} {shapes}".encode())
        found = self._kinds[kind] = (Exchange(frames, dtype, shapes) if small else None, text, code)
        return found

    def _gathered_elsewhere(self, x: Tensor, ranks: Ranks, shapes: Sequence[Shape], what: str) -> list[Tensor]:
        """Exchange large tensors, or tensors on a GPU (where checking heads would cost more), padded to the largest."""
        sizes = [torch.Size(shape).numel() * x.element_size() for shape in shapes]
        mine = torch.empty(max(sizes), dtype=torch.uint8, device=x.device)
        if x.numel():
            mine[: x.nbytes].view(x.dtype).view(x.shape).copy_(x)
        every = mine.new_empty(len(ranks), mine.numel())
        if x.device.type == "cpu":
            self._groups[ranks]._allgather_base(every.view(-1), mine).wait()
        else:
            with self._inside(ranks, text_of(what, x.shape, x.dtype)):
                self._group(ranks)
                self._groups[ranks]._allgather_base(every.view(-1), mine).wait()
        return [
            part[:size].view(x.dtype).view(torch.Size(shape))
            for part, size, shape in zip(every, sizes, shapes, strict=True)
        ]

    def _send(self, x: Tensor, to: int) -> None:
        text, turn = text_of("pass", x.shape, x.dtype), self._next(self.rank, to)
        with self._inside((self.rank, to), text, turn):
            group, small = self._all(), _HEAD + x.nbytes <= ROOM
            if x.device.type == "cpu":
                frame = torch.empty(ROOM, dtype=torch.uint8)
                frame[:_HEAD] = _head(text, turn)
                if small and x.numel():
                    frame[_HEAD : _HEAD + x.nbytes].view(x.dtype).view(x.shape).copy_(x)
                self._dist.send(frame, to, group=group)
            if x.device.type != "cpu" or not small:
                self._dist.send(x.contiguous(), to, group=group)

    def _recv(self, shape: tuple[int, ...], dtype: torch.dtype, source: int, device: torch.device) -> Tensor:
        text, turn = text_of("pass", shape, dtype), self._next(source, self.rank)
        found = torch.empty(shape, dtype=dtype, device=device)
        with self._inside((source, self.rank), text, turn):
            group, small = self._all(), _HEAD + found.nbytes <= ROOM
            if device.type == "cpu":
                frame = torch.empty(ROOM, dtype=torch.uint8)
                self._dist.recv(frame, source, group=group)
                if not torch.equal(frame[:_HEAD], _head(text, turn)):
                    raise RuntimeError("the sender sent something else")
                if small:
                    return frame[_HEAD : _HEAD + found.nbytes].view(dtype).view(shape)
            self._dist.recv(found, source, group=group)
        return found

    def _all(self) -> Any:
        every = tuple(range(self.size))
        self._group(every)
        return self._groups[every]

    def _next(self, source: int, to: int) -> int:
        self._turns[source, to, "pass"] += 1
        return self._turns[source, to, "pass"]


def _head(text: str, turn: int) -> Tensor:
    return torch.frombuffer(
        bytearray(zlib.crc32(text.encode()).to_bytes(8, "little") + turn.to_bytes(8, "little")), dtype=torch.uint8
    )


@contextmanager
def joined(backend: str, forked: int | None, timeout: float) -> Iterator[World]:
    """This process as a rank of the job that the environment describes (RANK, WORLD_SIZE, …), with its share of CPUs.

    `forked`: the number of ranks, if they are forks of one process (`launch`); None under torchrun. Errors raised
    inside are reported to the other ranks.
    """
    from torch import distributed

    size, here = int(os.environ["WORLD_SIZE"]), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS") or 0) or max(1, len(os.sched_getaffinity(0)) // here))
    world: World = alone()
    if size > 1:
        _join(backend, forked, timeout)
        world = Processes(timeout=timeout)
    try:
        with world.failing():
            yield world
        world.end()
    finally:
        if size > 1:
            with suppress(RuntimeError):
                distributed.destroy_process_group()


@contextmanager
def _greetings_aside() -> Iterator[None]:
    """What libraries print on stdout is dropped: gloo of torch 2.8 greets there, where results belong."""
    kept, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.close(nowhere)
    try:
        yield
    finally:
        ctypes.CDLL(None).fflush(None)
        os.dup2(kept, 1)
        os.close(kept)


def _join(backend: str, forked: int | None, timeout: float) -> None:
    """Initialise torch.distributed."""
    from torch import distributed
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    limit = timedelta(seconds=timeout)
    try:
        if forked is None:
            with _greetings_aside():
                distributed.init_process_group(backend, timeout=limit)
            return
        rank = int(os.environ["RANK"])
        store = TCPStore("127.0.0.1", int(os.environ["MASTER_PORT"]), forked, is_master=False, timeout=limit)
        with _greetings_aside():
            distributed.init_process_group(backend, store=store, rank=rank, world_size=forked, timeout=limit)
    except RuntimeError as error:
        words = str(error).splitlines()[0]
        raise Lost(f"rank {os.environ['RANK']} cannot join: {words}", "start all ranks at the same time") from None
