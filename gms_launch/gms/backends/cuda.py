"""GPU memory as a GMS backend, through the CUDA driver's virtual memory management.

The server's side (`CudaMemory`) creates and exports: no context, no mapping, nothing that an engine could corrupt.
The client's side (`CudaMapper`) imports descriptors, reserves addresses, maps and sets access: read-only for readers.
Unmapping keeps the addresses, so a captured address is good again after the next mapping. Needs the driver at its
first use, not at import.

A driver call that fails unexpectedly raises `CudaError` with the call and the driver's name for the error. The server
does not live on after one: what the driver holds is then not known any more, and a fresh server is.
"""

from __future__ import annotations

import os
import resource
from collections.abc import Callable
from typing import Any

from gms_launch.gms.backends import OutOfMemoryError

#: Called with the name and arguments of every driver call, for tests that record them; None records nothing.
recorder: Callable[[str, tuple[Any, ...]], None] | None = None


class CudaError(Exception):
    """A driver call failed. `name` is the driver's own, such as CUDA_ERROR_INVALID_VALUE."""

    def __init__(self, call: str, name: str, text: str) -> None:
        super().__init__(f"{call}: {name}: {text}")
        self.call, self.name = call, name


class NoDriverError(CudaError):
    """There is no usable NVIDIA driver on this machine."""


def driver() -> Any:
    """The driver bindings. Raises `NoDriverError` when they cannot be imported."""
    try:
        from cuda.bindings import driver as bindings
    except ImportError as exc:
        raise NoDriverError("import cuda.bindings", "ImportError", str(exc)) from None
    return bindings


def call(name: str, *arguments: Any) -> Any:
    """Call the driver; returns its results (None, one, or a tuple). Raises `CudaError` and `OutOfMemoryError`."""
    bindings = driver()
    if recorder is not None:
        recorder(name, arguments)
    try:
        status, *results = getattr(bindings, name)(*arguments)
    except (RuntimeError, OSError) as exc:  # the library is found at the first call, or not
        raise NoDriverError(name, type(exc).__name__, str(exc).split("\n")[0]) from None
    if status != bindings.CUresult.CUDA_SUCCESS:
        label = bindings.CUresult(status).name
        if label == "CUDA_ERROR_OUT_OF_MEMORY":
            raise OutOfMemoryError(f"{name}: {label}")
        _, text = bindings.cuGetErrorString(status)
        kind = NoDriverError if label in _NO_DRIVER else CudaError
        raise kind(name, label, text.decode() if text else "no description")
    if not results:
        return None
    return results[0] if len(results) == 1 else tuple(results)


_NO_DRIVER = frozenset(
    {
        "CUDA_ERROR_NO_DEVICE",
        "CUDA_ERROR_STUB_LIBRARY",
        "CUDA_ERROR_SYSTEM_DRIVER_MISMATCH",
        "CUDA_ERROR_OPERATING_SYSTEM",
    }
)


def init() -> None:
    """Start the driver in this process; costs 0.1-0.2 s once."""
    call("cuInit", 0)


def device_uuid(index: int) -> str:
    """NVML's name (GPU-...) of the device that CUDA numbers `index` under CUDA_VISIBLE_DEVICES."""
    raw = call("cuDeviceGetUuid", call("cuDeviceGet", index)).bytes
    digits = bytes(b & 0xFF for b in raw[:16]).hex()
    return "GPU-" + "-".join((digits[:8], digits[8:12], digits[12:16], digits[16:20], digits[20:]))


def _properties(index: int) -> Any:
    bindings = driver()
    found = bindings.CUmemAllocationProp()
    found.type = bindings.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
    found.requestedHandleTypes = bindings.CUmemAllocationHandleType.CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR
    found.location.type = bindings.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
    found.location.id = index
    return found


def _granularity(properties: Any) -> int:
    minimum = driver().CUmemAllocationGranularity_flags.CU_MEM_ALLOC_GRANULARITY_MINIMUM
    return int(call("cuMemGetAllocationGranularity", properties, minimum))


def _handle_type() -> Any:
    return driver().CUmemAllocationHandleType.CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR


class CudaMemory:
    """The memory of one GPU, by CUDA's index. See `gms_launch.gms.backends.Memory`. Makes no context."""

    def __init__(self, index: int) -> None:
        init()
        self.uuid = device_uuid(index)
        self.total = int(call("cuDeviceTotalMem", call("cuDeviceGet", index)))
        self._properties = _properties(index)
        self.granularity = _granularity(self._properties)
        self.used = 0
        self._handles: dict[int, tuple[Any, int]] = {}
        self._exported: dict[int, int] = {}
        self._keep = resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2
        self._next = 1

    def create(self, size: int) -> int:
        handle = call("cuMemCreate", size, self._properties, 0)
        number, self._next = self._next, self._next + 1
        self._handles[number] = (handle, size)
        self.used += size
        return number

    def export(self, handle: int, writable: bool) -> int:
        # A GPU's descriptor knows no read-only form: what a client may do is what it sets as access. One stays open as
        # long as the allocation lives: closing the last takes the driver half a millisecond, here and at the client.
        # With very many allocations the rest are made on request, so that sessions never lack a descriptor.
        if handle in self._exported:
            return os.dup(self._exported[handle])
        os.close(os.open(os.devnull, os.O_RDONLY))  # with none left this fails by its name, and not in the driver
        fd = int(call("cuMemExportToShareableHandle", self._handles[handle][0], _handle_type(), 0))
        if len(self._exported) >= self._keep:
            return fd
        self._exported[handle] = fd
        return os.dup(fd)

    def release(self, handle: int) -> None:
        found, size = self._handles.pop(handle)
        if handle in self._exported:
            os.close(self._exported.pop(handle))
        call("cuMemRelease", found)
        self.used -= size


class CudaMapper:
    """See `gms_launch.gms.backends.Mapper`. Retains the device's primary context and makes it this thread's."""

    def __init__(self, index: int) -> None:
        init()
        self._device = call("cuDeviceGet", index)
        self.context = call("cuDevicePrimaryCtxRetain", self._device)
        call("cuCtxSetCurrent", self.context)
        self._properties = _properties(index)
        self.granularity = _granularity(self._properties)
        bindings = driver()
        self._access = {}
        flags = bindings.CUmemAccess_flags
        for writable, flag in (
            (False, flags.CU_MEM_ACCESS_FLAGS_PROT_READ),
            (True, flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE),
        ):
            access = bindings.CUmemAccessDesc()
            access.location.type = bindings.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
            access.location.id = index
            access.flags = flag
            self._access[writable] = access

    def reserve(self, size: int) -> int:
        return int(call("cuMemAddressReserve", size, self.granularity, 0, 0))

    def map(self, address: int, size: int, fd: int, writable: bool) -> None:
        self._map(address, size, call("cuMemImportFromShareableHandle", fd, _handle_type()), writable)

    def map_private(self, address: int, size: int) -> None:
        self._map(address, size, call("cuMemCreate", size, self._properties, 0), True)

    def _map(self, address: int, size: int, handle: Any, writable: bool) -> None:
        try:
            call("cuMemMap", address, size, 0, handle, 0)
            call("cuMemSetAccess", address, size, [self._access[writable]], 1)
        finally:
            # The mapping keeps the memory; the handle is needed no longer.
            call("cuMemRelease", handle)

    def unmap(self, address: int, size: int) -> None:
        # The driver unmaps under work that still runs.
        call("cuCtxSynchronize")
        call("cuMemUnmap", address, size)

    def free(self, address: int, size: int) -> None:
        call("cuMemAddressFree", address, size)
