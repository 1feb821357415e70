"""The command line: what it prints where, how it ends, and that no command line, however wrong, ends in a traceback."""

import fcntl
import json
import os
import pty
import re
import select
import shlex
import struct
import subprocess
import sys
import termios
from dataclasses import replace
from pathlib import Path

import pytest
from running import WATCHDOG, command, environment, lines_run, llama, names, process, refused, reshard

LINES = 1_000_000  # of Python that a refusal may run
COMMANDS = ("inspect", "plan", "convert", "verify", "generate", "fingerprint", "explain", "diff", "check-table")

# `python -m reshard` on storage that needs `SLOW` seconds for each transfer, and with the intervals of a heartbeat in
# `BEAT`.
SLOW = """
import os, sys, time
from reshard.store import local as files
from reshard.text import progress
from reshard.cli import main
transfer = files.Pool._transfer
def slow(*arguments):
    time.sleep(float(os.environ["SLOW"]))
    return transfer(*arguments)
files.Pool._transfer = slow
progress.Lines.first = progress.Lines.every = float(os.environ.get("BEAT", "10"))
progress.Json.first = progress.Json.every = 0.1
main(sys.argv[1:])
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return llama(tmp_path_factory.mktemp("cli") / "model")


@pytest.fixture(scope="module")
def shards(source: Path) -> Path:
    out = source.parent / "shards"
    assert reshard("convert", source, out, "--tp", "2").code == 0
    return out


# Help


@pytest.mark.parametrize("words", [("-h",), *((name, "--help") for name in COMMANDS)])
def test_help_fits_80_columns_and_goes_to_stdout(words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    done = reshard(*words)
    assert done.code == 0
    assert done.err == ""
    assert [line for line in done.out.splitlines() if len(line) > 80] == []


def test_every_command_and_every_option_says_what_it_does() -> None:
    listed = reshard("--help").out
    for name in COMMANDS:
        assert re.search(rf"^  {name} +[A-Z].*[^.]\.$", listed, re.M), f"{name} is not described in a line"
        text = reshard(name, "--help").out
        for option in re.findall(r"^  ((?:-\w, )?--[\w-]+.*)$", text, re.M):
            assert re.search(r"  \S", option) or re.search(re.escape(option) + r"\n {20,}\S", text), f"{name} {option}"


def test_without_a_command_it_shows_the_help_and_exits_2() -> None:
    done = reshard()
    assert done.code == 2
    assert done.out == ""
    assert done.err.startswith("Usage: reshard")


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys\nfrom reshard.cli import main\ntry: main(['convert', '--help'])\nexcept SystemExit: "
        "print(*sorted(sys.modules))"
    )
    loaded = set(process(code=code).out.split())
    assert "reshard.cli" in loaded
    assert not loaded & {
        "numpy",
        "torch",
        "huggingface_hub",
        "xxhash",
        "tqdm",
        "safetensors",
        "reshard.engine.worker",
        "reshard.tables.families",
    }


def test_a_conversion_imports_neither_torch_nor_the_hub(source: Path, tmp_path: Path) -> None:
    code = (
        "import sys\nfrom reshard.cli import main\ntry: main(sys.argv[1:])\nexcept SystemExit: "
        "print(*sorted(sys.modules))"
    )
    loaded = set(process("convert", source, tmp_path / "out", "--tp", "2", "-q", code=code).out.split())
    assert "reshard.engine.worker" in loaded
    assert not loaded & {"torch", "huggingface_hub", "transformers", "safetensors"}


# Results


def test_json_of_each_command_has_what_a_program_needs(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    plan = reshard("plan", source, "--tp", "2", "--json")
    assert {"source", "ranks", "memory", "disk"} <= plan.json.keys() and plan.code == 0
    convert = reshard("convert", source, out, "--tp", "2", "--json")
    assert convert.json["out"] == str(out) and convert.json["already"] is False and len(convert.json["root"]) == 32
    assert convert.json["bytes_written"] == sum(path.stat().st_size for path in out.glob("rank-*/model.safetensors"))
    assert {"bytes_read", "seconds", "peak_memory", "io_read", "io_written", "left"} <= convert.json.keys()
    assert reshard("convert", source, out, "--tp", "2", "--json").json["already"] is True
    inspect = reshard("inspect", out, "--json").json
    assert (
        inspect["family"] == "llama" and inspect["layout"] == "native, TP 2" and inspect["root"] == convert.json["root"]
    )
    assert reshard("inspect", source, "--json").json["parameters"] == inspect["parameters"] == 122136
    verify = reshard("verify", out, "--against", source, "--json")
    assert verify.json["ok"] is True and [
        check["check"] for check in verify.json["checks"] if check["skipped"] is None
    ] == [
        "integrity",
        "weights",
    ]


def test_json_of_a_failed_verification_says_what_failed_and_exits_1(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    reshard("convert", source, out, "--tp", "2")
    (out / "config.json").write_text("{}")
    done = reshard("verify", out, "--json")
    assert done.code == 1
    assert done.json["ok"] is False
    assert any("config.json" in failure for failure in done.json["checks"][0]["failures"])


def test_stdout_is_the_result_and_stderr_is_silent_when_it_is_quick(source: Path, tmp_path: Path) -> None:
    done = process("convert", source, tmp_path / "out", "--tp", "2")
    assert (done.code, done.err) == (0, "")
    assert re.search(r"^root digest: [0-9a-f]{32}$", done.out, re.M)
    assert done.out.splitlines()[-1].startswith("next: reshard verify ")


def test_the_next_command_can_be_pasted_whatever_the_names(source: Path, tmp_path: Path) -> None:
    out = tmp_path / 'it\'s "a" name; $HOME `x`'
    done = process("convert", source, out, "--tp", "2")
    line = done.out.splitlines()[-1].removeprefix("next: reshard ")
    line += " --no-numerics"
    ran = subprocess.run(
        f"{shlex.quote(sys.executable)} -m reshard {line}",
        shell=True,
        capture_output=True,
        env=environment(),
        text=True,
    )
    assert ran.returncode == 0, ran.stderr


def test_quiet_prints_results_of_json_and_failures_alone(source: Path, shards: Path, tmp_path: Path) -> None:
    for words in (
        ("inspect", source),
        ("plan", source, "--tp", "2"),
        ("convert", source, tmp_path / "a", "--tp", "2"),
        ("verify", shards),
    ):
        done = reshard(*words, "--quiet")
        assert (done.code, done.out, done.err) == (0, "", "")
    assert reshard("verify", shards, "--quiet", "--json").json["ok"] is True
    (tmp_path / "a" / "config.json").unlink()
    done = reshard("verify", tmp_path / "a", "--quiet")
    assert done.code == 1 and "config.json" in done.out


def test_names_that_are_no_text_do_no_harm(source: Path, tmp_path: Path) -> None:
    out = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff\xfe"))
    for words in (
        ("convert", source, out, "--tp", "2"),
        ("convert", source, out, "--tp", "2", "--json"),
        ("inspect", out),
        ("inspect", out, "--json"),
        ("plan", out, "--tp", "4"),
        ("plan", out, "--tp", "4", "--json"),
        ("verify", out, "--against", source),
        ("verify", out, "--json"),
    ):
        done = reshard(*words)
        assert done.code == 0, done.err
        if words[0] == "inspect" and "--json" in words:
            assert os.fsencode(done.json["source"]) == os.fsencode(out)
    refused(reshard("plan", out / "nothing", "--tp", "2"), 2, "no such")


def test_output_that_the_terminal_cannot_show_is_escaped(source: Path, tmp_path: Path) -> None:
    done = process("convert", source, tmp_path / "模型", "--tp", "2", env=environment(PYTHONIOENCODING="latin-1"))
    assert done.code == 0
    assert "\\u6a21\\u578b: " in done.out


def test_a_reader_that_goes_away_is_no_mismatch(source: Path) -> None:
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(command("plan", source, "--tp", "2"), stdout=write, stderr=subprocess.PIPE, env=environment())
    os.close(write)
    assert (done.returncode, done.stderr) == (141, b"")


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("words", [("--help",), ("plan", "SRC", "--tp", "2"), ("plan", "SRC", "--tp", "2", "--json")])
def test_a_full_disk_under_stdout_is_said(source: Path, words: tuple[str, ...], unbuffered: str) -> None:
    line = command(*(source if word == "SRC" else word for word in words))
    with open("/dev/full", "wb") as full:
        done = subprocess.run(line, stdout=full, stderr=subprocess.PIPE, env=environment(PYTHONUNBUFFERED=unbuffered))
    assert (done.returncode, done.stderr) == (3, b"error: No space left on device\n")


# Wrong command lines

WRONG: list[tuple[str, tuple[str, ...]]] = [
    ("plan SRC --tp x", ("--tp x", "auto")),
    ("plan SRC --tp -1", ("--tp -1", "1 to 65536")),
    ("plan SRC --tp 0", ("--tp 0",)),
    ("plan SRC --tp 1.5", ("--tp 1.5",)),
    ("plan SRC --tp 99999999999", ("--tp 99999999999",)),
    ("plan SRC --tp 3", ("4 cannot be split over 3 ranks", "TP sizes that work: 1, 2, 4, 8", "--tp 3 --split 2:1:1")),
    ("plan SRC --tp 2 --split 3:3:2", ("3:3:2", "--tp is 2")),
    ("plan SRC --tp 1 --split 3:3:2", ("3:3:2", "--tp is 1")),
    ("plan SRC --split 3:x", ("--split 3:x", "for example 3:3:2")),
    ("plan SRC --split 3:0:2", ("--split 3:0:2", "positive integers")),
    ("plan SRC --split 3::2", ("--split 3::2",)),
    ("plan SRC --split 8:1:1", ("8:1:1", "rank 2", "nothing")),
    ("plan SRC --pp 9", ("--pp 9", "3 layers", "PP sizes that work: 1, 2, 3")),
    ("plan SRC --pp 0", ("--pp 0",)),
    ("plan SRC --tp 2 --pp-layers 1,1", ("--pp-layers 1,1 is 2 layers, the model has 3",)),
    ("plan SRC --pp-layers 1,-2,4", ("--pp-layers 1,-2,4",)),
    ("plan SRC --pp 2 --pp-layers 1,1,1", ("--pp is 2",)),
    ("plan SRC --tp 4 --ep 3", ("--ep 3 does not divide --tp 4",)),
    ("plan SRC --tp 2 --ep 2", ("--ep 2 cuts nothing",)),
    ("plan SRC --tp 2 --to gguf", ('"gguf"', "native, vllm")),
    ("plan SRC --tp 2 --to ../formats/native", ("no format table",)),
    ("plan SRC --tp 2 --to vllm --engine-version 0.19", ("untested with vLLM 0.19", "supported: vLLM 0.33")),
    ("plan SRC --tp 2 --engine-version 0.33", ('format "native" is not for a particular engine',)),
    ("plan SRC --to hf --engine-version 0.33", ('format "hf" is not for a particular engine',)),
    ("plan SRC --tp 2 --max-file-size 5GB", ("--max-file-size only goes with --to hf",)),
    ("plan SRC --to hf --max-file-size nonsense", ("--max-file-size nonsense", "5GB")),
    ("plan SRC --to hf --max-file-size -5", ("--max-file-size -5",)),
    ("plan SRC --to hf --tp 2", ("not for TP 2",)),
    ("plan SRC --to hf --tp auto --device-memory 1GiB", ("there is no mesh to choose",)),
    ("plan SRC --tp auto", ("--device-memory 24GiB",)),
    ("plan SRC --tp auto --device-memory lots", ("--device-memory lots",)),
    ("plan SRC --tp auto --device-memory 1KB", ("no mesh", "fits")),
    ("plan SRC --tp 2 --device-memory 1GiB --context -5", ("--context", "-5")),
    ("plan SRC --tp 2 --device-memory 1GiB --batch 0", ("--batch", "0")),
    ("plan SRC --tp 2 --revision main", ("--revision main", "local path")),
    ("plan SRC --tp 2 --family lama", ('"lama"', "llama", "TOML")),
    ("plan SRC --tp 2 --family nope.toml", ("nope.toml", "no such file")),
    ("plan SRC --tp 2 --family SRC", ("no such file",)),
    ("plan SRC --tp 2 --family SRC/config.json", ("config.json", "not TOML")),
    ("plan SRC --tp 2 --no-pad", ("--no-pad", "331", "332")),
    ("plan SRC --tp 8 --no-repeat", ("--no-repeat", "stored 2 times")),
    ("plan SRC/config.json --tp 2", ("config.json: is a file", "give the directory")),
    ("plan '' --tp 2", ("empty name",)),
    ("plan", ("SRC", "--help")),
    ("plan SRC SRC --tp 2", ("unexpected extra argument",)),
    ("inspect SRC/..", ("config.json", "is this the right directory")),
    ("convert SRC", ("OUT",)),
    ("convert SRC OUT", ("neither --tp nor --to",)),
    ("convert SRC '' --tp 2", ("empty name",)),
    ("convert SRC OUT --tp 2 --workers 0", ("--workers", "0")),
    ("convert SRC OUT --tp 2 --progress loud", ("loud", "json")),
    ("convert SRC OUT --tp 2 --nonsense", ("--nonsense",)),
    ("verify SRC", ("no manifest", "--against")),
    ("verify SRC/config.json", ("is a file",)),
    ("verify nowhere", ("nowhere: no such directory",)),
    ("frobnicate SRC", ("frobnicate",)),
]


@pytest.mark.parametrize(("line", "parts"), WRONG, ids=[line for line, _ in WRONG])
def test_a_wrong_command_line_is_refused_in_words(
    line: str, parts: tuple[str, ...], source: Path, tmp_path: Path
) -> None:
    """Exit 2, an error that names what is wrong, nothing on stdout, nothing written."""
    words = [
        str(source) + word[3:] if word.startswith("SRC") else word
        for word in (word.strip("'") for word in line.split())
    ]
    words = [str(tmp_path / "out") if word == "OUT" else word for word in words]
    before = names(source.parent)
    refused(reshard(*words), 2, *parts)
    assert names(tmp_path) == []
    assert names(source.parent) == before


@pytest.mark.parametrize(
    "words",
    [("--tp", "65536"), ("--split", ":".join(["1"] * 20_000)), ("--tp", "32768", "--pp", "2")],
    ids=lambda words: words[0],
)
def test_absurd_numbers_are_refused_at_once(words: tuple[str, ...], source: Path) -> None:
    assert reshard("plan", source, "--tp", "2").code == 0  # imports what a plan needs, which is not counted
    count = lines_run(
        lambda: refused(reshard("plan", source, *words), 2, "does not fit this model", "TP sizes that work")
    )
    assert count < LINES, count


def test_a_very_long_name_is_refused(source: Path, tmp_path: Path) -> None:
    refused(reshard("convert", source, tmp_path / ("x" * 300), "--tp", "2"), 3, "name too long")
    refused(reshard("plan", tmp_path / ("x" * 300), "--tp", "2"), 3, "name too long")


def test_splits_and_stages_alone_say_how_many_ranks(source: Path, tmp_path: Path) -> None:
    assert reshard("convert", source, tmp_path / "a", "--split", "2:1:1").code == 0
    assert reshard("convert", source, tmp_path / "b", "--pp-layers", "1,2").code == 0
    assert len(list((tmp_path / "a").glob("rank-*"))) == 3
    assert len(list((tmp_path / "b").glob("rank-*"))) == 2


# Progress


@pytest.mark.parametrize("columns", [100, 0])
def test_a_terminal_gets_a_bar(columns: int, source: Path, tmp_path: Path) -> None:
    """Bytes, rate and time left, redrawn on one line, also where the terminal does not know its size;
    stdout stays clean.
    """
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("4H", 24, columns, 0, 0))
    words = [sys.executable, "-c", SLOW, "convert", str(source), str(tmp_path / "out"), "--tp", "2", "--workers", "1"]
    child = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=slave, env=environment(SLOW="0.004"))
    os.close(slave)
    shown = b""
    try:
        while select.select([master], [], [], WATCHDOG)[0]:
            shown += os.read(master, 65536)
    except OSError:  # the other end is closed
        pass
    out, _ = child.communicate(timeout=WATCHDOG)
    os.close(master)
    assert child.returncode == 0
    text = shown.decode()
    assert re.search(r"converting: +\d+%\|.*\d+(\.\d+)?k/\d+(\.\d+)?k \[\d\d:\d\d<\d\d:\d\d, .*B/s\]", text), text
    assert text.count("\r") > 2
    assert "Traceback" not in text
    assert out.startswith(str(tmp_path).encode())


def test_a_log_gets_lines_and_a_heartbeat(source: Path, tmp_path: Path) -> None:
    done = process(
        "convert",
        source,
        tmp_path / "out",
        "--tp",
        "2",
        "--workers",
        "1",
        code=SLOW,
        env=environment(SLOW="0.003", BEAT="0.2"),
    )
    assert done.code == 0
    lines = done.err.splitlines()
    assert len(lines) >= 2
    line = re.compile(r"converting: [\d.]+ .?B of [\d.]+ .?B \(\d+ %\), [\d.]+ .?B/s(, \d+:\d\d left)?")
    assert all(map(line.fullmatch, lines)), lines
    assert "(100 %)" in lines[-1]


def test_progress_as_json_ends_with_the_end(source: Path, tmp_path: Path) -> None:
    words = ("convert", source, tmp_path / "out", "--tp", "2", "--workers", "1", "--progress", "json", "--json")
    done = process(*words, code=SLOW, env=environment(SLOW="0.003"))
    assert done.code == 0
    records = [json.loads(line) for line in done.err.splitlines()]
    assert len(records) > 2
    assert all(record.keys() == {"what", "done", "total", "rate", "left", "end"} for record in records)
    assert [record["end"] for record in records] == [False] * (len(records) - 1) + [True]
    assert [record["done"] for record in records] == sorted(record["done"] for record in records)
    assert records[-1]["done"] == records[-1]["total"] == done.json["bytes_read"]


def test_progress_as_json_ends_with_the_end_for_each_phase_of_a_verification(source: Path, shards: Path) -> None:
    done = reshard("verify", shards, "--against", source, "--progress", "json", "--json")
    ends = [record for record in map(json.loads, done.err.splitlines()) if record["end"]]
    assert [record["what"] for record in ends] == ["checking digests", "comparing weights"]
    assert all(record["done"] == record["total"] for record in ends)


def test_each_long_phase_of_a_conversion_shows_progress(source: Path, tmp_path: Path) -> None:
    """Hashing every source file, writing; of a re-run reading OUT, and comparing a sample or everything;
    of facts that are added.
    """

    def phases(*more: str) -> list[str]:
        done = reshard("convert", source, tmp_path / "out", "--tp", "2", *more, "--progress", "json")
        ends = [record for record in map(json.loads, done.err.splitlines()) if record["end"]]
        assert all(record["done"] == record["total"] > 0 for record in ends)
        return [record["what"] for record in ends]

    assert phases("--sha256") == ["computing SHA-256", "converting"]
    assert phases("--checksum") == ["checking digests", "comparing weights"]
    assert phases() == ["checking digests", "comparing a sample"]
    assert phases("--no-check") == ["comparing a sample"]
    assert phases("--overwrite") == ["converting"]
    assert phases("--sha256", "--no-check") == [
        "comparing a sample",
        "computing SHA-256",
        "hashing what merging would write",
    ]


def test_progress_none_is_silent(source: Path, tmp_path: Path) -> None:
    words = ("convert", source, tmp_path / "out", "--tp", "2", "--progress", "none")
    done = process(*words, code=SLOW, env=environment(SLOW="0.002", BEAT="0.05"))
    assert (done.code, done.err) == (0, "")


def test_a_failure_ends_the_bar_before_the_error(source: Path, tmp_path: Path) -> None:
    """The last thing in a log is the error, whatever was being shown."""
    fail = SLOW.replace('float(os.environ["SLOW"])', "0.01 if next(count) < 60 else fail()")
    fail = "import itertools\ncount = itertools.count()\ndef fail(): raise OSError(5, 'Input/output error')\n" + fail
    done = process("convert", source, tmp_path / "out", "--tp", "2", code=fail, env=environment(BEAT="0.1"))
    assert done.code == 3
    assert re.fullmatch(r"error: .*Input/output error(\n\nhint: .*)?\n", "".join(done.err.partition("error:")[1:])), (
        done.err
    )
    assert names(tmp_path) == []


def test_interrupted_is_said_and_exits_130(source: Path, tmp_path: Path) -> None:
    raising = """
import sys, reshard.api, reshard.cli
def interrupted(*_, **__):
    raise KeyboardInterrupt
reshard.api.convert = interrupted
reshard.cli.main(sys.argv[1:])
"""
    done = process("convert", source, tmp_path / "out", "--tp", "2", code=raising)
    assert done.err.startswith("\n")  # below the ^C of the terminal
    refused(replace(done, err=done.err.lstrip()), 130, "interrupted")
