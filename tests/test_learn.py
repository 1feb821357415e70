"""Learning a format: what ranks hold, in numbers, becomes the rows that it was laid out by; what no row says is named.

In the place of an engine stands a layout by a table that is there: its rows must be found again from arrays alone.
"""

import json
import re
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
from fixtures import checkpoint

from reshard.authoring.learn import FIRST, Array, Learned, Numbers, Unlike, held, observed, rows, words
from reshard.checkpoints.source import open_source
from reshard.errors import ReshardError
from reshard.layout.cut import Layout, lay_out
from reshard.layout.mesh import Mesh
from reshard.model.understand import Model
from reshard.tables import formats

# one KV head, q, k and v per KV head, experts, a delta net, state spaces, variants
NAMES = ("llama", "gpt_neox", "gemma", "falcon_40b", "gpt_oss", "qwen3_next", "bamba", "gemma4_text", "mamba")


@cache
def model_of(name: str) -> Model:
    return open_source(checkpoint(name)).layout.model


def native(name: str, mesh: Mesh) -> Layout:
    model = model_of(name)
    return lay_out(formats.load("native").for_family(model.family.name), model, mesh)


def of_ranks(layout: Layout, numbers: Numbers) -> list[dict[str, Array]]:
    """What each rank would hold, as float32: an engine's parameters."""
    found: list[dict[str, Array]] = [{} for _ in range(layout.mesh.world)]
    for rank, name, values in held(layout, numbers):
        found[rank][name] = values.astype(np.float32)
    return found


@pytest.mark.parametrize("name", NAMES)
def test_the_rows_of_a_layout_are_found_again_from_what_it_holds(name: str) -> None:
    """Laid out by the rows that were learned, every parameter of every rank at TP 2 is what it was."""
    numbers, table = Numbers(model_of(name)), formats.load("native")
    whole, two = native(name, Mesh()), native(name, Mesh(2))
    parameters = of_ranks(two, numbers)
    seen = rows(of_ranks(whole, numbers)[0], numbers)
    assert not seen.odd and not seen.scalars
    learned = []
    for row in sorted(seen.rows, key=lambda row: -len(row.leaves)):
        word = words(row, parameters, numbers, {*table.cut["tp"]})
        learned.append([row.name, row.pattern, " ".join(row.leaves), *([word] if word else [])])
    if "head" in model_of(name).alias:  # a name for the embeddings, of which nothing is seen
        learned.append(["head", "vocab hidden", "head", "last"])
    there = {axis for row in learned for axis in re.findall(r"[a-z_]+", row[1])}
    cut, replicate = ([axis for axis in some if axis in there] for some in (table.cut["tp"], table.replicate))
    text = (
        f'name = "learned"\ntied = "embed"\nreplicate = {json.dumps(replicate)}\nrows = {json.dumps(learned)}\n[cut]\n'
    )
    text += f'tp = {json.dumps(cut)}\npp = ["layer"]\n[pad]\n'
    text += "".join(f'{axis} = "tp"\n' for axis in table.pad if axis in there)
    again = lay_out(formats.parse(text, "learned.toml"), model_of(name), Mesh(2))
    found = of_ranks(again, numbers)
    for rank, wanted in enumerate(parameters):
        assert found[rank].keys() == wanted.keys()
        assert [key for key in wanted if not np.array_equal(found[rank][key], wanted[key])] == []


def test_numbers_are_of_one_element_each_and_tied_tensors_share_theirs() -> None:
    numbers = Numbers(model_of("llama"))
    everything = np.concatenate([values.ravel() for _, _, values in held(native("llama", Mesh()), numbers)])
    real = everything[everything > 0]
    assert len(np.unique(real)) == len(real) and real.min() == FIRST and real.max() < numbers.end
    tied = Numbers(model_of("llama_tied"))
    assert "head" not in tied.first and tied.first["embed"] >= FIRST


def edited(change: str) -> Array:
    numbers = Numbers(model_of("llama"))
    values = dict(of_ranks(native("llama", Mesh()), numbers)[0])["layers.0.mlp.down"].copy()
    if change == "computed":
        return -np.exp(values / values.max())
    if change == "shuffled":
        values[[0, 3]] = values[[3, 0]]
    if change == "part":
        values[0, 0] = 0
    if change == "never loaded":
        values[1, 1] = np.float32(3.39e38)
    return values


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("computed", "values that no element"),
        ("shuffled", "in another order"),
        ("part", "that are no box"),
        ("never loaded", "values that no element"),
    ],
)
def test_what_no_row_can_say_is_named(change: str, words: str) -> None:
    with pytest.raises(Unlike, match=words):
        observed(edited(change), Numbers(model_of("llama")))


def test_words_say_how_two_ranks_share_a_row() -> None:
    """Cut as the format does, not cut though it would, cut along another axis, on the first rank alone."""
    numbers = Numbers(model_of("llama"))
    whole = of_ranks(native("llama", Mesh()), numbers)[0]
    row, name = Learned("layers.{layer}.mlp.down", "hidden inter", ("mlp.down",)), "layers.0.mlp.down"
    full = whole[name]
    halves = {
        "": [full[:, :44], full[:, 44:]],
        "whole": [full, full],
        "cut=hidden": [full[:28], full[28:]],
        "whole zero": [full, 0 * full],
    }
    for word, parts in halves.items():
        assert words(row, [{name: part} for part in parts], numbers, {"inter", "vocab"}) == word
    with pytest.raises(Unlike, match="no such parameter"):
        words(row, [{}, {}], numbers, {"inter"})


def test_a_format_may_name_two_tensors_alike_but_no_rank_holds_both() -> None:
    """Gemma 2 has no head in vLLM: untied, it would be stored where the embeddings are."""
    text = """name = "x"
    rows = [["e", "vocab hidden", "embed", "first"], ["e", "vocab hidden", "head", "last"]]
    [cut]
    pp = ["layer"]
    """
    table = formats.parse(text, "x.toml")
    model = model_of("llama")
    small = replace(model, tensors={name: model.tensors[name] for name in ("embed", "head")})
    with pytest.raises(ReshardError, match="two logical tensors would be stored as e on one rank"):
        lay_out(table, small, Mesh())
