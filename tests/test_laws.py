"""The laws that make one function enough: merge(split(x)) = x, every route ends in the same bytes, a plan covers each
element once.

First with numbers in place of elements, for layouts that nobody would write down; then with files.
"""

import itertools
import shutil
from collections import Counter
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
from fixtures import FIXTURES, checkpoint
from hypothesis import assume, event, given
from hypothesis import strategies as st
from strategies import (
    Invention,
    Joint,
    carried_out,
    differing,
    fitting,
    hold,
    inventions,
    joints,
    law,
    meshes,
    numbered,
)

from reshard.checkpoints.source import open_source
from reshard.engine import worker
from reshard.errors import ReshardError
from reshard.jobs.convert import Options, convert, prepare
from reshard.layout.cut import Layout, lay_out
from reshard.layout.join import plan
from reshard.layout.mesh import Mesh
from reshard.model.understand import Model
from reshard.store.destination import LocalDestination
from reshard.tables import formats


def published(model: Model) -> Layout:
    return lay_out(model.family.published, model, Mesh(), model.active)


def check(src: Layout, dst: Layout, values: dict[str, np.ndarray]) -> None:
    """The plan writes what the destination must hold, each element once, and nothing where there is padding."""
    found, writes = carried_out(plan(src, dst), hold(src, values))
    wanted = hold(dst, values)
    assert found.keys() == wanted.keys()
    for key, array in wanted.items():
        assert np.array_equal(found[key], array), key
        assert np.array_equal(writes[key], (array > 0).ravel()), key


@given(joint=joints(), data=st.data())
@law(100)
def test_any_two_layouts_of_a_model_are_joined_exactly(joint: Joint, data: st.DataObject) -> None:
    """Split, reshape and merge between random tables on random meshes: fused, nested, transposed, stacked, padded,
    repeated.
    """
    model = joint.model()
    values = numbered(model)
    source = published(model)
    one, two = (data.draw(st.sampled_from(fitting(formats.parse(text, "format"), model))) for text in joint.formats)
    event(f"{one.mesh} to {two.mesh}")
    for src, dst in ((source, one), (one, two), (two, source)):
        check(src, dst, values)


@given(invention=inventions(), data=st.data())
@law(60)
def test_every_family_at_any_size_is_split_reshaped_and_merged_exactly(
    invention: Invention, data: st.DataObject
) -> None:
    model = invention.model()
    values = numbered(model)
    layouts = []
    for _ in range(2):
        names = ["native", "vllm"] if model.family.name in formats.load("vllm").families else ["native"]
        table = formats.load(data.draw(st.sampled_from(names))).for_family(model.family.name)
        mesh = data.draw(st.sampled_from(meshes(model.main_layers, tp=(1, 2, 4))))
        try:
            layouts.append(lay_out(table, model, mesh))
        except ReshardError:
            assume(False)
    event(f"{model.family.name} {'mtp' if model.sizes['layer'] > model.main_layers else ''}")
    source = published(model)
    for src, dst in ((source, layouts[0]), (layouts[0], layouts[1]), (layouts[1], source)):
        check(src, dst, values)


@given(invention=inventions())
@law(60)
def test_a_checkpoint_of_any_size_is_understood_as_it_was_made(invention: Invention) -> None:
    """Every element belongs to one logical tensor, and config.json without its optional keys gives the same sizes."""
    model = invention.model()
    assert sum(t.elements for name, t in model.tensors.items() if name not in model.alias) == sum(
        int(np.prod(stored.shape)) for stored in invention.stored.values()
    )
    (whole,) = {slot.rank for slot in published(model).slots}
    assert whole == 0
    assert Counter(slot.name(point) for slot in published(model).slots for point in slot.points()) == Counter(
        invention.stored.keys()
    )


# Files


def moved(source: Path, out: Path, mesh: Mesh | None, workers: int, tile: int = 4096) -> Path:
    """Convert to `mesh`, or back to the original files; with tiles so small that each tensor is many."""
    options = Options(workers=workers)
    with patch.multiple(worker, TILE=tile, RUN=256, NARROW=64, STRIPE=16):
        convert(
            prepare(open_source(source), "native" if mesh else "hf", mesh or Mesh(), options),
            LocalDestination(out),
            options,
        )
    return out


@st.composite
def routes(draw: st.DrawFn) -> tuple[str, list[Mesh]]:
    name = draw(st.sampled_from([name for name in FIXTURES if name != "deepseek_v3_fp8"]))
    known = [Mesh(**mesh) for mesh in FIXTURES[name].meshes()]
    return name, draw(st.lists(st.sampled_from(known), min_size=2, max_size=3, unique=True))


@given(route=routes(), data=st.data())
@law(12)
def test_any_route_ends_in_the_same_bytes(
    tmp_path_factory: pytest.TempPathFactory, route: tuple[str, list[Mesh]], data: st.DataObject
) -> None:
    """By way of other meshes or directly, with any number of workers and any tile: `diff -r` finds nothing,
    the manifest included.
    """
    name, stops = route
    event(name)
    folder = tmp_path_factory.mktemp("route")
    workers = st.sampled_from([1, 2, 5])
    tile = st.sampled_from([1 << 13, 1 << 20])
    here = checkpoint(name)
    for number, mesh in enumerate(stops):
        here = moved(here, folder / str(number), mesh, data.draw(workers), data.draw(tile))
    direct = moved(checkpoint(name), folder / "direct", stops[-1], data.draw(workers), data.draw(tile))
    assert differing(here, direct) == []
    merged = moved(here, folder / "merged", None, data.draw(workers), data.draw(tile))
    assert differing(checkpoint(name), merged) == []
    shutil.rmtree(folder)


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_the_number_of_workers_does_not_change_the_output(tmp_path: Path, workers: int) -> None:
    """FP8 with scales and a transposed, interleaved model: each against what one worker with large tiles writes."""
    for name, mesh in (("deepseek_v3_fp8", Mesh(tp=4, ep=2)), ("gpt_oss", Mesh(tp=4, ep=2, pp=2))):
        usual = moved(checkpoint(name), tmp_path / f"{name}-usual", mesh, 1, 4 << 20)
        other = moved(checkpoint(name), tmp_path / name, mesh, workers, 1 << 14)
        assert differing(usual, other) == []


def test_what_differs_is_found(tmp_path: Path) -> None:
    """The comparison that these laws rest on sees a byte, a missing file and an additional one, at any depth."""
    one, two = (moved(checkpoint("gemma2"), tmp_path / name, Mesh(tp=2), 1) for name in ("one", "two"))
    assert differing(one, two) == []
    path = two / "rank-00001" / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    (two / "source" / "new").touch()
    (two / "config.json").unlink()
    assert differing(one, two) == ["config.json", "rank-00001/model.safetensors", "source/new"]


def test_every_kind_of_mesh_is_among_those_that_laws_are_tried_on() -> None:
    found = meshes(4)
    assert len(found) == len(set(found))
    assert {mesh.weights is not None for mesh in found} == {mesh.layers is not None for mesh in found} == {True, False}
    assert {(mesh.tp, mesh.ep) for mesh in found} >= {(4, 2), (6, 3), (6, 6)}
    assert all(sum(mesh.layers) == 4 for mesh in found if mesh.layers)
    assert list(itertools.chain.from_iterable(mesh.weights or () for mesh in found))
