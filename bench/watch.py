"""Watch latency of the control plane: from the start of a put to the callback, against a real etcd
as a run starts it, and against one without TLS.

python -m bench.watch [--puts 1000]
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from bench.bare import free_port
from bench.machine import machine
from bench.plain import PlainEtcd
from bench.stopping import stoppable
from gms_launch.control.access import Access
from gms_launch.control.client import Etcd
from gms_launch.control.keys import prefix
from gms_launch.control.watch import Watch
from gms_launch.run import credentials
from gms_launch.services import etcd
from gms_launch.services.pem import PemFiles


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--puts", type=int, default=1000)
    options = parser.parse_args()
    times: dict[str, list[float]] = {"TLS": [], "plain": []}
    with tempfile.TemporaryDirectory(dir="/dev/shm") as name:
        directory = Path(name)
        own, access = of_a_run(directory)
        server = subprocess.Popen(own, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            with PlainEtcd(directory / "plain") as plain:
                for _ in range(10):  # in turns, so that both see the same noise
                    times["TLS"] += measure(access, options.puts // 10)
                    times["plain"] += measure(Access((plain.url,)), options.puts // 10)
        finally:
            server.kill()
            server.wait()
    result = {
        "machine": machine(),
        **{how: summary(found) for how, found in times.items()},
    }
    print(json.dumps(result, indent=1))
    raw = result | {"raw_ms": {how: [round(t * 1000, 3) for t in found] for how, found in times.items()}}
    (Path(__file__).with_name("results") / "watch.json").write_text(json.dumps(raw) + "\n")


def of_a_run(directory: Path) -> tuple[Sequence[str], Access]:
    """The command line of etcd as a run starts it, and how an agent reaches it."""
    secrets, port = credentials.make(("127.0.0.1",)), free_port()
    files = PemFiles.of(directory, credentials.ETCD)
    files.write(secrets.ca, secrets.leaves[credentials.ETCD])
    access = secrets.access((f"https://127.0.0.1:{port}",))
    member = etcd.Member("b", "127.0.0.1", port, free_port(), directory / "own", files, access)
    return etcd.service(member, "etcd", 20.0).command.argv, access


def summary(times: list[float]) -> dict[str, float]:
    ms = sorted(t * 1000 for t in times)
    return {
        "n": len(ms),
        "p50_ms": round(statistics.median(ms), 3),
        "p99_ms": round(ms[int(0.99 * len(ms))], 3),
        "max_ms": round(ms[-1], 3),
    }


def measure(access: Access, puts: int) -> list[float]:
    store = Etcd(access)
    store.get("/b/ready", retry=20.0)
    arrived, standing = threading.Event(), threading.Event()
    when = [0.0]

    def change(_: object) -> None:
        when[0] = time.perf_counter()
        arrived.set()

    watch = Watch(store, [prefix("/b/")], lambda _: None, change, lambda reason: reason is None and standing.set())
    watch.start()
    standing.wait(20)
    times = []
    for number in range(puts):
        arrived.clear()
        begun = time.perf_counter()
        store.put("/b/key", str(number).encode())
        if not arrived.wait(5):
            raise TimeoutError(f"put {number} was never seen")
        times.append(when[0] - begun)
    watch.stop()
    store.close()
    return times


if __name__ == "__main__":
    stoppable(main)
