"""Failover on a GPU: kills under the launcher, the floor and a cold restart in the same run, and the checks.

    python -m bench.gpu.failover [--gib 2 16 64] [--kills 20] [--kv-mib 8192]

For each size: a model of random bytes is made; the bare stack (no launcher) starts cold, and its failovers are the
floor; then the launcher does the same. Checked on the way: the text before and after is the same; so is the weights'
checksum, computed by a third client of GMS; weights were read from disk once; a second engine costs no second copy.
Needs a GPU, etcd, and ai-dynamo; nothing from the network. bench/gpu/README.md says how to bring them.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from bench.bare import BareStack, complete, free_port, gpu_used, wait_for_text
from bench.failover import STEPS, percentile, summary
from bench.machine import machine
from bench.stopping import stoppable
from gms_launch.engines.reference import compute as computing
from gms_launch.engines.reference import weights
from gms_launch.engines.reference.demo_model import make
from gms_launch.gms import gpus
from gms_launch.gms.client import GmsClient
from gms_launch.gms.devices import real_devices, socket_path
from gms_launch.gms.protocol import LockType

GIB = 1 << 30
TENSOR = 512 << 20


def make_model(directory: Path, gib: int) -> None:
    """A model of `gib` GiB in tensors of 512 MiB, no two alike."""
    make(directory, 1)
    count = gib * GIB // TENSOR
    header: dict[str, Any] = {
        f"layer.{k:04d}": {"dtype": "U8", "shape": [TENSOR], "data_offsets": [k * TENSOR, (k + 1) * TENSOR]}
        for k in range(count)
    }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file = directory / "model.safetensors"
    with open(file, "wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        out.truncate(8 + len(text) + count * TENSOR)
    block = np.random.default_rng(gib).integers(0, 1 << 63, TENSOR // 8, dtype=np.uint64)
    data = np.memmap(file, dtype=np.uint8, mode="r+", offset=8 + len(text))

    def fill(k: int) -> None:
        data[k * TENSOR : (k + 1) * TENSOR] = (block ^ np.uint64(k * 0x9E3779B97F4A7C15 & (1 << 63) - 1)).view(np.uint8)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(fill, range(count)))


def checksum(directory: Path) -> int:
    """Of every byte of the weights in GMS, by a client of our own."""
    compute = computing.make("cuda", 0)
    client = GmsClient(socket_path(directory, real_devices()[0].uuid, "weights"), compute.mapper)
    client.connect(LockType.RO)
    client.import_all()
    found = weights.digest(compute, weights.shards(client))
    client.unmap_all()
    client.disconnect()
    return found


class Launched:
    """A deployment under the launcher."""

    def __init__(self, model: Path, home: Path) -> None:
        self.model, self.home, self.port = model, home, free_port()
        self.env = os.environ | {"GMS_LAUNCH_HOME": str(home)}
        flags = ["--engine", "reference", "--gms-memory", "cuda", "--model", str(model), "--no-nats"]
        try:
            self.run("up", "-d", "--run-id", "gpu", *flags, "--frontend-port", str(self.port))
        except BaseException:
            self.down()
            raise
        self.node_dir = Path(json.loads((home / "gpu" / "run.json").read_text())["node_dir"])

    def run(self, *args: str) -> str:
        argv = [sys.executable, "-m", "gms_launch", *args]
        done = subprocess.run(argv, env=self.env, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{args}: {done.stdout}{done.stderr}")
        return done.stdout

    def down(self) -> None:
        subprocess.run([sys.executable, "-m", "gms_launch", "down", "--run", "gpu"], env=self.env, check=False)

    def wait_full(self) -> dict[str, Any]:
        while True:
            found: dict[str, Any] = json.loads(self.run("status", "--run", "gpu", "--json"))
            if found["redundancy"] == "full":
                return found
            time.sleep(0.05)

    def failover(self) -> float:
        """SIGKILL the primary's group from outside; seconds to the first token at the client."""
        status = self.wait_full()
        time.sleep(0.3)  # the machine settles
        pgid = status["cohorts"][status["primary"]]["ranks"][0]["pgid"]
        begun = time.perf_counter()
        os.killpg(pgid, signal.SIGKILL)
        first, _ = wait_for_text(self.port, str(self.model), 60)
        return first - begun


def measure(gib: int, kills: int, place: Path) -> dict[str, Any]:
    model = place / "model"
    make_model(model, gib)
    name = str(model)
    before_all = gpu_used()
    with BareStack(model, "cuda", ready=600.0) as bare:
        text = complete(bare.port, name, tokens=8)
        floor = [bare.failover() for _ in range(kills)]
        cold, used = bare.cold_start, bare.used
        assert complete(bare.port, name, tokens=8) == text, "the bare stack's text changed"
    launched = Launched(model, place / "home")
    try:
        assert complete(launched.port, name, tokens=8) == text, "the launcher's engines give another text"
        sum_before = checksum(launched.node_dir)
        times = [launched.failover() for _ in range(kills)]
        status = launched.wait_full()
        assert complete(launched.port, name, tokens=8) == text, "the text changed"
        assert checksum(launched.node_dir) == sum_before, "the weights changed"
        (socket,) = [g for g in status["nodes"][0]["gms"] if g["tag"] == "weights"]
        assert socket["loads"] == 1, "weights were read more than once"
        failovers = json.loads(launched.run("timeline", "--run", "gpu", "--json"))["failovers"]
        shown = launched.run("status", "--run", "gpu")
        lines = (launched.home / "gpu" / "logs" / "node0").glob("cohort-*.log")
        loading = [x for f in lines for x in f.read_text().splitlines() if "Loading weights took" in x]
        events = [json.loads(x) for x in (launched.home / "gpu" / "events.jsonl").read_text().splitlines()]
    finally:
        launched.down()
        shutil.rmtree(place / "home", ignore_errors=True)
    copies = (used["and_shadow_parked"] - used["primary_serving"]) / GIB
    assert copies < max(1.5, 0.5 * gib), f"a parked shadow costs {copies:.2f} GiB"
    steps = {s: summary([f["steps"][s] for f in failovers if s in f["steps"]]) for s in STEPS}
    return {
        "weights_gib": gib,
        "allocations": socket["allocations"],
        "first_token_at_client": {"launcher": summary(times), "floor": summary(floor)},
        "ratio_p50": round(statistics.median(times) / statistics.median(floor), 3),
        "ratio_p99": round(percentile(times, 0.99) / percentile(floor, 0.99), 3),
        "launchers_own_share_p50_ms": round((statistics.median(times) - statistics.median(floor)) * 1000, 1),
        "cold_restart_s": round(cold, 2),
        "loading": [x.partition("INFO ")[2] for x in loading],
        "memory_gib": {k: round((v - before_all) / GIB, 2) for k, v in used.items()},
        "steps_after_fault": steps,
        "fence": [e["detail"] for e in events if e["kind"] == "fenced"][:kills],
        "checks": "same text, same checksum, one load from disk, one copy",
        "status": shown,
        "raw": {"launcher_s": [round(t, 5) for t in times], "floor_s": [round(t, 5) for t in floor]},
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--gib", type=int, nargs="+", default=[2, 16, 64])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--kv-mib", type=int, default=8192)
    parser.add_argument("--place", type=Path, default=Path("/dev/shm"), help="where models are made")
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "results" / "gpu-failover.json")
    options = parser.parse_args()
    missing = [b for b in ("etcd",) if shutil.which(b) is None]
    if missing or not real_devices():
        sys.exit(f"needs {', '.join(missing) or 'a GPU: ' + gpus.problem()}; see bench/gpu/README.md")
    os.environ["REFERENCE_KV_MIB"] = str(options.kv_mib)
    gpu = gpus.look()[0]
    result: dict[str, Any] = {
        "command": " ".join(["python", "-m", "bench.gpu.failover", *sys.argv[1:]]),
        "machine": machine(gpu.name),
        "versions": {n: metadata.version(n) for n in ("ai-dynamo", "cuda-bindings", "numpy")}
        | {"python": platform.python_version()},
        "kv_mib": options.kv_mib,
        "sizes": [],
    }
    for gib in options.gib:
        with tempfile.TemporaryDirectory(prefix="gpu-", dir=options.place) as place:
            found = measure(gib, options.kills, Path(place))
        result["sizes"].append(found)
        options.out.write_text(json.dumps(result, indent=1) + "\n")
        print(json.dumps({k: v for k, v in found.items() if k not in ("raw", "status", "fence")}, indent=1), flush=True)
        print(found["status"], *found["fence"][:3], sep="\n", flush=True)


if __name__ == "__main__":
    stoppable(main)
