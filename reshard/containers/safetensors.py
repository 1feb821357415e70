"""The safetensors header: which tensors a file holds, and where each of them lies. Never reads or writes tensor data.

    8 bytes   N, little-endian
    N bytes   JSON   {"__metadata__": {text: text}, name: {"dtype": "BF16", "shape": [2], "data_offsets": [0, 4]}, ...}
    the rest  data   offsets count from here; tensors lie one after another, without holes, to the end of the file

A header within limits is accepted if and only if the safetensors library (0.8) accepts it, oddities included; tests
compare the two. The library reads with serde_json, which differs from Python's `json`: see `serde` and `_fields`. Knows
nothing about
models, layouts or the Hub.
"""

import json
from collections.abc import Iterable, Mapping
from typing import Any

from ..errors import ReshardError
from ..inputs import decode, limits
from ..text.escapes import clip
from . import serde
from .dtypes import BITS
from .entry import Entry, Header
from .impostors import guess
from .reading import AGAIN, Pread, exactly
from .serde import U64, show

MAX_LENGTH = 100_000_000  # bytes of JSON; MAX_HEADER_SIZE in the library

_RANK = {dtype: rank for rank, dtype in enumerate(BITS)}
_NAMES = {dtype: dtype for dtype in BITS}  # so that 100,000 tensors share one string

_WRITER = (
    "the file is damaged, or its writer is at fault: download it again, or write it again with the safetensors library"
)


def read(pread: Pread, size: int, where: str) -> Header:
    """What the header of a file of `size` bytes says.

    Raises ReshardError for what `length` and `parse` refuse; what `pread` raises passes through.
    """
    word = exactly(pread, min(8, size), 0, where)
    return parse(exactly(pread, length(word, size, where), 8, where), size, where)


def length(word: bytes, file_size: int, where: str) -> int:
    """The length N of the JSON in bytes, from the file's first 8 bytes.

    Raises ReshardError if N is over MAX_LENGTH, or more than a file of `file_size` bytes can hold.
    """
    if len(word) < 8:
        raise ReshardError(
            f"{where}: the file holds {file_size} bytes; a safetensors file has at least 10", _guess(word, AGAIN)
        )
    n = int.from_bytes(word[:8], "little")
    if n > MAX_LENGTH:
        words = f"its first 8 bytes announce a header of {n} bytes; at most {MAX_LENGTH} are allowed"
        message = f"{where}: not a safetensors file: {words}"
        raise ReshardError(
            message, _guess(word, "this is not a safetensors file, or its first bytes are damaged: download it again")
        )
    if n + 8 > file_size:
        message = (
            f"{where}: truncated inside the header: the file holds {file_size} bytes, the header alone takes {n + 8}"
        )
        raise ReshardError(message, _guess(word, AGAIN))
    return n


def parse(raw: bytes, file_size: int, where: str) -> Header:
    """Read the JSON bytes `raw` that follow the length word, in a file of `file_size` bytes that messages call `where`.

    Raises ReshardError, naming the tensor, unless the JSON is of the right form and its tensors fill the rest of the
    file without a hole.
    """
    decode.check_content(raw, where, limits.HEADER_KEYS)
    if (count := raw.count(b'"data_offsets"')) > limits.TENSORS:
        raise ReshardError(f"{where}: its header names {count} tensors, at most {limits.TENSORS} are read")
    data_start = 8 + len(raw)
    # Tensors of one shape share one tuple: a checkpoint has 100,000 tensors but a dozen shapes.
    shapes: dict[tuple[int, ...], tuple[int, ...]] = {}

    def entry(dtype: Any, shape: Any, span: Any) -> Entry:
        """One tensor, each value checked for itself; whether they fit once it is known which of equal names counts."""
        if type(dtype) is not str:
            dtype = _dtype(dtype)
        kind = _NAMES.get(dtype)
        if kind is None:
            raise ValueError(f"unknown dtype {show(dtype)}; safetensors knows {', '.join(BITS)}")
        if type(shape) is not list:
            raise ValueError(f"shape is {show(shape)}, not a list of sizes")
        # bool is an int to Python, and 1 == 1.0 == True as a key of `shapes`: the exact type is asked first.
        for size in shape:
            if type(size) is not int:
                raise ValueError(f"shape holds {show(size)}, not a size")
        key = tuple(shape)
        known = shapes.get(key)
        if known is None:
            if key and not 0 <= min(key) <= max(key) <= U64:
                raise ValueError(f"shape {clip(str(shape))} has sizes that are not from 0 to 2**64 - 1")
            known = shapes[key] = key
        if type(span) is not list or len(span) != 2:
            raise ValueError(f"data_offsets is {show(span)}, not a pair of offsets")
        begin, end = span
        if type(begin) is not int or type(end) is not int or not (0 <= begin <= U64 and 0 <= end <= U64):
            raise ValueError(f"data_offsets holds {show(begin)} and {show(end)}, not two offsets from 0 to 2**64 - 1")
        return Entry(kind, known, data_start + begin, end - begin)

    def node(pairs: list[tuple[str, Any]]) -> Entry | tuple[tuple[str, Any], ...]:
        """An object of the JSON: its pairs, or, to save memory, an Entry at once if spelled as every writer does."""
        if len(pairs) == 3:
            (first, dtype), (second, shape), (third, span) = pairs
            if first == "dtype" and second == "shape" and third == "data_offsets":
                try:
                    return entry(dtype, shape, span)
                except ValueError:
                    pass  # said later, with the tensor's name
        return tuple(pairs)

    try:
        top = serde.loads(raw, node)
        if type(top) is not tuple:
            raise ValueError(f"the header is {show(top)}, not an object that maps names to tensors")
    except ValueError as error:
        hint = _guess(len(raw).to_bytes(8, "little"), _WRITER)
        raise ReshardError(f"{where}: not a safetensors header: {error}", hint) from None

    entries: dict[str, Entry] = {}
    metadata: dict[str, str] | None = None
    for name, value in top:
        try:
            if name == "__metadata__":
                if metadata is not None:
                    raise ValueError("appears twice in the header")
                metadata = _metadata(value)
            else:
                # Of two tensors of one name the last counts, but both must be well formed: so it is with the library.
                entries[name] = value if type(value) is Entry else entry(*_fields(value))
        except ValueError as error:
            what = name if name == "__metadata__" else f"tensor {show(name)}"
            raise ReshardError(f"{where}: {what}: {error}", _WRITER) from None
    _check_filled(entries, data_start, file_size, where)
    return Header(entries, metadata or {}, data_start)


def build(
    tensors: Iterable[tuple[str, str, tuple[int, ...]]], metadata: Mapping[str, str] | None, align: int = 8
) -> tuple[bytes, Header]:
    """The 8 + N bytes of a header for tensors (name, dtype, shape) that lie in the order given, and what it says.

    The JSON is compact, metadata first, padded with spaces so that data starts at a multiple of `align` bytes. With
    align = 8, in `library_order`, these are the bytes that the safetensors library writes. Raises ReshardError for what
    no safetensors file can hold.
    """
    text = json.JSONEncoder(ensure_ascii=False).encode  # escapes exactly as serde_json does
    pairs = ",".join(f"{text(key)}:{text(value)}" for key, value in (metadata or {}).items())
    parts = [] if metadata is None else [f'"__metadata__":{{{pairs}}}']
    placed: dict[str, tuple[str, tuple[int, ...], int, int]] = {}
    begin = 0
    for name, dtype, shape in tensors:
        try:
            if name in placed or name == "__metadata__":
                raise ValueError("the name is taken")
            if dtype not in BITS:
                raise ValueError(f"unknown dtype {show(dtype)}; safetensors knows {', '.join(BITS)}")
            size = _nbytes(dtype, shape)
        except ValueError as error:
            raise ReshardError(f"tensor {show(name)} cannot be stored as safetensors: {error}") from None
        placed[name] = (dtype, shape, begin, size)
        sizes = ",".join(map(str, shape))
        parts.append(f'{text(name)}:{{"dtype":"{dtype}","shape":[{sizes}],"data_offsets":[{begin},{begin + size}]}}')
        begin += size
    try:
        raw = f"{{{','.join(parts)}}}".encode()
    except UnicodeEncodeError as error:
        bad = error.object[error.start : error.start + 1]
        raise ReshardError(
            f"a name or metadata cannot be stored as safetensors: {bad!a} is not valid Unicode"
        ) from None
    raw += b" " * (-(8 + len(raw)) % align)
    if len(raw) > MAX_LENGTH:
        hint = "write fewer tensors to a file: fuse them, or use more ranks"
        raise ReshardError(
            f"the header of {len(placed)} tensors takes {len(raw)} bytes; safetensors allows {MAX_LENGTH}", hint
        )
    data_start = 8 + len(raw)
    entries = {
        name: Entry(dtype, shape, data_start + begin, size) for name, (dtype, shape, begin, size) in placed.items()
    }
    return len(raw).to_bytes(8, "little") + raw, Header(entries, dict(metadata or {}), data_start)


def library_order(tensors: Iterable[tuple[str, str, tuple[int, ...]]]) -> list[tuple[str, str, tuple[int, ...]]]:
    """Tensors (name, dtype, shape) as the library lays them: by falling place in BITS, then by name, as code points.

    Not by bits alone: F64 stands before C64, and F4 between the 6-bit types and BOOL. Every dtype must be one of BITS.
    """
    return sorted(tensors, key=lambda tensor: (-_RANK[tensor[1]], tensor[0]))


def _dtype(value: Any) -> Any:
    """To serde, which reads an enum, {"F32": null} is "F32" too."""
    if type(value) is tuple and len(value) == 1 and value[0][1] is None:
        return value[0][0]
    raise ValueError(f"dtype is {show(value)}, not a string")


def _fields(value: Any) -> tuple[Any, Any, Any]:
    """dtype, shape and data_offsets of a tensor that is not spelled in the usual way; ValueError if it is none.

    serde takes a struct's fields in any order, each once, between others that it ignores even if doubled, or as a plain
    list of the three.
    """
    if type(value) is list:
        if len(value) != 3:
            raise ValueError(f"is a list of {len(value)} values, not dtype, shape and data_offsets")
        return value[0], value[1], value[2]
    if type(value) is not tuple:
        raise ValueError(f"is {show(value)}, not an object with dtype, shape and data_offsets")
    fields: dict[str, Any] = {}
    for key, field in value:
        if key not in ("dtype", "shape", "data_offsets"):
            serde.check_ignored(key, field)
        elif key in fields:
            raise ValueError(f"{key} appears twice")
        else:
            fields[key] = field
    for key in ("dtype", "shape", "data_offsets"):
        if key not in fields:
            raise ValueError(f"{key} is missing")
    return fields["dtype"], fields["shape"], fields["data_offsets"]


def _metadata(value: Any) -> dict[str, str]:
    """The free text of a header; null is none, and of two equal keys the last counts."""
    if value is None:
        return {}
    if type(value) is not tuple:
        raise ValueError(f"is {show(value)}, not an object of strings")
    for key, text in value:
        if type(text) is not str:
            raise ValueError(f"{show(key)} is {show(text)}, not a string")
    return dict(value)


def _check_filled(entries: dict[str, Entry], data_start: int, file_size: int, where: str) -> None:
    """ReshardError unless each tensor has the bytes that its shape needs, and all fill the file from `data_start`."""
    sizes: dict[tuple[str, tuple[int, ...]], int] = {}  # a dozen, see `parse`
    position = data_start
    previous = ""
    try:
        for name, entry in sorted(entries.items(), key=_place):
            if entry.offset != position:
                after = f"tensor {show(previous)} ends" if previous else "the data starts"
                kind = "a hole" if entry.offset > position else "an overlap"
                raise ValueError(f"begins at byte {entry.offset}, but {after} at byte {position}: {kind}")
            key = (entry.dtype, entry.shape)
            size = sizes.get(key)
            if size is None:
                size = sizes[key] = _nbytes(*key)
            if entry.nbytes != size:
                raise ValueError(
                    f"{entry.dtype} {list(entry.shape)} takes {size} bytes, but its offsets give it {entry.nbytes}"
                )
            position += size
            previous = name
    except ValueError as error:
        raise ReshardError(f"{where}: tensor {show(name)}: {error}", _WRITER) from None
    if position > file_size:
        raise ReshardError(f"{where}: truncated: the file holds {file_size} bytes, the header says {position}", AGAIN)
    if position < file_size:
        raise ReshardError(f"{where}: too long: the file holds {file_size} bytes, the header says {position}", AGAIN)


def _place(item: tuple[str, Entry]) -> tuple[int, int]:
    return item[1].offset, item[1].nbytes


def _nbytes(dtype: str, shape: tuple[int, ...]) -> int:
    """Bytes of a row-major tensor. ValueError where the library's 64-bit arithmetic overflows, or a byte is left."""
    elements = 1
    for size in shape:  # one by one: [2**40, 2**40, 0] overflows on the way, [0, 2**40, 2**40] does not
        if size < 0:
            raise ValueError(f"shape {list(shape)} has a negative size")
        elements *= size
        if elements > U64:
            break
    bits = elements * BITS[dtype]
    if bits > U64:
        raise ValueError(f"{dtype} {list(shape)} has more than 2**64 - 1 bits")
    if bits % 8:
        raise ValueError(f"{dtype} {list(shape)} has {bits} bits, not a whole number of bytes")
    return bits // 8


def _guess(word: bytes, otherwise: str) -> str:
    """What the file probably is. Where its first 8 bytes may be a length, a magic number of a few bytes is no sign."""
    return guess(word, "safetensors", otherwise, 4 if int.from_bytes(word, "little") <= MAX_LENGTH else 1)
