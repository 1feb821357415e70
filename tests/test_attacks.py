"""A few rounds of each attack on a conversion; `attacks.py` says what must hold after each."""

from __future__ import annotations

from pathlib import Path

import attacks


def test_the_nth_call_fails(tmp_path: Path) -> None:
    attacks.calls_fail(tmp_path, 4, 1)


def test_killed_before_the_nth_call(tmp_path: Path) -> None:
    attacks.kills(tmp_path, 3, 2)


def test_killed_and_killed_again(tmp_path: Path) -> None:
    attacks.kills(tmp_path, 2, 3, again=True)
