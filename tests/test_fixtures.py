"""The fixtures hide no mistake, and the reference says what the architectures do: both are measured against
`transformers` and by hand.
"""

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
from fixtures import FIXTURES, check, checkpoint, copy, read, rewrite
from torch_reference import BUFFERS, bits, differences, expected, load, same, shares

NATIVE = Path(__file__).parent.parent / "reshard" / "formats" / "native.toml"
each_fixture = pytest.mark.parametrize("name", FIXTURES)


@each_fixture
def test_no_two_tensors_rows_or_heads_of_a_fixture_are_equal_and_nothing_is_square_or_constant(name: str) -> None:
    check(checkpoint(name), FIXTURES[name])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda a, b: (a, a.clone()), "equals"),
        (lambda a, b: (a[:8], b[:, :8].clone()[: a.shape[1]].resize_(8, 8)), "square"),
        (lambda a, b: (torch.cat([a[:1], a[:-1]]), b), "two equal rows"),
        (lambda a, b: (a, torch.ones_like(b)), "constant"),
        (lambda a, b: (a, torch.full_like(b, torch.nan)), "not finite"),
    ],
)
def test_the_check_of_the_fixtures_notices_what_would_hide_a_mistake(tmp_path: Path, damage, message: str) -> None:
    directory = copy("llama", tmp_path / "llama")
    gate, up = "model.layers.1.mlp.gate_proj.weight", "model.layers.1.mlp.up_proj.weight"

    def edit(state):
        state[gate], state[up] = damage(state[gate], state[up])
        return state

    rewrite(directory, edit)
    with pytest.raises(AssertionError, match=message):
        check(directory, FIXTURES["llama"])


@each_fixture
def test_a_single_rank_holds_each_element_of_the_checkpoint_once_but_no_buffer(name: str) -> None:
    directory = checkpoint(name)
    claimed = sum(tensor.numel() for tensor in load(directory).values())
    (rank,) = expected(directory, FIXTURES[name].family)
    assert sum(tensor.numel() for tensor in rank.values()) == claimed
    buffers = [key for key in read(directory) if BUFFERS.fullmatch(key)]
    assert bool(buffers) == (name in {"llama_inv_freq", "gpt2_bare", "gpt_neox_old"}), buffers


@each_fixture
def test_every_name_of_the_reference_is_a_row_of_the_native_table(name: str) -> None:
    rows = {row[0] for row in tomllib.loads(NATIVE.read_text())["rows"]}
    rows |= {f"{row}_scale" for row in rows}  # parts of quantised matrices have no rows of their own
    names = {
        re.sub(r"^layers\.\d+\.", "layers.{layer}.", key)
        for rank in expected(checkpoint(name), FIXTURES[name].family)
        for key in rank
    }
    assert names <= rows, names - rows


@each_fixture
def test_the_ranks_of_every_mesh_hold_all_names_and_nothing_empty(name: str) -> None:
    fixture = FIXTURES[name]
    (whole,) = expected(checkpoint(name), fixture.family)
    for mesh in fixture.meshes():
        ranks = expected(checkpoint(name), fixture.family, **mesh)
        tp, pp = mesh["tp"], mesh.get("pp", 1)
        assert len(ranks) == tp * pp
        stages = [ranks[stage * tp : (stage + 1) * tp] for stage in range(pp)]
        assert all(rank.keys() == stage[0].keys() for stage in stages for rank in stage), mesh
        assert all(tensor.numel() for rank in ranks for tensor in rank.values()), mesh
        names = [key for stage in stages for key in stage[0]]
        assert len(names) == len(set(names)), mesh
        assert set(names) == whole.keys() | ({"head"} if pp > 1 else set()), mesh


@each_fixture
def test_no_value_is_lost_at_the_largest_mesh(name: str) -> None:
    fixture = FIXTURES[name]
    (whole,) = expected(checkpoint(name), fixture.family)
    ranks = expected(checkpoint(name), fixture.family, tp=max(fixture.tp), ep=max(fixture.ep), pp=2)
    for key, tensor in whole.items():
        values = set(bits(tensor).flatten().tolist())
        assert values <= set().union(*(bits(rank[key]).flatten().tolist() for rank in ranks if key in rank)), key


def test_a_mesh_that_falls_inside_fp8_blocks_is_impossible() -> None:
    with pytest.raises(AssertionError, match="inside a block"):
        expected(checkpoint("deepseek_v3_fp8"), "deepseek_v3", tp=8)


def test_differences_names_what_is_missing_unexpected_of_another_shape_or_of_another_value() -> None:
    want = [{"a": torch.zeros(3), "b": torch.zeros(2), "c": torch.zeros(4)}]
    have = [{"b": torch.zeros(3), "c": torch.tensor([0.0, -0.0, 1.0, 0.0]), "d": torch.zeros(1)}, {}]
    assert differences(want, want) == []
    assert differences(want, have) == [
        "1 ranks expected, 2 found",
        "rank 0: a is missing",
        "rank 0: d is not expected",
        "rank 0: b: float32 [2] expected, float32 [3] found",
        "rank 0: c: 2 of 4 values differ",
    ]


def test_shares_follow_the_largest_remainder_and_ties_go_to_the_earlier_rank() -> None:
    assert shares(331, (2, 1, 1)) == [165, 83, 83]
    assert shares(4, (2, 1, 1)) == [2, 1, 1]
    assert shares(5, (1, 1, 1)) == [2, 2, 1]
    assert shares(8, (1, 1)) == [4, 4]


def test_rank_5_of_8_of_a_llama_holds_query_head_5_key_head_2_and_its_eighth_of_the_rest() -> None:
    """Heads 8 of 10, key-value heads 4, hidden 56, feed-forward 88, vocabulary 331 stored as 336: counted by hand."""
    state, rank = load(checkpoint("llama")), expected(checkpoint("llama"), "llama", tp=8)[5]
    q, k, v, o, gate, up, down = (
        state[f"model.layers.3.{name}_proj.weight"]
        for name in ("self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o", "mlp.gate", "mlp.up", "mlp.down")
    )
    assert same(rank["layers.3.attn.qkv"], torch.cat([q[50:60], k[20:30], v[20:30]]))
    assert same(rank["layers.3.attn.o"], o[:, 50:60])
    assert same(rank["layers.3.mlp.gate_up"], torch.cat([gate[55:66], up[55:66]]))
    assert same(rank["layers.3.mlp.down"], down[:, 55:66])
    assert same(rank["embed"], state["model.embed_tokens.weight"][210:252])
    last = expected(checkpoint("llama"), "llama", tp=8)[7]["head"]
    assert same(last, torch.cat([state["lm_head.weight"][294:331], torch.zeros(5, 56, dtype=torch.bfloat16)]))


def test_rank_3_of_ep_2_in_tp_4_holds_the_second_half_of_the_experts_and_the_second_half_of_each() -> None:
    """gpt-oss: 8 experts, 56 by 2 * 88 with gate and up in turns."""
    state, rank = load(checkpoint("gpt_oss")), expected(checkpoint("gpt_oss"), "gpt_oss", tp=4, ep=2)[3]
    gate_up, down = state["model.layers.1.mlp.experts.gate_up_proj"], state["model.layers.1.mlp.experts.down_proj"]
    for expert in range(4):
        gate = torch.stack([gate_up[4 + expert, :, 2 * column] for column in range(44, 88)])
        up = torch.stack([gate_up[4 + expert, :, 2 * column + 1] for column in range(44, 88)])
        assert same(rank["layers.1.moe.gate_up"][expert], torch.cat([gate, up]))
        assert same(rank["layers.1.moe.down"][expert], down[4 + expert, 44:88].T)
    assert same(rank["layers.1.moe.router"], state["model.layers.1.mlp.router.weight"])
    assert same(rank["layers.1.moe.down_bias"], state["model.layers.1.mlp.experts.down_proj_bias"][4:])
    assert same(rank["layers.1.attn.sinks"], state["model.layers.1.self_attn.sinks"][12:])


def dequantize(state: dict[str, torch.Tensor], ending: str) -> dict[str, torch.Tensor]:
    """Each weight times the scale of its block, the scale being named as the weight and `ending`."""
    result = {name: tensor for name, tensor in state.items() if not name.endswith(ending)}
    for name in state.keys() - result.keys():
        weight = result[name.removesuffix(ending)]
        scale = state[name].repeat_interleave(128, -2).repeat_interleave(128, -1)
        result[name.removesuffix(ending)] = weight.float() * scale[..., : weight.shape[-2], : weight.shape[-1]]
    return result


@pytest.fixture(scope="module")
def dequantized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = copy("deepseek_v3_fp8", tmp_path_factory.mktemp("fp8") / "model")
    rewrite(directory, lambda state: dequantize(state, "_scale_inv"), shard=1 << 30)
    return directory


@pytest.mark.parametrize(
    "mesh", [{"tp": 2, "pp": 2}, {"tp": 4}, {"tp": 4, "ep": 2}, {"tp": 3, "weights": (2, 1, 1)}], ids=str
)
def test_an_fp8_rank_dequantized_is_the_rank_of_the_dequantized_checkpoint(
    mesh: dict[str, Any], dequantized: Path
) -> None:
    ranks = expected(checkpoint("deepseek_v3_fp8"), "deepseek_v3", **mesh)
    assert sum(name.endswith("_scale") for name in ranks[0]) >= 6
    assert (
        differences(expected(dequantized, "deepseek_v3", **mesh), [dequantize(rank, "_scale") for rank in ranks]) == []
    )


def attention_of_transformers(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[Any, torch.Tensor, list[torch.Tensor]]:
    """Configuration, what goes into layer 0's attention, and its query, key and value [heads, head_dim],
    for one token at position 0.
    """
    import transformers
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
    from transformers.models.falcon.modeling_falcon import FalconAttention

    transformers.utils.logging.disable_progress_bar()
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    inputs: list[torch.Tensor] = []
    found: list[list[torch.Tensor]] = []
    at = next(
        module
        for name, module in model.named_modules()
        if re.fullmatch(r".*\.0\.(self_attn|self_attention|attention|attn)", name)
    )

    def spy(module, query, key, value, *args, **kwargs):  # [batch, heads, tokens, head_dim]
        found.append([part[0, :, 0] for part in (query, key, value)])
        return torch.zeros_like(query).transpose(1, 2), None

    def split(module, fused, real=FalconAttention._split_heads):  # to [batch, tokens, heads, head_dim]
        result = real(module, fused)
        found.append([part[0, 0] for part in result])
        return result

    def enter(module, args, kwargs):
        inputs.append((args[0] if args else kwargs["hidden_states"]).flatten())

    if model.config.model_type == "falcon":
        monkeypatch.setattr(FalconAttention, "_split_heads", split)
    else:
        ALL_ATTENTION_FUNCTIONS.register("spy", spy)
        model.config._attn_implementation = "spy"
    at.register_forward_pre_hook(enter, with_kwargs=True)
    with torch.no_grad():
        model(torch.tensor([[7]]))
    # YaRN's; all that rotation does at 0
    scaling = getattr(getattr(model.base_model, "rotary_emb", None), "attention_scaling", 1.0)
    query, key, value = found[0]
    return model.config, inputs[0], [query / scaling, key / scaling, value]


@pytest.mark.parametrize("name", [name for name, fixture in FIXTURES.items() if fixture.family != "deepseek_v3"])
def test_query_key_and_value_of_the_reference_are_those_that_transformers_computes(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fixture = FIXTURES[name]
    config, x, found = attention_of_transformers(checkpoint(name), monkeypatch)
    (rank,) = expected(checkpoint(name), fixture.family)
    fused = rank["layers.0.attn.qkv"].float() @ x + rank.get("layers.0.attn.qkv_bias", torch.zeros(1)).float()
    heads = fused.view(fixture.heads + 2 * fixture.kv, -1).split([fixture.heads, fixture.kv, fixture.kv])
    for part, want, have in zip("qkv", heads, found, strict=True):
        for norm, over in ((f"{part}_norm", want), (f"{part}_norm_full", want.flatten())):
            if (weight := rank.get(f"layers.0.attn.{norm}")) is not None:
                root = (over.pow(2).mean(-1, keepdim=True) + config.rms_norm_eps).rsqrt()
                want = (over * root * weight.float()).view_as(want)
        # new Falcon code returns keys already repeated
        want = want.repeat_interleave(have.shape[0] // want.shape[0], 0)
        torch.testing.assert_close(have, want, rtol=1e-4, atol=1e-4)
