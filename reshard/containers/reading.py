"""Reading a file by offset, wherever it is: whole stretches, or an error that says what is missing.

Knows nothing about what the bytes mean.
"""

import os
from collections.abc import Callable

from ..errors import PlaceError

Pread = Callable[[int, int], bytes]  # (length, offset) → bytes; fewer than asked for only at the end of the file

AGAIN = "the file is damaged or unfinished: download or copy it again"


def of_descriptor(fd: int, where: str) -> Pread:
    """An open file, which messages call `where`. Raises PlaceError where the storage fails."""

    def pread(count: int, offset: int) -> bytes:
        parts: list[bytes] = []
        got = 0
        while got < count:  # one call may return fewer than asked for
            try:
                part = os.pread(fd, count - got, offset + got)
            except OSError as error:
                raise PlaceError(
                    f"{where}: reading {count} bytes at offset {offset} failed: {error.strerror}"
                ) from error
            if not part:
                break
            parts.append(part)
            got += len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    return pread


def exactly(pread: Pread, count: int, offset: int, where: str) -> bytes:
    """`count` bytes at `offset`, which lie within the file's size. Raises PlaceError if they are no longer there."""
    data = pread(count, offset)
    if len(data) < count:
        hint = "something changed the file while it was read: try again when it is complete"
        raise PlaceError(
            f"{where}: the file ends at byte {offset + len(data)}; bytes up to {offset + count} were expected", hint
        )
    return data
