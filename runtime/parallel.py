"""Collectives: how the ranks of one job exchange tensors. One small interface, two implementations; knows nothing about models.

`Threads` runs the ranks as threads of one process, which makes a matrix of families and meshes cheap to check; `Processes` is
torch.distributed (gloo or NCCL), as torchrun starts it. The same program gives the same results on both: sums are taken in the order
of the ranks, in float32 where tensors have 16 bits.
"""

import threading
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


class Lost(RuntimeError):
    """A rank of the job died, hung or went another way; the message names it and the phase."""


class World(ABC):
    """One rank's view of all ranks of a job: who it is, and what it can do together with others.

    `counts` has the number of collectives by the label that the caller gave, `seconds` the time spent in them.
    """

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size
        self.counts: Counter[str] = Counter()
        self.seconds = 0.0
        self.phase = "start"

    def all_reduce(self, x: Tensor, ranks: Sequence[int], label: str) -> Tensor:
        """The sum of the ranks' tensors, in float32 on the way where they have 16 bits; `x` itself where the rank is alone."""
        if len(ranks) == 1:
            return x
        wide = x.float() if x.element_size() < 4 else x
        parts = self._exchange(wide, ranks, label)
        total = parts[0].clone()
        for part in parts[1:]:
            total += part
        return total.to(x.dtype)

    def all_gather(self, x: Tensor, ranks: Sequence[int], sizes: Sequence[int], dim: int, label: str) -> Tensor:
        """The ranks' tensors side by side along `dim`; `sizes` says how many rows each has there."""
        if len(ranks) == 1:
            return x
        dim %= x.dim()
        shapes = [(*x.shape[:dim], size, *x.shape[dim + 1 :]) for size in sizes]
        return torch.cat(self._exchange(x.contiguous(), ranks, label, shapes), dim)

    def _exchange(self, x: Tensor, ranks: Sequence[int], label: str, shapes: Sequence[Sequence[int]] | None = None) -> list[Tensor]:
        began = time.perf_counter()
        parts = self.exchange(x, tuple(ranks), shapes or [x.shape] * len(ranks))
        self.counts[label] += 1
        self.seconds += time.perf_counter() - began
        return parts

    @abstractmethod
    def exchange(self, x: Tensor, ranks: tuple[int, ...], shapes: Sequence[Sequence[int]]) -> list[Tensor]:
        """Every given rank's tensor, in the order of the ranks; called by all of them."""

    @abstractmethod
    def send(self, x: Tensor, to: int) -> None: ...

    @abstractmethod
    def recv(self, shape: Sequence[int], dtype: torch.dtype, source: int) -> Tensor: ...


class _Board:
    """What ranks that are threads share: a place for each message, and the first failure."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.messages: dict[tuple[object, ...], Tensor] = {}
        self.taken: Counter[tuple[object, ...]] = Counter()
        self.failure: tuple[int, str, BaseException] | None = None


class Threads(World):
    """A rank that is a thread of this process."""

    def __init__(self, rank: int, size: int, board: _Board, timeout: float) -> None:
        super().__init__(rank, size)
        self._board, self._timeout = board, timeout
        self._turns: Counter[tuple[object, ...]] = Counter()

    def exchange(self, x: Tensor, ranks: tuple[int, ...], shapes: Sequence[Sequence[int]]) -> list[Tensor]:
        turn = self._turns[ranks]
        self._turns[ranks] += 1
        self._post((ranks, turn, self.rank), x)
        parts = [self._take((ranks, turn, rank), rank, len(ranks)) for rank in ranks]
        for rank, part, shape in zip(ranks, parts, shapes, strict=True):
            if tuple(part.shape) != tuple(shape) or part.dtype != x.dtype:
                raise Lost(f"rank {rank} diverged: it brought {list(part.shape)} {part.dtype}, {list(shape)} {x.dtype} was expected, {self.phase}")
        return parts

    def send(self, x: Tensor, to: int) -> None:
        self._post((self.rank, to, self._turn("send", to)), x)

    def recv(self, shape: Sequence[int], dtype: torch.dtype, source: int) -> Tensor:
        return self._take((source, self.rank, self._turn("recv", source)), source, 1)

    def _turn(self, way: str, peer: int) -> int:
        self._turns[way, peer] += 1
        return self._turns[way, peer]

    def _post(self, key: tuple[object, ...], x: Tensor) -> None:
        with self._board.changed:
            self._board.messages[key] = x.clone()
            self._board.changed.notify_all()

    def _take(self, key: tuple[object, ...], of: int, readers: int) -> Tensor:
        board = self._board
        with board.changed:
            board.changed.wait_for(lambda: key in board.messages or board.failure is not None, self._timeout)
            if key not in board.messages:
                if board.failure is not None:
                    raise Lost(f"rank {board.failure[0]} failed, {board.failure[1]}: {board.failure[2]}")
                raise Lost(f"rank {of} did not answer for {self._timeout:g} s, {self.phase}")
            x = board.messages[key]
            board.taken[key] += 1
            if board.taken[key] == readers:
                del board.messages[key], board.taken[key]
            return x


def run_threads(size: int, work: Callable[[World], T], timeout: float = 60.0) -> list[T]:
    """`work` once per rank, each in a thread; their results in the order of the ranks. The first failure is raised."""
    board = _Board()
    results: dict[int, T] = {}

    def body(world: Threads) -> None:
        try:
            results[world.rank] = work(world)
        except BaseException as error:
            with board.changed:
                if board.failure is None:
                    board.failure = (world.rank, world.phase, error)
                board.changed.notify_all()

    threads = [threading.Thread(target=body, args=(Threads(rank, size, board, timeout),), name=f"rank-{rank}") for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if board.failure is not None:
        raise board.failure[2]
    return [results[rank] for rank in range(size)]


class Processes(World):
    """A rank that is a process: torch.distributed, which must be initialised. `groups`: every set of ranks that will exchange."""

    def __init__(self, groups: Sequence[Sequence[int]], timeout: float = 60.0) -> None:
        from torch import distributed as dist

        super().__init__(dist.get_rank(), dist.get_world_size())
        self._dist = dist
        limit = timedelta(seconds=timeout)
        every = sorted({tuple(ranks) for ranks in groups if len(ranks) > 1})  # all ranks make all groups, in one order
        self._groups = {ranks: dist.new_group(list(ranks), timeout=limit) for ranks in every}

    def exchange(self, x: Tensor, ranks: tuple[int, ...], shapes: Sequence[Sequence[int]]) -> list[Tensor]:
        most = max(shapes, key=lambda shape: torch.Size(shape).numel())
        room = torch.Size(most).numel()
        flat = x.new_zeros(room)
        flat[: x.numel()] = x.reshape(-1)
        parts = [torch.empty_like(flat) for _ in ranks]
        self._dist.all_gather(parts, flat, group=self._groups[ranks])
        return [part[: torch.Size(shape).numel()].reshape(torch.Size(shape)) for part, shape in zip(parts, shapes, strict=True)]

    def send(self, x: Tensor, to: int) -> None:
        self._dist.send(x.contiguous(), to)

    def recv(self, shape: Sequence[int], dtype: torch.dtype, source: int) -> Tensor:
        x = torch.empty(*shape, dtype=dtype)
        self._dist.recv(x, source)
        return x
