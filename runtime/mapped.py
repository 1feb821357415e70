"""One rank's shard, mapped from its file: nothing is copied, pages are read when they are touched.

Everything is checked before it is mapped: a truncated file under mmap kills the process, or reads as zeros in its last
page. Knows nothing about what a model computes.
"""

import math
import mmap
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from reshard.checkpoints import manifest
from reshard.checkpoints.manifest import Manifest
from reshard.checkpoints.shards import FORMAT_VERSION
from reshard.containers.container import of_file
from reshard.containers.dtypes import BITS
from reshard.containers.entry import Entry
from reshard.containers.reading import of_descriptor
from reshard.errors import MismatchError, PlaceError, ReshardError, failed
from reshard.store.directory import Directory, reading
from reshard.store.location import local
from reshard.store.workfolder import check_whole

from .dtypes import DTYPES

State = dict[str, Tensor]

# So that a shard larger than memory can be mapped writable; Python has the flag from 3.13 on.
_NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000 if os.uname().machine in ("x86_64", "aarch64") else 0)


def load_shard(out: str | os.PathLike[str], rank: int, verify: str | None = None, root: str | None = None) -> State:
    """The tensors of one rank of a shard directory by stored name, mapped from its file without a copy.

    The mapping is private: writing to a tensor changes no file. Dtypes that torch lacks come as raw bytes (uint8), with
    the packed axis last. `verify="hash"` reads everything and checks the digests. Needs only manifest.json and the
    rank's own folder. `root`: the root digest that the directory must have, as printed by `convert`, so that all ranks
    load the same conversion. Raises ReshardError for a wrong version, rank, size, header or digest, where possible
    before anything is mapped; PlaceError for another root, and if `out` keeps being replaced.
    """
    check_verify(verify)
    path = local(out, "shards to load")

    def load(_: Directory) -> State:
        known = _manifest(path)
        if type(rank) is not int or not 0 <= rank < len(known.ranks):
            raise ReshardError(
                f"{path}: there is no rank {rank!r}, only ranks 0 to {len(known.ranks) - 1}",
                "a shard directory is for exactly that many ranks",
            )
        if root is not None and known.root != root:
            raise PlaceError(
                f"{path}: root digest is {known.root}, expected {root}: another conversion has replaced it",
                "restart all ranks, with the new root digest",
            )
        memory, entries = _mapped(path, known, rank)
        if verify is not None:
            _check_digests(path, known, rank, memory)
        return {name: view(memory, entry) for name, entry in entries.items()}

    check_whole(path)
    if not path.is_dir():
        raise ReshardError(f"{path}: no such directory", "pass a directory written by `reshard convert`")
    try:
        return reading(path, load)
    except OSError as error:
        raise failed("reading", path, error) from error


def check_verify(verify: str | None) -> None:
    """Raises ReshardError for an unknown value of `verify`."""
    if verify not in (None, "hash"):
        raise ReshardError(f"verify={verify!r}: unknown value", '"hash" checks digests; None checks sizes and headers')


def _manifest(root: Path) -> Manifest:
    if not manifest.present(root):
        raise ReshardError(
            f"{root}: not a shard directory: there is no manifest.json",
            f"convert it first: reshard convert {root} OUT --tp N",
        )
    return manifest.load(root)


def _mapped(root: Path, known: Manifest, rank: int) -> tuple[mmap.mmap, dict[str, Entry]]:
    """A rank's mapped file, and its tensors' entries."""
    path, size = root / known.ranks[rank].weights.name, known.ranks[rank].weights.size
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # do not wait for a pipe's writer
    except FileNotFoundError:
        words = f"{path}: missing, expected {size} bytes"
        raise MismatchError(words, "fetch the file again, or convert again") from None
    except OSError as error:
        raise failed("opening", path, error) from error
    try:
        found = os.fstat(descriptor).st_size
        if found != size:
            raise MismatchError(
                f"{path}: has {found} bytes, expected {size} by the manifest",
                "it is truncated, or from another conversion: fetch it again",
            )
        head = of_file(path.name).read(of_descriptor(descriptor, str(path)), size, str(path))
        _check_metadata(path, head.metadata, known, rank)
        # torch warns about read-only memory
        flags, access = mmap.MAP_PRIVATE | _NORESERVE, mmap.PROT_READ | mmap.PROT_WRITE
        return mmap.mmap(descriptor, size, flags, access), head.entries
    except OSError as error:
        raise failed("mapping", path, error) from error
    finally:
        os.close(descriptor)


def _check_metadata(path: Path, metadata: Mapping[str, str], known: Manifest, rank: int) -> None:
    """A file identifies itself, so that a stray or swapped one is noticed."""
    mesh = known.mesh
    wanted = {
        "reshard.plan": known.plan,
        "reshard.rank": str(rank),
        "reshard.world": str(mesh.world),
        "reshard.mesh": f"tp={mesh.tp} pp={mesh.pp} ep={mesh.ep}",
    }
    version = metadata.get("reshard.version", "none")
    if version.split(".")[0] != FORMAT_VERSION.split(".")[0]:
        raise MismatchError(
            f"{path}: format version {version}, this reshard reads {FORMAT_VERSION}", "fetch the file again"
        )
    for key, value in wanted.items():
        if metadata.get(key) != value:
            raise MismatchError(
                f"{path}: its header says {key.removeprefix('reshard.')} {metadata.get(key, 'nothing')}, "
                f"expected {value}",
                "files were swapped, or are from another conversion: fetch the file again, or convert again",
            )


def _check_digests(root: Path, known: Manifest, rank: int, memory: mmap.mmap) -> None:
    """Check every block of a mapped file against tensors.json, and that against the manifest."""
    from reshard.checkpoints.blocks import Blocks
    from reshard.store.digest import of

    weights, tensors = known.ranks[rank].weights, known.ranks[rank].tensors
    try:
        text = (root / tensors.name).read_bytes()
    except OSError as error:
        raise failed("reading", root / tensors.name, error) from error
    if of(text) != tensors.digest:
        raise MismatchError(
            f"{root / tensors.name}: digest is {of(text)}, expected {tensors.digest} by the manifest", "fetch it again"
        )
    blocks, view = Blocks.read(root, weights, tensors), memoryview(memory)
    for failure in blocks.contradictions():
        raise MismatchError(f"{root}: {failure}", "fetch the file again, or convert again")
    for block in blocks:
        if (found := block.found(view[block.offset : block.offset + block.size])) != block.digest:
            raise MismatchError(
                f"{root / block.file}: {block.where}: digest is {found}, expected {block.digest}", "fetch it again"
            )


def view(memory: mmap.mmap | None, entry: Entry, offset: int | None = None) -> Tensor:
    """A view of memory as a stored tensor; raw bytes if torch lacks its dtype."""
    dtype, shape = DTYPES.get(entry.dtype), entry.shape
    if dtype is None:
        dtype, shape = torch.uint8, _packed(entry)
    count = math.prod(shape)
    if not count:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(memory, dtype=dtype, count=count, offset=entry.offset if offset is None else offset).view(
        shape
    )


def _packed(entry: Entry) -> tuple[int, ...]:
    """The shape in bytes of a tensor of sub-byte elements: the last axis shrinks, or all do if it is odd."""
    if entry.shape and entry.shape[-1] * BITS[entry.dtype] % 8 == 0:
        return *entry.shape[:-1], entry.shape[-1] * BITS[entry.dtype] // 8
    return (entry.nbytes,)
