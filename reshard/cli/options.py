"""Options that several commands share, and how their values reach the functions of the API."""

import re
from collections.abc import Callable
from typing import Any, TypeVar

import click

from ..errors import ReshardError
from ..inputs.limits import numeral

Command = TypeVar("Command", bound=Callable[..., Any])


def _numbers(separator: str) -> Callable[[click.Context, click.Parameter, str | None], tuple[int, ...] | None]:
    def parse(_: click.Context, option: click.Parameter, text: str | None) -> tuple[int, ...] | None:
        if text is None:
            return None
        parts = text.split(separator)
        if not all(re.fullmatch(r"\s*[0-9]{1,9}\s*", part) and int(part) for part in parts):
            raise ReshardError(
                f'{option.opts[0]} {text}: numbers from 1 on are needed, with "{separator}" between them', f"for example {option.metavar}"
            )
        return tuple(map(int, parts))

    return parse


def _ranks(_: click.Context, __: click.Parameter, text: str | None) -> int | str | None:
    if text is None or text == "auto":
        return text
    if (found := numeral(text)) is None:
        raise ReshardError(f'--tp {text}: a number of ranks is needed, 1 to 65536, or "auto"')
    return found


def _options(*options: Callable[[Command], Command]) -> Callable[[Command], Command]:
    def decorate(command: Command) -> Command:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


mesh = _options(
    click.option("--tp", callback=_ranks, metavar="N|auto", help="Tensor parallel ranks; auto: the fewest that fit --device-memory."),
    click.option("--pp", type=int, default=1, metavar="N", help="Pipeline stages."),
    click.option("--ep", type=int, default=1, metavar="N", help="Expert parallel groups; divides --tp."),
    click.option("--split", callback=_numbers(":"), metavar="3:3:2", help="Unequal tensor parallel ranks, by whole KV groups."),
    click.option(
        "--pp-layers", callback=_numbers(","), metavar="10,11,11", help="Layers of each stage (default: earlier ones get the extra)."
    ),
    click.option("--to", default=None, metavar="FORMAT", help="native (default), vllm, or hf: Hugging Face files."),
    click.option("--engine-version", metavar="V", help="Version of the engine that will load the format."),
    click.option(
        "--max-file-size", metavar="5GB", help="With --to hf: split anew, as transformers would, instead of restoring the originals."
    ),
    click.option("--no-pad", is_flag=True, help="Refuse to pad the vocabulary."),
    click.option("--no-repeat", is_flag=True, help="Refuse to repeat KV heads."),
)
device = _options(
    click.option("--device-memory", metavar="24GiB", help="Memory of one device: does it fit?"),
    click.option("--context", type=click.IntRange(1), metavar="TOKENS", help="Tokens per sequence in the KV cache."),
    click.option("--batch", type=click.IntRange(1), default=1, metavar="N", help="Sequences in the KV cache."),
)
source = _options(
    click.option("--revision", metavar="REV", help="Branch, tag or commit of a Hub id."),
    click.option("--family", metavar="NAME|FILE", help="Family table to use: a name, or your own TOML file."),
)
talk = _options(
    click.option("--json", "as_json", is_flag=True, help="Print the result as JSON."),
    click.option(
        "--progress", "progress_kind", type=click.Choice(["auto", "json", "none"]), default="auto", help="How to show progress, on stderr."
    ),
    click.option("--quiet", "-q", is_flag=True, help="Print nothing but results of --json, and errors."),
)
workers = click.option(
    "--workers", type=click.IntRange(1, 256), default=None, metavar="N", help="Threads (default: one per CPU, at most 8)."
)


def arguments(given: dict[str, Any]) -> dict[str, Any]:
    """Options as the functions of the API take them; what was not given is left to their defaults."""
    found = {name: value for name, value in given.items() if value is not None and not name.startswith("no_")}
    for option in ("pad", "repeat", "check"):
        if given.get(f"no_{option}"):
            found[option] = False
    return found
