"""The disk tier's checksum."""

from __future__ import annotations

import random

import pytest

from spillover import _core

DATA = random.Random(0).randbytes(40_000)


def test_known_sums() -> None:
    # RFC 3720, appendix B.4, and the check value of the CRC catalogue.
    assert _core.crc32c(bytes(32)) == 0x8A9136AA
    assert _core.crc32c(b"\xff" * 32) == 0x62A8AB43
    assert _core.crc32c(bytes(range(32))) == 0x46DD794E
    assert _core.crc32c(b"123456789") == 0xE3069283
    assert _core.crc32c(b"") == 0


# Lanes have 256 and 4096 bytes; three make a round. Products go over 512 bytes at once.
@pytest.mark.parametrize(
    "near", [0, 8, 512, 3 * 256, 1024, 2 * 3 * 256, 3 * 4096, 3 * 4096 + 3 * 256, 39_000]
)
def test_every_way_agrees_at_every_size_and_alignment(near: int) -> None:
    for size in range(max(0, near - 9), near + 10):
        for start in (0, 1, 7):
            piece = DATA[start : start + size]
            sums = _core._crc32c_ways(piece, size)
            assert sums.keys() >= {"tables"}
            assert set(sums.values()) == {_core.crc32c(piece, size)}


def test_pieces_add_up() -> None:
    whole = _core.crc32c(DATA)
    for cut in (0, 1, 4096, 12_345, len(DATA)):
        first, second = DATA[:cut], DATA[cut:]
        assert _core.crc32c(second, _core.crc32c(first)) == whole
        sums = _core.crc32c(first), _core.crc32c(second)
        assert _core.join_crc32c(*sums, len(second)) == whole
