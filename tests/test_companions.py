"""What lies beside the weights: copied and back byte for byte, whole folders too, or left out and named;
never a file from elsewhere.
"""

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from running import llama, llama_tensors, mounted, names, noise, process, refused, reshard, save, sign, tree

from reshard.checkpoints import manifest
from reshard.checkpoints.companions import FOLDER_MAX, in_line, objection, sort_out
from reshard.errors import ReshardError

DENSE = {"linear.weight": noise("F32", 4, 4)}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return llama(tmp_path / "model")


def put(root: Path, **files: str) -> None:
    for name, text in files.items():
        path = root / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


@pytest.fixture
def embedder(source: Path) -> Path:
    """A sentence-transformers model with chat templates: folders of which some are parts of it, and some are not."""
    files = {
        "1_Pooling/config.json",
        "additional_chat_templates/tool_use.jinja",
        "additional_chat_templates/deep/er/x",
        "2_Dense/config.json",
    }
    for name in files | {
        "empty.txt",
        "original/params.json",
        ".git/config",
        ".cache/huggingface/x",
        "assets/.git/HEAD",
        "assets/logo.png",
    }:
        put(source, **{name.replace("/", "__"): f"what {name} says"})
    for name in ("2_Dense", "checkpoint-500", "rank-00000", "source"):
        (source / name).mkdir(exist_ok=True)
        save(source / name / "model.safetensors", DENSE)
    put(
        source,
        **{
            "original__consolidated.00.pth": "weights",
            "checkpoint-500__trainer_state.json": "{}",
            "source__readme": "?",
        },
    )
    put(source, **{"modules.json": json.dumps([{"path": path} for path in ("", "1_Pooling", "2_Dense")])})
    with (source / "assets" / "video.mp4").open("wb") as file:
        file.truncate((64 << 20) + 1)
    os.utime(source / "1_Pooling" / "config.json", ns=(10**18 + 7, 10**18 + 7))
    return source


LEFT = {
    ".cache/": "hidden folder",
    ".git/": "hidden folder",
    "assets/.git/": "hidden folder",
    "assets/video.mp4": "over 64 MiB",
    "checkpoint-500/": "other weights",
    "original/": "other weights",
    "rank-00000/": "name of a folder that shard directories use themselves",
    "source/": "name of a folder that shard directories use themselves",
}


def left(told: Any) -> dict[str, str]:
    return {file["name"]: file["why"] for file in told["left"]}


def wanted(source: Path) -> dict[str, bytes]:
    return {name: data for name, data in tree(source).items() if not any(name.startswith(start) for start in LEFT)}


# Folders


def test_small_folders_come_along_and_back_byte_for_byte_and_the_rest_is_said_by_all(
    embedder: Path, tmp_path: Path
) -> None:
    out, across, back, anew = (tmp_path / name for name in ("out", "across", "back", "anew"))
    assert left(reshard("convert", embedder, out, "--tp", "2", "--json").json) == LEFT
    assert reshard("convert", embedder, out, "--tp", "2", "--json").json["already"]
    assert left(reshard("convert", out, across, "--tp", "4", "--json").json) == LEFT
    assert left(reshard("convert", across, back, "--to", "hf", "--json").json) == LEFT
    assert tree(back) == wanted(embedder) and "2_Dense/model.safetensors" in tree(back)
    assert (back / "1_Pooling" / "config.json").stat().st_mtime_ns == 10**18 + 7
    assert reshard("convert", out, back, "--to", "hf", "--json").json["already"]
    assert reshard("convert", out, anew, "--to", "hf", "--max-file-size", "20KB").code == 0
    assert (
        tree(anew).items() >= {name: data for name, data in tree(back).items() if name != "model.safetensors"}.items()
    )

    for done in (reshard("verify", out, "--json"), reshard("verify", out, "--against", embedder, "--json")):
        assert done.code == 0 and left(done.json) == LEFT, done
        assert [check["unproven"] for check in done.json["checks"]] == [[]] * len(done.json["checks"])
    for words in (
        ("convert", embedder, out, "--tp", "2"),
        ("convert", out, back, "--to", "hf"),
        ("verify", out),
        ("verify", across),
    ):
        text = " ".join(reshard(*words).out.split())
        assert all(f"{name}" in text and f"({why})" in text for name, why in LEFT.items()), text
    assert left(reshard("convert", back, tmp_path / "again", "--tp", "2", "--json").json) == {}
    assert (
        tree(tmp_path / "again").items()
        == {name: data for name, data in tree(out).items() if name != manifest.LEFT}.items()
    )


def test_a_changed_file_in_a_folder_is_noticed_by_all(embedder: Path, tmp_path: Path) -> None:
    out, back = tmp_path / "out", tmp_path / "back"
    assert reshard("convert", embedder, out, "--tp", "2", "--sha256").code == 0
    assert reshard("convert", out, back, "--to", "hf").code == 0
    path = embedder / "1_Pooling" / "config.json"
    text = path.read_text()
    path.write_text(text.upper())
    refused(reshard("convert", embedder, out, "--tp", "2"), 2, "1_Pooling/config.json", "--overwrite")
    assert "1_Pooling/config.json: differs" in reshard("verify", out, "--against", embedder).out
    path.unlink()
    done = reshard("verify", out, "--against", embedder, "--json")
    assert "1_Pooling/config.json" in done.json["checks"][1]["unproven"][0] and not done.json["proven"]
    assert reshard("convert", embedder, out, "--tp", "2", "--overwrite").code == 0
    assert reshard("convert", embedder, back, "--to", "hf", "--overwrite").code == 0
    assert "1_Pooling/config.json" not in tree(out).keys() | tree(back).keys() and not (back / "1_Pooling").exists()
    (out / "2_Dense" / "model.safetensors").unlink()
    assert "2_Dense/model.safetensors: is missing" in reshard("verify", out).out


@pytest.mark.parametrize("name", ["tokenizer.json", "generation_config.json", "README.md"])
def test_a_pipe_in_the_place_of_a_file_of_the_checkpoint_is_an_error(name: str, source: Path, tmp_path: Path) -> None:
    """Only what no checkpoint needs is left out."""
    (source / name).unlink(missing_ok=True)
    os.mkfifo(source / name)
    refused(reshard("convert", source, tmp_path / "out", "--tp", "2"), 2, f"{name}: not a regular file")


@pytest.mark.parametrize("command", ["convert", "inspect"])
def test_a_readme_that_cannot_be_read_is_an_error(command: str, source: Path, tmp_path: Path) -> None:
    """Its license goes into the manifest: another root digest because a disk failed would be wrong,
    and so would success.
    """
    put(source, **{"README.md": "---\nlicense: mit\n---\n"})
    code = """
import errno, io, os, sys
opened = io.open
def failing(what, *more, **given):
    if os.path.basename(str(what)) == "README.md":
        raise OSError(errno.EIO, os.strerror(errno.EIO))
    return opened(what, *more, **given)
io.open = failing
from reshard.cli import main
main(sys.argv[1:])
"""
    more = (tmp_path / "out", "--tp", "2") if command == "convert" else ()
    refused(process(command, source, *more, code=code), 3, "reading", "README.md", "Input/output error")
    assert not (tmp_path / "out").exists()


def test_overwrite_does_not_delete_a_users_folder(source: Path, tmp_path: Path) -> None:
    assert reshard("convert", source, tmp_path / "back", "--to", "hf").code == 0
    put(tmp_path / "back", thesis__chapter="1")
    refused(reshard("convert", source, tmp_path / "back", "--to", "hf", "--overwrite"), 2, "thesis/chapter")


@pytest.mark.parametrize(
    "text", ["{", "[1, null, {}]", '{"path": "x"}', "[" * 100_000, '[{"path": 1}, {"path": ["x"]}]']
)
def test_a_malformed_list_of_modules_names_none(text: str, source: Path, tmp_path: Path) -> None:
    put(source, **{"modules.json": text})
    (source / "x").mkdir()
    save(source / "x" / "model.safetensors", DENSE)
    assert left(reshard("convert", source, tmp_path / "out", "--tp", "2", "--json").json) == {"x/": "other weights"}


def test_folders_of_very_many_files_are_left_out(source: Path, tmp_path: Path) -> None:
    for number in range(FOLDER_MAX + 1):
        put(source, **{f"data__{number % 7}__{number}": ""})
    assert left(reshard("convert", source, tmp_path / "out", "--tp", "2", "--json").json) == {
        "data/": "over 1000 files"
    }
    (source / "data" / "0" / "0").unlink()
    assert left(reshard("convert", source, tmp_path / "some", "--tp", "2", "--json").json) == {}


def test_what_of_a_folder_is_weights_that_count_does_not_keep_the_rest_from_coming_along(
    source: Path, tmp_path: Path
) -> None:
    (source / "weights" / "old").mkdir(parents=True)
    shutil.move(source / "model.safetensors", source / "weights" / "a.safetensors")
    index = {"weight_map": dict.fromkeys(llama_tensors(), "weights/a.safetensors")}
    put(
        source,
        **{"model.safetensors.index.json": json.dumps(index), "weights__notes.txt": "n", "weights__old__b.bin": "b"},
    )
    assert left(reshard("convert", source, tmp_path / "out", "--tp", "2", "--json").json) == {
        "weights/old/b.bin": "other weights"
    }
    assert reshard("convert", tmp_path / "out", tmp_path / "back", "--to", "hf").code == 0
    assert tree(tmp_path / "back") == {name: data for name, data in tree(source).items() if name != "weights/old/b.bin"}


def test_names_decide_alike_for_any_listing() -> None:
    for name in (
        "../x",
        "/etc/x",
        "a/../x",
        "a//x",
        "./x",
        "a/\n",
        "a\\b",
        ".git/config",
        "a/.b/c",
        "SOURCE/x",
        "Rank-00003/x",
        "model.gguf",
    ):
        assert objection(name) is not None, name
    for name in (".gitattributes", "a/.hidden", "1_Pooling/config.json", "ränk/ü", "sources/x"):
        assert objection(name) is None, name
    found = {"config.json": 1, "../x": 1, "a/b": 1, "a/.git/x": 1, "a/.git/y": 2, ".x/y": 1}
    carried, out = sort_out(found, (), lambda: b"")
    assert carried == ["a/b", "config.json"] or carried == ["config.json", "a/b"]
    assert {file.name for file in out} == {"../", "a/.git/", ".x/"}


def test_a_file_system_without_upper_case_is_told(source: Path, tmp_path: Path) -> None:
    put(source, **{"readme.md": "one", "README.md": "two"})
    with mounted(tmp_path / "flat", "-t", "tmpfs", "-o", "casefold,size=4M", "tmpfs") as flat:
        (flat / "in").mkdir()
        if subprocess.run(["chattr", "+F", flat / "in"], capture_output=True).returncode:
            pytest.skip("no folder here can be made to ignore case")
        refused(reshard("convert", source, flat / "in" / "out", "--tp", "2"), 3, "readme.md", "upper and lower case")


# Files that vanish


@pytest.mark.parametrize(
    "name",
    [
        "tokenizer.json",
        "generation_config.json",
        "config.json",
        "notes.txt",
        "1_Pooling/config.json",
        "1_Pooling",
        "model.safetensors",
    ],
)
def test_a_dangling_link_is_an_error_that_names_it(name: str, source: Path, tmp_path: Path) -> None:
    path = source / name
    path.parent.mkdir(exist_ok=True)
    path.unlink(missing_ok=True)
    path.symlink_to(source / "gone" / path.name)
    for words in (
        ("convert", source, tmp_path / "out", "--tp", "2"),
        ("plan", source, "--tp", "2"),
        ("convert", source, tmp_path / "o", "--to", "hf"),
    ):
        refused(reshard(*words), 2, name)
    assert names(tmp_path) == ["model"]


def test_a_dangling_link_in_what_is_left_out_anyway_is_none(source: Path, tmp_path: Path) -> None:
    for name in ("model.gguf", "original/consolidated.00.pth", ".git/x"):
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).symlink_to("gone")
    told = left(reshard("convert", source, tmp_path / "out", "--tp", "2", "--json").json)
    assert told == {"model.gguf": "other weights", "original/": "other weights", ".git/": "hidden folder"}


def test_links_in_a_circle_are_an_error(source: Path, tmp_path: Path) -> None:
    (source / "tokenizer.json").symlink_to("vocab.json")
    (source / "vocab.json").symlink_to("tokenizer.json")
    refused(reshard("convert", source, tmp_path / "out", "--tp", "2"), 3, "tokenizer.json", "levels of symbolic links")


# What the kernel answers for a file on a broken disk or a stale mount.
BROKEN = """
import errno, os, sys
from pathlib import Path
name, call = sys.argv.pop(1), sys.argv.pop(1)
if call == "stat":
    really = Path.stat
    def stat(self, **options):
        if self.name == name:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), str(self))
        return really(self, **options)
    Path.stat = stat
else:
    really = os.open
    def open(path, *args, **options):
        if os.path.basename(path) == name:
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        return really(path, *args, **options)
    os.open = open
from reshard.cli import main
main()
"""


@pytest.mark.parametrize("call", ["stat", "open"])
@pytest.mark.parametrize("name", ["tokenizer.json", "pooling.json"])
def test_an_error_of_the_machine_leaves_no_file_out(name: str, call: str, source: Path, tmp_path: Path) -> None:
    put(source, **{"tokenizer.json": "{}", "1_Pooling__pooling.json": "{}"})
    done = process(name, call, "convert", source, tmp_path / "out", "--tp", "2", code=BROKEN)
    refused(done, 3, name)
    assert names(tmp_path) == ["model"]


def test_a_config_that_would_be_left_out_is_refused(source: Path, tmp_path: Path) -> None:
    """No directory without config.json is ever written: nothing would open it."""
    config = source / "config.json"
    config.write_text(config.read_text() + " " * (64 << 20))
    assert reshard("convert", source, tmp_path / "out", "--tp", "2").code == 2
    assert names(tmp_path) == ["model"]


# Links


def test_links_inside_the_checkpoint_are_followed(source: Path, tmp_path: Path) -> None:
    put(source, **{"tokenizer.json": "{}", "a__b.txt": "b"})
    (source / "notes.txt").symlink_to("a/b.txt")
    (source / "linked").symlink_to("a")
    (source / "a" / "round").symlink_to("..")
    linked = tmp_path / "link to it"
    linked.symlink_to(source)
    done = reshard("convert", linked, tmp_path / "out", "--tp", "2", "--json")
    assert left(done.json) == {"a/round/": "link to a folder above it", "linked/round/": "link to a folder above it"}
    assert {"notes.txt", "linked/b.txt", "a/b.txt"} <= tree(tmp_path / "out").keys()
    assert not (tmp_path / "out" / "notes.txt").is_symlink()


def test_links_out_of_the_checkpoint_are_left_out_and_said(source: Path, tmp_path: Path) -> None:
    put(tmp_path, secrets__passwd="root:x:0")
    (source / "1_Pooling").mkdir()
    links = {
        "notes.txt": "secrets/passwd",
        "1_Pooling/config.json": "secrets/passwd",
        "deep": "secrets",
        "gone.txt": "x/y",
    }
    for name, target in links.items():
        (source / name).symlink_to(tmp_path / target)
    done = reshard("convert", source, tmp_path / "out", "--tp", "2", "--json")
    assert left(done.json) == dict.fromkeys(links, "link out of the checkpoint")
    assert b"root:x:0" not in b"".join(tree(tmp_path / "out").values())
    assert "notes.txt" in reshard("verify", tmp_path / "out", "--against", source).out


@pytest.mark.parametrize("listed", ["notes.txt", "deep/passwd", "tokenizer.json", "source/notes.residue"])
def test_no_link_of_a_shard_directory_leads_out_of_it(listed: str, source: Path, tmp_path: Path) -> None:
    """Not even where it is listed, with its digest, by whoever signed the directory again."""
    put(tmp_path, secrets__passwd="root:x:0")
    out = tmp_path / "out"
    assert reshard("convert", source, out, "--tp", "2").code == 0
    link = out / ("deep" if listed == "deep/passwd" else listed)
    link.symlink_to(tmp_path / "secrets" / ("" if listed == "deep/passwd" else "passwd"))
    data = json.loads((out / "manifest.json").read_text())
    kind = "source" if listed.startswith("source/") else "carried"
    data[kind] = sorted(
        [*data[kind], {"file": listed, "size": 0, "digest": "0" * 32}], key=lambda entry: str(entry["file"])
    )
    (out / "manifest.json").write_text(json.dumps(data))
    sign(out)
    for words in (
        ["verify", out],
        ["convert", out, tmp_path / "back", "--to", "hf"],
        ["convert", out, tmp_path / "one", "--tp", "1"],
    ):
        done = reshard(*words)
        assert done.code == 1 and listed in done.err + done.out and "outside of the directory" in done.err + done.out, (
            done
        )
    assert not (tmp_path / "back").exists() and not (tmp_path / "one").exists()


def test_shards_may_be_links_to_shared_storage(source: Path, tmp_path: Path) -> None:
    out, away = tmp_path / "out", tmp_path / "away"
    assert reshard("convert", source, out, "--tp", "2").code == 0
    before = tree(out)
    away.mkdir()
    for name in ("rank-00001", "source", "config.json"):
        shutil.move(out / name, away / name)
        (out / name).symlink_to(away / name)
    assert reshard("verify", out).code == 0
    assert reshard("convert", out, tmp_path / "back", "--to", "hf").code == 0
    assert tree(tmp_path / "back") == tree(source) and before


@pytest.mark.parametrize("name", ["tokenizer.json", "README.md", "chat_template.jinja", "generation_config.json"])
def test_files_of_a_checkpoint_may_be_links_to_files_of_their_name_elsewhere(
    name: str, source: Path, tmp_path: Path
) -> None:
    """As in folders made of links to shared storage. A link of such a name to any other file is refused."""
    put(tmp_path, **{f"shared__{name}": "{}", "secrets__key": "secret"})
    shutil.move(source / "config.json", tmp_path / "shared" / "config.json")
    shutil.move(source / "model.safetensors", tmp_path / "shared" / "some blob")
    (source / "config.json").symlink_to(tmp_path / "shared" / "config.json")
    (source / "model.safetensors").symlink_to(tmp_path / "shared" / "some blob")
    (source / name).symlink_to(tmp_path / "shared" / name)
    done = reshard("convert", source, tmp_path / "out", "--tp", "2", "--json")
    assert done.code == 0 and left(done.json) == {}
    assert {name, "config.json"} <= tree(tmp_path / "out").keys()
    (source / name).unlink()
    (source / name).symlink_to(tmp_path / "secrets" / "key")
    refused(reshard("convert", source, tmp_path / "no", "--tp", "2"), 2, name, "secrets/key", "another name")


def test_the_hubs_cache_is_one_place(source: Path, tmp_path: Path) -> None:
    repo = tmp_path / "hub" / "models--org--name"
    snapshot, blobs = repo / "snapshots" / "abc", repo / "blobs"
    blobs.mkdir(parents=True)
    put(source, **{"tokenizer.json": "{}", "1_Pooling__config.json": "{1}", "any.txt": "any"})
    for number, name in enumerate(sorted(tree(source))):
        shutil.copy(source / name, blobs / str(number))
        (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
        (snapshot / name).symlink_to(os.path.relpath(blobs / str(number), (snapshot / name).parent))
    done = reshard("convert", snapshot, tmp_path / "out", "--tp", "2", "--json")
    assert done.code == 0 and left(done.json) == {}
    assert {"tokenizer.json", "1_Pooling/config.json", "any.txt"} <= tree(tmp_path / "out").keys()
    (blobs / "1").unlink()
    refused(reshard("convert", snapshot, tmp_path / "no", "--tp", "2"), 2, "which does not exist")


# Files that appear


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("shards")
    assert reshard("convert", llama(root / "model"), root / "out", "--tp", "2", "--sha256").code == 0
    return root / "out"


@pytest.mark.parametrize(
    "name",
    ["chat_template.jinja", "adapter_model.bin", "modeling_evil.py", "model.gguf", "source/x", "rank-00000/x", ".env"],
)
def test_a_file_that_no_manifest_lists_is_named_and_makes_it_unproven(name: str, shards: Path, tmp_path: Path) -> None:
    out = shutil.copytree(shards, tmp_path / "out")
    words = ("verify", out, "--against", shards.parent / "model")
    assert reshard("verify", out, "--strict").code == 0
    put(out, **{name.replace("/", "__"): "?"})
    done = reshard(*words, "--json")
    check = done.json["checks"][0]
    assert done.code == 0 and check["ok"] and not done.json["proven"]
    assert name in check["unproven"][0] and check["numbers"]["unlisted"] == [name]
    text = reshard("verify", out).out
    assert (
        f"unproven: manifest.json does not list {name}" in " ".join(text.split()) and "the files are intact" not in text
    )
    for strict in (("verify", out, "--strict"), (*words, "--strict")):
        done = reshard(*strict)
        assert done.code == 1 and f"{name}: is not listed in manifest.json" in done.out
    refused(reshard("verify", out, "--strict", "--only", "weights"), 2, "--strict")


def test_the_work_of_jobs_is_no_stray(shards: Path, tmp_path: Path) -> None:
    out = shutil.copytree(shards, tmp_path / "out")
    for name in ("new", "old"):
        (out / ".reshard-work" / name).mkdir(parents=True)
        save(out / ".reshard-work" / name / "model.safetensors", DENSE)
    assert reshard("verify", out, "--strict").code == 0


def test_help_says_that_digests_are_no_signatures() -> None:
    text = " ".join(reshard("verify", "--help").out.split())
    assert "Digests prove integrity, not authenticity" in text and "root digest" in text


@pytest.mark.parametrize(
    "name", [".git/config", "rank-00000/x", "source/x", "model.gguf", "a/.ssh/authorized_keys", "manifest.json"]
)
def test_a_manifest_that_lists_what_no_conversion_copies_is_refused(name: str, shards: Path, tmp_path: Path) -> None:
    """Merging would put it where the one who merges works: .git/config runs programs."""
    out = shutil.copytree(shards, tmp_path / "out")
    if name != "manifest.json":
        put(out, **{name.replace("/", "__"): "[core]\nfsmonitor = run me"})
    edited = json.loads((out / "manifest.json").read_text())
    edited["carried"].append({"file": name, "size": 0, "digest": "0" * 32})
    (out / "manifest.json").write_text(json.dumps(edited))
    if name != "manifest.json":
        sign(out)
    done = reshard("convert", out, tmp_path / "back", "--to", "hf")
    assert done.code == 1 and "Traceback" not in done.err
    assert reshard("verify", out).code == 1
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize(
    "text", ["{", "[1]", '[{"name": 1, "size": 2, "why": ""}]', '[{"name": "a"}]', "null", "[" * 100_000]
)
def test_a_damaged_note_of_what_was_left_out_is_said(text: str, shards: Path, tmp_path: Path) -> None:
    out = shutil.copytree(shards, tmp_path / "out")
    put(out, **{"source__left.json": text})
    done = reshard("verify", out)
    assert done.code == 1 and "left.json" in done.out
    done = refused(reshard("convert", out, tmp_path / "back", "--to", "hf"), 1, "left.json", "may be deleted")


def test_names_are_lines() -> None:
    assert in_line("a\nb\x1b") == "a\\nb\\x1b"
    with pytest.raises(ReshardError):
        sort_out({"a": ReshardError("no")}, (), lambda: b"")
