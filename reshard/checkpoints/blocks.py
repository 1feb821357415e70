"""Blocks: the stretches of a rank's file that have a digest each, which can be checked in parallel and fetched again
alone.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import xxhash

from ..containers.safetensors import MAX_LENGTH
from ..errors import MismatchError
from ..inputs import decode, limits
from ..store.digest import BLOCK, Buffer, of_blocks
from .manifest import Listed
from .shards import Described, Stored, shard_digest


@dataclass(frozen=True, slots=True)
class Block:
    """`size` bytes of a stored tensor, from `offset` of a file on. `alone`: the tensor is but this block,
    its own digest is meant.
    """

    file: str
    tensor: str
    offset: int
    size: int
    digest: str
    alone: bool

    def found(self, data: Buffer) -> str:
        """The digest of what stands there."""
        digest = xxhash.xxh3_128_digest(data)
        return of_blocks([digest]) if self.alone else digest.hex()

    @property
    def where(self) -> str:
        return f"{self.tensor}: bytes {self.offset} to {self.offset + self.size}"


def read_described(path: Path) -> Described:
    """Read a tensors.json."""
    found: Described = decode.json_file(
        path, limits.TENSORS_JSON, Described, MismatchError, "fetch it again, or convert again"
    )
    return found


@dataclass(frozen=True)
class Blocks:
    """Those of a rank: its weights, the tensors as tensors.json has them, and where that is."""

    root: Path
    weights: Listed
    said: Listed
    tensors: tuple[Stored, ...]

    @classmethod
    def read(cls, root: Path, weights: Listed, said: Listed) -> "Blocks":
        tensors = read_described(root / said.name).tensors
        for tensor in tensors:
            if (end := tensor.offset + tensor.nbytes) > weights.size:
                raise MismatchError(
                    f"{root / said.name}: {tensor.name} ends at byte {end}, {weights.name} has {weights.size}",
                    "convert again",
                )
        return cls(root, weights, said, tensors)

    @property
    def start(self) -> int:
        """Where data begins in the file; before it is the header."""
        return min((tensor.offset for tensor in self.tensors), default=self.weights.size)

    def contradictions(self) -> Iterator[str]:
        """Where the header, the tensors' digests and the manifest do not make up one another."""
        with (self.root / self.weights.name).open("rb") as stream:
            prologue = stream.read(min(self.start, MAX_LENGTH + 8))
        if shard_digest(prologue, (tensor.digest for tensor in self.tensors)) != self.weights.digest:
            yield f"{self.weights.name}: its header or the digests in {self.said.name} do not match the manifest"
        for tensor in self.tensors:
            digests, count = tensor.blocks or (), -(-tensor.nbytes // BLOCK)
            if count != 1 and (of_blocks(map(bytes.fromhex, digests)) != tensor.digest or len(digests) != count):
                yield f"{self.said.name}: {tensor.name}: its block digests do not add up to its own"

    def __iter__(self) -> Iterator[Block]:
        for tensor in self.tensors:
            size = tensor.nbytes
            alone = 0 < size <= BLOCK
            digests = (tensor.digest,) if alone else tensor.blocks or ()
            for at, digest in zip(range(0, size, BLOCK), digests, strict=False):
                yield Block(self.weights.name, tensor.name, tensor.offset + at, min(BLOCK, size - at), digest, alone)
