"""From a rank's death on one node to the last process of its cohort dead on every node, and where the time goes.

    python -m bench.fence [--kills 200] [--nodes 4] [--plain-etcd]
    python -m bench.fence [--kills 200] [--nodes 4] --groups 1 4

With `--groups` one run after another of so many groups that share the nodes out evenly, and it is the last group whose
ranks are killed; where that has one node, a worker process of its rank. To fence-groups.json.

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
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from bench.failover import summary
from bench.machine import machine
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

#: Slots of a group in tags (`Layout.slot`).
SLOTS = 10


class Seen:
    """When the word of a life's end came by: life -> Unix seconds."""

    def __init__(self) -> None:
        self.times: dict[tuple[int, int], float] = {}

    def __call__(self, change: Change) -> None:
        if change.value is not None:
            record = EndedRecord.decode(change.value)
            self.times[record.cohort_id, record.incarnation] = time.time()


@dataclass(frozen=True)
class Victim:
    """The group whose ranks are killed, and the nodes of the run that it has. Without a name, a run without groups."""

    nodes: tuple[int, ...]
    name: str = ""
    index: int = 0

    def shown(self, status: dict[str, Any]) -> dict[str, Any]:
        """The group in what status says of the run."""
        found: dict[str, Any] = next(g for g in status["groups"] if g["name"] == self.name) if self.name else status
        return found

    def remote(self, number: int) -> int:
        """The node of the `number`-th kill: not the group's first, where it has another."""
        return self.nodes[1:][number % (len(self.nodes) - 1)] if len(self.nodes) > 1 else self.nodes[0]


def kill_one(run: LabRun, victim: Victim, node_rank: int, agents: list[int]) -> dict[str, Any]:
    """Kill the primary's rank on a node; returns when, and when each other process of the cohort was dead.

    With `agents` it is the floor: those are stopped meanwhile, and all ranks are killed from here at once.
    """
    group = victim.shown(run.wait_full())
    primary = group["primary"]
    life = group["cohorts"][primary]["incarnation"]
    found = proc.tagged(f"{run.run}/{SLOTS * victim.index + primary}/{life}")
    fds = {os.pidfd_open(info.pid): tag.rpartition("/")[2] for info, tag in found}
    alone = len(victim.nodes) == 1 and not agents
    groups = {info.pgid for info, tag in found if agents or tag.endswith(f"/{node_rank}")}
    worker = next(info.pid for info, _ in found if info.pid != info.pgid) if alone else 0
    for agent in agents:
        os.kill(agent, signal.SIGSTOP)
    poller = select.poll()
    for fd in fds:
        poller.register(fd, select.POLLIN)
    begun = time.time()
    if alone:
        os.kill(worker, signal.SIGKILL)
    for pgid in set() if alone else groups:
        os.killpg(pgid, signal.SIGKILL)
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


def split(kill: dict[str, Any], events: list[dict[str, Any]], seen: Seen, victim: Victim) -> dict[str, float]:
    """Where the time of one kill went, in seconds. Of a group on one node nobody else has to be told."""
    life, node_rank = kill["life"], kill["node_rank"]
    mine = [e for e in events if (e.get("group", ""), e["cohort_id"], e["incarnation"]) == (victim.name, *life)]
    noticed = next(e["time"] for e in mine if e["kind"] == "exit" and e["node_rank"] == node_rank)
    kills = [e["time"] for e in mine if e["kind"] == "kill" and e["node_rank"] != node_rank]
    put = seen.times[life]
    if not kills:
        return {
            "noticed": noticed - kill["killed"],
            "put_and_watch": put - noticed,
            "total": max(kill["dead"].values()) - kill["killed"],
        }
    return {
        "noticed": noticed - kill["killed"],
        "put_and_watch": put - noticed,
        "watch_to_last_kill": max(kills) - put,
        "last_kill_to_last_death": max(kill["dead"].values()) - max(kills),
        "total": max(kill["dead"].values()) - kill["killed"],
    }


def of(groups: int, nodes: int) -> tuple[Victim, list[str]]:
    """The last of so many groups on so many nodes, and how `up` is told of them; of 0 it is not."""
    if not groups:
        return Victim(tuple(range(nodes))), []
    size = nodes // groups
    flags = ["--virtual-gpus", "2", "--tp", str(2 * size)]  # as many processes a node however it is shared out
    if groups == 1:
        return Victim(tuple(range(nodes))), flags
    flags += ["--groups", str(groups)]
    return Victim(tuple(range(nodes - size, nodes)), f"g{groups - 1}", groups - 1), flags


def measure(kills: int, nodes: int, plain: bool = False, groups: int = 0) -> dict[str, Any]:
    seen = Seen()
    victim, flags = of(groups, nodes)
    part = f"group/{victim.name}/" if victim.name else ""
    with (
        tempfile.TemporaryDirectory(prefix="bench-") as name,
        tempfile.TemporaryDirectory(dir="/dev/shm") as data,
        Lab(nodes=nodes, slurm=False) as lab,
        contextlib.ExitStack() as stack,
    ):
        model, leader = Path(name) / "model", lab.node(lab.names[0])
        make(model, 8)
        if groups > 1:  # Dynamo's frontend takes answers at the address of the default route, where there is IPv6 too
            leader.run(["ip", "route", "add", "default", "via", f"{lab.net}.254"], check=True)
        etcds = [stack.enter_context(PlainEtcd(Path(data), leader.address, leader.popen))] if plain else []
        with LabRun(lab, model, *flags, *(f"--etcd-endpoints={one.url}" for one in etcds)).hand() as run:
            etcd = Etcd(RunDir(run.home).credentials().access(tuple(run.run_file()["etcd_endpoints"])))
            watch = Watch(etcd, [prefix(f"/gms-launch/{run.run}/{part}ended/")], lambda _: None, seen)
            watch.start()
            mine = [node for k, node in enumerate(lab.nodes.values()) if k in victim.nodes]
            agents = [p for node in mine for p in node.pids("gms-launch")]
            found, floor = [], []
            for k in range(kills):
                found.append(kill_one(run, victim, victim.remote(k), []))
                if k % 4 == 3 or k == kills - 1 < 3:  # one at least
                    floor.append(kill_one(run, victim, victim.nodes[0], agents))
            run.wait_full()
            watch.stop()
            events = run.events()
            etcd.close()
    splits = [split(k, events, seen, victim) for k in found]
    floors = [max(k["dead"].values()) - k["killed"] for k in floor]
    to_last_kill = [s["total"] - s[last] for s in splits if (last := "last_kill_to_last_death") in s]
    return {
        "command": " ".join([Path(sys.executable).name, "-m", "bench.fence", *sys.argv[1:]]),
        "machine": machine(),
        "versions": {n: metadata.version(n) for n in ("ai-dynamo", "etcd3", "protobuf", "grpcio")}
        | {"python": platform.python_version()},
        "nodes": nodes,
        "groups": groups or 1,
        "etcd": "plain" if plain else "TLS",
        "kill_to_last_death": summary([s["total"] for s in splits]),
        "floor_all_killed_at_once_by_hand": summary(floors),
        **({"kill_to_last_kill_sent": summary(to_last_kill)} if to_last_kill else {}),
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
    parser.add_argument("--groups", type=int, nargs="+", help="runs of so many groups, one after another")
    options = parser.parse_args()
    if options.groups:
        results: list[dict[str, Any]] = []
        for groups in options.groups:
            results.append(one := measure(options.kills, options.nodes, options.plain_etcd, groups))
            (Path(__file__).with_name("results") / "fence-groups.json").write_text(json.dumps(results, indent=1) + "\n")
            print(json.dumps({k: v for k, v in one.items() if k != "raw"}, indent=1), flush=True)
        return
    result = measure(options.kills, options.nodes, options.plain_etcd)
    out = Path(__file__).with_name("results") / f"fence{'-plain' * options.plain_etcd}.json"
    out.write_text(json.dumps(result, indent=1) + "\n")
    result.pop("raw")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    stoppable(main)
