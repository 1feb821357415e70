"""JSON and TOML that somebody else wrote: read within limits, and checked to be of a form before anything looks into it.

A form is data. A type means exactly that type, `object` anything, None null; a range an integer in it; a pattern a text that it matches;
`[form]` a list, `{"": form}` an object of any keys, `{"a": form, "b?": form}` one with the key `a`, perhaps `b`, and others that are
ignored; a tuple any of its forms. What does not fit is told with its JSON path: `$.ranks[3].weights.size`.
"""

import json
import os
import re
import reprlib
import stat
import tomllib
from pathlib import Path
from typing import Any

from ..errors import ReshardError, failed
from . import limits

Form = Any
Kind = type[ReshardError]

_DAMAGED = "it is damaged, or a download page: fetch it again"
# As Python reads a dotted key in TOML, in time that grows with the square or the cube of its parts.
_LONG_KEY = re.compile(rf"""(?:\.[ \t]*+(?:[A-Za-z0-9_-]++|"[^"\n]*+"|'[^'\n]*+')[ \t]*+){{{limits.KEY_PARTS}}}""")


def read(path: Path, most: int, kind: Kind = ReshardError, hint: str | None = None) -> bytes:
    """All of a regular file of at most `most` bytes. `kind` is raised, with the hint, for one that is larger or is not there."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # not to wait for the other end of a pipe
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
        raise kind(f"{where}: has {size} bytes, at most {most} are read", hint or "no checkpoint needs as many: where is it from?")


def json_file(path: Path, most: int, form: Form = object, kind: Kind = ReshardError, hint: str | None = None) -> Any:
    """The value of a JSON file of at most `most` bytes."""
    return json_of(read(path, most, kind, hint), most, str(path), form, kind, hint)


def json_of(
    text: bytes | str,
    most: int,
    where: str,
    form: Form = object,
    kind: Kind = ReshardError,
    hint: str | None = None,
    keys: int = limits.KEYS,
) -> Any:
    """The value of a JSON text. Raises `kind` where it is none, too large, nested too deeply, or not of the form."""
    fits(len(text), most, where, kind, hint)
    check_content(text, where, keys, kind, hint)
    try:
        value = json.loads(text)
    except RecursionError:
        raise kind(f"{where}: not JSON that is read: it is nested more than {limits.DEPTH} levels deep", hint or _DAMAGED) from None
    except ValueError as error:
        raise kind(f"{where}: not JSON: {str(error).partition(';')[0]}", hint or _DAMAGED) from None
    if _count(text, "[{") > limits.DEPTH:
        _shallow(value, where, kind, hint)
    check(value, form, where, kind, hint)
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


def check(value: Any, form: Form, where: str, kind: Kind = ReshardError, hint: str | None = None) -> None:
    """Raises `kind` with the path of the first thing that is not of the form."""
    if (problem := wrong(value, form)) is not None:
        raise kind(f"{where}: {problem}", hint)


def wrong(value: Any, form: Form, path: str = "$") -> str | None:
    """What is not of the form, in words; None if everything is."""
    if isinstance(form, list) and type(value) is list:
        (inner,) = form
        return next((said for at, each in enumerate(value) if (said := wrong(each, inner, f"{path}[{at}]"))), None)
    if isinstance(form, dict) and type(value) is dict:
        for key, inner in form.items():
            name = key.removesuffix("?")
            if not key:
                said = next((said for each, content in value.items() if (said := _entry(each, content, inner, path))), None)
            elif name in value:
                said = wrong(value[name], inner, f"{path}.{name}")
            else:
                said = None if key.endswith("?") else f"{path}.{name} is missing"
            if said:
                return said
        return None
    if isinstance(form, tuple):
        found = [wrong(value, one, path) for one in form]
        deeper = next((said for said in found if said and not said.startswith(f"{path} ")), None)  # the right container, badly filled
        return None if None in found else deeper or f"{path} is {reprlib.repr(value)}, {words(form)} is needed"
    if _simple(value, form):
        return None
    if form is str and type(value) is str:
        return f"{path} is {reprlib.repr(value)}, which is not valid Unicode"
    return f"{path} is {reprlib.repr(value)}, {words(form)} is needed"


def _entry(key: str, value: Any, form: Form, path: str) -> str | None:
    if not _unicode(key):
        return f"{path} has the key {key!a}, which is not valid Unicode"
    return wrong(value, form, f"{path}.{key}")


def _simple(value: Any, form: Form) -> bool:
    if isinstance(form, range):
        return type(value) is int and value in form
    if isinstance(form, re.Pattern):
        return type(value) is str and form.fullmatch(value) is not None
    if form is str:
        return type(value) is str and _unicode(value)
    return form is object or (value is None if form is None else type(value) is form)


def _unicode(text: str) -> bool:
    """Whether a text has no half surrogate pairs, which no file can be written with."""
    return text.isascii() or not any("\ud800" <= character <= "\udfff" for character in text)


def words(form: Form) -> str:
    """A form, for people."""
    if isinstance(form, tuple):
        return " or ".join(map(words, form))
    if isinstance(form, range):
        return f"an integer from {form.start} to {form.stop - 1}"
    if isinstance(form, re.Pattern):
        return f"a text like {form.pattern}"
    if isinstance(form, list):
        return "a list" if form == [object] else f"a list of {words(form[0]).removeprefix('a ').removeprefix('an ')}"
    if isinstance(form, dict):
        return "an object"
    return {str: "a text", int: "an integer", float: "a number", bool: "true or false", None: "null", object: "anything"}[form]
