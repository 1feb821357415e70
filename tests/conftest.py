"""What several test modules share: the checkpoints, each built once per machine."""

import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from fixtures import checkpoint as cached

# A shell that starts the tests in the background has them ignore SIGINT, and so would every process that a test interrupts.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def checkpoint() -> Callable[[str], Path]:
    """The directory of a fixture by name; shared by all tests, so never written to (`fixtures.copy` gives a private one)."""
    return cached
