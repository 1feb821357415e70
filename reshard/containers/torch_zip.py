"""The tensors in a file of torch.save (.bin, .pt, .pth): which there are, and where each lies. Reads no tensor data.

    zip, torch >= 1.6, entries stored as they are        legacy, one after another
    NAME/data.pkl     the object, pickled                pickles   magic number, protocol version, word sizes
    NAME/byteorder    "little"                           pickle    the object
    NAME/data/KEY     the elements of one storage        pickle    list of the storages' keys
    ...                                                  storages  each 8 bytes (count of elements), then the elements

A tensor is a view of a storage: offset, shape and strides. In the pickle a storage is only a key, so both formats are
read alike.

The pickle is read by `unpickle`. Python's zipfile would take twice the time and memory for the directory, cuts names at
NUL, shifts offsets where other bytes precede the archive, and does not say where contents begin. Knows nothing about
models, layouts or the Hub.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from struct import Struct
from typing import Any

from ..errors import ReshardError
from ..text.escapes import clip
from .dtypes import BY_TORCH
from .entry import Entry, Header
from .impostors import guess
from .reading import AGAIN, Pread, exactly
from .state_dict import entries_of, state_of
from .torch_values import MAGIC, MOST_DIRECTORY, MOST_PICKLE, PROTOCOL, RESAVE, kind
from .unpickle import Machine


def read(pread: Pread, size: int, where: str) -> Header:
    """The tensors of a file of `size` bytes that messages call `where`, in the order of its state dict.

    A state dict maps names to tensors; other values are ignored. Where training scripts wrap it, one of `state_dict`,
    `model`, `module` holds it. Besides pickle and directory, reads some 40 bytes per storage. Raises ReshardError for a
    file that is damaged or truncated, holds more than plain tensors, or asks for code to be run; what `pread` raises
    passes through.
    """
    head = exactly(pread, min(size, 512), 0, where)
    if head.startswith(b"PK"):
        return Header(_Zip(pread, size, where).read(), {}, 0)
    if head[257:262] == b"ustar":
        raise ReshardError(
            f"{where}: a tar archive, as the first versions of torch wrote; this format is not read", RESAVE
        )
    if not head:
        raise ReshardError(f"{where}: the file holds 0 bytes; a file of torch.save has at least 100", AGAIN)
    return Header(_legacy(pread, size, where, guess(head, "torch", AGAIN)), {}, 0)


def _legacy(pread: Pread, size: int, where: str, hint: str) -> dict[str, Entry]:
    """torch < 1.6. Storages are little-endian whatever the machine: torch swaps the bytes on the others."""
    machine = Machine(pread, 0, min(size, MOST_PICKLE), where, hint)
    for what, expected in (("magic number", MAGIC), ("protocol version", PROTOCOL)):
        found = machine.load()
        if type(found) is not int or found != expected:
            raise ReshardError(
                f"{where}: not a file of torch.save: its {what} is {kind(found)}, not {expected:#x}", RESAVE
            )
    machine.load()
    top = machine.load()
    storages, machine.storages = machine.storages, {}
    keys = machine.load()
    at = machine.stream.tell()
    known = type(keys) is list and all(type(key) is str and key in storages for key in keys)
    if not known or len(set(keys)) != len(keys):
        raise ReshardError(f"{where}: the list of storages before byte {at} does not name those of its tensors", AGAIN)
    needed = at + sum(8 + storages[key].whole for key in keys)
    if needed > size:
        raise ReshardError(f"{where}: truncated: the file holds {size} bytes, its tensors end at byte {needed}", AGAIN)
    places: dict[str, tuple[int, int]] = {}
    for key in keys:
        count = int.from_bytes(exactly(pread, 8, at, where), "little", signed=True)
        whole, item = storages[key].whole, BY_TORCH[storages[key].dtype].itemsize
        if count * item != whole:
            message = f"{where}: storage {clip(key)} at byte {at} has {count} elements, the pickle says {whole // item}"
            raise ReshardError(message, AGAIN)
        places[key] = (at + 8, whole)
        at += 8 + whole
    return entries_of(state_of(top, where), places.get, where)


_END = Struct("<4s4H2LH")
_END64 = Struct("<4sQ2H2L4Q")
_LOCATOR = Struct("<4sLQL")
_ENTRY = Struct("<4s6H3L5H2L")
_LOCAL = Struct("<4s5H3L2H")


@dataclass(frozen=True, slots=True)
class _Record:
    """An entry of the zip directory; offset of its local header and size of its contents in bytes."""

    header: int
    nbytes: int
    crc: int


class _Zip:
    """A zip archive as torch writes it: entries stored as they are, all in one folder."""

    def __init__(self, pread: Pread, size: int, where: str) -> None:
        self.pread, self.size, self.where = pread, size, where
        self.directory = 0  # where it begins, so that all contents end there
        self.folder = ""
        self.records: dict[str, _Record] = {}
        self.places: dict[str, tuple[int, int] | None] = {}

    def read(self) -> dict[str, Entry]:
        for name, record in self._directory():
            if name in self.records:
                raise self._damaged(f"{clip(name)} appears twice in its directory")
            self.records[name] = record
        roots = [name for name in self.records if name.endswith("/data.pkl") and name.count("/") == 1]
        if any(name.endswith("/constants.pkl") and name.count("/") == 1 for name in self.records):
            raise ReshardError(
                f"{self.where}: a TorchScript archive, which holds a program",
                f"{RESAVE}: torch.jit.load(...).state_dict()",
            )
        if len(roots) != 1:
            message = f"{self.where}: a zip archive with {len(roots)} entries NAME/data.pkl; torch.save writes one"
            raise ReshardError(
                message, RESAVE if roots else "this is not a file of torch.save: unpack it, and give its contents"
            )
        self.folder = roots[0].removesuffix("data.pkl")
        if f"{self.folder}byteorder" in self.records:
            begin, count = self._place(f"{self.folder}byteorder")
            order = exactly(self.pread, min(count, 16), begin, self.where)
            if order != b"little":
                message = f"{self.where}: its byte order is {kind(order)}; only b'little' is read"
                raise ReshardError(message, "load it with torch and save it again on a little-endian machine")
        begin, count = self._place(roots[0])
        if count > MOST_PICKLE:
            raise ReshardError(
                f"{self.where}: {clip(roots[0])} has {count} bytes; at most {MOST_PICKLE} are read", RESAVE
            )
        machine = Machine(self.pread, begin, begin + count, self.where)
        top = machine.load()
        while machine.stream.read(1 << 16):
            pass
        crc = self.records[roots[0]].crc
        if crc not in (0, machine.raw.crc):  # 0: torch.serialization.set_crc32_options(False)
            raise self._damaged(f"{clip(roots[0])} has the CRC {machine.raw.crc:#010x}, its directory says {crc:#010x}")
        return entries_of(state_of(top, self.where), self._storage, self.where)

    def _damaged(self, what: str) -> ReshardError:
        return ReshardError(f"{self.where}: damaged zip archive: {what}", AGAIN)

    def _exactly(self, packing: Struct, offset: int, magic: bytes, what: str) -> tuple[Any, ...]:
        """The fields of the structure at `offset`, after its magic number."""
        if offset < 0 or offset + packing.size > self.size:
            raise self._damaged(f"{what} lies at byte {offset}, the file holds {self.size} bytes")
        first, *fields = packing.unpack(exactly(self.pread, packing.size, offset, self.where))
        if first != magic:
            raise self._damaged(f"{what} at byte {offset} begins with {first!r}, not with {magic!r}")
        return tuple(fields)

    def _directory(self) -> Iterator[tuple[str, _Record]]:
        """The entries of the central directory, which must fill the place between the contents and the end record."""
        start = max(0, self.size - 0xFFFF - _END.size - _LOCATOR.size)
        tail = exactly(self.pread, self.size - start, start, self.where)
        at = len(tail)
        while True:
            at = tail.rfind(b"PK\5\6", 0, at)
            if at < 0:
                raise self._truncated()
            comment = int.from_bytes(tail[at + 20 : at + 22], "little")
            if len(tail) - at >= _END.size and at + _END.size + comment == len(tail):
                break
        _, disk, first, here, count, length, begin, _ = _END.unpack_from(tail, at)
        end = start + at
        locator = end - _LOCATOR.size
        if at >= _LOCATOR.size and tail[at - _LOCATOR.size :].startswith(b"PK\6\7"):
            _, end, _ = self._exactly(_LOCATOR, locator, b"PK\6\7", "the zip64 locator")
            fields = self._exactly(_END64, end, b"PK\6\6", "the zip64 end record")
            if end + _END64.size > locator:
                raise self._damaged(f"the zip64 end record at byte {end} reaches over its locator at byte {locator}")
            _, _, _, disk, first, here, count, length, begin = fields
        if disk or first or here != count:
            raise self._damaged(f"part {disk} of several, with {here} of {count} entries")
        if begin + length != end:
            raise self._damaged(f"its directory has {length} bytes from byte {begin} on, but ends at byte {end}")
        if length > MOST_DIRECTORY:
            raise ReshardError(
                f"{self.where}: the zip directory has {length} bytes; at most {MOST_DIRECTORY} are read", RESAVE
            )
        self.directory = begin
        raw = exactly(self.pread, length, begin, self.where)
        at = found = 0
        while at < length:
            if length - at < _ENTRY.size:
                raise self._damaged(f"its directory ends within an entry at byte {begin + at}")
            sign, _, _, flags, method, _, _, crc, packed, nbytes, named, extra, comment, _, _, _, offset = (
                _ENTRY.unpack_from(raw, at)
            )
            more = at + _ENTRY.size + named
            after = more + extra + comment
            if sign != b"PK\1\2" or after > length:
                raise self._damaged(f"its directory has no entry at byte {begin + at}")
            name = raw[at + _ENTRY.size : more].decode("utf-8", "surrogateescape")
            nbytes, packed, offset = self._wide(raw[more : more + extra], (nbytes, packed, offset), name)
            if method or flags & 1 or packed != nbytes:
                words = f"is compressed or encrypted in the zip archive ({packed} bytes for {nbytes})"
                message = f"{self.where}: {clip(name)} {words}"
                raise ReshardError(
                    message, f"torch.save stores without compression; something packed the file anew: {RESAVE}"
                )
            yield name, _Record(offset, nbytes, crc)
            at = after
            found += 1
        if found != count:
            raise self._damaged(f"its directory has {found} entries, the end record says {count}")

    def _wide(self, extra: bytes, values: tuple[int, int, int], name: str) -> list[int]:
        """Size, packed size and offset; those that are 2**32 - 1 stand in the zip64 field instead, in this order."""
        if 0xFFFFFFFF not in values:
            return list(values)
        at, wide = 0, b""
        while at + 4 <= len(extra):
            length = int.from_bytes(extra[at + 2 : at + 4], "little")
            if extra[at : at + 2] == b"\1\0":
                wide = extra[at + 4 : at + 4 + length]
                break
            at += 4 + length
        if len(wide) < 8 * values.count(0xFFFFFFFF):
            raise self._damaged(f"{clip(name)} says that its size is in a zip64 field, which has {len(wide)} bytes")
        words = iter(wide[i : i + 8] for i in range(0, len(wide), 8))
        return [int.from_bytes(next(words), "little") if value == 0xFFFFFFFF else value for value in values]

    def _place(self, name: str) -> tuple[int, int]:
        """Offset and size of an entry's contents. The local header decides: it has the padding that aligns them."""
        record = self.records[name]
        raw = name.encode("utf-8", "surrogateescape")
        if record.header + _LOCAL.size + len(raw) > self.directory:
            raise self._damaged(
                f"{clip(name)} lies at byte {record.header}, the directory begins at byte {self.directory}"
            )
        data = exactly(self.pread, _LOCAL.size + len(raw), record.header, self.where)
        sign, _, flags, method, _, _, _, _, _, named, extra = _LOCAL.unpack_from(data)
        if sign != b"PK\3\4" or method or flags & 1 or named != len(raw) or data[_LOCAL.size :] != raw:
            raise self._damaged(f"the header at byte {record.header} is not that of {clip(name)}")
        begin = record.header + _LOCAL.size + named + extra
        if begin + record.nbytes > self.directory:
            held = f"{record.nbytes} bytes from byte {begin} on"
            raise self._damaged(f"{clip(name)} has {held}, the directory begins at byte {self.directory}")
        return begin, record.nbytes

    def _storage(self, key: str) -> tuple[int, int] | None:
        if key not in self.places:
            name = f"{self.folder}data/{key}"
            self.places[key] = self._place(name) if name in self.records else None
        return self.places[key]

    def _truncated(self) -> ReshardError:
        """A download that broke off: torch writes the pickle first, and it tells how much must follow."""
        message = f"{self.where}: truncated: no zip directory at the end of the file, which holds {self.size} bytes"
        head = exactly(self.pread, min(self.size, _LOCAL.size), 0, self.where)
        if len(head) == _LOCAL.size:
            *_, named, extra = _LOCAL.unpack(head)
            begin = _LOCAL.size + named + extra
            try:
                machine = Machine(self.pread, begin, min(self.size, begin + MOST_PICKLE), self.where)
                machine.load()
                needed = machine.stream.tell() + sum(storage.whole for storage in machine.storages.values())
                message += f"; its tensors need more than {needed}"
            except ReshardError:
                pass  # broken off within the pickle, or not written by torch
        return ReshardError(message, AGAIN)
