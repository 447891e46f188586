"""One real etcd and many real agents' lines to it: how soon all hear of a write, what it takes, and a herd of starts.

    python -m bench.watchers [--agents 64 256] [--groups 1 32] [--processes 0]

Each of the agents comes as one does: it asks for the run over a connection of its own, then opens a line (TLS, a lease
that is renewed, the run's and its own group's ranges of keys), takes its place and reads what is there, as `Session`
does. They are real threads and connections, in as many processes as there are processors for them; etcd is started as
a run starts it. Three things are measured:

- all come in one moment, and again spread over time as a run spreads them (`cohort.arrival`);
- what etcd takes while they do nothing but renew their leases;
- a leader writes what it wants of its group (one key): from the start of the put to each agent's callback.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing as mp
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from bench.machine import machine
from bench.stopping import stoppable, whole
from bench.watch import of_a_run, summary
from gms_launch.cohort import arrival
from gms_launch.control.access import Access
from gms_launch.control.door import Door
from gms_launch.control.keys import Keys, Share, followed
from gms_launch.control.link import ControlLink
from gms_launch.node.session import ROLES

RUN, COHORTS, LEASE = "w", 2, 5.0
#: Writes that are timed, and the pause between two (seconds).
PUTS, PAUSE = 100, 0.05
#: How long etcd is watched while nothing happens (seconds).
REST = 10.0
#: How long all agents may take to come (seconds).
COMING = 120.0


def group_of(number: int, agents: int, groups: int) -> tuple[str, int]:
    """The group of an agent, and its place in it; no name where there is one group."""
    size = agents // groups
    return (f"g{number // size}" if groups > 1 else ""), number % size


class Line:
    """One agent as etcd sees it. `heard` are the times from the start of a put to its callback (seconds)."""

    def __init__(self, access: Access, number: int, agents: int, groups: int) -> None:
        self.access, self.number, self.agents = access, number, agents
        name, place = group_of(number, agents, groups)
        self.run, self.group = Keys(RUN), Keys(RUN, name)
        shares = [Share(self.group, place == 0, COHORTS)] if name else []
        self.ranges = followed(Share(self.run, number == 0, COHORTS), shares)
        self.heard: list[float] = []
        self.lost: list[str] = []
        self.standing = threading.Event()
        self.link: ControlLink | None = None

    def come(self) -> str:
        """Take a place; returns what went wrong, if anything did."""
        try:
            if self.number:
                door = Door(self.access, timeout=2.0)
                while True:  # as `rendezvous.find_leader`: until node_wait is over
                    with contextlib.suppress(Exception):
                        door.get_prefix(self.run.run)
                        door.clock_skew()
                        break
                    time.sleep(0.2)
                door.close()
            self.link = ControlLink(self.access, lambda call, *said: call(*said))
            self.link.connect(self.run, arrival.patience(self.agents, 20.0) if self.number else 20.0)
            if not self.number:
                self.link.establish(ROLES)
                self.link.put_now(self.run.run, b"run")
            else:
                self.link.get(self.run.run)
                self.link.get(self.run.node(0))
            holder = self.link.claim(self.run.node(self.number), b"x" * 600, LEASE)
            if holder is not None:
                return "its place is taken"
            self.link.listen(self.ranges, LEASE, self, None)
            return "" if self.standing.wait(COMING) else "no snapshot"
        except Exception as exc:
            return f"{type(exc).__name__}: {exc}"[:200]

    def control_snapshot(self, found: dict[str, bytes]) -> None:
        self.standing.set()

    def control_change(self, key: str, value: bytes | None) -> None:
        if value is not None and key.startswith(self.group.desired):
            self.heard.append(time.monotonic() - float(value))

    def control_state(self, reason: str | None) -> None:
        pass

    def lease_granted(self, lease: int) -> None:
        pass

    def lease_renewed(self, sent: float) -> None:
        pass

    def lease_lost(self, reason: str) -> None:
        self.lost.append(reason)

    def instances(self, found: dict[str, bytes]) -> None:
        pass


def worker(access: Access, mine: list[int], agents: int, groups: int, spread: bool, line: Connection) -> None:
    """A process with some of the agents. Says how they came, and then what they heard."""
    lines = [Line(access, number, agents, groups) for number in mine]
    line.send("ready")
    begin = line.recv()
    came: dict[int, tuple[float, str]] = {}

    def come(one: Line) -> None:
        pause = arrival.pause(one.number, agents) if spread else 0.0
        time.sleep(max(0.0, begin + pause - time.monotonic()))
        since = time.monotonic()
        problem = one.come()
        came[one.number] = (time.monotonic() - since, problem)

    threads = [threading.Thread(target=come, args=(one,), daemon=True) for one in lines]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    line.send((time.monotonic() - begin, came))
    line.recv()
    line.send(([t for one in lines for t in one.heard], [reason for one in lines for reason in one.lost]))
    line.recv()
    for one in lines:
        if one.link is not None:
            threading.Thread(target=one.link.close, args=(1.0,), daemon=True).start()
    time.sleep(1.0)
    os._exit(0)  # hundreds of threads of grpc's are not waited for one by one


def used(pid: int) -> tuple[float, float]:
    """Seconds of a processor that a process has had, and MiB that it has in memory."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    ticks = int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK"), int(fields[21]) * os.sysconf("SC_PAGE_SIZE") / 2**20


@contextlib.contextmanager
def an_etcd() -> Iterator[tuple[int, Access]]:
    """A new one, as a run starts it: its pid, and how to reach it."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as name:
        argv, access = of_a_run(Path(name))
        server = subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            yield server.pid, access
        finally:
            server.kill()
            server.wait()


def measure(agents: int, groups: int, processes: int, spread: bool) -> dict[str, Any]:
    """All agents come, rest, and hear."""
    with an_etcd() as (pid, access):
        leader = Line(access, 0, agents, groups)
        problem = leader.come()
        assert not problem and leader.link is not None, problem
        begun_with = used(pid)
        context = mp.get_context("spawn")
        lines, workers = [], []
        for k in range(processes):
            here, there = context.Pipe()
            mine = list(range(1 + k, agents, processes))
            workers.append(context.Process(target=worker, args=(access, mine, agents, groups, spread, there)))
            workers[-1].start()
            lines.append(here)
        for line in lines:
            line.recv()
        begin = time.monotonic() + 0.5
        for line in lines:
            line.send(begin)
        # What a leader does meanwhile must not wait: the puts of one that is at work.
        puts: list[float] = []
        while not all(line.poll() for line in lines):
            since = time.monotonic()
            leader.link.put_now(leader.run.refusal("bench"), b"x")
            puts.append(time.monotonic() - since)
            time.sleep(0.05)
        answers = [line.recv() for line in lines]
        came = {number: how for _, some in answers for number, how in some.items()}
        after = used(pid)
        row: dict[str, Any] = {
            "agents": agents,
            "groups": groups,
            "spread": spread,
            "all_came_after_s": round(max(took for took, _ in answers), 2),
            "an_agent_came_in": summary([took for took, _ in came.values()]),
            "did_not_come": sum(bool(problem) for _, problem in came.values()),
            "why": sorted({problem for _, problem in came.values() if problem})[:5],
            "a_leaders_put_meanwhile": summary(puts),
            "etcd_cpu_s_for_the_start": round(after[0] - begun_with[0], 2),
        }
        before, since = used(pid), time.monotonic()
        time.sleep(REST)
        rest = used(pid)
        row["etcd_at_rest_percent_of_a_core"] = round(100 * (rest[0] - before[0]) / (time.monotonic() - since), 1)
        row["etcd_memory_mib"] = round(rest[1])
        before = used(pid)
        for _ in range(PUTS):
            leader.link.put_now(leader.group.cohort(0), str(time.monotonic()).encode())
            time.sleep(PAUSE)
        time.sleep(2.0)
        for line in lines:
            line.send("what was heard")
        told = [line.recv() for line in lines]
        heard = [t for some, _ in told for t in some]
        row["put_to_heard"] = summary(heard)
        row["heard_by_each_put"] = round(len(heard) / PUTS, 2)
        quiet = row["etcd_at_rest_percent_of_a_core"] / 100 * (PUTS * PAUSE + 2.0)
        row["etcd_cpu_ms_a_put"] = round(1000 * max(0.0, used(pid)[0] - before[0] - quiet) / PUTS, 2)
        row["leases_lost"] = sum(len(lost) for _, lost in told) + len(leader.lost)
        for line in lines:
            line.send("end")
        for one in workers:
            one.join(20)
        leader.link.close(1.0)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--agents", type=int, nargs="+", default=[64, 256])
    parser.add_argument("--groups", type=int, nargs="+", default=[1, 32])
    parser.add_argument(
        "--processes", type=int, default=0, help="for the agents; default: the processors of this machine"
    )
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("results") / "watchers.json")
    options = parser.parse_args()
    rows = []
    for agents in options.agents:
        for groups in options.groups:
            for spread in (False, True) if agents > arrival.AT_ONCE else (False,):
                rows.append(measure(agents, groups, options.processes or len(os.sched_getaffinity(0)), spread))
                print(json.dumps(rows[-1], indent=1), flush=True)
    result = {
        "command": " ".join([Path(sys.executable).name, "-m", "bench.watchers", *sys.argv[1:]]),
        "machine": machine(),
        "rows": rows,
    }
    whole(options.out, json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    stoppable(main)
