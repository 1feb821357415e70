"""What a mesh costs at run time: bytes per rank and caches against tables computed by hand, fitting,
sizes that work.
"""

import itertools
import re
from functools import cache as once
from typing import Any

import pytest
import shapes

from reshard.errors import ReshardError
from reshard.layout import capacity
from reshard.layout.cut import Layout, lay_out
from reshard.layout.mesh import Mesh
from reshard.model.understand import Config, Model, understand
from reshard.tables import families, formats
from reshard.tables.layer_rules import layers_named

GIB = 1 << 30
NATIVE = formats.load("native")

SMALL = shapes.LLAMA_70B | {
    "hidden_size": 96,
    "head_dim": 16,
    "num_hidden_layers": 6,
    "num_attention_heads": 32,
    "intermediate_size": 640,
    "vocab_size": 1001,
}


def model_of(config: dict[str, Any], headers: shapes.Headers) -> Model:
    return understand(families.load(config["model_type"]), Config(config), headers)


@once
def llama() -> Model:
    return model_of(shapes.LLAMA_70B, shapes.llama(shapes.LLAMA_70B))


@once
def gemma() -> Model:
    return model_of(shapes.GEMMA2_27B, shapes.llama(shapes.GEMMA2_27B))


@once
def deepseek(fp8: bool) -> Model:
    config = shapes.DEEPSEEK_V3 | (shapes.FP8 if fp8 else {})
    return model_of(config, shapes.deepseek_v3(config))


@once
def small() -> Model:
    return model_of(SMALL, shapes.llama(SMALL))


def laid(model: Model, **mesh: Any) -> Layout:
    return lay_out(NATIVE, model, Mesh(**mesh))


# --- Llama-3.1-70B ----------------------------------------------------------------------------------------------------


def test_llama_at_tp_8_stores_what_a_hand_counts() -> None:
    """One of the 8 KV heads and 8 of the 64 heads are on each rank."""
    layer = (
        8192  # input norm
        + 8192  # post-attention norm
        + 8 * 128 * 8192  # q: 8 heads
        + 1 * 128 * 8192  # k: 1 head
        + 1 * 128 * 8192  # v
        + 8192 * 8 * 128  # o
        + 3584 * 8192  # gate: 28672 / 8
        + 3584 * 8192  # up
        + 8192 * 3584  # down
    )
    outside = 16032 * 8192 + 16032 * 8192 + 8192  # embed and head: 128256 / 8 rows; norm
    layout = laid(llama(), tp=8)
    assert capacity.weight_bytes(layout) == (2 * (80 * layer + outside),) * 8


def test_llama_at_tp_16_repeats_each_kv_head_on_two_ranks() -> None:
    """Weights and cache hold a whole KV head on every one of 16 ranks,
    so the cache of all ranks is twice the model's.
    """
    layer = 2 * 8192 + 4 * 128 * 8192 + 2 * (1 * 128 * 8192) + 8192 * 4 * 128 + 3 * 1792 * 8192
    outside = 2 * (8016 * 8192) + 8192
    layout = laid(llama(), tp=16)
    assert capacity.weight_bytes(layout) == (2 * (80 * layer + outside),) * 16
    cache = capacity.cache(layout, Config(shapes.LLAMA_70B), 8192, 4)
    assert cache is not None
    # layers, k and v, 1 head, head_dim, tokens, batch, bytes
    assert cache.ranks == (80 * 2 * 1 * 128 * 8192 * 4 * 2,) * 16
    assert cache.dtypes == ("BF16",)
    at_8 = capacity.cache(laid(llama(), tp=8), Config(shapes.LLAMA_70B), 8192, 4)
    assert at_8 is not None and at_8.ranks == cache.ranks[:8]


def test_pipeline_stages_keep_the_cache_of_their_own_layers() -> None:
    """80 layers on 3 stages are 27, 27 and 26; the head of the last stage is no reason to count it twice."""
    cache = capacity.cache(laid(llama(), tp=2, pp=3), Config(shapes.LLAMA_70B), 1000, 1)
    per_layer = 2 * 4 * 128 * 1000 * 2
    assert cache is not None
    assert cache.ranks == (27 * per_layer,) * 4 + (26 * per_layer,) * 2


def test_uneven_ranks_keep_the_heads_that_they_have() -> None:
    """`--split 3:3:2` puts 3, 3 and 2 of the 8 KV heads on the ranks, in weights and in the cache."""
    layout = laid(llama(), tp=3, weights=(3, 3, 2))
    cache = capacity.cache(layout, Config(shapes.LLAMA_70B), 100, 1)
    assert cache is not None and cache.ranks == tuple(80 * 2 * heads * 128 * 100 * 2 for heads in (3, 3, 2))

    def rank(kv: int) -> int:
        inter, vocab = 28672 * kv // 8, 128256 * kv // 8
        layer = 2 * 8192 + (8 * kv + 2 * kv) * 128 * 8192 + 8192 * 8 * kv * 128 + 3 * inter * 8192
        return 2 * (80 * layer + 2 * vocab * 8192 + 8192)

    assert capacity.weight_bytes(layout) == (rank(3), rank(3), rank(2))


# --- DeepSeek-V3 ------------------------------------------------------------------------------------------------------


def deepseek_rank_by_hand(weight: int, scale: int, experts: int, moe_inter: int) -> int:
    """Bytes of a rank of 16 that has `experts` whole experts of `moe_inter`; `weight`: bytes per weight, `scale`:
    per block of 128².
    """

    def linear(out: int, into: int, blocks: int | None = None) -> int:
        tiles = -(-out // 128) * -(-into // 128) if blocks is None else blocks
        return out * into * weight + tiles * scale

    attention = (
        2 * (7168 + 7168 + 1536 + 512)  # four norms, BF16
        + linear(1536, 7168)  # q_a, whole
        + linear(512 + 64, 7168)  # kv_a and the rotary part of k, whole: 4 + 1 rows of blocks
        + linear(8 * 192, 1536)  # q_b: 8 of 128 heads
        + linear(8 * (128 + 128), 512)  # kv_b
        + linear(7168, 8 * 128)  # o
    )
    dense = linear(1152, 7168) + linear(1152, 7168) + linear(7168, 1152)  # 18432 / 16
    moe = (
        256 * 7168 * 2  # router, BF16
        + 256 * 4  # its bias, fp32
        + experts * (2 * linear(moe_inter, 7168) + linear(7168, moe_inter))
        + 2 * linear(128, 7168)  # shared expert, 2048 / 16
        + linear(7168, 128)
    )
    # three norms, eh_proj whole, embed and head: 129280 / 16 rows
    mtp = 2 * (3 * 7168 + 7168 * 14336 + 2 * 8080 * 7168)
    outside = 2 * (2 * 8080 * 7168 + 7168)
    return 62 * attention + 3 * dense + 59 * moe + mtp + outside


@pytest.mark.parametrize(("fp8", "weight", "scale"), [(False, 2, 0), (True, 1, 4)])
def test_deepseek_at_tp_16_stores_what_a_hand_counts(fp8: bool, weight: int, scale: int) -> None:
    """In BF16 and in FP8 with scales, with the multi-token prediction of layer 61; every expert is cut in 16."""
    assert capacity.weight_bytes(laid(deepseek(fp8), tp=16)) == (deepseek_rank_by_hand(weight, scale, 256, 128),) * 16


@pytest.mark.parametrize(("fp8", "weight", "scale"), [(False, 2, 0), (True, 1, 4)])
def test_deepseek_at_ep_16_stores_what_a_hand_counts(fp8: bool, weight: int, scale: int) -> None:
    """16 whole experts per rank, everything else cut as without EP."""
    assert (
        capacity.weight_bytes(laid(deepseek(fp8), tp=16, ep=16))
        == (deepseek_rank_by_hand(weight, scale, 16, 2048),) * 16
    )


@pytest.mark.parametrize("fp8", [False, True])
def test_a_latent_cache_is_whole_on_each_tensor_parallel_rank(fp8: bool) -> None:
    """61 layers of 512 + 64 numbers in 16 bits, also where the weights are FP8; layer 61 keeps nothing."""
    config = Config(shapes.DEEPSEEK_V3 | (shapes.FP8 if fp8 else {}))
    for mesh in ({"tp": 16}, {"tp": 16, "ep": 16}):
        cache = capacity.cache(laid(deepseek(fp8), **mesh), config, 8192, 4)
        assert cache is not None and cache.ranks == (61 * (512 + 64) * 8192 * 4 * 2,) * 16
        assert cache.dtypes == ("BF16",)
    staged = capacity.cache(laid(deepseek(fp8), tp=2, pp=2), config, 8192, 4)
    assert staged is not None
    assert staged.ranks == tuple(n * (512 + 64) * 8192 * 4 * 2 for n in (31, 31, 30, 30))


# --- Gemma-2-27B ------------------------------------------------------------------------------------------------------


def test_gemma_at_tp_8_stores_what_a_hand_counts() -> None:
    """Tied: the embedding is stored once; four norms a layer."""
    layer = (
        4 * 4608  # norms
        + (4 + 2 + 2) * 128 * 4608  # q, k, v: 32 / 8 and 16 / 8 heads
        + 4608 * 4 * 128  # o
        + 2 * 4608 * 4608  # gate and up: 36864 / 8
        + 4608 * 4608  # down
    )
    outside = 32000 * 4608 + 4608  # 256000 / 8 rows of the embedding; norm
    assert capacity.weight_bytes(laid(gemma(), tp=8)) == (2 * (46 * layer + outside),) * 8


def test_gemma_s_even_layers_keep_a_window() -> None:
    """23 layers keep 4096 tokens, 23 keep all 8192; below the window there is no difference."""
    layout, config = laid(gemma(), tp=8), Config(shapes.GEMMA2_27B)
    per_token = 2 * 2 * 128 * 2  # k and v, 2 KV heads, head_dim, bytes
    long, short = capacity.cache(layout, config, 8192, 4), capacity.cache(layout, config, 2048, 4)
    assert long is not None and short is not None
    assert long.ranks == ((23 * 4096 + 23 * 8192) * per_token * 4,) * 8
    assert short.ranks == (46 * 2048 * per_token * 4,) * 8
    assert long.window == 4096 and long.windowed == tuple(range(0, 46, 2))


# --- windows ----------------------------------------------------------------------------------------------------------


def windowed(family: str, layers: int = 6, **config: Any) -> tuple[int | None, tuple[int, ...]]:
    table = families.load(family)
    return capacity.window(Model(table, {}, {}, {}, main_layers=layers), Config({"model_type": family, **config}))


def test_each_family_s_windows_are_those_of_transformers() -> None:
    """The layers that keep a window, and how long it is, as transformers' own configuration classes have them."""
    transformers = pytest.importorskip("transformers")
    given: list[dict[str, Any]] = [
        {},
        {"sliding_window": 100},
        {"sliding_window": 100, "use_sliding_window": True, "max_window_layers": 4},
        {"sliding_window": 100, "use_sliding_window": True, "layer_types": ["full_attention", "sliding_attention"] * 3},
    ]
    checked = 0
    older = (
        "llama",
        "mistral",
        "mixtral",
        "qwen2",
        "qwen3",
        "qwen3_moe",
        "phi3",
        "gemma2",
        "gpt_oss",
        "olmo2",
        "gpt_neox",
    )
    for family in (*older, "ministral", "ministral3", "gemma3_text", "cohere2", "exaone4", "olmo3"):
        for keys in given:
            if family in ("mistral", "mixtral", "phi3", "qwen3_moe", "ministral3") and "layer_types" in keys:
                continue  # these classes have no such key
            theirs = transformers.AutoConfig.for_model(family, num_hidden_layers=6, **keys).to_dict()
            tokens = theirs.get("sliding_window")
            if family in ("llama", "olmo2", "gpt_neox"):
                tokens = None  # not looked at by these models
            types = theirs.get("layer_types") or ["sliding_attention"] * 6
            layers = tuple(at for at in range(6) if types[at] == "sliding_attention") if tokens else ()
            expected = (tokens, layers) if layers else (None, ())
            published = {key: value for key, value in theirs.items() if key in keys or key == "sliding_window"}
            assert windowed(family, **published) == expected, (family, keys)
            assert windowed(family, **theirs) == expected, (family, keys)
            checked += 1
    assert checked == 17 * 4 - 5


def test_windows_under_the_keys_of_transformers_4() -> None:
    """Before there were layer_types: a number, of which each such layer has no window."""
    transformers = pytest.importorskip("transformers")
    for family, keys in itertools.product(("gemma3_text", "cohere2", "exaone4"), ({}, {"sliding_window_pattern": 3})):
        theirs = transformers.AutoConfig.for_model(family, num_hidden_layers=13, sliding_window=100, **keys)
        layers = tuple(at for at, kind in enumerate(theirs.layer_types) if kind == "sliding_attention")
        assert windowed(family, 13, sliding_window=100, **keys) == (100, layers), (family, keys)


def test_rules_name_layers() -> None:
    lists = {"flags": [1, 0, 1, 0, 0, 1], "pairs": [[["global", "local"], 2], [["local"], 2]]}
    config = Config({"last": 4, "each": 3, "layer_types": ["sliding_attention", "full_attention"] * 3} | lists)
    named = {
        "all": (0, 1, 2, 3, 4, 5),
        "even": (0, 2, 4),
        "from last": (4, 5),
        "but each": (0, 1, 3, 4),
        "but other | but 4": (0, 1, 2, 4, 5),
        "other | flags": (0, 2, 5),
        "layer_types | all": (0, 2, 4),
        "windowed | all": (0, 1, 2, 3, 4, 5),
        "layer_types full_attention": (1, 3, 5),
        "pairs local": (1, 3, 4, 5),
        "other": (),
    }
    for rule, layers in named.items():
        assert layers_named(rule, 6, config, lambda: None) == layers, rule
    assert layers_named("windowed", 6, config, lambda: (1, 2)) == (1, 2)
    for odd in ("", "1", "even!"):
        with pytest.raises(ReshardError, match="does not name layers"):
            layers_named(odd, 6, config, lambda: None)


def test_a_null_window_is_none_and_a_short_layer_types_is_refused() -> None:
    """`sliding_window: null` is Mistral's way to say that there is none."""
    assert windowed("mistral", sliding_window=None) == (None, ())
    assert windowed("mistral", sliding_window=4096) == (4096, tuple(range(6)))
    with pytest.raises(ReshardError, match="layer_types names 2 layers, the model has 6"):
        windowed("gemma2", layer_types=["full_attention"] * 2)


def test_every_family_says_what_it_caches() -> None:
    """Each names logical tensors of its own; only what does not run may leave its cache uncounted,
    and `plan` says so.
    """
    for name in families.shipped():
        table = families.load(name)
        if "cache" not in table.model:
            assert not table.runs, name
            continue
        leaves = {leaf for row in table.rows for leaf in row.leaves}
        kept = set(table.model["cache"])  # nothing for each token, where no layer attends
        assert kept <= leaves and bool(kept) == any(leaf.startswith("attn.") for leaf in leaves), name


# --- fitting ----------------------------------------------------------------------------------------------------------


def test_a_tenth_of_the_device_stays_free() -> None:
    """The worst rank decides, to the byte: weights and cache may take 90 % and no more."""
    layout, config = laid(small(), tp=2, pp=4), Config(SMALL)
    cache = capacity.cache(layout, config, 50, 3)
    assert cache is not None
    need = [weights + kept for weights, kept in zip(capacity.weight_bytes(layout), cache.ranks, strict=True)]
    assert len(set(need)) > 1
    enough = -(-max(need) * 10 // 9)
    assert capacity.fits(layout, config, enough, 50, 3)
    assert not capacity.fits(layout, config, enough - 2, 50, 3)
    assert not capacity.fits(layout, config, enough, 51, 3)


def test_smallest_is_the_first_mesh_that_fits() -> None:
    """Against trying all: tensor parallel alone up to 64 first, then the fewest ranks,
    then more tensor parallel ones.
    """
    config = Config(SMALL)
    layouts: dict[Mesh, Layout] = {}
    for tp in range(1, 65):
        for pp in range(1, 7):
            try:
                layouts[Mesh(tp=tp, pp=pp)] = laid(small(), tp=tp, pp=pp)
            except ReshardError:
                break
    order = sorted(layouts, key=lambda mesh: (mesh.pp > 1, mesh.world, -mesh.tp))
    most = max(capacity.needed(layouts[Mesh()], config, 300, 2))
    answers = set()
    for step in range(40):
        device = int(most * 1.2 / 1.13**step)
        expected = next((mesh for mesh in order if capacity.fits(layouts[mesh], config, device, 300, 2)), None)
        assert capacity.smallest(small(), config, NATIVE, device, 300, 2) == expected, device
        answers.add(expected)
    assert None in answers and Mesh() in answers
    assert any(mesh and mesh.pp > 1 for mesh in answers)


def test_smallest_keeps_the_stages_and_the_experts_that_are_asked_for() -> None:
    """`--pp 4` and `--ep 8` stand; a TP that fits is a multiple of EP; where nothing fits the answer is None."""
    model, config = deepseek(False), Config(shapes.DEEPSEEK_V3)
    assert capacity.smallest(model, config, NATIVE, 80 * GIB, 8192, 4) == Mesh(tp=32)
    assert capacity.smallest(model, config, NATIVE, 80 * GIB, 8192, 4, pp=4) == Mesh(tp=8, pp=4)
    assert capacity.smallest(model, config, NATIVE, 2000 * GIB, 8192, 4, ep=8) == Mesh(tp=8, ep=8)
    assert capacity.smallest(model, config, NATIVE, 1 << 20, 8192, 4) is None


# --- sizes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gemma", "deepseek", "deepseek_fp8", "small"])
def test_sizes_that_work_are_those_that_lay_out(name: str) -> None:
    """Looking at one rank of a stage says the same as laying out all of them."""
    model = (
        {"llama": llama, "gemma": gemma, "small": small}[name]()
        if "deepseek" not in name
        else deepseek(name == "deepseek_fp8")
    )
    for ep in (1, 4):
        works = capacity.sizes_that_work(NATIVE, model, Mesh(tp=ep, ep=ep))
        for tp in range(ep, 21, ep):
            try:
                laid(model, tp=tp, ep=ep)
            except ReshardError:
                assert tp not in works
            else:
                assert tp in works


def test_sizes_that_work_for_the_three_models() -> None:
    """FP8 stops at 16: of the 2048 of an expert's feed-forward, a block of 128 is left for each rank."""
    assert capacity.sizes_that_work(NATIVE, llama(), Mesh(tp=3)) == (1, 2, 4, 8, 16, 32, 64)
    assert capacity.sizes_that_work(NATIVE, gemma(), Mesh(tp=3)) == (1, 2, 4, 8, 16, 32)
    assert capacity.sizes_that_work(NATIVE, deepseek(False), Mesh(tp=3)) == (1, 2, 4, 8, 16, 32, 64, 128)
    assert capacity.sizes_that_work(NATIVE, deepseek(True), Mesh(tp=3)) == (1, 2, 4, 8, 16)
    assert capacity.sizes_that_work(NATIVE, deepseek(False), Mesh(tp=6, ep=3)) == ()
    assert capacity.sizes_that_work(NATIVE, llama(), Mesh(tp=8, pp=81)) == ()


def test_the_split_that_works_is_in_whole_kv_groups() -> None:
    """8 KV heads on 3 ranks are 3:3:2; more ranks than groups, or a format that wants equal ranks, have none."""
    assert capacity.split_that_works(NATIVE, llama(), Mesh(tp=3)) == (3, 3, 2)
    assert capacity.split_that_works(NATIVE, llama(), Mesh(tp=6)) == (2, 2, 1, 1, 1, 1)
    # pairs of heads: 2 × 192 is whole blocks
    assert capacity.split_that_works(NATIVE, deepseek(True), Mesh(tp=3)) == (22, 21, 21)
    assert capacity.split_that_works(NATIVE, llama(), Mesh(tp=12)) is None
    assert capacity.split_that_works(formats.load("vllm"), llama(), Mesh(tp=3)) is None


def refused(model: Model, format: str = "native", **mesh: Any) -> str:
    table = formats.load(format)
    with pytest.raises(ReshardError) as caught:
        lay_out(table, model, Mesh(**mesh))
    told = capacity.explain_refusal(caught.value, table, model, Mesh(**mesh))
    assert told.message == caught.value.message
    return told.hint or ""


def test_a_refusal_names_the_sizes_that_would_work() -> None:
    """And the split where there is one; pipeline and expert parallel sizes where these are what is wrong."""
    assert refused(llama(), tp=3) == "TP sizes that work: 1, 2, 4, 8, 16, 32, 64; or --tp 3 --split 3:3:2"
    assert refused(llama(), tp=12) == "TP sizes that work: 1, 2, 4, 8, 16, 32, 64; or --tp 4 --pp 3"
    assert refused(llama(), tp=8, pp=81) == "PP sizes that work: 1-80"
    assert refused(llama(), "vllm", tp=8, pp=3) == "PP sizes that work: 1, 2, 4, 5, 8, 10, 16, 20, 40, 80"
    assert refused(deepseek(True), tp=32, ep=1) == "TP sizes that work: 1, 2, 4, 8, 16; or --tp 16 --pp 2"
    never = "EP 32 never works for this model; TP sizes that work without: 1, 2, 4, 8, 16"
    assert refused(deepseek(True), tp=32, ep=32) == f"{never}; or --tp 16 --pp 2 --ep 16"
    hint = refused(deepseek(False), tp=48, ep=16)
    assert hint.startswith(
        "TP sizes that work with EP 16: 16, 32, 64, 128; or --tp 16 --pp 3 --ep 16; or --tp 48 --split 3:3:"
    )
    assert refused(llama(), tp=8, weights=(1,) * 7 + (90,)) == "without --split this mesh works"
    assert refused(llama(), tp=2, pp=2, layers=(40, 41)) == ""


def test_a_mesh_that_a_refusal_names_works() -> None:
    """Every mesh that is named lays out on all of its ranks, and has as many ranks as were asked for."""
    vllm, named = formats.load("vllm"), 0
    asked = [
        (deepseek(True), Mesh(32), NATIVE),
        (deepseek(True), Mesh(64, ep=32), NATIVE),
        (llama(), Mesh(12, 2), vllm),
    ]
    asked += [
        (small(), Mesh(tp, pp), table) for tp in (5, 6, 12, 20, 64) for pp in (1, 2, 3) for table in (NATIVE, vllm)
    ]
    for model, mesh, table in asked:
        try:
            lay_out(table, model, mesh)
        except ReshardError as error:
            hint = capacity.explain_refusal(error, table, model, mesh).hint or ""
            for words in re.findall(r"--tp \d+(?: --pp \d+)?(?: --ep \d+)?(?! --split)(?:$|;)", hint):
                other = Mesh(**{name: int(n) for name, n in re.findall(r"--(\w+) (\d+)", words)})
                assert other.world == mesh.world, hint
                lay_out(table, model, other)
                named += 1
    assert named > 6, named


def test_numbers_are_listed_with_long_runs_folded() -> None:
    """Two or three in a row stand as they are."""
    assert capacity.listed([1, 2, 3, 5, 8, 9, 10, 11]) == "1, 2, 3, 5, 8-11"
    assert capacity.listed([]) == ""
