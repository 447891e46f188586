"""From a rank's death on one node to the last process of its cohort dead on every node, and where the time goes.

    python -m bench.fence [--kills 200] [--nodes 4] [--plain-etcd]

Nodes are network namespaces of this machine (tests/slurm/lab.py), each with an agent of one run. A remote rank of the
primary is SIGKILLed, in turns. Deaths are seen from outside, through pidfds of all processes of the cohort, so the
figure does not rest on what the agents say; the split does: exit and kill times are from the run's events, all by
one clock. `put_and_watch` ends when a watch of the bench's own hears that the life has ended. After every fourth
kill comes one for the floor: all ranks killed from outside at once, with the agents stopped, so that nothing but the
dying itself is measured.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import select
import signal
import statistics
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path
from typing import Any

from bench.failover import summary
from bench.plain import PlainEtcd
from bench.stopping import stoppable
from gms_launch.cohort.records import EndedRecord
from gms_launch.control.client import Etcd
from gms_launch.control.keys import prefix
from gms_launch.control.watch import Change, Watch
from gms_launch.engines.reference.demo_model import make
from gms_launch.process import proc
from gms_launch.run.rundir import RunDir
from tests.slurm.lab import Lab
from tests.slurm.support import LabRun


class Seen:
    """When the word of a life's end came by: life -> Unix seconds."""

    def __init__(self) -> None:
        self.times: dict[tuple[int, int], float] = {}

    def __call__(self, change: Change) -> None:
        if change.value is not None:
            record = EndedRecord.decode(change.value)
            self.times[record.cohort_id, record.incarnation] = time.time()


def kill_one(run: LabRun, node_rank: int, agents: list[int]) -> dict[str, Any]:
    """Kill the primary's rank on a node; returns when, and when each other process of the cohort was dead.

    With `agents` it is the floor: those are stopped meanwhile, and all ranks are killed from here at once.
    """
    primary = run.wait_full()["primary"]
    life = run.life(primary)
    found = proc.tagged(f"{run.run}/{primary}/{life}")
    fds = {os.pidfd_open(info.pid): tag.rpartition("/")[2] for info, tag in found}
    groups = {info.pgid for info, tag in found if agents or tag.endswith(f"/{node_rank}")}
    for agent in agents:
        os.kill(agent, signal.SIGSTOP)
    poller = select.poll()
    for fd in fds:
        poller.register(fd, select.POLLIN)
    begun = time.time()
    for group in groups:
        os.killpg(group, signal.SIGKILL)
    last: dict[str, float] = {}
    pending = set(fds)
    while pending:
        for fd, _ in poller.poll():
            last[fds[fd]] = time.time()
            poller.unregister(fd)
            pending.discard(fd)
    for fd in fds:
        os.close(fd)
    for agent in agents:
        os.kill(agent, signal.SIGCONT)
    for entered in run.processes if agents else ():
        os.killpg(entered.pid, signal.SIGCONT)  # nsenter stops itself when its child is stopped, and would not end
    return {"life": (primary, life), "node_rank": node_rank, "killed": begun, "dead": last}


def split(kill: dict[str, Any], events: list[dict[str, Any]], seen: Seen) -> dict[str, float]:
    """Where the time of one kill went, in seconds."""
    life, node_rank = kill["life"], kill["node_rank"]
    mine = [e for e in events if (e["cohort_id"], e["incarnation"]) == life]
    noticed = next(e["time"] for e in mine if e["kind"] == "exit" and e["node_rank"] == node_rank)
    kills = [e["time"] for e in mine if e["kind"] == "kill" and e["node_rank"] != node_rank]
    put = seen.times[life]
    return {
        "noticed": noticed - kill["killed"],
        "put_and_watch": put - noticed,
        "watch_to_last_kill": max(kills) - put,
        "last_kill_to_last_death": max(kill["dead"].values()) - max(kills),
        "total": max(kill["dead"].values()) - kill["killed"],
    }


def measure(kills: int, nodes: int, plain: bool = False) -> dict[str, Any]:
    seen = Seen()
    with (
        tempfile.TemporaryDirectory(prefix="bench-") as name,
        tempfile.TemporaryDirectory(dir="/dev/shm") as data,
        Lab(nodes=nodes, slurm=False) as lab,
        contextlib.ExitStack() as stack,
    ):
        model, leader = Path(name) / "model", lab.node(lab.names[0])
        make(model, 8)
        etcds = [stack.enter_context(PlainEtcd(Path(data), leader.address, leader.popen))] if plain else []
        with LabRun(lab, model, *(f"--etcd-endpoints={one.url}" for one in etcds)).hand() as run:
            etcd = Etcd(RunDir(run.home).credentials().access(tuple(run.run_file()["etcd_endpoints"])))
            watch = Watch(etcd, [prefix(f"/gms-launch/{run.run}/ended/")], lambda _: None, seen)
            watch.start()
            agents = [p for node in lab.nodes.values() for p in node.pids("gms-launch")]
            found, floor = [], []
            for k in range(kills):
                found.append(kill_one(run, 1 + k % (nodes - 1), []))
                if k % 4 == 3:
                    floor.append(kill_one(run, 0, agents))
            run.wait_full()
            watch.stop()
            events = run.events()
            etcd.close()
    splits = [split(k, events, seen) for k in found]
    floors = [max(k["dead"].values()) - k["killed"] for k in floor]
    to_last_kill = [s["total"] - s["last_kill_to_last_death"] for s in splits]
    return {
        "command": " ".join([Path(sys.executable).name, "-m", "bench.fence", *sys.argv[1:]]),
        "machine": f"{os.cpu_count()} cores, {platform.platform()}",
        "versions": {n: metadata.version(n) for n in ("ai-dynamo", "etcd3", "protobuf", "grpcio")}
        | {"python": platform.python_version()},
        "nodes": nodes,
        "etcd": "plain" if plain else "TLS",
        "kill_to_last_death": summary([s["total"] for s in splits]),
        "floor_all_killed_at_once_by_hand": summary(floors),
        "kill_to_last_kill_sent": summary(to_last_kill),
        "ratio_p50": round(statistics.median(s["total"] for s in splits) / statistics.median(floors), 2),
        "split": {name: summary([s[name] for s in splits]) for name in splits[0] if name != "total"},
        "median_share": {name: round(statistics.median(s[name] / s["total"] for s in splits), 2) for name in splits[0]},
        "raw": {
            "kills_s": [{k: round(v, 5) for k, v in s.items()} for s in splits],
            "floor_s": [round(v, 5) for v in floors],
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--nodes", type=int, default=4)
    parser.add_argument("--plain-etcd", action="store_true", help="an etcd without TLS; to fence-plain.json")
    options = parser.parse_args()
    result = measure(options.kills, options.nodes, options.plain_etcd)
    out = Path(__file__).with_name("results") / f"fence{'-plain' * options.plain_etcd}.json"
    out.write_text(json.dumps(result, indent=1) + "\n")
    result.pop("raw")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    stoppable(main)
