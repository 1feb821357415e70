"""What several test modules share: the checkpoints, each built once per machine."""

import signal
from collections.abc import Callable, Generator
from pathlib import Path

import pytest
from fixtures import checkpoint as cached

# Tests in the background ignore SIGINT, those under nohup SIGHUP, and so would every process that a test signals: what
# is ignored is inherited, what is handled is not.
signal.signal(signal.SIGINT, signal.default_int_handler)
if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
    signal.signal(signal.SIGHUP, lambda *_: None)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--quick", action="store_true", help="of each test its first case alone, and none of tests/slow.txt"
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--quick"):
        return
    seen = set((Path(__file__).parent / "slow.txt").read_text(encoding="utf-8").splitlines())
    kept, left = [], []
    for item in items:
        name = f"{item.path.name}::{item.nodeid.partition('[')[0].rpartition('::')[2]}"
        (left if name in seen else kept).append(item)
        seen.add(name)
    config.hook.pytest_deselected(items=left)
    items[:] = kept


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call() -> Generator[None, object, object]:
    """A test of a model that the installed transformers does not have yet is skipped."""
    try:
        return (yield)
    except ImportError as error:
        if error.name != "transformers" or isinstance(error, ModuleNotFoundError):
            raise
        pytest.skip(str(error))


pytest_runtest_setup = pytest_pyfunc_call


@pytest.fixture(scope="session")
def checkpoint() -> Callable[[str], Path]:
    """The directory of a fixture by name; shared by all tests, so never written to (`fixtures.copy` gives a private
    one).
    """
    return cached
