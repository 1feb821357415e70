"""Printing: stdout carries data, stderr carries talk and progress. No other module of reshard prints."""

import json
import sys
from typing import TYPE_CHECKING, Any, TextIO

import click

from ..text.escapes import in_json, visible

if TYPE_CHECKING:
    from ..text.progress import Progress


class Talk:
    """Progress that ends in good order, whatever happens."""

    def __init__(self, kind: str, quiet: bool) -> None:
        from ..text.progress import reporter

        self.progress: Progress = reporter("none" if quiet and kind == "auto" else kind)  # type: ignore[arg-type]

    def __enter__(self) -> "Progress":
        return self.progress

    def __exit__(self, *_: object) -> None:
        self.progress.finish()


def show(data: dict[str, Any] | str, silent: bool = False) -> None:
    if not silent:
        _print(in_json(json.dumps(data, indent=1, ensure_ascii=False)) if isinstance(data, dict) else visible(data))


def say(quiet: bool, *lines: str) -> None:
    if not quiet:
        _print(visible("\n".join(lines)))


def _print(text: str) -> None:
    """To stdout. A reader that has gone away (`| head`) is no mismatch: as a shell has it, that is 128 + SIGPIPE."""
    try:
        click.echo(text)
    except BrokenPipeError:
        hush(sys.stdout)
        sys.exit(141)


def hush(stream: TextIO) -> None:
    """What a stream would not take is not tried again."""
    from ..text import progress

    progress.hush(stream)
