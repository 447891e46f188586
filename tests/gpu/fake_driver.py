"""A stand-in for cuda.bindings.driver that succeeds at everything: for the order of calls, and for errors on demand.

The real thing beside it: tests/gpu/test_backend_contract.py on a GPU (`make test-gpu`).
"""

from __future__ import annotations

import itertools
import os
from enum import IntEnum
from types import SimpleNamespace
from typing import Any


class CUresult(IntEnum):
    CUDA_SUCCESS = 0
    CUDA_ERROR_OUT_OF_MEMORY = 2
    CUDA_ERROR_NO_DEVICE = 100
    CUDA_ERROR_ILLEGAL_ADDRESS = 700


class FakeDriver:
    """Answers any cu* call. `errors` gives a call another result; `room` (bytes) is what cuMemCreate has to give."""

    CUresult = CUresult
    CUmemAllocationType = SimpleNamespace(CU_MEM_ALLOCATION_TYPE_PINNED=1)
    CUmemAllocationHandleType = SimpleNamespace(CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR=1)
    CUmemLocationType = SimpleNamespace(CU_MEM_LOCATION_TYPE_DEVICE=1)
    CUmemAllocationGranularity_flags = SimpleNamespace(CU_MEM_ALLOC_GRANULARITY_MINIMUM=0)
    CUmemAccess_flags = SimpleNamespace(
        CU_MEM_ACCESS_FLAGS_PROT_READ=SimpleNamespace(name="CU_MEM_ACCESS_FLAGS_PROT_READ"),
        CU_MEM_ACCESS_FLAGS_PROT_READWRITE=SimpleNamespace(name="CU_MEM_ACCESS_FLAGS_PROT_READWRITE"),
    )

    def __init__(self, room: int | None = None, **errors: CUresult) -> None:
        self._errors, self._room = errors, room
        self._sizes: dict[int, int] = {}
        self._numbers = itertools.count(1 << 40, 1 << 30)

    @staticmethod
    def CUmemAllocationProp() -> SimpleNamespace:
        return SimpleNamespace(location=SimpleNamespace())

    @staticmethod
    def CUmemAccessDesc() -> SimpleNamespace:
        return SimpleNamespace(location=SimpleNamespace())

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("cu"):
            raise AttributeError(name)

        def called(*arguments: Any) -> tuple[Any, ...]:
            if name in self._errors:
                return (self._errors[name], None)
            if self._room is not None and name == "cuDeviceTotalMem":
                return (CUresult.CUDA_SUCCESS, self._room)
            if self._room is not None and name == "cuMemCreate":
                if sum(self._sizes.values()) + arguments[0] > self._room:
                    return (CUresult.CUDA_ERROR_OUT_OF_MEMORY, None)
                self._sizes[handle := next(self._numbers)] = arguments[0]
                return (CUresult.CUDA_SUCCESS, handle)
            if name == "cuMemRelease":
                self._sizes.pop(arguments[0], None)
            if name == "cuGetErrorString":
                return (CUresult.CUDA_SUCCESS, b"as told")
            if name == "cuMemExportToShareableHandle":
                return (CUresult.CUDA_SUCCESS, os.open(os.devnull, os.O_RDONLY))
            if name == "cuDeviceGetUuid":
                return (CUresult.CUDA_SUCCESS, SimpleNamespace(bytes=bytes(range(16))))
            if name == "cuMemGetAllocationGranularity":
                return (CUresult.CUDA_SUCCESS, 2 << 20)
            return (CUresult.CUDA_SUCCESS, next(self._numbers))

        return called
