"""JSON and TOML that somebody else wrote: read within limits, and checked to be of a type before anything uses it.

A type is msgspec's: a Struct, whose unknown keys are ignored unless it forbids them, or a list, dict or union of some.
What is not of it is reported with its JSON path and value: `$.ranks[3].weights.size is -5, expected int >= 0`.
"""

import json
import os
import re
import reprlib
import stat
import tomllib
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import msgspec

from ..errors import ReshardError, failed
from . import limits

Kind = type[ReshardError]
Size = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]  # of a file, in bytes, or a place in it


def about(text: str) -> msgspec.Meta:
    """What a field is, for the JSON Schema."""
    return msgspec.Meta(description=text)


_DAMAGED = "it is damaged, or a download page: fetch it again"
# As Python reads a dotted key in TOML, in time that grows with the square or the cube of its parts.
_LONG_KEY = re.compile(rf"""(?:\.[ \t]*+(?:[A-Za-z0-9_-]++|"[^"\n]*+"|'[^'\n]*+')[ \t]*+){{{limits.KEY_PARTS}}}""")


def read(path: Path, most: int, kind: Kind = ReshardError, hint: str | None = None) -> bytes:
    """All of a regular file of at most `most` bytes. `kind` is raised, with the hint, for one that is larger or is not
    there.
    """
    try:
        # not to wait for the other end of a pipe
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        raise kind(f"{path}: no such file", hint) from None
    except OSError as error:
        raise failed("reading", path, error) from error
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise kind(f"{path}: is not a regular file", hint)
        fits(status.st_size, most, str(path), kind, hint)
        with open(descriptor, "rb", closefd=False) as file:
            found = file.read(most + 1)
    except OSError as error:
        raise failed("reading", path, error) from error
    finally:
        os.close(descriptor)
    fits(len(found), most, str(path), kind, hint)
    return found


def fits(size: int, most: int, where: str, kind: Kind = ReshardError, hint: str | None = None) -> None:
    """Raises `kind` for what is too large to be read whole."""
    if size > most:
        raise kind(
            f"{where}: has {size} bytes, at most {most} are read",
            hint or "no checkpoint needs as many: where is it from?",
        )


def json_file(path: Path, most: int, form: Any = Any, kind: Kind = ReshardError, hint: str | None = None) -> Any:
    """The value of a JSON file of at most `most` bytes."""
    return json_of(read(path, most, kind, hint), most, str(path), form, kind, hint)


def json_of(
    text: bytes,
    most: int,
    where: str,
    form: Any = Any,
    kind: Kind = ReshardError,
    hint: str | None = None,
    keys: int = limits.KEYS,
) -> Any:
    """The value of a JSON text. Raises `kind` where it is none, too large, nested too deeply, or not of a type."""
    fits(len(text), most, where, kind, hint)
    check_content(text, where, keys, kind, hint)
    if form is not Any:
        with suppress(ValueError, RecursionError):  # what is wrong is found out below, at leisure
            return msgspec.json.decode(text, type=form)
    try:
        value = json.loads(text)
    except RecursionError:
        raise kind(
            f"{where}: unsupported JSON: nested more than {limits.DEPTH} levels deep", hint or _DAMAGED
        ) from None
    except ValueError as error:
        raise kind(f"{where}: not JSON: {str(error).partition(';')[0]}", hint or _DAMAGED) from None
    if _count(text, "[{") > limits.DEPTH:
        _shallow(value, where, kind, hint)
    if form is not Any:
        typed(value, form, where, kind, hint)
        raise kind(
            f"{where}: unsupported JSON: it has text that is not valid Unicode, or numbers like NaN",
            hint or _DAMAGED,
        )
    return value


def check_content(text: bytes | str, where: str, keys: int, kind: Kind = ReshardError, hint: str | None = None) -> None:
    """Raises `kind` for JSON that would take much more memory than it has bytes. Counts what is in strings, too."""
    for marks, most, what in ((":", keys, "colons"), (",[{", limits.VALUES, "commas and opening brackets")):
        if len(text) > most and (count := _count(text, marks)) > most:
            raise kind(f"{where}: has {count} {what}, at most {most} are read", hint)


def _count(text: bytes | str, marks: str) -> int:
    return sum(text.count(mark) if isinstance(text, str) else text.count(mark.encode()) for mark in marks)


def toml_of(text: str, where: str) -> dict[str, Any]:
    """A table's TOML as data. Raises ReshardError where it is none, too large, or nested too deeply."""
    fits(len(text.encode(errors="replace")), limits.TABLE, where)
    if _LONG_KEY.search(text):
        raise ReshardError(f"{where}: a dotted key or name has more than {limits.KEY_PARTS} parts")
    try:
        data = tomllib.loads(text)
    except RecursionError:
        raise ReshardError(f"{where}: nested more than {limits.DEPTH} levels deep") from None
    except ValueError as error:  # a TOMLDecodeError, or a number of thousands of digits
        raise ReshardError(f"{where}: not TOML: {str(error).partition(';')[0]}") from None
    _shallow(data, where, ReshardError, None)
    return data


def _shallow(value: Any, where: str, kind: Kind, hint: str | None) -> None:
    level, depth = [value], 0
    while level:
        depth += 1
        if depth > limits.DEPTH:
            raise kind(f"{where}: nested more than {limits.DEPTH} levels deep", hint)
        inside = (each.values() if isinstance(each, dict) else each for each in level if isinstance(each, dict | list))
        level = [each for values in inside for each in values if isinstance(each, dict | list)]


def typed(
    value: Any, form: Any, where: str, kind: Kind = ReshardError, hint: str | None = None, path: str = "$"
) -> Any:
    """A value of a type, from JSON or TOML data. Raises `kind` with the path of the first thing that is not of it."""
    try:
        return msgspec.convert(value, form)
    except msgspec.ValidationError as error:
        raise kind(f"{where}: {_words(str(error), value, form, path)}", hint) from None
    except UnicodeEncodeError:
        raise kind(f"{where}: has a key that is not valid Unicode", hint) from None


def _words(error: str, value: Any, form: Any, path: str) -> str:
    """What msgspec says, with the value and the key that it leaves out (`$.tied[...]`). `path`: what `$` is called."""
    said, _, at = error.partition(" - at `$")
    found = value
    for key, index in re.findall(r"\.(\w+)|\[([0-9]+|\.\.\.)\]", at):
        number = limits.numeral(index)
        step = number if number is not None else key or _refused(error, value, found, form)
        path += f"[{step}]" if isinstance(step, int) else f".{step}" if path else step
        found = found[step]
    if name := re.fullmatch("Object missing required field `(.*)`", said):
        return f"{path}.{name[1]} is missing".removeprefix(".")
    if name := re.fullmatch("Object contains unknown field `(.*)`", said):
        return f"unknown key {name[1]}" + (f" in {path}" if path else "")
    return f"{path} is {reprlib.repr(found)}, {said[0].lower()}{said[1:].replace('`', '')}"


def _refused(error: str, whole: Any, part: dict[str, Any], form: Any) -> str:
    """The key of the first entry of `part`, an object in `whole`, that alone makes the same error."""
    entries = dict(part)
    try:
        for key, value in entries.items():
            part.clear()
            part[key] = value
            try:
                msgspec.convert(whole, form)
            except ValueError as other:
                if str(other) == error:
                    return key
    finally:
        part.clear()
        part.update(entries)
    return "..."
