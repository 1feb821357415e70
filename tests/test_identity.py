"""The identity of a plan is of the rows that were used: however tables are spelled it is the same, and whatever moves a
byte changes it. Directories of earlier format versions stay what they are.

`tests/written/VERSION` was written by the last reshard of that version: a small Mistral on two ranks, with --sha256.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import tomllib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from running import ROOT, environment, llama, process, refused, reshard, stamps, tree
from test_tables import toml

from reshard.authoring.mutations import mutations
from reshard.authoring.synthetic import made_up
from reshard.checkpoints import manifest
from reshard.checkpoints.published import Published, open_published
from reshard.checkpoints.shards import FORMAT_VERSION, VERSIONS, Shards, scalar
from reshard.checkpoints.source import open_source
from reshard.checkpoints.source_kinds import from_published
from reshard.errors import ReshardError
from reshard.jobs import fingerprint
from reshard.layout.cut import Layout, lay_out
from reshard.layout.join import plan
from reshard.layout.mesh import Mesh
from reshard.model.understand import Model
from reshard.runtime.comm.lost import Lost
from reshard.runtime.comm.threads import run_threads
from reshard.runtime.load import load_model, load_shard
from reshard.tables import families, formats
from reshard.tables.families import Family
from reshard.tables.formats import Format
from reshard.tables.notation import parse_template
from reshard.tables.row import Constant, Row
from reshard.tables.shipped import Shipped

MESHES = [Mesh(), Mesh(2), Mesh(pp=2), Mesh(2, ep=2), Mesh(3, weights=(2, 1, 1))]
OLD = sorted(path.name for path in (Path(__file__).parent / "written").iterdir())
SHA256 = "a167a9b0a9780a992ee0c3b93728b4975fd28f29c8f44c428a9a33576bb99de4"  # of the file that they were made from


def laid_out(model: Model, table: Format) -> Iterator[Layout]:
    """A model on each mesh that fits it."""
    for mesh in MESHES:
        try:
            yield lay_out(table.for_family(model.family.name), model, mesh)
        except ReshardError:
            continue


def identities(checkpoint: Published, family: Family, tables: Mapping[str, Format]) -> dict[str, str]:
    model = from_published(checkpoint, family).layout.model
    return {
        f"{name} {layout.mesh}": Shards(layout).digest
        for name, table in tables.items()
        if not table.families or family.name in table.families
        for layout in laid_out(model, table)
    }


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Published]:
    """A checkpoint that a family's table makes."""
    return lambda name: open_published(next(made_up(families.load(name), tmp_path_factory.mktemp(name))))


SHIPPED = {name: formats.load(name) for name in formats.shipped()}

# Spelling


def respelled(text: str) -> str:
    """Another text that says the same: comments, spaces and the order of keys are others."""

    def turned(value: Any) -> Any:
        return {key: turned(one) for key, one in reversed(value.items())} if isinstance(value, dict) else value

    data = turned(tomllib.loads(text))
    for row in data.get("rows", ()):
        row[1] = row[1].replace(" ", "  ")
        row[3:] = [" ".join(reversed(row[3].split()))] if row[3:] else [""]
    return f"# another comment\n{toml(data)}\n# and one more\n"


def with_another_row(data: dict[str, Any]) -> dict[str, Any]:
    """A row, its axes and its size, for checkpoints that this one is not."""
    return data | {
        "rows": [["of.others.{others}", "other hidden", "other.weight", "other?"], *data["rows"]],
        "sizes": data.get("sizes", {}) | {"others": "num_others"},
        "optional": data.get("optional", {}) | {"other?": "has_others"},
    }


@pytest.mark.parametrize(
    "name", families.shipped() if os.environ.get("RESHARD_ALL_MESHES") else families.shipped()[::4]
)
def test_it_is_of_what_tables_say_not_of_how(name: str, made: Callable[[str], Published]) -> None:
    """Tables read again, as opening a directory does, with other comments, in another order of keys, without `like`,
    with defaults that go without saying, and with a row for other checkpoints.
    """
    family, checkpoint = families.load(name), made(name)
    wanted = identities(checkpoint, family, SHIPPED)
    assert f"native {MESHES[0]}" in wanted

    def text(kind: str) -> Callable[[str], str]:
        return Shipped(kind, "table").text

    def again(name: str) -> str:
        return respelled(text("families")(name))

    others = {
        "read again": families.parse(family.texts[name], name, family.texts.__getitem__),
        "respelled": families.parse(again(name), name, again),
        "without like": families.parse(toml(family.written), name),
        "defaults spelled": families.parse(toml({"without": [], "aside": [], "tied": {}} | family.written), name),
        "a row more": families.parse(toml(with_another_row(family.written)), name),
    }
    for what, other in others.items():
        assert identities(checkpoint, other, SHIPPED) == wanted, what
    for what, spelled in {
        "read again": text("formats"),
        "respelled": lambda name: respelled(text("formats")(name)),
    }.items():
        tables = {one: formats.parse(spelled(one), one, spelled, family.leaves()) for one in SHIPPED}
        assert identities(checkpoint, family, tables) == wanted, what


# What moves a byte

# Mutations that are tried of each; RESHARD_ALL_MESHES=1: of three families more.
SAMPLE = {"llama": 250, "gpt_oss": 100}
if os.environ.get("RESHARD_ALL_MESHES"):
    SAMPLE = {"llama": 500, "qwen3_moe": 500, "gpt_neox": 500, "deepseek_v3": 250, "gpt_oss": 250}
PLACED = Mesh(2, pp=2)


def effect(layout: Layout) -> Any:
    """Every stored tensor with its place in its file, every copy from the published files, and constants."""
    model = layout.model
    shards = [(shard.file, list(shard.header.entries.items())) for shard in Shards(layout)]
    copies = plan(lay_out(model.family.published, model, Mesh(), model.active), layout).copies()
    constants = [
        (slot.rank, slot.name(point), scalar(slot.template))
        for slot in layout.constants
        for point in slot.points()
        if isinstance(slot.template, Constant)
    ]
    moved = {
        (copy.src_name, copy.src_offset, copy.dst.rank, copy.dst_name, copy.dst_offset, tuple(sorted(copy.dims)))
        for copy in copies
    }
    return shards, moved, constants


def checked(before: Layout, layouts: Iterator[tuple[str, Layout]]) -> tuple[int, int]:
    """Of so many mutations that can be laid out, how many change the plan; each that does must change the identity."""
    usual, digest = effect(before), Shards(before).digest
    tried = changed = 0
    for words, layout in layouts:
        try:
            found = effect(layout)
        except ReshardError:  # some element is nowhere, or twice
            continue
        tried += 1
        if found != usual:
            changed += 1
            assert Shards(layout).digest != digest, words
    return tried, changed


@pytest.mark.parametrize("name", SAMPLE)
def test_a_mutation_of_a_family_changes_it_if_the_plan(name: str, made: Callable[[str], Published]) -> None:
    family, checkpoint, table = families.load(name), made(name), formats.load("native").for_family(name)

    def layouts() -> Iterator[tuple[str, Layout]]:
        found = [mutation for mutation in mutations(family) if mutation.data is not None]
        for mutation in found[:: max(1, len(found) // SAMPLE[name])]:
            try:
                other = families.of_chain(family.chain, mutation.data)
                yield mutation.name, lay_out(table, from_published(checkpoint, other).layout.model, PLACED)
            except ReshardError:
                continue

    tried, changed = checked(lay_out(table, from_published(checkpoint, family).layout.model, PLACED), layouts())
    assert tried > changed > 1, (tried, changed)


def format_mutations(data: dict[str, Any], used: set[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """A format with one thing changed: of each row that is used, of each key about axes, of constants and files."""

    def row(at: int, *other: list[str]) -> dict[str, Any]:
        return data | {"rows": [*data["rows"][:at], *other, *data["rows"][at + 1 :]]}

    for at, (name, pattern, leaves, *rest) in enumerate(data["rows"]):
        if not set(leaves.split()) <= used:
            continue
        words = rest[0] if rest else ""
        yield f"{name} dropped", row(at)
        yield f"{name} renamed", row(at, [f"x{name}", pattern, leaves, words])
        yield (
            f"{name}: leaves shifted",
            row(at, [name, pattern, " ".join([*leaves.split()[1:], leaves.split()[0]]), words]),
        )
        parts = re.findall(r"\([^()]*\)(?:/\d+)?|\S+", pattern)
        for inner in re.findall(r"\(([^()+]*)\)", pattern):
            turned = " ".join(reversed(inner.split()))
            yield f"{name}: {turned}", row(at, [name, pattern.replace(inner, turned), leaves, words])
        yield f"{name} transposed", row(at, [name, " ".join(reversed(parts)), leaves, words])
        for axis in re.findall(r"[a-z_]+", pattern):
            yield f"{name}: cut={axis}", row(at, [name, pattern, leaves, f"{words} cut={axis}"])
        for word in ("whole", "zero", "first", "last"):
            kept = [one for one in words.split() if word in ("whole", "zero") or one not in ("first", "last", "every")]
            yield f"{name}: {word}", row(at, [name, pattern, leaves, " ".join([*kept, word])])
        if at:
            before = data["rows"][at - 1]
            yield (
                f"{name} earlier",
                data | {"rows": [*data["rows"][: at - 1], data["rows"][at], before, *data["rows"][at + 1 :]]},
            )
    for mesh, axes in data["cut"].items():
        for axis in axes:
            yield f"{axis} not cut", data | {"cut": data["cut"] | {mesh: [one for one in axes if one != axis]}}
    for key in ("replicate", "uneven", "weighted"):
        yield f"no {key}", data | {key: []}
    yield "no padding", {key: value for key, value in data.items() if key != "pad"}
    for axis in data.get("pad", {}):
        yield f"{axis} padded to 256", data | {"pad": data["pad"] | {axis: "256"}}
    for keep in ("", "both", "head"):
        yield f"tied: {keep}", data | {"tied": keep}
    constants = [["layers.{layer}.scale", "F32", 1.0, "attn.q"], ["layers.{layer}.scale", "F32", 2.0, "attn.q"]]
    for constant in constants:
        yield f"constant {constant[2]}", data | {"constants": [*data.get("constants", ()), constant]}
    yield "constants gone", data | {"constants": []}
    yield "other files", data | {"files": {"shard": "shard-{rank}.safetensors"}}


@pytest.mark.parametrize(("name", "to"), [(name, "native") for name in SAMPLE] + [("llama", "vllm")])
def test_a_mutation_of_a_format_changes_it_if_the_plan(name: str, to: str, made: Callable[[str], Published]) -> None:
    model = from_published(made(name), families.load(name)).layout.model
    data = tomllib.loads(formats.load(to).texts[to])

    def layouts() -> Iterator[tuple[str, Layout]]:
        for words, other in format_mutations(data, set(model.tensors)):
            try:
                yield words, lay_out(formats.parse(toml(other), to).for_family(name), model, PLACED)
            except ReshardError:
                continue

    tried, changed = checked(lay_out(formats.load(to).for_family(name), model, PLACED), layouts())
    assert tried > changed > 20, (tried, changed)


def test_every_part_of_a_place_is_in_it(tmp_path: Path) -> None:
    """Whatever a rule may come to: each field of a slot and of a piece that says where bytes go, one at a time."""
    layout = lay_out(formats.load("native"), open_source(llama(tmp_path / "a")).layout.model, Mesh(2, pp=2))
    piece = layout.pieces["attn.k"][0]
    slot, (held, *rest), row = piece.slot, layout.pieces["attn.k"], piece.slot.template
    assert isinstance(row, Row) and slot.layers is not None and piece.offset

    def with_piece(**changes: Any) -> Layout:
        return replace(layout, pieces=layout.pieces | {"attn.k": (replace(held, **changes), *rest)})

    def with_slot(**changes: Any) -> Layout:
        other = replace(slot, **changes)
        pieces = {
            name: tuple(replace(one, slot=other) if one.slot is slot else one for one in held)
            for name, held in layout.pieces.items()
        }
        return replace(layout, slots=tuple(other if one is slot else one for one in layout.slots), pieces=pieces)

    template = Constant(row.name, "F32", 1.0, "attn.k")
    others = {
        "none": layout,
        "offset": with_piece(offset=piece.offset + 1),
        "strides": with_piece(strides=(*piece.strides[:-1], 2)),
        "box": with_piece(box=(*piece.box[:-1], (1, 2))),
        "tensor": with_piece(tensor=layout.model.tensors["attn.v"]),
        "shape": with_slot(shape=slot.shape[::-1]),
        "range": with_slot(box={"layer": (0, 1)}),
        "layers": with_slot(layers=slot.layers[1:]),
        "rank": with_slot(rank=1),
        "name": with_slot(template=row._replace(name=parse_template("x.{layer}"))),
        "order": with_slot(row=0),
        "last": with_slot(template=row._replace(stage="last")),
        "constant": with_slot(template=template),
        "its value": with_slot(template=template._replace(value=2.0)),
        "its dtype": with_slot(template=template._replace(dtype="F64")),
    }
    digests = {what: Shards(other).digest for what, other in others.items()}
    same = [pair for pair in itertools.combinations(digests, 2) if digests[pair[0]] == digests[pair[1]]]
    assert same == []


def test_what_a_checkpoint_is_changes_it(tmp_path: Path) -> None:
    """Sizes, dtypes, mesh, format, and the names of both tables, which the manifest gives."""
    layout = lay_out(formats.load("native"), open_source(llama(tmp_path / "a")).layout.model, Mesh(2))
    bigger = open_source(llama(tmp_path / "b", vocab_size=333)).layout.model
    model = layout.model
    embed = model.tensors["embed"]
    others = [
        lay_out(layout.format, bigger, Mesh(2)),
        lay_out(
            layout.format, replace(model, tensors=model.tensors | {"embed": replace(embed, dtypes=("F16",))}), Mesh(2)
        ),
        lay_out(layout.format, model, Mesh(4)),
        lay_out(formats.load("vllm").for_family("llama"), model, Mesh(2)),
        replace(layout, model=replace(model, family=replace(model.family, name="other"))),
        replace(layout, format=replace(layout.format, name="other")),
    ]
    digests = [Shards(other).digest for other in (layout, *others)]
    assert len({*digests}) == len(digests)


# Re-runs


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A copy of reshard, whose tables can be edited."""
    shutil.copytree(
        ROOT / "reshard", tmp_path / "package/reshard", ignore=shutil.ignore_patterns("__pycache__"), symlinks=False
    )
    return tmp_path / "package"


def test_a_comment_in_a_shipped_table_leaves_a_finished_conversion_a_no_op(package: Path, tmp_path: Path) -> None:
    """And a row for other checkpoints; the shares of ranks that have another comment can be combined."""
    source, out = llama(tmp_path / "model"), tmp_path / "out"
    run = {"env": environment(PYTHONPATH=str(package)), "cwd": tmp_path}
    convert = ("convert", source, out, "--tp", "2", "--json")
    assert json.loads(process(*convert, **run).out)["already"] is False
    share = process("fingerprint", out, "--rank", "0", **run).out
    before = stamps(out)
    for table in ("families/llama.toml", "formats/native.toml"):
        path = package / "reshard" / table
        text = path.read_text(encoding="utf-8")
        row = '  ["of.others", "other hidden", "other.weight", "other?"],\n' if "families" in table else ""
        path.write_text("# a comment\n" + text.replace("rows = [\n", f"rows = [ # another\n{row}"), encoding="utf-8")
        assert path.read_text(encoding="utf-8") != text
    done = process(*convert, **run)
    assert done.code == 0 and json.loads(done.out)["already"] is True, done.err
    assert stamps(out) == before
    again = tmp_path / "again"
    assert process("convert", source, again, "--tp", "2", **run).code == 0
    assert manifest.load(again).plan == manifest.load(out).plan
    assert {name for name, data in tree(again).items() if tree(out)[name] != data} == {
        "manifest.json",
        "source/families/llama.toml",
        "source/formats/native.toml",
    }
    other = process("fingerprint", again, "--rank", "1", **run).out
    shares = [tmp_path / "0.json", tmp_path / "1.json"]
    for path, text in zip(shares, (share, other), strict=True):
        path.write_text(text)
    assert fingerprint.combine(map(fingerprint.read_share, shares)).model in reshard("fingerprint", source).out


def test_what_a_table_says_beside_its_rows_is_not_lost(tmp_path: Path) -> None:
    """OUT keeps the facts that the model is run by: a re-run with others is refused, and names one."""
    source, out, table = llama(tmp_path / "model"), tmp_path / "out", tmp_path / "mine.toml"
    words = ("convert", source, out, "--tp", "2", "--family", table)
    text = families.load("llama").texts["llama"]
    table.write_text(text)
    assert reshard(*words).code == 0
    before = stamps(tmp_path)
    for changed, said in {
        text.replace(
            "[model]\n", "[model]\nwindow = 'my_window'\n"
        ): "model.window = None, that of this conversion 'my_window'",
        f"{text}\n[defaults]\nmy_key = 3\n": "defaults.my_key = None, that of this conversion 3",
        text.replace("model.norm.weight", "model.norm.weight | norm"): None,
        text.replace('"mlp.gate"', '"mlp.XXX"')
        .replace('"mlp.up"', '"mlp.gate"')
        .replace('"mlp.XXX"', '"mlp.up"'): "another conversion",
    }.items():
        assert changed != text
        table.write_text(changed)
        if said is None:
            assert "is up to date" in " ".join(reshard(*words).out.split())
        else:
            refused(reshard(*words), 2, said, "--overwrite")
    table.write_text(text)
    assert {name: stamp for name, stamp in stamps(tmp_path).items() if "mine" not in name} == {
        name: stamp for name, stamp in before.items() if "mine" not in name
    }


def test_sha256_is_added_next_to_the_tables_that_are_there(tmp_path: Path) -> None:
    """Not next to those of the re-run, which may say the same in other files."""
    source, out, table = llama(tmp_path / "model", model_type="mistral"), tmp_path / "out", tmp_path / "mine.toml"
    words = ("convert", source, out, "--tp", "2", "--family")
    assert reshard(*words, "mistral").code == 0
    before = {name: data for name, data in tree(out).items() if name.endswith(".toml")}
    table.write_text(f"# without like\n{toml(families.load('mistral').written)}")
    done = reshard(*words, table, "--sha256", "--json")
    assert done.code == 0 and done.json["added"] == ["SHA-256"], done.err
    assert {name: data for name, data in tree(out).items() if name.endswith(".toml")} == before
    assert {"source/families/llama.toml", "source/families/mistral.toml"} <= before.keys()
    assert reshard("verify", out).code == 0


def test_ranks_with_other_facts_do_not_run_one_model(tmp_path: Path) -> None:
    """Their tables place the same rows, so that their plans are equal."""
    source, table = llama(tmp_path / "model"), families.load("llama")
    tables = [table, replace(table, model=table.model | {"window": "my_window"})]
    words = r"rank 1 diverged in load: its table is [0-9a-f]{32}, but [0-9a-f]{32} on rank 0"
    with pytest.raises(Lost, match=words):
        run_threads(2, lambda world: load_model(open_source(source, tables[world.rank]), world=world))


# Earlier versions


@pytest.fixture(params=OLD)
def old(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A directory that an earlier reshard wrote."""
    shutil.copytree(Path(__file__).parent / "written" / request.param, tmp_path / "old")
    assert manifest.load(tmp_path / "old").version == request.param
    return tmp_path / "old"


def test_there_is_a_directory_of_every_earlier_version() -> None:
    assert {*OLD, FORMAT_VERSION} == set(VERSIONS)


def test_a_directory_of_an_earlier_version_is_what_it_was(old: Path, tmp_path: Path) -> None:
    """It opens, verifies, merges back byte for byte, and reshapes to what its original becomes."""
    done = reshard("verify", old, "--json")
    assert done.code == 0 and done.json["ok"] is True, done.out
    assert reshard("verify", old, "--only", "sha256").code == 0
    back = tmp_path / "back"
    assert reshard("convert", old, back, "--to", "hf").code == 0
    assert manifest.load_originals(old)[0].sha256 == SHA256 == sha256(back / "model.safetensors")
    for mesh in (("--tp", "1"), ("--tp", "2"), ("--pp", "2"), ("--tp", "2", "--to", "vllm")):
        assert reshard("convert", back, tmp_path / f"direct{mesh}", *mesh, "--sha256").code == 0
        assert reshard("convert", old, tmp_path / f"reshaped{mesh}", *mesh).code == 0
        one, other = tree(tmp_path / f"direct{mesh}"), tree(tmp_path / f"reshaped{mesh}")
        assert {name for name in one | other if one.get(name) != other.get(name)} == set(), mesh
    assert manifest.load(tmp_path / f"direct{mesh}").version == FORMAT_VERSION


def test_a_directory_of_an_earlier_version_is_loaded(old: Path, tmp_path: Path) -> None:
    """Mapped by a rank of its own mesh, and read through the plan on another."""
    assert reshard("convert", old, tmp_path / "now", "--tp", "2", "--sha256").code == 0
    for rank in range(2):
        here, there = load_shard(old, rank, verify="hash"), load_shard(tmp_path / "now", rank)
        assert here.keys() == there.keys()
        assert all(torch.equal(tensor, there[name]) for name, tensor in here.items())
    one, other = load_model(old), load_model(tmp_path / "now")
    assert all(torch.equal(tensor, other.state_dict()[name]) for name, tensor in one.state_dict().items())


def test_a_re_run_over_an_earlier_version_says_so(old: Path, tmp_path: Path) -> None:
    """And --overwrite writes it in today's."""
    version = manifest.load(old).version
    back, before = tmp_path / "back", stamps(old)
    assert reshard("convert", old, back, "--to", "hf").code == 0
    words = f"it is of format version {version}, and {FORMAT_VERSION} would be written"
    refused(reshard("convert", back, old, "--tp", "2"), 2, str(old), words, "--overwrite")
    assert stamps(old) == before
    assert reshard("convert", back, old, "--tp", "2", "--overwrite").code == 0
    assert manifest.load(old).version == FORMAT_VERSION and reshard("verify", old).code == 0


def test_of_a_header_the_versions_differ_in_version_and_plan_alone(old: Path) -> None:
    """And they are of one length, so that every tensor is where it was."""
    source = open_source(old)
    then, now = Shards(source.layout, manifest.load(old).version), Shards(source.layout)
    for one, other in zip(then, now, strict=True):
        assert one.prologue == (old / one.file).read_bytes()[: len(one.prologue)]
        assert one.header.entries == other.header.entries
        differing = dict(one.header.metadata.items() ^ other.header.metadata.items())
        assert differing.keys() == {"reshard.version", "reshard.plan"}


def test_an_edited_directory_of_an_earlier_version_is_refused(old: Path) -> None:
    """Its plan was of the tables' text: another comment is another plan."""
    path = old / "source/families/llama.toml"
    path.write_bytes(path.read_bytes() + b"# mine\n")
    refused(reshard("inspect", old), 1, "llama.toml", "edited")


def sha256(path: Path) -> str:
    import hashlib

    return hashlib.sha256(path.read_bytes()).hexdigest()
