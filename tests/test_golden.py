"""Golden digests: what every plan copies where, and what every rank of a vLLM directory holds. A refactor changes none
of them.

    python tests/test_golden.py --write     writes tests/golden/ anew; read the difference before committing it

The plans are of invented headers, so that no library can change them. The vLLM lists are of fixtures whose values are
replaced by bytes that follow from their names; they are also computed here a second time in plain torch, from vLLM's
own rules.
"""

import hashlib
import json
import re
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from fixtures import FIXTURES, checkpoint, copy, fixture, rewrite
from safetensors.torch import load_file
from strategies import Headers, Stored, invented
from torch_reference import bits, differences, load

from reshard.checkpoints.source import open_source
from reshard.errors import ReshardError
from reshard.jobs.convert import Options, convert, prepare
from reshard.layout.cut import Layout, lay_out
from reshard.layout.join import Plan, plan
from reshard.layout.mesh import Mesh
from reshard.model.understand import Config, Model, understand
from reshard.store.destination import LocalDestination
from reshard.tables import families, formats

State = dict[str, torch.Tensor]
GOLDEN = Path(__file__).parent / "golden"


# Plans

GROUPED = {"layer": 3, "kv": 4, "group": 2, "head_dim": 6, "hidden": 10, "inter": 24, "vocab": 37}
HEADS = GROUPED | {"kv": 8, "group": 1}
EXPERTS = {"experts": 8, "moe_inter": 16}
LATENT = {
    "layer": 3,
    "heads": 8,
    "head_dim": 6,
    "nope_dim": 5,
    "rope_dim": 3,
    "q_lora": 14,
    "kv_lora": 11,
    "hidden": 10,
    "inter": 24,
    "vocab": 37,
    "experts": 8,
    "moe_inter": 16,
}
BLOCKS = {
    "layer": 3,
    "heads": 8,
    "head_dim": 256,
    "nope_dim": 128,
    "rope_dim": 64,
    "q_lora": 384,
    "kv_lora": 256,
    "hidden": 160,
    "inter": 1024,
    "vocab": 37,
    "experts": 4,
    "moe_inter": 512,
}
FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}
ONE_MORE = {"num_nextn_predict_layers": 1}
DENSE, MOE, MTP = ("dense", "plain"), ("moe", "plain"), ("moe", "mtp")

# name: (family, sizes, kinds of the layers, tags, config)
CHECKPOINTS: dict[str, tuple[str, dict[str, int], list[Any], list[str], dict[str, Any]]] = {
    "llama": ("llama", GROUPED, [], [], {}),
    "llama_tied": ("llama", GROUPED, [], [], {"tie_word_embeddings": True}),
    "llama_bias": (
        "llama",
        GROUPED,
        [],
        ["qkv_bias?", "o_bias?", "mlp_bias?"],
        {"attention_bias": True, "mlp_bias": True},
    ),
    "mistral": ("mistral", GROUPED, [], [], {}),
    "qwen2": ("qwen2", GROUPED, [], ["qkv_bias?"], {}),
    "qwen3": ("qwen3", GROUPED, [], [], {}),
    "mixtral": ("mixtral", GROUPED | EXPERTS, [["moe"]] * 3, [], {}),
    "qwen3_moe": ("qwen3_moe", GROUPED | EXPERTS, [["dense"], ["moe"], ["moe"]], [], {}),
    "phi3": ("phi3", GROUPED, [], [], {}),
    "gpt2": ("gpt2", HEADS | {"pos": 9}, [], [], {}),
    "gpt_neox": ("gpt_neox", HEADS, [], ["bias?"], {}),
    "falcon_7b": ("falcon", GROUPED | {"kv": 1, "group": 8}, [["old"]] * 3, [], {"parallel_attn": True}),
    "falcon_40b": ("falcon", GROUPED, [["new"]] * 3, [], {"parallel_attn": True}),
    "falcon_rw": ("falcon", HEADS, [["old"]] * 3, ["bias?", "sequential?"], {"bias": True, "parallel_attn": False}),
    "gemma2": ("gemma2", GROUPED, [], [], {}),
    "olmo2": ("olmo2", GROUPED, [], [], {}),
    "gpt_oss": ("gpt_oss", GROUPED | EXPERTS, [], ["bias?"], {}),
    "deepseek_v3": (
        "deepseek_v3",
        LATENT,
        [DENSE, MOE, MOE, MTP],
        ["q_lora?"],
        {"n_shared_experts": 2} | ONE_MORE,
    ),
    "deepseek_v3_whole": (
        "deepseek_v3",
        LATENT,
        [DENSE, DENSE, MOE],
        ["q_whole?"],
        {"n_shared_experts": 1, "q_lora_rank": None},
    ),
    "deepseek_v3_fp8": (
        "deepseek_v3",
        BLOCKS,
        [DENSE, MOE, MOE, MTP],
        ["q_lora?"],
        {"n_shared_experts": 2, "quantization_config": FP8} | ONE_MORE,
    ),
}
MESHES = {
    "tp1": Mesh(),
    "tp2": Mesh(tp=2),
    "tp4": Mesh(tp=4),
    "tp8": Mesh(tp=8),
    "tp2 pp2": Mesh(tp=2, pp=2),
    "tp4 ep2": Mesh(tp=4, ep=2),
    "tp2 ep2 pp2": Mesh(tp=2, ep=2, pp=2),
    "split 2:1:1": Mesh(tp=3, weights=(2, 1, 1)),
    "pp2 layers": Mesh(pp=2, layers=(1, 2)),
}


def digest(joined: Plan) -> str:
    """A digest of the set of (box of a stored tensor, box of a stored tensor), in no order."""
    lines = sorted(
        f"{c.src.rank} {c.src_name} {c.src_offset} {c.dst.rank} {c.dst_name} {c.dst_offset} {sorted(c.dims)}"
        for c in joined.copies()
    )
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:32]


def in_blocks(stored: Headers) -> Headers:
    """The same, projections in FP8, each block of 128 × 128 with a scale."""
    found = dict(stored)
    for name, (_, shape) in stored.items():
        if re.search(r"(self_attn|mlp)\..*proj\w*\.weight$", name):
            found[name] = Stored("F8_E4M3", shape)
            found[f"{name}_scale_inv"] = Stored("F32", tuple(-(-size // 128) for size in shape))
    return found


def plans(name: str) -> dict[str, str]:
    """From the published layout to every mesh that fits, from there to another, and to vLLM's."""
    family, sizes, kinds, tags, config = CHECKPOINTS[name]
    config, stored = invented(family, sizes, kinds, tags, **config)
    if "quantization_config" in config:
        stored = in_blocks(stored)
    model = understand(families.load(family), Config(config), stored, name)
    source = lay_out(model.family.published, model, Mesh(), model.active)
    found: dict[str, str] = {}
    layouts: dict[str, Layout] = {}
    for to, mesh in MESHES.items():
        if (layout := laid(model, "native", mesh)) is not None:
            layouts[to] = layout
            found[f"hf to {to}"] = digest(plan(source, layout))
    found["tp2 to tp2 pp2"] = digest(plan(layouts["tp2"], layouts["tp2 pp2"]))
    found["tp4 to hf"] = digest(plan(layouts["tp4"], source))
    if (layout := laid(model, "vllm", Mesh(tp=4))) is not None:
        found["hf to vllm tp4"] = digest(plan(source, layout))
    return found


def laid(model: Model, to: str, mesh: Mesh) -> Layout | None:
    try:
        table = replace(formats.load(to).for_family(model.family.name), requires=())  # arithmetic alone
        return lay_out(table, model, mesh)
    except ReshardError:
        return None


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_the_plan_of_every_family_on_every_mesh_is_the_golden_one(name: str) -> None:
    assert plans(name) == json.loads((GOLDEN / "plans.json").read_text())[name]


def test_the_golden_plans_hold_every_family_and_every_mesh() -> None:
    known = json.loads((GOLDEN / "plans.json").read_text())
    assert {family for family, *_ in CHECKPOINTS.values()} == {fixture.family for fixture in FIXTURES.values()}
    assert known.keys() == CHECKPOINTS.keys()
    for name, found in known.items():
        dense = {f"hf to {to}" for to, mesh in MESHES.items() if mesh.ep == 1}
        missing = {"falcon_7b": {"hf to split 2:1:1"}, "deepseek_v3_fp8": {"hf to tp8"}}.get(name, set())
        assert found.keys() >= dense - missing, name
        assert ("hf to tp4 ep2" in found) == ("experts" in CHECKPOINTS[name][1]), name
        assert ("hf to vllm tp4" in found) <= (CHECKPOINTS[name][0] in formats.load("vllm").families), name
        assert "hf to vllm tp4" in found or name not in FAMILIES, name
    digests = [digest for found in known.values() for digest in found.values()]
    assert len(digests) - len(set(digests)) < 12  # Mistral is spelled as Llama is, and once sharded Phi-3 is too


# vLLM

FAMILIES = ("llama", "llama_tied", "llama_bias", "mistral", "qwen2_plain", "qwen3", "mixtral", "qwen3_moe", "phi3")


def ways(name: str) -> tuple[int, ...]:
    """Of Qwen3 mixtures vLLM takes no more ranks than there are experts."""
    return (1, 2, 4) if name == "qwen3_moe" else (1, 2, 4, 8)


def patterned(name: str, folder: Path) -> Path:
    """A fixture whose every tensor holds bytes that follow from its name."""

    def tensor(key: str, like: torch.Tensor) -> torch.Tensor:
        data = hashlib.shake_128(f"{name} {key}".encode()).digest(like.nbytes)
        return torch.frombuffer(bytearray(data), dtype=like.dtype).view(like.shape)

    directory = copy(name, folder)
    rewrite(directory, lambda state: {key: tensor(key, like) for key, like in state.items()})
    return directory


def vllm(directory: Path, tp: int, stages: list[int]) -> dict[str, State]:
    """The files of vLLM 0.33's `sharded_state`, by name, from its own rules; `stages` are the numbers of layers."""
    state = load(directory)
    config = json.loads((directory / "config.json").read_text())
    heads, kv = config["num_attention_heads"], config["num_key_value_heads"]
    tied = config.get("tie_word_embeddings", False)
    files = {}
    for stage in range(len(stages)):
        layers = range(sum(stages[:stage]), sum(stages[: stage + 1]))
        for rank in range(tp):
            out: State = {}
            for layer in layers:
                out |= vllm_layer(state, f"model.layers.{layer}.", heads, kv, tp, rank)
            everywhere = "num_experts_per_tok" in config  # of a mixture every stage has them
            if (stage == 0 or everywhere) and not (tied and len(stages) == 1):
                out["model.embed_tokens.weight"] = vocabulary(state["model.embed_tokens.weight"], tp, rank)
            if stage == len(stages) - 1 or everywhere:
                out["model.norm.weight"] = state["model.norm.weight"]
                out["lm_head.weight"] = vocabulary(
                    state["model.embed_tokens.weight" if tied else "lm_head.weight"], tp, rank
                )
            one = f"model-rank-{rank}-part-0.safetensors"
            files[one if len(stages) == 1 else f"model-pp-{stage}-tp-{rank}-part-0.safetensors"] = out
    return files


def vocabulary(tensor: torch.Tensor, tp: int, rank: int) -> torch.Tensor:
    padded = torch.zeros(-(-tensor.shape[0] // 64) * 64, tensor.shape[1], dtype=tensor.dtype)
    padded[: tensor.shape[0]] = tensor
    return padded.chunk(tp)[rank].contiguous()


def vllm_layer(state: State, at: str, heads: int, kv: int, tp: int, rank: int) -> State:
    def part(tensor: torch.Tensor, dim: int = 0) -> torch.Tensor:
        return tensor.chunk(tp, dim)[rank]

    def shared(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.chunk(kv)[rank // (tp // kv)] if tp >= kv else part(tensor)

    out = {
        f"{at}{name}.weight": state[f"{at}{name}.weight"] for name in ("input_layernorm", "post_attention_layernorm")
    }
    for ending in ("weight", "bias"):
        if f"{at}self_attn.qkv_proj.{ending}" in state:
            fused = state[f"{at}self_attn.qkv_proj.{ending}"]
            head_dim = fused.shape[0] // (heads + 2 * kv)
            q, k, v = fused.split([heads * head_dim, kv * head_dim, kv * head_dim])
        elif f"{at}self_attn.q_proj.{ending}" in state:
            q, k, v = (state[f"{at}self_attn.{name}_proj.{ending}"] for name in "qkv")
        else:
            continue
        out[f"{at}self_attn.qkv_proj.{ending}"] = torch.cat([part(q), shared(k), shared(v)])
    for name in ("self_attn.o_proj", "mlp.down_proj"):
        if f"{at}{name}.weight" in state:
            out[f"{at}{name}.weight"] = part(state[f"{at}{name}.weight"], 1)
        if f"{at}{name}.bias" in state:
            out[f"{at}{name}.bias"] = state[f"{at}{name}.bias"]
    for name in ("q_norm", "k_norm"):
        if f"{at}self_attn.{name}.weight" in state:
            out[f"{at}self_attn.{name}.weight"] = state[f"{at}self_attn.{name}.weight"]
    for name in ("k", "v", "q", "prob"):
        out[f"{at}self_attn.attn._{name}_scale"] = torch.tensor(1.0)
    for ending in ("weight", "bias"):
        if f"{at}mlp.gate_up_proj.{ending}" in state:
            gate, up = state[f"{at}mlp.gate_up_proj.{ending}"].chunk(2)
        elif f"{at}mlp.gate_proj.{ending}" in state:
            gate, up = (state[f"{at}mlp.{name}_proj.{ending}"] for name in ("gate", "up"))
        else:
            continue
        out[f"{at}mlp.gate_up_proj.{ending}"] = torch.cat([part(gate), part(up)])
    for block, experts, (one, two, three) in (
        (f"{at}mlp.", f"{at}mlp.experts.", ("gate_proj", "down_proj", "up_proj")),
        (f"{at}block_sparse_moe.", f"{at}block_sparse_moe.experts.", ("w1", "w2", "w3")),
    ):
        if f"{block}gate.weight" not in state:
            continue
        count = state[f"{block}gate.weight"].shape[0]
        router = "block_sparse_moe.gate.weight" if "sparse" in block else "mlp.experts.gate.weight"
        out[f"{at}{router}"] = state[f"{block}gate.weight"]
        gates, downs, ups = ([state[f"{experts}{e}.{name}.weight"] for e in range(count)] for name in (one, two, three))
        out[f"{experts}routed_experts.w13_weight"] = torch.stack(
            [torch.cat([part(g), part(u)]) for g, u in zip(gates, ups, strict=True)]
        )
        out[f"{experts}routed_experts.w2_weight"] = torch.stack([part(down, 1) for down in downs])
    return {name: tensor.contiguous() for name, tensor in out.items()}


def to_vllm(directory: Path, out: Path, mesh: Mesh) -> dict[str, State]:
    convert(
        prepare(open_source(directory), "vllm", mesh, Options(workers=2)), LocalDestination(out), Options(workers=2)
    )
    return {path.name: load_file(path) for path in sorted(out.glob("*.safetensors"))}


def listed(files: dict[str, State]) -> dict[str, list[Any]]:
    """Name → dtype, shape and one digest over all ranks, in their order; every rank of a stage has the same names and
    shapes.
    """
    found: dict[str, list[Any]] = {}
    hashes: dict[str, Any] = {}
    for file in sorted(files):
        for name, tensor in sorted(files[file].items()):
            found.setdefault(name, [str(tensor.dtype).removeprefix("torch."), list(tensor.shape)])
            hashes.setdefault(name, hashlib.sha256()).update(bits(tensor).numpy().tobytes())
    return {name: [*entry, hashes[name].hexdigest()[:16]] for name, entry in sorted(found.items())}


@pytest.mark.parametrize("name", FAMILIES)
def test_a_vllm_directory_is_what_vllms_rules_say_and_what_it_always_was(name: str, tmp_path: Path) -> None:
    """File names, tensor names, shapes, dtypes, every bit: fused, padded to 64, heads repeated, tied,
    with four constants a layer.
    """
    directory = patterned(name, tmp_path / "model")
    known = json.loads((GOLDEN / "vllm.json").read_text())[name]
    for tp in ways(name):
        files = to_vllm(directory, tmp_path / str(tp), Mesh(tp=tp))
        wanted = vllm(directory, tp, [fixture(name).layers])
        assert files.keys() == wanted.keys()
        assert differences([wanted[file] for file in sorted(wanted)], [files[file] for file in sorted(files)]) == []
        assert listed(files) == known[f"tp{tp}"]


@pytest.mark.parametrize("name", ["llama", "llama_tied", "mixtral", "qwen3_moe"])
def test_a_vllm_directory_with_stages_names_its_files_by_both_ranks(name: str, tmp_path: Path) -> None:
    """Layers keep their numbers; embed on the first stage, norm and head on the last, also where both are one tensor;
    mixtures have them on every stage.
    """
    directory = patterned(name, tmp_path / "model")
    layers = FIXTURES[name].layers
    stages = [layers - layers // 2, layers // 2]
    files = to_vllm(directory, tmp_path / "out", Mesh(tp=2, pp=2, layers=tuple(stages)))
    wanted = vllm(directory, 2, stages)
    assert (
        sorted(files)
        == sorted(wanted)
        == [f"model-pp-{pp}-tp-{tp}-part-0.safetensors" for pp in (0, 1) for tp in (0, 1)]
    )
    assert differences([wanted[file] for file in sorted(wanted)], [files[file] for file in sorted(files)]) == []
    assert "model.embed_tokens.weight" in files["model-pp-0-tp-0-part-0.safetensors"]
    assert "lm_head.weight" in files["model-pp-1-tp-0-part-0.safetensors"]


def test_stages_of_unequal_length_must_be_given_for_vllm(tmp_path: Path) -> None:
    """Where vLLM puts the layers that are left over, it does otherwise than `native` does."""
    with pytest.raises(ReshardError, match=r"5 layers cannot be split evenly over 2 stages; .*--pp-layers"):
        prepare(open_source(copy("llama", tmp_path / "model")), "vllm", Mesh(pp=2), Options())


@pytest.mark.parametrize(
    ("name", "tp", "words"),
    [
        ("qwen3_moe", 8, r"the engine requires tp <= experts: tp is 8, experts is 4"),
        ("qwen2", 2, r"requires heads \* head_dim == hidden: heads is 8, head_dim is 10, hidden is 56"),
    ],
)
def test_what_the_engine_requires_is_checked_before_anything_is_written(name: str, tp: int, words: str) -> None:
    """vLLM would refuse the one when it starts, and read the other wrongly."""
    with pytest.raises(ReshardError, match=words):
        prepare(open_source(checkpoint(name)), "vllm", Mesh(tp), Options())


@pytest.mark.parametrize(
    ("mesh", "words"),
    [
        (Mesh(tp=4, ep=2), r"requires ep == 1 \| ep == tp: ep is 2, tp is 4"),
        (Mesh(tp=2, weights=(2, 1)), "wants equal ranks"),
    ],
)
def test_what_vllm_cannot_load_is_refused(mesh: Mesh, words: str, tmp_path: Path) -> None:
    with pytest.raises(ReshardError, match=words):
        prepare(open_source(copy("mixtral", tmp_path / "model")), "vllm", mesh, Options())


def test_a_vocabulary_that_does_not_divide_when_padded_to_64_is_refused(tmp_path: Path) -> None:
    """vLLM does not pad further: 331 becomes 384, which 9 does not divide."""
    with pytest.raises(ReshardError, match="axis vocab: 384 cannot be split over 9 ranks"):
        prepare(open_source(copy("llama", tmp_path / "model")), "vllm", Mesh(tp=9), Options())


def test_a_family_without_names_in_vllm_is_refused_with_those_that_have(tmp_path: Path) -> None:
    with pytest.raises(ReshardError, match=r'no names for family "falcon"; it has them for [0-9]+ others'):
        prepare(open_source(copy("falcon_7b", tmp_path / "model")), "vllm", Mesh(), Options())


# Writing them


def golden() -> Iterator[tuple[str, Any]]:
    yield "plans.json", {name: plans(name) for name in CHECKPOINTS}
    lists: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in FAMILIES:
            directory = patterned(name, Path(folder) / name)
            lists[name] = {f"tp{tp}": listed(vllm(directory, tp, [fixture(name).layers])) for tp in ways(name)}
    yield "vllm.json", lists


def text(data: Any) -> str:
    """One line per digest, so that a difference can be read."""
    parts = []
    for name, groups in data.items():
        lines = ",\n".join(
            f"  {json.dumps(key)}: {json.dumps(value)}"
            if isinstance(value, str)
            else f"  {json.dumps(key)}: {{\n"
            + ",\n".join(f"   {json.dumps(k)}: {json.dumps(v)}" for k, v in value.items())
            + "\n  }"
            for key, value in groups.items()
        )
        parts.append(f" {json.dumps(name)}: {{\n{lines}\n }}")
    return "{\n" + ",\n".join(parts) + "\n}\n"


if __name__ == "__main__":
    if sys.argv[1:] != ["--write"]:
        raise SystemExit("python tests/test_golden.py --write")
    GOLDEN.mkdir(exist_ok=True)
    for file, data in golden():
        (GOLDEN / file).write_text(text(data))
        sys.stderr.write(f"{GOLDEN / file}\n")
