"""Ranks as threads of one process: cheap enough to test many families on many meshes."""

import threading
from collections import Counter
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from .collectives import Ranks, Shape, World, text_of, uneven
from .lost import Lost, differing

T = TypeVar("T")


class _Room:
    """One exchange of one group: the text and the tensor of each rank."""

    def __init__(self, lock: threading.Lock) -> None:
        self.full = threading.Condition(lock)
        self.parts: dict[int, tuple[str, Tensor]] = {}
        self.left = 0


class _Board:
    """What ranks that are threads share: a room for each exchange, who has ended, the first failure."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.rooms: dict[tuple[object, ...], _Room] = {}
        self.ended: set[int] = set()
        self.failure: tuple[int, str, BaseException] | None = None

    def end(self, rank: int, phase: str, error: BaseException | None) -> None:
        with self.lock:
            self.ended.add(rank)
            if error is not None and self.failure is None:
                self.failure = (rank, phase, error)
            for room in self.rooms.values():
                room.full.notify_all()


class Threads(World):
    """A rank that is a thread of this process."""

    def __init__(self, rank: int, size: int, board: _Board, timeout: float) -> None:
        super().__init__(rank, size)
        self._board, self._timeout = board, timeout
        self._turns: Counter[tuple[object, ...]] = Counter()

    def _meet(self, what: str) -> None:
        self._gathered(torch.empty(0), torch.float32, tuple(range(self.size)), [(0,)] * self.size, what)

    def check(self) -> None:
        if (failure := self._board.failure) is not None:
            raise Lost(f"rank {failure[0]} failed in {failure[1]}: {failure[2]}")

    def fail(self, error: BaseException) -> None:
        self._board.end(self.rank, self.phase, error)

    def _gathered(
        self, x: Tensor, dtype: torch.dtype, ranks: Ranks, shapes: Sequence[Shape], what: str
    ) -> list[Tensor]:
        turn = self._turns[ranks]
        self._turns[ranks] += 1
        x = x.to(dtype)
        mine = text_of(what, () if uneven(shapes) else x.shape, dtype)
        self._put((ranks, turn), ranks, mine, x)
        parts = self._take((ranks, turn), ranks, len(ranks), mine)
        self._compare(ranks, [text for text, _ in parts])
        for rank, (_, part), shape in zip(ranks, parts, shapes, strict=True):
            if tuple(part.shape) != tuple(shape):
                raise Lost(
                    f"rank {rank} diverged in {self.phase}: "
                    f"it has {list(part.shape)} for {what}, its share is {list(shape)}"
                )
        return [part for _, part in parts]

    def _send(self, x: Tensor, to: int) -> None:
        self._put((self.rank, to, self._turn("send", to)), (self.rank,), text_of("pass", x.shape, x.dtype), x)

    def _recv(self, shape: tuple[int, ...], dtype: torch.dtype, source: int, device: torch.device) -> Tensor:
        key, wanted = (source, self.rank, self._turn("recv", source)), text_of("pass", shape, dtype)
        ((text, part),) = self._take(key, (source,), 1, wanted)
        self._compare((self.rank, source), [wanted, text])
        return part.to(device)

    def _turn(self, way: str, peer: int) -> int:
        self._turns[way, peer] += 1
        return self._turns[way, peer]

    def _compare(self, ranks: Sequence[int], texts: Sequence[str]) -> None:
        if (odd := differing(dict(zip(ranks, texts, strict=True)))) is not None:
            raise Lost(f"rank {odd[0]} diverged in {self.phase}: {odd[1]}")

    def _put(self, key: tuple[object, ...], writers: Ranks, text: str, x: Tensor) -> None:
        board = self._board
        with board.lock:
            room = board.rooms.setdefault(key, _Room(board.lock))
            room.parts[self.rank] = (text, x.clone())
            if len(room.parts) == len(writers):
                room.full.notify_all()

    def _take(self, key: tuple[object, ...], writers: Ranks, readers: int, text: str) -> list[tuple[str, Tensor]]:
        board = self._board
        with board.lock:
            room = board.rooms.setdefault(key, _Room(board.lock))

            def over() -> bool:
                return (
                    len(room.parts) == len(writers)
                    or board.failure is not None
                    or not board.ended.isdisjoint(set(writers) - room.parts.keys())
                )

            room.full.wait_for(over, self._timeout)
            if len(room.parts) < len(writers):
                missing = min(set(writers) - room.parts.keys())
                if board.failure is not None:
                    rank, phase, error = board.failure
                    raise Lost(f"rank {rank} failed in {phase}: {error}")
                if missing in board.ended:
                    raise Lost(f"rank {missing} ended in {self.phase}, but was expected at: {text}")
                raise Lost(f"rank {missing} did not reach {text} within {self._timeout:g} s in {self.phase}")
            room.left += 1
            if room.left == readers:
                del board.rooms[key]
            return [room.parts[rank] for rank in writers]


def run_threads(size: int, work: Callable[[World], T], timeout: float = 60.0) -> list[T]:
    """`work` once per rank, each in a thread; the results in rank order. Raises the first failure."""
    board = _Board()
    results: dict[int, T] = {}

    def body(world: Threads) -> None:
        try:
            results[world.rank] = work(world)
        except BaseException as error:
            board.end(world.rank, world.phase, error)
        else:
            board.end(world.rank, world.phase, None)

    threads = [
        threading.Thread(target=body, args=(Threads(rank, size, board, timeout),), name=f"rank-{rank}")
        for rank in range(size)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if board.failure is not None:
        raise board.failure[2]
    return [results[rank] for rank in range(size)]


def alone() -> World:
    """A job of one rank."""
    return Threads(0, 1, _Board(), 0)
