"""Two nodes of one run on one machine, TP=2, with GPU memory: a remote rank killed again and again.

    python -m bench.gpu.two_nodes [--gib 8] [--kills 20]

Two agents by hand (NODE_RANK, NNODES, LEADER_ADDR), each with a GMS of its own and one worker of every cohort. With two
GPUs each node gets one; with one GPU both use it, side by side. The text before and after must be the same.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from bench.bare import complete, free_port, wait_for_text
from bench.failover import STEPS, summary
from bench.gpu.failover import make_model
from bench.machine import machine
from bench.stopping import stoppable
from gms_launch.gms import gpus
from gms_launch.process import proc
from gms_launch.run import topology

RUN = "two"


def cli(env: dict[str, str], *args: str) -> str:
    argv = [sys.executable, "-m", "gms_launch", *args]
    done = subprocess.run(argv, env=env, capture_output=True, text=True, check=False)
    return done.stdout if done.returncode == 0 else ""


def wait_full(env: dict[str, str]) -> dict[str, Any]:
    deadline = time.monotonic() + 180
    while time.monotonic() < deadline:
        out = cli(env, "status", "--run", RUN, "--json")
        if out and (found := json.loads(out))["redundancy"] == "full":
            return dict(found)
        time.sleep(0.1)
    raise TimeoutError("redundancy is not full")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--gib", type=int, default=8)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--place", type=Path, default=Path("/dev/shm"))
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "results" / "gpu-two-nodes.json")
    options = parser.parse_args()
    found = gpus.look()
    outside = [a for name, a in topology.addresses().items() if name != "lo"]
    if not found or not outside:
        sys.exit(f"needs a GPU and a network interface besides loopback; there are {len(found)} and {outside}")
    with tempfile.TemporaryDirectory(prefix="two-", dir=options.place) as name:
        place, port = Path(name), free_port()
        make_model(place / "model", options.gib)
        env = os.environ | {"GMS_LAUNCH_HOME": str(place / "home"), "REFERENCE_KV_MIB": "2048"}
        flags = ["--run-id", RUN, "--engine", "reference", "--gms-memory", "cuda", "--model", str(place / "model")]
        flags += ["--no-nats", "--frontend-port", str(port), "--frontend-host", "127.0.0.1"]
        agents = []
        try:
            for rank in range(2):
                own = {"NODE_RANK": str(rank), "NNODES": "2", "LEADER_ADDR": outside[0]}
                own["CUDA_VISIBLE_DEVICES"] = str(rank % len(found))
                argv = [sys.executable, "-m", "gms_launch", "up", *flags]
                agents.append(subprocess.Popen(argv, env=env | own, start_new_session=True))
            wait_full(env)
            text = complete(port, str(place / "model"), tokens=8)
            times, dead = [], []
            for _ in range(options.kills):
                status = wait_full(env)
                time.sleep(0.3)
                primary = status["primary"]
                tag = f"{RUN}/{primary}/{status['cohorts'][primary]['incarnation']}"
                (group,) = {i.pgid for i, _ in proc.tagged(tag, node_rank=1)}
                begun = time.perf_counter()
                os.killpg(group, signal.SIGKILL)
                first, _ = wait_for_text(port, str(place / "model"), 60)
                times.append(first - begun)
                dead.append(not proc.tagged(tag))
                assert complete(port, str(place / "model"), tokens=8) == text, "the text changed"
            status = wait_full(env)
            loads = [g["loads"] for n in status["nodes"] for g in n["gms"] if g["tag"] == "weights"]
            failovers = json.loads(cli(env, "timeline", "--run", RUN, "--json"))["failovers"]
            shown = cli(env, "status", "--run", RUN)
        finally:
            print(cli(env, "down", "--run", RUN))
            for agent in agents:
                agent.wait(30)
    result = {
        "command": " ".join(["python", "-m", "bench.gpu.two_nodes", *sys.argv[1:]]),
        "machine": machine(f"{len(found)} x {found[0].name}"),
        "weights_gib": options.gib,
        "first_token_at_client": summary(times),
        "whole_group_dead_by_the_first_token": f"{sum(dead)} of {len(dead)}",
        "loads_per_node": loads,
        "steps_after_fault": {s: summary([f["steps"][s] for f in failovers if s in f["steps"]]) for s in STEPS},
        "status": shown,
        "raw_s": [round(t, 5) for t in times],
    }
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    result.pop("raw_s")
    print(result.pop("status"))
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    stoppable(main)
