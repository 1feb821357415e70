"""JSON as serde_json reads it, which the safetensors library uses, where Python's `json` accepts something else.

Knows nothing about tensors.
"""

import json
import math
import re
from typing import Any

from ..text.escapes import clip

U64 = 2**64 - 1
_DEPTH = 125  # serde_json stops at 128 levels; an ignored value begins at the third


def loads(raw: bytes, node: Any) -> Any:
    """The JSON as serde_json reads it, with `node` called on each object's pairs. Raises ValueError with a reason.

    Where Python's json is laxer: NaN and Infinity, half surrogate pairs, numbers that no double can hold, -0 as an
    integer. Both refuse a byte-order mark, trailing bytes, control characters in strings, leading zeros.
    """
    text = raw.decode()  # UnicodeDecodeError is a ValueError
    if "\\u" in text:
        # Pairs of backslashes and of surrogates are stepped over; a half that is left stands alone.
        lone = next((match for match in _LONE.finditer(text) if match["lone"]), None)
        if lone is not None:
            raise ValueError(f"half a surrogate pair, {lone['lone']}, at character {lone.start()}")
    # To serde_json -0 is a float, so it is no size. A hook costs time, hence only where the text occurs (it may be part
    # of a name).
    integer = _integer if "-0" in text else None
    try:
        return json.loads(text, object_pairs_hook=node, parse_float=_float, parse_int=integer, parse_constant=_constant)
    except RecursionError:
        raise ValueError("the JSON is nested too deeply") from None


_LONE = re.compile(
    r"\\\\|\\u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}|(?P<lone>\\u[dD][89a-fA-F][0-9a-fA-F]{2})"
)
_DECIMAL = re.compile(r"-?([0-9]+)(?:\.([0-9]+))?(?:[eE]([-+]?)0*([0-9]*))?")


def _constant(literal: str) -> float:
    raise ValueError(f"{literal} is not JSON")


def _integer(literal: str) -> int | float:
    return -0.0 if literal == "-0" else int(literal)


def _float(literal: str) -> float:
    """A number that is not an integer. Only an ignored value may be one, unless it is out of range.

    serde_json reckons the range in its own way (`f64_from_parts`): it drops the digits that a u64 cannot hold, then
    multiplies by a power of ten, so that 1.7976931348623158e308, which rounds to the largest double, is out of range.
    """
    match = _DECIMAL.fullmatch(literal)
    whole, fraction, sign, exponent = match.groups() if match else ("0", None, None, None)
    significand = power = 0
    for at, digit in enumerate(whole):
        if significand * 10 + int(digit) > U64:
            power = len(whole) - at
            break
        significand = significand * 10 + int(digit)
    for digit in fraction or "":
        if significand * 10 + int(digit) > U64:
            break
        significand = significand * 10 + int(digit)
        power -= 1
    if exponent:
        shift = int(exponent) if len(exponent) < 10 else 10**9
        power += -shift if sign == "-" else shift
    if significand and power > 0 and math.isinf(significand * float(f"1e{power}")):
        raise ValueError(f"the number {clip(literal)} is out of range")
    return float(literal)


def check_ignored(key: str, value: Any) -> None:
    """Even what is ignored must not be nested too deeply, nor hold a number out of range (floats are checked)."""
    level, depth = [value], 0
    while level:
        below: list[Any] = []
        deeper = False
        for item in level:
            if type(item) is int:
                if abs(item) > U64:
                    _float(str(item))
            elif isinstance(item, (list, tuple)):
                deeper = True
                if type(item) is list:
                    below += item
                elif type(item) is tuple:
                    below += (inner for _, inner in item)
                else:
                    below.append([])  # what `node` made of an object with a list in it
        depth += deeper
        if depth > _DEPTH:
            raise ValueError(f"{show(key)} is nested more than {_DEPTH} levels deep")
        level = below


def show(value: Any) -> str:
    """A value of the JSON, for a message: short whatever it is."""
    if type(value) is list:
        return f"a list of {len(value)}"
    if isinstance(value, tuple):
        return "an object" if type(value) is tuple else "a tensor's entry"
    return clip(repr(value) if type(value) is str else json.dumps(value))
