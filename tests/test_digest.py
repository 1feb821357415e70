"""Digests do not depend on how bytes arrive: a tensor hashed in any pieces and any order has the digests of
its blocks.
"""

import itertools
import re
from unittest.mock import patch

import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st
from strategies import law

from reshard.store import digest
from reshard.store.digest import BlockHasher, of, of_blocks, root


def blocks(data: bytes, block: int) -> list[bytes]:
    return [xxhash.xxh3_128_digest(data[at : at + block]) for at in range(0, len(data), block)]


@given(st.data(), st.integers(0, 90), st.sampled_from([1, 7, 16, 64, 128]))
@law(200)
def test_pieces_in_any_order_make_the_digests_of_the_blocks(data: st.DataObject, size: int, block: int) -> None:
    content = bytes(data.draw(st.binary(min_size=size, max_size=size)))
    ends = sorted(data.draw(st.sets(st.integers(0, size), max_size=6)) | {0, size})
    pieces = data.draw(st.permutations(list(itertools.pairwise(ends))))
    with patch.object(digest, "BLOCK", block):
        hasher = BlockHasher(size)
        for low, high in pieces:
            hasher.update(low, memoryview(content)[low:high])
        assert hasher.blocks(lambda at, n: content[at : at + n]) == blocks(content, block)


@given(st.integers(1, 90), st.sampled_from([7, 16, 64]), st.integers(1, 20))
@law(100)
def test_bytes_that_arrive_in_order_are_never_read_back(size: int, block: int, step: int) -> None:
    content = bytes(range(size))

    def read(at: int, n: int) -> bytes:
        raise AssertionError("read back")

    with patch.object(digest, "BLOCK", block):
        hasher = BlockHasher(size)
        for low in range(0, size, step):
            hasher.update(low, memoryview(content)[low : low + step])
        assert hasher.blocks(read) == blocks(content, block)


def test_what_never_arrives_is_read_back_block_by_block() -> None:
    """Zero padding at the end of a rank's vocabulary: written by making the file long enough, and by nobody."""
    asked: list[tuple[int, int]] = []
    content = b"abcdefgh" + bytes(12)

    def read(at: int, n: int) -> bytes:
        asked.append((at, n))
        return content[at : at + n]

    with patch.object(digest, "BLOCK", 8):
        hasher = BlockHasher(20)
        hasher.update(0, memoryview(content)[:10])
        assert hasher.blocks(read) == blocks(content, 8)
    assert asked == [(8, 8), (16, 4)]


def test_a_tensor_without_bytes_has_no_blocks_and_a_digest() -> None:
    assert BlockHasher(0).blocks(lambda at, n: b"") == []
    assert of_blocks([]) == of(b"") == "99aa06d3014798d86001c324468d497f"


def test_the_digests_are_xxh3_128_as_the_format_says() -> None:
    """Known values: whoever reads the format must find the same with any xxHash."""
    assert of(b"reshard") == xxhash.xxh3_128_hexdigest(b"reshard")
    assert re.fullmatch("[0-9a-f]{32}", of(b"reshard"))
    one, two = xxhash.xxh3_128_digest(b"one"), xxhash.xxh3_128_digest(b"two")
    assert of_blocks([one, two]) == of(one + two) != of_blocks([two, one])
    assert digest.BLOCK == 8 << 20


def test_the_root_depends_on_every_path_size_and_digest_but_not_on_the_order() -> None:
    files = [("b", 2, "22"), ("a", 1, "11")]
    assert root(files) == root(reversed(files)) == of(b"a 1 11\nb 2 22\n")
    for other in ([("c", 2, "22"), files[1]], [("b", 3, "22"), files[1]], [("b", 2, "23"), files[1]], files[:1]):
        assert root(other) != root(files)


@pytest.mark.parametrize("size", [1, 8 << 20, (8 << 20) + 1])
def test_a_block_is_eight_mebibytes(size: int) -> None:
    data = memoryview(bytes(size))
    hasher = BlockHasher(size)
    hasher.update(0, data)
    assert len(hasher.blocks(lambda at, n: data[at : at + n])) == -(-size // (8 << 20))
