"""`reshard generate`."""

import os
import re
import sys
from typing import Any

import click

from ..containers.dtypes import COMPUTED
from ..errors import ReshardError
from .exits import ended_by, fail
from .options import Real, Whole


@click.command("generate", short_help="Run the model from its shards.")
@click.argument("out", metavar="OUT")
@click.option("--prompt", "-p", "texts", multiple=True, metavar="TEXT", help="A prompt; several run as one batch.")
@click.option("--prompts", "file", metavar="FILE", help="File of prompts, one per line or JSON lines; - is stdin.")
@click.option("--tokens", multiple=True, metavar='"1 2 3"', help="A prompt as token ids.")
@click.option(
    "--max-tokens",
    type=Whole(1),
    default=128,
    show_default=True,
    metavar="N",
    help="Maximum new tokens per prompt.",
)
@click.option(
    "--temperature",
    type=Real(),
    metavar="T",
    help="0 is greedy (default: from generation_config.json, else greedy).",
)
@click.option("--top-k", type=Whole(), metavar="K", help="Sample from the K most likely tokens.")
@click.option("--top-p", type=Real(), metavar="P", help="Sample from the most likely tokens with total probability P.")
@click.option(
    "--seed",
    type=Whole(),
    default=0,
    show_default=True,
    metavar="N",
    help="The same seed gives the same text, on any mesh.",
)
@click.option("--chat/--no-chat", default=None, help="Apply the chat template to prompts (default: if there is one).")
@click.option("--tp", type=Whole(), metavar="N", help="Tensor-parallel size (default: OUT's mesh).")
@click.option("--pp", type=Whole(), default=1, metavar="N", help="Pipeline-parallel size.")
@click.option("--ep", type=Whole(), default=1, metavar="N", help="Expert-parallel size; must divide --tp.")
@click.option(
    "--dtype",
    type=click.Choice(COMPUTED),
    help="Compute in this dtype (default: as stored).",
)
@click.option(
    "--device",
    type=click.Choice(["cpu", "cuda"]),
    default="cpu",
    show_default=True,
    help="Device to run on; cuda: one GPU per rank.",
)
@click.option("--hash", "hashed", is_flag=True, help="Check the shards against their digests first.")
@click.option(
    "--timeout",
    type=Real(0.1),
    default=60.0,
    show_default=True,
    metavar="S",
    help="End the job within S seconds of losing a rank.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object at the end instead of streaming text.")
@click.option("--quiet", "-q", is_flag=True, help="No report on stderr.")
def command(
    out: str,
    texts: tuple[str, ...],
    file: str | None,
    tokens: tuple[str, ...],
    tp: int | None,
    pp: int,
    ep: int,
    hashed: bool,
    **given: Any,
) -> None:
    """Generate text with the model in OUT, a shard directory or a published checkpoint, one process per rank.

    Text streams to stdout; throughput and memory go to stderr. Under torchrun, each process is one rank of the job:
    torchrun --nproc-per-node N -m reshard.runtime generate OUT …
    """
    import time
    from importlib import import_module

    began = time.monotonic()
    from ..layout.mesh import Mesh
    from ..store.location import local

    prompts: list[str | list[int]] = list(texts)
    for ids in tokens:
        words = re.split(r"[\s,]+", ids.strip(" ,"))
        if not all(re.fullmatch("[0-9]{1,9}", word) for word in words):
            raise ReshardError(f"--tokens {ids}: expected token ids, integers from 0", 'for example --tokens "1 2 3"')
        prompts.append(list(map(int, words)))
    if bool(prompts) == (file is not None):
        raise ReshardError(
            "--prompts FILE does not go with --prompt or --tokens" if prompts else "no prompt was given",
            '--prompt "…", --tokens "…" or --prompts FILE',
        )
    mesh = None if (tp, pp, ep) == (None, 1, 1) else Mesh(1 if tp is None else tp, pp, ep)
    given |= {"most": given.pop("max_tokens"), "verify": "hash" if hashed else None}
    job = import_module("reshard.runtime.job")
    try:
        job.start(
            job.Job(
                local(out, "a model to run"),
                tuple(prompts) or None,
                file and os.fspath(local(file, "prompts")),
                mesh,
                **given,
                began=began,
            ),
        )
    except KeyboardInterrupt as error:
        fail("interrupted", None, ended_by(error))
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
