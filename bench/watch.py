"""Watch latency of the control plane: from the start of a put to the callback, against a real etcd.

python -m bench.watch [--puts 1000]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import tempfile
import threading
import time
from pathlib import Path

from bench.bare import free_port
from bench.stopping import stoppable
from gms_launch.control.access import Access
from gms_launch.control.client import Etcd
from gms_launch.control.keys import prefix
from gms_launch.control.watch import Watch


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--puts", type=int, default=1000)
    options = parser.parse_args()
    url, peer = f"http://127.0.0.1:{free_port()}", f"http://127.0.0.1:{free_port()}"
    with tempfile.TemporaryDirectory(dir="/dev/shm") as data:
        argv = ["etcd", "--name", "b", "--data-dir", data, "--listen-client-urls", url, "--advertise-client-urls", url]
        argv += ["--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer, "--initial-cluster", f"b={peer}"]
        server = subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            times = measure(url, options.puts)
        finally:
            server.kill()
            server.wait()
    ms = sorted(t * 1000 for t in times)
    result = {
        "machine": f"{os.cpu_count()} cores, {platform.platform()}",
        "n": len(ms),
        "p50_ms": round(statistics.median(ms), 3),
        "p99_ms": round(ms[int(0.99 * len(ms))], 3),
        "max_ms": round(ms[-1], 3),
    }
    print(json.dumps(result, indent=1))
    raw = result | {"raw_ms": [round(m, 3) for m in ms]}
    (Path(__file__).with_name("results") / "watch.json").write_text(json.dumps(raw) + "\n")


def measure(url: str, puts: int) -> list[float]:
    etcd = Etcd(Access((url,)))
    etcd.get("/b/ready", retry=20.0)
    arrived, standing = threading.Event(), threading.Event()
    when = [0.0]

    def change(_: object) -> None:
        when[0] = time.perf_counter()
        arrived.set()

    watch = Watch(etcd, [prefix("/b/")], lambda _: None, change, lambda reason: reason is None and standing.set())
    watch.start()
    standing.wait(20)
    times = []
    for number in range(puts):
        arrived.clear()
        begun = time.perf_counter()
        etcd.put("/b/key", str(number).encode())
        if not arrived.wait(5):
            raise TimeoutError(f"put {number} was never seen")
        times.append(when[0] - begun)
    watch.stop()
    return times


if __name__ == "__main__":
    stoppable(main)
