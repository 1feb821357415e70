"""Small files, written whole; folders are made where they are missing."""

from collections.abc import Iterable
from pathlib import Path

import xxhash

from .digest import Buffer


def write(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def write_pieces(path: Path, pieces: Iterable[Buffer]) -> tuple[int, str]:
    """Write a file piece after piece; its size in bytes and its digest."""
    path.parent.mkdir(parents=True, exist_ok=True)
    state, size = xxhash.xxh3_128(), 0
    with path.open("wb") as file:
        for piece in pieces:
            state.update(piece)
            size += file.write(piece)
    return size, state.hexdigest()


def digest_of(pieces: Iterable[Buffer]) -> str:
    """The digest of the file that these pieces make."""
    state = xxhash.xxh3_128()
    for piece in pieces:
        state.update(piece)
    return state.hexdigest()
