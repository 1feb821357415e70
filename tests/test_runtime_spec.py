"""What config.json leaves out is what transformers takes: the facts of a family do not depend on who wrote the keys
down.
"""

import json
import re
from dataclasses import fields, replace
from typing import Any

import pytest
from fixtures import FIXTURES, Fixture, checkpoint, zoo
from huggingface_hub.errors import StrictDataclassError

from reshard.checkpoints.source import open_source
from reshard.model.understand import Model
from reshard.runtime.model.spec import Rope, Spec
from reshard.tables import families
from reshard.tables.config import Config
from reshard.tables.families import Family

transformers = pytest.importorskip("transformers")

SAID = {"architectures", "model_type", "tie_word_embeddings", "num_experts_per_tok"}  # by every published config.json
# Facts that transformers takes from elsewhere than the published config.json says: it does not read
# attn_config.rope_theta, and lists layers where nothing lists them.
OTHERWISE = {"dbrx": {"rope", "rope_near"}, "mimo_v2_flash": {"window", "windowed"}}


def runnable() -> dict[str, Fixture]:
    """A fixture of each family that runs and that transformers knows by its name."""
    found: dict[str, Fixture] = {}
    for fixture in (FIXTURES | zoo()).values():
        if fixture.runs and families.load(fixture.family).runs:
            found.setdefault(fixture.family, fixture)
    return found


def said(table: Family) -> set[str]:
    """The keys that sizes, optional sets and indexers need."""
    texts = [*table.sizes.values(), *map(str, table.optional.values()), *table.extra.values()]
    texts.append(json.dumps(table.model.get("index_top")))
    return SAID | set(re.findall(r"[A-Za-z_]\w*", " ".join(texts)))


def rope(found: Rope | None) -> Rope | None:
    """Without what changes nothing: how far positions reach, where nothing stretches them."""
    if found is None:
        return None
    # spelled otherwise, or said elsewhere
    names = {"type": "rope_type", "rope_theta": "", "max_position_embeddings": ""}
    scaling = {names.get(key, key): value for key, value in found.scaling.items() if names.get(key, key)}
    plain = found.kind == "default"
    original = 0 if plain or found.kind == "proportional" else found.original
    return replace(found, positions=0, original=original, scaling={} if plain else scaling)


def facts(table: Family, config: dict[str, Any], model: Model) -> dict[str, Any]:
    spec = Spec.read(table, Config(config), model)
    spec = replace(spec, rope=rope(spec.rope), rope_near=rope(spec.rope_near))
    found = {field.name: getattr(spec, field.name) for field in fields(spec)}
    if "attn.kv_a" not in model.tensors:
        del found["eps_latent"]
    return {key: None if key.endswith("_factor") and value == 1.0 else value for key, value in found.items()}


@pytest.mark.parametrize("family", sorted(runnable()))
def test_what_config_json_leaves_out_is_what_transformers_takes(family: str) -> None:
    source = open_source(checkpoint(runnable()[family].name))
    table = families.load(family)
    short = {key: value for key, value in source.config.data.items() if key in said(table)}
    try:
        known = type(transformers.AutoConfig.for_model(short["model_type"]))
        whole = known.from_dict(dict(short)).to_dict()
    except (ValueError, StrictDataclassError) as error:  # or does not take a family without its keys
        pytest.skip(f"transformers: {error}"[:80])
    ours, theirs = (facts(table, config, source.layout.model) for config in (short, whole))
    assert {fact for fact, value in ours.items() if value != theirs[fact]} == OTHERWISE.get(family, set())
