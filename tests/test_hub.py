"""Hub ids, against a small Hub on loopback that speaks as the real one does. Each client is a process of its own,
as users start it.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fixtures import copy
from hub_server import TOKEN, Fault, Hub, git_sha1, sha256
from safetensors import safe_open

from reshard.checkpoints.remote import AHEAD
from reshard.containers import safetensors
from reshard.inputs import limits
from reshard.store.hub import is_id, ref

ID = "org/tiny"
CARD = "---\nlanguage: en\nlicense: apache-2.0\n---\n# Tiny\n"
WEIGHTS = {f"model-{n:05}-of-00007.safetensors" for n in range(1, 8)}
INDEX = "model.safetensors.index.json"
SMALL = {".gitattributes", "README.md", "config.json", "generation_config.json", "tokenizer.json"}
OTHERS = {
    "consolidated.safetensors",
    "model.gguf",
    "original/consolidated.00.pth",
    "pytorch_model.bin",
    "onnx/model.onnx",
}

# Run in the client; `run` gives expressions. Pauses between attempts are shortened, nothing else is.
CLIENT = """
import json, sys
from reshard.checkpoints import remote
from reshard.checkpoints.opening import open_any
from reshard.errors import ReshardError
from reshard.store import hub, hub_errors, location
from reshard.store.store import Ahead

def facts(source):
    originals = [(o.name, o.size, o.sha256) for o in source.originals]
    tensors = {
        name: (originals[at][0], e.dtype, list(e.shape), e.offset, e.nbytes) for name, (at, e) in source.tensors.items()
    }
    carried, left = [(c.name, c.size) for c in source.carried], [(e.name, e.size, e.why) for e in source.left]
    origin = source.origin.id, source.origin.commit, source.origin.license
    where, root = source.where, source.root and str(source.root)
    return dict(originals=originals, tensors=tensors, carried=carried, left=left, origin=origin, where=where, root=root)

hub_errors.PAUSES = (0.01, 0.01)
for expression in sys.argv[1:]:
    try:
        print(json.dumps(eval(expression)))
    except ReshardError as error:
        print(json.dumps(dict(error=error.message, hint=error.hint, code=error.exit_code)))
"""

Client = Callable[..., Any]


@pytest.fixture
def hub() -> Iterator[Hub]:
    with Hub() as server:
        yield server


@pytest.fixture
def tiny(tmp_path: Path, hub: Hub) -> Path:
    """A published checkpoint with everything beside it that repositories also hold."""
    root = copy("llama", tmp_path / "published")
    (root / "README.md").write_text(CARD)
    (root / "tokenizer.json").write_text("{}")
    (root / ".gitattributes").write_text("*.safetensors filter=lfs\n")
    for name in sorted(OTHERS):
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_bytes(name.encode() * 5000)
    hub.add(ID, root, card={"license": "apache-2.0"})
    return root


@pytest.fixture
def environment(hub: Hub, tmp_path: Path) -> dict[str, str]:
    """A user with an empty cache and no token, whose Hub is the one on loopback."""
    ours = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("HF_", "HUGGING")) and "proxy" not in name.lower()
    }
    return ours | {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_TELEMETRY": "1"}


@pytest.fixture
def run(environment: dict[str, str], tmp_path: Path) -> Client:
    """Evaluate expressions in a fresh process: what each gives, or the ReshardError that it raises as a dictionary;
    a list if several.
    """

    def evaluate(*expressions: str, **variables: str) -> Any:
        command = [sys.executable, "-c", CLIENT, *expressions]
        done = subprocess.run(command, env=environment | variables, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        results = [json.loads(line) for line in done.stdout.splitlines()]
        assert len(results) == len(expressions)
        return results if len(results) > 1 else results[0]

    return evaluate


@pytest.fixture
def reshard(environment: dict[str, str], tmp_path: Path) -> Client:
    """The command line in a fresh process: its exit code, stdout and stderr."""

    def command(*arguments: str | Path, **variables: str) -> tuple[int, str, str]:
        whole = [sys.executable, "-m", "reshard", *map(str, arguments)]
        done = subprocess.run(whole, env=environment | variables, cwd=tmp_path, capture_output=True, text=True)
        assert "Traceback" not in done.stderr
        return done.returncode, done.stdout, done.stderr

    return command


def remote(text: str = ID, revision: str | None = None) -> str:
    return f"facts(open_any({text!r}, {revision!r}))"


def local(text: str = ID, revision: str | None = None) -> str:
    return f"facts(open_any({text!r}, {revision!r}, headers_only=False))"


def tree(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


# --- ids --------------------------------------------------------------------------------------------------------------


def test_ids_are_told_by_their_form() -> None:
    """org/name and hf://org/name are ids, paths of any other form are not."""
    assert all(map(is_id, ("org/name", "Qwen/Qwen3-0.6B", "hf://org/name", "hf://org/name@refs/pr/1")))
    assert not any(
        map(
            is_id,
            (
                "name",
                "./name",
                "../name",
                "/org/name",
                "org/name/",
                "a/b/c",
                "hf://name",
                "https://hub/org/name",
                "org/na me",
            ),
        )
    )


def test_a_revision_stands_in_the_id_or_beside_it() -> None:
    """hf://org/name@rev is org/name at rev; two that differ are refused."""
    assert ref("hf://org/name@v1.0", None) == ref("org/name", "v1.0") == ref("hf://org/name@v1.0", "v1.0")
    assert ref("org/name", None).revision is None
    with pytest.raises(Exception, match="another revision"):
        ref("hf://org/name@v1.0", "main")


def test_an_existing_path_wins(run: Client, hub: Hub, tiny: Path, tmp_path: Path) -> None:
    """org/name that is a directory here is that directory, and the Hub is not asked; hf://org/name is the Hub's."""
    shutil.copytree(tiny, tmp_path / ID)
    found, other, refused = run(remote(), local(), remote(ID, "main"))
    assert found["origin"] == other["origin"] == [None, None, "apache-2.0"]
    assert "--revision" in refused["error"]
    assert hub.asked == []
    assert run(remote(f"hf://{ID}"))["origin"][0] == ID


def test_what_is_neither_names_both_readings(run: Client, hub: Hub) -> None:
    """An error says that there is no such path, and why it is no model on the Hub."""
    for found in run(*map(remote, ("no-such-directory", "a/b/c", "./org/name"))):
        assert found["code"] == 2
        assert "no such file or directory" in found["error"] and "Hub id" in found["error"]
    assert hub.asked == []
    for found in run(remote("org/none"), local("org/none")):
        assert found["code"] == 2
        assert "org/none: there is no such path here, and no such model at http://127" in found["error"]
        assert "HF_TOKEN" in found["hint"]


# --- plan and inspect: headers only -----------------------------------------------------------------------------------


def test_a_remote_checkpoint_reads_as_the_local_one(run: Client, hub: Hub, tiny: Path) -> None:
    """Sizes, tensors, SHA-256, carried files and files left are those of the directory;
    commit and licence are known.
    """
    found, here = run(remote(), local(str(tiny)))
    assert found["tensors"] == here["tensors"] and len(found["tensors"]) > 20
    assert [(name, size) for name, size, _ in found["originals"]] == [
        (name, size) for name, size, _ in here["originals"]
    ]
    assert {name: digest for name, _, digest in found["originals"]} == {
        name: sha256(tiny / name) for name in WEIGHTS
    } | {INDEX: None}
    assert found["carried"] == here["carried"] and {name for name, _ in found["carried"]} == SMALL
    assert found["left"] == here["left"] and ["original/", 0, "other weights"] in found["left"]
    assert found["origin"] == [ID, hub.repos[ID].revisions["main"], "apache-2.0"]
    assert found["where"] == ID and found["root"] is None


def test_no_byte_of_a_header_is_asked_for_twice(run: Client, hub: Hub, tiny: Path) -> None:
    """Of each file come first as many bytes as usual, then what its header has beyond them; of other files nothing."""
    assert "tensors" in run(f"setattr(remote, 'AHEAD', 300) or {remote()}")
    requests = []
    for name in WEIGHTS:
        with (tiny / name).open("rb") as file:
            size = 8 + int.from_bytes(file.read(8), "little")
        assert hub.sent(name) == max(size, 300)
        requests.append(len([asked for asked in hub.asked if asked.path.endswith(name) and asked.sent]))
        assert requests[-1] == (2 if size > 300 else 1)
    assert set(requests) == {1, 2}
    assert hub.files() == {"config.json", INDEX} | WEIGHTS


def test_plan_is_the_local_plan(reshard: Client, hub: Hub, tiny: Path) -> None:
    """`reshard plan org/name` says what it says of the directory, but for the name."""
    code, out, _ = reshard("plan", ID, "--tp", "2", "--json")
    assert code == 0
    theirs = out.replace(hub.repos[ID].revisions["main"], "COMMIT").replace(ID, "SRC")
    code, ours, _ = reshard("plan", tiny, "--tp", "2", "--json")
    assert code == 0
    assert theirs.replace('"COMMIT"', "null") == ours.replace(str(tiny), "SRC")
    assert hub.files() == {"config.json", INDEX} | WEIGHTS


def test_a_plan_of_merging_needs_no_files(reshard: Client, hub: Hub, tiny: Path) -> None:
    """Planning Hugging Face files from a Hub id, restored or split anew, reads headers too."""
    assert reshard("plan", ID, "--to", "hf")[0] == 0
    assert reshard("plan", ID, "--to", "hf", "--max-file-size", "100KB")[0] == 0
    assert hub.files() == {"config.json", INDEX} | WEIGHTS


def big(root: Path, hub: Hub) -> dict[str, Any]:
    """A repository of one tensor of 64 MiB: more than the buffers of two sockets hold."""
    root.mkdir()
    prologue, found = safetensors.build([("weight", "U8", (64 << 20,))], None)
    (root / "config.json").write_text('{"model_type": "llama"}')
    with (root / "model.safetensors").open("wb") as file:
        file.write(prologue)
        file.truncate(len(prologue) + (64 << 20))
    hub.add("org/big", root)
    return {"offset": found.data_start}


@pytest.mark.parametrize("ranges", [True, False])
def test_a_server_that_ignores_ranges_is_not_listened_to(run: Client, hub: Hub, tmp_path: Path, ranges: bool) -> None:
    """A server that answers Range with the whole file is cut off after the header, which is read all the same."""
    expected = big(tmp_path / "big", hub)
    hub.ranges = ranges
    found = run("[e.offset for _, e in remote.published(hub.opened('org/big', None, keep=False), '').tensors.values()]")
    assert found == [expected["offset"]]
    assert hub.sent(".safetensors") == AHEAD if ranges else hub.sent(".safetensors") < 32 << 20


def test_bytes_far_behind_are_not_had_without_ranges(run: Client, hub: Hub, tmp_path: Path) -> None:
    """What lies at the end of a file is refused rather than reached by reading all before it."""
    big(tmp_path / "big", hub)
    hub.ranges = False
    found = run("len(Ahead(hub.opened('org/big', None, keep=False), 'model.safetensors', 100)(100, 60 << 20))")
    assert found["code"] == 2 and "ignores range requests" in found["error"]
    assert hub.sent(".safetensors") < 32 << 20


def test_bin_files_are_read_without_their_weights(run: Client, hub: Hub, tmp_path: Path) -> None:
    """Of .bin files come the zip directory, the pickle and the tensors' short headers; every tensor is where it is."""
    root = tmp_path / "bin"
    root.mkdir()
    tensors = {f"model.layers.{n}.weight": torch.full((1024, 512), n, dtype=torch.float32) for n in range(8)}
    torch.save(tensors, root / "pytorch_model.bin")
    (root / "config.json").write_text("{}")
    hub.add("org/bin", root)
    found = run(
        "{name: e.offset for name, (_, e) in remote.published(hub.opened('org/bin', None, keep=False), "
        "'').tensors.items()}"
    )
    whole = (root / "pytorch_model.bin").read_bytes()
    for name, tensor in tensors.items():
        assert whole[found[name] : found[name] + tensor.nbytes] == tensor.numpy().tobytes()
    assert hub.sent("pytorch_model.bin") < 0x10000 + 24 * 4096 < len(whole) // 50


def test_a_bin_checkpoint_plans_and_converts_from_the_hub(
    run: Client, reshard: Client, hub: Hub, tmp_path: Path
) -> None:
    """A checkpoint of .bin files from the Hub is the one of its directory."""
    root = copy("llama_bin", tmp_path / "published")
    hub.add("org/bin", root)
    found, fetched, here = run(remote("org/bin"), local("org/bin"), local(str(root)))
    assert found["tensors"] == fetched["tensors"] == here["tensors"]
    assert reshard("convert", "org/bin", "out", "--tp", "2", HF_HUB_OFFLINE="1")[0] == 0


def test_sizes_that_a_mirror_leaves_out_are_asked_for(run: Client, hub: Hub, tiny: Path) -> None:
    """A list of files without sizes is completed by HEAD requests."""
    hub.sizes = False
    here, found = run(remote(str(tiny)), remote())
    assert found["tensors"] == here["tensors"] and found["carried"] == here["carried"]


# --- convert: just what is needed -------------------------------------------------------------------------------------


def test_convert_of_an_id_is_convert_of_its_directory(reshard: Client, hub: Hub, tiny: Path, tmp_path: Path) -> None:
    """Exactly the files needed are downloaded; the output differs from the directory's in provenance alone;
    a plan adds nothing.
    """
    with (tiny / "huge.dat").open("wb") as file:
        file.truncate((64 << 20) + 1)  # over the limit for files that go along
    code, _, told = reshard("convert", ID, "hub", "--tp", "2")
    assert code == 0, told
    assert hub.files() == WEIGHTS | SMALL | {INDEX}
    assert hub.sent(".safetensors") == sum((tiny / name).stat().st_size for name in WEIGHTS)
    assert reshard("convert", tiny, "directory", "--tp", "2")[0] == 0

    ours, theirs = tree(tmp_path / "directory"), tree(tmp_path / "hub")
    assert {name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name)} == {
        "manifest.json",
        "source/files.json",
    }
    manifest = json.loads(theirs["manifest.json"])
    assert manifest["model"] == {"id": ID, "commit": hub.repos[ID].revisions["main"], "license": "apache-2.0"}
    recorded = theirs["source/files.json"].decode()
    assert all(sha256(tiny / name) in recorded for name in WEIGHTS)
    assert json.loads(re.sub(r'"sha256": *"[0-9a-f]{64}",', "", recorded)) == json.loads(ours["source/files.json"])

    hub.clear()
    assert reshard("verify", "hub", "--against", ID)[0] == 0
    assert hub.files() == set()


def test_what_stays_on_the_hub_is_said(run: Client, hub: Hub, tiny: Path) -> None:
    """The report of a convert names the files that were left, although they were not downloaded."""
    fetched, listed, here = run(local(), remote(), remote(str(tiny)))
    assert fetched["left"] == listed["left"] == here["left"]


def test_folders_beside_the_weights_come_along_from_the_hub(
    reshard: Client, run: Client, hub: Hub, tiny: Path, tmp_path: Path
) -> None:
    """As from a directory: small ones with all that is in them, those with weights if modules.json names them; hidden
    ones never.

    What of a folder that is left out lies in the cache already does not come along either.
    """
    modules = [
        {"idx": n, "name": str(n), "path": path, "type": "m"} for n, path in enumerate(["", "1_Pooling", "2_Dense"])
    ]
    folders = {
        "1_Pooling/config.json",
        "2_Dense/config.json",
        "2_Dense/model.safetensors",
        "additional_chat_templates/tool_use.jinja",
    }
    others = {
        "original/params.json",
        "original/tokenizer.model",
        ".github/workflows/ci.yml",
        "3_Dense/model.safetensors",
        "deep/.git/config",
    }
    for name in folders | others:
        (tiny / name).parent.mkdir(exist_ok=True, parents=True)
        (tiny / name).write_bytes(name.encode())
    (tiny / "modules.json").write_text(json.dumps(modules))
    hub.add(ID, tiny)
    fetched = run(f"str(hub._download(hub.ref({ID!r}, None), 'original/params.json'))")
    assert Path(fetched).read_bytes() == b"original/params.json"
    hub.clear()
    code, told, _ = reshard("convert", ID, "hub", "--tp", "2", "--json")
    assert code == 0 and hub.files() == WEIGHTS | SMALL | {INDEX, "modules.json"} | folders
    code, here, _ = reshard("convert", tiny, "directory", "--tp", "2", "--json")
    assert code == 0
    left = {file["name"]: file["why"] for file in json.loads(told)["left"]}
    assert json.loads(told)["left"] == json.loads(here)["left"]
    assert left["original/"] == left["3_Dense/"] == left["onnx/"] == "other weights"
    assert left[".github/"] == left["deep/.git/"] == "hidden folder"
    assert folders <= tree(tmp_path / "hub").keys() and not others & tree(tmp_path / "hub").keys()
    found = run(remote())
    assert {file["name"] for file in json.loads(told)["left"]} == {name for name, _, _ in found["left"]}
    assert folders <= {name for name, _ in found["carried"]}


def test_the_cache_is_used_and_filled_in(run: Client, hub: Hub, tiny: Path) -> None:
    """A download that failed goes on with the files that are missing; a complete one sends nothing.
    The cache is huggingface_hub's own.
    """
    gone = "model-00005-of-00007.safetensors"
    denied = {"X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found"}
    hub.fault = lambda method, path: Fault(404, denied) if path.endswith(gone) and "/resolve/" in path else None
    found = run(local())
    assert found["code"] == 2 and gone in found["error"]
    assert gone not in hub.files()

    hub.clear()
    before = set(run("[o.name for o in hub.Path(hub.constants.HF_HUB_CACHE).rglob('snapshots/*/*')]"))
    found = run(local())
    assert gone in hub.files() and not hub.files() & before
    assert before | hub.files() == WEIGHTS | SMALL | {INDEX}
    root = Path(found["root"])
    assert root.parts[-3:] == ("models--org--tiny", "snapshots", hub.repos[ID].revisions["main"])
    assert (root / gone).readlink().name == sha256(tiny / gone) and (root / "config.json").readlink().name == git_sha1(
        tiny / "config.json"
    )

    hub.clear()
    assert run(local())["root"] == str(root)
    assert hub.files() == set()


def test_a_dropped_download_is_survived(run: Client, hub: Hub, tiny: Path) -> None:
    """A connection that breaks in the middle of a file is made again, and the file is the right one."""
    name = "model-00003-of-00007.safetensors"
    fault = Fault(drop_after=20_000, times=1)
    hub.fault = lambda method, path: (
        fault if path.startswith("/storage") and path.endswith(name) and method == "GET" else None
    )
    found = run(local())
    assert (Path(found["root"]) / name).read_bytes() == (tiny / name).read_bytes()
    assert fault.times == 0


def test_progress_tells_every_byte(run: Client, hub: Hub, tiny: Path) -> None:
    """The bytes that progress is told are the bytes of the files downloaded."""
    counting = (
        "type('P', (), dict(told=[], start=lambda s, w, n: s.told.append(n), advance=lambda s, n: "
        "s.told.append(n), finish=lambda s: 0))()"
    )
    total, *told = run(f"[p := {counting}, open_any({ID!r}, headers_only=False, progress=p), p.told][-1]")
    assert (
        total
        == sum(told)
        == sum((tiny / name).stat().st_size for name in WEIGHTS | SMALL) - (tiny / "config.json").stat().st_size
    )


def test_the_commit_is_fixed_at_the_start(run: Client, hub: Hub, tiny: Path, tmp_path: Path) -> None:
    """A branch that moves while it is being fetched does not mix two commits."""
    other = shutil.copytree(tiny, tmp_path / "other")
    for name in WEIGHTS:
        (other / name).write_bytes((tiny / name).read_bytes()[:-1] + b"\x3f")
    old = hub.repos[ID].revisions["main"]

    def move(method: str, path: str) -> None:
        if "/resolve/" in path and len(hub.repos[ID].commits) == 1:
            hub.add(ID, other)

    hub.fault = move
    root = Path(run(local())["root"])
    assert root.name == hub.repos[ID].revisions["main"] != old
    assert all((root / name).read_bytes() == (other / name).read_bytes() for name in WEIGHTS)
    assert all(
        old not in asked.path
        for asked in hub.asked
        if asked.path.startswith("/storage") or asked.path.endswith(".safetensors")
    )


def test_revisions(run: Client, hub: Hub, tiny: Path, tmp_path: Path) -> None:
    """A branch, a commit, and hf://…@ lead to the same commit; one that is not there is refused by name."""
    other = shutil.copytree(tiny, tmp_path / "other")
    (other / "config.json").write_text((tiny / "config.json").read_text() + "\n")
    commit = hub.add(ID, other, "refs/pr/1")
    found = run(
        remote(ID, "refs/pr/1"), remote(ID, commit), remote(f"hf://{ID}@refs/pr/1"), local(ID, "refs/pr/1"), remote()
    )
    assert [one["origin"][1] for one in found] == [commit] * 4 + [hub.repos[ID].revisions["main"]]
    for found in run(remote(ID, "v9"), local(ID, "v9")):
        assert found["code"] == 2 and "has no revision 'v9'" in found["error"]


# --- offline ----------------------------------------------------------------------------------------------------------


def test_offline_works_from_the_cache(run: Client, reshard: Client, hub: Hub, tiny: Path) -> None:
    """With HF_HUB_OFFLINE what is in the cache is planned and converted, and the Hub is not asked."""
    online = run(local())
    hub.clear()
    for found in run(remote(), local(), HF_HUB_OFFLINE="1"):
        assert (
            found["tensors"] == online["tensors"]
            and found["origin"] == online["origin"]
            and found["root"] == online["root"]
        )
    assert reshard("convert", ID, "out", "--tp", "2", HF_HUB_OFFLINE="1")[0] == 0
    assert hub.asked == []


def test_offline_without_the_files_is_refused(run: Client, hub: Hub, tiny: Path) -> None:
    """With HF_HUB_OFFLINE a model, a revision or a file that the cache lacks is said to be lacking."""
    for found in run(remote(), local(), HF_HUB_OFFLINE="1"):
        assert found["code"] == 3
        assert "HF_HUB_OFFLINE is set" in found["error"] and "no such path here" in found["error"]
    root = Path(run(local())["root"])
    (root / "model-00002-of-00007.safetensors").unlink()
    other, found = run(local(ID, "v9"), local(), HF_HUB_OFFLINE="1")
    assert "at revision v9" in other["error"]
    assert found["code"] == 3 and "does not hold model-00002-of-00007.safetensors of 7 files" in found["error"]


# --- what goes wrong --------------------------------------------------------------------------------------------------


def test_a_token_opens_a_private_model_and_goes_nowhere_else(run: Client, hub: Hub, tiny: Path) -> None:
    """A private model reads as missing without a token; with it it opens, and the storage that files are kept in never
    sees it.
    """
    hub.repos[ID].private = True
    assert "no such model" in run(remote())["error"]
    assert "no such model" in run(remote(), HF_TOKEN="hf_another")["error"]
    hub.clear()
    assert all("tensors" in found for found in run(remote(), local(), HF_TOKEN=TOKEN))
    assert {asked.token for asked in hub.asked if not asked.path.startswith("/storage")} == {True}
    assert {asked.token for asked in hub.asked if asked.path.startswith("/storage")} == {False}


@pytest.mark.parametrize(("token", "who"), [("", "anyone who is not logged in"), (TOKEN, "this token")])
def test_a_gated_model_is_refused_with_the_way_in(run: Client, hub: Hub, tiny: Path, token: str, who: str) -> None:
    """Where conditions must be accepted first (401, 403) the message says so, to whom, and where."""
    hub.repos[ID].gated = True
    for found in run(remote(), local(), **({"HF_TOKEN": token} if token else {})):
        assert found["code"] == 2
        assert "gated" in found["error"] and who in found["error"]
        assert f"{hub.url}/{ID}" in found["hint"] and "HF_TOKEN" in found["hint"]


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
FAULTS = {
    "500": (Fault(500), 3, r"failed to give .* \(500\)"),
    "503": (Fault(503), 3, r"failed to give .* \(503\)"),
    "429": (Fault(429), 3, r"refuses .*: too many requests .* \(429\)"),
    "401": (
        Fault(401, {"X-Error-Message": "Invalid credentials in Authorization header"}),
        2,
        r"refuses .* \(401\): Invalid credentials",
    ),
    "403": (Fault(403, {"X-Error-Message": "Access to this resource is disabled."}), 2, r"refuses .* \(403\)"),
    "404": (Fault(404, {"X-Error-Code": "EntryNotFound"}), 2, r"is not there at revision"),
    "dropped": (Fault(drop_after=10), 3, r"cannot be reached"),
    "slow": (Fault(wait=1.5), 3, r"did not respond within 1 s"),
    "pointer": (Fault(body=POINTER), 3, rf"has {len(POINTER)} bytes, the Hub's list says 55432"),
}


def test_failures_while_reading_headers(run: Client, hub: Hub, tiny: Path) -> None:
    """Each way in which a file cannot be had is told apart: the model, the file, what happened, and whether trying
    again may help.
    """
    name = "model-00001-of-00007.safetensors"
    for kind in FAULTS:
        hub.add(f"org/{kind}", tiny)
    hub.fault = lambda method, path: next(
        (f for kind, (f, _, _) in FAULTS.items() if f"org/{kind}/" in path and path.endswith(name)), None
    )
    results = run(*(remote(f"org/{kind}") for kind in FAULTS), HF_HUB_DOWNLOAD_TIMEOUT="1")
    for found, (kind, (_, code, words)) in zip(results, FAULTS.items(), strict=True):
        assert f"org/{kind}" in found["error"] and name in found["error"]
        assert re.search(words, found["error"]), found["error"]
        assert found["code"] == code
    assert "LFS pointer" in results[-1]["hint"]


def test_a_failure_of_a_moment_is_survived(run: Client, hub: Hub, tiny: Path) -> None:
    """One failure does not end a plan: the request is made again."""
    faults = {"00001": Fault(503, times=1), "00002": Fault(drop_after=10, times=1), "/api/": Fault(500, times=1)}
    hub.fault = lambda method, path: next((fault for part, fault in faults.items() if part in path), None)
    assert "tensors" in run(remote())
    assert all(fault.times == 0 for fault in faults.values())


def test_a_hub_that_is_none(run: Client, hub: Hub, tiny: Path) -> None:
    """A server error, a login page or anything else in place of the list of files is no traceback."""
    for fault, words in (
        (Fault(500), r"\(500\)"),
        (Fault(body=b"<html>log in</html>"), "could not be fetched"),
        (Fault(body=b"[]"), "could not be fetched"),
    ):
        hub.fault = lambda method, path, fault=fault: fault if path.startswith("/api/") else None
        for found in run(remote(), local()):
            assert found["code"] == 3 and re.search(words, found["error"]), found


def test_no_network(run: Client, hub: Hub) -> None:
    """Where nothing answers the message names the endpoint, and the hint how to work without it."""
    found = run(remote(), HF_ENDPOINT="http://127.0.0.1:9")
    assert found["code"] == 3
    assert "no such path here, and http://127.0.0.1:9 cannot be reached" in found["error"]
    assert "HF_HUB_OFFLINE" in found["hint"] and "HF_ENDPOINT" in found["hint"]


def test_a_cache_that_cannot_be_written(run: Client, hub: Hub, tiny: Path, tmp_path: Path) -> None:
    """Where HF_HOME cannot be, the message names the place."""
    (tmp_path / "file").write_text("")
    found = run(local(), HF_HOME=str(tmp_path / "file" / "home"))
    assert found["code"] == 3 and "HF_HOME" in found["error"] and str(tmp_path / "file" / "home") in found["error"]


def test_the_command_line_tells_errors(reshard: Client, hub: Hub, tiny: Path, tmp_path: Path) -> None:
    """Errors of the Hub come as `error:` and `hint:` with their exit codes, and nothing is written."""
    code, _, told = reshard("plan", "org/none", "--tp", "2")
    assert (
        code == 2
        and told.startswith("error: org/none: there is no such path here, and no such model")
        and "\n\nhint: " in told
    )
    hub.fault = lambda method, path: Fault(403) if path.endswith("tokenizer.json") else None
    code, _, told = reshard("convert", ID, "out", "--tp", "2")
    assert code == 2 and "tokenizer.json" in told
    assert not (tmp_path / "out").exists()


ODD: list[tuple[dict[str, str], str]] = [
    ({}, "has no config.json; it holds nothing"),
    ({"model.gguf": "x", "README.md": "x"}, "has no config.json; it holds README.md, model.gguf"),
    ({"config.json": "{}", "model.gguf": "x"}, "no weights: none of model.safetensors, .*there are model.gguf"),
    (
        {"config.json": "{}", INDEX: '{"weight_map": {"a": "gone.safetensors"}}'},
        "names gone.safetensors, which is not in the repository",
    ),
    ({"config.json": "{}", INDEX: '{"weight_map": {"a": "../../x"}}'}, "outside of the directory"),
    ({"config.json": "{}", INDEX: "<html>"}, "not JSON"),
    ({"config.json": "{}", "manifest.json": "{}", "rank-00000/tensors.json": "{}"}, "holds shards that reshard wrote"),
]


def test_repositories_that_are_no_checkpoints(run: Client, hub: Hub, tmp_path: Path) -> None:
    """What a repository lacks is told from its list of files, alike for plan and convert, before any weights are
    fetched.
    """
    for n, (files, _) in enumerate(ODD):
        for name, text in files.items():
            path = tmp_path / f"odd{n}" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        hub.add(f"org/odd{n}", tmp_path / f"odd{n}")
    results = run(*(how(f"org/odd{n}") for n in range(len(ODD)) for how in (remote, local)))
    for found, words in zip(results, [words for _, words in ODD for _ in range(2)], strict=True):
        assert found["code"] == 2
        assert re.search(words, found["error"]), found["error"]


@pytest.mark.parametrize("name", ["config.json", INDEX])
def test_a_file_that_is_too_large_to_be_read_is_not_fetched(name: str, run: Client, hub: Hub, tiny: Path) -> None:
    """The Hub's list says how large it is."""
    limit = limits.CONFIG if name == "config.json" else limits.INDEX
    with (tiny / name).open("ab") as file:
        file.truncate(limit + 1)
    for found in run(remote(), local()):
        assert found["code"] == 2 and f"{name}: has {limit + 1} bytes, at most {limit} are read" in found["error"]
    assert name not in hub.files()


def test_a_damaged_header_is_named(run: Client, hub: Hub, tiny: Path) -> None:
    """What is wrong with a file on the Hub is said with the id and the file, as for a local one."""
    name = "model-00004-of-00007.safetensors"
    (tiny / name).write_bytes((tiny / name).read_bytes()[:-7])
    found = run(remote())
    assert found["code"] == 2 and f"{ID}/{name}: truncated" in found["error"]


def test_the_files_in_the_cache_are_read_by_the_library(run: Client, hub: Hub, tiny: Path) -> None:
    """What was fetched is the checkpoint: the safetensors library reads each file through the cache's links."""
    found = run(local())
    names = set()
    for name in WEIGHTS:
        with safe_open(Path(found["root"]) / name, framework="np") as file:
            names |= set(file.keys())
    assert names == set(found["tensors"])
