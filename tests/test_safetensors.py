"""Headers: accepted is what the library accepts, writes byte for byte what it writes, and says what is wrong with
others.
"""

import ctypes
import os
import random
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import safetensors
import safetensors.numpy
from hypothesis import given
from hypothesis import strategies as st
from running import lines_run
from strategies import law

from reshard.containers.dtypes import BITS
from reshard.containers.entry import Entry, Header
from reshard.containers.reading import of_descriptor
from reshard.containers.safetensors import MAX_LENGTH, build, length, library_order, parse, read
from reshard.errors import PlaceError, ReshardError

U8 = '{"dtype":"U8","shape":[4],"data_offsets":[0,4]}'
HUGE = "18446744073709551616"  # 2**64


def entry(dtype: str = '"U8"', shape: str = "[4]", span: str = "[0,4]", more: str = "") -> str:
    return f'{{"dtype":{dtype},"shape":{shape},"data_offsets":{span}{more}}}'


def tensors(*entries: str) -> str:
    return "{" + ",".join(f'"t{at}":{text}' for at, text in enumerate(entries)) + "}"


def extra(value: str) -> str:
    return tensors(entry(more=f',"x":{value}'))


def pack(raw: str | bytes, data: bytes = b"abcd") -> bytes:
    raw = raw if isinstance(raw, bytes) else raw.encode("utf-8", "surrogatepass")
    return len(raw).to_bytes(8, "little") + raw + data


def ours(file: bytes) -> Header | None:
    try:
        return parse(file[8 : 8 + length(file[:8], len(file), "f")], len(file), "f")
    except ReshardError as error:
        assert error.message.startswith("f: ") and error.hint and len(error.message) < 1000
        return None


def theirs(file: bytes) -> dict[str, dict] | None:
    try:
        return dict(safetensors.deserialize(file))
    except safetensors.SafetensorError:
        return None


def agree(file: bytes) -> bool:
    """Whether both accept the file; fails unless they agree on that, and on what it holds."""
    header, library = ours(file), theirs(file)
    assert (header is None) == (library is None), (header, library)
    if header is None or library is None:
        return False
    found = {name: (e.dtype, list(e.shape), file[e.offset : e.offset + e.nbytes]) for name, e in header.entries.items()}
    assert found == {name: (t["dtype"], t["shape"], bytes(t["data"])) for name, t in library.items()}
    assert all(e.strides is None and e.nbytes >= 0 for e in header.entries.values())
    return True


# --- accepted if and only if the library accepts ----------------------------------------------------------------------

ACCEPTED = {
    "plain": tensors(U8),
    "no tensors, but data of none": ("{}", b""),
    "white space everywhere": " \t\r\n{ } \t\r\n",
    "leading white space": f" {tensors(U8)}",
    "trailing white space": f"{tensors(U8)} \n\t\r",
    "a tensor as a list": '{"t":["U8",[4],[0,4]]}',
    "dtype as an object": tensors(entry('{"U8":null}')),
    "list and dtype as an object": '{"t":[{"U8":null},[4],[0,4]]}',
    "keys in another order": '{"t":{"data_offsets":[0,4],"shape":[4],"dtype":"U8"}}',
    "keys with escapes": '{"t":{"\\u0064type":"U\\u0038","shape":[4],"data_offsets":[0,4]}}',
    "equal names": f'{{"t":{U8},"t":{U8}}}',
    "equal names, the first does not fit": f'{{"t":{entry(shape="[9]", span="[7,3]")},"t":{U8}}}',
    "ignored key": extra("1"),
    "ignored key twice": extra('1,"x":[2.5,null,true,{"y":1e3,"y":-0}]'),
    "ignored entry-like value": extra(f"[{U8},{U8}]"),
    "ignored integer of 309 digits": extra("1" * 309),
    "ignored negative integer of 309 digits": extra("-" + "1" * 309),
    "ignored 2**64": extra(HUGE),
    "ignored largest float": extra("1.7976931348623156e308"),
    "ignored tiny float": extra("1e-999999999999"),
    "ignored zero with a huge exponent": extra("0.000e99999999999999"),
    "ignored integer of 400 digits with exponent": extra("1" * 400 + "e-390"),
    "ignored digits beyond 64 bits": extra("0." + "3" * 400 + "e308"),
    "ignored key 125 levels deep": extra("[" * 125 + "]" * 125),
    "ignored objects 125 levels deep": extra('{"":' * 124 + "{}" + "}" * 124),
    "ignored key 125 levels deep with a number": extra("[" * 125 + "1" + "]" * 125),
    "ignored entry-like value at level 124": extra("[" * 123 + U8 + "]" * 123),
    "metadata": f'{{"__metadata__":{{"a":"b","":""}},"t":{U8}}}',
    "metadata last": f'{{"t":{U8},"__metadata__":{{"a":"b"}}}}',
    "metadata null": f'{{"__metadata__":null,"t":{U8}}}',
    "metadata empty": f'{{"__metadata__":{{}},"t":{U8}}}',
    "metadata with equal keys": f'{{"__metadata__":{{"x":"1","x":"2"}},"t":{U8}}}',
    "metadata only": ('{"__metadata__":{"a":"b"}}', b""),
    "metadata with escapes in its name": f'{{"\\u005f_metadata__":{{"x":"1"}},"t":{U8}}}',
    "name of no characters": f'{{"":{U8}}}',
    "name with NUL": f'{{"\\u0000":{U8}}}',
    "name with DEL": f'{{"\x7f":{U8}}}',
    "name with escapes": f'{{"\\"\\\\\\/\\b\\f\\n\\r\\t":{U8}}}',
    "name beyond the basic plane": f'{{"😀":{U8}}}',
    "name with a surrogate pair": f'{{"\\ud83d\\uDE00":{U8}}}',
    "name with two surrogate pairs": f'{{"\\ud83d\\ude00\\uD83D\\ude00":{U8}}}',
    "name with an escaped backslash before u": f'{{"\\\\ud83d":{U8}}}',
    "name with -0": f'{{"layer-0":{U8}}}',
    "not in order of offsets": tensors(entry(shape="[3]", span="[1,4]"), entry(shape="[1]", span="[0,1]")),
    "scalar": tensors(entry('"F32"', "[]")),
    "many dimensions": tensors(entry(shape=f"[{'1,' * 99}4]")),
    "size zero at the start": tensors(entry(shape="[0]", span="[0,0]"), U8),
    "size zero at the end": tensors(U8, entry(shape="[7,0]", span="[4,4]")),
    "size zero before another of the same offset": tensors(U8, entry(shape="[0]", span="[0,0]")),
    "several of size zero": tensors(
        *[entry(shape="[0]", span="[0,0]")] * 3, U8, *[entry(shape="[0]", span="[4,4]")] * 3
    ),
    "zero before an overflow": tensors(U8, entry(shape=f"[0,{2**40},{2**40}]", span="[0,0]")),
    "largest size": tensors(U8, entry(shape=f"[{2**64 - 1},0]", span="[0,0]")),
    "sub-byte, whole bytes": tensors(entry('"F4"', "[8]")),
    "6 bits, whole bytes": (tensors(entry('"F6_E3M2"', "[2,2]", "[0,3]")), b"abc"),
}

REFUSED = {
    "nothing": "",
    "white space only": "    ",
    "one character": "{",
    "closing brace": "}",
    "null": "null",
    "a list": "[]",
    "a list as the struct": "[null,{}]",
    "a string": '"abc"',
    "a number": "4",
    "dtype where tensors should be": U8,
    "truncated JSON": tensors(U8)[:-1],
    "byte-order mark": "\ufeff" + tensors(U8),
    "trailing NUL": tensors(U8) + "\0",
    "trailing garbage": tensors(U8) + "x",
    "two objects": tensors(U8) * 2,
    "no-break space": tensors(U8) + "\u00a0",
    "form feed": tensors(U8) + "\f",
    "trailing comma": f'{{"t":{U8},}}',
    "trailing comma in a list": tensors(entry(shape="[4,]")),
    "single quotes": tensors(U8).replace('"', "'"),
    "comment": tensors(U8) + "/**/",
    "UTF-16": tensors(U8).encode("utf-16-le"),
    "invalid UTF-8": b'{"\xff":' + U8.encode() + b"}",
    "overlong UTF-8": b'{"\xc0\xaf":' + U8.encode() + b"}",
    "raw surrogate": f'{{"\ud800":{U8}}}',
    "leading surrogate alone": f'{{"\\ud800":{U8}}}',
    "leading surrogate before text": f'{{"\\ud800abcdef":{U8}}}',
    "trailing surrogate alone": f'{{"\\uDC00":{U8}}}',
    "leading surrogate twice": f'{{"\\ud83d\\ud83d\\ude00":{U8}}}',
    "surrogates in the wrong order": f'{{"\\ude00\\ud83d":{U8}}}',
    "surrogate in metadata": f'{{"__metadata__":{{"a":"\\ud800"}},"t":{U8}}}',
    "surrogate in an ignored key": extra('"\\ud800"'),
    "raw newline in a name": f'{{"a\nb":{U8}}}',
    "raw NUL in a name": f'{{"a\0b":{U8}}}',
    "unknown escape": f'{{"\\x41":{U8}}}',
    "short escape": f'{{"\\u41":{U8}}}',
    "a tensor that is null": '{"t":null}',
    "a tensor that is a number": '{"t":4}',
    "a tensor that is a string": '{"t":"U8"}',
    "list too long": '{"t":["U8",[4],[0,4],null]}',
    "list too short": '{"t":["U8",[4]]}',
    "dtype unknown": tensors(entry('"U9"')),
    "dtype in lower case": tensors(entry('"u8"')),
    "dtype with a space": tensors(entry('"U8 "')),
    "dtype null": tensors(entry("null")),
    "dtype a number": tensors(entry("4")),
    "dtype a list": tensors(entry('["U8"]')),
    "dtype an empty object": tensors(entry("{}")),
    "dtype an object of two": tensors(entry('{"U8":null,"U8":null}')),
    "dtype an object of an object": tensors(entry('{"U8":{}}')),
    "dtype an unknown object": tensors(entry('{"U9":null}')),
    "dtype twice": '{"t":{"dtype":"U8","dtype":"U8","shape":[4],"data_offsets":[0,4]}}',
    "shape twice": '{"t":{"dtype":"U8","shape":[4],"shape":[4],"data_offsets":[0,4]}}',
    "dtype missing": '{"t":{"shape":[4],"data_offsets":[0,4]}}',
    "shape missing": '{"t":{"dtype":"U8","data_offsets":[0,4]}}',
    "offsets missing": '{"t":{"dtype":"U8","shape":[4]}}',
    "offsets missing, another key instead": '{"t":{"dtype":"U8","shape":[4],"offsets":[0,4]}}',
    "shape null": tensors(entry(shape="null")),
    "shape a number": tensors(entry(shape="4")),
    "shape an object": tensors(entry(shape='{"0":4}')),
    "shape nested": tensors(entry(shape="[[4]]")),
    "size true": (tensors(entry(shape="[true]", span="[0,1]")), b"a"),
    "size true after one": (tensors(entry(shape="[1]", span="[0,1]"), entry(shape="[true]", span="[1,2]")), b"ab"),
    "size a float": tensors(entry(shape="[4.0]")),
    "size a float after an integer": tensors(entry(shape="[2]", span="[0,2]"), entry(shape="[2.0]", span="[2,4]")),
    "size with an exponent": tensors(entry(shape="[4e0]")),
    "size a string": tensors(entry(shape='["4"]')),
    "size null": tensors(entry(shape="[null]")),
    "size with a leading zero": tensors(entry(shape="[04]")),
    "size with a plus sign": tensors(entry(shape="[+4]")),
    "sizes negative": tensors(entry(shape="[-2,-2]")),
    "size -0": (tensors(entry(shape="[-0]", span="[0,0]")), b""),
    "size NaN": tensors(entry(shape="[NaN]")),
    "size Infinity": tensors(entry(shape="[Infinity]")),
    "size 2**64": tensors(U8, entry(shape=f"[{HUGE},0]", span="[0,0]")),
    "size 2**64 after a zero": tensors(U8, entry(shape=f"[0,{HUGE}]", span="[0,0]")),
    "size of 5000 digits": tensors(entry(shape=f"[{'9' * 5000}]")),
    "product overflows before a zero": tensors(U8, entry(shape=f"[{2**40},{2**40},0]", span="[0,0]")),
    "product overflows": tensors(entry(shape=f"[{2**32},{2**32}]")),
    "product wraps to the right size": tensors(entry(shape=f"[{2**62 + 1},4]")),
    "bits overflow": tensors(entry('"F64"', f"[{2**58}]")),
    "sub-byte with half a byte": tensors(entry('"F4"', "[7]")),
    "6 bits, no whole byte": (tensors(entry('"F6_E2M3"', "[5]")), b"abc"),
    "offsets null": tensors(entry(span="null")),
    "one offset": tensors(entry(span="[4]")),
    "three offsets": tensors(entry(span="[0,4,4]")),
    "offsets an object": tensors(entry(span='{"0":0,"1":4}')),
    "offset -0": tensors(entry(span="[-0,4]")),
    "offset negative": tensors(entry(span="[-4,0]")),
    "offset a float": tensors(entry(span="[0,4.0]")),
    "offset false": tensors(entry(span="[false,4]")),
    "offset 2**64": tensors(entry(span=f"[0,{HUGE}]")),
    "offsets that wrap": tensors(entry(span=f"[{2**64 - 4},0]")),
    "offsets swapped": tensors(entry(span="[4,0]")),
    "not from 0": tensors(entry(shape="[3]", span="[1,4]")),
    "a hole": tensors(entry(shape="[1]", span="[0,1]"), entry(shape="[2]", span="[2,4]")),
    "an overlap": tensors(entry(shape="[3]", span="[0,3]"), entry(shape="[2]", span="[2,4]")),
    "the same place twice": tensors(U8, U8),
    "size zero in the middle of another": tensors(U8, entry(shape="[0]", span="[2,2]")),
    "fewer bytes than the shape needs": tensors(entry(shape="[5]")),
    "more bytes than the shape needs": tensors(entry(shape="[3]")),
    "another dtype's bytes": tensors(entry('"F16"')),
    "data too short": (tensors(U8), b"abc"),
    "data too long": (tensors(U8), b"abcde"),
    "data of no tensor": "{}",
    "equal names, the first malformed": f'{{"t":{entry(chr(34) + "U9" + chr(34))},"t":{U8}}}',
    "equal names, the first negative": f'{{"t":{entry(span="[-4,0]")},"t":{U8}}}',
    "equal names, the first ends below 0": f'{{"t":{entry(span="[0,-4]")},"t":{U8}}}',
    "equal names, the first ends at 2**64": f'{{"t":{entry(span=f"[0,{HUGE}]")},"t":{U8}}}',
    "equal names, the last does not fit": f'{{"t":{U8},"t":{entry(shape="[5]")}}}',
    "metadata twice": f'{{"__metadata__":{{}},"__metadata__":{{}},"t":{U8}}}',
    "metadata null, then again": f'{{"__metadata__":null,"__metadata__":{{}},"t":{U8}}}',
    "metadata a list": f'{{"__metadata__":[],"t":{U8}}}',
    "metadata a string": f'{{"__metadata__":"pt","t":{U8}}}',
    "metadata of null": f'{{"__metadata__":{{"a":null}},"t":{U8}}}',
    "metadata of numbers": f'{{"__metadata__":{{"a":1}},"t":{U8}}}',
    "metadata nested": f'{{"__metadata__":{{"a":{{}}}},"t":{U8}}}',
    "metadata of equal keys, the first no string": f'{{"__metadata__":{{"a":1,"a":"b"}},"t":{U8}}}',
    "metadata that is a tensor": f'{{"__metadata__":{U8}}}',
    "ignored NaN": extra("NaN"),
    "ignored -Infinity": extra("-Infinity"),
    "ignored float out of range": extra("1e309"),
    "ignored float that only rounds into range": extra("1.7976931348623158e308"),
    "ignored float of many digits out of range": extra("0.17976931348623158000000000000e309"),
    "ignored float with an absurd exponent": extra("1e99999999999999999999"),
    "ignored integer of 310 digits": extra("1" * 310),
    "ignored negative integer of 310 digits": extra("-" + "1" * 310),
    "ignored integer of 5000 digits": extra("1" * 5000),
    "ignored integer out of range, deep": extra('[[{"y":[' + "1" * 310 + "]}]]"),
    "ignored key 126 levels deep": extra("[" * 126 + "]" * 126),
    "ignored objects 126 levels deep": extra('{"":' * 125 + "{}" + "}" * 125),
    "ignored entry-like value at level 125": extra("[" * 124 + U8 + "]" * 124),
    "ignored key 100,000 levels deep": extra("[" * 100_000 + "]" * 100_000),
    "100,000 brackets": "[" * 100_000,
    "shape 100,000 levels deep": tensors(entry(shape="[" * 100_000 + "]" * 100_000)),
}


@pytest.mark.parametrize("accepted, case", [(True, name) for name in ACCEPTED] + [(False, name) for name in REFUSED])
def test_a_listed_oddity_is_taken_as_the_library_takes_it(accepted: bool, case: str, tmp_path: Path) -> None:
    value = (ACCEPTED if accepted else REFUSED)[case]
    file = (
        pack(*value)
        if isinstance(value, tuple)
        else pack(value, b"" if case.startswith("white space every") else b"abcd")
    )
    assert agree(file) is accepted
    path = tmp_path / "f.safetensors"
    path.write_bytes(file)
    try:
        with safetensors.safe_open(path, framework="numpy") as opened:
            metadata, names = opened.metadata(), set(opened.keys())
    except safetensors.SafetensorError:
        assert not accepted
    else:
        header = ours(file)
        assert accepted and header is not None and header.metadata == (metadata or {}) and set(header.entries) == names


@pytest.mark.parametrize(
    "file",
    [
        b"",
        b"\2\0\0\0\0\0\0",
        b"\0" * 8,
        b"\0" * 100,
        b"\1\0\0\0\0\0\0\0{",
        b"\2\0\0\0\0\0\0\0{}",
        b"\2\0\0\0\0\0\0\0{",
        b"\3\0\0\0\0\0\0\0{}",
        b"\3\0\0\0\0\0\0\0{} ",
        b"\xff" * 8 + b"{}",
        b"\2\0\0\0\0\0\0\x80{}",
    ],
)
def test_a_length_word_is_taken_as_the_library_takes_it(file: bytes) -> None:
    agree(file)


@pytest.mark.parametrize(
    "more, library, message", [(0, "invalid header length", "truncated"), (1, "header too large", "announce")]
)
def test_a_header_may_be_as_long_as_with_the_library_and_no_longer(more: int, library: str, message: str) -> None:
    """On short files: both find the file too short for the longest header allowed, and one more byte too long for any
    file.
    """
    file = (MAX_LENGTH + more).to_bytes(8, "little") + b"{}"
    with pytest.raises(safetensors.SafetensorError, match=library):
        safetensors.deserialize(file)
    with pytest.raises(ReshardError, match=message):
        length(file[:8], len(file), "f")


# Small pieces of JSON, odd ones among them.
NUMBERS = st.sampled_from(
    ["0", "1", "2", "4", "8", "-0", "-1", "4.0", "1e0", "true", "null", '"4"', HUGE, str(2**64 - 1), "NaN", "[]"]
)
IGNORED = st.recursive(
    st.sampled_from(
        [
            "null",
            "1.5",
            "-0",
            "1e400",
            "1e-400",
            "17976931348623158e292",
            '"\\ud800"',
            '"\\ud83d\\ude00"',
            "1" * 310,
            "Infinity",
        ]
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3).map(lambda items: f"[{','.join(items)}]"),
        st.lists(inner, max_size=3).map(
            lambda items: "{" + ",".join(f'"{at % 2}":{item}' for at, item in enumerate(items)) + "}"
        ),
    ),
    max_leaves=4,
)
NAMES = st.one_of(
    st.sampled_from(["a", "b", "", "-0", "dtype", "\\u0061", "\\ud800", "\\\\u", "é"]), st.integers(0, 9).map(str)
)


@st.composite
def headers(draw: st.DrawFn) -> tuple[str, int]:
    """JSON text, and the bytes of data that it speaks of: tensors that follow one another, in most headers with
    something odd.
    """
    calm = draw(st.integers(0, 3))

    def odd() -> bool:
        return calm > 0 and draw(st.integers(0, 8 * calm)) == 0

    parts: list[str] = []
    end = 0
    for _ in range(draw(st.integers(0, 4))):
        dtype = draw(st.sampled_from(sorted(BITS)))
        sizes = [draw(NUMBERS) if odd() else str(draw(st.integers(0, 4))) for _ in range(draw(st.integers(0, 3)))]
        count = 1
        for size in sizes:
            count *= int(size) if size.isdigit() else 1
        if count * BITS[dtype] % 8 and not odd():
            sizes.append("4")
            count *= 4
        begin, end = end, end + min(count * BITS[dtype] // 8, 1000)
        first, last = (draw(NUMBERS) if odd() else str(at) for at in (begin, end))
        kind = (
            draw(st.sampled_from([f'{{"{dtype}":null}}', f'{{"{dtype}":{{}}}}', f'["{dtype}"]', '"F8"', "7"]))
            if odd()
            else f'"{dtype}"'
        )
        fields = {"dtype": kind, "shape": f"[{','.join(sizes)}]", "data_offsets": f"[{first},{last}]"}
        pairs = [f'"{key}":{value}' for key, value in fields.items()]
        form = draw(st.integers(0, 4)) if odd() else 5
        if form == 0:
            pairs = draw(st.permutations(pairs))
        elif form == 1:
            pairs.insert(draw(st.integers(0, 3)), f'"x":{draw(IGNORED)}')
        elif form == 2:
            pairs.append(draw(st.sampled_from(pairs)))
        elif form == 3:
            pairs.pop(draw(st.integers(0, 2)))
        text = f"[{','.join(fields.values())}]" if form == 4 else "{" + ",".join(pairs) + "}"
        parts.append(f'"{draw(NAMES) if odd() else len(parts)}":{text}')
    if draw(st.booleans()):
        metadata = (
            draw(st.sampled_from(['{"a":"b","a":"c"}', "{}", "null", "[]", '{"a":1}', '{"a":null}']))
            if odd()
            else '{"a":"b"}'
        )
        parts.insert(draw(st.integers(0, len(parts))), f'"__metadata__":{metadata}')
    if draw(st.booleans()):
        parts = draw(st.permutations(parts))
    before, after = (
        draw(st.sampled_from([(" ", "\t"), ("\0", ""), ("\ufeff", ""), ("", "\0"), ("", "}")])) if odd() else ("", "  ")
    )
    return before + "{" + ",".join(parts) + "}" + after, end


@given(headers(), st.sampled_from([0] * 18 + [-1, 1]))
@law(1000)
def test_any_header_is_taken_as_the_library_takes_it(header: tuple[str, int], more: int) -> None:
    text, size = header
    agree(pack(text, bytes(at % 251 for at in range(max(0, size + more)))))


@given(st.integers(0, 2**32), st.integers(1, 3))
@law(1000)
def test_a_damaged_file_is_taken_as_the_library_takes_it(seed: int, damages: int) -> None:
    rng = random.Random(seed)
    raw, header = build([("a.weight", "BF16", (2, 3)), ("é\n", "F4", (4,)), ("c", "I64", ())], {"k": "v", "é": '"'})
    file = bytearray(raw + bytes(range(22)))
    for _ in range(damages):
        at = rng.randrange(header.data_start)
        how = rng.randrange(4)
        if how == 0:
            file[at] = rng.randrange(256)
        elif how == 1:
            file[at] = rng.choice(b'0123456789[]{},:" -\\uetrn')
        elif how == 2:
            del file[at]
        else:
            file.insert(at, rng.choice(b'0123456789[]{},:" -\\uetrn'))
    if rng.randrange(4):  # an honest length word again, so that the damage reaches the JSON
        file[:8] = (header.data_start - 8 + len(file) - len(raw) - 22).to_bytes(8, "little")
    agree(bytes(file))


@given(st.integers(0, 10**25), st.none() | st.integers(0, 10**25), st.integers(-3, 3), st.sampled_from(["", "-"]))
@law(500)
def test_the_range_of_an_ignored_number_is_the_librarys(
    whole: int, fraction: int | None, shift: int, sign: str
) -> None:
    """Numbers around the largest double, 1.8e308, with more digits than it can hold."""
    tail = "" if fraction is None else f".{fraction}"
    agree(pack(extra(f"{sign}{whole}{tail}e{309 - len(str(whole)) + shift}")))


@given(st.text(max_size=10), st.dictionaries(st.text(max_size=5), st.text(max_size=5), max_size=1))
@law(300)
def test_names_and_metadata_in_any_script_are_written_as_the_library_writes_them(
    name: str, metadata: dict[str, str]
) -> None:
    if name != "__metadata__":
        assert build([(name, "U8", (1,))], metadata)[0] + b"x" == library([(name, "U8", (1,))], metadata, b"x")


# --- dtypes, order, writing -------------------------------------------------------------------------------------------

SPELLED = {  # how the library's writer calls the dtypes that it can write
    "BOOL": "bool",
    "F4": "float4_e2m1fn_x2",
    "U8": "uint8",
    "I8": "int8",
    "F8_E5M2": "float8_e5m2",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E8M0": "float8_e8m0fnu",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "I16": "int16",
    "U16": "uint16",
    "F16": "float16",
    "BF16": "bfloat16",
    "I32": "int32",
    "U32": "uint32",
    "F32": "float32",
    "C64": "complex64",
    "F64": "float64",
    "I64": "int64",
    "U64": "uint64",
}


def library(stored: list[tuple[str, str, tuple[int, ...]]], metadata: dict[str, str] | None, data: bytes) -> bytes:
    """The file that the library writes for these tensors, each of which holds the first of the bytes of `data`."""
    buffer = ctypes.create_string_buffer(data)
    specs = {}
    for name, dtype, shape in stored:
        size = int(np.prod(shape, dtype=int)) * BITS[dtype] // 8
        held = shape if dtype != "F4" else (*shape[:-1], shape[-1] // 2)
        address = ctypes.addressof(buffer)
        specs[name] = safetensors.TensorSpec(dtype=SPELLED[dtype], shape=list(held), data_ptr=address, data_len=size)
    return bytes(safetensors.serialize(specs, metadata))


def test_every_dtype_of_the_library_is_known_with_its_size_and_no_other() -> None:
    """Its own message names the dtypes; a tensor of 8 elements takes as many bytes as an element has bits,
    and no other number.
    """
    with pytest.raises(safetensors.SafetensorError) as error:
        safetensors.deserialize(pack(tensors(entry('"?"'))))
    assert [name for at, name in enumerate(str(error.value).split("`")) if at % 2][1:] == list(BITS)
    for dtype, bits in BITS.items():
        for size in range(1, 130):
            file = pack(tensors(entry(f'"{dtype}"', "[8]", f"[0,{size}]")), bytes(size))
            assert agree(file) is (size == bits), (dtype, size)


def test_library_order_is_the_order_in_which_the_library_lays_tensors() -> None:
    """Every dtype that it can write, given in shuffled order, with names that sort differently by bytes,
    by length and without case.
    """
    names = ("b", "a", "B", "a.10", "a.2", "é", "\uffff", "😀")
    stored = [(f"{name}-{dtype}", dtype, (2,)) for dtype in SPELLED for name in names]
    random.Random(1).shuffle(stored)
    file = library(stored, None, bytes(16))
    header = ours(file)
    assert header is not None
    assert [name for name, _, _ in library_order(stored)] == list(header.entries)
    assert [e.offset for e in header.entries.values()] == sorted(e.offset for e in header.entries.values())
    assert build(library_order(stored), None)[0] == file[: header.data_start]


def test_library_order_puts_the_6_bit_types_where_the_library_has_them() -> None:
    """Its Python writer has no 6-bit types; its list of dtypes, which is the order, is checked above."""
    stored = [(dtype, dtype, (8,)) for dtype in BITS]
    assert [dtype for _, dtype, _ in library_order(stored)] == list(reversed(BITS))


@pytest.mark.parametrize("metadata", [None, {}, {"format": "pt"}, {"a\n\x01\x7f\u2028é😀": '"\\/'}])
def test_a_header_is_built_as_the_library_writes_it(metadata: dict[str, str] | None) -> None:
    stored = library_order(
        [
            ("model.norm.weight", "BF16", (4,)),
            ("scalar", "F32", ()),
            ("none", "F32", (0, 3)),
            ("é\t\x1f\x7f", "I64", (2, 1)),
            ("f", "F4", (2, 4)),
        ]
    )
    written = library(stored, metadata, bytes(range(32)))
    raw, header = build(stored, metadata)
    assert raw == written[: len(raw)]
    assert parse(raw[8:], len(written), "f") == header
    assert header.metadata == (metadata or {})


def test_a_header_is_built_as_the_library_writes_a_file(tmp_path: Path) -> None:
    arrays = {
        f"layer.{n}.{kind}": np.zeros((n, 3), kind)
        for n in range(12)
        for kind in ("float16", "int64", "bool", "float32")
    }
    safetensors.numpy.save_file(arrays, tmp_path / "f.safetensors", {"format": "np"})
    short = {"float16": "F16", "int64": "I64", "bool": "BOOL", "float32": "F32"}
    stored = library_order((name, short[str(array.dtype)], array.shape) for name, array in arrays.items())
    raw, header = build(stored, {"format": "np"})
    assert (tmp_path / "f.safetensors").read_bytes()[: len(raw)] == raw
    assert sum(e.nbytes for e in header.entries.values()) == sum(array.nbytes for array in arrays.values())


def test_built_bytes_are_these() -> None:
    raw, header = build([("b", "F32", (2, 1)), ("a", "F4", (6,)), ("c", "U8", ())], {"é": '"'}, align=64)
    text = (
        '{"__metadata__":{"é":"\\""},"b":{"dtype":"F32","shape":[2,1],"data_offsets":[0,8]},'
        '"a":{"dtype":"F4","shape":[6],"data_offsets":[8,11]},"c":{"dtype":"U8","shape":[],"data_offsets":[11,12]}}'
    )
    assert raw == b"\xf8\0\0\0\0\0\0\0" + text.encode() + b" " * (248 - len(text.encode()))
    assert header.data_start == 256
    assert header.entries == {
        "b": Entry("F32", (2, 1), 256, 8),
        "a": Entry("F4", (6,), 264, 3),
        "c": Entry("U8", (), 267, 1),
    }
    assert list(header.entries) == ["b", "a", "c"]


def test_the_library_writes_broken_json_for_no_tensors_and_empty_metadata_and_build_does_not() -> None:
    raw, header = build([], {})
    assert raw[8:] == b'{"__metadata__":{}}     ' and agree(raw) and header == Header({}, {}, 32)


@pytest.mark.parametrize("align", [1, 2, 7, 8, 64, 4096, 2**20])
def test_data_starts_at_a_multiple_of_align_and_the_library_reads_it(align: int, tmp_path: Path) -> None:
    arrays = {
        "b": np.arange(6, dtype=np.float32).reshape(2, 3),
        "a": np.arange(5, dtype=np.int8),
        "zero": np.zeros((0, 2), np.int8),
    }
    raw, header = build([("b", "F32", (2, 3)), ("a", "I8", (5,)), ("zero", "I8", (0, 2))], {"k": "v"}, align)
    assert len(raw) == header.data_start and len(raw) % align == 0
    path = tmp_path / "f.safetensors"
    path.write_bytes(raw + b"".join(array.tobytes() for array in arrays.values()))
    with safetensors.safe_open(path, framework="numpy") as opened:
        assert opened.metadata() == {"k": "v"}
        for name, array in arrays.items():
            np.testing.assert_array_equal(opened.get_tensor(name), array)


STORED = st.lists(
    st.tuples(st.text(max_size=4), st.sampled_from(sorted(BITS)), st.lists(st.integers(0, 5), max_size=3).map(tuple)),
    max_size=6,
)


@given(STORED, st.none() | st.dictionaries(st.text(max_size=3), st.text(max_size=3)), st.sampled_from([8, 64, 4096]))
@law(300)
def test_what_is_built_is_read_back_equal_here_and_accepted_by_the_library(
    stored: list[tuple[str, str, tuple[int, ...]]], metadata: dict[str, str] | None, align: int
) -> None:
    try:
        raw, header = build(stored, metadata, align)
    except ReshardError:
        names = [name for name, _, _ in stored]
        odd = any(int(np.prod(shape, dtype=int)) * BITS[dtype] % 8 for _, dtype, shape in stored)
        assert odd or len(set(names)) < len(names) or "__metadata__" in names
        return
    size = sum(e.nbytes for e in header.entries.values())
    again = parse(raw[8:], len(raw) + size, "f")
    assert again == header and list(again.entries) == list(header.entries) == [name for name, _, _ in stored]
    assert agree(raw + bytes(size))


@pytest.mark.parametrize(
    "stored, metadata, message",
    [
        (
            [("a", "F32", (1,)), ("a", "F32", (1,))],
            None,
            "tensor 'a' cannot be stored as safetensors: the name is taken",
        ),
        ([("__metadata__", "F32", (1,))], None, "the name is taken"),
        ([("a", "float32", (1,))], None, "unknown dtype 'float32'"),
        ([("a", "F4", (3,))], None, "F4 [3] has 12 bits"),
        ([("a", "U8", (-1,))], None, "shape [-1] has a negative size"),
        ([("a", "F64", (2**58,))], None, f"F64 [{2**58}] has more than 2**64 - 1 bits"),
        ([("\ud800", "U8", (1,))], None, "'\\ud800' is not valid Unicode"),
        ([], {"a": "\udfff"}, "'\\udfff' is not valid Unicode"),
        ([], {"a": "x" * MAX_LENGTH}, f"safetensors allows {MAX_LENGTH}"),
    ],
)
def test_what_no_file_can_hold_is_not_built(stored: list, metadata: dict[str, str] | None, message: str) -> None:
    with pytest.raises(ReshardError) as error:
        build(stored, metadata)
    assert message in error.value.message


# --- reading, messages, speed -----------------------------------------------------------------------------------------


def test_read_returns_the_header(tmp_path: Path) -> None:
    file = pack(f' {{ "t" : {U8} , "__metadata__":{{"\\u0061":"b"}}}}  ')
    path = tmp_path / "f.safetensors"
    path.write_bytes(file)
    fd = os.open(path, os.O_RDONLY)
    try:
        header = read(of_descriptor(fd, "f"), len(file), "f")
    finally:
        os.close(fd)
    assert header == Header({"t": Entry("U8", (4,), len(file) - 4, 4)}, {"a": "b"}, len(file) - 4)


def test_short_reads_are_continued(monkeypatch: pytest.MonkeyPatch) -> None:
    file = pack(tensors(U8))
    monkeypatch.setattr(os, "pread", lambda fd, count, offset: file[offset : offset + min(count, 3)])
    assert read(of_descriptor(0, "f"), len(file), "f") == ours(file)


def test_a_file_that_shrinks_while_it_is_read_is_said_to() -> None:
    file = pack(tensors(U8))
    r, w = os.pipe()
    try:
        with pytest.raises(PlaceError, match=r"^f: reading 8 bytes at offset 0 failed"):
            read(of_descriptor(r, "f"), len(file), "f")  # a pipe has no offsets
    finally:
        os.close(r)
        os.close(w)
    with (
        Path(os.devnull).open("rb") as empty,
        pytest.raises(PlaceError, match=r"^f: the file ends at byte 0; bytes up to 8 were expected"),
    ):
        read(of_descriptor(empty.fileno(), "f"), len(file), "f")


def refusal(file: bytes) -> ReshardError:
    with pytest.raises(ReshardError) as error:
        parse(file[8 : 8 + length(file[:8], len(file), "m.safetensors")], len(file), "m.safetensors")
    return error.value


@pytest.mark.parametrize(
    "text, message",
    [
        (
            tensors(entry('"U9"')),
            f"m.safetensors: tensor 't0': unknown dtype 'U9'; safetensors knows {', '.join(BITS)}",
        ),
        (
            U8,
            "m.safetensors: not a safetensors header: the header is a tensor's entry, not an object that maps "
            "names to tensors",
        ),
        (tensors(entry(shape="[true]")), "m.safetensors: tensor 't0': shape holds true, not a size"),
        (
            tensors(entry(shape="[-1]")),
            "m.safetensors: tensor 't0': shape [-1] has sizes that are not from 0 to 2**64 - 1",
        ),
        (
            tensors(entry(span="[0,4.5]")),
            "m.safetensors: tensor 't0': data_offsets holds 0 and 4.5, not two offsets from 0 to 2**64 - 1",
        ),
        (tensors(entry(span="[0]")), "m.safetensors: tensor 't0': data_offsets is a list of 1, not a pair of offsets"),
        (
            tensors(entry(span="[0,4,4]")),
            "m.safetensors: tensor 't0': data_offsets is a list of 3, not a pair of offsets",
        ),
        (tensors(entry(shape="[5]")), "m.safetensors: tensor 't0': U8 [5] takes 5 bytes, but its offsets give it 4"),
        (
            tensors(entry(span="[4,0]")),
            "m.safetensors: tensor 't0': begins at byte 66, but the data starts at byte 62: a hole",
        ),
        (
            tensors(U8, U8),
            "m.safetensors: tensor 't1': begins at byte 115, but tensor 't0' ends at byte 119: an overlap",
        ),
        (
            tensors(entry('"F4"', "[7]")),
            "m.safetensors: tensor 't0': F4 [7] has 28 bits, not a whole number of bytes",
        ),
        ('{"t":{"dtype":"U8","shape":[4]}}', "m.safetensors: tensor 't': data_offsets is missing"),
        ('{"__metadata__":{"a":1}}', "m.safetensors: __metadata__: 'a' is 1, not a string"),
        (
            "[]",
            "m.safetensors: not a safetensors header: the header is a list of 0, not an object that maps names "
            "to tensors",
        ),
        (
            "{",
            "m.safetensors: not a safetensors header: Expecting property name enclosed in double quotes: line "
            "1 column 2 (char 1)",
        ),
    ],
)
def test_a_refusal_names_the_file_the_tensor_and_both_numbers(text: str, message: str) -> None:
    assert refusal(pack(text)).message == message


def test_a_truncated_file_and_one_that_is_too_long_are_told_apart() -> None:
    file = pack(tensors(U8))
    cut = refusal(file[:-1])
    assert cut.message == f"m.safetensors: truncated: the file holds {len(file) - 1} bytes, the header says {len(file)}"
    assert cut.hint is not None and "download or copy it again" in cut.hint
    assert (
        refusal(file + b"x").message
        == f"m.safetensors: too long: the file holds {len(file) + 1} bytes, the header says {len(file)}"
    )
    assert (
        refusal(file[:30]).message
        == "m.safetensors: truncated inside the header: the file holds 30 bytes, the header alone takes 62"
    )
    assert refusal(file[:5]).message == "m.safetensors: the file holds 5 bytes; a safetensors file has at least 10"


@pytest.mark.parametrize(
    "file, hint",
    [
        (b"<!DOCTYPE html>\n<html><head>", "HTML or XML page"),
        (b"\xef\xbb\xbf\n<html><head></head></html>", "HTML or XML page"),
        (b'<?xml version="1.0" encoding="UTF-8"?>\n<Error>', "HTML or XML page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 5\n", "git-lfs pointer"),
        (b"PK\x03\x04\x00\x00\x08\x08\x00\x00\x00\x00\x00\x00" + bytes(100), "zip archive"),
        (b"PK\x03\x04\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00" + bytes(100), "zip archive"),
        (b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.", "Python pickle"),
        (b"GGUF\x03\0\0\0" + bytes(100), "GGUF"),
        (b"Entry not found", "text that begins 'Entry no'"),
        (b'{"error":"Repository not found"}', "text that begins '{\"error\"'"),
        (bytes(1000), "begins with zeros"),
        (b"", "download or copy it again"),
    ],
)
def test_another_kind_of_file_is_recognised_in_the_hint(file: bytes, hint: str) -> None:
    error = refusal(file)
    assert error.hint is not None and hint in error.hint


@pytest.mark.parametrize("size", [0x3C, 0x0280, 0x8B1F, 0x20])
def test_a_length_whose_low_bytes_look_like_another_kind_of_file_is_not_mistaken_for_it(size: int) -> None:
    hint = refusal(pack("{" * size)).hint
    assert hint is not None and "its writer is at fault" in hint


def many(count: int) -> tuple[bytes, Header, int]:
    shapes = {"gate_proj": (2048, 7168), "up_proj": (2048, 7168), "down_proj": (7168, 2048)}
    stored = [
        (f"model.layers.{at // 768}.mlp.experts.{at // 3 % 256}.{kind}.weight", "BF16", shapes[kind])
        for at, kind in zip(range(count), list(shapes) * count, strict=False)
    ]
    raw, header = build(stored, {"format": "pt"})
    return raw[8:], header, header.data_start + sum(e.nbytes for e in header.entries.values())


def test_a_header_is_parsed_in_few_steps_for_each_tensor_however_many_there_are() -> None:
    """0.35 s for 50,000 tensors, of which reading the JSON is a third; counted in lines of Python, which no busy
    machine changes.
    """
    lines = {}
    for count in (1_000, 10_000):
        raw, header, size = many(count)
        lines[count] = lines_run(lambda raw=raw, size=size: parse(raw, size, "f"))
        assert parse(raw, size, "f") == header
    assert lines[10_000] < 45 * 10_000, lines
    assert lines[10_000] < 10.5 * lines[1_000], lines


def test_a_parsed_header_takes_few_bytes_per_tensor() -> None:
    """The engine's memory promise is 1.5 KiB per tensor for everything: a parsed entry keeps under 350 bytes,
    its name included.
    """
    raw, _, size = many(10_000)
    tracemalloc.start()
    try:
        header = parse(raw, size, "f")
        kept, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(header.entries) == 10_000
    assert len({id(e.dtype) for e in header.entries.values()}) == 1
    assert len({id(e.shape) for e in header.entries.values()}) == 2
    assert kept < 350 * 10_000
    assert peak < 700 * 10_000
