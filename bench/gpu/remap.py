"""What a wake costs by the number of allocations: the same bytes of weights in pieces of different size.

    python -m bench.gpu.remap [--gib 64] [--rounds 10]

A client of GMS maps everything, unmaps and maps again at the same addresses, as a promoted engine does. Justifies the
size into which tensors are packed (`CHUNK` in gms_launch/engines/reference/weights.py).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from bench.failover import summary
from bench.machine import machine
from bench.stopping import stoppable
from gms_launch.gms import gpus, probe
from gms_launch.gms.backends.cuda import CudaMapper
from gms_launch.gms.client import GmsClient
from gms_launch.gms.devices import real_devices, socket_path
from gms_launch.gms.protocol import LockType

MIB = 1 << 20


def measure(gib: int, piece: int, rounds: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="remap-", dir="/dev/shm") as name:
        env = os.environ | {"GMS_SOCKET_DIR": name}
        server = subprocess.Popen(
            [sys.executable, "-m", "gms_launch.gms", "--device", "0", "--memory", "cuda"], env=env
        )
        try:
            path = socket_path(Path(name), real_devices()[0].uuid, "weights")
            client = GmsClient(path, CudaMapper(0))
            client.connect(LockType.RW)
            count = gib * 1024 * MIB // piece
            for _ in range(count):
                client.allocate(piece, "weights")
            client.commit()
            maps, unmaps = [], []
            for _ in range(rounds):
                client.connect(LockType.RO)
                begun = time.perf_counter()
                client.remap_all()
                maps.append(time.perf_counter() - begun)
                begun = time.perf_counter()
                client.unmap_all()
                unmaps.append(time.perf_counter() - begun)
                client.disconnect()
            assert probe.runtime_state(path).allocation_count == count
        finally:
            server.terminate()
            server.wait()
    return {"piece_mib": piece // MIB, "allocations": count, "map": summary(maps), "unmap": summary(unmaps)}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--gib", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "results" / "gpu-remap.json")
    options = parser.parse_args()
    gpu = gpus.look()[0]
    result = {
        "command": " ".join(["python", "-m", "bench.gpu.remap", *sys.argv[1:]]),
        "machine": machine(gpu.name),
        "weights_gib": options.gib,
        "pieces": [measure(options.gib, mib * MIB, options.rounds) for mib in (16, 64, 256, 1024, 2048, 8192)],
    }
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    stoppable(main)
