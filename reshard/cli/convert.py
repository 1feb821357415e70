"""`reshard convert`."""

from typing import Any

import click

from ..errors import ReshardError
from ..text.escapes import visible
from . import options
from .exits import deaf
from .output import Talk, say, show


@click.command("convert")
@click.argument("src", metavar="SRC")
@click.argument("out", metavar="OUT")
@options.mesh
@options.device
@options.source
@options.workers
@click.option("--overwrite", is_flag=True, help="Always write; replace OUT once the new output is complete.")
@click.option("--checksum", is_flag=True, help="On a re-run, compare all of the source with OUT, not just a sample.")
@click.option("--no-check", is_flag=True, help="On a re-run, skip checking OUT against its digests.")
@click.option("--sha256", is_flag=True, help="Record the SHA-256 of every source file, also in a finished OUT.")
@click.option(
    "--fsync/--no-fsync",
    default=True,
    help="Flush to disk before publishing, to survive power loss (default: yes).",
)
@options.talk
def command(src: str, out: str, as_json: bool, progress_kind: str, quiet: bool, **given: Any) -> None:
    """Write shards for a mesh, or Hugging Face files (--to hf).

    Re-running a finished conversion is a no-op (exit 0): OUT is checked against its digests (exit 1 if it is damaged;
    --no-check skips this) and against a sample of each source tensor, or every byte where file times differ. If OUT
    holds anything else, nothing is written; --overwrite replaces it.
    """
    from .. import api

    if given["pp"] == 1 and all(given[option] is None for option in ("tp", "split", "pp_layers", "to")):
        raise ReshardError("neither --tp nor --to was given", "--tp 8 for shards, --to hf for Hugging Face files")
    from ..jobs.plan import said
    from ..store import writable

    writable.published = None
    try:
        with Talk(progress_kind, quiet) as progress:
            result = api.convert(src, out, **options.arguments(given), progress=progress)
        deaf()  # it is published: only the result remains to be printed
    except KeyboardInterrupt:
        if writable.published is None:
            raise
        click.echo(visible(f"{out} is complete: it was published before the signal arrived"), err=True)
        return
    if as_json:
        show(result.to_json())
        return
    say(quiet, *result.lines(src, *said(given["revision"], given["family"])))
