"""Collectives: how the ranks of one job exchange tensors. One small interface, two implementations; knows nothing about models.

`Threads` runs the ranks as threads of one process, which makes a matrix of families and meshes cheap to check; `Processes` is
torch.distributed (gloo or NCCL), as torchrun starts it. The same program gives the same results on both: sums are taken in the order
of the ranks, in float32 where tensors have 16 bits. What is exchanged carries what it is, so that ranks that went different ways are
told apart instead of waiting for each other.
"""

import json
import os
import threading
import time
import zlib
from abc import ABC, abstractmethod
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from .heartbeat import WAIT, lifeline
from .lost import Lost, differing
from .shm import ROOM, Exchange, Sent, Shared, shared

if TYPE_CHECKING:
    from reshard.layout.mesh import Mesh

T = TypeVar("T")
Ranks = tuple[int, ...]
Shape = Sequence[int]

_FACT = 96  # bytes of a text on which ranks agree
_HEAD = 16  # bytes before a message: what it is and which
_KINDS = 256  # kinds of exchange whose views are kept


def groups(mesh: "Mesh") -> list[Ranks]:
    """Every set of ranks that exchange on a mesh: the tensor-parallel ranks of each stage, those that share experts, and all.

    >>> groups(Mesh(tp=2, pp=2))
    [(0, 1), (2, 3), (0, 1, 2, 3)]
    """
    found: dict[Ranks, None] = {}
    for first in range(0, mesh.world, mesh.tp):
        stage = range(first, first + mesh.tp)
        found[tuple(stage)] = None
        if mesh.ep > 1:
            found |= {tuple(stage[at : at + mesh.etp]): None for at in range(0, mesh.tp, mesh.etp)}
            found |= {tuple(stage[at :: mesh.etp]): None for at in range(mesh.etp)}
    found[tuple(range(mesh.world))] = None
    return [ranks for ranks in found if len(ranks) > 1]


class World(ABC):
    """One rank's view of all ranks of a job: who it is, and what it can do together with others.

    `counts` has the number of collectives by the label that the caller gave, `seconds` the time spent in them. `phase` is what the
    caller is about ("load", "prefill", "decode"): messages about a lost rank say it.
    """

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size
        self.counts: Counter[str] = Counter()
        self.seconds = 0.0
        self._phase = "start"

    @property
    def phase(self) -> str:
        return self._phase

    @phase.setter
    def phase(self, phase: str) -> None:
        if phase != self._phase:
            self._phase = phase
            self._announce(phase)

    def all_reduce(self, x: Tensor, ranks: Sequence[int], label: str) -> Tensor:
        """The sum of the ranks' tensors, in float32 on the way where they have 16 bits; `x` itself where the rank is alone."""
        if len(ranks) == 1:
            return x
        wide = torch.float32 if x.is_floating_point() and x.element_size() < 4 else x.dtype
        first, second, *rest = self._exchange(x, wide, ranks, label, "sum")
        total = first + second
        for part in rest:
            total += part
        return total.to(x.dtype)

    def all_gather(self, x: Tensor, ranks: Sequence[int], sizes: Sequence[int], dim: int, label: str) -> Tensor:
        """The ranks' tensors side by side along `dim`; `sizes` says how many rows each has there."""
        if len(ranks) == 1:
            return x
        dim %= x.dim()
        shapes = [(*x.shape[:dim], size, *x.shape[dim + 1 :]) for size in sizes]
        return torch.cat(self._exchange(x, x.dtype, ranks, label, "gather", shapes), dim)

    def send(self, x: Tensor, to: int, label: str = "send") -> None:
        """Give a tensor to a rank that receives it; returns when it is under way."""
        with self._timed(label):
            self._send(x, to)

    def recv(self, shape: Shape, dtype: torch.dtype, source: int, label: str = "recv", device: torch.device | str | None = None) -> Tensor:
        """The tensor that a rank sends; ranks agree on its shape and dtype."""
        with self._timed(label):
            return self._recv(tuple(shape), dtype, source, torch.device(device or "cpu"))

    def agree(self, facts: Mapping[str, str]) -> None:
        """All ranks have the same facts, or Lost names the rank that has others."""
        if self.size == 1:
            return
        mine = torch.zeros(len(facts), _FACT, dtype=torch.uint8)
        for row, value in zip(mine, facts.values(), strict=True):
            data = value.encode()[:_FACT]
            row[: len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else 0
        parts = self._gathered(mine, mine.dtype, tuple(range(self.size)), [mine.shape] * self.size, f"agree on {', '.join(facts)}")
        for at, fact in enumerate(facts):
            said = [bytes(part[at].tolist()).rstrip(b"\0").decode(errors="replace") for part in parts]
            usual = max(said, key=said.count)  # the first of the most frequent: of two ranks, rank 0 is right
            for rank, value in enumerate(said):
                if value != usual:
                    words = f"its {fact} is {value}, that of rank {said.index(usual)} is {usual}"
                    raise Lost(f"rank {rank} diverged in {self.phase}: {words}", "all ranks need the same files and options")

    def meet(self, what: str) -> None:
        """Wait until all ranks are here, as long as those that are not do something: they call `check` meanwhile."""
        if self.size > 1:
            self._meet(what)

    @contextmanager
    def failing(self) -> Iterator[None]:
        """What is raised inside is told to the other ranks, so that they end at once."""
        try:
            yield
        except BaseException as error:
            self.fail(error)
            raise

    def _exchange(
        self, x: Tensor, dtype: torch.dtype, ranks: Sequence[int], label: str, kind: str, shapes: Sequence[Shape] | None = None
    ) -> list[Tensor]:
        with self._timed(label):
            return self._gathered(x, dtype, tuple(ranks), shapes or [x.shape] * len(ranks), f"{kind} {label}")

    @contextmanager
    def _timed(self, label: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.counts[label] += 1
        self.seconds += time.perf_counter() - began

    def _announce(self, phase: str) -> None:  # noqa: B027  threads have nobody to tell
        """A phase begins."""

    @abstractmethod
    def _meet(self, what: str) -> None: ...

    @abstractmethod
    def check(self) -> None:
        """Raise Lost if another rank is known to be lost, and show that this one gets on: for work that takes long and needs no other."""

    @abstractmethod
    def fail(self, error: BaseException) -> None:
        """Tell the others that this rank cannot go on."""

    def end(self) -> None:  # noqa: B027  threads have nobody to tell
        """Tell the others that this rank has finished: that it is gone is no loss from now on."""

    @abstractmethod
    def _gathered(self, x: Tensor, dtype: torch.dtype, ranks: Ranks, shapes: Sequence[Shape], what: str) -> list[Tensor]:
        """Every given rank's tensor as `dtype`, in the order of the ranks; called by all of them. Good until the next exchange."""

    @abstractmethod
    def _send(self, x: Tensor, to: int) -> None: ...

    @abstractmethod
    def _recv(self, shape: tuple[int, ...], dtype: torch.dtype, source: int, device: torch.device) -> Tensor: ...


def gathered(world: World, value: Any, label: str) -> list[Any]:
    """What every rank has, on every rank, in their order; values are those of JSON."""
    if world.size == 1:
        return [value]
    ranks, data = range(world.size), torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
    lengths = world.all_gather(torch.tensor([len(data)]), ranks, [1] * world.size, 0, label).tolist()
    return [json.loads(bytes(part.tolist())) for part in world.all_gather(data, ranks, lengths, 0, label).split(lengths)]


def _text(what: str, shape: Shape, dtype: torch.dtype) -> str:
    return f"{what} {list(shape)} {str(dtype).removeprefix('torch.')}"


# --- threads ---------------------------------------------------------------------------------------------------------------------


class _Room:
    """One exchange of one group: what each rank brought, as text and as a tensor."""

    def __init__(self, lock: threading.Lock) -> None:
        self.full = threading.Condition(lock)
        self.parts: dict[int, tuple[str, Tensor]] = {}
        self.left = 0


class _Board:
    """What ranks that are threads share: a room for each exchange, who has ended, and the first failure."""

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

    def _gathered(self, x: Tensor, dtype: torch.dtype, ranks: Ranks, shapes: Sequence[Shape], what: str) -> list[Tensor]:
        turn = self._turns[ranks]
        self._turns[ranks] += 1
        x = x.to(dtype)
        mine = _text(what, () if _uneven(shapes) else x.shape, dtype)
        self._put((ranks, turn), ranks, mine, x)
        parts = self._take((ranks, turn), ranks, len(ranks), mine)
        self._compare(ranks, [text for text, _ in parts])
        for rank, (_, part), shape in zip(ranks, parts, shapes, strict=True):
            if tuple(part.shape) != tuple(shape):
                raise Lost(f"rank {rank} diverged in {self.phase}: it brought {list(part.shape)} to {what}, {list(shape)} is its share")
        return [part for _, part in parts]

    def _send(self, x: Tensor, to: int) -> None:
        self._put((self.rank, to, self._turn("send", to)), (self.rank,), _text("pass", x.shape, x.dtype), x)

    def _recv(self, shape: tuple[int, ...], dtype: torch.dtype, source: int, device: torch.device) -> Tensor:
        key, wanted = (source, self.rank, self._turn("recv", source)), _text("pass", shape, dtype)
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
                    raise Lost(f"rank {missing} ended in {self.phase}, it was expected at: {text}")
                raise Lost(f"rank {missing} did not come within {self._timeout:g} s in {self.phase} to: {text}")
            room.left += 1
            if room.left == readers:
                del board.rooms[key]
            return [room.parts[rank] for rank in writers]


def _uneven(shapes: Sequence[Shape]) -> bool:
    return any(shape != shapes[0] for shape in shapes)


def run_threads(size: int, work: Callable[[World], T], timeout: float = 60.0) -> list[T]:
    """`work` once per rank, each in a thread; their results in the order of the ranks. The first failure is raised."""
    board = _Board()
    results: dict[int, T] = {}

    def body(world: Threads) -> None:
        try:
            results[world.rank] = work(world)
        except BaseException as error:
            board.end(world.rank, world.phase, error)
        else:
            board.end(world.rank, world.phase, None)

    threads = [threading.Thread(target=body, args=(Threads(rank, size, board, timeout),), name=f"rank-{rank}") for rank in range(size)]
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


# --- processes -------------------------------------------------------------------------------------------------------------------


class Processes(World):
    """A rank that is a process: torch.distributed, which must be initialised.

    `groups`: sets of ranks that will exchange; others are made when they first do. The processes watch each other (`lifeline`): where one
    is lost the others raise Lost or end with exit code 3, within `timeout` seconds. A collective waits for half of that.
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
        """The frames of some ranks, and their process group; made by these alone, in the order in which they need it."""
        if ranks not in self._frames:
            wait, me = self._timeout * WAIT, ranks.index(self.rank)
            group = self._dist.new_group(list(ranks), timeout=timedelta(seconds=wait), use_local_synchronization=True)
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
        """A collective, watched: where it fails, or the job is lost anyway, Lost says whose fault it is."""
        self.check()
        self._life.enter(text, turn)
        try:
            yield
        except RuntimeError as error:
            raise Lost(self._life.why(ranks, text, turn, error)) from error
        finally:
            self._life.leave()

    def _gathered(self, x: Tensor, dtype: torch.dtype, ranks: Ranks, shapes: Sequence[Shape], what: str) -> list[Tensor]:
        if x.device.type != "cpu":
            return self._gathered_elsewhere(x.to(dtype), ranks, shapes, what)
        kind = (ranks, what, dtype, tuple(map(tuple, shapes)))
        exchange, text, code = self._kinds.get(kind) or self._kind(kind)
        turn = self._turns[ranks] = self._turns[ranks] + 1
        with self._inside(ranks, text, turn):
            if x.shape != torch.Size(shapes[ranks.index(self.rank)]):
                raise RuntimeError(f"rank {self.rank} brought {list(x.shape)}")
            frames = self._frames[ranks]
            if exchange is None:  # too large for a frame: once they know that they mean the same, the ranks exchange it apart
                if not frames.swap(turn, code):
                    raise RuntimeError("the ranks brought different things")
                return self._gathered_elsewhere(x.to(dtype), ranks, shapes, what)
            parity = turn % frames.parities
            exchange.mine[parity].copy_(x)
            if not frames.swap(turn, code):
                raise RuntimeError("the ranks brought different things")
            return exchange.every[parity]

    def _kind(self, kind: tuple[Ranks, str, torch.dtype, tuple[tuple[int, ...], ...]]) -> "tuple[Exchange | None, str, int]":
        """The views of a kind of exchange that is new, its text, and a number that stands for that."""
        ranks, what, dtype, shapes = kind
        text = _text(what, () if _uneven(shapes) else shapes[0], dtype)
        with self._inside(ranks, f"make the group of ranks {ranks}"):
            frames = self._group(ranks)
        small = max(torch.Size(shape).numel() for shape in shapes) * dtype.itemsize <= frames.room
        if len(self._kinds) >= _KINDS:
            self._kinds.clear()
        code = zlib.crc32(f"{text} {shapes}".encode())
        found = self._kinds[kind] = (Exchange(frames, dtype, shapes) if small else None, text, code)
        return found

    def _gathered_elsewhere(self, x: Tensor, ranks: Ranks, shapes: Sequence[Shape], what: str) -> list[Tensor]:
        """What is large, or on a GPU (where looking at what came would cost more than the exchange): as bytes, all of the largest size."""
        sizes = [torch.Size(shape).numel() * x.element_size() for shape in shapes]
        mine = torch.empty(max(sizes), dtype=torch.uint8, device=x.device)
        if x.numel():
            mine[: x.nbytes].view(x.dtype).view(x.shape).copy_(x)
        every = mine.new_empty(len(ranks), mine.numel())
        if x.device.type == "cpu":
            self._groups[ranks]._allgather_base(every.view(-1), mine).wait()
        else:
            with self._inside(ranks, _text(what, x.shape, x.dtype)):
                self._group(ranks)
                self._groups[ranks]._allgather_base(every.view(-1), mine).wait()
        return [part[:size].view(x.dtype).view(torch.Size(shape)) for part, size, shape in zip(every, sizes, shapes, strict=True)]

    def _send(self, x: Tensor, to: int) -> None:
        text, turn = _text("pass", x.shape, x.dtype), self._next(self.rank, to)
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
        text, turn = _text("pass", shape, dtype), self._next(source, self.rank)
        found = torch.empty(shape, dtype=dtype, device=device)
        with self._inside((source, self.rank), text, turn):
            group, small = self._all(), _HEAD + found.nbytes <= ROOM
            if device.type == "cpu":
                frame = torch.empty(ROOM, dtype=torch.uint8)
                self._dist.recv(frame, source, group=group)
                if not torch.equal(frame[:_HEAD], _head(text, turn)):
                    raise RuntimeError("something else was sent")
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
    return torch.frombuffer(bytearray(zlib.crc32(text.encode()).to_bytes(8, "little") + turn.to_bytes(8, "little")), dtype=torch.uint8)


@contextmanager
def joined(backend: str, forked: int | None, timeout: float) -> Iterator[World]:
    """This process as a rank of the job that RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT say, with its share of the CPUs.

    `forked`: how many ranks there are, where they are forks of one process (`launch`); None under torchrun. What is raised inside is told
    to the other ranks.
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


def _join(backend: str, forked: int | None, timeout: float) -> None:
    """Initialise torch.distributed."""
    from torch import distributed
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    limit = timedelta(seconds=timeout)
    try:
        if forked is None:
            distributed.init_process_group(backend, timeout=limit)
            return
        rank = int(os.environ["RANK"])
        store = TCPStore("127.0.0.1", int(os.environ["MASTER_PORT"]), forked, is_master=False, timeout=limit)
        distributed.init_process_group(backend, store=store, rank=rank, world_size=forked, timeout=limit)
    except RuntimeError as error:
        words = str(error).splitlines()[0]
        raise Lost(f"rank {os.environ['RANK']} cannot join the others: {words}", "start all ranks at one time") from None
