"""Laws of reshard.checkpoints.engine_shards: directories that vLLM wrote itself are read exactly, or refused in words.

The directories are written here in plain torch, from the text of the format alone; nothing of reshard takes part in
that.
"""

import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import fixtures
import pytest
import torch
from safetensors.torch import load_file, save_file

from reshard import api
from reshard.checkpoints import manifest
from reshard.checkpoints.engine_shards import recognised
from reshard.checkpoints.source import Source, open_source
from reshard.checkpoints.source_kinds import EngineSource
from reshard.errors import PlaceError, ReshardError
from reshard.jobs import inspect, verify
from reshard.jobs.convert import Options, convert, prepare
from reshard.layout.mesh import Mesh
from reshard.store.destination import LocalDestination

State = dict[str, torch.Tensor]

FAMILIES = ("llama", "llama_tied", "llama_bias", "mistral", "qwen2_plain", "qwen3", "mixtral", "qwen3_moe", "phi3")
MESHES = ((1, 1), (2, 1), (4, 1), (8, 1), (2, 2))
MAX = 50 * 10**9
INDEX = "model.safetensors.index.json"
SCALES = ("_k_scale", "_v_scale", "_q_scale", "_prob_scale")


# What vLLM 0.33 holds on each rank


@cache
def original(name: str) -> State:
    return fixtures.read(fixtures.checkpoint(name))


@cache
def config_of(name: str) -> dict[str, Any]:
    return json.loads((fixtures.checkpoint(name) / "config.json").read_text())


def stages_of(layers: int, pp: int) -> list[range]:
    """Layers of each stage as vLLM deals them out: what remains goes to the stages before the last, the later first."""
    counts = [layers // pp] * pp
    for n in range(layers % pp):
        counts[pp - 2 - n] += 1
    return [range(sum(counts[:stage]), sum(counts[: stage + 1])) for stage in range(pp)]


def held_by_vllm(name: str, tp: int, stages: list[range]) -> dict[tuple[int, int], State]:
    """The tensors of every (stage, rank), in the order of their modules."""
    state, config = original(name), config_of(name)
    heads, kv = config["num_attention_heads"], config["num_key_value_heads"]
    tied = config.get("tie_word_embeddings", False)
    embed = state["model.embed_tokens.weight"]
    head = embed if tied else state["lm_head.weight"]
    held = {}
    for stage, layers in enumerate(stages):
        for rank in range(tp):
            mine: State = {}
            last = stage == len(stages) - 1
            everywhere = "num_experts_per_tok" in config  # of a mixture every stage has them
            if (stage == 0 or everywhere) and not (tied and last):
                mine["model.embed_tokens.weight"] = vocab_part(embed, rank, tp)
            for layer in layers:
                mine |= layer_of(state, f"model.layers.{layer}.", rank, tp, heads, kv)
            if last or everywhere:
                mine |= {"model.norm.weight": state["model.norm.weight"], "lm_head.weight": vocab_part(head, rank, tp)}
            held[stage, rank] = {key: tensor.clone().contiguous() for key, tensor in mine.items()}
    return held


def vocab_part(weight: torch.Tensor, rank: int, tp: int) -> torch.Tensor:
    padding = torch.zeros(-weight.shape[0] % 64, weight.shape[1], dtype=weight.dtype)
    return torch.cat([weight, padding]).chunk(tp)[rank]


def layer_of(state: State, at: str, rank: int, tp: int, heads: int, kv: int) -> State:
    """One layer on one rank: q, k and v fused after they were cut, KV heads shared by consecutive ranks where there are
    too few.
    """
    mine: State = {}
    attn, mlp = at + "self_attn.", at + "mlp."
    for kind in ("weight", "bias"):
        if f"{attn}qkv_proj.{kind}" in state:
            fused = state[f"{attn}qkv_proj.{kind}"]
            rows = fused.shape[0] // (heads + 2 * kv)
            q, k, v = fused.split([heads * rows, kv * rows, kv * rows])
        elif f"{attn}q_proj.{kind}" in state:
            q, k, v = (state[f"{attn}{part}_proj.{kind}"] for part in "qkv")
        else:
            continue
        first, count = rank * kv // tp, max(1, kv // tp)
        shared = [torch.cat(part.chunk(kv)[first : first + count]) for part in (k, v)]
        mine[f"{attn}qkv_proj.{kind}"] = torch.cat([q.chunk(tp)[rank], *shared])
    mine[attn + "o_proj.weight"] = state[attn + "o_proj.weight"].chunk(tp, 1)[rank]
    mine |= {attn + f"attn.{scale}": torch.tensor(1.0) for scale in SCALES}
    for whole in ("self_attn.o_proj.bias", "self_attn.q_norm.weight", "self_attn.k_norm.weight", "mlp.down_proj.bias"):
        if at + whole in state:
            mine[at + whole] = state[at + whole]
    for kind in ("weight", "bias"):
        if f"{mlp}gate_up_proj.{kind}" in state:
            halves = state[f"{mlp}gate_up_proj.{kind}"].chunk(2)
        elif f"{mlp}gate_proj.{kind}" in state:
            halves = (state[f"{mlp}gate_proj.{kind}"], state[f"{mlp}up_proj.{kind}"])
        else:
            continue
        mine[f"{mlp}gate_up_proj.{kind}"] = torch.cat([half.chunk(tp)[rank] for half in halves])
    if mlp + "down_proj.weight" in state:
        mine[mlp + "down_proj.weight"] = state[mlp + "down_proj.weight"].chunk(tp, 1)[rank]
    mine |= experts_of(state, at, rank, tp)
    return mine | {
        at + f"{norm}.weight": state[at + f"{norm}.weight"] for norm in ("input_layernorm", "post_attention_layernorm")
    }


def experts_of(state: State, at: str, rank: int, tp: int) -> State:
    for module, router, (gate, up, down) in (
        ("block_sparse_moe", "gate", ("w1", "w3", "w2")),
        ("mlp", "experts.gate", ("gate_proj", "up_proj", "down_proj")),
    ):
        numbers = range(
            sum(name.startswith(f"{at}{module}.experts.") and name.endswith(f".{gate}.weight") for name in state)
        )
        if not numbers:
            continue

        def stack(part: str, dim: int, module: str = module, numbers: range = numbers) -> torch.Tensor:
            return torch.stack([state[f"{at}{module}.experts.{n}.{part}.weight"].chunk(tp, dim)[rank] for n in numbers])

        return {
            f"{at}{module}.{router}.weight": state[f"{at}{module}.gate.weight"],
            f"{at}{module}.experts.routed_experts.w13_weight": torch.cat([stack(gate, 0), stack(up, 0)], 1),
            f"{at}{module}.experts.routed_experts.w2_weight": stack(down, 1),
        }
    return {}


def shard_name(stage: int, rank: int, pp: int, part: int | str = 0) -> str:
    return (
        f"model-pp-{stage}-tp-{rank}-part-{part}.safetensors"
        if pp > 1
        else f"model-rank-{rank}-part-{part}.safetensors"
    )


def saved(directory: Path, name: str, tp: int, pp: int = 1, stages: list[range] | None = None) -> Path:
    """What vLLM's save script leaves: each rank in several parts, and a copy of everything beside the weights,
    the index too.
    """
    source = fixtures.checkpoint(name)
    directory.mkdir()
    for path in source.iterdir():
        if path.suffix not in (".bin", ".pt", ".safetensors"):
            shutil.copy(path, directory)
    for (stage, rank), state in held_by_vllm(
        name, tp, stages or stages_of(config_of(name)["num_hidden_layers"], pp)
    ).items():
        parts: list[State] = [{}]
        for key, tensor in state.items():
            if sum(t.nbytes for t in parts[-1].values()) + tensor.nbytes > 40_000 and parts[-1]:
                parts.append({})
            parts[-1][key] = tensor
        for number, part in enumerate(parts):
            save_file(
                part, directory / shard_name(stage, rank, pp, number), metadata={"format": "pt"} if rank % 2 else None
            )
    return directory


def edit(path: Path, change: Callable[[State], object]) -> None:
    """Change the tensors of one file."""
    state = load_file(path)
    change(state)
    save_file({key: tensor.contiguous() for key, tensor in state.items()}, path)


def holding(directory: Path, key: str, rank: int = 0) -> Path:
    """The part that holds a key."""
    return next(path for path in directory.glob(f"model-rank-{rank}-part-*.safetensors") if key in load_file(path))


def configured(directory: Path, **changes: Any) -> None:
    """Set keys of config.json; those set to ... are removed."""
    fixtures.configure(
        directory, *(k for k, v in changes.items() if v is ...), **{k: v for k, v in changes.items() if v is not ...}
    )


# What reshard makes of it


def to(source: Source | Path, out: Path, what: str = "hf", mesh: Mesh | None = None, limit: int | None = None) -> Path:
    source = source if isinstance(source, Source) else open_source(source)
    convert(prepare(source, what, mesh or Mesh(), Options(), limit), LocalDestination(out), Options())
    return out


def tree(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def different(one: Path, other: Path) -> list[str]:
    a, b = tree(one), tree(other)
    return sorted(name for name in a.keys() | b.keys() if a.get(name) != b.get(name))


@pytest.fixture(scope="session")
def anew(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """An original, written again as transformers would, by the direct way; once per session."""

    @cache
    def make(name: str) -> Path:
        return to(fixtures.checkpoint(name), tmp_path_factory.mktemp("anew") / name, limit=MAX)

    return make


@pytest.mark.parametrize(("tp", "pp"), MESHES)
@pytest.mark.parametrize("name", FAMILIES)
def test_a_directory_of_vllm_becomes_what_transformers_would_write(
    name: str, tp: int, pp: int, tmp_path: Path, anew: Callable[[str], Path]
) -> None:
    """Merged, it equals the original split anew, byte for byte; the mesh is found, and the copied index is not carried
    along.
    """
    source = open_source(saved(tmp_path / "vllm", name, tp, pp))
    assert (type(source), source.layout.mesh.tp, source.layout.mesh.pp) == (EngineSource, tp, pp)
    assert different(to(source, tmp_path / "hf"), anew(name)) == []


@pytest.mark.parametrize(("tp", "pp"), MESHES)
@pytest.mark.parametrize("name", FAMILIES)
def test_converting_to_vllm_writes_what_vllm_holds(name: str, tp: int, pp: int, tmp_path: Path) -> None:
    """Every rank's tensors are those written in plain torch, bit by bit, under the names for which vLLM looks,
    and no other.
    """
    if (name, tp) == ("qwen3_moe", 8):
        pytest.skip("more ranks than experts, which vLLM refuses")
    stages = stages_of(config_of(name)["num_hidden_layers"], pp)
    mesh = Mesh(tp, pp, layers=tuple(map(len, stages)) if pp > 1 else None)
    out = to(fixtures.checkpoint(name), tmp_path / "out", "vllm", mesh)
    for (stage, rank), wanted in held_by_vllm(name, tp, stages).items():
        (path,) = out.glob(shard_name(stage, rank, pp, "*"))
        found = load_file(path)
        assert found.keys() == wanted.keys()
        for key, tensor in wanted.items():
            assert (found[key].dtype, found[key].shape) == (tensor.dtype, tensor.shape), key
            assert torch.equal(fixtures.bits(found[key]), fixtures.bits(tensor)), key
    assert len(list(out.glob("*.safetensors"))) == tp * pp
    assert manifest.present(out)
    assert open_source(out).root_digest == manifest.load(out).root


@pytest.mark.parametrize("name", ["llama", "llama_tied", "qwen3_moe"])
def test_a_conversion_stripped_of_everything_of_ours_is_read(
    name: str, tmp_path: Path, anew: Callable[[str], Path]
) -> None:
    """Without manifest, source and tensors.json, what `--to vllm` wrote is read all the same."""
    out = to(fixtures.checkpoint(name), tmp_path / "out", "vllm", Mesh(4))
    (out / "manifest.json").unlink()
    for folder in (out / "source", *out.glob("rank-*")):
        shutil.rmtree(folder)
    assert different(to(out, tmp_path / "hf"), anew(name)) == []


@pytest.mark.parametrize("name", ["llama_tied", "qwen2", "mixtral", "qwen3_moe", "phi3"])
def test_the_merge_is_what_transformers_writes(name: str, tmp_path: Path) -> None:
    """Every weights file equals that of from_pretrained and save_pretrained on the original, byte for byte."""
    transformers = pytest.importorskip("transformers", minversion="5.23")
    model = transformers.AutoModelForCausalLM.from_pretrained(fixtures.checkpoint(name), dtype="auto")
    model.save_pretrained(tmp_path / "theirs")
    ours = to(saved(tmp_path / "vllm", name, 4), tmp_path / "ours")
    wanted = {path.name: path.read_bytes() for path in (tmp_path / "theirs").glob("*.safetensors")}
    assert {path.name: path.read_bytes() for path in ours.glob("*.safetensors")} == wanted


@pytest.mark.parametrize(
    ("name", "tp", "pp"), [("llama", 8, 1), ("llama_tied", 4, 1), ("llama_tied", 2, 2), ("qwen3_moe", 8, 1)]
)
def test_native_shards_equal_those_of_the_original(
    name: str, tp: int, pp: int, tmp_path: Path, anew: Callable[[str], Path]
) -> None:
    """Converted to native TP 2, each weights file is that of the direct conversion; it verifies, and merges as the
    directory does.
    """
    source = open_source(saved(tmp_path / "vllm", name, tp, pp))
    direct = to(fixtures.checkpoint(name), tmp_path / "direct", "native", Mesh(2))
    out = to(source, tmp_path / "out", "native", Mesh(2))
    for rank in range(2):
        file = f"rank-0000{rank}/model.safetensors"
        assert (out / file).read_bytes() == (direct / file).read_bytes()
    assert verify.verify(out, source).ok
    assert verify.verify(tmp_path / "vllm", open_source(fixtures.checkpoint(name))).ok
    assert different(to(out, tmp_path / "hf"), anew(name)) == []
    assert different(to(source, tmp_path / "again", "native", Mesh(2)), out) == []


def test_the_merge_can_be_split_anew(tmp_path: Path) -> None:
    """With --max-file-size it is what the original gives with the same limit, index included."""
    out = to(saved(tmp_path / "vllm", "llama", 4), tmp_path / "out", limit=60_000)
    assert (out / INDEX).exists()
    assert different(out, to(fixtures.checkpoint("llama"), tmp_path / "direct", limit=60_000)) == []


def test_more_than_50_gb_become_several_files_with_an_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where transformers would split, so do the originals: with its limit lowered, the index and every file are as
    split directly.
    """
    monkeypatch.setattr("reshard.checkpoints.engine_shards.MAX_FILE_SIZE", 60_000)
    source = open_source(saved(tmp_path / "vllm", "mixtral", 4))
    direct = to(fixtures.checkpoint("mixtral"), tmp_path / "direct", limit=60_000)
    assert different(to(source, tmp_path / "out"), direct) == []
    assert different(to(to(source, tmp_path / "native", "native", Mesh(2)), tmp_path / "back"), direct) == []


@pytest.mark.parametrize(
    ("name", "counts"), [("qwen3", (1, 4)), ("qwen3", (3, 2)), ("qwen3", (1, 1, 3)), ("mistral", (1, 1, 1))]
)
def test_any_partition_of_the_layers_is_found(
    name: str, counts: tuple[int, ...], tmp_path: Path, anew: Callable[[str], Path]
) -> None:
    """VLLM_PP_LAYER_PARTITION may have dealt out the layers in any way: what each stage holds says how.
    Equal stages need no word.
    """
    stages = [range(sum(counts[:n]), sum(counts[: n + 1])) for n in range(len(counts))]
    source = open_source(saved(tmp_path / "vllm", name, 2, len(counts), stages))
    assert source.layout.mesh == Mesh(2, len(counts), layers=counts if len(set(counts)) > 1 else None)
    assert different(to(source, tmp_path / "hf"), anew(name)) == []


def test_parts_may_be_called_anything(tmp_path: Path, anew: Callable[[str], Path]) -> None:
    """Numbers with gaps, in any order, and an empty part, as vLLM's glob takes them."""
    source = saved(tmp_path / "vllm", "llama", 2)
    parts = sorted(source.glob("model-rank-1-part-*.safetensors"))
    assert len(parts) > 2
    for number, path in enumerate(parts):
        path.rename(source / shard_name(0, 1, 1, f"{17 - 5 * number}x"))
    save_file({}, source / shard_name(0, 0, 1, 99))
    assert different(to(source, tmp_path / "hf"), anew("llama")) == []


@pytest.mark.parametrize(
    ("name", "tp", "said"),
    [(name, tp, ...) for name in ("llama", "qwen3_moe", "phi3") for tp in (1, 4, 8)] + [("qwen3", 8, None)],
)
def test_a_head_dim_that_config_does_not_say_is_solved(
    name: str, tp: int, said: Any, tmp_path: Path, anew: Callable[[str], Path]
) -> None:
    """Missing or null, it follows from the shards, also where KV heads are repeated."""
    source = saved(tmp_path / "vllm", name, tp)
    configured(source, head_dim=said)
    found = open_source(source)
    assert found.layout.model.sizes["head_dim"] == config_of(name)["head_dim"]
    assert different(to(found, tmp_path / "hf"), anew(name)) == ["config.json"]


@pytest.mark.parametrize(
    ("name", "key"),
    [("qwen3_moe", "moe_intermediate_size"), ("phi3", "intermediate_size"), ("mixtral", "num_local_experts")],
)
@pytest.mark.parametrize("tp", [1, 4])
def test_other_sizes_that_config_does_not_say_are_solved(
    name: str, key: str, tp: int, tmp_path: Path, anew: Callable[[str], Path]
) -> None:
    """Axes that are cut, and one that the published checkpoint enumerates, follow from one dimension,
    together with head_dim.
    """
    source = saved(tmp_path / "vllm", name, tp)
    configured(source, head_dim=..., **{key: ...})
    assert different(to(source, tmp_path / "hf"), anew(name)) == ["config.json"]


def test_both_spellings_of_config(tmp_path: Path, anew: Callable[[str], Path]) -> None:
    """Experts counted under the other key, sizes in a nested text_config: the same model."""
    source = saved(tmp_path / "vllm", "qwen3_moe", 2)
    config = json.loads((source / "config.json").read_text())
    config["num_experts"] = config.pop("num_local_experts")
    (source / "config.json").write_text(json.dumps({"model_type": config["model_type"], "text_config": config}))
    assert different(to(source, tmp_path / "hf"), anew("qwen3_moe")) == ["config.json"]


def test_each_tensor_keeps_its_dtype(tmp_path: Path) -> None:
    """Routers and the norms of one layer in fp32 beside bf16 come out so, with every other tensor as it was."""
    source = saved(tmp_path / "vllm", "qwen3_moe", 2)
    single = re.compile(r"model\.layers\.(\d+\.mlp\.(experts\.)?gate|1\.input_layernorm)\.weight")
    for path in source.glob("*.safetensors"):
        edit(path, lambda state: state.update({key: state[key].float() for key in state if single.fullmatch(key)}))
    found = load_file(to(source, tmp_path / "hf") / "model.safetensors")
    wanted = {key: tensor.float() if single.fullmatch(key) else tensor for key, tensor in original("qwen3_moe").items()}
    assert sum(single.fullmatch(key) is not None for key in wanted) == 4
    assert found.keys() == wanted.keys()
    assert all(found[key].dtype == wanted[key].dtype and torch.equal(found[key], wanted[key]) for key in wanted)


def test_padding_and_constants_are_ignored(tmp_path: Path, anew: Callable[[str], Path]) -> None:
    """Whatever stands in the rows beyond the vocabulary, and in the scales, the merge is the same."""
    source = saved(tmp_path / "vllm", "llama", 4)
    scale = "model.layers.2.self_attn.attn._v_scale"
    edit(holding(source, scale, 1), lambda state: state.update({scale: torch.tensor(0.25)}))
    rows = 384 - 331
    for key in ("lm_head.weight", "model.embed_tokens.weight"):
        edit(holding(source, key, 3), lambda state, key=key: state[key][-rows:].fill_(7.0))
    assert different(to(source, tmp_path / "hf"), anew("llama")) == []
    check = api.verify(source, against=fixtures.checkpoint("llama"), only="weights").checks[0]
    assert check.ok and [note for note in check.notes if f"{scale} is not 1.0" in note]  # said, and no failure


# Which directories are taken for such


def test_published_weights_and_manifests_come_first(tmp_path: Path) -> None:
    """Beside model.safetensors, or an index one of whose files is there, the shards are not what the directory is."""
    source = saved(tmp_path / "vllm", "qwen2", 2)
    assert recognised(source) is not None
    shutil.copy(fixtures.checkpoint("qwen2") / "model.safetensors", source)
    assert recognised(source) is None
    assert open_source(source).layout.mesh == Mesh()
    indexed = saved(tmp_path / "indexed", "llama", 2)
    assert (indexed / INDEX).exists()
    shutil.copy(fixtures.checkpoint("llama") / "model-00002-of-00007.safetensors", indexed)
    with pytest.raises(ReshardError, match=r"model-00001-of-00007\.safetensors, which does not exist"):
        open_source(indexed)


@pytest.mark.parametrize(
    "stray", ["model-rank-01-part-0.safetensors", "model-rank-0-part-0.bin", "xmodel-rank-0-part-0.safetensors"]
)
def test_names_that_vllm_does_not_look_for(stray: str, tmp_path: Path) -> None:
    """Leading zeros, other endings and other beginnings make no shard directory."""
    (tmp_path / stray).touch()
    assert recognised(tmp_path) is None


def test_inspect_and_plan_tell_what_it_is(tmp_path: Path) -> None:
    """The report names format, mesh and the sizes of the files that are there, not of those that transformers would
    write.
    """
    source = saved(tmp_path / "vllm", "llama", 4)
    files = list(source.glob("model-rank-*"))
    facts = inspect.describe(str(source)).to_json()
    assert facts["layout"] == "vllm, TP 4"
    assert facts["files"] == len(files)
    assert facts["bytes"] == sum(path.stat().st_size for path in files)
    assert "config.json" in facts["carried"]
    assert INDEX not in facts["carried"]
    assert facts["left"] == [INDEX]
    assert api.plan(source, tp=2) is not None


# Refused


R = "model-rank-{}-part-0.safetensors"
DOWN = "model.layers.2.mlp.down_proj.weight"
SCALE = "model.layers.2.self_attn.attn._k_scale"


def remove(*ranks: int) -> Callable[[Path], None]:
    def change(source: Path) -> None:
        for rank in ranks:
            for path in source.glob(f"model-rank-{rank}-part-*"):
                path.unlink()

    return change


def drop(key: str, *ranks: int) -> Callable[[Path], None]:
    def change(source: Path) -> None:
        for rank in ranks:
            edit(holding(source, key, rank), lambda state: state.pop(key))

    return change


def put(key: str, tensor: torch.Tensor, rank: int = 1, where: str = DOWN) -> Callable[[Path], None]:
    return lambda source: edit(holding(source, where, rank), lambda state: state.update({key: tensor}))


def says(**changes: Any) -> Callable[[Path], None]:
    return lambda source: configured(source, **changes)


def add_ranks(*ranks: int) -> Callable[[Path], None]:
    """Ranks of an earlier save at TP 8 left over."""

    def change(source: Path) -> None:
        for rank in ranks:
            save_file(held_by_vllm("llama", 8, stages_of(5, 1))[0, rank % 8], source / R.format(rank))

    return change


def rename_experts(source: Path) -> None:
    """As versions before 0.33 named them."""
    for path in source.glob("model-rank-*"):
        state = load_file(path)
        save_file({key.replace(".routed_experts", ""): tensor for key, tensor in state.items()}, path)


def drop_biases(source: Path) -> None:
    for path in source.glob("model-rank-*"):
        state = load_file(path)
        save_file({key: tensor for key, tensor in state.items() if not key.endswith("bias")}, path)


def drop_scales(source: Path) -> None:
    for path in source.glob("model-rank-*"):
        state = load_file(path)
        save_file({key: tensor for key, tensor in state.items() if not key.endswith(SCALES)}, path)


def expert_parallel(source: Path) -> None:
    """Whole experts on each rank, as --enable-expert-parallel stores them."""
    whole = held_by_vllm("qwen3_moe", 1, stages_of(5, 1))[0, 0]
    for rank in range(4):
        for path in source.glob(f"model-rank-{rank}-part-*"):
            state = load_file(path)
            save_file(
                {k: whole[k].chunk(4)[rank].contiguous() if "routed_experts" in k else t for k, t in state.items()},
                path,
            )


BF16 = torch.bfloat16
DAMAGES: dict[str, tuple[str, int, Callable[[Path], None], str]] = {
    "a rank in the middle is missing": (
        "llama",
        4,
        remove(1),
        r"model-rank-1-part-\*\.safetensors is missing.*TP 4, 3 of 4",
    ),
    "the last rank is missing": (
        "llama",
        4,
        remove(3),
        "axis kv: 4 cannot be split over 3 ranks.*the first rank fits TP 4.*files of TP 3",
    ),
    "half of the ranks are missing": (
        "llama",
        4,
        remove(2, 3),
        r"embed_tokens\.weight: shape \[96, 56\].*TP 2.*\[192, 56\].*fits TP 4",
    ),
    "ranks that repeat KV heads are missing": (
        "llama",
        8,
        remove(4, 5, 6, 7),
        r"qkv_proj\.weight: shape \[30, 56\].*the first rank fits TP 8",
    ),
    "ranks of another save": (
        "llama",
        4,
        add_ranks(4, 5, 6, 7),
        'is no "vllm" directory.*TP 8.*fits TP 4.*files of another save',
    ),
    "one of many ranks": (
        "llama",
        2,
        add_ranks(8, 10),
        r"model-rank-2-part-\*\.safetensors is missing.*TP 11, 4 of 11",
    ),
    "a part twice": (
        "llama",
        2,
        lambda d: shutil.copy(d / R.format(0), d / "model-rank-0-part-77.safetensors"),
        "is in both .*-0.s.*-77.s",
    ),
    "files of two kinds": (
        "llama",
        2,
        lambda d: shutil.copy(d / R.format(0), d / shard_name(0, 0, 2)),
        "which come from two saves",
    ),
    "a truncated part": (
        "llama",
        2,
        lambda d: os.truncate(d / R.format(1), (d / R.format(1)).stat().st_size - 7),
        "-1-part-0.s.*truncated",
    ),
    "a key is missing from one rank": (
        "llama",
        2,
        drop(DOWN, 1),
        r"  missing model\.layers\.\{layer\}\.mlp\.down_proj\.weight .*rank 1",
    ),
    "a key is missing from all ranks": (
        "llama",
        2,
        drop(DOWN, 0, 1),
        r"2 × missing model\.layers\.\{layer\}\.mlp\.down_proj\.weight",
    ),
    "a norm is missing from all ranks": (
        "llama",
        2,
        drop("model.norm.weight", 0, 1),
        r"2 × missing model\.norm\.weight",
    ),
    "a q_norm is missing": ("qwen3", 2, drop("model.layers.3.self_attn.q_norm.weight", 0, 1), r"2 × missing .*q_norm"),
    "a bias is missing": (
        "qwen2",
        2,
        drop("model.layers.3.self_attn.qkv_proj.bias", 0, 1),
        r"2 × missing .*qkv_proj\.bias",
    ),
    "all biases are missing": ("qwen2", 2, drop_biases, "attention_bias.*q_proj.bias, .* are missing"),
    "a constant is missing": ("llama", 2, drop("model.layers.1.self_attn.attn._q_scale", 1), r"  missing .*_q_scale"),
    "constants are missing, as in vLLM 0.11": (
        "llama",
        2,
        drop_scales,
        r"10 × missing .*_k_scale.*vLLM 0\.33.s: other versions",
    ),
    "experts named as in vLLM 0.19": ("qwen3_moe", 2, rename_experts, r"a layer must be one of .*none found"),
    "expert parallel": ("qwen3_moe", 4, expert_parallel, r"w13_weight: shape \[1, 80, 72\].*expert parallelism"),
    "an unknown key": (
        "llama",
        2,
        put("model.layers.2.mlp.extra", torch.ones(2)),
        r"  unexpected model\.layers\.\{\}\.mlp\.extra .*rank 1",
    ),
    "a key with braces": (
        "llama",
        2,
        put("model.layers.{}.mlp.down_proj.weight", torch.ones(2)),
        r"  unexpected model\.layers\.\{\}\.mlp\.down_proj",
    ),
    "a key of no such layer": (
        "llama",
        2,
        put("model.layers.5.mlp.down_proj.weight", torch.zeros(56, 44, dtype=BF16)),
        r"unexpected .*down",
    ),
    "the key of a row that the family lacks": (
        "phi3",
        2,
        put("model.norm.bias", torch.ones(56, dtype=BF16)),
        r"unexpected model\.norm\.bias",
    ),
    "q_norm in a Llama": (
        "llama",
        2,
        put("model.layers.2.self_attn.q_norm.weight", torch.ones(10, dtype=BF16)),
        "unexpected .*q_norm",
    ),
    "a wrong shape": (
        "llama",
        2,
        put(DOWN, torch.zeros(56, 43, dtype=BF16)),
        r"down_proj\.weight: shape \[56, 43\].*TP 2 make it \[56, 44\]",
    ),
    "a dimension too many": (
        "llama",
        2,
        put(DOWN, torch.zeros(1, 56, 44, dtype=BF16)),
        r"down_proj\.weight: shape \[1, 56, 44\]",
    ),
    "a constant with a dimension": (
        "llama",
        2,
        put(SCALE, torch.ones(1), where=SCALE),
        r"_k_scale: shape \[1\]",
    ),
    "a dtype of its own": ("llama", 2, put(DOWN, torch.zeros(56, 44)), r"down_proj\.weight: dtype F32, BF16"),
    "too many heads": ("llama", 2, says(num_attention_heads=16), r"qkv_proj\.weight: shape \[80, 56\].*\[120, 56\]"),
    "too many heads, no head_dim": ("llama", 2, says(num_attention_heads=16, head_dim=...), "no size of head_dim fits"),
    "all heads doubled, no head_dim": (
        "llama",
        8,
        says(num_attention_heads=16, num_key_value_heads=8, head_dim=...),
        "no size of head_dim",
    ),
    "too few KV heads": ("llama", 2, says(num_key_value_heads=2), r"qkv_proj\.weight: shape \[80, 56\].*\[60, 56\]"),
    "KV heads that do not divide": (
        "llama",
        2,
        says(num_key_value_heads=3),
        "heads is 8, which is not a multiple of kv = 3",
    ),
    "KV heads unsaid, that are not all heads": (
        "llama",
        2,
        says(num_key_value_heads=...),
        r"qkv_proj\.weight: shape \[80, 56\]",
    ),
    "another head_dim": ("llama", 8, says(head_dim=12), r"o_proj\.weight: shape \[56, 10\].*\[56, 12\]"),
    "another vocabulary": ("llama", 2, says(vocab_size=400), r"lm_head\.weight: shape \[192, 56\].*\[224, 56\]"),
    "no vocabulary": ("llama", 2, says(vocab_size=...), "has no vocab_size"),
    "another width": ("llama", 2, says(hidden_size=64), r"norm\.weight: shape \[56\].*\[64\]"),
    "other experts": (
        "qwen3_moe",
        2,
        says(moe_intermediate_size=48),
        r"w13_weight: shape \[4, 40, 72\].*\[4, 48, 72\]",
    ),
    "another feed-forward": (
        "llama",
        2,
        says(intermediate_size=96),
        r"gate_up_proj\.weight: shape \[88, 56\].*\[96, 56\]",
    ),
    "more experts": ("qwen3_moe", 2, says(num_local_experts=8), r"experts\.gate\.weight: shape \[4, 72\].*\[8, 72\]"),
    "experts beyond reason": ("qwen3_moe", 2, says(num_local_experts=10**12), "promises 3000000000000 tensors"),
    "one layer more": ("llama", 2, says(num_hidden_layers=6), r"2 × missing .*e\.g\. model\.layers\.5\."),
    "one layer less": ("llama", 2, says(num_hidden_layers=4), r"2 × unexpected .*e\.g\. model\.layers\.4\."),
    "layers beyond reason": (
        "llama",
        2,
        says(num_hidden_layers=10**12),
        "says 1000000000000 layers, the shards hold 106 tensors",
    ),
    "a size that is no number": ("llama", 2, says(hidden_size="wide"), "hidden_size is 'wide'"),
    "two tensors said to be tied": (
        "llama",
        2,
        says(tie_word_embeddings=True),
        r"2 × unexpected model\.embed_tokens\.weight",
    ),
    "tied tensors said not to be": (
        "llama_tied",
        2,
        says(tie_word_embeddings=False),
        r"missing model\.embed_tokens\.weight.*= False",
    ),
    "tied tensors of which nothing is said": (
        "llama_tied",
        2,
        says(tie_word_embeddings=...),
        r"missing model\.embed_tokens\.weight.*= None",
    ),
    "a bias promised": ("llama", 2, says(attention_bias=True), "attention_bias = True, yet .* are missing"),
    "another family": (
        "qwen3_moe",
        2,
        says(model_type="mixtral"),
        r"a layer must be one of moe, moe_fused: none found",
    ),
    "a family without such names": (
        "llama",
        2,
        says(model_type="falcon"),
        'format "vllm" has no names for family "falcon"',
    ),
    "no family": (
        "llama",
        2,
        says(model_type="x", architectures=[]),
        r'no table for model_type "x".*5 × model\.layers\.\{\}\.self_attn\.qkv_proj',
    ),
    "quantised": ("llama", 2, says(quantization_config={"quant_method": "gptq"}), "gptq"),
    "no config": ("llama", 2, lambda d: (d / "config.json").unlink(), r"config\.json: no such file"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_does_not_fit_is_refused(damage: str, tmp_path: Path) -> None:
    """Whatever is missing, left over, misshapen or contradicted by config.json is refused, and the words say what."""
    name, tp, change, words = DAMAGES[damage]
    source = saved(tmp_path / "vllm", name, tp)
    change(source)
    with pytest.raises(ReshardError) as caught:
        open_source(source)
    assert re.search(words, str(caught.value), re.DOTALL), str(caught.value)
    assert (
        str(source) in caught.value.message or "config.json" in caught.value.message or "format" in caught.value.message
    )


@pytest.mark.parametrize(
    ("gone", "words"),
    [
        ([(1, 1)], r"model-pp-1-tp-1-part-\*\.safetensors is missing.*TP 2 × PP 2, 3 of 4"),
        ([(0, 0), (0, 1)], r"model-pp-0-tp-0-part-\*\.safetensors is missing"),
        ([(1, 0), (1, 1)], r"missing lm_head\.weight"),
    ],
)
def test_ranks_of_a_pipeline_that_are_missing(gone: list[tuple[int, int]], words: str, tmp_path: Path) -> None:
    """A rank of a stage, the first stage, the last one: each is noticed."""
    source = saved(tmp_path / "vllm", "llama", 2, 2)
    for stage, rank in gone:
        for path in source.glob(shard_name(stage, rank, 2, "*")):
            path.unlink()
    with pytest.raises(ReshardError) as caught:
        open_source(source)
    assert re.search(words, str(caught.value), re.DOTALL), str(caught.value)


def test_stages_that_are_not_of_one_save_are_refused(tmp_path: Path) -> None:
    """Two stages that both begin with layer 0, or a first one that does not."""
    source = saved(tmp_path / "late", "llama", 1, 2, [range(1, 3), range(3, 5)])
    with pytest.raises(ReshardError, match=r"begin with layers 1, 3, config\.json says 5 layers"):
        open_source(source)
    source = saved(tmp_path / "vllm", "llama", 1, 2)
    for path in source.glob("model-pp-1-*"):
        path.unlink()
    for path in list(source.glob("model-pp-0-*")):
        shutil.copy(path, source / path.name.replace("-pp-0-", "-pp-1-"))
    with pytest.raises(ReshardError, match=r"begin with layers 0, 0, config\.json says 5 layers"):
        open_source(source)


def test_a_damaged_layer_does_not_decide_a_size(tmp_path: Path) -> None:
    """Where head_dim is solved from shapes, one wrong tensor among the layers is the one that is named."""
    source = saved(tmp_path / "vllm", "llama", 2)
    key = "model.layers.0.self_attn.qkv_proj.weight"
    edit(holding(source, key), lambda state: state.update({key: torch.zeros(96, 56, dtype=BF16)}))
    configured(source, head_dim=...)
    with pytest.raises(ReshardError, match=r"  model\S+qkv_proj\.weight: shape \[96, 56\], .* make it \[80, 56\]"):
        open_source(source)


@pytest.mark.parametrize("version", ["0.11.0", "0.19.1", "0.34", "1.0", "0.3"])
def test_other_versions_of_the_engine_are_refused_by_name(version: str) -> None:
    """Only versions whose layout is known are written; the refusal names the one asked for and those supported."""
    source = open_source(fixtures.checkpoint("llama"))
    with pytest.raises(ReshardError, match=rf"untested with vLLM {re.escape(version)}") as caught:
        prepare(source, "vllm", Mesh(2), Options(engine_version=version))
    assert caught.value.hint == "supported: vLLM 0.33"
    for known in (None, "0.33", "0.33.0"):
        assert prepare(source, "vllm", Mesh(2), replace(Options(), engine_version=known)).engine == "vLLM 0.33"


# Again, and meanwhile


@pytest.mark.parametrize("time", [2 * 10**18, 10**18])
def test_the_same_job_again_is_recognised_until_a_shard_changes(tmp_path: Path, time: int) -> None:
    """Also if another shard is newer. Nothing is written twice, and tonight's save with yesterday's shapes is not taken
    for yesterday's.
    """
    source = saved(tmp_path / "vllm", "llama", 2)

    def again() -> bool:
        return convert(
            prepare(open_source(source), "native", Mesh(4), Options()), LocalDestination(tmp_path / "out"), Options()
        ).already

    assert not again()
    assert again()
    edit(holding(source, DOWN), lambda state: state[DOWN].mul_(2))
    os.utime(holding(source, DOWN), ns=(time, time))
    with pytest.raises(
        ReshardError, match=r"holds other weights than the source: model-rank-\d-part-\d+\.safetensors: .*down_proj"
    ):
        again()


def test_a_shard_that_changes_meanwhile_is_noticed(tmp_path: Path) -> None:
    """A file replaced between the reading of its header and that of its tensors ends the conversion,
    and leaves nothing.
    """
    directory = saved(tmp_path / "vllm", "llama", 2)
    job = prepare(open_source(directory), "native", Mesh(4), Options())
    os.utime(directory / R.format(1), ns=(1, 1))
    with pytest.raises(PlaceError, match=r"model-rank-1-part-0\.safetensors: was changed while it was being read"):
        convert(job, LocalDestination(tmp_path / "out"), Options())
    assert not (tmp_path / "out").exists()


def test_a_pipe_in_the_place_of_a_shard_is_refused_at_once(tmp_path: Path) -> None:
    """It has no other end, which would be waited for."""
    directory = saved(tmp_path / "vllm", "llama", 2)
    (directory / R.format(1)).unlink()
    os.mkfifo(directory / R.format(1))
    with pytest.raises(ReshardError, match=r"model-rank-1-part-0\.safetensors: is not a regular file"):
        open_source(directory)
