"""A machine that runs the stack operations of a pickle, which may call any function, but has nothing to call.

No import, no attribute, no foreign object is within its reach, and a name that is not one of GLOBALS ends the reading.
Python's own Unpickler would do less well with `find_class` overridden: it hashes hostile dict keys, and reserves
whatever memory a damaged length asks for. pickletools.genops decodes opcodes too, with every argument at once: reading
100,000 tensors takes half as long again, and lengths are not limited. Knows nothing about files of torch.
"""

import io
import zlib
from struct import Struct
from typing import Any

from ..errors import ReshardError
from ..text.escapes import clip
from .dtypes import BY_TORCH
from .reading import AGAIN, Pread, exactly
from .torch_values import (
    CODE,
    GLOBALS,
    I63,
    MOST_INTEGER,
    MOST_LINE,
    MOST_PICKLE,
    MOST_STEPS,
    RESAVE,
    Global,
    Odd,
    Storage,
    Tensor,
    call,
    fill,
    kind,
)

_CONSTANTS: dict[bytes, Any] = {b"N": None, b"\x88": True, b"\x89": False, b")": ()}
_NUMBERS = {b"K": Struct("<B"), b"M": Struct("<H"), b"J": Struct("<i"), b"G": Struct(">d")}
_TEXT = {b"X": Struct("<I"), b"\x8c": Struct("<B"), b"\x8d": Struct("<Q")}
_BYTES = {
    b"U": Struct("<B"),
    b"T": Struct("<I"),
    b"C": Struct("<B"),
    b"B": Struct("<I"),
    b"\x8e": Struct("<Q"),
    b"\x96": Struct("<Q"),
}
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
        data = exactly(self.pread, max(0, min(len(buffer), self.end - self.at)), self.at, self.where)
        buffer[: len(data)] = data
        self.at += len(data)
        self.crc = zlib.crc32(data, self.crc)
        return len(data)


class Machine:
    """Reads pickles, one after another, from bytes `begin` to `end` of a file. `storages`: first mentions."""

    def __init__(self, pread: Pread, begin: int, end: int, where: str, hint: str = AGAIN) -> None:
        self.raw = _Bytes(pread, begin, end, where)
        self.stream = io.BufferedReader(self.raw, 1 << 16)
        self.begin, self.end, self.where, self.hint = begin, end, where, hint
        self.storages: dict[str, Storage] = {}

    def load(self) -> Any:
        """The next pickle's value. Raises ReshardError for what is damaged, too large, or not of GLOBALS."""
        start = self.stream.tell()
        try:
            return self._run()
        except (IndexError, ValueError) as error:
            what = "takes what is not there" if isinstance(error, IndexError) else clip(str(error))
            at = self.stream.tell()
            raise ReshardError(
                f"{self.where}: the pickle at byte {start} makes no sense before byte {at}: {what}", self.hint
            ) from None

    def _run(self) -> Any:
        read, take, number = self.stream.read, self._take, self._number
        stack: list[Any] = []
        below: list[list[Any]] = []  # the stacks that marks set aside
        memo: list[Any] = []
        steps = 0
        while True:
            steps += 1
            if steps > MOST_STEPS:
                hint = f"no checkpoint needs as many: {RESAVE}"
                raise ReshardError(f"{self.where}: the pickle takes more than {MOST_STEPS} steps; it is refused", hint)
            op = read(1) or take(1)
            if op in _GETS:
                value = memo[self._index(_GETS[op])]
                if value is _MISSING:
                    raise IndexError
                stack.append(value)
            elif op in _PUTS or op == b"\x94":
                index = len(memo) if op == b"\x94" else self._index(_PUTS[op])
                if index > steps + 1000:  # an honest number counts values made; an absurd one would reserve memory
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
                stack.append(call(stack.pop(), args))
            elif op == b"Q":
                stack.append(self._storage(stack.pop()))
            elif op == b"c":
                stack.append(self._global(self._line(), self._line()))
            elif op == b"\x93":
                name, module = stack.pop(), stack.pop()
                if type(name) is not str or type(module) is not str:
                    raise ValueError(f"imports {kind(name)} from {kind(module)}")
                stack.append(self._global(module, name))
            elif op == b"u":
                items, stack = stack, below.pop()
                fill(stack[-1], items)
            elif op == b"s":
                value, key = stack.pop(), stack.pop()
                fill(stack[-1], [key, value])
            elif op == b"}":
                stack.append({})
            elif op == b"d":
                items, stack = stack, below.pop()
                stack.append({})
                fill(stack[-1], items)
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
                    raise ValueError(f"appends to {kind(stack[-1])}")
                stack[-1].extend(items)
            elif op == b"a":
                value = stack.pop()
                if type(stack[-1]) is not list:
                    raise ValueError(f"appends to {kind(stack[-1])}")
                stack[-1].append(value)
            elif op == b"b":  # attributes, such as an OrderedDict's _metadata
                stack.pop()
                if type(stack[-1]) not in (dict, Tensor, Odd):
                    self._refuse(f"it sets the state of {kind(stack[-1])}")
            elif op in _BYTES:
                stack.append(_decoded(take(number(_BYTES[op])), op in b"UT"))
            elif op in _LONGS:
                length = number(_LONGS[op])
                if length > MOST_INTEGER:
                    raise ValueError(f"an integer of {length} bytes; at most {MOST_INTEGER} are allowed")
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
                raise ValueError(f"a storage named {clip(self._line())} as text")
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
            raise ReshardError(
                f"{self.where}: the pickle at byte {self.begin} has more than {MOST_PICKLE} bytes; it is refused",
                self.hint,
            )
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
        line = self.stream.readline(MOST_LINE)
        if not line.endswith(b"\n"):
            if len(line) < MOST_LINE:
                self._take(1)
            raise ValueError(f"a name or number of more than {MOST_LINE} bytes")
        return line[:-1].decode()

    def _digits(self) -> str:
        text = self._line()
        if len(text) > MOST_INTEGER:
            raise ValueError(f"a number of {len(text)} digits; at most {MOST_INTEGER} are allowed")
        return text

    def _global(self, module: str, name: str) -> Global:
        full = f"{module}.{name}"
        if full not in GLOBALS:
            self._refuse(clip(full))
        return Global(full)

    def _refuse(self, what: str) -> None:
        raise ReshardError(f"{self.where}: refuses to run code: {what}", CODE)

    def _storage(self, pid: Any) -> Storage:
        """The storage that a persistent id names: ("storage", class, key, device, elements, a window)."""
        if type(pid) is not tuple or not 5 <= len(pid) <= 6 or type(pid[0]) is not str or pid[0] != "storage":
            raise ValueError(f"a persistent id is {kind(pid)}, not one of a storage")
        _, cls, key, _, count, *window = pid
        dtype = GLOBALS.get(cls.name) if type(cls) is Global else None
        if type(dtype) is not tuple:
            raise ValueError(f"a storage of the class {kind(cls)}")
        if type(key) is not str or type(count) is not int or not 0 <= count <= I63:
            raise ValueError(f"storage {kind(key)} has {kind(count)} elements")
        item = BY_TORCH[dtype[0]].itemsize
        storage = Storage(dtype[0], key, 0, count * item, count * item)
        self.storages.setdefault(key, storage)
        if not window or window[0] is None:
            return storage
        if type(window[0]) is not tuple or len(window[0]) != 3:
            raise ValueError(f"the window of a storage is {kind(window[0])}")
        _, offset, length = window[0]
        if type(offset) is not int or type(length) is not int or not 0 <= offset <= offset + length <= count:
            raise ValueError(f"a window of {kind(length)} elements at {kind(offset)} in a storage of {count}")
        return Storage(dtype[0], key, offset * item, length * item, count * item)


def _decoded(data: bytes, text: bool) -> str | bytes:
    """Python 2 wrote text as bytes."""
    try:
        return data.decode() if text else data
    except UnicodeDecodeError:
        return data
