"""Explaining: every place that is named holds the element, bit by bit; there and back comes home; what is wrong is said
in words.
"""

from __future__ import annotations

import json
import math
import os
import random
import struct
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import fixtures
import numpy as np
import pytest
import torch
from fixtures import FIXTURES
from hypothesis import given
from hypothesis import strategies as st
from strategies import Joint, fitting, hold, joints, law, numbered
from test_checkpoint import mine
from test_engine_shards import edit, saved
from test_engine_shards import holding as file_of

from reshard import api
from reshard.checkpoints.source import Source, open_source
from reshard.containers.dtypes import BITS
from reshard.containers.values import decode, floating
from reshard.errors import ReshardError
from reshard.jobs.explain import Explanation, Holding, _parse, bits_of, explain, inside
from reshard.jobs.json_result import as_json
from reshard.layout.cut import lay_out
from reshard.layout.mesh import Mesh
from reshard.tables import formats

# One mesh of each kind: plain, KV repeated, stages, experts, uneven.
MESHES: dict[str, dict[str, Any]] = {
    "tp2": {"tp": 2},
    "tp8": {"tp": 8},
    "pp2": {"tp": 1, "pp": 2},
    "ep2": {"tp": 2, "ep": 2},
    "uneven": {"tp": 3, "split": (2, 1, 1)},
}


EVERY, SOME = {"llama", "gpt_neox", "gpt_oss", "deepseek_v3"}, {"tp8", "ep2"}


def cases() -> Iterator[tuple[str, str]]:
    """Every mesh for some, and with RESHARD_ALL_MESHES=1."""
    for name, fixture in FIXTURES.items():
        for mesh, sizes in MESHES.items():
            if name not in EVERY and mesh not in SOME and not os.environ.get("RESHARD_ALL_MESHES"):
                continue
            fits = sizes["tp"] in fixture.tp if mesh != "uneven" else fixture.weights
            if fits and (mesh != "ep2" or 2 in fixture.ep):
                yield name, mesh


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Shards of a fixture on a mesh, converted once."""
    root = tmp_path_factory.mktemp("explain")

    @cache
    def made(name: str, mesh: str = "tp8", to: str = "native") -> Path:
        out = root / f"{name}-{mesh}-{to}"
        api.convert(fixtures.checkpoint(name), out, **MESHES[mesh], to=to)
        return out

    return made


@cache
def published(name: str) -> Source:
    return open_source(fixtures.checkpoint(name))


def size_of(dtype: str) -> int:
    return BITS[dtype] // 8


def read(root: Path, holding: Holding, dtype: str) -> bytes:
    with (root / holding.file).open("rb") as file:
        file.seek(holding.byte)
        return file.read(size_of(dtype))


def random_element(random_: random.Random, shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(random_.randrange(size) for size in shape)


def asked(name: str, indices: tuple[int, ...], rank: int | None = None) -> str:
    return ("" if rank is None else f"{rank}:") + name + (f"[{','.join(map(str, indices))}]" if indices else "")


@pytest.mark.parametrize(("name", "mesh"), list(cases()))
def test_every_place_named_holds_the_bytes_of_the_element_and_there_and_back_comes_home(
    name: str, mesh: str, shards: Callable[..., Path]
) -> None:
    """For random elements of every rank: the original's bytes at the place named, every replica's, and the way back
    finds them all.
    """
    out, original = open_source(shards(name, mesh)), fixtures.checkpoint(name)
    random_ = random.Random(f"{name} {mesh}")
    state = fixtures.read(original)
    by_rank: dict[int, list[str]] = {}
    for rank, key in out.places:
        by_rank.setdefault(rank, []).append(key)
    assert len(by_rank) == out.layout.mesh.world
    for rank, keys in by_rank.items():
        for key in random_.sample(keys, min(len(keys), 12)):
            entry = out.places[rank, key][1]
            index = random_element(random_, entry.shape)
            found = explain(out, asked(key, index, rank))
            assert found.kind == "element" and found.here is not None and found.here.first == index
            data = read(shards(name, mesh), found.here, entry.dtype)
            assert found.here.raw == data.hex(" ")
            if found.padding:
                assert not found.parts and not any(data)
                continue
            (part,) = found.parts
            assert part.elements == 1 and part.origins
            assert (rank, key, index) in {(other.rank, other.tensor, other.first) for other in part.held}
            for other in part.held:
                assert read(shards(name, mesh), other, entry.dtype) == data, other
            for source in part.origins:
                entry_there = published(name).tensors[source.tensor][1]
                assert bits_of(entry_there, source.first) == source.bits
                assert read(original, source, entry.dtype) == data, source
                value = state[source.tensor][source.first]
                assert decode(entry.dtype, data)[0] == value.double().item() == found.here.value  # type: ignore[index]
                back = explain(out, source.text)
                assert {(other.rank, other.text) for other in back.parts[0].held} == {
                    (other.rank, other.text) for other in part.held
                }
                assert back.parts[0].box == part.box
                assert explain(published(name), source.text).here.raw == data.hex(" ")  # type: ignore[union-attr]


@pytest.mark.parametrize(("name", "mesh"), list(cases()))
def test_a_whole_tensor_of_the_original_is_held_in_boxes_that_make_it_up(
    name: str, mesh: str, shards: Callable[..., Path]
) -> None:
    """By name alone: every element that explaining an element finds lies in one of the boxes; and all boxes together
    are the tensor.
    """
    out = open_source(shards(name, mesh))
    random_ = random.Random(f"{name} {mesh}")
    keys = [key for key in out.tensors if key not in out.layout.model.aside]
    for key in random_.sample(keys, min(len(keys), 20)):
        shape = out.tensors[key][1].shape
        whole = explain(out, key)
        assert sum(part.elements for part in whole.parts) == math.prod(shape) == whole.elements
        for part in whole.parts:
            distinct = {tuple(holding.box.items()): holding.elements for holding in part.held}
            assert sum(distinct.values()) == part.elements
        index = random_element(random_, shape)
        (one,) = explain(out, asked(key, index)).parts
        (around,) = (part for part in whole.parts if part.tensor == one.tensor and within(one.box, part.box))
        assert {(holding.rank, holding.tensor) for holding in one.held} == {
            (holding.rank, holding.tensor) for holding in around.held if within(one.box, holding.box)
        } or any(holding.tensors > 1 for holding in around.held)


def within(box: dict[str, tuple[int, int]], other: dict[str, tuple[int, int]]) -> bool:
    return all(other[axis][0] <= low and high <= other[axis][1] for axis, (low, high) in box.items())


@pytest.mark.parametrize(
    ("name", "mesh"), [("llama", "tp8"), ("gpt_neox", "tp2"), ("gpt_oss", "ep2"), ("phi3", "uneven")]
)
def test_rows_and_whole_tensors_of_a_rank_are_what_their_elements_are(
    name: str, mesh: str, shards: Callable[..., Path]
) -> None:
    """Fewer indices: the parts of a box have as many elements as single ones say, padding too, and no others."""
    out = open_source(shards(name, mesh))
    random_ = random.Random(name)
    for rank, key in random_.sample(sorted(out.places), 12):
        shape = out.places[rank, key][1].shape
        if not shape:
            continue
        leading = random_element(random_, shape)[:-1]
        row = explain(out, asked(key, leading, rank))
        single = [explain(out, asked(key, (*leading, at), rank)) for at in range(shape[-1])]
        assert row.padding == sum(found.padding for found in single)
        for part in row.parts:
            assert part.elements == sum(
                within(one.parts[0].box, part.box) for one in single if one.parts and one.parts[0].tensor == part.tensor
            )
        assert sum(part.elements for part in row.parts) + row.padding == row.elements == shape[-1]
        assert row.here is not None and row.here.first == (*leading, 0) and row.here.last == (*leading, shape[-1] - 1)


@given(joint=joints(), data=st.data())
@law(60)
def test_each_element_of_any_layout_is_told_by_arithmetic(joint: Joint, data: st.DataObject) -> None:
    """With numbers in place of elements, for random tables on random meshes: fused, nested, transposed, stacked,
    padded, repeated.

    Each stored number is found in the one logical tensor that has it, at its indices; and rows hold as many as are in
    them.
    """
    model = joint.model()
    values = numbered(model)
    layouts = [lay_out(model.family.published, model, Mesh(), model.active)]
    layouts += [data.draw(st.sampled_from(fitting(formats.parse(text, "format"), model))) for text in joint.formats]
    for layout in layouts:
        stored = hold(layout, values)
        for slot in layout.slots:
            pieces = [
                piece for leaf in slot.template.leaves for piece in layout.pieces.get(leaf, ()) if piece.slot is slot
            ]  # type: ignore[union-attr]
            for point in slot.points():
                array = stored[slot.rank, slot.name(point)]
                for at in np.linspace(0, array.size - 1, min(array.size, 50), dtype=int) if array.size else ():
                    told = [(piece, box) for piece in pieces if (box := inside(piece, int(at))) is not None]
                    indices = [(piece, box | whole(point)) for piece, box in told]
                    numbers = [
                        values[piece.tensor.name][tuple(box[axis][0] for axis in piece.tensor.axes)]
                        for piece, box in indices
                    ]
                    assert numbers == [number for number in [array.flat[at]] if number]
                for depth in range(array.ndim):
                    pitch = math.prod(array.shape[depth:])
                    for row, part in enumerate(array.reshape(-1, pitch)[:8] if pitch else ()):
                        boxes = [box for piece in pieces if (box := inside(piece, row * pitch, pitch)) is not None]
                        assert sum(
                            math.prod(high - low for low, high in box.values()) for box in boxes
                        ) == np.count_nonzero(part)


def whole(point: dict[str, int]) -> dict[str, tuple[int, int]]:
    return {axis: (at, at + 1) for axis, at in point.items()}


# Directories of other kinds


@pytest.mark.parametrize(
    ("name", "tp", "pp"), [("llama", 8, 1), ("llama_tied", 2, 2), ("mixtral", 2, 1), ("phi3", 4, 1)]
)
def test_a_directory_that_vllm_wrote_is_explained_bit_by_bit(name: str, tp: int, pp: int, tmp_path: Path) -> None:
    out = open_source(saved(tmp_path / "v", name, tp, pp))
    state = fixtures.read(fixtures.checkpoint(name))
    random_ = random.Random(name)
    for key in random_.sample(sorted(state), 15):
        index = random_element(random_, tuple(state[key].shape))
        found = explain(out, asked(key, index))
        (part,) = found.parts
        assert part.held and found.here is not None and found.here.file.endswith(".safetensors")
        data = fixtures.bits(state[key][index]).numpy().tobytes()
        for holding in part.held:
            assert read(tmp_path / "v", holding, found.dtype) == data
            again = explain(out, holding.text)
            assert again.parts[0].box == part.box
            assert "as transformers would write them" in again.notes[-1]


def test_constants_are_said_to_be_constants(shards: Callable[..., Path]) -> None:
    out = open_source(shards("llama", "tp2", "vllm"))
    found = explain(out, "1:model.layers.0.self_attn.attn._k_scale")
    assert (found.kind, found.constant, found.parts) == ("constant", 1.0, ())
    assert found.here is not None and found.here.raw == struct.pack("<f", 1.0).hex(" ")
    assert any("the constant 1.0" in line for line in found.lines())


def test_a_constant_that_is_another_is_said_to_be_another(tmp_path: Path) -> None:
    key = "model.layers.0.self_attn.attn._k_scale"
    out = saved(tmp_path / "v", "llama", 2)
    assert any(line.startswith("is the constant 1.0, which ") for line in explain(open_source(out), f"0:{key}").lines())
    edit(file_of(out, key), lambda state: state.update({key: torch.tensor(math.nan)}))
    found = explain(open_source(out), f"0:{key}")
    assert any(line.startswith("is the constant 1.0 (by the table; here it is nan), ") for line in found.lines())
    assert (found.to_json()["constant"], found.to_json()["here"]["value"]) == (1.0, "nan")


def test_padding_is_said_to_be_padding(shards: Callable[..., Path]) -> None:
    """Of a vocabulary of 331 on 8 ranks the last five rows of rank 7 are nobody's."""
    out = open_source(shards("llama"))
    for row in range(37, 42):
        found = explain(out, f"7:embed[{row},3]")
        assert (found.padding, found.parts) == (1, ())
        assert any("padding" in line for line in found.lines()) and any(
            "331" in line and "336" in line for line in found.lines()
        )
    assert explain(out, "7:embed[36,3]").parts[0].box["vocab"] == (330, 331)
    assert explain(out, "7:embed").padding == 5 * 56


@pytest.mark.parametrize(
    ("name", "key"),
    [("llama_inv_freq", "model.layers.1.self_attn.rotary_emb.inv_freq"), ("gpt2_bare", "h.1.attn.bias")],
)
def test_buffers_kept_aside_are_bytes_of_the_residue(name: str, key: str, shards: Callable[..., Path]) -> None:
    value = fixtures.read(fixtures.checkpoint(name))[key]
    index = random_element(random.Random(name), tuple(value.shape))
    wanted = fixtures.bits(value[index]).numpy().tobytes()
    found = explain(open_source(shards(name, "tp2")), asked(key, index))
    assert found.kind == "buffer" and found.here is not None and found.kept is not None
    assert found.kept.file.startswith("source/") and read(shards(name, "tp2"), found.kept, found.dtype) == wanted
    assert read(fixtures.checkpoint(name), found.here, found.dtype) == wanted
    assert any("residue" in line for line in found.lines())
    assert explain(published(name), asked(key, index)).here.raw == wanted.hex(" ")  # type: ignore[union-attr]


def test_a_tied_name_is_explained_by_the_tensor_that_it_is_tied_to(shards: Callable[..., Path]) -> None:
    out = open_source(shards("llama_tied", "pp2"))
    found = explain(out, "1:head[300,5]")
    assert [holding.text for holding in found.parts[0].origins] == ["model.embed_tokens.weight[300,5]"]
    assert {holding.text for holding in found.parts[0].held} == {"0:embed[300,5]", "1:head[300,5]"}
    stored = open_source(shards("qwen3_tied_stored", "tp2", "vllm"))  # published twice, stored once
    places = explain(stored, "0:lm_head.weight[3,5]").parts[0].origins
    assert {place.tensor for place in places} == {"lm_head.weight", "model.embed_tokens.weight"}
    assert explain(stored, "model.embed_tokens.weight[3,5]").parts[0].held[0].text == "0:lm_head.weight[3,5]"


def test_a_damaged_replica_is_told(shards: Callable[..., Path], tmp_path: Path) -> None:
    import shutil

    out = Path(shutil.copytree(shards("llama"), tmp_path / "out"))
    found = explain(open_source(out), "3:layers.2.attn.qkv[12,12]")
    assert found.here is not None and not found.notes
    with (out / found.here.file).open("r+b") as file:
        file.seek(found.here.byte)
        file.write(b"\x77")
    assert "the copies differ" in explain(open_source(out), "3:layers.2.attn.qkv[12,12]").notes[0]


def test_a_published_checkpoint_explains_itself() -> None:
    found = explain(published("phi3"), "model.layers.1.self_attn.qkv_proj.weight[85,3]")
    assert (found.parts[0].tensor, found.parts[0].origins) == ("attn.k", ())
    assert found.parts[0].held[0].text == found.asked
    assert explain(published("phi3"), "0:" + found.asked).parts == found.parts
    assert [part.tensor for part in explain(published("phi3"), "model.layers.1.self_attn.qkv_proj.weight").parts] == [
        "attn.q",
        "attn.k",
        "attn.v",
    ]


def test_a_logical_element_is_found_by_its_axes(shards: Callable[..., Path]) -> None:
    out = open_source(shards("llama"))
    found = explain(out, "attn.k[2,1,3,4]")
    assert found.parts == explain(out, "model.layers.2.self_attn.k_proj.weight[13,4]").parts
    assert explain(out, "attn.k").parts[0].elements == 5 * 4 * 10 * 56


@pytest.mark.parametrize(
    ("question", "place"),
    [
        ("attn.k[1,0,3,4]", "model.layers.1.self_attn.k_proj.weight[3,4]"),
        ("attn.k[1,1]", "model.layers.1.self_attn.k_proj.weight[10,0] to [19,55]"),
        ("attn.k", "model.layers.0.self_attn.k_proj.weight[0,0] to"),
        ("norm", "model.norm.weight[0] to [55]"),
    ],
)
def test_a_published_checkpoint_says_where_a_logical_element_is(question: str, place: str) -> None:
    found = explain(published("llama"), question)
    (held,) = found.parts[0].held
    assert (
        f"held by\n  {place}" in (lines := "\n".join(found.lines())) and f"    byte {held.byte} of {held.file}" in lines
    )
    assert found.to_json()["parts"][0]["held"] == [as_json(held.result)]
    here = explain(published("llama"), held.text).here
    assert here is not None and (here.file, here.bits) == (held.file, held.bits)
    assert not any("held by" in line for line in explain(published("llama"), held.text).lines())


@pytest.mark.parametrize(
    ("dtype", "words", "bits"),
    [
        ("F4", "bits 4 to 7 of byte {}", [4, 8]),
        ("F6_E2M3", "bits 6 to 7 of byte {} and bits 0 to 3 of byte {}", [6, 12]),
        ("F8_E4M3", "byte {}", None),
    ],
)
def test_every_byte_that_an_element_touches_is_told_and_which_bits(
    dtype: str, words: str, bits: list[int] | None, tmp_path: Path
) -> None:
    """The bits told make up the row, in order; and a neighbour's damage is not the element's."""
    source, option = mine(tmp_path, dtype)
    api.convert(source, tmp_path / "out", tp=8, family=option.removeprefix("--family="))
    out, row = open_source(tmp_path / "out"), "blocks.1.k.weight[5,{}]"
    found = [explain(out, row.format(at)) for at in range(24)]
    held = [one.parts[0].held[0] for one in found]
    first, there = found[0].here, found[1].here
    assert first is not None and there is not None
    joined = sum((one.code or 0) << at * BITS[dtype] for at, one in enumerate(held))
    raw = (source / there.file).read_bytes()[first.byte :]
    assert joined.to_bytes(3 * BITS[dtype], "little") == raw[: 3 * BITS[dtype]]
    assert raw[there.byte - first.byte :].startswith(bytes.fromhex(held[1].raw or ""))
    assert len(bytes.fromhex(held[1].raw or "")) == (2 if dtype == "F6_E2M3" else 1)
    for holding in (there, held[1]):
        told = words.format(holding.byte, holding.byte + 1)
        assert f" {told} of {holding.file}" in " ".join(" ".join(found[1].lines()).split())
        assert as_json(holding.result).get("bits") == bits
    assert f", byte {first.byte} of {first.file}" in " ".join(
        " ".join(explain(out, "blocks.1.k.weight[5]").lines()).split()
    )

    path, low = tmp_path / "out" / held[1].file, held[1].bits[0]
    data = bytearray(path.read_bytes())  # one of the two ranks that have this KV head
    data[low // 8] ^= 1 << low % 8
    path.write_bytes(data)
    assert [bool(explain(open_source(tmp_path / "out"), row.format(at)).notes) for at in range(3)] == [
        False,
        True,
        False,
    ]


# Words


@pytest.mark.parametrize(("name", "mesh"), [(name, mesh) for name, mesh in cases() if mesh == "tp2"])
def test_lines_fit_80_columns_and_json_is_json(name: str, mesh: str, shards: Callable[..., Path]) -> None:
    out = open_source(shards(name, mesh))
    random_ = random.Random(name)
    questions = [asked(key, (), rank) for rank, key in random_.sample(sorted(out.places), 10)]
    questions += [
        asked(key, random_element(random_, out.places[rank, key][1].shape), rank)
        for rank, key in random_.sample(sorted(out.places), 10)
    ]
    questions += random_.sample(sorted(out.tensors), 5) + sorted(out.layout.model.tensors)
    for question in questions:
        found = explain(out, question)
        lines = found.lines()
        assert lines[0].startswith(question[:60]) and max(map(len, lines)) <= 80, lines
        assert json.loads(json.dumps(found.to_json(), allow_nan=False))["asked"] == question


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("8:embed[0,0]", ("rank 8", "ranks 0 to 7")),
        ("3:layers.2.attn.qkw[1]", ("rank 3 has no tensor layers.2.attn.qkw", "layers.2.attn.qkv")),
        ("3:layers.9.attn.qkv[1]", ("rank 3 has no tensor layers.9.attn.qkv", "layers.4.attn.qkv")),
        ("layers.2.attn.qkv[1,1]", ("stored by 8 ranks", "0:layers.2.attn.qkv[1,1]")),
        ("lm_hed.weight[1]", ("no tensor lm_hed.weight", "lm_head.weight")),
        ("3:lm_head.weight", ("rank 3 has no tensor lm_head.weight", "the original has a tensor of that name")),
        ("3:layers.2.attn.qkv[30,0]", ("index 30", "dimension 0", "size 30")),
        ("model.norm.weight[56]", ("index 56", "dimension 0", "size 56")),
        ("attn.k[5]", ("index 5", "size 5")),
        ("3:layers.2.attn.qkv[1,2,3]", ("3 indices, ", " has 2 dimensions: [30, 56]")),
        ("norm[1,2]", ("2 indices, norm has 1 dimension: [56]",)),
        ("99999999999:embed", ("rank 99999999999", "ranks 0 to 7")),
        ("", ("is not an element",)),
        ("3:", ("is not an element",)),
        ("3: ", ("is not an element",)),
        ("3: 4:embed", ("is not an element",)),
        ("embed[1", ("is not an element",)),
        ("embed[-1]", ("is not an element",)),
        ("embed[1,,2]", ("is not an element",)),
        ("embed[a]", ("is not an element",)),
        ("embed[1][2]", ("is not an element",)),
        ("embed[" + "9" * 5000 + "]", ("is not an element",)),
    ],
)
def test_what_there_is_not_is_said_with_what_there_is(
    text: str, words: tuple[str, ...], shards: Callable[..., Path]
) -> None:
    with pytest.raises(ReshardError) as caught:
        explain(open_source(shards("llama")), text)
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert caught.value.exit_code == 2


def test_one_index_is_one_index(shards: Callable[..., Path]) -> None:
    with pytest.raises(ReshardError, match=r": 1 index, \S+ has 0 dimensions: \[\]"):
        explain(open_source(shards("llama", "tp2", "vllm")), "0:model.layers.0.self_attn.attn._k_scale[0]")


def test_ranks_that_have_a_tensor_are_named(shards: Callable[..., Path]) -> None:
    with pytest.raises(ReshardError, match=r"rank 1 has no layers\.0\.attn\.qkv\n\nhint: rank 0 has it"):
        explain(open_source(shards("llama", "pp2")), "1:layers.0.attn.qkv")


@pytest.mark.parametrize(
    ("text", "parsed"),
    [
        ("3:layers.7.attn.qkv[700,12]", (3, "layers.7.attn.qkv", (700, 12))),
        (" 3:a [ 1 , 2 ] ", (3, "a", (1, 2))),
        ("0: embed", (0, "embed", ())),
        (" 0 :  embed [1]", (0, "embed", (1,))),
        ("a.b", (None, "a.b", ())),
        ("a[]", (None, "a", ())),
        ("a:b[1]", (None, "a:b", (1,))),
    ],
)
def test_text_is_read_as_meant(text: str, parsed: tuple[Any, ...]) -> None:
    assert _parse(text) == parsed


# Values


@pytest.mark.parametrize(
    ("dtype", "kind"),
    [
        ("F8_E4M3", torch.float8_e4m3fn),
        ("F8_E5M2", torch.float8_e5m2),
        ("F8_E4M3FNUZ", torch.float8_e4m3fnuz),
        ("F8_E5M2FNUZ", torch.float8_e5m2fnuz),
        ("F8_E8M0", torch.float8_e8m0fnu),
    ],
)
def test_every_8_bit_code_is_worth_what_torch_says(dtype: str, kind: torch.dtype) -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    wanted = codes.view(kind).double().numpy()
    found = decode(dtype, codes.numpy().tobytes())
    assert found is not None and found.dtype == np.float64 and floating(dtype)
    assert np.array_equal(found, wanted, equal_nan=True)
    assert np.array_equal(np.signbit(found)[~np.isnan(wanted)], np.signbit(wanted)[~np.isnan(wanted)])


def test_every_bf16_and_f16_code_is_worth_what_torch_says() -> None:
    codes = torch.arange(65536, dtype=torch.int32).to(torch.uint16)
    for dtype, kind in (("BF16", torch.bfloat16), ("F16", torch.float16)):
        found = decode(dtype, codes.numpy().tobytes())
        assert found is not None and np.array_equal(found, codes.view(kind).double().numpy(), equal_nan=True)


def test_every_dtype_of_whole_bytes_is_decoded() -> None:
    for dtype, bits in BITS.items():
        found = decode(dtype, bytes(16))
        assert (found is None) == (bits < 8), dtype
        assert found is None or (len(found) == 128 // bits and not found.any()) or dtype == "F8_E8M0"


def test_a_result_is_frozen(shards: Callable[..., Path]) -> None:
    found: Explanation = explain(open_source(shards("llama")), "norm")
    with pytest.raises(AttributeError):
        found.kind = "box"  # type: ignore[misc]
