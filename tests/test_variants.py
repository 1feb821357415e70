"""Settings that no fixture has, of models that transformers writes: each converts, comes back, and runs as transformers
runs it.

A setting is a fixture's config.json with changes; GONE are keys that transformers can do without, once it has written
the model. All of them were found wrong once.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from fixtures import checkpoint, configure, write
from gauntlet import convert_and_back, reference, run_like

from reshard.checkpoints.source import open_source
from reshard.errors import ReshardError
from reshard.layout.mesh import Mesh
from reshard.runtime.model.spec import Spec
from reshard.tables import families

transformers = pytest.importorskip("transformers")

GONE = object()
YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 7}
PLAIN = {"rope_type": "default", "rope_theta": 10000.0}

SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "a part that is rotated, which nobody reads": (
        "llama",
        {"rope_parameters": PLAIN | {"partial_rotary_factor": 0.5}},
    ),
    "an activation other than the first release's": ("gemma", {"hidden_act": "silu"}),
    "an activation that has no weights": ("apertus", {"hidden_act": "gelu"}),
    "a soft cap that nobody reads": ("gemma3_text", {"attn_logit_softcapping": 3.0}),
    "groups of experts, yet the best of all": ("deepseek_v2_lite", {"n_group": 2, "topk_method": "greedy"}),
    "scores as they are": ("gpt2", {"scale_attn_weights": False}),
    "windows where none rotate": (
        "smollm3",
        {
            "use_sliding_window": True,
            "sliding_window": 5,
            "layer_types": GONE,
            "no_rope_layers": GONE,
            "no_rope_layer_interval": 2,
        },
    ),
    "windows where none rotate, listed": (
        "smollm3_listed",
        {"use_sliding_window": True, "sliding_window": 5, "layer_types": GONE},
    ),
    "windows in some of the first layers": (
        "qwen2_moe",
        {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 2, "layer_types": GONE},
    ),
    "queries that grow, in the words of transformers 4": (
        "ministral3",
        {"rope_parameters": GONE, "rope_theta": 10000.0, "rope_scaling": YARN | {"llama_4_scaling_beta": 0.3}},
    ),
    "always two experts": ("phimoe", {"num_experts_per_tok": 3}),
}


def written(name: str, changes: dict[str, Any], directory: Path) -> Path:
    """A checkpoint as the fixture would be with these changes."""
    gone = [key for key, value in changes.items() if value is GONE]
    data = json.loads((checkpoint(name) / "config.json").read_text()) | {
        k: v for k, v in changes.items() if v is not GONE
    }
    known = type(transformers.AutoConfig.for_model(data["model_type"]))
    write(directory, name, known.from_dict({key: value for key, value in data.items() if key not in gone}))
    configure(directory, *gone)
    return directory


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_setting_converts_and_runs_as_transformers_runs_it(setting: str, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    original = written(*SETTINGS[setting], tmp_path / "model")
    convert_and_back(original, [{"tp": 2, "pp": 2}], tmp_path)
    run_like(original, Mesh(tp=2), reference(original))


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("gemma4_moe", {"use_bidirectional_attention": "all"}, "runs only with !use_bidirectional_attention"),
        ("bloom", {"slow_but_exact": True, "pretraining_tp": 2}, "runs only with !slow_but_exact"),
    ],
)
def test_a_setting_that_does_not_run_says_so_and_converts(
    name: str, changes: dict[str, Any], words: str, tmp_path: Path
) -> None:
    original = written(name, changes, tmp_path / "model")
    convert_and_back(original, [{"tp": 2}], tmp_path)
    source = open_source(original)
    with pytest.raises(ReshardError, match=words):
        Spec.of(families.load(source.layout.model.family.name), source.config, source.layout.model)
