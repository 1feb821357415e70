"""Verifying: every planted damage is found and named, with the digests that the damage leaves and with digests made
right again.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from fixtures import checkpoint
from running import WATCHDOG, Done, environment, llama, llama_tensors, noise, reshard, root_signed, sign, tree

from reshard.jobs.verify import FEW

DAMAGED = (
    "config.json",
    "manifest.json",
    "rank-00001/model.safetensors",
    "rank-00001/tensors.json",
    "source/files.json",
)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama with a tensor of several blocks, and old buffers that no rank gets."""
    place = tmp_path_factory.mktemp("verify") / "model"
    tensors = llama_tensors() | {"model.layers.0.self_attn.rotary_emb.inv_freq": noise("F32", 5)}
    llama(place, tensors)
    (place / "tokenizer.json").write_text('{"a": 1}')
    return place


@pytest.fixture(scope="module")
def shards(source: Path) -> Path:
    out = source.parent / "shards"
    assert reshard("convert", source, out, "--tp", "2", "--to", "native").code == 0
    return out


@pytest.fixture
def out(shards: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(shards, tmp_path / "out"))


def found(done: Done, *parts: str) -> None:
    """Exit 1, with each of `parts` in what is said to have failed."""
    assert done.code == 1, (done.code, done.out, done.err)
    assert done.err == ""
    for part in parts:
        assert part in done.out, f"{part} not in: {done.out}"


def flip(path: Path, at: int) -> None:
    """Flip one bit."""
    with path.open("r+b") as file:
        file.seek(at, os.SEEK_END if at < 0 else os.SEEK_SET)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 16]))


def tensor(out: Path, name: str, rank: int = 0) -> tuple[Path, int, int]:
    """Where a stored tensor is: file, offset, bytes."""
    folder = out / f"rank-{rank:05}"
    entry = next(t for t in json.loads((folder / "tensors.json").read_text())["tensors"] if t["name"] == name)
    return folder / "model.safetensors", entry["offset"], entry["nbytes"]


# As a disk or a network damages


def test_a_whole_directory_passes(source: Path, shards: Path) -> None:
    done = reshard("verify", shards)
    assert (done.code, done.err) == (0, "")
    assert done.out.startswith("integrity  ok         42 tensors, 10 files")
    done = reshard("verify", shards, "--against", source)
    assert done.code == 0
    words = "2 of 4 checks passed: the files are intact; every element equals the original's, bit by bit"
    assert " ".join(done.out.split()).endswith(words)


def test_a_flipped_bit_is_found_in_every_file(shards: Path, out: Path) -> None:
    files = sorted(tree(shards))
    assert len(files) == 11 and set(DAMAGED) < set(files)
    for name in files:
        for at in (0, (out / name).stat().st_size // 2, -1):
            flip(out / name, at)
            done = reshard("verify", out)
            found(done, name.split("/")[-1])
            flip(out / name, at)
    assert reshard("verify", out).code == 0


def test_the_tensor_and_the_bytes_of_a_flipped_bit_are_named(out: Path) -> None:
    path, offset, nbytes = tensor(out, "layers.1.mlp.down", 1)
    flip(path, offset + 5)
    found(
        reshard("verify", out),
        "rank-00001/model.safetensors: layers.1.mlp.down",
        f"bytes {offset} to {offset + nbytes}",
    )


@pytest.mark.parametrize("less", [1, 100, 4096])
def test_a_truncated_file_is_found(less: int, shards: Path, out: Path) -> None:
    for name in tree(shards):
        data = (out / name).read_bytes()
        cut = data[: max(0, len(data) - less)]
        (out / name).write_bytes(cut)
        done = reshard("verify", out)
        assert done.code == 1 or not cut, name  # an empty manifest is none
        if name != "manifest.json":
            found(done, name, str(len(cut)), str(len(data)))
        (out / name).write_bytes(data)


def test_bytes_appended_to_any_file_are_found(shards: Path, out: Path) -> None:
    for name in tree(shards):
        data = (out / name).read_bytes()
        (out / name).write_bytes(data + b"\n")
        found(reshard("verify", out), name.split("/")[-1])
        (out / name).write_bytes(data)


def test_a_missing_file_is_found(shards: Path, out: Path) -> None:
    for name in tree(shards):
        data = (out / name).read_bytes()
        (out / name).unlink()
        done = reshard("verify", out)
        if name == "manifest.json":
            for told in (done, reshard("fingerprint", out)):
                assert told.code == 1 and "manifest.json: is missing or damaged" in told.err
        else:
            found(done, f"{name}: is missing")
        (out / name).write_bytes(data)


def test_a_bit_of_a_large_tensor_is_found_by_comparing_wherever_it_is(tmp_path: Path) -> None:
    """One that is read as it stands, and one whose rows are dealt out to the ranks: both too much to be compared as the
    small ones are.
    """
    source, out = llama(tmp_path / "wide", vocab_size=8192, intermediate_size=4096), tmp_path / "out"
    assert reshard("convert", source, out, "--tp", "2").code == 0
    for name, rank in ("embed", 0), ("layers.0.mlp.down", 1):
        path, offset, nbytes = tensor(out, name, rank)
        assert nbytes > FEW
        for at in (0, nbytes // 2 + 1, nbytes - 1):
            flip(path, offset + at)
            found(
                reshard("verify", out, "--only", "weights", "--against", source),
                f"{name} differs",
                f"first at byte {at} of {nbytes}",
            )
            flip(path, offset + at)


def test_exchanged_rank_files_are_found(out: Path) -> None:
    one, other = (out / f"rank-0000{rank}" for rank in (0, 1))
    for name in ("model.safetensors", "tensors.json"):
        first, second = (one / name).read_bytes(), (other / name).read_bytes()
        (one / name).write_bytes(second)
        (other / name).write_bytes(first)
        found(reshard("verify", out), f"rank-00000/{name}", f"rank-00001/{name}")
        (one / name).write_bytes(first)
        (other / name).write_bytes(second)


def test_exchanged_tensors_of_one_size_are_found(out: Path) -> None:
    path, first, nbytes = tensor(out, "layers.0.attn.qkv")
    _, second, _ = tensor(out, "layers.2.attn.qkv")
    data = bytearray(path.read_bytes())
    data[first : first + nbytes], data[second : second + nbytes] = (
        data[second : second + nbytes],
        data[first : first + nbytes],
    )
    path.write_bytes(data)
    found(reshard("verify", out), "layers.0.attn.qkv", "layers.2.attn.qkv")


def test_a_stray_shard_is_found(shards: Path, out: Path) -> None:
    """Engines load what they find by its name."""
    (out / "rank-00002").mkdir()
    shutil.copy(out / "rank-00000" / "model.safetensors", out / "rank-00002")
    found(reshard("verify", out), "rank-00002/model.safetensors", "is not listed in manifest.json")


def edits(value: object, path: tuple[str | int, ...] = ()) -> list[tuple[str | int, ...]]:
    """Paths of everything in a JSON value; of lists the first two items."""
    below: list[tuple[str | int, ...]] = []
    if isinstance(value, dict):
        below = [each for key, item in value.items() for each in edits(item, (*path, key))]
    elif isinstance(value, list):
        below = [each for at, item in enumerate(value[:2]) for each in edits(item, (*path, at))]
    return [path, *below] if path else below


def edited(value: object, path: tuple[str | int, ...]) -> object:
    """A copy of a JSON value with one part changed."""
    copy = json.loads(json.dumps(value))
    at = copy
    for step in path[:-1]:
        at = at[step]
    old = at[path[-1]]
    at[path[-1]] = old + 1 if isinstance(old, int) else f"{old}x" if isinstance(old, str) else [] if old else "x"
    return copy


@pytest.mark.parametrize("name", ["manifest.json", "rank-00000/tensors.json", "source/files.json"])
def test_every_edit_of_our_own_files_is_found(name: str, shards: Path, out: Path) -> None:
    data = json.loads((shards / name).read_text())
    paths = [path for path in edits(data) if path != ("reshard",)]
    assert len(paths) > 7
    for path in paths:
        (out / name).write_text(json.dumps(edited(data, path), indent=1, ensure_ascii=False) + "\n")
        done = reshard("verify", out)
        assert done.code == 1, (path, done)
        assert name.split("/")[-1] in done.out, (path, done.out)


def test_another_format_version_is_refused_not_judged(out: Path) -> None:
    path = out / "manifest.json"
    path.write_text(path.read_text().replace('"reshard": "1.', '"reshard": "7.'))
    done = reshard("verify", out)
    assert done.code == 2
    assert "format version 7." in done.err and "newer reshard" in done.err


# Damage with digests made right


def test_digests_made_right_are_accepted_by_integrity_alone(source: Path, out: Path) -> None:
    """The tool of the tests below: `sign` makes integrity pass, so that they show what else finds a damage."""
    sign(out)
    assert reshard("verify", out, "--against", source).code == 0
    path, offset, _ = tensor(out, "norm", 1)
    flip(path, offset)
    assert reshard("verify", out).code == 1
    sign(out)
    assert reshard("verify", out).code == 0


def test_against_the_source_finds_a_flipped_bit_in_each_stored_tensor(
    source: Path, shards: Path, tmp_path: Path
) -> None:
    """Replicas and repeated heads too: TP 8 stores each KV head twice."""
    whole = tmp_path / "whole"
    assert reshard("convert", source, whole, "--tp", "8").code == 0
    for rank in (0, 5):
        stored = json.loads((whole / f"rank-{rank:05}" / "tensors.json").read_text())["tensors"]
        for name in {t["row"]: t["name"] for t in stored}.values():
            path, offset, nbytes = tensor(whole, name, rank)
            for at in (0, nbytes - 1):
                flip(path, offset + at)
                sign(whole)
                assert reshard("verify", whole).code == 0
                found(
                    reshard("verify", whole, "--against", source),
                    f"rank-{rank:05}/model.safetensors: {name}",
                    f"of {nbytes}",
                )
                flip(path, offset + at)
    sign(whole)
    assert reshard("verify", whole, "--against", source).code == 0


def test_against_the_source_finds_padding_that_is_not_zero(source: Path, out: Path) -> None:
    path, offset, nbytes = tensor(out, "embed", 1)  # 331 rows are 166 and 165, and one of zeros
    flip(path, offset + nbytes - 56)
    sign(out)
    found(reshard("verify", out, "--against", source), "embed: padding", "is not zero")


def test_against_the_source_finds_a_wrong_constant(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert reshard("convert", source, out, "--tp", "2", "--to", "vllm").code == 0
    index = json.loads((out / "rank-00001" / "tensors.json").read_text())
    scale = next(t for t in index["tensors"] if t["name"].endswith("_k_scale"))
    flip(out / index["file"], scale["offset"] + 3)
    sign(out)
    found(reshard("verify", out, "--against", source), scale["name"], "is not 1.0")


@pytest.mark.parametrize("name", ["tokenizer.json", "source/model.safetensors.residue"])
def test_against_the_source_finds_other_bytes_beside_the_weights(name: str, source: Path, out: Path) -> None:
    """Carried files, and what no row claims: the last bytes of this residue are a buffer."""
    flip(out / name, -2)
    sign(out)
    assert reshard("verify", out).code == 0
    found(reshard("verify", out, "--against", source), name.removeprefix("source/").removesuffix(".residue"))


def test_an_edited_config_contradicts_the_plan(out: Path) -> None:
    for key, value in (
        ("num_attention_heads", 4),
        ("vocab_size", 330),
        ("model_type", "mistral"),
        ("num_hidden_layers", 2),
    ):
        text = (out / "config.json").read_text()
        (out / "config.json").write_text(json.dumps(json.loads(text) | {key: value}))
        sign(out, tensors=False)
        done = reshard("verify", out)
        assert done.code == (0 if key == "model_type" else 1), (key, done)  # which table is used stands in the manifest
        (out / "config.json").write_text(text)


@pytest.mark.parametrize("name", ["manifest.json", "rank-00000/tensors.json", "source/files.json"])
def test_every_edit_that_would_mislead_is_found_although_digests_are_right(
    name: str, source: Path, shards: Path, tmp_path: Path
) -> None:
    """What tables, config.json and headers determine cannot be edited; what only the outside knows, the origin, can."""
    out = Path(shutil.copytree(shards, tmp_path / "out"))
    data = json.loads((shards / name).read_text())
    free = {"reshard", "root", "digest", "blocks", "model", "sha256"}  # a digest that is signed again is right again
    for path in edits(data):
        if free & {str(step) for step in path}:
            continue
        shutil.rmtree(out)
        shutil.copytree(shards, out)
        (out / name).write_text(json.dumps(edited(data, path)))
        try:
            sign(out, tensors=False)
        except (KeyError, TypeError, AttributeError, ValueError, OSError):
            continue  # no longer a manifest that could be signed; see the test without signing
        if json.loads((out / name).read_text()) == data:
            continue  # a size that is signed again is right again
        found(reshard("verify", out), name.split("/")[-1].split(".")[0])


def test_holes_that_are_elsewhere_are_found(shards: Path, out: Path, tmp_path: Path) -> None:
    """Moved by eight bytes, sizes unchanged: merging would write every tensor to a wrong place."""
    files = json.loads((shards / "source" / "files.json").read_text())
    files[0]["holes"] = [[low + 8, high + 8] for low, high in files[0]["holes"]]
    (out / "source" / "files.json").write_text(json.dumps(files))
    sign(out)
    found(reshard("verify", out), "source/files.json")
    assert reshard("convert", out, tmp_path / "back", "--to", "hf").code == 1
    assert not (tmp_path / "back").exists()


def test_a_wrong_digest_of_a_weights_file_is_found(out: Path) -> None:
    manifest = json.loads((out / "manifest.json").read_text())
    manifest["ranks"][1]["weights"]["digest"] = "0" * 32
    (out / "manifest.json").write_text(root_signed(manifest))
    found(reshard("verify", out), "rank-00001/model.safetensors")


# Other directories


def test_shards_of_another_model_are_a_mismatch(out: Path, tmp_path: Path) -> None:
    other = llama(tmp_path / "other", intermediate_size=96)
    found(reshard("verify", out, "--against", other), "mlp.", "88", "96")
    found(reshard("verify", out, "--against", other, "--json"), '"ok": false')
    same_shapes = llama(tmp_path / "same", llama_tensors(seed=1))
    found(reshard("verify", out, "--against", same_shapes), "differs from the source, first at byte 0")


def test_long_lists_of_failures_are_cut_and_counted(out: Path, tmp_path: Path) -> None:
    other = llama(tmp_path / "other", llama_tensors(seed=1))
    done = reshard("verify", out, "--against", other)
    assert len(done.out.splitlines()) < 30
    failed = next(line for line in done.out.splitlines() if "FAILED" in line)
    assert "more" in done.out and int(failed.split()[1]) > 20
    assert reshard("verify", out, "--against", other, "--json").json["checks"][1]["failed"] == int(failed.split()[1])


def hf_damages() -> list[tuple[str, Callable[[Path], None], tuple[str, ...]]]:
    def cut(directory: Path) -> None:
        os.truncate(directory / "model.safetensors", 1000)

    def unlink(directory: Path) -> None:
        (directory / "tokenizer.json").unlink()

    def edit(directory: Path) -> None:
        (directory / "tokenizer.json").write_text('{"a": 2}')

    return [
        ("weight", lambda directory: flip(directory / "model.safetensors", 100_000), ("model.safetensors", "differs")),
        ("buffer", lambda directory: flip(directory / "model.safetensors", -2), ("inv_freq", "differs")),
        ("truncated", cut, ("model.safetensors", "truncated")),
        ("missing", unlink, ("tokenizer.json", "not copied")),
        ("edited", edit, ("tokenizer.json", "differs")),
    ]


@pytest.mark.parametrize(("damage", "parts"), [pytest.param(d, p, id=name) for name, d, p in hf_damages()])
@pytest.mark.parametrize("other", ["original", "shards"])
def test_merged_files_against_the_original_or_the_shards(
    other: str, damage: Callable[[Path], None], parts: tuple[str, ...], source: Path, shards: Path, tmp_path: Path
) -> None:
    merged = tmp_path / "merged"
    assert reshard("convert", shards, merged, "--to", "hf").code == 0
    against = source if other == "original" else shards
    assert reshard("verify", merged, "--against", against).code == 0
    damage(merged)
    found(reshard("verify", merged, "--against", against), *parts)


@pytest.mark.parametrize("family", ["gpt_neox_old", "gpt_oss", "llama_bin", "mixtral"])
def test_families_with_transpositions_buffers_and_experts(family: str, tmp_path: Path) -> None:
    """A flipped bit in the middle of each row's first tensor, digests right: found against the source."""
    source, out = checkpoint(family), tmp_path / "out"
    assert reshard("convert", source, out, "--tp", "2").code == 0
    assert reshard("verify", out, "--against", source).code == 0
    stored = json.loads((out / "rank-00001" / "tensors.json").read_text())["tensors"]
    for name in {t["row"]: t["name"] for t in stored}.values():
        path, offset, nbytes = tensor(out, name, 1)
        flip(path, offset + nbytes // 2)
    sign(out)
    done = reshard("verify", out, "--against", source, "--json")
    assert done.code == 1
    assert done.json["checks"][0]["ok"] is True
    assert done.json["checks"][1]["failed"] == len({t["row"] for t in stored})


def test_another_model_is_told_before_it_is_run(shards: Path, tmp_path: Path) -> None:
    other = llama(tmp_path / "other", num_hidden_layers=2)
    done = reshard("verify", shards, "--against", other, "--only", "numerics")
    assert done.code == 1 and "these are different models" in done.err, done
    assert "Traceback" not in done.err


def test_the_same_weights_cut_into_other_files_are_the_same_weights(source: Path, shards: Path, tmp_path: Path) -> None:
    """Every element is compared; that the files are others is said, and is no failure."""
    again = tmp_path / "again"
    assert reshard("convert", source, again, "--to", "hf", "--max-file-size", "100KB").code == 0
    done = reshard("verify", shards, "--against", again, "--only", "weights")
    assert done.code == 0 and "is split into other files than merging would write" in " ".join(done.out.split()), done
    path = next(again.glob("*.safetensors"))
    flip(path, -1)
    assert reshard("verify", shards, "--against", again, "--only", "weights").code == 1


def test_weights_that_no_rank_has_are_found_behind_links_and_under_other_names(out: Path, tmp_path: Path) -> None:
    shutil.copytree(out / "rank-00000", tmp_path / "elsewhere")
    (out / "rank-00007").symlink_to(tmp_path / "elsewhere")
    (out / "round").symlink_to(out)
    found(reshard("verify", out), "rank-00007/model.safetensors: is not listed in manifest.json")
    (out / "rank-00007").unlink()
    (out / "round").unlink()
    assert reshard("verify", out).code == 0
    (out / "pytorch_model.bin").write_bytes(b"")
    found(reshard("verify", out), "pytorch_model.bin: is not listed in manifest.json")


@pytest.mark.parametrize("name", ["rank-00000/model.safetensors", "manifest.json", "config.json"])
def test_a_pipe_in_the_place_of_a_file_is_waited_for_by_nobody(out: Path, name: str) -> None:
    (out / name).unlink()
    os.mkfifo(out / name)
    for words in (("verify", out), ("fingerprint", out), ("explain", out, "norm")):
        done = reshard(*words)
        assert done.code == 1 and name.split("/")[-1] in done.out + done.err, (words, done)


@pytest.mark.parametrize(
    "command", [("verify", "OUT", "--only", "integrity"), ("fingerprint", "OUT"), ("diff", "OUT", "OUT")], ids=" ".join
)
def test_closed_standard_error_is_no_failure(shards: Path, command: tuple[str, ...]) -> None:
    words = [str(shards) if word == "OUT" else word for word in command]
    for redirect in ("2>&-", "2>/dev/full --progress json"):
        line = f"{shlex.join([sys.executable, '-m', 'reshard', *words])} {redirect}"
        done = subprocess.run(
            ["sh", "-c", line], stdout=subprocess.PIPE, env=environment(), timeout=WATCHDOG, check=False
        )
        assert done.returncode == 0 and done.stdout, line
    done = subprocess.run(
        ["sh", "-c", f"{shlex.join([sys.executable, '-m', 'reshard', 'verify', 'no'])} 2>/dev/full"],
        env=environment(),
        check=False,
    )
    assert done.returncode == 2
