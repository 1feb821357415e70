"""The files that merging would write, streamed from shards: their digests are those of the originals,
at any window, for any family.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from fixtures import FIXTURES
from hub_server import Hub
from running import environment, llama, llama_tensors, noise, reshard
from safetensors.torch import load_file

import reshard as api
from reshard.checkpoints import streams as stream
from reshard.checkpoints.source import open_source
from reshard.checkpoints.target_files import restored
from reshard.jobs.verify_sha256 import recorded, sha256
from reshard.layout.join import plan
from reshard.store.digest import FileDigest
from reshard.store.local import Pool

Get = Callable[[str], Path]


def meshes(name: str) -> list[dict[str, int]]:
    about = FIXTURES[name]
    return [{"tp": max(about.tp)}, {"pp": 2, "tp": 2}, *([{"tp": 4, "ep": 2}] if 2 in about.ep else [])]


def streamed(out: Path) -> dict[str, bytes]:
    """Every original file, as it is streamed."""
    source, pool = open_source(out), Pool()
    files = restored(source)
    streams = stream.Streams(plan(source.layout, files.layout), source, files, pool)
    found = {original.name: b"".join(map(bytes, streams.windows(original.name))) for original in source.originals}
    pool.close()
    return found


@pytest.mark.parametrize("window", [8 << 20, 997])
@pytest.mark.parametrize("name", FIXTURES)
def test_a_stream_is_the_file(
    checkpoint: Get, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, window: int
) -> None:
    """Also where windows tear rows and elements, and where sources are read in many parts."""
    monkeypatch.setattr(stream, "WINDOW", window)
    monkeypatch.setattr(stream, "PIECE", max(window // 2, 16))
    monkeypatch.setattr(stream, "NEAR", window // 8)
    monkeypatch.setattr(stream, "ROW", 16 if window > 997 else stream.ROW)
    monkeypatch.setattr(stream, "KEPT", 100)
    for number, mesh in enumerate(meshes(name)[: None if window > 997 else 1]):
        api.convert(checkpoint(name), tmp_path / str(number), **mesh)
        for file, data in streamed(tmp_path / str(number)).items():
            assert hashlib.sha256(data).digest() == hashlib.sha256((checkpoint(name) / file).read_bytes()).digest(), (
                mesh,
                file,
            )


@pytest.mark.parametrize("window", [8 << 20, 101])
def test_strided_and_shared_storages_of_bin_files_are_streamed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, window: int
) -> None:
    monkeypatch.setattr(stream, "WINDOW", window)
    monkeypatch.setattr(stream, "PIECE", max(window // 2, 16))
    source = tmp_path / "model"
    llama(source)
    tensors: dict[str, torch.Tensor] = {}
    for path in sorted(source.glob("*.safetensors*")):
        tensors |= load_file(path) if path.suffix == ".safetensors" else {}
        path.unlink()
    tensors = {name: tensor.t().contiguous().t() if "q_proj" in name else tensor for name, tensor in tensors.items()}
    torch.save(tensors, source / "pytorch_model.bin")
    api.convert(source, tmp_path / "out", tp=2)
    assert streamed(tmp_path / "out") == {"pytorch_model.bin": (source / "pytorch_model.bin").read_bytes()}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    place = tmp_path / "model"
    llama(place, llama_tensors() | {"model.layers.0.self_attn.rotary_emb.inv_freq": noise("F32", 5)})
    (place / "tokenizer.json").write_text('{"a": 1}')
    return place


def test_recorded_digests_are_compared_and_a_flipped_bit_is_found(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert reshard("convert", source, out, "--tp", "2", "--sha256").code == 0
    found = json.loads(reshard("verify", out, "--only", "sha256", "--json").out)
    assert found["ok"] and not found["proven"]
    assert [check["check"] for check in found["checks"]] == ["sha256"]
    assert found["checks"][0]["files"] == len(list(source.iterdir()))
    assert subprocess.run(["sha256sum", "-c", "source/SHA256SUMS"], cwd=out, capture_output=True).returncode == 0
    assert reshard("convert", out, tmp_path / "other", "--tp", "1").code == 0
    assert (tmp_path / "other/source/SHA256SUMS").read_bytes() == (out / "source/SHA256SUMS").read_bytes()
    weights = out / "rank-00001/model.safetensors"
    data = bytearray(weights.read_bytes())
    data[len(data) // 2] ^= 1
    weights.write_bytes(data)
    done = reshard("verify", out, "--only", "sha256")
    assert done.code == 1
    assert "merging gives SHA-256" in done.out and "was recorded" in done.out


def test_without_digests_the_check_says_so(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert reshard("convert", source, out, "--tp", "2").code == 0
    done = reshard("verify", out)
    assert done.code == 0
    assert "sha256     skipped    no digests of the original files recorded:" in done.out
    assert "proven" not in done.out
    for words in (("--sha256",), ("--only", "sha256")):
        done = reshard("verify", out, *words)
        assert done.code == 2
        assert "the SHA-256 digests of the original files are not known" in done.err and "--hub ID" in done.err
    done = reshard("verify", out, "--only", "everything")
    assert done.code == 2 and "checks are integrity, weights, sha256, numerics" in done.err


def test_digests_that_the_hub_publishes_are_compared_without_any_download(source: Path, tmp_path: Path) -> None:
    """LFS digests of the weights, git ids of the small files; a carried file that is another is named."""
    out = tmp_path / "out"
    api.convert(source, out, tp=2)
    with Hub() as hub:
        hub.add("org/model", source)

        def verify(*words: str) -> subprocess.CompletedProcess[str]:
            line = [
                sys.executable,
                "-m",
                "reshard",
                "verify",
                str(out),
                "--hub",
                "org/model",
                "--json",
                "--only",
                "sha256",
                *words,
            ]
            settings = environment(HF_ENDPOINT=hub.url, HF_HOME=str(tmp_path / "home"), HF_HUB_OFFLINE="0")
            return subprocess.run(line, capture_output=True, text=True, env=settings)

        done = verify()
        assert done.returncode == 0, done.stdout + done.stderr
        (check,) = json.loads(done.stdout)["checks"]
        assert check["files"] == len(list(source.iterdir()))
        assert check["unproven"] == []
        assert hub.files() == set()
        (source / "tokenizer.json").write_text('{"a": 2}')  # what the Hub has now
        done = verify()
        assert done.returncode == 1
        (check,) = json.loads(done.stdout)["checks"]
        assert [failure.partition(":")[0] for failure in check["failures"]] == ["tokenizer.json"]


def test_a_published_directory_is_compared_too(source: Path) -> None:
    opened = open_source(source)
    digests = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in source.glob("*.safetensors")}
    wanted = {name: FileDigest("sha256", digest, "is published") for name, digest in digests.items()}
    assert sha256(opened, wanted, 2).ok
    first = next(iter(wanted))
    wanted[first] = FileDigest("sha256", "0" * 64, "is published")
    assert [failure.partition(":")[0] for failure in sha256(opened, wanted, 2).failures] == [first]
    assert recorded(opened) == {}
