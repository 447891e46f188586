"""What the launcher costs: the agent at rest and under load, and a request with and without it.

    python -m bench.overhead [--minutes 10] [--requests 2000]

The agent's memory and processor time are the kernel's (/proc), guard and threads included, engines and
services not. Latency is of one-token completions through the frontend, in turns of 50: once to a deployment under
gms-launch, once to the same processes started by hand (bench/bare.py), so that both see the same noise.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from bench.bare import BareStack, complete
from bench.failover import Launched, percentile
from bench.machine import machine
from bench.stopping import stoppable
from gms_launch.engines.reference.demo_model import make
from gms_launch.process import proc

TICK = os.sysconf("SC_CLK_TCK")


def processor_time(pids: list[int]) -> float:
    """Seconds of processor time that the processes have used, in user and kernel mode."""
    total = 0
    for pid in pids:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        total += int(fields[11]) + int(fields[12])
    return total / TICK


def resident(pid: int) -> float:
    """MiB."""
    (line,) = [x for x in Path(f"/proc/{pid}/status").read_text().splitlines() if x.startswith("VmRSS")]
    return int(line.split()[1]) / 1024


def share(pids: list[int], seconds: float) -> float:
    """Percent of one core over a while."""
    begun, used = time.monotonic(), processor_time(pids)
    time.sleep(seconds)
    return 100 * (processor_time(pids) - used) / (time.monotonic() - begun)


def ask(port: int, model: str) -> float:
    begun = time.perf_counter()
    assert complete(port, model) is not None
    return time.perf_counter() - begun


def load(port: int, model: str, stop: threading.Event) -> None:
    while not stop.is_set():
        complete(port, model, tokens=16)


def measure(minutes: float, requests: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="overhead-") as name:
        model, home = Path(name) / "model", Path(name) / "home"
        make(model, 64)
        launched = Launched(model, home)
        try:
            launched.wait_full()
            agent = int(json.loads((home / launched.name / "run.json").read_text())["agent_pid"])
            guards = [p for p in proc.children(agent) if "guard" in proc.command_line(p)]
            own = [agent, *guards]
            time.sleep(5.0)
            at_first, idle = resident(agent), share(own, 60 * minutes)
            at_last = resident(agent)
            stop = threading.Event()
            users = [threading.Thread(target=load, args=(launched.port, str(model), stop)) for _ in range(8)]
            for user in users:
                user.start()
            loaded = share(own, 60)
            stop.set()
            for user in users:
                user.join()
            with_it: list[float] = []
            without: list[float] = []
            with BareStack(model) as bare:
                for _ in range(requests // 50):
                    with_it += [ask(launched.port, str(model)) for _ in range(50)]
                    without += [ask(bare.port, str(model)) for _ in range(50)]
        finally:
            launched.down()
    return {
        "command": " ".join(["python", "-m", "bench.overhead", *sys.argv[1:]]),
        "machine": machine(),
        "agent_resident_mib": {"after_start": round(at_first, 1), "after_idling": round(at_last, 1)},
        "agent_and_guard_percent_of_a_core": {"idle": round(idle, 3), "under_load": round(loaded, 3)},
        "idle_minutes": minutes,
        "one_token_ms": {
            "with": {"p50": ms(with_it, 0.5), "p99": ms(with_it, 0.99)},
            "without": {"p50": ms(without, 0.5), "p99": ms(without, 0.99)},
            "ratio_p50": round(statistics.median(with_it) / statistics.median(without), 3),
        },
        "requests": requests,
    }


def ms(values: list[float], at: float) -> float:
    return round(1000 * percentile(values, at), 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("results") / "overhead.json")
    options = parser.parse_args()
    result = measure(options.minutes, options.requests)
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    stoppable(main)
