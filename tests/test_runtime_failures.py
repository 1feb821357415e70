"""A rank that is killed, stopped, raises, hangs or diverges ends the whole job, with a message that names it and the
phase.

Each case is a job of three gloo processes that goes through the phases of a real one; the last rank misbehaves in one
of them. All cases run in one process (`python tests/test_runtime_failures.py FOLDER`), which imports torch once and
forks, several at a time.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from running import WATCHDOG, environment

SIZE = 3
CULPRIT = SIZE - 1
PHASES = ("load", "prefill", "decode")

# timeouts of a job in seconds: one that nobody lives to see, and one that a busy machine keeps
AT_ONCE, SILENCE = 10 * WATCHDOG, 12.0

# What the last rank does → what the others must say of it, and the timeout: what is noticed at once needs none, only
# silence does.
WAYS = {
    "killed": ("rank 2 was killed in {phase}", AT_ONCE),
    "stopped": ("rank 2 stopped responding in {phase}", SILENCE),
    "raises": ("rank 2 failed in {phase}: ValueError: something broke", AT_ONCE),
    "hangs": ("rank 2 did not reach sum mlp", SILENCE),
    "skips": ("rank 2 diverged in {phase}: it is at", SILENCE),
    "manifest": ("rank 2 diverged in {phase}: its manifest is theirs, but ours on rank 0", AT_ONCE),
    "shapes": ("rank 2 diverged in {phase}: it is at sum mlp [2, 8] float32", AT_ONCE),
    "dtypes": ("rank 2 diverged in {phase}: it is at sum mlp [1, 8] float64", AT_ONCE),
    "large": ("rank 2 diverged in {phase}: it is at sum mlp [9999, 8] float32", AT_ONCE),
    "nothing": ("", AT_ONCE),
}


# --- the job ----------------------------------------------------------------------------------------------------------


def rank_of_job(rank: int, port: int, way: str, phase: str) -> int:
    """What one rank does; its exit code."""
    import torch
    from torch import distributed

    from reshard.errors import ReshardError
    from reshard.layout.mesh import Mesh
    from reshard.runtime.comm.collectives import groups
    from reshard.runtime.comm.processes import Processes

    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    try:
        store = distributed.TCPStore("127.0.0.1", port, SIZE, is_master=False)
        distributed.init_process_group("gloo", store=store, rank=rank, world_size=SIZE)
        world = Processes(groups(Mesh(SIZE)), timeout=WAYS[way][1])
        with world.failing():
            for world.phase in PHASES:
                here = world.phase == phase and rank == CULPRIT
                world.agree({"manifest": "theirs" if here and way == "manifest" else "ours"})
                for step in range(3):
                    if here and step == 1 and misbehave(way):
                        continue
                    x = torch.ones({"shapes": 2, "large": 9999}.get(way, 1) if here else 1, 8)
                    world.all_reduce(x.double() if here and way == "dtypes" else x, range(SIZE), "mlp")
                world.meet("the phase is over")
    except ReshardError as error:
        print(f"rank {rank}: {error.message}", file=sys.stderr, flush=True)
        return error.exit_code
    except ValueError:
        return 1
    return 0


def misbehave(way: str) -> bool:
    """Whether the collective is left out."""
    if way == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if way == "stopped":
        os.kill(os.getpid(), signal.SIGSTOP)
    if way == "hangs":
        time.sleep(1000)
    if way == "raises":
        raise ValueError("something broke")
    return way == "skips"


def run_case(way: str, phase: str) -> dict[str, Any]:
    """One job: exit codes (None: had to be killed), and what was said."""
    import atexit

    from torch import distributed

    store = distributed.TCPStore("127.0.0.1", 0, SIZE, is_master=True, wait_for_workers=False)
    with tempfile.TemporaryFile("w+") as said:
        began, processes = time.monotonic(), []
        for rank in range(SIZE):
            if (process := os.fork()) == 0:
                os.dup2(said.fileno(), 2)
                code = 99
                try:
                    code = rank_of_job(rank, store.port, way, phase)
                    atexit._run_exitfuncs()
                except BaseException:
                    traceback.print_exc()
                os._exit(code)
            processes.append(process)
        codes: dict[int, int | None] = {}
        while len(codes) < SIZE and time.monotonic() - began < WATCHDOG / 2:
            process, status = os.waitpid(-1, os.WNOHANG)
            if process:
                codes[processes.index(process)] = os.waitstatus_to_exitcode(status)
            time.sleep(0.01)
        for rank in set(range(SIZE)) - codes.keys():
            os.kill(processes[rank], signal.SIGKILL)
        said.seek(0)
        return {"codes": [codes.get(rank) for rank in range(SIZE)], "said": said.read()}


def finish_before_rank_0(folder: Path, size: int = 6, rounds: int = 4) -> list[int]:
    """Ranks that talk until they have finished, and a rank 0 that is still there when all others are gone;
    its exit codes.
    """
    from torch import distributed

    from reshard.runtime.comm.heartbeat import Lifeline

    codes = []
    for number in range(rounds):
        processes = []
        for rank in range(size):
            if (process := os.fork()) == 0:
                code = 99
                try:
                    sys.setswitchinterval(1e-6)  # so that whatever two threads do may interleave
                    life = Lifeline(
                        distributed.FileStore(str(folder / f"late-{number}"), size), rank, size, SILENCE, "late"
                    )
                    life.meet("all are here")
                    step = 0
                    while step < (100 if rank else 1_000_000) and not all(peer.gone for peer in life.peers.values()):
                        step += 1
                        life.say(phase="decode", at=["sum mlp", step])
                    if (verdict := life.take()) is not None:
                        print(f"rank {rank}: {verdict}", file=sys.stderr, flush=True)
                    code = 3 if verdict else 0
                    life.close()
                except BaseException:
                    traceback.print_exc()
                os._exit(code)
            processes.append(process)
        ends = {process: os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process in processes}
        codes += list(ends.values())
    return codes


def main(at_once: int = 7) -> None:
    """All cases, as JSON on stdout."""
    import torch  # noqa: F401  once, for all

    ways = sorted(WAYS, key=lambda way: WAYS[way][1])  # those that only wait first
    cases = [("nothing", "load"), *product([way for way in ways if way != "nothing"], PHASES)]
    folder = Path(sys.argv[1])
    running: set[int] = set()
    for number, case in enumerate(cases):
        if len(running) == at_once:
            running.remove(os.wait()[0])
        if (process := os.fork()) == 0:
            try:
                (folder / str(number)).write_text(json.dumps(run_case(*case)))
            except BaseException:
                traceback.print_exc()
            os._exit(0)
        running.add(process)
    while running:
        running.remove(os.wait()[0])
    found: dict[str, Any] = {"late": finish_before_rank_0(folder)}
    print(
        json.dumps(
            found
            | {"/".join(case): json.loads((folder / str(number)).read_text()) for number, case in enumerate(cases)}
        )
    )


# --- what must hold ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("jobs")
    done = subprocess.run(
        [sys.executable, __file__, str(folder)],
        capture_output=True,
        env=environment(OMP_NUM_THREADS="1"),
        timeout=WATCHDOG,
    )
    assert done.returncode == 0, done.stderr.decode()
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def test_a_job_in_which_nothing_goes_wrong_ends_well(jobs: dict[str, Any]) -> None:
    assert jobs["nothing/load"]["codes"] == [0] * SIZE, jobs["nothing/load"]
    assert jobs["nothing/load"]["said"] == ""


def test_ranks_that_have_finished_are_not_lost(jobs: dict[str, Any]) -> None:
    """However long before rank 0 they end."""
    assert set(jobs["late"]) == {0}, jobs["late"]


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("way", [way for way in WAYS if way != "nothing"])
def test_a_lost_rank_ends_all_and_is_named_with_its_phase(jobs: dict[str, Any], way: str, phase: str) -> None:
    job, (words, _) = jobs[f"{way}/{phase}"], WAYS[way]
    assert None not in job["codes"], f"a process was left behind: {job}"
    assert job["codes"][:CULPRIT] == [3] * CULPRIT, job
    assert job["codes"][CULPRIT] == {"killed": -9, "stopped": -9, "raises": 1}.get(way, 3), job
    for rank in range(CULPRIT):
        assert f"rank {rank}: {words.format(phase=phase)}" in job["said"], job


if __name__ == "__main__":
    main()
