"""Layers that borrow keys and values of earlier ones, and take something of the embedding, on whatever stage and from
whatever folder.
"""

import shutil
from functools import cache
from pathlib import Path

import pytest
import torch
from fixtures import checkpoint
from gauntlet import OPTIONS
from torch import Tensor

from reshard.checkpoints.source import open_source
from reshard.jobs.convert import convert, prepare
from reshard.layout import capacity
from reshard.layout.mesh import Mesh
from reshard.runtime.comm.collectives import World
from reshard.runtime.comm.threads import alone, run_threads
from reshard.runtime.load import load_model
from reshard.store.destination import LocalDestination

IDS = torch.randint(3, 331, (2, 5), generator=torch.Generator().manual_seed(1))
MESHES = [Mesh(pp=6), Mesh(tp=2, pp=3), Mesh(tp=4, pp=2), Mesh(tp=8, pp=3)]


@cache
def wanted(name: str) -> Tensor:
    return load_model(checkpoint(name), torch.float64, world=alone())(IDS)  # type: ignore[return-value]


def converted(name: str, mesh: Mesh, out: Path) -> Path:
    convert(prepare(open_source(checkpoint(name)), "native", mesh, OPTIONS), LocalDestination(out), OPTIONS)
    return out


@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_every_stage_has_what_its_layers_borrow_and_plan_counts_it(mesh: Mesh, tmp_path: Path) -> None:
    out = converted("gemma4_text", mesh, tmp_path / "out")

    def work(world: World) -> tuple[Tensor, Tensor, int]:
        decoder = load_model(out, torch.float64, mesh=mesh, world=world)
        kept = decoder.new_cache(*IDS.shape)
        whole = decoder(IDS, all_ranks=True)
        steps = torch.cat([decoder(part, cache=kept, all_ranks=True) for part in IDS.split([2, 1, 1, 1], 1)], 1)
        return whole, steps, sum(part.nbytes for parts in kept.kept.values() for part in parts)

    found = run_threads(mesh.world, work, 60)
    for whole, steps, _ in found:
        assert torch.allclose(whole, wanted("gemma4_text"), atol=1e-4) and torch.allclose(steps, whole, atol=1e-4)
    opened = open_source(out)
    counted = capacity.cache(opened.layout, opened.config, IDS.shape[1], IDS.shape[0])
    # BF16 as stored, float64 as run
    assert counted is not None and counted.ranks == tuple(nbytes // 4 for _, _, nbytes in found)


def test_keys_that_are_values_too_are_counted_twice() -> None:
    opened = open_source(checkpoint("gemma4_moe"))
    counted = capacity.cache(opened.layout, opened.config, 100, 1)
    # two layers of five tokens, one of all
    assert counted is not None and counted.ranks == (2 * (2 * 5 * 2 * 4 * 10 + 100 * 2 * 2 * 20),)


@pytest.mark.parametrize("mesh", MESHES[:3], ids=str)
def test_each_rank_runs_from_its_own_folder(mesh: Mesh, tmp_path: Path) -> None:
    out = converted("gemma4_text", mesh, tmp_path / "out")
    for rank in range(mesh.world):
        shutil.copytree(out, tmp_path / str(rank), ignore=shutil.ignore_patterns("source", *_others(mesh, rank)))

    def work(world: World) -> Tensor:
        return load_model(tmp_path / str(world.rank), torch.float64, mesh=mesh, world=world)(IDS, all_ranks=True)  # type: ignore[return-value]

    for logits in run_threads(mesh.world, work, 60):
        assert torch.allclose(logits, wanted("gemma4_text"), atol=1e-4)


def _others(mesh: Mesh, rank: int) -> list[str]:
    return [f"rank-{other:05}" for other in range(mesh.world) if other != rank]
