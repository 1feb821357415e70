"""Dtypes: one row for each that a file may name, with all that is known of it. Nothing else lists them.

Imports neither numpy nor torch, only says what they call a dtype. Knows nothing about files.
"""

from typing import NamedTuple


class Floating(NamedTuple):
    """A floating-point number in bits: a sign, if one is left over, `exponent` bits, `mantissa` bits.

    `nans`: the codes that are not a number, of a type that has no infinities; None: both as in IEEE 754.
    """

    exponent: int
    mantissa: int
    bias: int
    nans: tuple[int, ...] | None = None


class Dtype(NamedTuple):
    """`name`: as safetensors spells it, if it has one. `bits` of an element. `torch`: there and in config.json.

    `storage`: its storage class in files of torch.save (torch.FloatStorage), which newer dtypes lack. `code`: its
    character in numpy and struct. `together`: so many elements count as one in torch.
    """

    name: str | None
    bits: int
    torch: str | None = None
    storage: str | None = None
    code: str | None = None
    floating: Floating | None = None
    together: int = 1

    @property
    def wide(self) -> bool:
        """Whether models compute in it, and a KV cache keeps it: a floating-point number of 16 bits or more."""
        return self.floating is not None and self.bits >= 16

    @property
    def itemsize(self) -> int:
        """Bytes of what torch counts as an element."""
        return self.bits * self.together // 8


# Those of safetensors stand in the library's order of rising alignment, which is also its order of falling place in a
# file. Sources: `enum Dtype` and `bitsize` in safetensors/src/tensor.rs; torch.storage._new_dtypes and
# _dtype_to_storage_type_map, safetensors.torch._TYPES; OCP 8-bit floating point specification 1.0 (E4M3, E5M2) and OCP
# microscaling formats 1.0 (F4, F6, E8M0); FNUZ types have one NaN, at the code of -0. Tests ask both libraries.
ROWS = (
    Dtype("BOOL", 8, "bool", "Bool", "?"),
    Dtype("F4", 4, "float4_e2m1fn_x2", None, None, Floating(2, 1, 1, ()), together=2),
    Dtype("F6_E2M3", 6, None, None, None, Floating(2, 3, 1, ())),
    Dtype("F6_E3M2", 6, None, None, None, Floating(3, 2, 3, ())),
    Dtype("U8", 8, "uint8", "Byte", "B"),
    Dtype("I8", 8, "int8", "Char", "b"),
    Dtype("F8_E5M2", 8, "float8_e5m2", None, None, Floating(5, 2, 15)),
    Dtype("F8_E4M3", 8, "float8_e4m3fn", None, None, Floating(4, 3, 7, (0x7F, 0xFF))),
    Dtype("F8_E8M0", 8, "float8_e8m0fnu", None, None, Floating(8, 0, 127, (0xFF,))),
    Dtype("F8_E4M3FNUZ", 8, "float8_e4m3fnuz", None, None, Floating(4, 3, 8, (0x80,))),
    Dtype("F8_E5M2FNUZ", 8, "float8_e5m2fnuz", None, None, Floating(5, 2, 16, (0x80,))),
    Dtype("I16", 16, "int16", "Short", "h"),
    Dtype("U16", 16, "uint16", None, "H"),
    Dtype("F16", 16, "float16", "Half", "e", Floating(5, 10, 15)),
    Dtype("BF16", 16, "bfloat16", "BFloat16", None, Floating(8, 7, 127)),
    Dtype("I32", 32, "int32", "Int", "i"),
    Dtype("U32", 32, "uint32", None, "I"),
    Dtype("F32", 32, "float32", "Float", "f", Floating(8, 23, 127)),
    Dtype("C64", 64, "complex64", "ComplexFloat", "F"),
    Dtype("F64", 64, "float64", "Double", "d", Floating(11, 52, 1023)),
    Dtype("I64", 64, "int64", "Long", "q"),
    Dtype("U64", 64, "uint64", None, "Q"),
    Dtype(None, 32, "complex32"),
    Dtype(None, 128, "complex128", "ComplexDouble"),
    Dtype(None, 8, "qint8", "QInt8"),
    Dtype(None, 8, "quint8", "QUInt8"),
    Dtype(None, 8, "quint4x2", "QUInt4x2"),  # bits of a byte that holds several
    Dtype(None, 8, "quint2x4", "QUInt2x4"),
    Dtype(None, 32, "qint32", "QInt32"),
    Dtype(None, 8, "bits1x8"),
    Dtype(None, 8, "bits2x4"),
    Dtype(None, 8, "bits4x2"),
    Dtype(None, 8, "bits8"),
    Dtype(None, 16, "bits16"),
)

DTYPES: dict[str, Dtype] = {row.name: row for row in ROWS if row.name}
BY_TORCH: dict[str, Dtype] = {row.torch: row for row in ROWS if row.torch}
BITS: dict[str, int] = {name: row.bits for name, row in DTYPES.items()}

# Of the scalars that a format table may write; and what a generation may be asked to compute in, as torch spells it.
CONSTANTS = tuple(name for name, row in DTYPES.items() if row.wide and row.bits >= 32)
COMPUTED = tuple(str(row.torch) for row in reversed(ROWS) if row.wide and row.bits <= 32)


def wide(name: str) -> bool:
    """Whether a dtype of safetensors is one that models compute in."""
    return DTYPES[name].wide
