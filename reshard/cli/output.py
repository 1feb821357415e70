"""Printing: data on stdout, messages and progress on stderr."""

import json
import sys
from typing import TYPE_CHECKING, Any, TextIO

import click

from ..text.escapes import in_json, visible

if TYPE_CHECKING:
    from ..text.progress import Progress


class Talk:
    """Progress that is closed whatever happens."""

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
    """To stdout. If the reader has gone away (`| head`), exit with 128 + SIGPIPE as a shell would;
    1 means a mismatch.
    """
    try:
        click.echo(text)
    except BrokenPipeError:
        hush(sys.stdout)
        sys.exit(141)


def hush(stream: TextIO) -> None:
    """Drop what a stream did not accept, so that the interpreter does not try again at exit."""
    from ..text import progress

    progress.hush(stream)
