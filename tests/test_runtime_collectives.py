"""Collectives: sums, gathers, messages; threads and gloo processes give the same bits; ranks that go different ways are
told apart.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from running import WATCHDOG, environment

from reshard.errors import PlaceError
from reshard.layout.mesh import Mesh
from reshard.runtime.comm import collectives
from reshard.runtime.comm.collectives import World, groups
from reshard.runtime.comm.heartbeat import Lifeline
from reshard.runtime.comm.lost import Lost
from reshard.runtime.comm.processes import Processes
from reshard.runtime.comm.threads import alone, run_threads

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def noise(rank: int, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(rank)).to(dtype)


# --- the same on both -------------------------------------------------------------------------------------------------


def program(world: World) -> list[str]:
    """Everything that a world can do with three ranks; the digests of what came of it."""
    rank, every = world.rank, range(3)
    world.phase = "prefill"
    results: list[torch.Tensor] = []
    for dtype in DTYPES:
        results.append(world.all_reduce(noise(rank, 2, 5, 7, dtype=dtype), every, "sum"))
        results.append(world.all_gather(noise(rank, 2, 5, 1 + rank, dtype=dtype), every, (1, 2, 3), -1, "gather"))
    results.append(world.all_reduce(noise(rank, 30, 1, 211), every, "sum"))  # larger than a frame
    results.append(world.all_reduce(noise(rank, 7, 5).t(), every, "sum"))  # not contiguous
    results.append(world.all_gather(noise(rank, 3000 * rank, 7), every, (0, 3000, 6000), 0, "gather"))
    results.append(world.all_reduce(torch.tensor(rank + 1), every, "sum"))
    results.append(world.all_reduce(torch.empty(2, 0), every, "sum"))
    if rank != 1:
        results.append(world.all_reduce(noise(rank, 4), (0, 2), "pair"))
    for shape in ((2, 3), (40, 1, 999), (0, 4), ()):
        if rank > 0:
            results.append(world.recv(shape, torch.bfloat16, rank - 1))
        if rank < 2:
            world.send((results[-1] if rank else noise(9, *shape, dtype=torch.bfloat16)) + 1, rank + 1)
    world.agree({"manifest": "the same everywhere", "dtype": "None"})
    world.meet("the end")
    return [f"{x.dtype} {list(x.shape)} {digest(x)}" for x in results]


def digest(x: torch.Tensor) -> str:
    return hashlib.sha256(bytes(x.contiguous().view(-1).view(torch.uint8).tolist())).hexdigest()


COUNTS = [
    {"sum": 8, "gather": 5, "pair": 1, "send": 4},
    {"sum": 8, "gather": 5, "send": 4, "recv": 4},
    {"sum": 8, "gather": 5, "pair": 1, "recv": 4},
]


def both(world: World) -> tuple[list[str], dict[str, int]]:
    return program(world), dict(world.counts)


def main() -> None:
    """The program as a rank that torchrun started; its results in a file of its own."""
    folder, way = sys.argv[1:]
    if way == "apart":  # as if the ranks were on several machines: all goes by gloo
        Lifeline.near = lambda self, ranks: False  # type: ignore[method-assign]
    torch.distributed.init_process_group("gloo")
    world = Processes(groups(Mesh(3)), timeout=WATCHDOG)
    Path(folder, str(world.rank)).write_text(json.dumps(both(world)))
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("way", ["near", "apart"])
def test_gloo_processes_and_threads_give_the_same_bits_and_counts(tmp_path: Path, way: str) -> None:
    line = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "3",
        __file__,
        str(tmp_path),
        way,
    ]
    done = subprocess.run(line, capture_output=True, text=True, env=environment(OMP_NUM_THREADS="1"), timeout=WATCHDOG)
    assert done.returncode == 0, done.stderr
    for rank, (results, counts) in enumerate(run_threads(3, both)):
        theirs, their_counts = json.loads((tmp_path / str(rank)).read_text())
        assert results == theirs
        assert counts == their_counts == COUNTS[rank]


# --- what they compute ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_sums_of_16_bits_are_taken_in_float32_and_rounded_once(dtype: torch.dtype) -> None:
    parts = [noise(rank, 64, dtype=dtype) for rank in range(5)]
    wide = torch.float64 if dtype is torch.float64 else torch.float32
    expected = parts[0].to(wide)
    for part in parts[1:]:
        expected = expected + part.to(wide)
    for total in run_threads(5, lambda world: world.all_reduce(parts[world.rank], range(5), "sum")):
        assert total.dtype is dtype
        assert torch.equal(total, expected.to(dtype))


def test_a_sum_does_not_change_what_was_brought() -> None:
    parts = [noise(rank, 8) for rank in range(2)]
    before = [part.clone() for part in parts]
    run_threads(2, lambda world: world.all_reduce(parts[world.rank], (0, 1), "sum").add_(1))
    assert all(map(torch.equal, parts, before))


@pytest.mark.parametrize("dim", [0, 1, -1])
def test_uneven_shares_are_put_side_by_side_in_the_order_of_the_ranks(dim: int) -> None:
    whole = noise(0, 6, 6, 6)
    parts = whole.split((1, 3, 2), dim)
    for gathered in run_threads(
        3, lambda world: world.all_gather(parts[world.rank], range(3), (1, 3, 2), dim, "gather")
    ):
        assert torch.equal(gathered, whole)


def test_a_rank_alone_exchanges_nothing() -> None:
    world, x = alone(), noise(0, 3)
    assert world.all_reduce(x, (0,), "sum") is x
    assert world.all_gather(x, (0,), (3,), 0, "gather") is x
    world.agree({"manifest": "any"})
    world.meet("here")
    assert not world.counts
    assert (world.rank, world.size, world.seconds) == (0, 1, 0.0)


def test_time_in_collectives_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that the second rank puts on by a minute, once the first has looked at it and waits."""
    now, looked = [0.0], threading.Event()

    def clock() -> float:
        seen = now[0]
        looked.set()
        return seen

    monkeypatch.setattr(collectives, "time", SimpleNamespace(perf_counter=clock))

    def late(world: World) -> float:
        if world.rank:
            looked.wait()
            now[0] = 60.0
        world.all_reduce(noise(0, 3), (0, 1), "sum")
        return world.seconds

    assert run_threads(2, late, WATCHDOG) == [60.0, 0.0]


def test_messages_arrive_in_the_order_in_which_they_were_sent() -> None:
    def work(world: World) -> list[int]:
        if world.rank == 0:
            for number in range(5):
                world.send(torch.tensor(number), 1)
            return []
        return [int(world.recv((), torch.int64, 0)) for _ in range(5)]

    assert run_threads(2, work)[1] == [0, 1, 2, 3, 4]


def test_64_ranks_work_together() -> None:
    def work(world: World) -> float:
        for _ in range(20):
            total = world.all_reduce(torch.ones(2), range(64), "sum")
        return float(total[0])

    assert run_threads(64, work, WATCHDOG) == [64.0] * 64


# --- groups -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mesh", "expected"),
    [
        (Mesh(), []),
        (Mesh(tp=3), [(0, 1, 2)]),
        (Mesh(pp=2), [(0, 1)]),
        (Mesh(tp=2, pp=2), [(0, 1), (2, 3), (0, 1, 2, 3)]),
        (Mesh(tp=4, ep=2), [(0, 1, 2, 3), (0, 1), (2, 3), (0, 2), (1, 3)]),
        (Mesh(tp=2, ep=2, pp=2), [(0, 1), (2, 3), (0, 1, 2, 3)]),
    ],
)
def test_groups_are_the_stages_those_that_share_experts_and_all(mesh: Mesh, expected: list[tuple[int, ...]]) -> None:
    assert groups(mesh) == expected


# --- going wrong ------------------------------------------------------------------------------------------------------


def lost(size: int, work: Callable[[World], Any], timeout: float = WATCHDOG) -> str:
    """What the first rank to notice says."""
    said: dict[int, str] = {}

    def body(world: World) -> None:
        world.phase = "decode"
        try:
            work(world)
        except Lost as error:
            said[world.rank] = error.message

    run_threads(size, body, timeout)
    assert said, "nobody noticed"
    return said[min(said)]


@pytest.mark.parametrize(
    ("theirs", "words"),
    [
        (torch.ones(3), "rank 1 diverged in decode: it is at sum mlp [3] float32, rank 0 at sum mlp [2] float32"),
        (
            torch.ones(2, dtype=torch.int32),
            "rank 1 diverged in decode: it is at sum mlp [2] int32, rank 0 at sum mlp [2] float32",
        ),
    ],
)
def test_another_shape_or_dtype_is_named_with_its_rank_and_phase(theirs: torch.Tensor, words: str) -> None:
    assert (
        lost(3, lambda world: world.all_reduce(theirs if world.rank == 1 else torch.ones(2), range(3), "mlp")) == words
    )


def test_another_collective_is_named() -> None:
    said = lost(3, lambda world: world.all_reduce(torch.ones(2), range(3), "attn" if world.rank == 2 else "mlp"))
    assert said == "rank 2 diverged in decode: it is at sum attn [2] float32, rank 0 at sum mlp [2] float32"


def test_a_share_of_another_size_is_named() -> None:
    said = lost(2, lambda world: world.all_gather(torch.ones(2), (0, 1), (2, 3), 0, "logits"))
    assert said == "rank 1 diverged in decode: it has [2] for gather logits, its share is [3]"


def test_another_message_is_named() -> None:
    def work(world: World) -> None:
        if world.rank == 0:
            world.send(torch.ones(3), 1)
        else:
            world.recv((2,), torch.float32, 0)

    assert lost(2, work) == "rank 1 diverged in decode: it is at pass [2] float32, rank 0 at pass [3] float32"


def test_ranks_agree_or_the_one_that_does_not_is_named_with_both_values() -> None:
    said = lost(4, lambda world: world.agree({"mesh": "TP 4", "manifest": "beef" if world.rank == 1 else "cafe"}))
    assert said == "rank 1 diverged in decode: its manifest is beef, but cafe on rank 0"


def test_a_rank_that_raises_ends_the_others_at_once_and_its_error_is_raised() -> None:
    def work(world: World) -> None:
        world.phase = "load"
        if world.rank == 1:
            raise ValueError("something broke")
        world.all_reduce(torch.ones(1), (0, 1), "sum")

    with pytest.raises(ValueError, match="something broke"):
        run_threads(2, work, timeout=10 * WATCHDOG)  # were it waited for, pytest would end this


def test_a_rank_that_comes_home_early_is_not_waited_for() -> None:
    said = lost(2, lambda world: world.rank or world.all_reduce(torch.ones(1), (0, 1), "mlp"), timeout=10 * WATCHDOG)
    assert said == "rank 1 ended in decode, but was expected at: sum mlp [1] float32"


def test_a_rank_that_does_not_come_is_named_after_the_timeout() -> None:
    given_up = threading.Event()

    def work(world: World) -> None:
        if world.rank:
            given_up.wait()
            return
        try:
            world.all_reduce(torch.ones(1), (0, 1), "mlp")
        finally:
            given_up.set()

    said = lost(2, work, timeout=0.2)
    assert said == "rank 1 did not reach sum mlp [1] float32 within 0.2 s in decode"


def test_a_lost_rank_is_an_error_of_the_environment_with_exit_code_3() -> None:
    assert issubclass(Lost, PlaceError)
    assert Lost("rank 1").exit_code == 3


if __name__ == "__main__":
    main()
