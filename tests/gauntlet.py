"""What each family must get through, as functions of a directory and of meshes; `transformers` is the reference.
Knows no family.
"""

import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from fixtures import Fixture, checkpoint
from strategies import differing
from torch import Tensor

from reshard.checkpoints.source import open_source
from reshard.jobs import verify
from reshard.jobs.convert import Options, convert, prepare
from reshard.layout.mesh import Mesh
from reshard.runtime.comm.collectives import World
from reshard.runtime.comm.threads import run_threads
from reshard.runtime.load import load_model
from reshard.runtime.proof.bounds import TIMES
from reshard.store.destination import LocalDestination

OPTIONS = Options(workers=2)
# tokens; those of them that go through at once before the rest follow one by one; tokens generated
SEQ, SPLIT, MORE = 23, 9, 8


def convert_and_back(original: Path, meshes: Iterable[Mapping[str, Any]], scratch: Path) -> None:
    """Convert to every mesh, verify, merge, and reshape from the mesh before: the merge is the original,
    the reshape the conversion.
    """
    before: Path | None = None
    for number, arguments in enumerate(meshes):
        mesh, out = Mesh(**arguments), scratch / str(number)
        convert(prepare(open_source(original), "native", mesh, OPTIONS), LocalDestination(out), OPTIONS)
        report = verify.verify(out, open_source(original))
        assert report.ok and [check.name for check in report.checks if check.skipped is None] == [
            "integrity",
            "weights",
        ], (
            arguments,
            report,
        )
        merged = scratch / f"{number}-merged"
        convert(prepare(open_source(out), "hf", Mesh(), OPTIONS), LocalDestination(merged), OPTIONS)
        assert differing(original, merged) == [], arguments
        if before is not None:
            reshaped = scratch / f"{number}-reshaped"
            convert(prepare(open_source(before), "native", mesh, OPTIONS), LocalDestination(reshaped), OPTIONS)
            assert differing(out, reshaped) == [], arguments
        before = out


@dataclass(frozen=True)
class Reference:
    """Tokens [2, seq], transformers' logits of them in float32, its greedy tokens [2, more] after them,
    and its own change to float64.
    """

    ids: Tensor
    logits: Tensor
    tokens: Tensor
    own: float


def reference(directory: Path, given: Callable[[Tensor], dict[str, Any]] = lambda ids: {}) -> Reference:
    """What transformers makes of a checkpoint. `given`: what its forward takes besides these tokens."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    known = AutoConfig.from_pretrained(directory)
    loader = AutoModelForCausalLM if type(known) in MODEL_FOR_CAUSAL_LM_MAPPING else AutoModelForImageTextToText
    alibi = getattr(known, "alibi", False)  # which Falcon's eager attention adds twice
    how = {"attn_implementation": None if alibi else "eager", "experts_implementation": "eager"}
    logits = {}
    for dtype in (torch.float64, torch.float32):
        model = loader.from_pretrained(directory, dtype=dtype, **how)
        ids = torch.randint(
            3, model.config.get_text_config().vocab_size, (2, SEQ), generator=torch.Generator().manual_seed(1)
        )
        with torch.no_grad():
            logits[dtype] = model.eval()(ids, **given(ids)).logits
    longer = ids
    with torch.no_grad():
        for _ in range(MORE):
            longer = torch.cat((longer, model(longer, **given(longer)).logits[:, -1:].argmax(-1)), 1)
    own = (logits[torch.float32].double() - logits[torch.float64]).abs().max().item()
    return Reference(ids, logits[torch.float32], longer[:, SEQ:], own)


def reference_of(fixture: Fixture) -> Reference:
    """What transformers makes of a fixture, or of its twin where it does not have this one."""
    if fixture.twin is None:
        return reference(checkpoint(fixture.name), fixture.given or (lambda ids: {}))
    with tempfile.TemporaryDirectory() as directory:
        fixture.twin(Path(directory))
        return reference(Path(directory), fixture.given or (lambda ids: {}))


def run_meshes(fixture: Fixture, every: bool) -> list[Mesh]:
    """Meshes of threads to run a fixture on: all that it lies on, or one."""
    if not every:
        return [Mesh(tp=2, ep=2)] if 2 in fixture.ep else [Mesh(tp=2, pp=2)]
    found = [Mesh(tp=tp) for tp in fixture.tp] + [Mesh(pp=2), Mesh(tp=2, pp=2)]
    found += [Mesh(tp=3, weights=(2, 1, 1))] if fixture.weights else []
    return found + [Mesh(tp=tp, ep=2) for tp in (2, 4) if tp in fixture.tp and 2 in fixture.ep]


def run_like(directory: Path, mesh: Mesh, wanted: Reference) -> None:
    """Logits whole and token by token within TIMES the reference's own change, and its greedy tokens,
    on a mesh of threads.
    """

    def work(world: World) -> tuple[Tensor, Tensor, Tensor]:
        decoder = load_model(directory, torch.float32, mesh=mesh, world=world)
        whole = decoder(wanted.ids, all_ranks=True)
        kept = decoder.new_cache(2, SEQ + MORE)
        parts = [wanted.ids[:, :SPLIT], *wanted.ids[:, SPLIT:].split(1, 1)]
        stepwise = torch.cat([decoder(part, cache=kept, all_ranks=True) for part in parts], 1)
        tokens = [stepwise[:, -1:].argmax(-1)]
        for _ in range(MORE - 1):
            tokens.append(decoder(tokens[-1], cache=kept, all_ranks=True).argmax(-1))
        return whole, stepwise, torch.cat(tokens, 1)

    for whole, stepwise, tokens in run_threads(mesh.world, work, 120):
        off = (whole - wanted.logits).abs().max().item()
        assert off <= TIMES * wanted.own, (mesh, f"{off / wanted.own:.1f} × the reference's own change")
        again = (stepwise - wanted.logits).abs().max().item()
        assert again <= TIMES * wanted.own, (
            mesh,
            f"token by token: {again / wanted.own:.1f} × the reference's own change",
        )
        assert torch.equal(tokens, wanted.tokens), mesh
