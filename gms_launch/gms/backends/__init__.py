"""Memory that outlives an engine: what a GMS server and its clients need of it.

`Memory` is the server's side (owns, exports), `Mapper` the client's (reserves addresses, maps, unmaps). A descriptor
that the one exports is what the other maps; how it works inside is the backend's own business.
"""

from __future__ import annotations

from typing import Protocol


class OutOfMemoryError(Exception):
    """The device has no room for an allocation right now."""


class Memory(Protocol):
    """Owns the memory of one device. A handle is a number that means something to the backend alone."""

    @property
    def granularity(self) -> int:
        """Sizes are rounded up to a multiple of this (bytes)."""

    @property
    def total(self) -> int:
        """Size of the device (bytes)."""

    @property
    def used(self) -> int:
        """Bytes handed out and not released."""

    def create(self, size: int) -> int:
        """Allocate `size` bytes, a multiple of the granularity.

        Raises `OutOfMemoryError`, and `OSError` when the process has no descriptor left; then nothing was allocated.
        """

    def export(self, handle: int, writable: bool) -> int:
        """A new descriptor of the allocation, for the caller to pass on and close.

        Raises `OSError` when the process has none left.
        """

    def release(self, handle: int) -> None:
        """Let go of an allocation. Clients that map it keep it until they unmap."""


class Mapper(Protocol):
    """Maps exported memory into this process."""

    @property
    def granularity(self) -> int:
        """Sizes and addresses are multiples of this (bytes)."""

    def reserve(self, size: int) -> int:
        """Reserve `size` bytes of addresses with nothing behind them; returns the address."""

    def map(self, address: int, size: int, fd: int, writable: bool) -> None:
        """Put the allocation behind `fd` at a reserved address. Does not close `fd`. Raises `OSError`."""

    def map_private(self, address: int, size: int) -> None:
        """Put memory of this process alone (scratch) at a reserved address."""

    def unmap(self, address: int, size: int) -> None:
        """Take away what is mapped and keep the addresses reserved."""

    def free(self, address: int, size: int) -> None:
        """Give the addresses back."""


def align(size: int, granularity: int) -> int:
    """`size` rounded up to a multiple of `granularity`."""
    return -(-size // granularity) * granularity
