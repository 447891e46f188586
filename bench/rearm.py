"""How long a shadow takes to be back, with and without a warm slot.

    python -m bench.rearm [--kills 10] [--imports transformers]

The reference engine imports the modules of --imports when it starts, for real: a stand-in for what vLLM costs. Both
deployments run at the same time and take turns, so that both see the same noise; the next kill waits until redundancy
is full and the warm slot is ready. Times are the timeline's, from the fence of the dead life to the parked new one.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from bench.failover import Launched, summary
from bench.machine import machine
from bench.stopping import stoppable
from gms_launch.engines.reference.demo_model import make

KINDS = {"cold": 0, "warm": 1}


def wait_ready(run: Launched, timeout: float = 120.0) -> None:
    """Until the slots of a run wait to be taken."""
    deadline = time.monotonic() + timeout
    while slots := [s for s in run.wait_full()["nodes"][0]["services"] if s["name"].startswith("warm-")]:
        if all(s["state"] == "ready" for s in slots):
            return
        if time.monotonic() > deadline:
            raise RuntimeError(f"the warm slots are not ready within {timeout:g} s: {slots}")
        time.sleep(0.1)


def measure(kills: int, imports: str) -> dict[str, Any]:
    runs: dict[str, Launched] = {}
    with tempfile.TemporaryDirectory(prefix="rearm-") as name:
        model = Path(name) / "model"
        make(model, 64)
        try:
            for kind, slots in KINDS.items():
                flags = ("--warm-slots", str(slots))
                runs[kind] = Launched(
                    model, Path(name) / kind, *flags, run=f"rearm-{kind}-{os.getpid()}", REFERENCE_IMPORTS=imports
                )
            for _ in range(kills):
                for run in runs.values():
                    wait_ready(run)
                    run.failover()
            found = {kind: run.failovers() for kind, run in runs.items()}
            started = {kind: warm_starts(run) for kind, run in runs.items()}
        finally:
            for run in runs.values():
                run.down()
    steps = {kind: [f["steps"] for f in failovers if "rearmed" in f["steps"]] for kind, failovers in found.items()}
    times = {kind: [s["rearmed"] - s["fenced"] for s in some] for kind, some in steps.items()}
    return {
        "command": " ".join(["python", "-m", "bench.rearm", *sys.argv[1:]]),
        "machine": machine(),
        "imports": imports,
        "import_alone_s": round(import_time(imports), 2),
        "fenced_to_parked": {kind: summary(some) for kind, some in times.items()},
        "started_from_a_warm_slot": started,
        "saved_p50_s": round(statistics.median(times["cold"]) - statistics.median(times["warm"]), 2),
    }


def warm_starts(run: Launched) -> int:
    lines = (run.home / run.name / "events.jsonl").read_text().splitlines()
    events = [json.loads(line) for line in lines]
    return sum(e["kind"] == "started" and e["detail"].startswith("from a warm slot") for e in events)


def import_time(imports: str) -> float:
    """What a fresh interpreter takes to import them, without its own start; the best of three (seconds)."""
    code = f"import time; t = time.perf_counter(); import {imports}; print(time.perf_counter() - t)"
    return min(float(subprocess.check_output([sys.executable, "-c", code])) for _ in range(3))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--imports", default="transformers")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("results") / "rearm.json")
    options = parser.parse_args()
    result = measure(options.kills, options.imports)
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    stoppable(main)
