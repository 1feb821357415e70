"""A number in a name is written with the digits 0 to 9, in one way:
no two stored names are ever taken for one tensor.
"""

from __future__ import annotations

import re
from contextlib import suppress
from pathlib import Path

import pytest
from running import LLAMA, ROOT, llama, llama_tensors, noise, refused, reshard

from reshard.checkpoints.hf_split import loaded_order
from reshard.checkpoints.published import natural
from reshard.errors import ReshardError
from reshard.inputs.limits import numeral
from reshard.tables.expression import parse
from reshard.tables.notation import fold, parse_pattern

# Python's own words for "digit" also mean those of other scripts, and superscripts, some of which int() reads and some
# not.
LOOSE = re.compile(r"\\d|\.(isdigit|isdecimal|isnumeric)\(|str\.(isdigit|isdecimal|isnumeric)")
SPELLINGS = [
    "\u0661",
    "\u00b2",
    "\uff11",
    "\U0001d7cf",
    "01",
    "+1",
    "-1",
    "1_0",
    " 1",
    "1 ",
    "1\n",
    "0x1",
    "1e0",
    "9" * 5000,
    "0" * 5000,
]


def test_the_sources_ask_for_digits_by_name() -> None:
    """`[0-9]` or `limits.numeral`, never `\\d` or `isdigit`: these take digits of other scripts for numbers."""
    found = []
    for folder in ("reshard", "runtime", "docs", "scripts"):
        for path in sorted(p for p in (ROOT / folder).rglob("*") if p.suffix in (".py", "") and p.is_file()):
            lines = path.read_text(encoding="utf-8").splitlines()
            found += [
                f"{path.relative_to(ROOT)}:{n}: {line.strip()}" for n, line in enumerate(lines, 1) if LOOSE.search(line)
            ]
    assert not found, "write [0-9], or use reshard.inputs.limits.numeral:\n" + "\n".join(found)


@pytest.mark.parametrize("text", SPELLINGS)
def test_only_one_spelling_of_a_number_is_one(text: str) -> None:
    name = f"model.layers.{text}.self_attn.q_proj.weight"
    assert numeral(text) is None or text == str(numeral(text))
    folded = fold(name)
    assert folded == (name, ())
    natural(name), loaded_order([name, "a.1"])
    with pytest.raises(ReshardError):
        parse_pattern(f"hidden/{text}x", {})
    with suppress(ReshardError):
        assert parse(text).size(lambda _: None) in (None, 1)


def test_numbers_fold_and_come_back() -> None:
    for text, value in (("0", 0), ("1", 1), ("10", 10), ("999999999", 999_999_999)):
        assert fold(f"a.{text}.b") == ("a.{}.b", (value,)) and numeral(text) == value
    assert sorted(["a-10", "a-9", "a-x"], key=natural) == ["a-9", "a-10", "a-x"]


@pytest.mark.parametrize("text", [text for text in SPELLINGS if text.isprintable()])
def test_a_second_name_for_a_tensor_is_refused(text: str, tmp_path: Path) -> None:
    """layers.1 and layers.١ in one file: neither counts for the other, the odd one is named, nothing is written."""
    name = f"model.layers.{text}.self_attn.q_proj.weight"
    shape = llama_tensors()["model.layers.1.self_attn.q_proj.weight"][1]
    source = llama(tmp_path / "source", llama_tensors() | {name: noise("BF16", *shape, seed=7)})
    for words in (("plan", source, "--tp", "2"), ("convert", source, tmp_path / "out", "--tp", "2")):
        refused(reshard(*words), 2, "no row claims model.layers.", "q_proj")
    assert "no row claims model.layers." in reshard("inspect", source).out
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("text", ["\u0661", "\u00b2", "01", "9" * 5000])
def test_an_odd_number_alone_is_no_number(text: str, tmp_path: Path) -> None:
    """Instead of layers.1: what is missing is said, and what is there."""
    tensors = {name.replace("layers.1.", f"layers.{text}."): value for name, value in llama_tensors().items()}
    source = llama(tmp_path / "source", tensors)
    refused(reshard("convert", source, tmp_path / "out", "--tp", "2"), 2, "no row claims model.layers.")


def test_two_names_at_one_place_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever folding does, of two names that lead to one place of a table neither overwrites the other."""
    from reshard.model import understand

    monkeypatch.setattr(understand, "fold", lambda name: fold(name.replace("layers.x1", "layers.1")))
    name = "model.layers.x1.self_attn.q_proj.weight"
    shape = llama_tensors()["model.layers.1.self_attn.q_proj.weight"][1]
    source = llama(tmp_path / "source", llama_tensors() | {name: noise("BF16", *shape, seed=7)})
    refused(reshard("plan", source, "--tp", "2"), 2, "two stored names", "layers.x1", "layers.1.")


@pytest.mark.parametrize("tp", ["\u0662", "2_0", "+2", " 2", "\u00b2", "9" * 5000])
def test_a_number_of_ranks_is_written_with_digits(tp: str, tmp_path: Path) -> None:
    refused(reshard("plan", llama(tmp_path / "source"), "--tp", tp), 2, "--tp")


def test_config_keys_are_compared_with_plain_numbers() -> None:
    from reshard.tables.config import Config

    assert Config({"a": 1}).says("a == 1")
    for digit in ("\u0661", "\u00b2"):
        with pytest.raises(ReshardError, match="is not an expression"):
            Config({"a": 1}).says(f"a == {digit}")
    assert LLAMA["num_hidden_layers"]
