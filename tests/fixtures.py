"""Tiny checkpoints, one for each variant of each family, written by `transformers` itself and then aged where published
files differ.

Knows the architectures' configurations and how published files deviate from what `transformers` writes today. Knows
nothing of `reshard`.

The sizes are chosen so that a wrong table cannot hide behind them: no square matrix, no two axes of one size, head_dim
other than hidden / heads, a vocabulary that no mesh divides, no constant norm or bias, wherever the configuration class
allows it. `check` proves that for a written directory, and names what an architecture forces.

    checkpoint("llama")        the directory, built once per machine and version of this file; never write into it
    copy("llama", directory)   a private copy, to damage
    FIXTURES["llama"]          what is in it, and on which meshes it can lie
    ZOO["gptj"]                those of all further families, which fewer tests go through; defined in tests/zoo_*.py
"""

from __future__ import annotations

import hashlib
import importlib
import itertools
import json
import os
import re
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

State = dict[str, torch.Tensor]

SHARD = 60_000  # bytes: each checkpoint becomes several files
BLOCK = 128  # side of a block that shares one FP8 scale
HEADS = 32  # that a layer has at most

# Buffers that an engine recomputes. Equal from layer to layer, and constant, by nature.
BUFFERS = re.compile(
    r"(.*\.)?(rotary_emb\.inv_freq|attention\.bias|attention\.masked_bias|attn\.bias|attn\.masked_bias|attn\.causal_mask|.*_decay|slope_rate|.*weight_shape)"
)


@dataclass(frozen=True)
class Fixture:
    """One checkpoint and what a test needs to know of it.

    Numbers are counts of axes, not of ranks. `kv` is what the attention has after reading the published tensors (1 for
    multi-query, `heads` where there is no grouping, and for latent attention). `layers` does not count the multi-token
    prediction layers, `mtp` does. `tp`, `ep`: sizes that work; each `ep` divides every `tp` it is at most. `weights`:
    TP 3 with weights 2:1:1 works. `square`: patterns of names whose matrices the architecture forces to be square.
    `equal`: pairs of names that hold the same bits.
    """

    name: str
    family: str
    build: Callable[[Path], None]
    heads: int
    kv: int
    layers: int
    experts: int = 0
    mtp: int = 0
    tp: tuple[int, ...] = (1, 2, 4, 8)
    ep: tuple[int, ...] = (1,)
    weights: bool = True
    square: tuple[str, ...] = ()
    equal: tuple[tuple[str, str], ...] = ()
    notes: str = ""
    runs: bool = True  # of a family that runs, this one too: transformers has it
    # writes the same model as transformers has it, where it does not have this one
    twin: Callable[[Path], None] | None = None
    # what that one's forward is given besides tokens [batch, seq]
    given: Callable[[torch.Tensor], dict[str, Any]] | None = None
    file: Path = Path(__file__)

    def meshes(self) -> Iterator[dict[str, Any]]:
        """Arguments of `torch_reference.expected`: each TP, with EP, PP 2 with each TP, PP of all layers,
        and uneven weights.
        """
        for tp, ep in itertools.product(self.tp, self.ep):
            if tp % ep == 0:
                yield {"tp": tp} if ep == 1 else {"tp": tp, "ep": ep}
        yield from ({"tp": tp, "pp": 2} for tp in self.tp)
        if self.layers > 2:
            yield {"tp": 2, "pp": self.layers}
        if self.ep != (1,):
            yield {"tp": min(4, max(self.tp)), "ep": 2, "pp": 2}
        if self.weights:
            yield {"tp": 3, "weights": (2, 1, 1)}


FIXTURES: dict[str, Fixture] = {}
ZOO: dict[str, Fixture] = {}


# Writing


def noise(seed: str, shape: torch.Size, scale: float, shift: float, dtype: torch.dtype) -> torch.Tensor:
    """Normal noise that depends on `seed` alone; drawn again until `degenerate` finds nothing in it.

    By numpy, one number after another: torch draws by the vector, and others on a CPU with other vectors.
    """
    for attempt in itertools.count():
        generator = np.random.default_rng(zlib.crc32(f"{seed} {attempt}".encode()))
        tensor = torch.as_tensor(generator.standard_normal(shape) * scale + shift).to(dtype)
        if not degenerate(tensor):
            return tensor
    raise AssertionError


def noise_like(seed: str, name: str, tensor: torch.Tensor, centre: float, dtype: torch.dtype) -> torch.Tensor:
    """Noise in the place of a parameter: of a size that keeps activations near 1, norms around `centre`,
    nothing constant.
    """
    if tensor.ndim > 1:
        return noise(
            f"{seed} {name}",
            tensor.shape,
            0.5 if "embed" in name or "wte" in name else tensor.shape[-1] ** -0.5,
            0.0,
            dtype,
        )
    # one for each head: a coarse dtype makes them equal
    if tensor.numel() <= HEADS and name.endswith(("A_log", "dt_bias", ".D")):
        drawn = (noise(f"{seed} {name} {attempt}", tensor.shape, 0.5, 0.0, dtype) for attempt in itertools.count())
        return next(found for found in drawn if distinct(found))
    if name.endswith("bias"):
        return noise(f"{seed} {name}", tensor.shape, 0.1, 0.0, dtype)
    if name.endswith(("sinks", "sink")):
        drawn = (noise(f"{seed} {name} {attempt}", tensor.shape, 1.0, 0.0, dtype) for attempt in itertools.count())
        return next(found for found in drawn if distinct(found))
    return noise(f"{seed} {name}", tensor.shape, 0.2, centre, dtype=dtype)


def write(
    directory: Path, seed: str, config: Any, dtype: torch.dtype = torch.bfloat16, shard: int | None = SHARD
) -> None:
    """Write a model of this configuration, filled with noise, by `save_pretrained`; `shard` bytes a file,
    None for one file.
    """
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    model = transformers.AutoModelForCausalLM.from_config(config).to(dtype).eval()
    # these multiply by 1 + weight
    centre = 0.0 if config.model_type in ("gemma", "gemma2", "gemma3_text", "nemotron") else 1.0
    with torch.no_grad():
        for name, tensor in itertools.chain(model.named_parameters(), model.named_buffers()):
            if name.endswith("e_score_correction_bias"):
                # published in fp32 inside bf16 checkpoints
                tensor.data = noise_like(seed, name, tensor, centre, torch.float32)
            elif not BUFFERS.fullmatch(name) and tensor.is_floating_point() and "inv_freq" not in name:
                tensor.data.copy_(noise_like(seed, name, tensor, centre, dtype))
    model.save_pretrained(directory, max_shard_size=f"{shard // 1000}KB" if shard else "1GB")


def read(directory: Path) -> State:
    """All tensors of a directory, of safetensors and `.bin` files alike."""
    state: State = {}
    for path in sorted(directory.glob("*.safetensors")):
        state |= load_file(path)
    for path in sorted(directory.glob("*.bin")):
        state |= torch.load(path, weights_only=True)
    return state


def rewrite(directory: Path, edit: Callable[[State], State], shard: int = SHARD, binary: bool = False) -> None:
    """Replace the tensors of a directory by `edit` of them, in files of about `shard` bytes with an index,
    as `transformers` does.
    """
    state = edit(read(directory))
    for path in [*directory.glob("*.safetensors"), *directory.glob("*.index.json")]:
        path.unlink()
    files: list[State] = [{}]
    for name, tensor in state.items():
        if files[-1] and sum(t.nbytes for t in files[-1].values()) + tensor.nbytes > shard:
            files.append({})
        files[-1][name] = tensor.clone().contiguous()
    stem, ending = ("pytorch_model", "bin") if binary else ("model", "safetensors")
    weight_map = {}
    for number, tensors in enumerate(files, 1):
        name = f"{stem}-{number:05d}-of-{len(files):05d}.{ending}"
        weight_map |= dict.fromkeys(tensors, name)
        if binary:
            torch.save(tensors, directory / name)
        else:
            save_file(tensors, directory / name, metadata={"format": "pt"})
    index = {"metadata": {"total_size": sum(t.nbytes for t in state.values())}, "weight_map": weight_map}
    (directory / f"{stem}.{ending}.index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def renamed(state: State, names: Mapping[str, str]) -> State:
    """The same tensors, every part of a name that is a key of `names` replaced, one after another."""
    found: State = {}
    for name, tensor in state.items():
        for old, new in names.items():
            name = name.replace(old, new)
        found[name] = tensor
    return found


def configure(directory: Path, *removed: str, **changes: Any) -> None:
    """Edit config.json: keys to remove, keys to set."""
    path = directory / "config.json"
    config = {key: value for key, value in json.loads(path.read_text()).items() if key not in removed}
    path.write_text(json.dumps(config | changes, indent=2, sort_keys=True) + "\n")


# What must hold of every checkpoint


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """The storage seen as integers, so that equality is of bits: NaN equals itself, 0.0 is not -0.0,
    and FP8 can be compared at all.
    """
    return tensor.contiguous().view(
        {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    )


def degenerate(tensor: torch.Tensor) -> str:
    """What a test would not see in this tensor, or nothing: "" unless rows are equal, it is constant,
    or it is not finite.
    """
    if not torch.isfinite(tensor.float()).all():
        return "not finite"
    if tensor.numel() > 1 and len(bits(tensor).unique()) == 1:
        return "constant"
    if tensor.ndim > 1 and not distinct(tensor.flatten(0, -2)):
        return "two equal rows"
    return ""


def distinct(rows: torch.Tensor) -> bool:
    """Whether no two rows of [rows, ...] have the same bits."""
    return len({row.tobytes() for row in bits(rows).numpy()}) == rows.shape[0]


def check(directory: Path, fixture: Fixture) -> None:
    """Assert that no wrong table could hide in this checkpoint; rows being distinct, so are heads,
    groups and experts.
    """
    state = {name: tensor for name, tensor in read(directory).items() if not BUFFERS.fullmatch(name)}
    seen: dict[tuple[Any, ...], str] = {}
    for name, tensor in state.items():
        assert not degenerate(tensor), f"{fixture.name}: {name} {list(tensor.shape)}: {degenerate(tensor)}"
        square = any(a == b for a, b in itertools.pairwise(tensor.shape))
        forced = any(re.fullmatch(pattern, name) for pattern in fixture.square)
        assert square == forced, f"{fixture.name}: {name} {list(tensor.shape)}: square: {square}, expected: {forced}"
        if name.endswith(("sinks", "router.bias", "e_score_correction_bias")):
            assert distinct(tensor), f"{fixture.name}: {name}: two equal values"
        elif tensor.ndim == 1 and tensor.numel() % fixture.heads == 0:
            assert distinct(tensor.view(fixture.heads, -1)), f"{fixture.name}: {name}: two equal heads"
        content = (tensor.dtype, tuple(tensor.shape), bits(tensor).numpy().tobytes())
        twin = seen.setdefault(content, name)
        assert twin == name or (name, twin) in fixture.equal or (twin, name) in fixture.equal, (
            f"{fixture.name}: {name} equals {twin}"
        )


# The families


def define(family: str, name: str = "", **facts: Any) -> Callable[[Callable[[Path, str], None]], None]:
    """Register the decorated builder, which takes the directory and a seed, under its own name; outside this file,
    in the zoo.
    """

    def register(builder: Callable[[Path, str], None]) -> None:
        key = name or builder.__name__
        file = Path(builder.__code__.co_filename)
        assert key not in FIXTURES.keys() | ZOO.keys(), key
        registry = FIXTURES if file.name == Path(__file__).name else ZOO
        notes = (builder.__doc__ or "").strip()
        if (twin := facts.get("twin")) is not None:
            facts["twin"] = lambda directory: twin(directory, key)
        registry[key] = Fixture(key, family, lambda directory: builder(directory, key), notes=notes, file=file, **facts)

    return register


# rope_scaling of HunYuan's models, as published.
HUNYUAN_ROPE: Mapping[str, Any] = {
    "type": "dynamic",
    "alpha": 1000.0,
    "factor": 1.0,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}
COMMON: Mapping[str, Any] = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None, "max_position_embeddings": 128}


def sizes(heads: int, kv: int, head_dim: int, hidden: int, inter: int, vocab: int, layers: int) -> dict[str, Any]:
    """The keys that most configurations share. Refuses sizes of which two axes, or two sides of a matrix,
    would be equal.
    """
    axes = [heads, kv, head_dim, hidden, inter, vocab, layers, heads * head_dim, kv * head_dim]
    assert len(set(axes)) == len(axes), axes
    return {
        **COMMON,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "head_dim": head_dim,
        "hidden_size": hidden,
        "intermediate_size": inter,
        "vocab_size": vocab,
        "num_hidden_layers": layers,
    }


@define("llama", heads=8, kv=4, layers=5)
def llama(directory: Path, seed: str) -> None:
    """Grouped attention, llama3 rope scaling."""
    from transformers import LlamaConfig

    rope: dict[str, Any] = {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    }
    write(directory, seed, LlamaConfig(**sizes(8, 4, 10, 56, 88, 331, 5), rope_parameters=rope))


@define("llama", heads=8, kv=2, layers=3, weights=False)
def llama_tied(directory: Path, seed: str) -> None:
    """Tied: no head is stored."""
    from transformers import LlamaConfig

    write(directory, seed, LlamaConfig(**sizes(8, 2, 14, 72, 104, 317, 3), tie_word_embeddings=True))


@define("llama", heads=8, kv=4, layers=3)
def llama_bias(directory: Path, seed: str) -> None:
    """attention_bias and mlp_bias: also on the two row-parallel matrices."""
    from transformers import LlamaConfig

    write(directory, seed, LlamaConfig(**sizes(8, 4, 14, 72, 88, 333, 3), attention_bias=True, mlp_bias=True))


@define("llama", heads=8, kv=4, layers=3)
def llama_inv_freq(directory: Path, seed: str) -> None:
    """With the rotary buffers that Llama 1 and 2 were published with, fp32 inside a bf16 checkpoint."""
    from transformers import LlamaConfig

    write(directory, seed, LlamaConfig(**sizes(8, 4, 12, 80, 104, 349, 3)))
    inv_freq = 10000.0 ** -(torch.arange(0, 12, 2) / 12)
    rewrite(
        directory,
        lambda state: state | {f"model.layers.{layer}.self_attn.rotary_emb.inv_freq": inv_freq for layer in range(3)},
    )


@define("llama", heads=8, kv=4, layers=3)
def llama_bin(directory: Path, seed: str) -> None:
    """Shards of pytorch_model.bin, fp16, as transformers 4 wrote them."""
    from transformers import LlamaConfig

    write(directory, seed, LlamaConfig(**sizes(8, 4, 14, 88, 104, 331, 3)), dtype=torch.float16)
    rewrite(directory, lambda state: state, binary=True)


@define("mistral", heads=8, kv=2, layers=3, weights=False)
def mistral(directory: Path, seed: str) -> None:
    """Sliding window."""
    from transformers import MistralConfig

    write(directory, seed, MistralConfig(**sizes(8, 2, 10, 64, 104, 331, 3), sliding_window=7))


@define("qwen2", heads=8, kv=4, layers=5)
def qwen2(directory: Path, seed: str) -> None:
    """Bias on q, k and v, none on o; one file without an index."""
    from transformers import Qwen2Config

    write(directory, seed, Qwen2Config(**sizes(8, 4, 10, 56, 104, 341, 5)), shard=None)


@define("qwen3", heads=8, kv=4, layers=5)
def qwen3(directory: Path, seed: str) -> None:
    """A norm over head_dim on q and on k."""
    from transformers import Qwen3Config

    write(directory, seed, Qwen3Config(**sizes(8, 4, 14, 72, 88, 331, 5)))


@define("qwen3", heads=8, kv=4, layers=3)
def qwen3_tied(directory: Path, seed: str) -> None:
    """Tied: no head is stored."""
    from transformers import Qwen3Config

    write(directory, seed, Qwen3Config(**sizes(8, 4, 10, 64, 88, 347, 3), tie_word_embeddings=True))


@define("qwen3", heads=8, kv=2, layers=3, weights=False, equal=(("lm_head.weight", "model.embed_tokens.weight"),))
def qwen3_tied_stored(directory: Path, seed: str) -> None:
    """Tied, and the head is stored all the same, as Qwen3-0.6B is published."""
    from transformers import Qwen3Config

    write(directory, seed, Qwen3Config(**sizes(8, 2, 10, 56, 104, 331, 3), tie_word_embeddings=True))
    rewrite(directory, lambda state: state | {"lm_head.weight": state["model.embed_tokens.weight"]})


@define("mixtral", heads=16, kv=4, layers=3, experts=8, ep=(1, 2, 4))
def mixtral(directory: Path, seed: str) -> None:
    """Every layer has experts: w1, w2, w3."""
    from transformers import MixtralConfig

    write(directory, seed, MixtralConfig(**sizes(16, 4, 6, 80, 88, 331, 3), num_local_experts=8, num_experts_per_tok=2))


@define("qwen3_moe", heads=8, kv=2, layers=5, experts=4, ep=(1, 2, 4), weights=False)
def qwen3_moe(directory: Path, seed: str) -> None:
    """Layers 0 and 3 are dense, by mlp_only_layers."""
    from transformers import Qwen3MoeConfig

    facts: dict[str, Any] = {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 40,
        "mlp_only_layers": [0, 3],
        "norm_topk_prob": True,
    }
    write(directory, seed, Qwen3MoeConfig(**sizes(8, 2, 10, 72, 88, 331, 5), **facts))


@define("qwen3_moe", heads=16, kv=4, layers=5, experts=8, ep=(1, 2, 4, 8))
def qwen3_moe_step(directory: Path, seed: str) -> None:
    """Layers 0, 2 and 4 are dense, by decoder_sparse_step; the number of experts under the key that transformers 4
    wrote.
    """
    from transformers import Qwen3MoeConfig

    facts: dict[str, Any] = {
        "num_experts": 8,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 24,
        "decoder_sparse_step": 2,
    }
    write(directory, seed, Qwen3MoeConfig(**sizes(16, 4, 10, 56, 88, 337, 5), **facts))
    configure(directory, "num_local_experts", num_experts=8)


@define("phi3", heads=8, kv=4, layers=5)
def phi3(directory: Path, seed: str) -> None:
    """Fused q, k, v and fused gate, up."""
    from transformers import Phi3Config

    write(directory, seed, Phi3Config(**sizes(8, 4, 10, 56, 104, 331, 5)))


GPT2_SQUARE = (r"(transformer\.)?h\.\d+\.attn\.c_proj\.weight",)


def gpt2_config(layers: int) -> Any:
    from transformers import GPT2Config

    return GPT2Config(
        n_embd=56, n_head=8, n_inner=104, n_layer=layers, n_positions=72, vocab_size=331, bos_token_id=1, eos_token_id=2
    )


@define("gpt2", heads=8, kv=8, layers=5, square=GPT2_SQUARE)
def gpt2(directory: Path, seed: str) -> None:
    """As transformers writes it: a prefix, tied, no buffers. Here heads times head_dim is hidden, by definition."""
    write(directory, seed, gpt2_config(5))


@define("gpt2", heads=8, kv=8, layers=3, square=GPT2_SQUARE)
def gpt2_bare(directory: Path, seed: str) -> None:
    """As OpenAI's is published: fp32, no prefix, with attention masks; those in a dtype per layer, to have all that
    were ever published.
    """
    write(directory, seed, gpt2_config(3), dtype=torch.float32)
    mask = torch.ones(72, 72).tril()[None, None]

    def age(state: State) -> State:
        state = {name.removeprefix("transformer."): tensor for name, tensor in state.items()}
        return state | {
            f"h.{layer}.attn.bias": mask.to(dtype)
            for layer, dtype in enumerate((torch.float32, torch.uint8, torch.bool))
        }

    rewrite(directory, age, shard=2 * SHARD)


NEOX_SQUARE = (r"gpt_neox\.layers\.\d+\.attention\.dense\.weight",)


def gpt_neox_config(layers: int, parallel: bool) -> Any:
    from transformers import GPTNeoXConfig

    return GPTNeoXConfig(
        **COMMON,
        hidden_size=80,
        num_attention_heads=8,
        intermediate_size=104,
        num_hidden_layers=layers,
        vocab_size=331,
        use_parallel_residual=parallel,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.4},
        tie_word_embeddings=False,
    )


@define("gpt_neox", heads=8, kv=8, layers=5, square=NEOX_SQUARE)
def gpt_neox(directory: Path, seed: str) -> None:
    """q, k and v of each head together. Here heads times head_dim is hidden, by definition."""
    write(directory, seed, gpt_neox_config(5, parallel=True))


@define("gpt_neox", heads=8, kv=8, layers=3, square=NEOX_SQUARE)
def gpt_neox_old(directory: Path, seed: str) -> None:
    """With the mask, the scalar that masks and the rotary buffer that Pythia and NeoX-20B were published with."""
    write(directory, seed, gpt_neox_config(3, parallel=False))
    mask = torch.ones(64, 64, dtype=torch.bool).tril()[None, None]

    def age(state: State) -> State:
        for layer in range(3):
            prefix = f"gpt_neox.layers.{layer}.attention."
            state[prefix + "bias"] = mask
            state[prefix + "masked_bias"] = torch.tensor(-1e9)
            state[prefix + "rotary_emb.inv_freq"] = 10000.0 ** -(torch.arange(0, 4, 2) / 4)
        return state

    rewrite(directory, age)
    configure(directory, "rope_parameters", rotary_pct=0.4, rotary_emb_base=10000)


FALCON_SQUARE = (r"transformer\.h\.\d+\.self_attention\.dense\.weight",)
FALCON: Mapping[str, Any] = {
    **COMMON,
    "hidden_size": 80,
    "num_attention_heads": 8,
    "ffn_hidden_size": 104,
    "vocab_size": 331,
}


@define("falcon", heads=8, kv=1, layers=5, weights=False, square=FALCON_SQUARE)
def falcon_7b(directory: Path, seed: str) -> None:
    """Multi-query, [all q, k, v]; one norm feeds both branches; tied, no head is stored. Heads times head_dim is
    hidden, by definition.
    """
    from transformers import FalconConfig

    facts: dict[str, Any] = {"multi_query": True, "parallel_attn": True, "new_decoder_architecture": False}
    write(directory, seed, FalconConfig(**FALCON, num_hidden_layers=5, **facts))


@define(
    "falcon",
    heads=8,
    kv=4,
    layers=3,
    square=FALCON_SQUARE,
    equal=(("lm_head.weight", "transformer.word_embeddings.weight"),),
)
def falcon_40b(directory: Path, seed: str) -> None:
    """Grouped, [q of the group, k, v] per group; a norm for each branch; tied, and the head is stored all the same,
    as published.
    """
    from transformers import FalconConfig

    write(directory, seed, FalconConfig(**FALCON, num_hidden_layers=3, num_kv_heads=4, new_decoder_architecture=True))
    rewrite(directory, lambda state: state | {"lm_head.weight": state["transformer.word_embeddings.weight"]})
    configure(directory, "tie_word_embeddings")


@define("falcon", heads=8, kv=8, layers=3, square=FALCON_SQUARE)
def falcon_rw(directory: Path, seed: str) -> None:
    """As falcon-rw-1b: ALiBi, [q, k, v] per head, biases, one branch after the other; not tied."""
    from transformers import FalconConfig

    facts: dict[str, Any] = {
        "alibi": True,
        "multi_query": False,
        "bias": True,
        "parallel_attn": False,
        "new_decoder_architecture": False,
    }
    write(directory, seed, FalconConfig(**FALCON, num_hidden_layers=3, **facts, tie_word_embeddings=False))


@define("gemma2", heads=8, kv=4, layers=3)
def gemma2(directory: Path, seed: str) -> None:
    """Four norms, stored as the difference from 1; tied; soft caps; every other layer has a window."""
    from transformers import Gemma2Config

    write(directory, seed, Gemma2Config(**sizes(8, 4, 14, 72, 104, 331, 3), sliding_window=9, query_pre_attn_scalar=11))


@define("olmo2", heads=8, kv=4, layers=3)
def olmo2(directory: Path, seed: str) -> None:
    """Norms behind the branches; a norm over all of q and over all of k."""
    from transformers import Olmo2Config

    write(directory, seed, Olmo2Config(**sizes(8, 4, 10, 56, 104, 331, 3)))


@define("gpt_oss", heads=16, kv=4, layers=3, experts=8, ep=(1, 2, 4))
def gpt_oss(directory: Path, seed: str) -> None:
    """bf16: experts stacked, transposed, gate and up interleaved, with biases; sinks per head."""
    from transformers import GptOssConfig

    facts: dict[str, Any] = {"num_local_experts": 8, "num_experts_per_tok": 3, "sliding_window": 9}
    rope: dict[str, Any] = {
        "rope_type": "yarn",
        "rope_theta": 150000.0,
        "factor": 4.0,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "truncate": False,
        "original_max_position_embeddings": 32,
    }
    write(directory, seed, GptOssConfig(**sizes(16, 4, 10, 56, 88, 331, 3), **facts, rope_parameters=rope))


DEEPSEEK: Mapping[str, Any] = {
    **COMMON,
    "vocab_size": 331,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "n_shared_experts": 2,
}


def add_mtp(state: State, seed: str, layers: int, dtype: torch.dtype) -> State:
    """Add layer number `layers`: a whole layer with experts, and the six further names that DeepSeek-V3 was published
    with.
    """
    last, extra = f"model.layers.{layers - 1}.", f"model.layers.{layers}."
    like = {extra + name.removeprefix(last): tensor for name, tensor in state.items() if name.startswith(last)}
    vocab, hidden = state["model.embed_tokens.weight"].shape
    like[extra + "embed_tokens.weight"] = like[extra + "shared_head.head.weight"] = torch.empty(vocab, hidden)
    like[extra + "eh_proj.weight"] = torch.empty(hidden, 2 * hidden)
    like |= {f"{extra}{norm}.weight": torch.empty(hidden) for norm in ("enorm", "hnorm", "shared_head.norm")}
    kept = {name: torch.float32 for name in like if name.endswith("e_score_correction_bias")}
    return state | {name: noise_like(seed, name, tensor, 1.0, kept.get(name, dtype)) for name, tensor in like.items()}


@define("deepseek_v3", heads=8, kv=8, layers=4, experts=4, mtp=1, ep=(1, 2, 4))
def deepseek_v3(directory: Path, seed: str) -> None:
    """Latent attention with q_lora; layers 0 and 1 dense; shared experts; one multi-token prediction layer."""
    from transformers import DeepseekV3Config

    config = DeepseekV3Config(
        **DEEPSEEK,
        hidden_size=56,
        num_attention_heads=8,
        num_key_value_heads=8,
        q_lora_rank=36,
        kv_lora_rank=28,
        qk_nope_head_dim=10,
        qk_rope_head_dim=6,
        v_head_dim=14,
        intermediate_size=104,
        moe_intermediate_size=40,
        num_hidden_layers=4,
        first_k_dense_replace=2,
    )
    write(directory, seed, config)
    rewrite(directory, lambda state: add_mtp(state, seed, 4, torch.bfloat16))
    configure(directory, "num_mtp_layers", num_nextn_predict_layers=1)


@define("deepseek_v3", heads=8, kv=8, layers=3, experts=4, ep=(1, 2, 4))
def deepseek_v3_whole(directory: Path, seed: str) -> None:
    """Latent attention without q_lora; layer 0 dense; no multi-token prediction."""
    from transformers import DeepseekV3Config

    config = DeepseekV3Config(
        **{**DEEPSEEK, "n_shared_experts": 3},
        hidden_size=56,
        num_attention_heads=8,
        num_key_value_heads=8,
        q_lora_rank=None,
        kv_lora_rank=28,
        qk_nope_head_dim=12,
        qk_rope_head_dim=6,
        v_head_dim=10,
        intermediate_size=104,
        moe_intermediate_size=24,
        num_hidden_layers=3,
        first_k_dense_replace=1,
    )
    write(directory, seed, config)
    configure(directory, "num_mtp_layers", num_nextn_predict_layers=0)


def quantize(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """F8_E4M3 [out, in] and fp32 [ceil(out / 128), ceil(in / 128)]: weight = quantized * scale, by blocks,
    the last of them short.
    """
    rows, columns = weight.shape
    padded = torch.zeros(-(-rows // BLOCK) * BLOCK, -(-columns // BLOCK) * BLOCK)
    padded[:rows, :columns] = weight
    blocks = padded.view(padded.shape[0] // BLOCK, BLOCK, padded.shape[1] // BLOCK, BLOCK)
    scale = blocks.abs().amax(dim=(1, 3)) / torch.finfo(torch.float8_e4m3fn).max
    quantized = (blocks / scale[:, None, :, None]).view_as(padded)[:rows, :columns]
    return quantized.to(torch.float8_e4m3fn).contiguous(), scale


# What DeepSeek-R1 has a weight_scale_inv for: all matrices of attention and feed-forward; not the router, not eh_proj,
# not the head.
QUANTIZED = re.compile(
    r"model\.layers\.\d+\.(self_attn\.(q_a_proj|q_b_proj|kv_a_proj_with_mqa|kv_b_proj|o_proj)"
    r"|mlp\.(experts\.\d+\.|shared_experts\.)?(gate_proj|up_proj|down_proj))\.weight"
)


BLOCK_SCALED = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "weight_block_size": [BLOCK, BLOCK],
    "activation_scheme": "dynamic",
}


def in_blocks(state: State, *more: str) -> State:
    """Those matrices, and what ends in one of `more`, in FP8 with their scales; all else in bfloat16."""
    result = {}
    for name, tensor in state.items():
        if QUANTIZED.fullmatch(name) or name.endswith(more):
            result[name], result[name + "_scale_inv"] = quantize(tensor)
        else:
            result[name] = tensor if name.endswith("e_score_correction_bias") else tensor.to(torch.bfloat16)
    return result


def write_fp8(directory: Path, seed: str) -> None:
    from transformers import DeepseekV3Config

    config = DeepseekV3Config(
        **DEEPSEEK,
        hidden_size=160,
        num_attention_heads=8,
        num_key_value_heads=8,
        q_lora_rank=384,
        kv_lora_rank=256,
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        v_head_dim=256,
        intermediate_size=2560,
        moe_intermediate_size=512,
        num_hidden_layers=2,
        first_k_dense_replace=1,
    )
    write(directory, seed, config, dtype=torch.float32)

    rewrite(directory, lambda state: in_blocks(add_mtp(state, seed, 2, torch.float32)), shard=2_500_000)
    configure(
        directory, "num_mtp_layers", num_nextn_predict_layers=1, dtype="bfloat16", quantization_config=BLOCK_SCALED
    )


def without_fp8(directory: Path, seed: str) -> None:
    """As transformers has it without FP8: every weight times the scale of its block."""
    write_fp8(directory, seed)
    rewrite(directory, floats, shard=2_500_000)
    configure(directory, "quantization_config")


def floats(state: State) -> State:
    """Every weight times the scale of its block, in float32."""
    for scale in [name for name in state if name.endswith("_scale_inv")]:
        name, wide = (
            scale.removesuffix("_scale_inv"),
            state.pop(scale).repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1),
        )
        state[name] = state[name].float() * wide[: state[name].shape[0], : state[name].shape[1]]
    return {name: tensor.float() for name, tensor in state.items()}


@define("deepseek_v3", heads=8, kv=8, layers=2, experts=4, mtp=1, tp=(1, 2, 4), ep=(1, 2, 4), twin=without_fp8)
def deepseek_v3_fp8(directory: Path, seed: str) -> None:
    """As DeepSeek-R1: F8_E4M3, a scale per block of 128 by 128, ragged where nothing is cut. TP 8 would fall inside
    blocks.
    """
    write_fp8(directory, seed)


# The cache


@cache
def root(file: Path = Path(__file__)) -> Path:
    """The folder of this version of the fixtures: of this file, of the one that defines them, and of the libraries that
    write them.
    """
    text = (
        Path(__file__).read_bytes()
        + "".join(version(package) for package in ("torch", "transformers", "safetensors")).encode()
    )
    text += b"" if file.name == Path(__file__).name else file.read_bytes()
    user = os.getuid() if hasattr(os, "getuid") else 0
    path = Path(tempfile.gettempdir()) / f"reshard-fixtures-{user}-{hashlib.sha256(text).hexdigest()[:16]}"
    path.mkdir(mode=0o700, exist_ok=True)
    return path


@cache
def zoo() -> dict[str, Fixture]:
    """All fixtures of tests/zoo_*.py, by name."""
    for path in sorted(Path(__file__).parent.glob("zoo_*.py")):
        importlib.import_module(path.stem)
    return ZOO


def fixture(name: str) -> Fixture:
    return FIXTURES[name] if name in FIXTURES else zoo()[name]


def checkpoint(name: str) -> Path:
    """The directory of a fixture, built and checked if this is its first use on this machine. Shared by all tests:
    do not write into it.
    """
    about = fixture(name)
    place = root(about.file)
    final = place / name
    if not final.exists():
        work = Path(tempfile.mkdtemp(dir=place, prefix=f".{name}-"))
        try:
            about.build(work)
            check(work, about)
            work.rename(final)
        except OSError:
            if not final.exists():  # else another process was faster, with the same content
                raise
        finally:
            shutil.rmtree(work, ignore_errors=True)
    return final


def copy(name: str, directory: Path) -> Path:
    """A private copy of a fixture in `directory`, which must not exist; to be damaged."""
    return Path(shutil.copytree(checkpoint(name), directory))
