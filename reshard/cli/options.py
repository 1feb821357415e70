"""Options shared by several commands, and how their values become arguments of the API."""

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
                f'{option.opts[0]} {text}: expected positive integers separated by "{separator}"',
                f"for example {option.metavar}",
            )
        return tuple(map(int, parts))

    return parse


def _ranks(_: click.Context, __: click.Parameter, text: str | None) -> int | str | None:
    if text is None or text == "auto":
        return text
    if (found := numeral(text)) is None:
        raise ReshardError(f'--tp {text}: expected a number of ranks, 1 to 65536, or "auto"')
    return found


def _options(*options: Callable[[Command], Command]) -> Callable[[Command], Command]:
    def decorate(command: Command) -> Command:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


mesh = _options(
    click.option("--tp", callback=_ranks, metavar="N|auto", help="Tensor-parallel size; auto: the smallest that fits."),
    click.option("--pp", type=int, default=1, metavar="N", help="Pipeline-parallel size."),
    click.option("--ep", type=int, default=1, metavar="N", help="Expert-parallel size; must divide --tp."),
    click.option(
        "--split",
        callback=_numbers(":"),
        metavar="3:3:2",
        help="Uneven tensor-parallel split, in KV groups.",
    ),
    click.option(
        "--pp-layers",
        callback=_numbers(","),
        metavar="10,11,11",
        help="Layers per pipeline stage (default: as even as possible).",
    ),
    click.option(
        "--to",
        default=None,
        metavar="FORMAT",
        help="Output format: native (default), vllm, or hf (Hugging Face files).",
    ),
    click.option("--engine-version", metavar="V", help="Version of the engine that will load the shards."),
    click.option(
        "--max-file-size",
        metavar="5GB",
        help="With --to hf: split files as transformers would, not as the original.",
    ),
    click.option("--no-pad", is_flag=True, help="Fail instead of padding the vocabulary."),
    click.option("--no-repeat", is_flag=True, help="Fail instead of replicating KV heads."),
)
device = _options(
    click.option("--device-memory", metavar="24GiB", help="Memory of one device: report whether the model fits."),
    click.option("--context", type=click.IntRange(1), metavar="TOKENS", help="Context length, to size the KV cache."),
    click.option("--batch", type=click.IntRange(1), default=1, metavar="N", help="Batch size, to size the KV cache."),
)
source = _options(
    click.option("--revision", metavar="REV", help="Branch, tag or commit of a Hub repository."),
    click.option("--family", metavar="NAME|FILE", help="Family table: a shipped one's name, or a TOML file."),
)
talk = _options(
    click.option("--json", "as_json", is_flag=True, help="Print the result as JSON."),
    click.option(
        "--progress",
        "progress_kind",
        type=click.Choice(["auto", "json", "none"]),
        default="auto",
        help="Progress format on stderr.",
    ),
    click.option("--quiet", "-q", is_flag=True, help="Print only errors, failures and --json results."),
)
workers = click.option(
    "--workers",
    type=click.IntRange(1, 256),
    default=None,
    metavar="N",
    help="Worker threads (default: one per CPU, at most 8).",
)


def arguments(given: dict[str, Any]) -> dict[str, Any]:
    """Options as arguments of the API; those not given are left to its defaults."""
    found = {name: value for name, value in given.items() if value is not None and not name.startswith("no_")}
    for option in ("pad", "repeat", "check"):
        if given.get(f"no_{option}"):
            found[option] = False
    return found
