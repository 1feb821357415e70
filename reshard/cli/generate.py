"""`reshard generate`."""

import os
import re
import sys
from typing import Any

import click

from ..errors import ReshardError
from .exits import ended_by, fail


@click.command("generate", short_help="Run the model from its shards.")
@click.argument("out", metavar="OUT")
@click.option("--prompt", "-p", "texts", multiple=True, metavar="TEXT", help="A prompt; several are run together.")
@click.option("--prompts", "file", metavar="FILE", help="Prompts, one per line or JSON lines; - is stdin.")
@click.option("--tokens", multiple=True, metavar='"1 2 3"', help="A prompt as token ids.")
@click.option("--max-tokens", type=click.IntRange(1), default=128, show_default=True, metavar="N", help="New tokens per prompt, at most.")
@click.option("--temperature", type=float, metavar="T", help="0 is greedy (default: what generation_config.json says, else greedy).")
@click.option("--top-k", type=int, metavar="K", help="Draw from the K likeliest tokens.")
@click.option("--top-p", type=float, metavar="P", help="Draw from the likeliest tokens that together have probability P.")
@click.option("--seed", type=int, default=0, show_default=True, metavar="N", help="The same seed draws the same text, on any mesh.")
@click.option("--chat/--no-chat", default=None, help="Put prompts into the chat template (default: where there is one).")
@click.option("--tp", type=int, metavar="N", help="Tensor parallel ranks, where they are to be others than those of OUT.")
@click.option("--pp", type=int, default=1, metavar="N", help="Pipeline stages.")
@click.option("--ep", type=int, default=1, metavar="N", help="Expert parallel groups; divides --tp.")
@click.option("--dtype", type=click.Choice(["float32", "bfloat16", "float16"]), help="Compute in another type than the stored one.")
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True, help="Where to run; cuda: a GPU per rank.")
@click.option("--hash", "hashed", is_flag=True, help="Compare the shards with their digests first.")
@click.option(
    "--timeout",
    type=click.FloatRange(0.1),
    default=60.0,
    show_default=True,
    metavar="S",
    help="A rank that is lost ends the job within this.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object when all is done, instead of text as it comes.")
@click.option("--quiet", "-q", is_flag=True, help="No account on stderr.")
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

    The text goes to stdout as it comes, rates and memory to stderr. Under torchrun this is one rank of the job:
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
            raise ReshardError(f"--tokens {ids}: token ids are needed, numbers from 0 on", 'for example --tokens "1 2 3"')
        prompts.append(list(map(int, words)))
    if bool(prompts) == (file is not None):
        raise ReshardError(
            "prompts are given twice: --prompts FILE, and others" if prompts else "there is no prompt",
            '--prompt "…", --tokens "…" or --prompts FILE',
        )
    mesh = None if (tp, pp, ep) == (None, 1, 1) else Mesh(1 if tp is None else tp, pp, ep)
    given |= {"most": given.pop("max_tokens"), "verify": "hash" if hashed else None}
    job = import_module("reshard.runtime.job")
    try:
        job.start(
            job.Job(
                local(out, "a model to run"), tuple(prompts) or None, file and os.fspath(local(file, "prompts")), mesh, **given, began=began
            )
        )
    except KeyboardInterrupt as error:
        fail("interrupted", None, ended_by(error))
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
