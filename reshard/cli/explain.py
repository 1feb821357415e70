"""`reshard explain`."""

import click

from . import options
from .output import show


@click.command("explain", short_help="Show what an element is and where it came from.")
@click.argument("out", metavar="OUT")
@click.argument("element", metavar="ELEMENT")
@options.source
@options.talk
def command(
    out: str,
    element: str,
    revision: str | None,
    family: str | None,
    as_json: bool,
    progress_kind: str,
    quiet: bool,
) -> None:
    """Show where ELEMENT is stored, which logical element it is, and where it came from (or, in the original, went to).

    \b
    3:layers.7.attn.qkv[700,12]                  in a tensor that rank 3 stores
    model.layers.7.self_attn.k_proj.weight[3,4]  in a tensor of the original
    attn.k[7,0,3,4]                              in a logical tensor
    model.norm.weight                            a whole tensor
    """
    from .. import api

    found = api.explain(out, element, revision=revision, family=family)
    show(found.to_json() if as_json else "\n".join(found.lines()))
