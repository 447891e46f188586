"""A run over the lab's nodes, started as its users would start it, and looked at from outside.

This machine is the login node, and its pid namespace is the parent of every node's: `proc.tagged` here sees all
processes of all nodes, whatever the agents say.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

from gms_launch.process import lifecycle, proc
from tests.slurm.lab import Lab
from tests.support import (
    LONG,
    PATIENCE,
    STANDING,
    Looks,
    complete,
    eventually,
    glance,
    how_it_stands,
    journal,
    twice_full,
)

#: What tests need to be quick; everything else is as delivered. Not as quick as a quiet machine would allow.
QUICK = ["--lease-ttl=3", "--node-wait=15"]


class LabRun:
    """One run. `start` is how: by `srun`, or by `hand` with the recipe's variables. `closed`: who may come in is left
    as it is without a word.
    """

    closed = False

    def __init__(self, lab: Lab, model: Path, *flags: str, nodes: Sequence[str] | None = None, **environ: str) -> None:
        self.lab, self.model, self.flags, self.environ = lab, model, flags, environ
        self.run = "r" + uuid.uuid4().hex[:8]
        self.nodes = list(nodes or lab.names)
        self.log_path = lab.dir / f"{self.run}.out"
        self._log: IO[str] | None = None
        self.processes: list[subprocess.Popen[str]] = []

    @property
    def home(self) -> Path:
        return self.lab.dir / "home" / self.run

    def up(self, *more: str) -> list[str]:
        own = ["--engine", "reference", "--model", str(self.model), "--served-model-name", "tiny"]
        # Tests ask from the login node, which is another machine than the leader.
        door = [] if self.closed else ["--open-frontend"]
        return ["gms-launch", "up", "--run-id", self.run, *own, *door, *self.flags, *more]

    # -- starting and ending -------------------------------------------------------------------------------------

    def srun(self, *options: str, command: Sequence[str] | None = None) -> LabRun:
        argv = ["srun", f"-N{len(self.nodes)}", "-w", ",".join(self.nodes), "--ntasks-per-node=1", "-K1", *options]
        self._log = open(self.log_path, "w")  # noqa: SIM115 - open as long as the run
        self.processes = [
            self.lab.popen([*argv, *(command or self.up())], env=self.environ, stdout=self._log, stderr=self._log)
        ]
        return self

    def hand(self, *ranks: int, leader: str | None = None, **environ: str) -> LabRun:
        """An agent on each of `ranks` (all), told its place as the recipe tells it."""
        if self._log is None:
            self._log = open(self.log_path, "w")  # noqa: SIM115
        address = leader or self.lab.node(self.nodes[0]).address
        for rank in ranks or range(len(self.nodes)):
            recipe = {"NODE_RANK": str(rank), "NNODES": str(len(self.nodes)), "LEADER_ADDR": address}
            self.processes.append(
                self.lab.node(self.nodes[rank]).popen(
                    self.up(),
                    env=self.environ | recipe | environ,
                    stdin=subprocess.DEVNULL,
                    stdout=self._log,
                    stderr=self._log,
                    start_new_session=True,
                )
            )
        return self

    def __enter__(self) -> LabRun:
        STANDING.append(self)
        if not self.processes:
            self.srun()
        try:
            self.wait_full()
        except BaseException as exc:
            self.__exit__(type(exc), exc, None)
            raise
        return self

    def __exit__(self, *error: object) -> None:
        if any(error):
            print(self.told())
        if self in STANDING:
            STANDING.remove(self)
        try:
            if self.left():
                self.cli("down")
        finally:
            for process in self.processes:
                try:
                    process.wait(15)
                except subprocess.TimeoutExpired:
                    with contextlib.suppress(ProcessLookupError):
                        os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
            lifecycle.kill_all(self.tagged, PATIENCE)
            if self._log is not None:
                self._log.close()

    def told(self) -> str:
        how = how_it_stands(self.run, self.home, lambda: str(self.cli("status", "--json", timeout=30.0)))
        alive = [f"{i.pid} {i.state} {tag} {proc.command_line(i.pid)[:100]}" for i, tag in proc.tagged(self.run)]
        return "\n".join([how, "== alive", *alive, f"== {self.log_path}", self.output()[-6000:]])

    def output(self) -> str:
        return self.log_path.read_text(errors="replace") if self.log_path.exists() else ""

    # -- what is there -------------------------------------------------------------------------------------------

    def cli(self, verb: str, *args: str, timeout: float = LONG) -> subprocess.CompletedProcess[str]:
        """A verb on the login node."""
        return self.lab.run(["gms-launch", verb, "--run", self.run, *args], timeout=timeout)

    def status(self) -> dict[str, Any]:
        """What `status --json` says; asked again while etcd gives no answer."""

        def asked() -> dict[str, Any]:
            if shot := glance(self.home):
                return shot
            done = self.cli("status", "--json")
            return dict(json.loads(done.stdout)) if done.returncode == 0 else {}

        return eventually(asked, what=lambda: str(self.cli("status", "--json")) + self.output())

    def wait_full(self, timeout: float = LONG) -> dict[str, Any]:
        looks = Looks(self.home / "events.jsonl")

        def full() -> dict[str, Any]:
            if all(p.poll() is not None for p in self.processes):
                raise AssertionError(f"the run is over:\n{self.output()}")
            return twice_full(lambda: glance(self.home)) if looks.due() else {}

        found = eventually(full, timeout, f"redundancy full; {self.log_path}")
        # The status may be ahead of the confirmation that the leader announces.
        eventually(lambda: self.events("redundancy")[-1:] and self.events("redundancy")[-1]["detail"] == "full")
        return found

    def events(self, kind: str | None = None) -> list[dict[str, Any]]:
        found = journal(self.home / "events.jsonl")
        return [e for e in found if kind is None or e["kind"] == kind]

    def run_file(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.home / "run.json").read_text())
        return found

    def text(self, timeout: float = 30.0) -> str | None:
        """The completion of a fixed prompt; None when nobody answers in time."""
        host, port = self.run_file()["frontend_url"].removeprefix("http://").split(":")
        return complete(host, int(port), "hello", 8, timeout)

    def tagged(self, *parts: object) -> list[proc.Stat]:
        """Living processes of the run on all nodes, by the front of their tag (cohort, life, node rank)."""
        return [info for info, _ in proc.tagged("/".join(map(str, (self.run, *parts))))]

    def on_node(self, node_rank: int, *parts: object) -> list[proc.Stat]:
        return [i for i, _ in proc.tagged("/".join(map(str, (self.run, *parts))), node_rank=node_rank)]

    def engines(self, node_rank: int | None = None) -> list[proc.Stat]:
        """Living engine processes, on one node or all."""
        found = proc.tagged(self.run, node_rank=node_rank)
        return [i for i, tag in found if tag.split("/")[1].isdigit()]

    def life(self, cohort_id: int) -> int:
        life: int = self.status()["cohorts"][cohort_id]["incarnation"]
        return life

    def kill_rank(self, cohort_id: int, node_rank: int) -> tuple[int, int]:
        """SIGKILL the process group of a rank, as a fault would, and see it die. Returns its life."""
        life = self.life(cohort_id)
        found = self.tagged(cohort_id, life, node_rank)
        assert found, f"cohort {cohort_id} life {life} has no rank on node {node_rank}"
        groups = {i.pgid for i in found}
        assert len(groups) == 1
        os.killpg(groups.pop(), signal.SIGKILL)
        eventually(lambda: not any(proc.alive(i.identity) for i in found))
        return cohort_id, life

    def wait_dead(self, cohort_id: int, life: int) -> None:
        """Wait until no process of a life is alive on any node."""
        eventually(lambda: not self.tagged(cohort_id, life), what=f"cohort {cohort_id}, life {life}, dead on all nodes")

    def agents(self) -> list[int]:
        """The agents of the run's nodes, in their order, as this machine numbers them."""
        found = []
        for name in dict.fromkeys(self.nodes):
            pids = self.lab.node(name).pids("gms-launch", "python", "python3")
            lines = [(pid, proc.command_line(pid).split()) for pid in pids]
            named = {self.run, f"--run={self.run}"}
            found += [pid for pid, words in lines if "up" in words and named & set(words)]
        return found

    def loads(self) -> dict[str, int]:
        """By node: how often the weights were written into GMS since its server started."""
        gms = [(n["host"], g) for n in self.status()["nodes"] for g in n["gms"] if g["tag"] == "weights"]
        return {host: g["loads"] for host, g in gms}

    def left(self) -> dict[str, list[str]]:
        """What is left of the run on each node: node-local files, and (under "processes") anything alive."""
        found: dict[str, list[str]] = {}
        if alive := self.tagged():
            found["processes"] = [f"{i.pid} {i.comm}" for i in alive]
        for name in self.nodes:
            node = self.lab.node(name)
            if node.init is None or not proc.alive(node.init):
                continue
            root = Path(f"/proc/{node.init.pid}/root/dev/shm/gms-launch-{os.getuid()}")
            if files := [p.name for p in root.glob(f"{self.run}*")]:
                found[name] = files
        return found

    def wait_gone(self, timeout: float = PATIENCE) -> None:
        """Wait until nothing of it is alive on any node."""
        try:
            eventually(lambda: not self.tagged(), timeout)
        except AssertionError:
            raise AssertionError(f"left after {timeout:g} s: {self.left()}\n{self.output()}") from None

    def job(self) -> str:
        """The Slurm job that the run is in."""
        return str(eventually(lambda: self.run_file()["slurm"].partition(".")[0]))

    def exit_codes(self, timeout: float = LONG) -> list[int]:
        return [p.wait(timeout) for p in self.processes]


def since(begun: float) -> float:
    return time.monotonic() - begun
