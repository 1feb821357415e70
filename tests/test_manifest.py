"""manifest.json and source/files.json: canonical text, strict reading, names that cannot lead out of the directory."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from running import digest, llama, root_signed, tree
from running import reshard as command

from reshard.checkpoints import manifest
from reshard.checkpoints.published import Original
from reshard.errors import MismatchError, ReshardError


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("manifest")
    source = llama(place / "model")
    (source / "tokenizer.json").write_text("{}")
    assert command("convert", source, place / "shards", "--tp", "2", "--pp", "3").code == 0
    return place / "shards"


@pytest.fixture
def out(shards: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(shards, tmp_path / "out"))


def read(out: Path) -> dict[str, Any]:
    return dict(json.loads((out / "manifest.json").read_text()))


def test_it_lists_every_file_with_size_and_digest(shards: Path) -> None:
    known = manifest.load(shards)
    listed = {file.name: file for file in known.files()}
    assert listed.keys() | {"manifest.json"} == tree(shards).keys()
    for name, file in listed.items():
        assert file.size == (shards / name).stat().st_size
        if not name.endswith(".safetensors"):
            assert file.digest == digest((shards / name).read_bytes())


def test_the_root_digest_covers_everything_it_says(shards: Path) -> None:
    """Also the manifest itself, so that no key of it can be edited; as docs/format.md has it."""
    assert root_signed(read(shards)) == (shards / "manifest.json").read_text()
    assert manifest.root_of(shards, manifest.load(shards)) == read(shards)["root"]


def test_it_says_no_time_no_place_and_no_machine(shards: Path, tmp_path: Path) -> None:
    """The same bytes from a copy of the source elsewhere, at another time."""
    other = tmp_path / "elsewhere" / "with another name"
    shutil.copytree(shards.parent / "model", other)
    assert command("convert", other, tmp_path / "out", "--tp", "2", "--pp", "3").code == 0
    assert tree(tmp_path / "out") == tree(shards)
    text = (shards / "manifest.json").read_text()
    assert str(tmp_path.parent) not in text and "model/" not in text
    assert not re.search(r"20\d\d-\d\d-\d\d|\d\d:\d\d", text)


def test_it_is_read_as_it_was_written(shards: Path) -> None:
    known = manifest.load(shards)
    assert (known.format, known.family, known.engine, known.exact) == ("native", "llama", None, True)
    assert (known.mesh.tp, known.mesh.pp, known.mesh.world, len(known.ranks)) == (2, 3, 6, 6)
    assert [rank.weights.name for rank in known.ranks] == [f"rank-0000{rank}/model.safetensors" for rank in range(6)]
    assert [file.name for file in known.carried] == ["config.json", "tokenizer.json"]


def test_a_later_minor_version_with_keys_of_its_own_is_read(out: Path) -> None:
    data = read(out)
    data["reshard"] = data["reshard"].split(".")[0] + ".99"
    data["later"] = {"a": [1]}
    data["ranks"][0]["later"] = data["mesh"]["later"] = True
    (out / "manifest.json").write_text(root_signed(data))
    assert manifest.load(out).mesh.tp == 2
    assert command("verify", out).code == 0
    assert command("convert", out, out.parent / "back", "--to", "hf").code == 0


@pytest.mark.parametrize("version", ["2.0", "0.9", "10.0", ""])
def test_another_major_version_is_refused(version: str, out: Path) -> None:
    (out / "manifest.json").write_text(json.dumps(read(out) | {"reshard": version}))
    with pytest.raises(ReshardError, match="format version"):
        manifest.load(out)
    for words in (("verify", out), ("convert", out, out.parent / "x", "--tp", "2"), ("inspect", out)):
        done = command(*words)
        assert done.code == 2 and "install a newer reshard" in done.err


JUNK: list[Any] = [None, True, -1, 3.5, "", "x", [], {}, [1], {"a": 1}, "\ud800", 10**30]


def test_a_malformed_manifest_is_refused_in_words(shards: Path, out: Path) -> None:
    """Each key missing, and of every wrong kind: MismatchError or, where the value may be so, the value."""
    data = read(shards)
    for key in data:
        for value in ["missing", *JUNK]:
            changed = (
                {name: item for name, item in data.items() if name != key}
                if value == "missing"
                else data | {key: value}
            )
            (out / "manifest.json").write_text(json.dumps(changed))
            try:
                manifest.load(out)
            except ReshardError as error:
                assert str(out / "manifest.json") in error.message or "--" in error.message
                continue
            assert command("verify", out).code in (1, 2)


@pytest.mark.parametrize(
    "name", ["../x", "/etc/passwd", "a/../../x", "", ".", "..", "a\\b", "a\0b", "a\nb", "\ud800", "./a", "a/", "a//b"]
)
def test_a_name_that_leads_elsewhere_is_refused(name: str, shards: Path, out: Path) -> None:
    """In each list of the manifest, and in files.json, whose names merging writes to."""
    for place in ("carried", "source", "ranks"):
        data = read(shards)
        entry = data[place][0]["weights"] if place == "ranks" else data[place][0]
        entry["file"] = name
        (out / "manifest.json").write_text(json.dumps(data))
        with pytest.raises(MismatchError, match=r"which is not a file in|is not valid Unicode"):
            manifest.load(out)
    files = json.loads((shards / "source" / "files.json").read_text())
    (out / "source" / "files.json").write_text(json.dumps([files[0] | {"name": name}]))
    if re.fullmatch(r"[\x20-\x7e]+", name) and not name.startswith("/"):  # with a residue at that place
        shutil.copytree(out / "source", out / "source" / "a", dirs_exist_ok=True)
        residue = out / "source" / f"{name}.residue"
        residue.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(shards / "source" / "model.safetensors.residue", residue)
    with pytest.raises(MismatchError, match=r"files\.json"):
        manifest.load_originals(out)


@pytest.mark.parametrize(
    "change",
    [
        {"size": -1},
        {"size": True},
        {"size": "5"},
        {"size": 10**30},
        {"holes": [[5, 4]]},
        {"holes": [[0, 10**30]]},
        {"holes": [[100, 200], [150, 300]]},
        {"holes": [[-5, 10]]},
        {"holes": [[0.0, 8]]},
        {"holes": []},
        {"holes": None},
        {"holes": [[1]]},
        {"sha256": 5},
    ],
    ids=str,
)
def test_files_json_that_cannot_be_is_refused(change: dict[str, Any], shards: Path, out: Path) -> None:
    files = json.loads((shards / "source" / "files.json").read_text())
    (out / "source" / "files.json").write_text(json.dumps([files[0] | change]))
    with pytest.raises(MismatchError, match=r"files\.json"):
        manifest.load_originals(out)


def test_originals_are_read_as_they_were_written(shards: Path) -> None:
    (original,) = manifest.load_originals(shards)
    source = shards.parent / "model" / "model.safetensors"
    assert (original.name, original.size, original.container) == (
        "model.safetensors",
        source.stat().st_size,
        "safetensors",
    )
    assert original.mtime_ns == source.stat().st_mtime_ns
    assert manifest.dump_originals([original]) == (shards / "source" / "files.json").read_bytes()
    residue = manifest.residue_path(shards, original.name).read_bytes()
    assert residue == b"".join(source.read_bytes()[low:high] for low, high in original.residue())


def test_holes_and_residue_make_up_the_file() -> None:
    original = Original("a", 100, "safetensors", 0, None, ((10, 20), (20, 30), (90, 100)))
    assert original.residue() == [(0, 10), (30, 90)]
    assert Original("a", 5, "plain", 0).residue() == [(0, 5)]
    assert Original("a", 0, "plain", 0).residue() == []


@pytest.mark.parametrize("text", ["", "{}", '{"family": "llama"}', "not json", '{"version": 3, "files": []}'])
def test_a_file_of_that_name_that_is_none_makes_no_shard_directory(text: str, tmp_path: Path) -> None:
    """A published checkpoint may hold a manifest.json of somebody else's."""
    source = llama(tmp_path / "model")
    (source / "manifest.json").write_text(text)
    assert not manifest.present(source)
    assert command("inspect", source, "--json").json["layout"] == "published (Hugging Face)"
    assert command("convert", source, tmp_path / "out", "--tp", "2").code == 2  # it would be carried over our own
