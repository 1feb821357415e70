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
@click.option("--overwrite", is_flag=True, help="Write, and replace what is in OUT once the new is complete.")
@click.option("--checksum", is_flag=True, help="Re-run: compare all of the source with OUT, not a sample of each tensor.")
@click.option("--no-check", is_flag=True, help="Re-run: do not read OUT to see that it is whole.")
@click.option("--sha256", is_flag=True, help="Record the SHA-256 of every source file (one more read); a finished OUT gets them added.")
@click.option(
    "--fsync/--no-fsync", default=True, help="Have everything on the device before publishing it, against power cuts (default), or not."
)
@options.talk
def command(src: str, out: str, as_json: bool, progress_kind: str, quiet: bool, **given: Any) -> None:
    """Write shards for a mesh, or Hugging Face files (--to hf).

    Re-running a finished conversion is a no-op, exit 0: OUT is read once to see that it is whole (exit 1 if it is damaged; --no-check
    leaves that out), and is compared with a sample of each source tensor, or with every byte where times differ. A destination with
    anything else in it is refused. --overwrite always writes.
    """
    from .. import api

    if given["pp"] == 1 and all(given[option] is None for option in ("tp", "split", "pp_layers", "to")):
        raise ReshardError("how many ranks? neither --tp nor --to was given", "--tp 8 for shards; --to hf for Hugging Face files")
    from ..jobs.plan import said
    from ..store import publish

    publish.published = None
    try:
        with Talk(progress_kind, quiet) as progress:
            result = api.convert(src, out, **options.arguments(given), progress=progress)
        deaf()  # what is left is to say so
    except KeyboardInterrupt:
        if publish.published is None:
            raise
        click.echo(visible(f"{out}: is complete; the signal to stop came too late"), err=True)
        return
    if as_json:
        show(result.to_json())
        return
    say(quiet, *result.lines(src, *said(given["revision"], given["family"])))
