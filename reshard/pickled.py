"""The tensors in a file of torch.save (.bin, .pt, .pth): which there are, and where each lies. Stdlib only; never reads tensor data.

    zip, torch >= 1.6, entries stored as they are        legacy, one after another
    NAME/data.pkl     the object, pickled                pickles   magic number, protocol version, the writer's word sizes
    NAME/byteorder    "little"                           pickle    the object
    NAME/data/KEY     the elements of one storage        pickle    list of the storages' keys
    ...                                                  storages  each 8 bytes (count of elements), then the elements

A tensor is a view of a storage: offset, shape and strides. In the pickle a storage is only a key, so both formats are read alike.

A pickle is a program that may call any function of any module. `_Machine` runs its stack operations, but has nothing to call: no import, no
attribute, no foreign object is within its reach, and a name that is not one of GLOBALS ends the reading. Python's own Unpickler would
do less well with `find_class` overridden: it hashes hostile dict keys, and reserves whatever memory a damaged length asks for.

Knows nothing about models, layouts or the Hub.
"""

import io
import math
import re
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from struct import Struct
from typing import Any

from .errors import ReshardError
from .header import Entry

Pread = Callable[[int, int], bytes]  # (length, offset) → bytes; fewer than asked for only at the end of the file

# Limits that no published checkpoint comes near, so that a hostile file costs less than a minute and a few hundred MiB. A tensor takes
# about 150 bytes of pickle, 40 steps, and 100 bytes of zip directory.
MOST_PICKLE = 32 << 20  # bytes
MOST_STEPS = 5_000_000  # opcodes, and items of what functions are given
MOST_DIRECTORY = 32 << 20  # bytes
_MOST_LINE = 1024  # bytes of a name, or of a number written as text
_MOST_INTEGER = 255  # bytes
_MOST_DIMENSIONS = 64  # as in torch
_I63 = 2**63 - 1

_MAGIC = 0x1950A86A20F9469CFC6C
_PROTOCOL = 1001
_WRAPPERS = ("state_dict", "model", "module")  # keys under which training scripts put the state dict

# torch's name of a dtype → safetensors', None where it has none; bytes per element. Source: torch.storage._new_dtypes and
# _dtype_to_storage_type_map, safetensors.torch._TYPES; tests ask both libraries.
DTYPES: dict[str, tuple[str | None, int]] = {
    "bool": ("BOOL", 1),
    "uint8": ("U8", 1),
    "int8": ("I8", 1),
    "int16": ("I16", 2),
    "uint16": ("U16", 2),
    "int32": ("I32", 4),
    "uint32": ("U32", 4),
    "int64": ("I64", 8),
    "uint64": ("U64", 8),
    "float8_e5m2": ("F8_E5M2", 1),
    "float8_e4m3fn": ("F8_E4M3", 1),
    "float8_e8m0fnu": ("F8_E8M0", 1),
    "float8_e4m3fnuz": ("F8_E4M3FNUZ", 1),
    "float8_e5m2fnuz": ("F8_E5M2FNUZ", 1),
    "float4_e2m1fn_x2": ("F4", 1),  # two to a byte; torch counts bytes, safetensors counts elements
    "float16": ("F16", 2),
    "bfloat16": ("BF16", 2),
    "float32": ("F32", 4),
    "float64": ("F64", 8),
    "complex64": ("C64", 8),
    "complex32": (None, 4),
    "complex128": (None, 16),
    "qint8": (None, 1),
    "quint8": (None, 1),
    "quint4x2": (None, 1),
    "quint2x4": (None, 1),
    "qint32": (None, 4),
    "bits1x8": (None, 1),
    "bits2x4": (None, 1),
    "bits4x2": (None, 1),
    "bits8": (None, 1),
    "bits16": (None, 2),
}

_STORAGES = {
    "Bool": "bool",
    "Byte": "uint8",
    "Char": "int8",
    "Short": "int16",
    "Int": "int32",
    "Long": "int64",
    "Half": "float16",
    "BFloat16": "bfloat16",
    "Float": "float32",
    "Double": "float64",
    "ComplexFloat": "complex64",
    "ComplexDouble": "complex128",
    "QInt8": "qint8",
    "QUInt8": "quint8",
    "QUInt4x2": "quint4x2",
    "QUInt2x4": "quint2x4",
    "QInt32": "qint32",
    "Untyped": "uint8",
}

_AGAIN = "the file is damaged or unfinished: download or copy it again"
_RESAVE = "load it with torch in a place that you trust, and save its tensors with safetensors.torch.save_file"
_CODE = (
    "a pickle may run any program on the machine that loads it, so reshard reads only tensors in dicts; this file holds other objects, or "
    f"is an attack: {_RESAVE}, or ask for safetensors"
)
_IMPOSTORS: tuple[tuple[bytes, str], ...] = (
    (rb"version https://git-lfs", "this is a git-lfs pointer, not the file itself: run `git lfs pull`, or download the file"),
    (rb".{8}\{", "this seems to be a safetensors file: give it the name .safetensors"),
    (rb"GGUF", "this is a GGUF file; reshard reads safetensors and PyTorch checkpoints"),
    (rb"\x1f\x8b", "this is gzip-compressed: unpack it first"),
    (rb"\s*<", "this is an HTML or XML page, such as a server's error or login page: look into it, then download the file again"),
    (rb"\0{8}", "the file begins with zeros, as a download that was never finished does: download it again"),
)


# --- what a pickle may hold besides None, numbers, text, tuples, lists and dicts ----------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Global:
    """A name that the pickle imports; only ever compared."""

    name: str


@dataclass(frozen=True, slots=True)
class _Storage:
    """A window of a storage, in bytes: it begins at `begin` and has `nbytes`; the whole storage has `whole`."""

    dtype: str  # torch's name
    key: str
    begin: int
    nbytes: int
    whole: int


@dataclass(frozen=True, slots=True)
class _Tensor:
    """A view of a storage; `offset` and `strides` in elements of `dtype`, torch's name."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: str


@dataclass(frozen=True, slots=True)
class _Odd:
    """A tensor that safetensors cannot hold, and why."""

    what: str


_INERT = _Global("an object without content")  # devices, layouts


def _tensor(storage: Any, offset: Any, shape: Any, strides: Any, dtype: str | None = None) -> _Tensor:
    """What torch._utils._rebuild_tensor makes. ValueError for what no writer makes; whether it fits its storage is asked later."""
    if type(storage) is not _Storage:
        raise ValueError(f"a tensor on {_kind(storage)}, not a storage")
    for what, sizes in (("offset", (offset,)), ("shape", shape), ("strides", strides)):
        if type(sizes) is not tuple or len(sizes) > _MOST_DIMENSIONS:
            raise ValueError(f"the {what} of a tensor is {_kind(sizes)}, not a tuple of up to {_MOST_DIMENSIONS} sizes")
        for size in sizes:
            if type(size) is not int or not 0 <= size <= _I63:
                raise ValueError(f"the {what} of a tensor has {_kind(size)}, not a number from 0 to 2**63 - 1")
    if len(shape) != len(strides):
        raise ValueError(f"a tensor of {len(shape)} dimensions has {len(strides)} strides")
    return _Tensor(storage, offset, shape, strides, dtype or storage.dtype)


def _tensor_v2(storage: Any, offset: Any, shape: Any, strides: Any, _grad: Any, _hooks: Any, flags: Any = None) -> _Tensor | _Odd:
    return _flagged(_tensor(storage, offset, shape, strides), flags)


def _tensor_v3(storage: Any, offset: Any, shape: Any, strides: Any, _g: Any, _h: Any, dtype: Any, flags: Any = None) -> _Tensor | _Odd:
    name = GLOBALS.get(dtype.name) if type(dtype) is _Global else None
    if type(name) is not str:
        raise ValueError(f"the dtype of a tensor is {_kind(dtype)}")
    return _flagged(_tensor(storage, offset, shape, strides, name), flags)


def _flagged(tensor: _Tensor, flags: Any) -> _Tensor | _Odd:
    """The flags "conj" and "neg" say that values differ from what is stored."""
    if flags is None or (type(flags) is dict and len(flags) <= _MOST_DIMENSIONS and not any(flags.values())):
        return tensor
    return _Odd("stored as the conjugate or the negative of its values")


def _parameter(data: Any, *_rest: Any) -> Any:
    """A tensor with something more: a gradient flag, hooks, attributes, a device to go to."""
    if type(data) is not _Tensor and type(data) is not _Odd:
        raise ValueError(f"a parameter made of {_kind(data)}, not of a tensor")
    return data


def _from_cpu(data: Any, dtype: Any, _device: Any, _grad: Any) -> Any:
    """A tensor of an XLA device, stored on the CPU; torch casts it when it loads."""
    same = type(data) is _Tensor and type(dtype) is _Global and GLOBALS.get(dtype.name) == data.dtype
    return data if same else _Odd("stored in another dtype than its own")


def _from_type(function: Any, kind: Any, args: Any, _state: Any) -> Any:
    """A tensor with Python attributes."""
    if type(function) is not _Global or function.name not in _DIRECT:
        raise ValueError(f"a tensor rebuilt by {_kind(function)}")
    if type(kind) is not _Global or GLOBALS.get(kind.name) is not _CLASS:
        raise ValueError(f"a tensor of the class {_kind(kind)}")
    return _call(function, args)


def _size(sizes: Any) -> Any:
    if type(sizes) is not tuple:
        raise ValueError(f"a torch.Size of {_kind(sizes)}")
    return sizes


def _ordered(*args: Any) -> dict[Any, Any]:
    """An OrderedDict; Python 2 gave it its items as one argument."""
    found: dict[Any, Any] = {}
    if args:
        (pairs,) = args
        if type(pairs) is not list or any(type(pair) not in (list, tuple) or len(pair) != 2 for pair in pairs):
            raise ValueError(f"an OrderedDict of {_kind(pairs)}, not of pairs")
        _fill(found, [item for pair in pairs for item in pair])
    return found


def _inert(*_args: Any) -> Any:
    return _INERT


def _odd(what: str) -> Callable[..., _Odd]:
    return lambda *_args: _Odd(what)


# Everything that a pickle may name: a storage class (its dtype, in a tuple), a dtype (its name), a tensor class, or what stands for a
# function. The functions above are all that is ever called, and they only sort values.
_CLASS = object()
GLOBALS: dict[str, object] = {
    **{f"{module}.{kind}Storage": (dtype,) for module in ("torch", "torch.cuda") for kind, dtype in _STORAGES.items()},
    **{f"torch.storage.{kind}": ("uint8",) for kind in ("UntypedStorage", "_UntypedStorage")},
    **{f"torch.{dtype}": dtype for dtype in DTYPES},
    **dict.fromkeys(("torch.Tensor", "torch.nn.parameter.Parameter", "torch.nn.parameter.Buffer"), _CLASS),
    **{f"torch.{name}": _INERT for name in ("per_tensor_affine", "per_channel_affine", "per_channel_affine_float_qparams")},
    "collections.OrderedDict": _ordered,
    "torch.Size": _size,
    "torch.device": _inert,
    "torch.serialization._get_layout": _inert,
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor_v2,
    "torch._utils._rebuild_tensor_v3": _tensor_v3,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
    "torch._utils._rebuild_device_tensor_from_cpu_tensor": _from_cpu,
    "torch._tensor._rebuild_from_type_v2": _from_type,
    "torch.tensor._rebuild_from_type_v2": _from_type,
    "torch._utils._rebuild_qtensor": _odd("quantized by torch"),
    "torch._utils._rebuild_sparse_tensor": _odd("sparse"),
    "torch._utils._rebuild_nested_tensor": _odd("nested"),
    "torch._utils._rebuild_meta_tensor_no_storage": _odd("on the meta device, without values"),
}
_DIRECT = {name for name in GLOBALS if name.startswith("torch._utils._rebuild_")}


def _call(function: Any, args: Any) -> Any:
    """What a pickle's call would make; ValueError unless function and arguments are of the kinds that torch writes."""
    known = GLOBALS.get(function.name) if type(function) is _Global else None
    if type(args) is not tuple or not callable(known):
        raise ValueError(f"calls {_kind(function)} with {_kind(args)}")
    try:
        return known(*args)
    except TypeError:  # all types are checked, so it can only be the number of arguments
        raise ValueError(f"calls {function.name} with {len(args)} arguments") from None


def _fill(target: Any, items: list[Any]) -> None:
    """Put keys and values into a dict. Only keys whose hash is quick and cannot be made to collide: no tuples, floats, long integers."""
    if type(target) is not dict or len(items) % 2:
        raise ValueError(f"puts {len(items)} keys and values into {_kind(target)}")
    for at in range(0, len(items), 2):
        key = items[at]
        if not (type(key) in (str, bytes, bool) or key is None or (type(key) is int and -_I63 <= key <= _I63)):
            raise ValueError(f"a dict key is {_kind(key)}, not a name")
        target[key] = items[at + 1]


def _kind(value: Any) -> str:
    """A value for a message; short, and not recursive, whatever it is."""
    if type(value) is _Global:
        return _clip(value.name)
    if value is None or type(value) in (bool, float, int, str, bytes):
        return _clip(hex(value) if type(value) is int and abs(value) > _I63 else repr(value))
    return {_Storage: "a storage", _Tensor: "a tensor", _Odd: "a tensor"}.get(type(value), f"a {type(value).__name__}")


def _clip(text: str) -> str:
    text = text if text.isprintable() else ascii(text)
    return text if len(text) <= 200 else f"{text[:200]}…"


# --- the machine --------------------------------------------------------------------------------------------------------------------------

_CONSTANTS: dict[bytes, Any] = {b"N": None, b"\x88": True, b"\x89": False, b")": ()}
_NUMBERS = {b"K": Struct("<B"), b"M": Struct("<H"), b"J": Struct("<i"), b"G": Struct(">d")}
_TEXT = {b"X": Struct("<I"), b"\x8c": Struct("<B"), b"\x8d": Struct("<Q")}
_BYTES = {b"U": Struct("<B"), b"T": Struct("<I"), b"C": Struct("<B"), b"B": Struct("<I"), b"\x8e": Struct("<Q"), b"\x96": Struct("<Q")}
_LONGS = {b"\x8a": Struct("<B"), b"\x8b": Struct("<I")}
_GETS = {b"h": Struct("<B"), b"j": Struct("<I"), b"g": None}
_PUTS = {b"q": Struct("<B"), b"r": Struct("<I"), b"p": None}
_TUPLES = {b"\x85": 1, b"\x86": 2, b"\x87": 3}
_EXTENSIONS = {b"\x82": Struct("<B"), b"\x83": Struct("<H"), b"\x84": Struct("<I")}
_INSTANCES = {b"o": "OBJ", b"\x81": "NEWOBJ", b"\x92": "NEWOBJ_EX"}
_MISSING = object()


class _Bytes(io.RawIOBase):
    """A stretch of the file as a stream; `crc` is that of the bytes read so far."""

    def __init__(self, pread: Pread, begin: int, end: int, where: str) -> None:
        self.pread, self.at, self.end, self.where = pread, begin, end, where
        self.crc = 0

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.at

    def readinto(self, buffer: Any) -> int:
        data = _exactly(self.pread, max(0, min(len(buffer), self.end - self.at)), self.at, self.where)
        buffer[: len(data)] = data
        self.at += len(data)
        self.crc = zlib.crc32(data, self.crc)
        return len(data)


class _Machine:
    """Reads pickles, one after another, from the bytes `begin` to `end` of a file. `storages`: the first mention of each, by key."""

    def __init__(self, pread: Pread, begin: int, end: int, where: str, hint: str = _AGAIN) -> None:
        self.raw = _Bytes(pread, begin, end, where)
        self.stream = io.BufferedReader(self.raw, 1 << 16)
        self.begin, self.end, self.where, self.hint = begin, end, where, hint
        self.storages: dict[str, _Storage] = {}

    def load(self) -> Any:
        """The next pickle's value. Raises ReshardError for what is damaged, too large, or not of GLOBALS."""
        start = self.stream.tell()
        try:
            return self._run()
        except (IndexError, ValueError) as error:
            what = "takes what is not there" if isinstance(error, IndexError) else _clip(str(error))
            at = self.stream.tell()
            raise ReshardError(f"{self.where}: the pickle at byte {start} makes no sense before byte {at}: {what}", self.hint) from None

    def _run(self) -> Any:
        read, take, number = self.stream.read, self._take, self._number
        stack: list[Any] = []
        below: list[list[Any]] = []  # the stacks that marks set aside
        memo: list[Any] = []
        steps = 0
        while True:
            steps += 1
            if steps > MOST_STEPS:
                hint = f"no checkpoint needs as many: {_RESAVE}"
                raise ReshardError(f"{self.where}: the pickle takes more than {MOST_STEPS} steps; it is refused", hint)
            op = read(1) or take(1)
            if op in _GETS:
                value = memo[self._index(_GETS[op])]
                if value is _MISSING:
                    raise IndexError
                stack.append(value)
            elif op in _PUTS or op == b"\x94":
                index = len(memo) if op == b"\x94" else self._index(_PUTS[op])
                if index > steps + 1000:  # an honest number counts values made so far; an absurd one would reserve memory
                    raise ValueError(f"it keeps value {index} after {steps} steps")
                while len(memo) <= index:
                    memo.append(_MISSING)
                memo[index] = stack[-1]
            elif op in _NUMBERS:
                stack.append(number(_NUMBERS[op]))
            elif op in _TEXT:
                stack.append(str(take(number(_TEXT[op])), "utf-8", "surrogatepass"))
            elif op == b"(":
                below.append(stack)
                stack = []
            elif op == b"t":
                items, stack = stack, below.pop()
                stack.append(tuple(items))
            elif op in _TUPLES:
                count = _TUPLES[op]
                if len(stack) < count:
                    raise IndexError
                stack[-count:] = [tuple(stack[-count:])]
            elif op in _CONSTANTS:
                stack.append(_CONSTANTS[op])
            elif op == b"R":
                args = stack.pop()
                if type(args) is tuple:
                    steps += sum(len(arg) for arg in args if type(arg) in (tuple, list, dict))
                stack.append(_call(stack.pop(), args))
            elif op == b"Q":
                stack.append(self._storage(stack.pop()))
            elif op == b"c":
                stack.append(self._global(self._line(), self._line()))
            elif op == b"\x93":
                name, module = stack.pop(), stack.pop()
                if type(name) is not str or type(module) is not str:
                    raise ValueError(f"imports {_kind(name)} from {_kind(module)}")
                stack.append(self._global(module, name))
            elif op == b"u":
                items, stack = stack, below.pop()
                _fill(stack[-1], items)
            elif op == b"s":
                value, key = stack.pop(), stack.pop()
                _fill(stack[-1], [key, value])
            elif op == b"}":
                stack.append({})
            elif op == b"d":
                items, stack = stack, below.pop()
                stack.append({})
                _fill(stack[-1], items)
            elif op == b"]" or op == b"\x8f":  # a set is read as a list: its items would have to be hashed
                stack.append([])
            elif op == b"l":
                items, stack = stack, below.pop()
                stack.append(items)
            elif op == b"\x91":
                items, stack = stack, below.pop()
                stack.append(tuple(items))
            elif op == b"e" or op == b"\x90":
                items, stack = stack, below.pop()
                if type(stack[-1]) is not list:
                    raise ValueError(f"appends to {_kind(stack[-1])}")
                stack[-1].extend(items)
            elif op == b"a":
                value = stack.pop()
                if type(stack[-1]) is not list:
                    raise ValueError(f"appends to {_kind(stack[-1])}")
                stack[-1].append(value)
            elif op == b"b":  # attributes, such as an OrderedDict's _metadata
                stack.pop()
                if type(stack[-1]) not in (dict, _Tensor, _Odd):
                    self._refuse(f"it sets the state of {_kind(stack[-1])}")
            elif op in _BYTES:
                stack.append(_decoded(take(number(_BYTES[op])), op in b"UT"))
            elif op in _LONGS:
                length = number(_LONGS[op])
                if length > _MOST_INTEGER:
                    raise ValueError(f"an integer of {length} bytes; at most {_MOST_INTEGER} are allowed")
                stack.append(int.from_bytes(take(length), "little", signed=True))
            elif op == b"I" or op == b"L":
                text = self._digits()
                stack.append(text == "01" if op == b"I" and text in ("00", "01") else int(text.removesuffix("L")))
            elif op == b"F":
                stack.append(float(self._digits()))
            elif op == b"S" or op == b"V":
                stack.append(self._line())  # no writer of torch files uses these; escapes stay as they are
            elif op == b"0":
                if stack:
                    stack.pop()
                else:
                    stack = below.pop()
            elif op == b"1":
                stack = below.pop()
            elif op == b"2":
                stack.append(stack[-1])
            elif op == b"\x80":
                protocol = take(1)[0]
                if protocol > 5:
                    raise ValueError(f"pickle protocol {protocol}; at most 5 is known")
            elif op == b"\x95":
                take(8)  # the length of a frame, which only says how much to read at once
            elif op == b".":
                return stack.pop()
            elif op == b"i":
                self._global(self._line(), self._line())
                self._refuse("it makes an instance with the opcode INST")
            elif op in _INSTANCES:
                self._refuse(f"it makes an instance with the opcode {_INSTANCES[op]}")
            elif op in _EXTENSIONS:
                self._refuse(f"it asks for number {number(_EXTENSIONS[op])} of the copyreg extension registry")
            elif op == b"P":
                raise ValueError(f"a storage named {_clip(self._line())} as text")
            else:
                raise ValueError(f"unknown opcode 0x{op.hex()}")

    def _take(self, count: int) -> bytes:
        """The next `count` bytes. What is not there is not asked for: a damaged length must not reserve memory."""
        if count <= 1 << 16:
            data = self.stream.read(count)
            if len(data) == count:
                return data
            count -= len(data)
        at = self.stream.tell()
        if at + count <= self.end:
            return self.stream.read(count)
        if self.end - self.begin == MOST_PICKLE:
            raise ReshardError(f"{self.where}: the pickle at byte {self.begin} has more than {MOST_PICKLE} bytes; it is refused", self.hint)
        message = f"{self.where}: truncated: a pickle ends at byte {self.end}, but needs bytes up to {at + count}"
        raise ReshardError(message, self.hint)

    def _number(self, packing: Struct) -> Any:
        return packing.unpack(self._take(packing.size))[0]

    def _index(self, packing: Struct | None) -> int:
        index: int = self._number(packing) if packing else int(self._digits())
        if index < 0:
            raise ValueError(f"value {index} of the memo")
        return index

    def _line(self) -> str:
        line = self.stream.readline(_MOST_LINE)
        if not line.endswith(b"\n"):
            if len(line) < _MOST_LINE:
                self._take(1)
            raise ValueError(f"a name or number of more than {_MOST_LINE} bytes")
        return line[:-1].decode()

    def _digits(self) -> str:
        text = self._line()
        if len(text) > _MOST_INTEGER:
            raise ValueError(f"a number of {len(text)} digits; at most {_MOST_INTEGER} are allowed")
        return text

    def _global(self, module: str, name: str) -> _Global:
        full = f"{module}.{name}"
        if full not in GLOBALS:
            self._refuse(_clip(full))
        return _Global(full)

    def _refuse(self, what: str) -> None:
        raise ReshardError(f"{self.where}: refuses to run code: {what}", _CODE)

    def _storage(self, pid: Any) -> _Storage:
        """The storage that a persistent id names: ("storage", class, key, device, elements) and, in early versions, a window of it."""
        if type(pid) is not tuple or not 5 <= len(pid) <= 6 or type(pid[0]) is not str or pid[0] != "storage":
            raise ValueError(f"a persistent id is {_kind(pid)}, not one of a storage")
        _, kind, key, _, count, *window = pid
        dtype = GLOBALS.get(kind.name) if type(kind) is _Global else None
        if type(dtype) is not tuple:
            raise ValueError(f"a storage of the class {_kind(kind)}")
        if type(key) is not str or type(count) is not int or not 0 <= count <= _I63:
            raise ValueError(f"storage {_kind(key)} has {_kind(count)} elements")
        item = DTYPES[dtype[0]][1]
        storage = _Storage(dtype[0], key, 0, count * item, count * item)
        self.storages.setdefault(key, storage)
        if not window or window[0] is None:
            return storage
        if type(window[0]) is not tuple or len(window[0]) != 3:
            raise ValueError(f"the window of a storage is {_kind(window[0])}")
        _, offset, length = window[0]
        if type(offset) is not int or type(length) is not int or not 0 <= offset <= offset + length <= count:
            raise ValueError(f"a window of {_kind(length)} elements at {_kind(offset)} in a storage of {count}")
        return _Storage(dtype[0], key, offset * item, length * item, count * item)


def _decoded(data: bytes, text: bool) -> str | bytes:
    """Python 2 wrote text as bytes."""
    try:
        return data.decode() if text else data
    except UnicodeDecodeError:
        return data


def _exactly(pread: Pread, count: int, offset: int, where: str) -> bytes:
    data = pread(count, offset)
    if len(data) < count:
        message = f"{where}: truncated: the file ends at byte {offset + len(data)}, bytes up to {offset + count} were expected"
        raise ReshardError(message, _AGAIN)
    return data


# --- the file -----------------------------------------------------------------------------------------------------------------------------


def read(pread: Pread, size: int, where: str) -> dict[str, Entry]:
    """The tensors of a file of `size` bytes that messages call `where`, in the order of its state dict.

    A state dict maps names to tensors; other values are ignored. Where training scripts wrap it, one of `state_dict`, `model`, `module`
    holds it. Besides pickle and directory, reads some 40 bytes per storage. Raises ReshardError for a file that is damaged or truncated,
    holds more than plain tensors, or asks for code to be run; what `pread` raises passes through.
    """
    head = _exactly(pread, min(size, 512), 0, where)
    if head.startswith(b"PK"):
        return _Zip(pread, size, where).read()
    if head[257:262] == b"ustar":
        raise ReshardError(f"{where}: a tar archive, as the first versions of torch wrote; this format is not read", _RESAVE)
    if not head:
        raise ReshardError(f"{where}: the file holds 0 bytes; a file of torch.save has at least 100", _AGAIN)
    hint = next((hint for start, hint in _IMPOSTORS if re.match(start, head, re.DOTALL)), _AGAIN)
    return _legacy(pread, size, where, hint)


def _legacy(pread: Pread, size: int, where: str, hint: str) -> dict[str, Entry]:
    """torch < 1.6. Storages are little-endian whatever the machine: torch swaps the bytes on the others."""
    machine = _Machine(pread, 0, min(size, MOST_PICKLE), where, hint)
    for what, expected in (("magic number", _MAGIC), ("protocol version", _PROTOCOL)):
        found = machine.load()
        if type(found) is not int or found != expected:
            raise ReshardError(f"{where}: not a file of torch.save: its {what} is {_kind(found)}, not {expected:#x}", _RESAVE)
    machine.load()
    top = machine.load()
    storages, machine.storages = machine.storages, {}
    keys = machine.load()
    at = machine.stream.tell()
    if type(keys) is not list or not all(type(key) is str and key in storages for key in keys) or len(set(keys)) != len(keys):
        raise ReshardError(f"{where}: the list of storages before byte {at} does not name those of its tensors", _AGAIN)
    needed = at + sum(8 + storages[key].whole for key in keys)
    if needed > size:
        raise ReshardError(f"{where}: truncated: the file holds {size} bytes, its tensors end at byte {needed}", _AGAIN)
    places: dict[str, tuple[int, int]] = {}
    for key in keys:
        count = int.from_bytes(_exactly(pread, 8, at, where), "little", signed=True)
        whole, item = storages[key].whole, DTYPES[storages[key].dtype][1]
        if count * item != whole:
            message = f"{where}: storage {_clip(key)} at byte {at} has {count} elements, the pickle says {whole // item}"
            raise ReshardError(message, _AGAIN)
        places[key] = (at + 8, whole)
        at += 8 + whole
    return _entries(_state(top, where), places.get, where)


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
                raise self._damaged(f"{_clip(name)} stands twice in its directory")
            self.records[name] = record
        roots = [name for name in self.records if name.endswith("/data.pkl") and name.count("/") == 1]
        if any(name.endswith("/constants.pkl") and name.count("/") == 1 for name in self.records):
            raise ReshardError(
                f"{self.where}: a TorchScript archive, which holds a program", f"{_RESAVE}: torch.jit.load(...).state_dict()"
            )
        if len(roots) != 1:
            message = f"{self.where}: a zip archive with {len(roots)} entries NAME/data.pkl; torch.save writes one"
            raise ReshardError(message, _RESAVE if roots else "this is not a file of torch.save: unpack it, and give its contents")
        self.folder = roots[0].removesuffix("data.pkl")
        if f"{self.folder}byteorder" in self.records:
            begin, count = self._place(f"{self.folder}byteorder")
            order = _exactly(self.pread, min(count, 16), begin, self.where)
            if order != b"little":
                message = f"{self.where}: its byte order is {_kind(order)}; only b'little' is read"
                raise ReshardError(message, "load it with torch and save it again on a little-endian machine")
        begin, count = self._place(roots[0])
        if count > MOST_PICKLE:
            raise ReshardError(f"{self.where}: {_clip(roots[0])} has {count} bytes; at most {MOST_PICKLE} are read", _RESAVE)
        machine = _Machine(self.pread, begin, begin + count, self.where)
        top = machine.load()
        while machine.stream.read(1 << 16):
            pass
        crc = self.records[roots[0]].crc
        if crc not in (0, machine.raw.crc):  # 0: torch.serialization.set_crc32_options(False)
            raise self._damaged(f"{_clip(roots[0])} has the CRC {machine.raw.crc:#010x}, its directory says {crc:#010x}")
        return _entries(_state(top, self.where), self._storage, self.where)

    def _damaged(self, what: str) -> ReshardError:
        return ReshardError(f"{self.where}: damaged zip archive: {what}", _AGAIN)

    def _exactly(self, packing: Struct, offset: int, magic: bytes, what: str) -> tuple[Any, ...]:
        """The fields of the structure at `offset`, after its magic number."""
        if offset < 0 or offset + packing.size > self.size:
            raise self._damaged(f"{what} lies at byte {offset}, the file holds {self.size} bytes")
        first, *fields = packing.unpack(_exactly(self.pread, packing.size, offset, self.where))
        if first != magic:
            raise self._damaged(f"{what} at byte {offset} begins with {first!r}, not with {magic!r}")
        return tuple(fields)

    def _directory(self) -> Iterator[tuple[str, _Record]]:
        """The entries of the central directory, which must fill the place between the contents and the end record."""
        start = max(0, self.size - 0xFFFF - _END.size - _LOCATOR.size)
        tail = _exactly(self.pread, self.size - start, start, self.where)
        at = len(tail)
        while True:
            at = tail.rfind(b"PK\5\6", 0, at)
            if at < 0:
                raise self._truncated()
            if len(tail) - at >= _END.size and at + _END.size + int.from_bytes(tail[at + 20 : at + 22], "little") == len(tail):
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
            raise ReshardError(f"{self.where}: the zip directory has {length} bytes; at most {MOST_DIRECTORY} are read", _RESAVE)
        self.directory = begin
        raw = _exactly(self.pread, length, begin, self.where)
        at = found = 0
        while at < length:
            if length - at < _ENTRY.size:
                raise self._damaged(f"its directory ends within an entry at byte {begin + at}")
            sign, _, _, flags, method, _, _, crc, packed, nbytes, named, extra, comment, _, _, _, offset = _ENTRY.unpack_from(raw, at)
            more = at + _ENTRY.size + named
            after = more + extra + comment
            if sign != b"PK\1\2" or after > length:
                raise self._damaged(f"its directory has no entry at byte {begin + at}")
            name = raw[at + _ENTRY.size : more].decode("utf-8", "surrogateescape")
            nbytes, packed, offset = self._wide(raw[more : more + extra], (nbytes, packed, offset), name)
            if method or flags & 1 or packed != nbytes:
                message = f"{self.where}: {_clip(name)} is compressed or encrypted in the zip archive ({packed} bytes for {nbytes})"
                raise ReshardError(message, f"torch.save stores without compression; something packed the file anew: {_RESAVE}")
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
            kind, length = int.from_bytes(extra[at : at + 2], "little"), int.from_bytes(extra[at + 2 : at + 4], "little")
            if kind == 1:
                wide = extra[at + 4 : at + 4 + length]
                break
            at += 4 + length
        if len(wide) < 8 * values.count(0xFFFFFFFF):
            raise self._damaged(f"{_clip(name)} says that its size is in a zip64 field, which has {len(wide)} bytes")
        words = iter(wide[i : i + 8] for i in range(0, len(wide), 8))
        return [int.from_bytes(next(words), "little") if value == 0xFFFFFFFF else value for value in values]

    def _place(self, name: str) -> tuple[int, int]:
        """Offset and size of an entry's contents. The local header decides: its padding aligns them, the directory does not tell of it."""
        record = self.records[name]
        raw = name.encode("utf-8", "surrogateescape")
        if record.header + _LOCAL.size + len(raw) > self.directory:
            raise self._damaged(f"{_clip(name)} lies at byte {record.header}, the directory begins at byte {self.directory}")
        data = _exactly(self.pread, _LOCAL.size + len(raw), record.header, self.where)
        sign, _, flags, method, _, _, _, _, _, named, extra = _LOCAL.unpack_from(data)
        if sign != b"PK\3\4" or method or flags & 1 or named != len(raw) or data[_LOCAL.size :] != raw:
            raise self._damaged(f"the header at byte {record.header} is not that of {_clip(name)}")
        begin = record.header + _LOCAL.size + named + extra
        if begin + record.nbytes > self.directory:
            message = f"{_clip(name)} has {record.nbytes} bytes from byte {begin} on, the directory begins at byte {self.directory}"
            raise self._damaged(message)
        return begin, record.nbytes

    def _storage(self, key: str) -> tuple[int, int] | None:
        if key not in self.places:
            name = f"{self.folder}data/{key}"
            self.places[key] = self._place(name) if name in self.records else None
        return self.places[key]

    def _truncated(self) -> ReshardError:
        """A download that broke off: torch writes the pickle first, and it tells how much must follow."""
        message = f"{self.where}: truncated: no zip directory at the end of the file, which holds {self.size} bytes"
        head = _exactly(self.pread, min(self.size, _LOCAL.size), 0, self.where)
        if len(head) == _LOCAL.size:
            *_, named, extra = _LOCAL.unpack(head)
            begin = _LOCAL.size + named + extra
            try:
                machine = _Machine(self.pread, begin, min(self.size, begin + MOST_PICKLE), self.where)
                machine.load()
                needed = machine.stream.tell() + sum(storage.whole for storage in machine.storages.values())
                message += f"; its tensors need more than {needed}"
            except ReshardError:
                pass  # broken off within the pickle, or not written by torch
        return ReshardError(message, _AGAIN)


# --- from values to entries ---------------------------------------------------------------------------------------------------------------


def _state(top: Any, where: str) -> dict[str, _Tensor | _Odd]:
    """The state dict in a file's object."""
    if type(top) is not dict:
        raise ReshardError(f"{where}: holds {_kind(top)}, not a dict of names and tensors", f"save `model.state_dict()`: {_RESAVE}")
    chosen, inside = top, ""
    if not any(_is_tensor(value) for value in top.values()):
        found = [key for key in _WRAPPERS if type(top.get(key)) is dict and any(_is_tensor(value) for value in top[key].values())]
        if len(found) > 1:
            raise ReshardError(f"{where}: holds {len(found)} state dicts: {', '.join(found)}", f"keep one of them: {_RESAVE}")
        if found:
            chosen, inside = top[found[0]], f" in {found[0]}"
    state: dict[str, _Tensor | _Odd] = {}
    seen: set[int] = set()
    for name, value in chosen.items():
        if type(name) is str and isinstance(value, (_Tensor, _Odd)):
            state[name] = value
        elif _holds_tensor(value, seen):
            what = _kind(value) if _is_tensor(value) else f"{_kind(value)} with tensors in it"
            message = f"{where}: {_kind(name)}{inside} is {what}; a state dict maps names to tensors"
            raise ReshardError(message, f"give the state dict alone: {_RESAVE}")
    return state


def _is_tensor(value: Any) -> bool:
    return type(value) in (_Tensor, _Odd, _Storage)


def _holds_tensor(value: Any, seen: set[int]) -> bool:
    """Whether there is a tensor at any depth. Each list or dict is looked into once, as a pickle can nest them a billionfold."""
    todo = [value]
    while todo:
        item = todo.pop()
        if _is_tensor(item):
            return True
        if type(item) in (dict, list, tuple) and id(item) not in seen:
            seen.add(id(item))
            todo.extend(item.values() if type(item) is dict else item)
    return False


def _entries(state: dict[str, _Tensor | _Odd], place: Callable[[str], tuple[int, int] | None], where: str) -> dict[str, Entry]:
    """Where each tensor lies, given offset and size of a storage. Raises ReshardError unless each lies within its storage."""
    shared: dict[tuple[int, ...], tuple[int, ...]] = {}  # thousands of tensors, a dozen shapes
    entries: dict[str, Entry] = {}
    for name, tensor in state.items():
        try:
            if isinstance(tensor, _Odd):
                raise _Unfit(f"is {tensor.what}; safetensors, and so reshard, has no place for that")
            entries[name] = _entry(tensor, place, shared)
        except ValueError as error:
            hint = _RESAVE if isinstance(error, _Unfit) else _AGAIN
            raise ReshardError(f"{where}: tensor {_kind(name)} {error}", hint) from None
    return entries


class _Unfit(ValueError):
    """A tensor in order, but of a kind that safetensors does not have."""


def _entry(tensor: _Tensor, place: Callable[[str], tuple[int, int] | None], shared: dict[tuple[int, ...], tuple[int, ...]]) -> Entry:
    storage, shape, strides = tensor.storage, tensor.shape, tensor.strides
    kind, item = DTYPES[tensor.dtype]
    if kind is None:
        raise _Unfit(f"has the dtype {tensor.dtype}, which safetensors does not have")
    found = place(storage.key)
    if found is None:
        raise ValueError(f"lies in storage {_clip(storage.key)}, which the file does not hold")
    begin, held = found
    if storage.whole > held:
        raise ValueError(f"lies in storage {_clip(storage.key)}, which holds {held} bytes; the pickle says {storage.whole}")
    nbytes = math.prod(shape) * item
    if nbytes > _I63:
        raise ValueError(f"of shape {_clip(str(shape))} has {nbytes:#x} bytes, more than 2**63 - 1")
    begin += storage.begin
    if nbytes:
        last = tensor.offset + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
        if (last + 1) * item > storage.nbytes:
            raise ValueError(f"needs {(last + 1) * item} bytes of storage {_clip(storage.key)}, which has {storage.nbytes}")
        begin += tensor.offset * item
    rows = _row_major(shape, strides)
    if kind == "F4":
        if not shape or not rows:
            raise _Unfit(f"has two numbers to a byte ({tensor.dtype}), and does not lie row by row")
        shape = (*shape[:-1], shape[-1] * 2)
    return Entry(kind, shared.setdefault(shape, shape), begin, nbytes, None if rows else shared.setdefault(strides, strides))


def _row_major(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    """Whether the elements lie one after another, last index fastest. The stride of an axis of size 1 says nothing."""
    expected = 1
    for size, stride in zip(reversed(shape), reversed(strides), strict=True):
        if size > 1 and stride != expected:
            return 0 in shape
        expected *= size
    return True
