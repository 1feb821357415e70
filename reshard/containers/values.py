"""Values of stored elements, as numpy has them. Knows nothing about where elements lie."""

from functools import cache
from typing import Any

import numpy as np

from .dtypes import DTYPES

Array = np.ndarray[Any, np.dtype[Any]]


def floating(dtype: str) -> bool:
    """Whether differences of decoded values mean anything: floating-point numbers of whole bytes."""
    row = DTYPES[dtype]
    return row.floating is not None and row.bits % 8 == 0


def decode(dtype: str, data: "bytes | bytearray | memoryview | Array") -> Array | None:
    """The values of little-endian elements: float64 for floating dtypes; None for elements smaller than a byte."""
    row = DTYPES[dtype]
    found: Array
    if row.code:
        found = np.frombuffer(data, f"<{row.code}")
    elif row.floating is None or row.bits % 8:
        return None
    elif row.floating.nans is None:  # as in IEEE 754: the upper bits of a longer number with the same exponent
        longer = next(
            other
            for other in DTYPES.values()
            if other.code and other.floating and other.floating.exponent == row.floating.exponent
        )
        bits = np.frombuffer(data, f"<u{row.bits // 8}").astype(f"<u{longer.bits // 8}") << (longer.bits - row.bits)
        found = bits.view(f"<{longer.code}")
    else:
        found = _codes(dtype)[np.frombuffer(data, f"<u{row.bits // 8}")]
    with np.errstate(invalid="ignore"):  # a NaN that signals
        return found.astype(np.float64) if row.floating else found


@cache
def _codes(dtype: str) -> Array:
    """What each code of a type without infinities is worth."""
    row = DTYPES[dtype]
    assert row.floating is not None
    wide, mantissa, bias, nans = row.floating
    codes: Array = np.arange(1 << row.bits)
    exponent, fraction = codes >> mantissa & (1 << wide) - 1, (codes & (1 << mantissa) - 1) / (1 << mantissa)
    normal = (1 + fraction) * np.exp2(exponent - float(bias))
    subnormal = fraction * np.exp2(1.0 - bias)
    worth: Array = np.where(exponent > 0, normal, subnormal) if mantissa else normal
    if wide + mantissa < row.bits:
        worth = np.where(codes >> row.bits - 1, -worth, worth)
    worth[list(nans or ())] = np.nan
    return worth
