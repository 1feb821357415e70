"""How commands end where the machine, a signal or a defect ends them: the exit code, one error in words,
and nothing left behind.
"""

from __future__ import annotations

import os
import re
import resource
import shutil
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest
from running import ROOT, command, environment, llama, names, process, refused, reshard


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return llama(tmp_path_factory.mktemp("exits") / "model")


def limited(kind: int, most: int, *words: str | os.PathLike[str]) -> Any:
    """A command with a limit of `ulimit`."""
    return process(*words, preexec_fn=lambda: resource.setrlimit(kind, (most, most)))


DEFECT = """
import sys, reshard.api
from reshard.__main__ import main
def plan(*_, **__):
    raise {error}
reshard.api.plan = plan
sys.argv[0] = "reshard"
main()
"""


def test_a_defect_exits_70_with_a_line_to_report(tmp_path: Path) -> None:
    """Which version, where, what; the traceback is in a file, or on stderr where it is asked for."""
    code = DEFECT.format(error='ValueError("one\\ntwo")')
    done = process("plan", "x", "--tp", "2", code=code, env=environment(TMPDIR=str(tmp_path)))
    said = (
        "internal error in reshard 0.1.0 at <string>:5: ValueError: one\n\nhint: please report this bug: "
        "the traceback is in "
    )
    refused(done, 70, said)
    (file,) = tmp_path.iterdir()
    assert str(file) in done.err
    assert file.read_text().startswith("reshard 0.1.0, Python 3.") and "ValueError: one\ntwo" in file.read_text()
    done = process("plan", "x", "--tp", "2", code=code, env=environment(RESHARD_DEBUG="1"))
    assert done.code == 70 and done.err.startswith("Traceback") and "ValueError: one" in done.err


@pytest.mark.parametrize(
    ("error", "said"),
    [
        ("MemoryError", "out of memory"),
        ('RuntimeError("can\'t start new thread")', "cannot start another thread"),
        (
            'ImportError("libx.so: failed to map segment", name="numpy")',
            "cannot load a module: libx.so: failed to map segment",
        ),
        ('OSError(12, "Cannot allocate memory")', "Cannot allocate memory"),
    ],
)
def test_a_machine_that_has_too_little_is_no_defect(error: str, said: str) -> None:
    refused(process("plan", "x", "--tp", "2", code=DEFECT.format(error=error)), 3, said)


@pytest.mark.parametrize("megabytes", [70, 120, 400])
def test_too_little_memory_is_said(megabytes: int, source: Path, tmp_path: Path) -> None:
    """`ulimit -v`: whatever fails first of threads, modules and memory; numpy's BLAS would end the process with 1,
    and leave its work.
    """
    refused(limited(resource.RLIMIT_AS, megabytes << 20, "convert", source, tmp_path / "out", "--tp", "2"), 3, "hint: ")
    assert names(tmp_path) == []


def test_few_descriptors_are_enough(tmp_path: Path) -> None:
    """`ulimit -n 30` and twice as many ranks, each with a file."""
    source = llama(
        tmp_path / "model",
        num_attention_heads=64,
        num_key_value_heads=64,
        head_dim=2,
        hidden_size=64,
        intermediate_size=64,
    )
    out = tmp_path / "out"
    assert limited(resource.RLIMIT_NOFILE, 30, "convert", source, out, "--tp", "64", "--workers", "2").code == 0
    assert (
        limited(resource.RLIMIT_NOFILE, 30, "verify", out, "--against", source, "--no-numerics", "--workers", "2").code
        == 0
    )


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("module", ["click", "numpy"])
def test_a_signal_while_modules_load_is_a_quiet_end(
    number: signal.Signals, module: str, source: Path, tmp_path: Path
) -> None:
    """It arrives in the midst of an import: of one before the command line, and of one in a worker,
    which is waited for.
    """
    (tmp_path / module).mkdir()
    (tmp_path / module / "__init__.py").write_text(
        f"import os, time\nos.kill(os.getpid(), {int(number)})\nfor _ in range(300):\n    "
        f"time.sleep(0.01)\nraise ImportError('late')\n"
    )
    path = os.pathsep.join([str(tmp_path), environment()["PYTHONPATH"]])
    done = process("convert", source, tmp_path / "out", "--tp", "2", env=environment(PYTHONPATH=path))
    assert done.code == 128 + number, done
    assert names(tmp_path) == [module]
    assert done.out == "" and "Traceback" not in done.err


def test_little_is_loaded_before_signals_are_caught() -> None:
    """Until then Python would print a traceback: `import reshard` must not bring in half of the standard library."""
    code = "import sys; before = {*sys.modules}; import reshard.__main__; print(*sorted({*sys.modules} - before))"
    done = process(code=code)
    assert (
        done.code == 0
        and "signal" in done.out.split()
        and not {"re", "pathlib", "typing", "click"} & {*done.out.split()}
    ), done


def test_a_signal_after_publishing_is_too_late(source: Path, tmp_path: Path) -> None:
    """What is complete is said to be, and exits 0."""
    code = """
import os, signal, sys, reshard.api
from reshard.__main__ import main
convert = reshard.api.convert
def late(*words, **given):
    convert(*words, **given)
    os.kill(os.getpid(), signal.SIGTERM)
reshard.api.convert = late
main()
"""
    done = process("convert", source, tmp_path / "out", "--tp", "2", code=code)
    assert (done.code, done.err) == (0, f"{tmp_path / 'out'} is complete: it was published before the signal arrived\n")
    assert reshard("verify", tmp_path / "out").code == 0


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", ">&- 2>&-", "<&- >&- 2>&-"])
def test_closed_streams_change_nothing_else(closed: str, source: Path, tmp_path: Path) -> None:
    """No file is opened in the place of a stream, and written to as such; exit codes are what they are."""
    for words, code in (
        (("convert", source, tmp_path / "out", "--tp", "2"), 0),
        (("plan", tmp_path / "none", "--tp", "2"), 2),
    ):
        line = ["bash", "-c", f'exec "$@" {closed}', "bash", *command(*words)]
        assert subprocess.run(line, capture_output=True, env=environment()).returncode == code
    assert reshard("verify", tmp_path / "out", "--against", source).code == 0


def _alone(words: str, *line: str) -> subprocess.CompletedProcess[bytes]:
    """A command in name spaces of its own, after `words`; the test is skipped where none can be had."""
    if (
        shutil.which("unshare") is None
        or subprocess.run(["unshare", "-m", "-n", "true"], capture_output=True).returncode
    ):
        pytest.skip("no name spaces can be made here")
    line = ("unshare", "-m", "-n", "bash", "-c", f'{words} && exec "$@"', "bash", *line)
    return subprocess.run(line, capture_output=True, env=environment(), timeout=120)


def test_ranks_without_a_loopback_interface_are_refused_at_once(source: Path, tmp_path: Path) -> None:
    assert reshard("convert", source, tmp_path / "out", "--tp", "2").code == 0
    done = _alone("true", *command("generate", tmp_path / "out", "--tokens", "1", "--max-tokens", "2"))
    assert done.returncode == 3
    assert re.match(
        rb"error: cannot connect to 127.0.0.1, where the ranks rendezvous: .+\n\nhint: .*--tp 1\n$", done.stderr
    ), done.stderr


def test_shared_memory_that_is_read_only_is_done_without(tmp_path: Path) -> None:
    assert reshard("convert", ROOT / "demo/model", tmp_path / "out", "--tp", "2").code == 0
    ready = "ip link set lo up && mount -t tmpfs -o ro tmpfs /dev/shm"
    done = _alone(ready, *command("generate", tmp_path / "out", "--tokens", "1", "--max-tokens", "2", "-q"))
    if done.returncode == 127 or b"mount:" in done.stderr:
        pytest.skip("nothing can be mounted here")
    assert done.returncode == 0 and b"error" not in done.stderr, done.stderr


@pytest.mark.parametrize("name", ["n" * 243, "n" * 255, "é" * 127], ids=["243", "255", "254, not ASCII"])
def test_names_as_long_as_they_can_be(name: str, source: Path, tmp_path: Path) -> None:
    """No name that is made from OUT's is too long."""
    out = tmp_path / name
    for _ in range(2):
        assert reshard("convert", source, out, "--tp", "2").code == 0
    assert reshard("convert", source, out, "--tp", "4", "--overwrite").code == 0
    assert reshard("verify", out).code == 0
    assert names(tmp_path) == [name]
