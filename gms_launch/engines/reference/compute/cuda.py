"""The reference engine's arithmetic on a GPU: driver API only, one kernel, pinned staging for what comes from disk."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from gms_launch.engines.reference.compute.base import Piece, Span
from gms_launch.engines.reference.compute.host import read_fully
from gms_launch.gms.backends.cuda import CudaMapper, call

#: Copies in flight, each with a pinned buffer of its own (bytes).
LANES = 8
STAGE = 32 * 1024 * 1024
THREADS = 256
#: Blocks of a launch at most: 16 for each of an H200's 132 multiprocessors.
BLOCKS = 2112


class CudaCompute:
    """See `gms_launch.engines.reference.compute.Compute`. `index` is CUDA's, under CUDA_VISIBLE_DEVICES."""

    def __init__(self, index: int) -> None:
        self.mapper = CudaMapper(index)
        ptx = Path(__file__).with_name("kernels.ptx").read_bytes() + b"\0"
        self._module = call("cuModuleLoadData", ptx)
        self._kernel = call("cuModuleGetFunction", self._module, b"weighted_sum")
        self._totals = 0
        self._capacity = 0
        self._word = ctypes.c_uint64()

    # -- from disk -----------------------------------------------------------------------------------------------

    def fill(self, pieces: Sequence[Piece]) -> None:
        """Lanes read into their pinned buffers and copy from there, so that disk and bus work at the same time."""
        chunks = [
            Piece(p.fd, p.offset + at, min(STAGE, p.size - at), p.address + at)
            for p in pieces
            for at in range(0, p.size, STAGE)
        ]
        lane = threading.local()
        made: list[tuple[int, object]] = []

        def open_lane() -> None:
            call("cuCtxSetCurrent", self.mapper.context)
            lane.buffer = int(call("cuMemHostAlloc", STAGE, 0))
            lane.stream = call("cuStreamCreate", 0)
            made.append((lane.buffer, lane.stream))

        def copy(piece: Piece) -> None:
            read_fully(piece.fd, piece.offset, piece.size, lane.buffer)
            call("cuMemcpyHtoDAsync", piece.address, lane.buffer, piece.size, lane.stream)
            call("cuStreamSynchronize", lane.stream)

        try:
            with ThreadPoolExecutor(min(LANES, max(1, len(chunks))), initializer=open_lane) as lanes:
                for _ in lanes.map(copy, chunks):
                    pass
        finally:
            for buffer, stream in made:
                call("cuStreamDestroy", stream)
                call("cuMemFreeHost", buffer)

    def zero(self, address: int, size: int) -> None:
        call("cuMemsetD8", address, 0, size)

    # -- arithmetic ----------------------------------------------------------------------------------------------

    def weighted_sums(self, spans: Sequence[Span]) -> list[int]:
        count = len(spans)
        if count > self._capacity:
            if self._totals:
                call("cuMemFree", self._totals)
            self._totals, self._capacity = int(call("cuMemAlloc", 8 * count)), count
        call("cuMemsetD8", self._totals, 0, 8 * count)
        kinds = (ctypes.c_void_p, ctypes.c_uint64, ctypes.c_uint64, ctypes.c_void_p)
        for number, span in enumerate(spans):
            blocks = max(1, min(BLOCKS, -(-span.words // THREADS)))
            arguments = ((span.address, span.words, span.first, self._totals + 8 * number), kinds)
            call("cuLaunchKernel", self._kernel, blocks, 1, 1, THREADS, 1, 1, 0, 0, arguments, 0)
        found = (ctypes.c_uint64 * count)()
        call("cuMemcpyDtoH", ctypes.addressof(found), self._totals, 8 * count)
        return list(found)

    def store(self, address: int, value: int) -> None:
        self._word.value = value
        call("cuMemcpyHtoD", address, ctypes.addressof(self._word), 8)

    def load(self, address: int) -> int:
        call("cuMemcpyDtoH", ctypes.addressof(self._word), address, 8)
        return self._word.value
