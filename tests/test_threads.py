"""Work shared among threads: every item once, made when it is taken; a failure ends all and is raised."""

import threading
from collections.abc import Iterator

import pytest

from reshard.threads import each


def test_every_item_is_worked_on_once_by_so_many_threads() -> None:
    seen: list[int] = []
    together = threading.Barrier(3, timeout=30)

    def work(item: int) -> None:
        if item < 3:
            together.wait()  # as many at a time
        seen.append(item)

    each(range(100), work, 3)
    assert sorted(seen) == list(range(100))


def test_a_failure_is_raised_and_no_further_item_is_made() -> None:
    made: list[int] = []

    def items() -> Iterator[int]:
        for item in range(100):
            made.append(item)
            yield item

    def work(item: int) -> None:
        if item == 5:
            raise ValueError("five")

    with pytest.raises(ValueError, match="five"):
        each(items(), work, 1)
    assert made == list(range(6))
