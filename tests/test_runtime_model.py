"""The decoder computes what transformers computes: every family, every kind of mesh, whole and token by token.

Tolerances are those of the numeric check: so many times what the reference itself changes with the dtype
(`reshard.runtime.proof`).
"""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from fixtures import FIXTURES, checkpoint, copy
from gauntlet import run_meshes
from torch import Tensor
from transformers import AutoModelForCausalLM

from reshard.errors import ReshardError
from reshard.layout.mesh import Mesh
from reshard.runtime.comm.collectives import World
from reshard.runtime.comm.threads import run_threads
from reshard.runtime.load import load_model
from reshard.runtime.proof.bounds import RMS, TIMES

SEQ, SPLIT = 23, 9  # tokens; those of them that go through at once before the rest follow one by one
ALL, EVERY = bool(os.environ.get("RESHARD_ALL_MESHES")), {"llama", "gpt2", "falcon_40b", "gpt_oss", "deepseek_v3"}
PARALLEL = {"gpt_neox", "falcon_7b", "falcon_40b"}  # attention and feed-forward beside each other


class Reference(NamedTuple):
    ids: Tensor
    logits: Tensor
    own: float


def meshes(name: str) -> list[Mesh]:
    """Every mesh for some, and with RESHARD_ALL_MESHES=1; for the others those that ask for most, as scripts/gauntlet
    tries all.
    """
    found = run_meshes(FIXTURES[name], True)
    if ALL or name in EVERY:
        return found
    staged = found.index(Mesh(tp=2, pp=2))
    return [found[staged - 2], found[staged], *found[staged + 1 :][-1:]]


def computed(directory: Path) -> Reference:
    """What transformers makes of a checkpoint, in float32, and how much that is off from float64."""
    logits = {}
    for dtype in (torch.float32, torch.float64):
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, experts_implementation="eager").eval()
        ids = torch.randint(0, model.config.vocab_size, (2, SEQ), generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            logits[dtype] = model(ids).logits
    own = (logits[torch.float32].double() - logits[torch.float64]).abs().max().item()
    return Reference(ids, logits[torch.float32], own)


@cache
def reference(name: str, scratch: Path) -> Reference:
    if (twin := FIXTURES[name].twin) is None:
        return computed(checkpoint(name))
    twin(scratch / name)
    return computed(scratch / name)


def said(directory: Path, **config: Any) -> Path:
    """The directory, its config.json changed; None takes a key away."""
    path = directory / "config.json"
    text = json.loads(path.read_text()) | config
    path.write_text(json.dumps({key: value for key, value in text.items() if value is not None}))
    return directory


@pytest.fixture(scope="session")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("references")


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def whole_and_stepwise(directory: Path, mesh: Mesh, ids: Tensor) -> list[tuple[Tensor, Tensor, Mapping[str, int]]]:
    """Per rank: logits of one forward, those of a cache filled token by token, and the collectives of the former."""

    def work(world: World) -> tuple[Tensor, Tensor, Mapping[str, int]]:
        decoder = load_model(directory, torch.float32, mesh=mesh, world=world)
        world.counts.clear()
        whole = decoder(ids, all_ranks=True)
        counts = dict(world.counts)
        kept = decoder.new_cache(*ids.shape)
        parts = [ids[:, :SPLIT], *ids[:, SPLIT:].split(1, 1)]
        return whole, torch.cat([decoder(part, cache=kept, all_ranks=True) for part in parts], 1), counts

    return run_threads(mesh.world, work, 120)


def check(directory: Path, mesh: Mesh, wanted: Reference) -> Mapping[str, int]:
    for whole, stepwise, _ in (found := whole_and_stepwise(directory, mesh, wanted.ids)):
        assert (whole - wanted.logits).abs().max() <= TIMES * wanted.own, mesh
        assert (stepwise - whole).abs().max() <= TIMES * wanted.own, mesh
    return found[0][2]


@pytest.mark.parametrize("name", FIXTURES)
def test_logits_are_those_of_transformers_at_every_mesh(name: str, scratch: Path) -> None:
    """Also with a cache, token by token; and each kind of collective happens as often as the layers demand,
    and no more.
    """
    for mesh in meshes(name):
        counts = check(checkpoint(name), mesh, reference(name, scratch))
        if mesh.pp == 1 and mesh.tp > 1:
            layers = FIXTURES[name].layers
            wanted = {"embed": 1, "logits": 1, "hidden": layers if name in PARALLEL else 2 * layers}
            assert counts == wanted | ({"norm": layers} if name == "olmo2" else {}), mesh


LONG = {"rope_type": "longrope", "short_factor": [1.0, 1.1, 1.3, 1.7, 2.0], "long_factor": [1.0, 2.0, 3.0, 5.0, 8.0]}
ROPES: dict[str, dict[str, Any]] = {
    "linear": {"rope_type": "linear", "factor": 3.0},
    "dynamic": {"rope_type": "dynamic", "factor": 3.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
    "yarn, its magnitudes": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 16,
        "mscale": 0.7,
        "mscale_all_dim": 0.9,
    },
    "yarn, whole steps": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 16,
        "beta_fast": 4,
        "truncate": False,
    },
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
    "longrope, short": LONG | {"original_max_position_embeddings": 64, "factor": 4.0},
    "longrope, long": LONG | {"original_max_position_embeddings": 16, "factor": 4.0},
}


@pytest.mark.parametrize("kind", ROPES)
def test_each_kind_of_rotary_positions_is_that_of_transformers(kind: str, tmp_path: Path) -> None:
    rope = ROPES[kind] | {"rope_theta": 10000.0}
    longest = 16 if kind == "dynamic" else 64
    directory = said(copy("llama", tmp_path / "model"), rope_parameters=rope, max_position_embeddings=longest)
    wanted = computed(directory)

    def whole(world: World) -> Tensor:
        return load_model(directory, torch.float32, mesh=Mesh(tp=2), world=world)(wanted.ids)

    for logits in run_threads(2, whole):  # in one piece: how far a forward reaches changes some of them
        assert (logits - wanted.logits).abs().max() <= TIMES * wanted.own
    assert (reference("llama", tmp_path).logits - wanted.logits).abs().max() > 100 * wanted.own  # the variant matters


def test_the_old_spelling_of_rotary_positions_means_the_same(tmp_path: Path) -> None:
    new = said(
        copy("llama", tmp_path / "new"), rope_parameters={"rope_type": "linear", "factor": 3.0, "rope_theta": 5000.0}
    )
    old = said(
        copy("llama", tmp_path / "old"),
        rope_parameters=None,
        rope_scaling={"type": "linear", "factor": 3.0},
        rope_theta=5000.0,
    )
    ids = torch.arange(20)[None]
    one, other = (
        run_threads(1, lambda world, at=at: load_model(at, torch.float32, world=world)(ids))[0] for at in (new, old)
    )  # type: ignore[misc]
    assert torch.equal(one, other)


@pytest.mark.parametrize("name", ["llama", "gpt2", "falcon_rw", "gemma2", "gpt_oss", "deepseek_v3", "olmo2"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_ragged_batch_gives_what_its_prompts_give_alone(name: str, side: str, scratch: Path) -> None:
    """Padding stands at either side, in the first forward and while decoding."""
    wanted = reference(name, scratch)
    prompts = [wanted.ids[0, :13], wanted.ids[1, :5], wanted.ids[0, 2:10]]

    def work(world: World) -> float:
        decoder = load_model(checkpoint(name), torch.float32, mesh=Mesh(tp=2), world=world)
        ids, positions = torch.zeros(3, 13, dtype=torch.long), torch.full((3, 13), -1)
        for row, prompt in enumerate(prompts):
            place = slice(13 - len(prompt), 13) if side == "left" else slice(0, len(prompt))
            ids[row, place], positions[row, place] = prompt, torch.arange(len(prompt))
        kept = decoder.new_cache(3, 15)
        first = decoder(ids, positions, kept)
        more = decoder(wanted.ids[:1, 20:21].expand(3, 1), torch.tensor([[len(prompt)] for prompt in prompts]), kept)
        worst = 0.0
        for row, prompt in enumerate(prompts):
            alone = decoder(torch.cat((prompt, wanted.ids[0, 20:21]))[None])[0]
            found = torch.cat((first[row][positions[row] >= 0], more[row]))
            worst = max(worst, (found - alone).abs().max().item())
        return worst

    assert max(run_threads(2, work)) <= TIMES * wanted.own


def test_positions_beyond_those_that_are_learned_are_refused() -> None:
    decoder = run_threads(1, lambda world: load_model(checkpoint("gpt2"), world=world))[0]
    last = decoder.model.sizes["pos"]
    with pytest.raises(ReshardError, match=f"position {last} is out of range: the model has {last}"):
        decoder(torch.zeros(1, 1, dtype=torch.long), torch.tensor([[last]]))


def test_a_cache_that_is_full_is_refused() -> None:
    decoder = run_threads(1, lambda world: load_model(checkpoint("llama"), world=world))[0]
    kept = decoder.new_cache(2, 4)
    with pytest.raises(ReshardError, match="room for 2 × 4 tokens, 2 × 5 are needed"):
        decoder(torch.zeros(2, 5, dtype=torch.long), cache=kept)


def test_rotary_positions_that_nobody_knows_are_refused(tmp_path: Path) -> None:
    directory = said(copy("llama", tmp_path / "model"), rope_parameters={"rope_type": "helical", "rope_theta": 10000.0})
    with pytest.raises(ReshardError, match='unknown rope type "helical"'):
        run_threads(1, lambda world: load_model(directory, world=world))


ALL_OF = {"num_experts_per_tok": ("num_local_experts", "n_routed_experts"), "topk_group": ("n_group",)}


def choosing_all(directory: Path) -> Path:
    """A mixture whose routers take every expert: what it computes is continuous, while a rounding may change a choice
    of few.
    """
    config = json.loads((directory / "config.json").read_text())
    counts = {
        key: config[of] for key, alternatives in ALL_OF.items() for of in alternatives if of in config and key in config
    }
    return said(directory, **counts)


@pytest.mark.parametrize("name", ["llama", "gemma2", "olmo2", "mixtral", "gpt_oss", "deepseek_v3"])
def test_sixteen_bits_stay_as_close_to_float32_as_transformers_in_the_same_dtype(name: str, tmp_path: Path) -> None:
    """At most RMS times as far, by the derivation in `reshard.runtime.proof`; on 4 × 48 tokens, as many as the check
    has at least.
    """
    directory = choosing_all(copy(name, tmp_path / "model"))
    logits = {}
    for dtype in (torch.float32, torch.bfloat16):
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, experts_implementation="eager").eval()
        ids = torch.randint(0, model.config.vocab_size, (4, 48), generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            logits[dtype] = model(ids).logits

    def off(found: Tensor) -> float:
        return (found.double() - logits[torch.float32]).pow(2).mean().sqrt().item()

    for mesh in (Mesh(), Mesh(tp=4)):
        found = run_threads(mesh.world, lambda world, mesh=mesh: load_model(directory, mesh=mesh, world=world)(ids))[0]  # type: ignore[misc]
        assert found.dtype == torch.bfloat16
        assert 0 < off(found) <= RMS * off(logits[torch.bfloat16]), mesh


PROCESSES = """
import sys, torch
from torch import distributed
from reshard.layout.mesh import Mesh
from reshard.runtime import load_model

torch.set_num_threads(1)
distributed.init_process_group("gloo")
for job in sys.argv[2:]:
    directory, name, tp, pp, ep, split = job.split(",")
    mesh = Mesh(int(tp), int(pp), int(ep), tuple(map(int, split.split(":"))) if split else None)
    decoder = load_model(directory, torch.float32, mesh=mesh)
    ids = torch.arange(26).view(2, 13)
    kept = decoder.new_cache(2, 13)
    parts = [decoder(ids[:, :8], cache=kept, all_ranks=True), decoder(ids[:, 8:], cache=kept, all_ranks=True)]
    torch.save(torch.cat(parts, 1), f"{sys.argv[1]}/{name}-{distributed.get_rank()}")
distributed.destroy_process_group()
"""


@pytest.mark.parametrize(
    ("ranks", "jobs"),
    [
        (
            4,
            {
                "llama_tied": Mesh(tp=4),
                "qwen3": Mesh(tp=2, pp=2),
                "mixtral": Mesh(tp=4, ep=2),
                "qwen3_moe": Mesh(tp=4, ep=4),
            },
        ),
        (3, {"olmo2": Mesh(tp=3, weights=(2, 1, 1))}),
    ],
)
def test_gloo_processes_compute_what_threads_do(ranks: int, jobs: dict[str, Mesh], tmp_path: Path) -> None:
    """Bit for bit: repeated key heads, two stages, experts cut both ways and one way, unequal ranks;
    started by torchrun.
    """
    (tmp_path / "job.py").write_text(PROCESSES)
    words = [
        f"{checkpoint(name)},{name},{mesh.tp},{mesh.pp},{mesh.ep},{':'.join(map(str, mesh.weights or ()))}"
        for name, mesh in jobs.items()
    ]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*launch, str(tmp_path / "job.py"), str(tmp_path), *words], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    ids = torch.arange(26).view(2, 13)
    for name, mesh in jobs.items():

        def stepwise(world: World, name: str = name, mesh: Mesh = mesh) -> Tensor:
            decoder = load_model(checkpoint(name), torch.float32, mesh=mesh, world=world)
            kept = decoder.new_cache(2, 13)
            return torch.cat([decoder(part, cache=kept, all_ranks=True) for part in (ids[:, :8], ids[:, 8:])], 1)

        for rank, logits in enumerate(run_threads(ranks, stepwise)):
            assert torch.equal(torch.load(tmp_path / f"{name}-{rank}"), logits), (name, rank)
