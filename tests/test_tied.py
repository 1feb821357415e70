"""Tied embeddings where an engine ties by config.json; names with braces."""

from collections.abc import Callable
from pathlib import Path

import pytest

from reshard import tables
from reshard.conversion import Options, prepare
from reshard.errors import ReshardError
from reshard.mesh import Mesh
from reshard.model import Config, understand
from reshard.source import open_source


def test_both_stored_under_a_tied_config_are_refused_for_an_engine_that_ties(checkpoint: Callable[[str], Path]) -> None:
    """vLLM would find a name too many; over two stages each has a rank of its own, and native keeps both anyway."""
    source = open_source(checkpoint("qwen3_tied_stored"))
    with pytest.raises(ReshardError, match="tie_word_embeddings") as refused:
        prepare(source, "vllm", Mesh(tp=2), Options())
    assert "false" in (refused.value.hint or "")
    assert prepare(source, "native", Mesh(tp=2), Options()).plan.components
    names = {name for _, name in prepare(open_source(checkpoint("qwen3_tied")), "vllm", Mesh(tp=2), Options()).output.entries}
    assert "lm_head.weight" in names
    assert "model.embed_tokens.weight" not in names


def test_a_name_with_braces_is_no_row(checkpoint: Callable[[str], Path]) -> None:
    """A stored name that reads like a folded one is unclaimed, not an IndexError."""
    source = open_source(checkpoint("llama"))
    stored = {name: entry for name, (_, entry) in source.tensors.items()}
    stored["model.layers.{}.mlp.down_proj.weight"] = stored["model.layers.0.mlp.down_proj.weight"]
    with pytest.raises(ReshardError, match="no row claims"):
        understand(tables.load("families", "llama"), Config(source.config.data), stored)
