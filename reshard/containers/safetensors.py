"""The safetensors header: which tensors a file holds, and where each of them lies. Stdlib only; never reads or writes tensor data.

    8 bytes   N, little-endian
    N bytes   JSON   {"__metadata__": {text: text}, name: {"dtype": "BF16", "shape": [2, 3], "data_offsets": [begin, end]}, ...}
    the rest  data   offsets count from here; tensors lie one after another, without holes, to the end of the file

A header within limits is accepted if and only if the safetensors library (0.8) accepts it, oddities included; tests compare the two.
The library reads with serde_json, which differs from Python's `json`: see `_loads`, `_fields` and `_ignored`. Knows nothing about models,
layouts or the Hub.
"""

import json
import math
import os
import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from ..errors import PlaceError, ReshardError
from ..inputs import decode, limits

# Bits per element, in the library's order of rising alignment, which is also its order of falling place in a file (`library_order`).
# Source: `enum Dtype` and `bitsize` in safetensors/src/tensor.rs; tests ask the installed library for each.
BITS: dict[str, int] = {
    "BOOL": 8,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "U8": 8,
    "I8": 8,
    "F8_E5M2": 8,
    "F8_E4M3": 8,
    "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "I16": 16,
    "U16": 16,
    "F16": 16,
    "BF16": 16,
    "I32": 32,
    "U32": 32,
    "F32": 32,
    "C64": 64,
    "F64": 64,
    "I64": 64,
    "U64": 64,
}

MAX_LENGTH = 100_000_000  # bytes of JSON; MAX_HEADER_SIZE in the library

_RANK = {dtype: rank for rank, dtype in enumerate(BITS)}
_NAMES = {dtype: dtype for dtype in BITS}  # so that 100,000 tensors share one string
_U64 = 2**64 - 1
_DEPTH = 125  # serde_json stops at 128 levels; an ignored value begins at the third

_AGAIN = "the file is damaged or unfinished: download or copy it again"
_WRITER = "the file is damaged, or its writer is at fault: download it again, or write it again with the safetensors library"

# What people hand over instead: how such a file begins, and what to do.
_TORCH = "give it its own name back (.bin, .pt), or save it as safetensors"
_IMPOSTORS: tuple[tuple[bytes, str], ...] = (
    (b"version ", "this seems to be a git-lfs pointer, not the file itself: run `git lfs pull`, or download the file"),
    (b"PK\x03\x04", f"this is a zip archive, as torch.save writes: {_TORCH}"),
    (b"\x80\x02", f"this is a Python pickle, as old versions of torch.save wrote: {_TORCH}"),
    (b"GGUF", "this is a GGUF file; reshard reads safetensors and PyTorch checkpoints"),
    (b"\x93NUMPY", "this is a numpy array; reshard reads safetensors and PyTorch checkpoints"),
    (b"\x89HDF", "this is an HDF5 file; reshard reads safetensors and PyTorch checkpoints"),
    (b"\x1f\x8b", "this is gzip-compressed: unpack it first"),
    (b"\x00" * 8, "the file begins with zeros, as a download that was never finished does: download it again"),
)


class Entry(NamedTuple):
    """Where one stored tensor lies. `offset` and `nbytes` in bytes, `offset` from the start of its file; `strides` in elements."""

    dtype: str  # safetensors' spelling
    shape: tuple[int, ...]
    offset: int
    nbytes: int
    strides: tuple[int, ...] | None = None  # None means row-major, as safetensors always is; tensors of .bin files may be strided


class Header(NamedTuple):
    """What one file holds: its tensors in the header's order, its free-text metadata, and the byte at which data starts."""

    entries: dict[str, Entry]
    metadata: dict[str, str]
    data_start: int


def read(fd: int, file_size: int, where: str) -> tuple[Header, bytes]:
    """Read the header of an open file: what it says, and its 8 + N bytes as they stand.

    Raises ReshardError for what `length` and `parse` refuse, PlaceError where the storage fails or the file shrinks meanwhile.
    """
    raw = text(fd, file_size, where)
    return parse(raw, file_size, where), len(raw).to_bytes(8, "little") + raw


def text(fd: int, file_size: int, where: str) -> bytes:
    """The N bytes of an open file's header. Raises as `read` does, but for what they say."""
    word = _pread(fd, min(8, file_size), 0, where)
    return _pread(fd, length(word, file_size, where), 8, where)


def length(word: bytes, file_size: int, where: str) -> int:
    """The length N of the JSON in bytes, from the file's first 8 bytes.

    Raises ReshardError if N is over MAX_LENGTH, or more than a file of `file_size` bytes can hold.
    """
    if len(word) < 8:
        raise ReshardError(f"{where}: the file holds {file_size} bytes; a safetensors file has at least 10", _hint(word, _AGAIN))
    n = int.from_bytes(word[:8], "little")
    if n > MAX_LENGTH:
        message = f"{where}: not a safetensors file: its first 8 bytes announce a header of {n} bytes; at most {MAX_LENGTH} are allowed"
        raise ReshardError(message, _hint(word, "this is no safetensors file, or its first bytes are damaged: download it again"))
    if n + 8 > file_size:
        message = f"{where}: truncated inside the header: the file holds {file_size} bytes, the header alone takes {n + 8}"
        raise ReshardError(message, _hint(word, _AGAIN))
    return n


def parse(raw: bytes, file_size: int, where: str) -> Header:
    """Read the JSON bytes `raw` that follow the length word, in a file of `file_size` bytes that messages call `where`.

    Raises ReshardError, naming the tensor, unless the JSON is of the right form and its tensors fill the rest of the file without a hole.
    """
    decode.check_content(raw, where, limits.HEADER_KEYS)
    data_start = 8 + len(raw)
    # Tensors of one shape share one tuple: a checkpoint has 100,000 tensors but a dozen shapes.
    shapes: dict[tuple[int, ...], tuple[int, ...]] = {}

    def entry(dtype: Any, shape: Any, span: Any) -> Entry:
        """One tensor, its values checked each for itself; how they fit is checked once it is known which of two equal names counts."""
        if type(dtype) is not str:
            dtype = _dtype(dtype)
        kind = _NAMES.get(dtype)
        if kind is None:
            raise ValueError(f"unknown dtype {_show(dtype)}; safetensors knows {', '.join(BITS)}")
        if type(shape) is not list:
            raise ValueError(f"shape is {_show(shape)}, not a list of sizes")
        # bool is an int to Python, and 1 == 1.0 == True as a key of `shapes`: the exact type is asked first.
        for size in shape:
            if type(size) is not int:
                raise ValueError(f"shape holds {_show(size)}, not a size")
        key = tuple(shape)
        known = shapes.get(key)
        if known is None:
            if key and not 0 <= min(key) <= max(key) <= _U64:
                raise ValueError(f"shape {_clip(str(shape))} has sizes that are not from 0 to 2**64 - 1")
            known = shapes[key] = key
        if type(span) is not list or len(span) != 2:
            raise ValueError(f"data_offsets is {_show(span)}, not a pair of offsets")
        begin, end = span
        if type(begin) is not int or type(end) is not int or not (0 <= begin <= _U64 and 0 <= end <= _U64):
            raise ValueError(f"data_offsets holds {_show(begin)} and {_show(end)}, not two offsets from 0 to 2**64 - 1")
        return Entry(kind, known, data_start + begin, end - begin)

    def node(pairs: list[tuple[str, Any]]) -> Entry | tuple[tuple[str, Any], ...]:
        """An object of the JSON: its pairs, or an Entry at once if it is spelled as every writer does; that saves most of the memory."""
        if len(pairs) == 3:
            (first, dtype), (second, shape), (third, span) = pairs
            if first == "dtype" and second == "shape" and third == "data_offsets":
                try:
                    return entry(dtype, shape, span)
                except ValueError:
                    pass  # said later, with the tensor's name
        return tuple(pairs)

    try:
        top = _loads(raw, node)
        if type(top) is not tuple:
            raise ValueError(f"the header is {_show(top)}, not an object that maps names to tensors")
    except ValueError as error:
        hint = _hint(len(raw).to_bytes(8, "little"), _WRITER)
        raise ReshardError(f"{where}: not a safetensors header: {error}", hint) from None

    entries: dict[str, Entry] = {}
    metadata: dict[str, str] | None = None
    for name, value in top:
        try:
            if name == "__metadata__":
                if metadata is not None:
                    raise ValueError("stands twice in the header")
                metadata = _metadata(value)
            else:
                # Of two tensors of one name the last counts, but both must be well formed: so it is with the library.
                entries[name] = value if type(value) is Entry else entry(*_fields(value))
        except ValueError as error:
            what = name if name == "__metadata__" else f"tensor {_show(name)}"
            raise ReshardError(f"{where}: {what}: {error}", _WRITER) from None
    _check_filled(entries, data_start, file_size, where)
    return Header(entries, metadata or {}, data_start)


def build(tensors: Iterable[tuple[str, str, tuple[int, ...]]], metadata: Mapping[str, str] | None, align: int = 8) -> tuple[bytes, Header]:
    """The 8 + N bytes of a header for tensors (name, dtype, shape) that lie one after another in the order given, and what it says.

    The JSON is compact, metadata first, padded with spaces so that data starts at a multiple of `align` bytes. With align = 8, in
    `library_order`, these are the bytes that the safetensors library writes. Raises ReshardError for what no safetensors file can hold.
    """
    spelled = json.JSONEncoder(ensure_ascii=False).encode  # escapes exactly as serde_json does
    parts = (
        []
        if metadata is None
        else [f'"__metadata__":{{{",".join(f"{spelled(key)}:{spelled(value)}" for key, value in metadata.items())}}}']
    )
    placed: dict[str, tuple[str, tuple[int, ...], int, int]] = {}
    begin = 0
    for name, dtype, shape in tensors:
        try:
            if name in placed or name == "__metadata__":
                raise ValueError("the name is taken")
            if dtype not in BITS:
                raise ValueError(f"unknown dtype {_show(dtype)}; safetensors knows {', '.join(BITS)}")
            size = _nbytes(dtype, shape)
        except ValueError as error:
            raise ReshardError(f"tensor {_show(name)} cannot be stored as safetensors: {error}") from None
        placed[name] = (dtype, shape, begin, size)
        sizes = ",".join(map(str, shape))
        parts.append(f'{spelled(name)}:{{"dtype":"{dtype}","shape":[{sizes}],"data_offsets":[{begin},{begin + size}]}}')
        begin += size
    try:
        raw = f"{{{','.join(parts)}}}".encode()
    except UnicodeEncodeError as error:
        bad = error.object[error.start : error.start + 1]
        raise ReshardError(f"a name or metadata cannot be stored as safetensors: {bad!a} is not valid Unicode") from None
    raw += b" " * (-(8 + len(raw)) % align)
    if len(raw) > MAX_LENGTH:
        hint = "write fewer tensors to a file: fuse them, or use more ranks"
        raise ReshardError(f"the header of {len(placed)} tensors takes {len(raw)} bytes; safetensors allows {MAX_LENGTH}", hint)
    data_start = 8 + len(raw)
    entries = {name: Entry(dtype, shape, data_start + begin, size) for name, (dtype, shape, begin, size) in placed.items()}
    return len(raw).to_bytes(8, "little") + raw, Header(entries, dict(metadata or {}), data_start)


def library_order(tensors: Iterable[tuple[str, str, tuple[int, ...]]]) -> list[tuple[str, str, tuple[int, ...]]]:
    """Tensors (name, dtype, shape) as the safetensors library lays them: by falling place in BITS, then by name, as code points.

    Not by bits alone: F64 stands before C64, and F4 between the 6-bit types and BOOL. Every dtype must be one of BITS.
    """
    return sorted(tensors, key=lambda tensor: (-_RANK[tensor[1]], tensor[0]))


def _pread(fd: int, count: int, offset: int, where: str) -> bytes:
    """`count` bytes at `offset`; one pread may return fewer than asked for."""
    parts: list[bytes] = []
    got = 0
    while got < count:
        try:
            part = os.pread(fd, count - got, offset + got)
        except OSError as error:
            raise PlaceError(f"{where}: reading {count} bytes at offset {offset} failed: {error.strerror}") from error
        if not part:
            hint = "something changed the file while it was read: try again when it is complete"
            raise PlaceError(f"{where}: the file ends at byte {offset + got}; bytes up to {offset + count} were expected", hint)
        parts.append(part)
        got += len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)


def _loads(raw: bytes, node: Any) -> Any:
    """The JSON as serde_json reads it, with `node` called on each object's pairs. Raises ValueError with a reason.

    Where Python's json is laxer: NaN and Infinity, half surrogate pairs, numbers that no double can hold, -0 as an integer.
    Both refuse a byte-order mark, trailing bytes, control characters in strings, leading zeros.
    """
    text = raw.decode()  # UnicodeDecodeError is a ValueError
    if "\\u" in text:
        # Pairs of backslashes and of surrogates are stepped over; a half that is left stands alone.
        lone = next((match for match in _LONE.finditer(text) if match["lone"]), None)
        if lone is not None:
            raise ValueError(f"half a surrogate pair, {lone['lone']}, at character {lone.start()}")
    # To serde_json -0 is a float, so it is no size. A hook costs time, hence only where the text occurs (it may be part of a name).
    integer = _integer if "-0" in text else None
    try:
        return json.loads(text, object_pairs_hook=node, parse_float=_float, parse_int=integer, parse_constant=_constant)
    except RecursionError:
        raise ValueError("the JSON is nested too deeply") from None


_LONE = re.compile(r"\\\\|\\u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}|(?P<lone>\\u[dD][89a-fA-F][0-9a-fA-F]{2})")
_DECIMAL = re.compile(r"-?([0-9]+)(?:\.([0-9]+))?(?:[eE]([-+]?)0*([0-9]*))?")


def _constant(literal: str) -> float:
    raise ValueError(f"{literal} is not JSON")


def _integer(literal: str) -> int | float:
    return -0.0 if literal == "-0" else int(literal)


def _float(literal: str) -> float:
    """A number that is not an integer. No valid place in a header takes one, but an ignored value may be one, unless it is out of range.

    serde_json reckons the range in its own way (`f64_from_parts`): it drops the digits that a u64 cannot hold, then multiplies by a power
    of ten, so that 1.7976931348623158e308, which rounds to the largest double, is out of range.
    """
    match = _DECIMAL.fullmatch(literal)
    whole, fraction, sign, exponent = match.groups() if match else ("0", None, None, None)
    significand = power = 0
    for at, digit in enumerate(whole):
        if significand * 10 + int(digit) > _U64:
            power = len(whole) - at
            break
        significand = significand * 10 + int(digit)
    for digit in fraction or "":
        if significand * 10 + int(digit) > _U64:
            break
        significand = significand * 10 + int(digit)
        power -= 1
    if exponent:
        shift = int(exponent) if len(exponent) < 10 else 10**9
        power += -shift if sign == "-" else shift
    if significand and power > 0 and math.isinf(significand * float(f"1e{power}")):
        raise ValueError(f"the number {_clip(literal)} is out of range")
    return float(literal)


def _dtype(value: Any) -> Any:
    """To serde, which reads an enum, {"F32": null} is "F32" too."""
    if type(value) is tuple and len(value) == 1 and value[0][1] is None:
        return value[0][0]
    raise ValueError(f"dtype is {_show(value)}, not a string")


def _fields(value: Any) -> tuple[Any, Any, Any]:
    """dtype, shape and data_offsets of a tensor that is not spelled in the usual way; ValueError if it is none.

    serde takes a struct's fields in any order, each once, between others that it ignores even if doubled, or as a plain list of the three.
    """
    if type(value) is list:
        if len(value) != 3:
            raise ValueError(f"is a list of {len(value)} values, not dtype, shape and data_offsets")
        return value[0], value[1], value[2]
    if type(value) is not tuple:
        raise ValueError(f"is {_show(value)}, not an object with dtype, shape and data_offsets")
    fields: dict[str, Any] = {}
    for key, field in value:
        if key not in ("dtype", "shape", "data_offsets"):
            _ignored(key, field)
        elif key in fields:
            raise ValueError(f"{key} stands twice")
        else:
            fields[key] = field
    for key in ("dtype", "shape", "data_offsets"):
        if key not in fields:
            raise ValueError(f"{key} is missing")
    return fields["dtype"], fields["shape"], fields["data_offsets"]


def _ignored(key: str, value: Any) -> None:
    """Even what serde_json ignores must not be nested too deeply, nor hold a number out of range (floats were checked when read)."""
    level, depth = [value], 0
    while level:
        below: list[Any] = []
        deeper = False
        for item in level:
            if type(item) is int:
                if abs(item) > _U64:
                    _float(str(item))
            elif type(item) in (list, tuple, Entry):
                deeper = True
                if type(item) is list:
                    below += item
                elif type(item) is tuple:
                    below += (inner for _, inner in item)
                else:
                    below.append([])  # its shape
        depth += deeper
        if depth > _DEPTH:
            raise ValueError(f"{_show(key)} is nested more than {_DEPTH} levels deep")
        level = below


def _metadata(value: Any) -> dict[str, str]:
    """The free text of a header; null is none, and of two equal keys the last counts."""
    if value is None:
        return {}
    if type(value) is not tuple:
        raise ValueError(f"is {_show(value)}, not an object of strings")
    for key, text in value:
        if type(text) is not str:
            raise ValueError(f"{_show(key)} is {_show(text)}, not a string")
    return dict(value)


def _check_filled(entries: dict[str, Entry], data_start: int, file_size: int, where: str) -> None:
    """ReshardError unless each tensor has the bytes that its shape needs, and all of them fill the file from `data_start` to its end."""
    sizes: dict[tuple[str, tuple[int, ...]], int] = {}  # a dozen, see `parse`
    position = data_start
    previous = ""
    try:
        for name, entry in sorted(entries.items(), key=_place):
            if entry.offset != position:
                after = f"tensor {_show(previous)} ends" if previous else "the data starts"
                kind = "a hole" if entry.offset > position else "an overlap"
                raise ValueError(f"begins at byte {entry.offset}, but {after} at byte {position}: {kind}")
            key = (entry.dtype, entry.shape)
            size = sizes.get(key)
            if size is None:
                size = sizes[key] = _nbytes(*key)
            if entry.nbytes != size:
                raise ValueError(f"{entry.dtype} {list(entry.shape)} takes {size} bytes, but its offsets give it {entry.nbytes}")
            position += size
            previous = name
    except ValueError as error:
        raise ReshardError(f"{where}: tensor {_show(name)}: {error}", _WRITER) from None
    if position > file_size:
        raise ReshardError(f"{where}: truncated: the file holds {file_size} bytes, the header says {position}", _AGAIN)
    if position < file_size:
        raise ReshardError(f"{where}: too long: the file holds {file_size} bytes, the header says {position}", _AGAIN)


def _place(item: tuple[str, Entry]) -> tuple[int, int]:
    return item[1].offset, item[1].nbytes


def _nbytes(dtype: str, shape: tuple[int, ...]) -> int:
    """Bytes of a row-major tensor. ValueError where the library's 64-bit arithmetic overflows, or a sub-byte type leaves part of a byte."""
    elements = 1
    for size in shape:  # one by one: [2**40, 2**40, 0] overflows on the way, [0, 2**40, 2**40] does not
        if size < 0:
            raise ValueError(f"shape {list(shape)} has a negative size")
        elements *= size
        if elements > _U64:
            break
    bits = elements * BITS[dtype]
    if bits > _U64:
        raise ValueError(f"{dtype} {list(shape)} has more than 2**64 - 1 bits")
    if bits % 8:
        raise ValueError(f"{dtype} {list(shape)} has {bits} bits, which is no whole number of bytes")
    return bits // 8


def _hint(word: bytes, otherwise: str) -> str:
    """What the file probably is, from its first 8 bytes; `otherwise` if they do not tell."""
    honest = int.from_bytes(word, "little") <= MAX_LENGTH  # then a short magic number may as well be the low bytes of a length
    for magic, hint in _IMPOSTORS:
        if word.startswith(magic) and (len(magic) >= 4 or not honest):
            return hint
    if word and all(byte in b"\t\r\n\xef\xbb\xbf" or 32 <= byte < 127 for byte in word):
        text = word.decode(errors="replace").strip("\ufeff \t\r\n")
        if text.startswith("<"):
            return "this is an HTML or XML page, such as a server's error or login page: look into it, then download the file again"
        return f"this is text that begins {text!r}, perhaps a server's message: look into it, then download the file again"
    return otherwise


def _show(value: Any) -> str:
    """A value of the JSON, for a message: short whatever it is."""
    if type(value) is list:
        return f"a list of {len(value)}"
    if type(value) is tuple:
        return "an object"
    if type(value) is Entry:
        return "a tensor's entry"
    return _clip(repr(value) if type(value) is str else json.dumps(value))


def _clip(text: str) -> str:
    return text if len(text) <= 200 else f"{text[:200]}…"


def extent(entry: Entry) -> int:
    """Bytes from a tensor's first to its last element in its file, which is more than `nbytes` where it is strided."""
    if entry.strides is None or not entry.nbytes:
        return entry.nbytes
    reach = 1 + sum((n - 1) * s for n, s in zip(entry.shape, entry.strides, strict=True))
    return reach * BITS[entry.dtype] // 8
