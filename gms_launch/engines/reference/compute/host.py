"""The reference engine's arithmetic on host memory."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from gms_launch.engines.reference.compute.base import Piece, Span
from gms_launch.gms.backends.host import HostMapper

_BLOCK = 1 << 17
_MASK = (1 << 64) - 1
_COEFFICIENTS: NDArray[np.uint64] = np.arange(_BLOCK, dtype=np.uint64) * np.uint64(2) + np.uint64(1)


def words_at(address: int, count: int) -> NDArray[np.uint64]:
    """Mapped memory as words, without a copy. Using it after an unmap is a segmentation fault, as on a GPU."""
    return np.frombuffer(memoryview((ctypes.c_char * (8 * count)).from_address(address)).cast("B"), dtype=np.uint64)


def weighted_sum(words: NDArray[np.uint64], first: int) -> int:
    """The sum of word i times 2 (first + i) + 1: it notices a changed word and a moved one."""
    total = 0
    for start in range(0, len(words), _BLOCK):
        block = words[start : start + _BLOCK]
        total += int(np.dot(block, _COEFFICIENTS[: len(block)]))
        total += 2 * (first + start) * int(block.sum(dtype=np.uint64))
    return total & _MASK


class HostCompute:
    """See `gms_launch.engines.reference.compute.Compute`."""

    def __init__(self) -> None:
        self.mapper = HostMapper()

    def fill(self, pieces: Sequence[Piece]) -> None:
        for piece in pieces:
            read_fully(piece.fd, piece.offset, piece.size, piece.address)

    def zero(self, address: int, size: int) -> None:
        ctypes.memset(address, 0, size)

    def weighted_sums(self, spans: Sequence[Span]) -> list[int]:
        return [weighted_sum(words_at(s.address, s.words), s.first) for s in spans]

    def store(self, address: int, value: int) -> None:
        ctypes.c_uint64.from_address(address).value = value

    def load(self, address: int) -> int:
        return ctypes.c_uint64.from_address(address).value


def read_fully(fd: int, offset: int, size: int, address: int) -> None:
    """Read `size` bytes of a file to an address of this process. Raises `OSError` when the file ends before."""
    view = memoryview((ctypes.c_char * size).from_address(address)).cast("B")
    done = 0
    while done < size:
        got = os.preadv(fd, [view[done:]], offset + done)
        if got == 0:
            raise OSError(f"the file ends {size - done} bytes early")
        done += got
