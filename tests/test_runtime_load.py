"""Loading shards: mapped without a copy, checked before; other meshes and formats read through the plan;
what does not fit refused.
"""

from __future__ import annotations

import json
import math
import mmap
import re
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fixtures import copy, read, rewrite
from running import big_llama, environment, lines_run, llama, save, sign
from safetensors.torch import load_file

import reshard
from reshard.containers.dtypes import BITS
from reshard.containers.entry import Entry
from reshard.errors import MismatchError, ReshardError
from reshard.layout.mesh import Mesh
from reshard.runtime import load, load_model, load_shard, mapped
from reshard.runtime.comm.collectives import World
from reshard.runtime.comm.lost import Lost
from reshard.runtime.comm.threads import run_threads
from reshard.runtime.dtypes import DTYPES
from reshard.runtime.mapped import State

Get = Callable[[str], Path]


def bits(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())


def same(one: State, other: State) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert (tensor.dtype, tensor.shape) == (other[name].dtype, other[name].shape), name
        assert bits(tensor) == bits(other[name]), name


def weights(out: Path, rank: int) -> Path:
    return out / f"rank-{rank:05}" / "model.safetensors"


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama for two ranks; never written to."""
    folder = tmp_path_factory.mktemp("shards")
    reshard.convert(llama(folder / "hf"), folder / "tp2", tp=2)
    return folder / "tp2"


@pytest.fixture
def mine(shards: Path, tmp_path: Path) -> Path:
    """A copy of it, to damage."""
    return Path(shutil.copytree(shards, tmp_path / "out"))


# --- mapping ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gpt2_bare", "deepseek_v3", "deepseek_v3_fp8", "gpt_oss"])
def test_a_shard_is_what_the_safetensors_library_reads(checkpoint: Get, tmp_path: Path, name: str) -> None:
    reshard.convert(checkpoint(name), tmp_path / "out", tp=2, pp=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for rank in range(4):
            same(load_shard(tmp_path / "out", rank, verify="hash"), load_file(weights(tmp_path / "out", rank)))


def test_a_shard_for_another_engine_is_mapped_likewise(checkpoint: Get, tmp_path: Path) -> None:
    reshard.convert(checkpoint("llama"), tmp_path / "out", tp=2, to="vllm")
    same(load_shard(tmp_path / "out", 1), load_file(tmp_path / "out" / "model-rank-1-part-0.safetensors"))


def test_one_rank_needs_the_manifest_and_its_own_folder_alone(mine: Path) -> None:
    expected = load_file(weights(mine, 1))
    for path in mine.iterdir():
        if path.name not in ("manifest.json", "rank-00001"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    same(load_shard(mine, 1, verify="hash"), expected)


MEASURE = """
import sys, torch
from pathlib import Path
from reshard.runtime import load_shard

def anonymous():
    lines = Path("/proc/self/smaps").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Anonymous:")) * 1024

torch.ones(8).sum()
before = anonymous()
state = load_shard(sys.argv[1], 0)
opened = anonymous() - before
total = sum(float(tensor.view(-1)[::2048].float().sum()) for tensor in state.values())  # each page
print(opened, anonymous() - before, sum(tensor.nbytes for tensor in state.values()))
"""


def test_anonymous_memory_grows_by_less_than_20_mb_whatever_the_size(tmp_path: Path) -> None:
    reshard.convert(big_llama(tmp_path / "hf", 300, sparse=True), tmp_path / "out")
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path / "out")], capture_output=True, text=True, env=environment()
    )
    assert done.returncode == 0, done.stderr
    opened, touched, size = map(int, done.stdout.split())
    assert size > 250e6
    assert opened < 20e6
    assert touched < 20e6


def test_tensors_can_be_written_to_and_the_file_stays_as_it_is(mine: Path) -> None:
    before = weights(mine, 0).read_bytes()
    state = load_shard(mine, 0)
    state["norm"].zero_()
    assert not state["norm"].any()
    assert weights(mine, 0).read_bytes() == before
    assert load_shard(mine, 0)["norm"].any()


def test_each_tensor_is_a_storage_of_its_own(shards: Path) -> None:
    for tensor in load_shard(shards, 0).values():
        assert tensor.untyped_storage().nbytes() == tensor.nbytes


@pytest.mark.parametrize("dtype", sorted(BITS))
def test_every_dtype_comes_as_the_library_has_it_or_as_raw_bytes(tmp_path: Path, dtype: str) -> None:
    data = np.random.default_rng(3).integers(0, 2, 96, np.uint8).tobytes()  # 0 or 1: booleans too
    for shape in ((4, 96 * 8 // 4 // BITS[dtype]), (96 * 8 // BITS[dtype],)):
        save(tmp_path / "one.safetensors", {"x": (dtype, shape, data)})
        memory = mmap.mmap(-1, len(data))
        memory[:] = data
        tensor = mapped.view(memory, Entry(dtype, shape, 0, len(data)))
        assert bits(tensor) == data
        if dtype in DTYPES:
            assert tuple(tensor.shape) == shape
            try:
                theirs = load_file(tmp_path / "one.safetensors")["x"]
            except Exception:  # the installed library knows fewer
                continue
            assert (tensor.dtype, tensor.shape) == (theirs.dtype, theirs.shape)
        else:
            assert (tensor.dtype, tensor.nbytes) == (torch.uint8, 96)
            assert tensor.shape[:-1] == shape[:-1]


def test_empty_tensors_and_scalars_are_themselves() -> None:
    memory = mmap.mmap(-1, 8)
    memory[:4] = np.float32(2.5).tobytes()
    assert mapped.view(memory, Entry("F32", (), 0, 4)).item() == 2.5
    empty = mapped.view(memory, Entry("BF16", (0, 5), 4, 0))
    assert (empty.dtype, empty.shape) == (torch.bfloat16, (0, 5))
    assert mapped.view(memory, Entry("F4", (3, 0), 4, 0)).shape == (3, 0)


def test_opening_reads_what_is_said_of_the_tensors_and_none_of_them(tmp_path: Path) -> None:
    """Of ten times the model no byte and few lines of Python more, but for tensors that there are more of.
    Seconds are for the bench.
    """
    read, lines, counts = [], [], []
    for size in (100, 1000):
        out = tmp_path / f"out{size}"
        reshard.convert(big_llama(tmp_path / f"hf{size}", size, sparse=True), out)
        load_shard(out, 0)  # whatever is imported, is now
        before = _read()
        state = load_shard(out, 0)
        read.append(_read() - before)
        counts.append(len(state))
        lines.append(lines_run(lambda out=out: load_shard(out, 0)))
        small = sum(path.stat().st_size for path in out.rglob("*.json"))
        assert read[-1] <= 2 * small + (64 << 10), (read, small)
    assert lines[1] <= 1.1 * counts[1] / counts[0] * lines[0], (lines, counts)


def _read() -> int:
    """Bytes that this process has read by system calls."""
    return int(re.findall(r"rchar: (\d+)", Path("/proc/self/io").read_text())[0])


# --- refusing ---------------------------------------------------------------------------------------------------------


def refused(error: type[ReshardError], out: Path, rank: int, *parts: str, verify: str | None = None) -> None:
    with pytest.raises(error) as caught:
        load_shard(out, rank, verify)
    assert [part for part in parts if part not in str(caught.value)] == [], str(caught.value)
    assert caught.value.hint


@pytest.mark.parametrize("rank", [2, -1, True, "0", None])
def test_a_rank_out_of_range_is_refused(shards: Path, rank: int) -> None:
    refused(ReshardError, shards, rank, "ranks 0 to 1", repr(rank))


def test_what_is_no_shard_directory_is_refused(tmp_path: Path) -> None:
    refused(ReshardError, tmp_path / "nowhere", 0, "no such directory")
    refused(ReshardError, llama(tmp_path / "hf"), 0, "no manifest.json", "reshard convert")


def test_a_newer_format_is_refused(mine: Path) -> None:
    text = json.loads((mine / "manifest.json").read_text()) | {"reshard": "2.0"}
    (mine / "manifest.json").write_text(json.dumps(text))
    refused(ReshardError, mine, 0, "format version 2.0")


@pytest.mark.parametrize("change", [-1, -4096, 1])
def test_a_file_of_another_size_is_refused_with_both_numbers_and_never_mapped(
    mine: Path, change: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = weights(mine, 1).stat().st_size
    with weights(mine, 1).open("r+b") as file:
        file.truncate(size + change)
    monkeypatch.setattr(mmap, "mmap", None)
    refused(MismatchError, mine, 1, str(size), str(size + change))


def test_a_missing_file_is_refused(mine: Path) -> None:
    weights(mine, 0).unlink()
    refused(MismatchError, mine, 0, "missing", "rank-00000/model.safetensors")


def test_exchanged_files_are_refused(mine: Path) -> None:
    weights(mine, 0).rename(mine / "other")
    weights(mine, 1).rename(weights(mine, 0))
    (mine / "other").rename(weights(mine, 1))
    refused(MismatchError, mine, 0, "its header says rank 1, expected 0")


@pytest.mark.parametrize("key", ["plan", "world", "mesh", "version"])
def test_a_file_of_another_conversion_is_refused(mine: Path, key: str) -> None:
    data = weights(mine, 0).read_bytes()
    found = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"][f"reshard.{key}"]
    other = found[:-1] + "7" if key != "version" else "7" + found[1:]
    weights(mine, 0).write_bytes(
        data.replace(f'"reshard.{key}":"{found}"'.encode(), f'"reshard.{key}":"{other}"'.encode())
    )
    refused(
        MismatchError,
        mine,
        0,
        f"{key} {other}" if key != "version" else f"version {other}",
        "expected" if key != "version" else "reads",
    )


def test_a_damaged_header_is_refused(mine: Path) -> None:
    data = bytearray(weights(mine, 0).read_bytes())
    data[8:12] = b"\0\0\0\0"
    weights(mine, 0).write_bytes(data)
    refused(ReshardError, mine, 0, "not a safetensors header")


@pytest.mark.parametrize("at", [-1, 5000])
def test_a_flipped_bit_is_found_where_digests_are_asked_for(mine: Path, at: int) -> None:
    data = bytearray(weights(mine, 1).read_bytes())
    data[at] ^= 1
    weights(mine, 1).write_bytes(data)
    load_shard(mine, 1)
    load_shard(mine, 0, verify="hash")
    refused(MismatchError, mine, 1, "rank-00001/model.safetensors", "digest is", verify="hash")


def test_edited_digests_are_found(mine: Path) -> None:
    path = mine / "rank-00000" / "tensors.json"
    path.write_text(path.read_text().replace('"digest": "', '"digest": "0', 1))
    refused(MismatchError, mine, 0, "tensors.json", "by the manifest", verify="hash")


def test_an_unknown_way_to_verify_is_refused(shards: Path) -> None:
    refused(ReshardError, shards, 0, "'md5'", verify="md5")


# --- through the plan -------------------------------------------------------------------------------------------------


class Rank:
    """As much of a world as opening a directory asks for."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size


def states(out: Path, size: int, mesh: Mesh | None = None) -> Iterator[tuple[load.Opened, State]]:
    for rank in range(size):
        opened = load.open_for(out, mesh, Rank(rank, size))  # type: ignore[arg-type]
        yield opened, opened.state(rank)


ROUTES = [
    ("llama", {"tp": 4}, Mesh(tp=2)),
    ("llama", {"tp": 2}, Mesh(tp=8)),
    ("qwen3_tied", {"tp": 2, "pp": 2}, Mesh(tp=4)),
    ("phi3", {"tp": 4}, Mesh(pp=2)),
    ("gpt2", {"tp": 2}, Mesh(tp=3, weights=(2, 1, 1))),
    ("mixtral", {"tp": 4, "ep": 4}, Mesh(tp=4, ep=2)),
    ("gpt_oss", {"tp": 2, "ep": 2}, Mesh(tp=4)),
    ("deepseek_v3", {"tp": 2, "ep": 2, "pp": 2}, Mesh(tp=2)),
    ("deepseek_v3_fp8", {"tp": 2}, Mesh()),
]


@pytest.mark.parametrize(("name", "written", "wanted"), ROUTES, ids=[f"{name}-{mesh}" for name, _, mesh in ROUTES])
def test_shards_for_another_mesh_and_published_files_become_what_a_conversion_writes(
    checkpoint: Get, tmp_path: Path, name: str, written: dict[str, int], wanted: Mesh
) -> None:
    reshard.convert(checkpoint(name), tmp_path / "written", **written)  # type: ignore[arg-type]
    reshard.convert(
        checkpoint(name), tmp_path / "wanted", tp=wanted.tp, pp=wanted.pp, ep=wanted.ep, split=wanted.weights
    )
    expected = [load_file(weights(tmp_path / "wanted", rank)) for rank in range(wanted.world)]
    for out in (tmp_path / "written", checkpoint(name)):
        for rank, (opened, state) in enumerate(states(out, wanted.world, wanted)):
            same(state, expected[rank])
            assert opened.source is not None
    for rank, (opened, state) in enumerate(states(tmp_path / "wanted", wanted.world)):
        same(state, expected[rank])
        assert opened.source is None, "its own mesh is mapped"


@pytest.mark.parametrize("manifest", [True, False])
def test_shards_for_vllm_become_what_a_conversion_writes(checkpoint: Get, tmp_path: Path, manifest: bool) -> None:
    reshard.convert(checkpoint("llama"), tmp_path / "vllm", tp=2, to="vllm")
    reshard.convert(checkpoint("llama"), tmp_path / "wanted", tp=2)
    if not manifest:
        (tmp_path / "vllm" / "manifest.json").unlink()
    for rank, (_, state) in enumerate(states(tmp_path / "vllm", 2)):
        same(state, load_file(weights(tmp_path / "wanted", rank)))


@pytest.mark.parametrize(("tp", "size"), [(1, 4), (2, 4), (4, 2), (4, 1)])
def test_each_rank_reads_the_bytes_that_it_needs(tmp_path: Path, tp: int, size: int) -> None:
    out = big_llama(tmp_path / "hf", 40)
    if tp > 1:
        reshard.convert(out, out := tmp_path / "out", tp=tp)
    for opened, state in states(out, size):
        needed = sum(tensor.nbytes for tensor in state.values())
        assert needed - opened.read in (0, 2 * 2 * 1024 * (-8190 % size)), "all but the padding of embed and head"


def test_reading_is_counted_by_the_system_too(tmp_path: Path) -> None:
    source = big_llama(tmp_path / "hf", 60)

    def read() -> int:
        return int(Path("/proc/self/io").read_text().split()[1])

    opened = load.open_for(source, Mesh(tp=4), Rank(1, 4))  # type: ignore[arg-type]
    before = read()
    state = opened.state(1)
    assert read() - before <= sum(tensor.nbytes for tensor in state.values()) + 65536


def test_a_source_that_shrinks_meanwhile_is_an_error_in_words(tmp_path: Path) -> None:
    source = llama(tmp_path / "hf")
    opened = load.open_for(source, None, Rank(0, 1))  # type: ignore[arg-type]
    with (source / "model.safetensors").open("r+b") as file:
        file.truncate(file.seek(0, 2) // 2)
    with pytest.raises(ReshardError, match="the file ends at"):
        opened.state(0)


def test_one_rank_at_its_own_mesh_needs_no_other_ranks_files(mine: Path) -> None:
    shutil.rmtree(mine / "rank-00000")
    opened = load.open_for(mine, None, Rank(1, 2))  # type: ignore[arg-type]
    same(opened.state(1), load_file(weights(mine, 1)))


MESHES = [
    ("llama", {"tp": 2}),
    ("qwen3_tied", {"pp": 2}),
    ("qwen3_tied_stored", {"tp": 2}),
    ("deepseek_v3", {"tp": 2, "ep": 2, "pp": 2}),
    ("deepseek_v3_fp8", {"tp": 2}),
    ("gpt2", {}),
]


@pytest.mark.parametrize(("name", "mesh"), MESHES)
def test_manifest_carried_files_and_ones_own_folder_are_enough_for_a_model(
    checkpoint: Get, tmp_path: Path, name: str, mesh: dict[str, int]
) -> None:
    reshard.convert(checkpoint(name), out := tmp_path / "out", **mesh)  # type: ignore[arg-type]
    size = math.prod(mesh.get(axis, 1) for axis in ("tp", "pp"))
    whole = [load.open_for(out, None, Rank(rank, size)) for rank in range(size)]  # type: ignore[arg-type]
    shutil.rmtree(out / "source")
    for rank in range(size):
        for other in range(size):
            if other != rank:
                (out / f"rank-{other:05}").rename(tmp_path / f"{other}")
        alone = load.open_for(out, None, Rank(rank, size))  # type: ignore[arg-type]
        assert alone.facts["manifest"] == whole[rank].facts["manifest"]
        assert contents(alone, rank) == contents(whole[rank], rank)
        same(alone.state(rank), load_file(weights(out, rank)))
        for other in range(size):
            if other != rank:
                (tmp_path / f"{other}").rename(out / f"rank-{other:05}")


def contents(opened: load.Opened, rank: int) -> dict[str, object]:
    """What a layout says of each stored tensor of a rank, and of what lies in it."""
    layout = opened.layout
    mine = [(name, piece) for name, found in layout.pieces.items() for piece in found if piece.slot.rank == rank]
    pieces = {
        name: (
            piece.slot.template.name.text,
            piece.offset,
            sorted(zip(piece.tensor.axes, piece.box, piece.strides, strict=True)),
        )
        for name, piece in mine
    }
    slots = {
        slot.name(point): (slot.shape, layout.dtype(slot, point))
        for slot in layout.by_rank[rank]
        for point in slot.points()
    }
    alias = {name: other for name, other in layout.alias.items() if {name, other} & pieces.keys()}
    return {"pieces": pieces, "slots": slots, "alias": alias}


def test_other_tables_than_the_shipped_ones_are_noticed_without_the_folder_source(mine: Path) -> None:
    shutil.rmtree(mine / "source")
    text = (mine / "manifest.json").read_text()
    (mine / "manifest.json").write_text(text.replace('"inter": 88', '"inter": 80'))
    with pytest.raises(MismatchError, match="by the shipped tables it is"):
        load.open_for(mine, None, Rank(0, 2))  # type: ignore[arg-type]


def test_a_digest_is_checked_on_the_way_to_another_mesh(mine: Path) -> None:
    data = bytearray(weights(mine, 1).read_bytes())
    data[-1] ^= 1
    weights(mine, 1).write_bytes(data)
    opened = load.open_for(mine, None, Rank(0, 1))  # type: ignore[arg-type]
    opened.state(0)
    with pytest.raises(MismatchError, match="digest is"):
        opened.state(0, verify="hash")


def test_a_signed_directory_with_another_header_is_refused(mine: Path) -> None:
    data = weights(mine, 0).read_bytes()
    weights(mine, 0).write_bytes(data.replace(b'"format":"pt"', b'"format":"np"'))
    sign(mine)
    with pytest.raises(MismatchError, match="its header is not that of this rank"):
        load.open_for(mine, None, Rank(0, 2))  # type: ignore[arg-type]


# --- casts ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tp", [2, 1])
def test_a_cast_changes_floating_weights_and_nothing_else(shards: Path, tp: int) -> None:
    opened = load.open_for(shards, None, Rank(0, tp))  # type: ignore[arg-type]
    plain, cast = opened.state(0), opened.state(0, torch.float32)
    assert {tensor.dtype for tensor in plain.values()} == {torch.bfloat16}
    same(cast, {name: tensor.float() for name, tensor in plain.items()})


def test_block_scaled_fp8_and_its_scales_stay_when_weights_are_cast(checkpoint: Get) -> None:
    opened = load.open_for(checkpoint("deepseek_v3_fp8"), Mesh(tp=2), Rank(1, 2))  # type: ignore[arg-type]
    plain, cast = opened.state(1), opened.state(1, torch.float16)
    kept = {name for name in plain if plain[name].dtype == cast[name].dtype}
    assert {name for name in plain if plain[name].dtype is torch.float8_e4m3fn} <= kept
    assert {name for name in plain if name.endswith("_scale")} <= kept
    assert {cast[name].dtype for name in plain if plain[name].dtype is torch.bfloat16} == {torch.float16}


def test_what_is_wider_than_the_weights_stays_as_wide(checkpoint: Get) -> None:
    opened = load.open_for(checkpoint("deepseek_v3"), None, Rank(0, 1))  # type: ignore[arg-type]
    plain = opened.state(0)
    wide = [name for name in plain if plain[name].dtype is torch.float32]
    assert wide
    half, double = opened.state(0, torch.float16), opened.state(0, torch.float64)
    assert {half[name].dtype for name in wide} == {torch.float32}
    assert {half[name].dtype for name in half if name not in wide} == {torch.float16}
    assert {tensor.dtype for tensor in double.values()} == {torch.float64}


@pytest.mark.parametrize("part", ["norm", "lm_head", ".layers.0."])
def test_a_checkpoint_of_several_dtypes_is_run_in_that_of_most(part: str, tmp_path: Path) -> None:
    """As transformers does, which casts all of it: norms, or a head, in float32 among 16-bit weights."""
    source, out = copy("qwen3", tmp_path / "source"), tmp_path / "out"
    rewrite(source, lambda state: {name: tensor.float() if part in name else tensor for name, tensor in state.items()})
    assert {tensor.dtype for tensor in read(source).values()} == {torch.float32, torch.bfloat16}
    reshard.convert(source, out, tp=2)
    assert reshard.verify(out, against=source, only="numerics").ok
    assert {parameter.dtype for parameter in load_model(source).parameters()} == {torch.bfloat16}
    torch.testing.assert_close(logits(out, 2), logits(source), rtol=0.1, atol=0.1)


# --- a job ------------------------------------------------------------------------------------------------------------


def test_a_job_of_another_size_is_refused_with_both_numbers_where_resharding_is_not_wanted(
    shards: Path, checkpoint: Get
) -> None:
    with pytest.raises(ReshardError, match=r"is for 2 ranks.*this job has 4 ranks") as caught:
        load.open_for(shards, None, Rank(0, 4), reshard_on_load=False)  # type: ignore[arg-type]
    assert "start 2 processes" in str(caught.value.hint)
    with pytest.raises(ReshardError, match="not a shard directory for 4 ranks"):
        load.open_for(checkpoint("llama"), None, Rank(0, 4), reshard_on_load=False)  # type: ignore[arg-type]


def test_a_mesh_of_another_size_than_the_job_is_refused(shards: Path) -> None:
    with pytest.raises(ReshardError, match="has 4 ranks, the job 2"):
        load.open_for(shards, Mesh(tp=4), Rank(0, 2))  # type: ignore[arg-type]


def test_a_mesh_that_does_not_fit_is_refused_with_those_that_do(checkpoint: Get) -> None:
    with pytest.raises(ReshardError) as caught:
        load.open_for(checkpoint("llama"), None, Rank(0, 7))  # type: ignore[arg-type]
    assert "TP sizes that work" in str(caught.value)


def test_a_rank_with_another_manifest_is_named(tmp_path: Path) -> None:
    from running import LLAMA, llama_tensors

    for seed in range(2):
        source = llama(tmp_path / f"hf{seed}", llama_tensors(LLAMA, seed))
        reshard.convert(source, tmp_path / f"out{seed}", tp=4)

    def work(world: World) -> str:
        world.phase = "load"
        opened = load.open_for(tmp_path / f"out{int(world.rank == 2)}", None, world)
        try:
            world.agree(opened.facts)
        except Lost as error:
            return error.message
        return "agreed"

    theirs, ours = (json.loads((tmp_path / f"out{seed}" / "manifest.json").read_text())["root"] for seed in (1, 0))
    assert set(run_threads(4, work)) == {f"rank 2 diverged in load: its manifest is {theirs}, but {ours} on rank 0"}


# --- a model ----------------------------------------------------------------------------------------------------------


TOKENS = torch.tensor([[5, 17, 200, 3, 44, 8]])


def logits(out: Path, size: int = 1, **options: Any) -> torch.Tensor:
    """What a job of threads makes of some tokens; every rank's answer is the same."""

    def work(world: World) -> torch.Tensor:
        decoder = load_model(out, world=world, **options)
        assert not any(parameter.is_meta for parameter in decoder.parameters())
        found = decoder(TOKENS, all_ranks=True)
        assert found is not None
        return found.float()

    first, *rest = run_threads(size, work)
    assert all(torch.equal(first, other) for other in rest)
    return first


@pytest.mark.parametrize("name", ["llama", "qwen3_tied", "mixtral"])
def test_a_model_is_the_same_from_any_directory_at_any_mesh(checkpoint: Get, tmp_path: Path, name: str) -> None:
    reshard.convert(checkpoint(name), tmp_path / "tp4", tp=4)
    reshard.convert(checkpoint(name), tmp_path / "vllm", tp=2, to="vllm")
    expected = logits(checkpoint(name), dtype=torch.float64)
    ways: list[tuple[Path, int, Mesh | None]] = [
        (tmp_path / "tp4", 4, None),
        (tmp_path / "tp4", 2, None),
        (tmp_path / "tp4", 4, Mesh(tp=2, pp=2)),
        (checkpoint(name), 2, None),
        (tmp_path / "vllm", 2, None),
    ]
    for out, size, mesh in ways:
        torch.testing.assert_close(logits(out, size, mesh=mesh, dtype=torch.float64), expected, rtol=1e-9, atol=1e-9)


def test_a_process_alone_loads_without_a_process_group(shards: Path) -> None:
    decoder = load_model(shards, dtype=torch.float32)
    assert decoder(TOKENS).shape == (1, 6, 331)  # type: ignore[union-attr]
    assert {parameter.dtype for parameter in decoder.parameters()} == {torch.float32}


def test_a_job_without_a_process_group_is_told_to_make_one(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ReshardError, match="WORLD_SIZE is 2, but no process group is initialised"):
        load_model(shards)


def test_a_rank_that_cannot_load_ends_the_job_with_its_own_error(mine: Path) -> None:
    weights(mine, 1).unlink()
    with pytest.raises(MismatchError, match="is missing; it should have"):
        run_threads(2, lambda world: load_model(mine, world=world))


def test_ranks_that_want_other_dtypes_are_told_apart(shards: Path) -> None:
    with pytest.raises(Lost, match=r"rank 1 diverged in load: its dtype is torch.float16, but torch.float32 on rank 0"):
        run_threads(2, lambda world: load_model(shards, dtype=(torch.float32, torch.float16)[world.rank], world=world))
