"""Every option and argument of every command with values that nobody means: an answer in words, and no traceback."""

from __future__ import annotations

from pathlib import Path

import click
import pytest
from running import llama, reshard

from reshard.cli import cli

VALUES = ["", "nan", "1e400", "-1", "9" * 5000, "\udcff", "٣", "a" * 5000, ".."]
# What an option needs beside it to be looked at.
WITH = {
    "inspect": ("SRC",),
    "plan": ("SRC", "--tp", "2"),
    "convert": ("SRC", "OUT", "--tp", "2"),
    "verify": ("SHARDS",),
    "generate": ("nowhere", "--tokens", "1"),
    "fingerprint": ("SHARDS",),
    "explain": ("SHARDS", "embed"),
    "diff": ("SHARDS", "SHARDS"),
    "check-table": ("llama", "--sample", "1"),
}
SLOW = {"--sample", "--with"}  # of check-table: each value that is none of the wrong ones takes a second


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    source = llama(tmp_path_factory.mktemp("hostile") / "model")
    assert reshard("convert", source, source.parent / "shards", "--tp", "2").code == 0
    return source.parent


def cases(name: str) -> list[tuple[str, ...]]:
    """The words of a command with each option, and each argument, of each value."""
    found: list[tuple[str, ...]] = []
    before = list(WITH)[: list(WITH).index(name)]
    # options that are the same everywhere
    seen = {parameter.opts[0] for other in before for parameter in cli.commands[other].params}
    usual = WITH[name]
    arguments = 0
    for parameter in cli.commands[name].params:
        if isinstance(parameter, click.Argument) and name != "generate":  # which would start ranks
            found += [(*usual[:arguments], value, *usual[arguments + 1 :]) for value in VALUES]
            arguments += 1
        elif isinstance(parameter, click.Option) and not parameter.is_flag and parameter.opts[0] not in SLOW | seen:
            found += [(*usual, parameter.opts[0], value) for value in VALUES]
    return found


@pytest.mark.parametrize("name", list(WITH))
def test_no_value_of_an_option_makes_a_traceback(
    name: str, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    names = {"SRC": str(place / "model"), "SHARDS": str(place / "shards")}
    for number, words in enumerate(cases(name)):
        said = [name, *(names.get(word, word) for word in words)]
        said = [f"out-{number}" if word == "OUT" else word for word in said]
        done = reshard(*said)
        assert done.code in (0, 2, 3), (said, done)
        assert done.code == 0 or done.err.startswith(("error: ", "Usage: ")), (said, done)


NUMBERS = [
    *(("plan", "SRC", "--tp", "2", option) for option in ("--pp", "--ep", "--context", "--batch", "--workers")),
    ("plan", "SRC", "--tp"),
    ("fingerprint", "SHARDS", "--rank"),
    *(
        ("generate", "nowhere", "--tokens", "1", option)
        for option in ("--tp", "--pp", "--ep", "--max-tokens", "--top-k", "--seed")
    ),
    *(("generate", "nowhere", "--tokens", "1", option) for option in ("--temperature", "--top-p", "--timeout")),
]


@pytest.mark.parametrize("words", NUMBERS, ids=lambda words: f"{words[0]} {words[-1]}")
def test_numbers_are_spelled_in_plain_digits(
    words: tuple[str, ...], place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    names = {"SRC": str(place / "model"), "SHARDS": str(place / "shards")}
    real = words[-1] in ("--temperature", "--top-p", "--timeout")
    for value in ("1_0", "\u0661", " 1", "\uff11", "\u00b2", "0x1", "nan", "inf", *([] if real else ["9" * 19])):
        done = reshard(*(names.get(word, word) for word in words), value)
        assert done.code == 2 and words[-1] in done.err and ("is not a valid" in done.err or words[0] == "plan"), (
            value,
            done,
        )
