"""What several test modules share: the checkpoints, each built once per machine."""

from collections.abc import Callable
from pathlib import Path

import pytest
from fixtures import checkpoint as cached


@pytest.fixture(scope="session")
def checkpoint() -> Callable[[str], Path]:
    """The directory of a fixture by name; shared by all tests, so never written to (`fixtures.copy` gives a private one)."""
    return cached
