"""Memory: what a conversion keeps does not depend on the size of the model, stays within what `plan` says,
and no source is ever mapped.
"""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from running import Stepped, big_llama, command, environment, header, process, reshard

MIB = 1 << 20


def bound(workers: int, tensors: int) -> int:
    """DESIGN §5."""
    return 48 * MIB + workers * 8 * MIB + 1536 * tensors


@pytest.fixture(scope="module")
def sparse(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """300 MB of holes."""
    return big_llama(tmp_path_factory.mktemp("memory") / "model", 300, sparse=True)


def tensors(source: Path) -> int:
    return int(reshard("inspect", source, "--json").json["tensors"])


def peak(*words: str | Path) -> int:
    """Peak resident memory of a command in a fresh process, in bytes, by its own account."""
    done = process(*words, "--json")
    assert done.code == 0, done.err
    return int(done.json["peak_memory"])


@pytest.mark.parametrize("workers", [1, 2, 8])
def test_a_conversion_keeps_within_the_bound(workers: int, sparse: Path, tmp_path: Path) -> None:
    used = peak("convert", sparse, tmp_path / "out", "--tp", "8", "--workers", str(workers))
    assert used <= bound(workers, tensors(sparse)), used / MIB


def test_a_plan_states_the_bound(sparse: Path) -> None:
    """The number that a scheduler may take for a limit."""
    report = reshard("plan", sparse, "--tp", "8", "--workers", "4", "--json").json
    assert report["memory"] == {"bytes": bound(4, tensors(sparse)), "workers": 4}


def test_ten_times_the_model_takes_no_more(tmp_path: Path) -> None:
    """By one worker: of two, one may do so much of a small model that the other's buffers are hardly used."""
    used = [
        peak(
            "convert",
            big_llama(tmp_path / f"model{size}", size, sparse=True),
            tmp_path / f"out{size}",
            "--tp",
            "4",
            "--workers",
            "1",
        )
        for size in (100, 1000)
    ]
    assert abs(used[1] - used[0]) < 4 * MIB, [number / MIB for number in used]


def test_merging_and_reshaping_keep_within_the_bound(sparse: Path, tmp_path: Path) -> None:
    assert reshard("convert", sparse, tmp_path / "shards", "--tp", "8").code == 0
    count = tensors(tmp_path / "shards")
    for target in (("--to", "hf"), ("--to", "hf", "--max-file-size", "100MB"), ("--tp", "2", "--pp", "2")):
        used = peak("convert", tmp_path / "shards", tmp_path / "out", *target, "--workers", "2")
        assert used <= bound(2, count), (target, used / MIB)
        shutil.rmtree(tmp_path / "out")


def gpt2(directory: Path, layers: int, hidden: int) -> Path:
    """A GPT-2 of holes: every matrix is stored transposed, so that each is turned tile by tile."""
    shapes: dict[str, tuple[int, ...]] = {
        "transformer.wte.weight": (5003, hidden),
        "transformer.wpe.weight": (512, hidden),
    }
    for layer in range(layers):
        at = f"transformer.h.{layer}."
        for name, matrix in {
            "attn.c_attn": (hidden, 3 * hidden),
            "attn.c_proj": (hidden, hidden),
            "mlp.c_fc": (hidden, 4 * hidden),
            "mlp.c_proj": (4 * hidden, hidden),
        }.items():
            shapes |= {f"{at}{name}.weight": matrix, f"{at}{name}.bias": matrix[1:]}
        shapes |= {f"{at}{norm}.{kind}": (hidden,) for norm in ("ln_1", "ln_2") for kind in ("weight", "bias")}
    shapes |= {f"transformer.ln_f.{kind}": (hidden,) for kind in ("weight", "bias")}
    directory.mkdir()
    config = {
        "model_type": "gpt2",
        "n_embd": hidden,
        "n_head": 16,
        "n_layer": layers,
        "n_positions": 512,
        "vocab_size": 5003,
    }
    (directory / "config.json").write_text(json.dumps(config | {"n_inner": None, "tie_word_embeddings": True}))
    sizes = {name: ("F32", shape, 4 * math.prod(shape)) for name, shape in shapes.items()}
    with (directory / "model.safetensors").open("wb") as file:
        file.write(header(sizes))
        file.truncate(file.tell() + sum(size for _, _, size in sizes.values()))
    return directory


def test_transpositions_keep_within_the_bound(tmp_path: Path) -> None:
    source = gpt2(tmp_path / "model", 3, 1536)
    assert sum(path.stat().st_size for path in source.iterdir()) > 300e6
    assert peak("convert", source, tmp_path / "out", "--tp", "4", "--workers", "2") <= bound(2, tensors(source))
    assert peak("convert", tmp_path / "out", tmp_path / "back", "--to", "hf", "--workers", "2") <= bound(
        2, tensors(tmp_path / "out")
    )


def test_bytes_moved_are_the_model_s_own(sparse: Path, tmp_path: Path) -> None:
    """Each source byte is read once, each byte of the output written once,
    by the kernel's own count of this process.
    """
    done = process("convert", sparse, tmp_path / "out", "--tp", "4", "--json")
    size = sum(path.stat().st_size for path in sparse.glob("*.safetensors"))
    written = sum(path.stat().st_size for path in (tmp_path / "out").rglob("*") if path.is_file())
    start_up = 8e6  # modules of Python
    assert done.json["io_read"] <= 1.02 * size + start_up
    assert done.json["io_written"] <= 1.02 * written
    assert size <= done.json["io_read"] and 0.98 * written <= done.json["io_written"]


def test_no_source_is_mapped(tmp_path: Path) -> None:
    """Looked up in the process' own map at one transfer after another."""
    source = big_llama(tmp_path / "model", 40)
    with Stepped("convert", source, tmp_path / "out", "--tp", "8") as job:
        for step in range(1, 61):
            job.until(step)
            text = Path(f"/proc/{job.job.pid}/maps").read_text()
            assert "libpython" in text or "python" in text
            assert str(tmp_path) not in text
            job.allow(step)
        assert job.end().code == 0


@pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed")
def test_no_file_of_the_source_or_the_output_is_ever_given_to_mmap(tmp_path: Path) -> None:
    source, log = big_llama(tmp_path / "model", 40), tmp_path / "log"
    for words in (
        ("convert", source, tmp_path / "out", "--tp", "8"),
        ("verify", tmp_path / "out", "--against", source, "--no-numerics"),
    ):
        line = ["strace", "-f", "-y", "-e", "trace=mmap,openat,pread64,preadv", "-o", str(log), *command(*words)]
        ran = subprocess.run(line, capture_output=True, env=environment())
        if b"ptrace" in ran.stderr.lower():
            pytest.skip("tracing is not allowed here")
        assert ran.returncode == 0, ran.stderr
        text = log.read_text()
        assert re.search(rf"preadv?\w*\(\d+<{re.escape(str(source))}", text)
        assert [row for row in text.splitlines() if "mmap(" in row and str(tmp_path) in row] == []


def test_a_verification_keeps_within_the_bound(sparse: Path, tmp_path: Path) -> None:
    """Both checks; here a worker holds a block of 8 MiB at a time."""
    assert reshard("convert", sparse, tmp_path / "out", "--tp", "8").code == 0
    used = peak("verify", tmp_path / "out", "--against", sparse, "--workers", "2")
    assert used <= bound(2 * 2, tensors(tmp_path / "out")), used / MIB
