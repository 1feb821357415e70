"""`reshard plan`."""

from typing import Any

import click

from . import options
from .output import show


@click.command("plan", short_help="Dry run: bytes per rank, disk and memory needed.")
@click.argument("src", metavar="SRC")
@options.mesh
@options.device
@options.source
@options.workers
@options.talk
def command(src: str, as_json: bool, progress_kind: str, quiet: bool, **given: Any) -> None:
    """Dry run: bytes per rank, how each layer is stored, disk and memory needed, TP sizes that work."""
    from .. import api

    report = api.plan(src, **options.arguments(given))
    show(report.to_json() if as_json else report.text(), quiet and not as_json)
