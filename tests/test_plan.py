"""The report of `plan`: exact as data, readable as text; nothing of it needs a copy to be enumerated."""

import json
import math
from typing import Any

import pytest
import shapes
from test_capacity import GIB, NATIVE, SMALL, deepseek, gemma, laid, llama, model_of, small

from reshard.jobs import plan
from reshard.layout import capacity
from reshard.layout.cut import Layout, lay_out
from reshard.layout.join import Component, Join
from reshard.layout.mesh import Mesh
from reshard.model.understand import Config, Model
from reshard.tables import formats

WIDTHS = {"BF16": 2, "F32": 4, "F8_E4M3": 1}


def facts(headers: shapes.Headers, name: str = "org/model", **more: Any) -> plan.SourceFacts:
    dtypes = [stored.dtype for stored in headers.values()]
    nbytes = sum(math.prod(stored.shape) * WIDTHS[stored.dtype] for stored in headers.values())
    return plan.SourceFacts(
        name, 2, nbytes + 1000, len(headers), {dtype: dtypes.count(dtype) for dtype in sorted(set(dtypes))}, **more
    )


def published(model: Model) -> Layout:
    return lay_out(model.family.published, model, Mesh(), model.active)


def reported(
    model: Model, config: dict[str, Any], headers: shapes.Headers, format: str = "native", **mesh: Any
) -> plan.Report:
    table = formats.load(format)
    options = {key: mesh.pop(key) for key in ("device_memory", "context", "batch", "out", "disk") if key in mesh}
    layout = lay_out(table, model, Mesh(**mesh))
    return plan.build(published(model), layout, config=Config(config), source=facts(headers), workers=2, **options)


def of_llama(format: str = "native", **mesh: Any) -> plan.Report:
    return reported(llama(), shapes.LLAMA_70B, shapes.llama(shapes.LLAMA_70B), format, **mesh)


def of_deepseek(fp8: bool, **mesh: Any) -> plan.Report:
    config = shapes.DEEPSEEK_V3 | (shapes.FP8 if fp8 else {})
    return reported(deepseek(fp8), config, shapes.deepseek_v3(config), **mesh)


def of_small(format: str = "native", **mesh: Any) -> plan.Report:
    return reported(small(), SMALL, shapes.llama(SMALL), format, **mesh)


GOLDEN = """\
org/model
  published; family llama, 80 layers
  2 files, 141.11 GB, 723 tensors: BF16
  becomes native, TP 16: 16 ranks

  rank  tensors    weights
  0-15      483    8.99 GB        8,989,458,432 bytes
  balance 1.000 (largest over mean)
  stored 143.83 GB: 141.11 GB of the model, 2.72 GB replicated, 0 B padding
  replicated: attn.k 1.34 GB, attn.v 1.34 GB, attn_norm 19.66 MB, mlp_norm
    19.66 MB, norm 245.76 kB
  repeated: each of the 8 kv is stored on 2 ranks
  disk needed about 143.84 GB
  memory while converting at most 65.1 MiB (2 workers)

Per rank (column: outputs are split, row: inputs are split, whole: not split):

  outside the layers, 262.68 MB
    embed  8016 × 8192  BF16  column by vocab
    norm          8192  BF16  whole
    head   8016 × 8192  BF16  column by vocab

  layers 0-79, 109.08 MB each: layers.{layer}.…
    attn_norm           8192  BF16  whole
    mlp_norm            8192  BF16  whole
    attn.qkv      768 × 8192  BF16  column by heads, kv; kv on 2 ranks each; of
                                    q, k, v
    attn.o        8192 × 512  BF16  row by heads
    mlp.gate_up  3584 × 8192  BF16  column by inter; of gate, up
    mlp.down     8192 × 1792  BF16  row by inter

At run time on 24.00 GiB per device, 21.60 GiB of it usable (10 % reserved),
  context 8192, batch 4:
  rank      weights     KV cache        total
  0-15     8.37 GiB     1.25 GiB     9.62 GiB  fits
  KV cache in BF16, 80 layers
  fits, with 11.98 GiB to spare beyond the reserve
  smallest mesh that fits: TP 8 (8 ranks)

TP sizes this model allows: 1, 2, 4, 8, 16, 32, 64

reshard convert org/model OUT --tp 16"""


def test_the_text_for_people_is_this() -> None:
    """Llama-3.1-70B on 16 ranks, at 80 columns."""
    assert of_llama(tp=16, device_memory=24 * GIB, context=8192, batch=4).text(80) == GOLDEN


# --- the numbers ------------------------------------------------------------------------------------------------------


def test_llama_s_totals_are_those_of_a_hand() -> None:
    """What 16 ranks hold beyond the model: 15 more of each norm, one more of k and of v; nothing is padded."""
    told = of_llama(tp=16)
    layer = 2 * 8192 + (64 + 8 + 8) * 128 * 8192 + 8192 * 64 * 128 + 3 * 28672 * 8192
    assert told.logical == 2 * (80 * layer + 2 * 128256 * 8192 + 8192) == 141_107_412_992
    norms, heads = 2 * 80 * 8192, 2 * 80 * 1024 * 8192
    assert told.repeated_bytes == {
        "attn_norm": norms * 15,
        "mlp_norm": norms * 15,
        "norm": 2 * 8192 * 15,
        "attn.k": heads,
        "attn.v": heads,
    }
    assert told.repeats == {"kv": (8, 2)}
    assert told.padding == told.constants == 0
    assert told.stored == told.logical + told.replicated == 16 * 8_989_458_432
    assert told.memory == (48 + 2 * 8) * 2**20 + 1536 * 723


def test_padding_is_counted_to_the_byte() -> None:
    """1001 words on 8 ranks are 1008 rows, in embed and in head; in vLLM's format, in multiples of 64, 1024."""
    assert of_small(tp=8).padding == 2 * 7 * 96 * 2
    told = of_small("vllm", tp=8)
    assert told.padding == 2 * 23 * 96 * 2
    assert told.constants == 8 * 6 * 4 * 4  # ranks, layers, four scales, bytes


def test_a_tied_embedding_is_repeated_only_by_stages() -> None:
    """On one stage it is stored once; on two, the last has it again as head, and this is counted as replicated."""
    headers = shapes.llama(shapes.GEMMA2_27B)
    one, two = (reported(gemma(), shapes.GEMMA2_27B, headers, tp=8, pp=pp) for pp in (1, 2))
    assert "embed" not in one.repeated_bytes
    assert two.repeated_bytes["embed"] == 256000 * 4608 * 2
    assert one.logical == two.logical == sum(math.prod(stored.shape) * 2 for stored in headers.values())


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("mesh", [{"tp": 16}, {"tp": 16, "ep": 16}, {"tp": 8, "ep": 2, "pp": 3}])
def test_stored_is_logical_and_replicated_and_padding(fp8: bool, mesh: dict[str, int]) -> None:
    """For DeepSeek-V3, whose layers differ in kind and dtype; the logical bytes are those of the headers."""
    told = of_deepseek(fp8, **mesh)
    assert told.logical == told.source.nbytes - 1000
    assert told.stored == told.logical + told.replicated == sum(group.nbytes * group.count for group in told.ranks)
    assert told.padding == 0


def test_layers_are_grouped_by_kind() -> None:
    """Dense, mixture of experts and multi-token prediction, each with its own rows and bytes."""
    told = of_deepseek(True, tp=16, ep=16)
    assert [(kind.layers, kind.count, kind.kinds) for kind in told.kinds] == [
        ("", 0, ()),
        ("0-2", 3, ("dense",)),
        ("3-60", 58, ("moe",)),
        ("61", 1, ("moe", "mtp")),
    ]
    per_rank = told.kinds[0].nbytes + sum(kind.count * kind.nbytes for kind in told.kinds)
    assert [group.nbytes for group in told.ranks] == [per_rank]
    rows = {row.name.removeprefix("layers.{layer}."): row for row in told.kinds[2].rows}
    assert (rows["moe.gate_up"].shape, rows["moe.gate_up"].dtype, rows["moe.gate_up"].cut) == (
        (16, 4096, 7168),
        "F8_E4M3",
        ("by experts",),
    )
    assert (rows["attn.o_scale"].shape, rows["attn.o_scale"].dtype, rows["attn.o_scale"].cut) == (
        (56, 8),
        "F32",
        ("row by heads",),
    )
    assert rows["shared.gate_up"].cut == ("column by shared_inter",)
    assert rows["moe.router"].cut == rows["attn.qkv_a"].cut == ()
    assert "layer 61 (moe, mtp), 1.17 GB: as layers 3-60, and layers.{layer}.…" in told.text()
    # also not shared.down_scale, one column of 16
    assert not any(row.gathered for kind in told.kinds for row in kind.rows)
    assert rows["attn.kv_b"].logical == ("attn.k_b", "attn.v_b")


def test_unequal_ranks_are_listed_and_equal_ones_folded() -> None:
    """`--split 3:3:2` on two stages: four kinds of rank; a dimension is given with its least and its most."""
    told = of_llama(tp=3, pp=2, weights=(3, 3, 2))
    assert [group.ranks for group in told.ranks] == ["0-1", "2", "3-4", "5"]
    assert told.balance == max(group.nbytes for group in told.ranks) * 6 / told.stored
    down = next(row for row in told.kinds[1].rows if row.name.endswith("mlp.down"))
    assert (down.least, down.shape) == ((8192, 7168), (8192, 10752))
    assert "8192 × 7168-10752" in told.text()
    assert {row.name: row.stage for row in told.kinds[0].rows} == {"embed": "first", "norm": "last", "head": "last"}


def test_transposed_and_interleaved_tensors_are_stated() -> None:
    """GPT-2's Conv1D and gpt-oss' gate/up are gathered tile by tile; their norms and embeddings are not."""
    gpt2 = {"model_type": "gpt2", "n_layer": 2, "n_head": 4, "n_embd": 40, "n_positions": 24, "vocab_size": 99}
    hidden, inter = 40, 160
    per_layer = {
        "ln_1.weight": (hidden,), "ln_1.bias": (hidden,), "ln_2.weight": (hidden,), "ln_2.bias": (hidden,),
        "attn.c_attn.weight": (hidden, 3 * hidden), "attn.c_attn.bias": (3 * hidden,),
        "attn.c_proj.weight": (hidden, hidden), "attn.c_proj.bias": (hidden,),
        "mlp.c_fc.weight": (hidden, inter), "mlp.c_fc.bias": (inter,), "mlp.c_proj.weight": (inter, hidden),
        "mlp.c_proj.bias": (hidden,),
    }  # fmt: skip
    sizes: dict[str, tuple[int, ...]] = {"wte.weight": (99, hidden), "wpe.weight": (24, hidden)}
    sizes |= {"ln_f.weight": (hidden,), "ln_f.bias": (hidden,)}
    sizes |= {f"h.{layer}.{name}": shape for layer in range(2) for name, shape in per_layer.items()}
    headers = {name: shapes.Stored("F32", shape) for name, shape in sizes.items()}
    told = reported(model_of(gpt2, headers), gpt2, headers, tp=2)
    gathered = {row.name.rpartition("}.")[2] for kind in told.kinds for row in kind.rows if row.gathered}
    assert gathered == {"attn.qkv", "attn.o", "mlp.up", "mlp.down"}
    assert " ".join(told.text().split()).count("transposed or interleaved") == 4
    assert not any(row.gathered for kind in of_llama(tp=8).kinds for row in kind.rows)


def test_experts_that_are_cut_inside_too_say_both() -> None:
    """EP 4 on TP 16: experts among four groups, each of these cut in four."""
    rows = {row.name: row for row in of_deepseek(False, tp=16, ep=4).kinds[2].rows}
    assert rows["layers.{layer}.moe.gate_up"].cut == ("by experts", "column by moe_inter")
    assert rows["layers.{layer}.moe.down"].cut == ("by experts", "row by moe_inter")


# --- the device -------------------------------------------------------------------------------------------------------


def test_a_device_that_is_too_small_is_told_by_how_much_and_what_would_do() -> None:
    """Bytes are exact in the data, and the reserve is a tenth."""
    told = of_llama(tp=4, device_memory=24 * GIB, context=8192, batch=4)
    assert told.device is not None and told.cache is not None
    assert told.device.reserve + told.device.usable == 24 * GIB
    assert told.device.worst == told.ranks[0].nbytes + 80 * 2 * 2 * 128 * 8192 * 4 * 2
    assert not told.device.fits and told.device.smallest == Mesh(tp=8)
    assert "does not fit: 13.76 GiB over" in told.text()
    assert "smallest mesh that fits: TP 8 (8 ranks)" in told.text()


def test_without_a_context_no_cache_is_counted_and_the_text_says_so() -> None:
    """Weights alone are held against the device."""
    told = of_llama(tp=8, device_memory=24 * GIB)
    assert told.cache is None and told.device is not None and told.device.worst == told.ranks[0].nbytes
    assert "KV cache not counted: give --context" in told.text()
    assert "At run time" not in of_llama(tp=8).text()


# --- form -------------------------------------------------------------------------------------------------------------


def variants() -> list[plan.Report]:
    return [
        of_llama(tp=8, device_memory=GIB, context=131072, batch=64),
        of_llama(tp=3, pp=3, weights=(3, 3, 2), layers=(20, 30, 30), context=10),
        of_llama("vllm", tp=16),
        of_small(tp=1, device_memory=GIB, context=5),
        of_small(tp=32, pp=6),
        of_deepseek(True, tp=16, ep=4, pp=3, device_memory=80 * GIB, context=8192),
    ]


def test_no_line_is_wider_than_asked_and_the_last_is_the_next_command() -> None:
    """Also where names are long and ranks are many; numbers stay with their units."""
    for told in variants():
        for width in (80, 100, 140):
            lines = told.text(width).splitlines()
            assert max(map(len, lines)) <= width
            assert lines[-1].startswith("reshard convert org/model OUT")
            assert not any(line.lstrip().startswith(("GB", "MB", "kB", "GiB", "MiB")) for line in lines)


def test_files_are_decimal_memory_is_binary_and_no_row_mixes_them() -> None:
    """GB beside GiB would be misread."""
    for told in variants():
        for line in told.text().splitlines():
            assert not (
                any(unit in line for unit in (" GB", " MB", " kB")) and any(unit in line for unit in ("GiB", "MiB"))
            ), line


def test_the_report_is_json() -> None:
    """Everything in the text is there, unrounded, and survives a round trip."""
    for told in variants():
        data = told.to_json()
        assert json.loads(json.dumps(data)) == data
        assert data["bytes"]["stored"] == sum(group["nbytes"] * group["count"] for group in data["ranks"])
        assert data["bytes"]["replicated"] == sum(data["replicated"].values())
    assert of_llama(tp=16).to_json()["repeats"] == {"kv": {"size": 8, "ranks": 2}}


def test_the_next_command_says_the_whole_mesh() -> None:
    """And quotes what a shell would take apart."""
    told = of_llama(tp=3, pp=3, weights=(3, 3, 2), layers=(20, 30, 30), out="my shards")
    assert told.command[:4] == ("reshard", "convert", "org/model", "my shards")
    assert (
        told.text(100).splitlines()[-1]
        == "reshard convert org/model 'my shards' --tp 3 --pp 3 --split 3:3:2 --pp-layers 20,30,30"
    )
    assert told.text(80).splitlines()[-2:] == [
        "reshard convert org/model 'my shards' --tp 3 --pp 3 --split 3:3:2 \\",
        "    --pp-layers 20,30,30",
    ]
    assert of_llama("vllm", tp=4).command[-4:] == ("--tp", "4", "--to", "vllm")


def test_a_merge_is_reported_as_the_published_files() -> None:
    """From shards back: one rank, nothing replicated, no TP sizes, `--to hf`."""
    model = small()
    source = plan.SourceFacts("shards", 8, 10**6, 100, {"BF16": 100})
    told = plan.build(laid(model, tp=4), published(model), config=Config(SMALL), source=source, workers=1)
    assert (told.format, told.came_from, told.sizes, told.replicated, told.padding) == ("hf", "native, TP 4", (), 0, 0)
    assert told.command == ("reshard", "convert", "shards", "OUT", "--to", "hf")
    assert max(map(len, told.text().splitlines())) <= 80


def test_disk_is_what_the_caller_knows_or_more_than_the_tensors() -> None:
    """The estimate holds the weights, the residue of the published files, carried files and books, and says that it is
    one.
    """
    exact, guessed = of_llama(tp=8, disk=12345), of_llama(tp=8)
    assert (exact.disk, exact.disk_exact) == (12345, True) and "disk needed 12.35 kB" in exact.text()
    assert guessed.stored + 1000 < guessed.disk < guessed.stored * 1.001 and "disk needed about" in guessed.text()


def test_no_copy_is_enumerated(monkeypatch: pytest.MonkeyPatch) -> None:
    """A plan of DeepSeek-V3 has 728,272 copies; the report needs none of them."""

    def refuse(*_: Any) -> None:
        raise AssertionError("a copy was enumerated")

    monkeypatch.setattr(Join, "copies", refuse)
    monkeypatch.setattr(Component, "points", refuse)
    assert of_deepseek(False, tp=16).stored


def test_bytes_of_a_layout_are_counted_like_its_tensors() -> None:
    """The arithmetic over rows says what walking over every single stored tensor says."""
    for layout in (laid(deepseek(True), tp=8, ep=4, pp=2), published(gemma()), lay_out(NATIVE, small(), Mesh(tp=32))):
        for rank, slots in enumerate(layout.by_rank):
            walked = sum(slot.elements * WIDTHS[layout.dtype(slot, point)] for slot in slots for point in slot.points())
            assert capacity.weight_bytes(layout)[rank] == walked
