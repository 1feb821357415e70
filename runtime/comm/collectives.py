"""Collectives: how the ranks of a job exchange tensors. One interface, two implementations. Knows nothing about models.

`Threads` (threads.py) runs the ranks as threads of one process, so that many families and meshes can be tested cheaply;
`Processes` (processes.py) is torch.distributed (gloo or NCCL). A program gives the same results on both: sums are taken
in rank order, and in float32 for 16-bit tensors. Messages say what they are, so that ranks that diverge are reported
instead of waiting for each other.
"""

import json
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .lost import Lost

if TYPE_CHECKING:
    from reshard.layout.mesh import Mesh

Ranks = tuple[int, ...]
Shape = Sequence[int]

_FACT = 96  # bytes of a value that ranks compare


def groups(mesh: "Mesh") -> list[Ranks]:
    """The groups of ranks that a mesh needs: tensor parallel ranks of each stage, ranks that share experts, and all.

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
    """One rank's view of the ranks of a job: who it is, and its collectives.

    `counts`: number of collectives by the caller's label; `seconds`: time spent in them; `phase`: what the caller is
    doing ("load", "prefill", "decode"), for messages about lost ranks.
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
        """The sum of the ranks' tensors, in float32 on the way if they have 16 bits; `x` itself in a group of one."""
        if len(ranks) == 1:
            return x
        wide = torch.float32 if x.is_floating_point() and x.element_size() < 4 else x.dtype
        first, second, *rest = self._exchange(x, wide, ranks, label, "sum")
        total = first + second
        for part in rest:
            total += part
        return total.to(x.dtype)

    def all_gather(self, x: Tensor, ranks: Sequence[int], sizes: Sequence[int], dim: int, label: str) -> Tensor:
        """The ranks' tensors concatenated along `dim`; `sizes`: the extent of each there."""
        if len(ranks) == 1:
            return x
        dim %= x.dim()
        shapes = [(*x.shape[:dim], size, *x.shape[dim + 1 :]) for size in sizes]
        return torch.cat(self._exchange(x, x.dtype, ranks, label, "gather", shapes), dim)

    def send(self, x: Tensor, to: int, label: str = "send") -> None:
        """Send a tensor to a rank that receives it; returns once it is on its way."""
        with self._timed(label):
            self._send(x, to)

    def recv(
        self,
        shape: Shape,
        dtype: torch.dtype,
        source: int,
        label: str = "recv",
        device: torch.device | str | None = None,
    ) -> Tensor:
        """The tensor that a rank sends; both agree on its shape and dtype."""
        with self._timed(label):
            return self._recv(tuple(shape), dtype, source, torch.device(device or "cpu"))

    def agree(self, facts: Mapping[str, str]) -> None:
        """Check that all ranks have the same values; else raises Lost, naming the rank that differs."""
        if self.size == 1:
            return
        mine = torch.zeros(len(facts), _FACT, dtype=torch.uint8)
        for row, value in zip(mine, facts.values(), strict=True):
            data = value.encode()[:_FACT]
            row[: len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else 0
        parts = self._gathered(
            mine, mine.dtype, tuple(range(self.size)), [mine.shape] * self.size, f"agree on {', '.join(facts)}"
        )
        for at, fact in enumerate(facts):
            said = [bytes(part[at].tolist()).rstrip(b"\0").decode(errors="replace") for part in parts]
            usual = max(said, key=said.count)  # the first of the most frequent: with two ranks, rank 0 is right
            for rank, value in enumerate(said):
                if value != usual:
                    words = f"its {fact} is {value}, but {usual} on rank {said.index(usual)}"
                    raise Lost(
                        f"rank {rank} diverged in {self.phase}: {words}", "all ranks need the same files and options"
                    )

    def meet(self, what: str) -> None:
        """A barrier that waits as long as the missing ranks make progress: they call `check` meanwhile."""
        if self.size > 1:
            self._meet(what)

    @contextmanager
    def failing(self) -> Iterator[None]:
        """Report errors raised inside to the other ranks, so that they end at once."""
        try:
            yield
        except BaseException as error:
            self.fail(error)
            raise

    def _exchange(
        self,
        x: Tensor,
        dtype: torch.dtype,
        ranks: Sequence[int],
        label: str,
        kind: str,
        shapes: Sequence[Shape] | None = None,
    ) -> list[Tensor]:
        with self._timed(label):
            return self._gathered(x, dtype, tuple(ranks), shapes or [x.shape] * len(ranks), f"{kind} {label}")

    @contextmanager
    def _timed(self, label: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.counts[label] += 1
        self.seconds += time.perf_counter() - began

    def _announce(self, phase: str) -> None:  # noqa: B027  threads need not
        """A phase starts."""

    @abstractmethod
    def _meet(self, what: str) -> None: ...

    @abstractmethod
    def check(self) -> None:
        """Raise Lost if another rank is known to be lost, and record progress: for long work without collectives."""

    @abstractmethod
    def fail(self, error: BaseException) -> None:
        """Tell the other ranks that this one cannot continue."""

    def end(self) -> None:  # noqa: B027  threads need not
        """Tell the other ranks that this one has finished, so that its exit is not a loss."""

    @abstractmethod
    def _gathered(
        self, x: Tensor, dtype: torch.dtype, ranks: Ranks, shapes: Sequence[Shape], what: str
    ) -> list[Tensor]:
        """Each rank's tensor as `dtype`, in rank order; called by all of `ranks`. Valid until the next exchange."""

    @abstractmethod
    def _send(self, x: Tensor, to: int) -> None: ...

    @abstractmethod
    def _recv(self, shape: tuple[int, ...], dtype: torch.dtype, source: int, device: torch.device) -> Tensor: ...


def gathered(world: World, value: Any, label: str) -> list[Any]:
    """Each rank's JSON value, on every rank, in rank order."""
    if world.size == 1:
        return [value]
    ranks, data = range(world.size), torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
    lengths = world.all_gather(torch.tensor([len(data)]), ranks, [1] * world.size, 0, label).tolist()
    return [
        json.loads(bytes(part.tolist())) for part in world.all_gather(data, ranks, lengths, 0, label).split(lengths)
    ]


def text_of(what: str, shape: Shape, dtype: torch.dtype) -> str:
    """What an exchange is, in words; ranks compare them."""
    return f"{what} {list(shape)} {str(dtype).removeprefix('torch.')}"


def uneven(shapes: Sequence[Shape]) -> bool:
    """Whether ranks have different shapes."""
    return any(shape != shapes[0] for shape in shapes)
