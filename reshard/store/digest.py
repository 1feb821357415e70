"""Digests: xxh3-128 per 8 MiB block of a stored tensor, a tensor's digest over its blocks', one root over all files.

Blocks can be hashed by whoever completes them, checked in parallel and repaired alone. Knows nothing about tensors'
meaning.
"""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple

import xxhash
from msgspec import Meta

if TYPE_CHECKING:
    import hashlib

BLOCK = 8 << 20

Digest = Annotated[str, Meta(pattern="^[0-9a-f]{32}$", max_length=32, description="xxh3-128 in hexadecimal.")]
Buffer = bytes | bytearray | memoryview
Hasher = xxhash.xxh3_128


def of(data: Buffer) -> str:
    """The digest of a small file, as 32 hexadecimal digits."""
    return xxhash.xxh3_128_hexdigest(data)


def of_file(path: Path) -> str:
    """The digest of a file as `of` gives it, read in pieces."""
    state = xxhash.xxh3_128()
    with path.open("rb") as file:
        while piece := file.read(BLOCK):
            state.update(piece)
    return state.hexdigest()


def of_pieces(pieces: Iterable[Buffer]) -> str:
    """The digest of the file that these pieces make."""
    state = Hasher()
    for piece in pieces:
        state.update(piece)
    return state.hexdigest()


def of_blocks(blocks: Iterable[bytes]) -> str:
    """The digest of a tensor: over the 16-byte digests of its blocks, in order."""
    return xxhash.xxh3_128_hexdigest(b"".join(blocks))


def root(files: Iterable[tuple[str, int, str]]) -> str:
    """The digest over all files: of the sorted lines "path size digest"."""
    return of("".join(f"{path} {size} {digest}\n" for path, size, digest in sorted(files)).encode())


class BlockHasher:
    """Hashes one stored tensor while its bytes arrive, in any order; bytes that come late are read back.

    `read(offset, length)` returns bytes that have been written. Blocks whose bytes come in order cost one pass over the
    data in cache; the others (the seam of an interleaved tensor, zero padding) are read back once, at the end.
    """

    __slots__ = ("_blocks", "_open", "nbytes")

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes
        self._blocks: list[bytes | None] = [None] * -(-nbytes // BLOCK)
        self._open: dict[int, tuple[xxhash.xxh3_128, int]] = {}  # block → (state, bytes so far)

    def update(self, offset: int, data: memoryview) -> None:
        """Bytes that now stand at `offset` of the tensor."""
        at = 0
        while at < len(data):
            number, start = divmod(offset + at, BLOCK)
            part = data[at : at + BLOCK - start]
            size = min(BLOCK, self.nbytes - number * BLOCK)
            at += len(part)
            if start == 0 and len(part) == size:
                self._blocks[number] = xxhash.xxh3_128_digest(part)
                continue
            state, done = self._open.get(number) or (xxhash.xxh3_128(), 0)
            if start == done:
                state.update(part)
                done += len(part)
                if done == size:
                    self._blocks[number] = state.digest()
                    self._open.pop(number, None)
                    continue
            self._open[number] = (state, done)

    def blocks(self, read: Callable[[int, int], Buffer]) -> list[bytes]:
        """All block digests; what did not arrive in order is read back."""
        for number, digest in enumerate(self._blocks):
            if digest is None:
                size = min(BLOCK, self.nbytes - number * BLOCK)
                self._blocks[number] = xxhash.xxh3_128_digest(read(number * BLOCK, size))
        return [digest for digest in self._blocks if digest is not None]


class FileDigest(NamedTuple):
    """What the digest of a file must be. `kind`: "sha256", or "git" for the id that git gives a file; `by`:
    who says so, in words.
    """

    kind: str
    value: str
    by: str

    def state(self, size: int) -> "hashlib._Hash":
        """A hash of the kind, ready for the `size` bytes of the file."""
        import hashlib

        return hashlib.sha256() if self.kind == "sha256" else hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
