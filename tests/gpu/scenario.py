"""The life of weights and KV memory by the driver's calls: publish, park, wake, die. Recorded on a GPU.

python -m tests.gpu.scenario OUT.json      # on a machine with a GPU
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from gms_launch.gms.backends import cuda

SIZES = (64 << 20, 6 << 20)
KV = 32 << 20


def record() -> list[list[Any]]:
    """Run it; returns every driver call as its name and plain arguments (sizes and flags; no handles, no addresses)."""
    calls: list[list[Any]] = []

    def plain(name: str, arguments: tuple[Any, ...]) -> None:
        keep = [a for a in arguments if type(a) is int and a < 1 << 32]
        if name == "cuMemSetAccess":
            keep.append(str(getattr(arguments[2][0].flags, "name", arguments[2][0].flags)))
        calls.append([name, *(keep if name in _WITH_ARGUMENTS else [])])

    cuda.recorder = plain
    try:
        _life()
    finally:
        cuda.recorder = None
    return calls


_WITH_ARGUMENTS = {"cuMemCreate", "cuMemAddressReserve", "cuMemSetAccess"}


def _life() -> None:
    server = cuda.CudaMemory(0)
    writer = cuda.CudaMapper(0)
    handles = [server.create(size) for size in SIZES]
    places = [writer.reserve(size) for size in SIZES]
    _map(server, writer, handles, places, SIZES, writable=True)
    for place, size in zip(places, SIZES, strict=True):
        writer.unmap(place, size)  # at the commit
    _map(server, writer, handles, places, SIZES, writable=False)
    scratch = writer.reserve(KV)
    writer.map_private(scratch, KV)
    for place, size in zip((*places, scratch), (*SIZES, KV), strict=True):
        writer.unmap(place, size)  # parked: addresses only
    _map(server, writer, handles, places, SIZES, writable=False)  # woken
    kv = server.create(KV)
    _map(server, writer, [kv], [scratch], (KV,), writable=True)
    server.release(kv)  # the session ended
    for place, size in zip((*places, scratch), (*SIZES, KV), strict=True):
        writer.unmap(place, size)
        writer.free(place, size)


def _map(
    server: cuda.CudaMemory,
    client: cuda.CudaMapper,
    handles: list[int],
    places: list[int],
    sizes: tuple[int, ...],
    writable: bool,
) -> None:
    for handle, place, size in zip(handles, places, sizes, strict=True):
        fd = server.export(handle, writable)
        client.map(place, size, fd, writable)
        os.close(fd)


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(json.dumps(record()).replace("], [", "],\n ["))
