"""Host memory as a GMS backend: sealed memfds, mapped at fixed addresses.

For machines without a GPU. The limit of the made-up device is enforced here, so that running out of memory is real
to a client; the pages themselves come from the machine as they are touched.
"""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os

from gms_launch.gms.backends import OutOfMemoryError

_PROT_NONE = 0
_MAP_FIXED = 0x10
_MAP_NORESERVE = 0x4000
_MAP_POPULATE = 0x8000
_FAILED = ctypes.c_void_p(-1).value

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_long,
]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]


class HostMemory:
    """A made-up device of `total` bytes. See `gms_launch.gms.backends.Memory`."""

    granularity = mmap.PAGESIZE

    def __init__(self, total: int) -> None:
        self.total = total
        self.used = 0
        self._sizes: dict[int, int] = {}

    def create(self, size: int) -> int:
        if self.used + size > self.total:
            raise OutOfMemoryError(f"{size} bytes wanted, {self.total - self.used} of {self.total} free")
        fd = os.memfd_create("gms", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(fd, size)
            # Nobody can change the size under a client that has it mapped.
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
        except OSError:
            os.close(fd)
            raise
        self._sizes[fd] = size
        self.used += size
        return fd

    def export(self, handle: int, writable: bool) -> int:
        # Opened anew rather than duplicated: a reader's descriptor cannot be mapped for writing.
        return os.open(f"/proc/self/fd/{handle}", (os.O_RDWR if writable else os.O_RDONLY) | os.O_CLOEXEC)

    def release(self, handle: int) -> None:
        self.used -= self._sizes.pop(handle)
        os.close(handle)


class HostMapper:
    """See `gms_launch.gms.backends.Mapper`."""

    granularity = mmap.PAGESIZE

    def reserve(self, size: int) -> int:
        return self._mmap(None, size, _PROT_NONE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE, -1)

    def map(self, address: int, size: int, fd: int, writable: bool) -> None:
        prot = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
        # Page tables are filled now and not at first use, as a GPU mapping's are.
        self._mmap(address, size, prot, mmap.MAP_SHARED | _MAP_FIXED | _MAP_POPULATE, fd)

    def map_private(self, address: int, size: int) -> None:
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_FIXED
        self._mmap(address, size, mmap.PROT_READ | mmap.PROT_WRITE, flags, -1)

    def unmap(self, address: int, size: int) -> None:
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE | _MAP_FIXED
        self._mmap(address, size, _PROT_NONE, flags, -1)

    def free(self, address: int, size: int) -> None:
        if _libc.munmap(address, size) != 0:
            error = ctypes.get_errno()
            raise OSError(error, f"munmap of {size} bytes: {os.strerror(error)}")

    @staticmethod
    def _mmap(address: int | None, size: int, prot: int, flags: int, fd: int) -> int:
        found = _libc.mmap(address, size, prot, flags, fd, 0)
        if found == _FAILED or found is None:
            error = ctypes.get_errno()
            raise OSError(error, f"mmap of {size} bytes: {os.strerror(error)}")
        assert address is None or found == address
        return int(found)
