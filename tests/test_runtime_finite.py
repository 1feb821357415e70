"""What is not finite is told, with the step that is the first to give it: no token is chosen by such logits,
and no proof made of them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from fixtures import FIXTURES, State, configure, copy, rewrite
from running import process, refused, sign

import reshard as api
from reshard.layout.mesh import Mesh
from reshard.runtime.comm.threads import run_threads
from reshard.runtime.generate import Generated, Options, generate
from reshard.runtime.load import load_model
from reshard.runtime.model.finite import NotFinite
from reshard.runtime.sampling import Sampling

Get = Callable[[str], Path]
MESHES = {"tp1": Mesh(1), "tp2": Mesh(2), "pp2": Mesh(1, 2), "tp2 pp2": Mesh(2, 2)}
WAYS = {"greedy": Sampling(), "sampled": Sampling(0.8, 0, 0.9)}


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def changed(
    directory: Path, edit: Callable[[str, torch.Tensor], torch.Tensor], name: str = "llama", dtype: str = "float16"
) -> Path:
    """A copy of a checkpoint in a dtype, with tensors edited one by one."""
    source = copy(name, directory)

    def every(state: State) -> State:
        return {name: edit(name, tensor.to(getattr(torch, dtype))) for name, tensor in state.items()}

    rewrite(source, every)
    configure(source, dtype=dtype)
    return source


LAST = FIXTURES["llama"].layers - 1
PROMPTS = ([1, 2, 3], [4, 5, 6, 7, 8])


def loud(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """The feed-forward of the last layer gives more than float16 has, by weights that it has."""
    return tensor * 1000 if f"layers.{LAST}.mlp.up" in name or f"layers.{LAST}.mlp.down" in name else tensor


@pytest.fixture(scope="module")
def overflowing(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return changed(tmp_path_factory.mktemp("overflow") / "model", loud)


def run(
    source: Path, mesh: Mesh, sampling: Sampling = WAYS["greedy"], dtype: Any = None, ids: Sequence[list[int]] = PROMPTS
) -> list[Any]:
    """What each rank generates, or the error that it raises."""

    def work(world: Any) -> Generated | NotFinite:
        try:
            return generate(load_model(source, dtype, mesh=mesh, world=world), ids, Options(4, sampling))
        except NotFinite as error:
            return error

    return run_threads(mesh.world, work)


def said(found: list[Any]) -> tuple[str, str | None]:
    """The one error that all ranks raise."""
    assert all(isinstance(error, NotFinite) and error.exit_code == 2 for error in found), found
    (words,) = {(error.message, error.hint) for error in found}
    return words


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("mesh", MESHES)
def test_what_overflows_is_refused_on_all_ranks_in_the_same_words(overflowing: Path, mesh: str, way: str) -> None:
    message, hint = said(run(overflowing, MESHES[mesh], WAYS[way]))
    rank = {"tp1": 0, "tp2": 0, "pp2": 1, "tp2 pp2": 2}[mesh]
    where = f"layer {LAST}, feed-forward, rank {rank}, is the first to give (inf|nan), at token 1"
    assert re.fullmatch(f"prompt 1: the logits after token 3 are not finite in float16: {where}", message)
    assert "--dtype bfloat16" in str(hint)


def test_the_remedy_is_one(overflowing: Path) -> None:
    (done,) = run(overflowing, Mesh(1), dtype=torch.bfloat16)
    assert [len(tokens) for tokens in done.tokens] == [4, 4]


@pytest.mark.parametrize("options", [(), ("--temperature", "0.8", "--top-p", "0.9")])
def test_the_command_refuses_once_and_without_a_traceback(overflowing: Path, options: tuple[str, ...]) -> None:
    done = process("generate", overflowing, "--tokens", "1 2 3", "--tp", "2", *options)
    refused(done, 2, "prompt 1", "float16", f"layer {LAST}, feed-forward, rank 0", "hint: ", "--dtype bfloat16")
    assert done.err.count("not finite") == 1


def test_the_rank_whose_part_overflows_is_named(tmp_path: Path) -> None:
    def edit(name: str, tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor.clone()
        if f"layers.{LAST}.mlp.up" in name:  # the second half of what is inside
            tensor[len(tensor) // 2 :] *= 1000
        if f"layers.{LAST}.mlp.down" in name:
            tensor[:, tensor.shape[1] // 2 :] *= 1000
        return tensor

    source = changed(tmp_path / "model", edit)
    for mesh, rank in ((Mesh(1), 0), (Mesh(2), 1), (Mesh(2, 2), 3)):
        assert f"layer {LAST}, feed-forward, rank {rank}, is the first" in said(run(source, mesh))[0]


def poisoned(directory: Path, row: int, value: float, dtype: str = "bfloat16") -> Path:
    """One token is embedded as what is not finite."""

    def edit(name: str, tensor: torch.Tensor) -> torch.Tensor:
        if "embed_tokens" in name:
            tensor = tensor.clone()
            tensor[row] = value
        return tensor

    return changed(directory, edit, dtype=dtype)


@pytest.mark.parametrize(("value", "dtype"), [(float("inf"), "bfloat16"), (float("nan"), "float16")])
def test_a_weight_that_is_not_finite_is_named_with_the_prompt_and_its_token(
    tmp_path: Path, value: float, dtype: str
) -> None:
    source = poisoned(tmp_path / "model", 6, value, dtype)
    message, hint = said(run(source, Mesh(2)))
    words = (
        f"are not finite in {dtype}: the embedding, rank 0, is the first to give {value}, at token 3; its "
        f"embed holds {value}"
    )
    assert message == f"prompt 2: the logits after token 5 {words}"
    assert "embed is stored like that" in str(hint) and "bfloat16" not in str(hint)


def test_a_weight_that_does_not_fit_into_float16_is_no_fault_of_the_checkpoint(tmp_path: Path) -> None:
    source = poisoned(tmp_path / "model", 6, 1e30)
    message, hint = said(run(source, Mesh(1), dtype=torch.float16))
    assert "the embedding, rank 0, is the first to give inf, at token 3; its embed holds inf" in message
    assert "--dtype bfloat16" in str(hint)


def test_a_token_that_is_chosen_may_be_what_overflows(tmp_path: Path) -> None:
    (clean,) = run(changed(tmp_path / "clean", lambda _, tensor: tensor, dtype="bfloat16"), Mesh(1), ids=PROMPTS[:1])
    first = clean.tokens[0][0]
    assert first not in PROMPTS[0]
    message, _ = said(run(poisoned(tmp_path / "model", first, float("nan")), Mesh(1, 2), ids=PROMPTS[:1]))
    assert message.startswith(
        "prompt 1: the logits after token 4 are not finite in bfloat16: the embedding, rank 0, is the first"
    )


def test_no_prompt_gets_its_padding_from_a_token_that_is_not_its_own(tmp_path: Path) -> None:
    alone = run(source := poisoned(tmp_path / "model", 0, float("nan")), Mesh(1), ids=PROMPTS[:1])[0]
    assert run(source, Mesh(1))[0].tokens[0] == alone.tokens[0]


def test_no_temperature_is_too_low_to_sample_with() -> None:
    logits = torch.tensor([3.0, -2.0, 7.0, 6.9])
    assert [
        Sampling(temperature, 0, top_p).choose(logits, 0, 0) for temperature in (5e-324, 1e-300) for top_p in (1.0, 0.9)
    ] == [2] * 4


# The proof


def test_a_reference_that_overflows_in_the_stored_dtype_proves_nothing_there(overflowing: Path, tmp_path: Path) -> None:
    api.convert(overflowing, tmp_path / "out", tp=2)
    report = api.verify(tmp_path / "out", against=overflowing, only="numerics")
    (check,) = report.checks
    assert report.ok and check.skipped is None and not check.whole
    (note,) = (note for note in check.notes if "float16" in note)
    assert "the reference's logits are not finite at 336 of 336 tokens" in note and "--dtype bfloat16" in note
    assert "nan" not in "\n".join(report.lines())
    json.dumps(report.to_json(), allow_nan=False)


@pytest.mark.parametrize("layers", [False, True])
def test_shards_that_are_not_finite_where_the_reference_is_have_failed(
    checkpoint: Callable[[str], Path], tmp_path: Path, layers: bool
) -> None:
    out = tmp_path / "out"
    api.convert(checkpoint("llama"), out, tp=2)
    path, name = out / "rank-00001/model.safetensors", "layers.1.mlp.down"
    entry = next(t for t in json.loads((path.parent / "tensors.json").read_text())["tensors"] if t["name"] == name)
    with path.open("r+b") as file:
        file.seek(entry["offset"])
        file.write(torch.full((3,), torch.inf, dtype=torch.bfloat16).view(torch.uint8).numpy().tobytes())
    sign(out)
    report = api.verify(out, against=checkpoint("llama"), only="numerics", layers=layers)
    (failure,) = report.failures
    assert "layer 1, feed-forward" in failure and name in failure
    assert ("is not finite, the reference is" if layers else "rank 1, is the first to give") in failure
    json.dumps(report.to_json(), allow_nan=False)


def test_layer_by_layer_a_reference_that_is_not_finite_proves_nothing(tmp_path: Path) -> None:
    source = poisoned(tmp_path / "model", 6, float("nan"))
    api.convert(source, tmp_path / "out", tp=2)
    report = api.verify(tmp_path / "out", against=source, only="numerics", layers=True)
    assert report.ok and not report.checks[0].whole
    assert report.checks[0].notes[0].startswith("the embedding of the reference is not finite")
