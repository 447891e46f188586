"""What the reference engine needs of a device, and how memory and files are named."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from gms_launch.gms.backends import Mapper


@dataclass(frozen=True)
class Piece:
    """`size` bytes at `offset` of an open file, for the memory at `address`."""

    fd: int
    offset: int
    size: int
    address: int


@dataclass(frozen=True)
class Span:
    """`words` 64-bit words at `address`; the first of them is word number `first` of its tensor."""

    address: int
    words: int
    first: int


class Compute(Protocol):
    """One device. Memory is named by address; it must be mapped."""

    @property
    def mapper(self) -> Mapper:
        """Maps GMS memory for this device."""

    def fill(self, pieces: Sequence[Piece]) -> None:
        """Read pieces of files into memory. Raises `OSError`."""

    def zero(self, address: int, size: int) -> None:
        """Set bytes to zero."""

    def weighted_sums(self, spans: Sequence[Span]) -> list[int]:
        """For each span the sum of word i times 2 (first + i) + 1, modulo 2**64."""

    def store(self, address: int, value: int) -> None:
        """Write a 64-bit word."""

    def load(self, address: int) -> int:
        """Read a 64-bit word."""
