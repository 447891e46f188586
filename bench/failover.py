"""Failover latency with the launcher, beside the floor in the same run.

    python -m bench.failover [--kills 50] [--mib 64] [--plain-etcd]

The floor is the same engine with nobody supervising it (bench/bare.py): the group is SIGKILLed from outside and the
first token awaited. Launcher and floor take turns in blocks, on one machine, so that both see the same noise. The
client polls with one-token requests; times are from the kill to the first token at the client, and for the steps
between from the launcher's own timeline.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path
from typing import Any

from bench.bare import BareStack, free_port, wait_for_text
from bench.machine import machine
from bench.plain import PlainEtcd
from bench.stopping import stoppable
from gms_launch.engines.reference.demo_model import make

STEPS = ("detected", "dead", "lock", "awake", "registered", "first_token", "fenced", "rearmed")


def percentile(values: list[float], share: float) -> float:
    """Nearest-rank percentile."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def summary(values: list[float]) -> dict[str, float]:
    """Milliseconds: p50, p99, least and most."""
    ms = [v * 1000 for v in values]
    return {
        "n": len(ms),
        "p50_ms": round(statistics.median(ms), 1),
        "p99_ms": round(percentile(ms, 0.99), 1),
        "min_ms": round(min(ms), 1),
        "max_ms": round(max(ms), 1),
    }


class Launched:
    """A deployment under the launcher."""

    def __init__(self, model: Path, home: Path, *extra: str, run: str = "", **environ: str) -> None:
        self.model, self.home = model, home
        self.name = run or f"bench-{os.getpid()}"  # two may run on one machine
        self.port = free_port()
        self.env = os.environ | {"GMS_LAUNCH_HOME": str(home), **environ}
        flags = [*extra, "--engine", "reference", "--model", str(model), "--frontend-port", str(self.port)]
        try:
            self.run("up", "-d", "--run-id", self.name, *flags)
        except BaseException:
            self.down()
            raise

    def run(self, *args: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "gms_launch", *args], env=self.env, capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise RuntimeError(f"{args}: {done.stdout}{done.stderr}")
        return done.stdout

    def status(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.run("status", "--run", self.name, "--json"))
        return found

    def wait_full(self) -> dict[str, Any]:
        while (found := self.status())["redundancy"] != "full":
            time.sleep(0.05)
        return found

    def failover(self) -> float:
        """Kill the primary's group as a fault would; returns seconds to the first token. Waits for redundancy."""
        status = self.wait_full()
        pgid = status["cohorts"][status["primary"]]["ranks"][0]["pgid"]
        begun = time.perf_counter()
        os.killpg(pgid, signal.SIGKILL)
        first, _ = wait_for_text(self.port, str(self.model), 60)
        self.wait_full()
        return first - begun

    def failovers(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = json.loads(self.run("timeline", "--run", self.name, "--json"))["failovers"]
        return found

    def resident(self) -> float:
        """Of the agent (MiB)."""
        pid = json.loads((self.home / self.name / "run.json").read_text())["agent_pid"]
        (line,) = [x for x in Path(f"/proc/{pid}/status").read_text().splitlines() if x.startswith("VmRSS")]
        return round(int(line.split()[1]) / 1024, 1)

    def down(self) -> None:
        subprocess.run(
            [sys.executable, "-m", "gms_launch", "down", "--run", self.name],
            env=self.env,
            capture_output=True,
            check=False,
        )


def measure(kills: int, mib: int, plain: bool = False, block: int = 10) -> dict[str, Any]:
    launched_times: list[float] = []
    floor_times: list[float] = []
    with (
        tempfile.TemporaryDirectory(prefix="bench-") as name,
        tempfile.TemporaryDirectory(dir="/dev/shm") as data,
        contextlib.ExitStack() as stack,
    ):
        model, home = Path(name) / "model", Path(name) / "home"
        make(model, mib)
        more = ["--etcd-endpoints", stack.enter_context(PlainEtcd(Path(data))).url] if plain else []
        launched = Launched(model, home, *more)
        try:
            with BareStack(model) as bare:
                while len(launched_times) < kills:
                    count = min(block, kills - len(launched_times))
                    launched_times += [launched.failover() for _ in range(count)]
                    floor_times += [bare.failover() for _ in range(count)]
            failovers = launched.failovers()
            memory = launched.resident()
        finally:
            launched.down()
    steps = {s: summary([f["steps"][s] for f in failovers if s in f["steps"]]) for s in STEPS}
    return {
        "command": " ".join([Path(sys.executable).name, "-m", "bench.failover", *sys.argv[1:]]),
        "machine": machine(),
        "versions": {n: metadata.version(n) for n in ("ai-dynamo", "etcd3", "protobuf", "grpcio")}
        | {"python": platform.python_version()},
        "weights_mib": mib,
        "etcd": "plain" if plain else "TLS",
        "agent_resident_mib": memory,
        "first_token_at_client": {"launcher": summary(launched_times), "floor": summary(floor_times)},
        "ratio_p50": round(statistics.median(launched_times) / statistics.median(floor_times), 3),
        "ratio_p99": round(percentile(launched_times, 0.99) / percentile(floor_times, 0.99), 3),
        "steps_after_fault": steps,
        "raw": {
            "launcher_s": [round(t, 5) for t in launched_times],
            "floor_s": [round(t, 5) for t in floor_times],
            "steps": [f["steps"] for f in failovers],
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--mib", type=int, default=64)
    parser.add_argument("--plain-etcd", action="store_true", help="an etcd without TLS; to failover-plain.json")
    options = parser.parse_args()
    result = measure(options.kills, options.mib, options.plain_etcd)
    out = Path(__file__).with_name("results") / f"failover{'-plain' * options.plain_etcd}.json"
    out.parent.mkdir(exist_ok=True)
    out.write_text(json.dumps(result, indent=1) + "\n")
    result.pop("raw")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    stoppable(main)
