"""A run that outlives any of its nodes, over the lab: several members of etcd and frontends, two groups and a spare."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from gms_launch.cohort.records import LeadRecord
from gms_launch.control import cluster
from gms_launch.control.client import Etcd
from gms_launch.engines.reference.demo_model import make
from gms_launch.process import proc
from gms_launch.run.rundir import RunDir
from tests.slurm.lab import Lab
from tests.slurm.test_groups import Groups
from tests.support import LONG, PATIENCE, complete, eventually, flock_holders

#: Of `Pair`: its groups, and the model that each serves under its own name.
NAMES = ("a", "b")
#: Slots of a group in tags (`Layout.slot`).
SLOTS = 10
#: Three members of etcd, a frontend with each, two groups of two nodes and a spare; quicker than delivered.
FLAGS = ("--spares=1", "--etcd-members=3", "--frontends=auto", "--lease-ttl=3", "--spare-wait=4", "--node-wait=300")
FLAGS += ("--virtual-gpus=1",)


def routed(lab: Lab, *names: str) -> None:
    for name in names or lab.names:
        # Dynamo's frontend takes answers at the address of the default route, where an interface has IPv6 too.
        lab.node(name).run(["ip", "route", "replace", "default", "via", f"{lab.net}.254"], check=True)


class Led(Groups):
    def _store(self) -> Etcd:
        return Etcd(RunDir(self.home).credentials().access(tuple(self.run_file()["etcd_endpoints"])), brisk=True)

    def leader(self) -> int:
        """The node that leads the run, as etcd has it; -1 for none."""
        one = self._store()
        try:
            value = one.get(f"/gms-launch/{self.run}/lead", retry=PATIENCE)
            return LeadRecord.decode(value).node_rank if value is not None else -1
        finally:
            one.close()

    def voters(self) -> int:
        """How many members of etcd have a vote."""
        one = self._store()
        try:
            return sum(not m.learner for m in cluster.members(one, retry=PATIENCE))
        finally:
            one.close()

    def engines_at(self, *names: str) -> list[proc.ProcessId]:
        """Living engine processes on these machines, whatever node rank they were started under."""
        inits = [init for n in names if (init := self.lab.node(n).init) is not None and proc.alive(init)]
        namespaces = {os.readlink(f"/proc/{init.pid}/ns/pid") for init in inits}
        found = []
        for info in self.engines():
            with contextlib.suppress(OSError):  # it has just ended
                if os.readlink(f"/proc/{info.pid}/ns/pid") in namespaces:
                    found.append(info.identity)
        return found

    def fronts(self) -> list[tuple[str, int]]:
        parts = [u.removeprefix("http://").split(":") for u in self.run_file()["frontend_urls"]]
        return [(host, int(port)) for host, port in parts]


class Pair(Led):
    """Two groups of two nodes, each with a model of its own, and a spare: five nodes."""

    def __init__(self, lab: Lab, *flags: str, **environ: str) -> None:
        tables = []
        for seed, name in enumerate(NAMES, 1):
            model = lab.dir / f"model-{name}"
            make(model, 4, seed)
            tables.append(f'[[group]]\nname = "{name}"\nnodes = 2\nmodel = "{model}"\nserved_model_name = "{name}"\n')
        file = lab.dir / "settings.toml"
        file.write_text("\n".join(tables))
        super().__init__(lab, lab.dir / "model-a", f"--config={file}", *FLAGS, *flags, **environ)

    def __enter__(self) -> Pair:
        self.hand()
        super().__enter__()
        return self

    def seats(self) -> dict[str, int]:
        """By machine: its node rank."""
        status = self.status()
        return {n["host"]: n["node_rank"] for n in [*status["nodes"], *status["spares"]]}

    def spare(self) -> list[str]:
        return [n["host"] for n in self.status()["spares"]]

    def whole(self) -> dict[str, dict[str, Any]]:
        """Wait until nothing is missing: both groups full, a spare, three members of etcd with their vote, three
        frontends, each of which gives a token of each model.
        """
        found = self.full(*NAMES)
        eventually(lambda: len(self.spare()) == 1, LONG, "a spare")
        eventually(lambda: self.voters() == 3, LONG, "three members of etcd")
        eventually(self._all_serve, LONG, "every frontend serves every model")
        return found

    def _all_serve(self) -> bool:
        fronts = self.fronts()
        return len(fronts) == 3 and all(
            complete(*f, "hello", 1, 5.0, name) is not None for f in fronts for name in NAMES
        )

    def lock_files(self, index: int) -> list[Path]:
        """The locks of the run's `index`th group, on all machines that are on."""
        found: list[Path] = []
        for node in self.lab.nodes.values():
            if node.init is not None:
                shm = Path(f"/proc/{node.init.pid}/root/dev/shm/gms-launch-{os.getuid()}")
                found += shm.glob(f"{self.run}*/g{index}/failover*.lock")
        return found

    def active(self, index: int) -> set[tuple[int, int]]:
        """The living lives of a group, as (slot, life), that hold a lock of it anywhere: whoever does serves."""
        holders = [pid for path in self.lock_files(index) for pid in flock_holders(str(path))]
        tags = [tag.split("/") for pid in holders if (tag := proc.tag_of(pid))]
        return {(int(slot), int(life)) for _, slot, life, *_ in tags if slot.isdigit()}


class Actives:
    """Looks all the time, while it is open, that no group has two lives that hold its lock, on whichever machines."""

    def __init__(self, run: Pair) -> None:
        self._run = run
        self.broken: list[str] = []
        self.looks = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def _watch(self) -> None:
        while not self._stop.wait(0.05):
            for index, name in enumerate(NAMES):
                found = self._run.active(index)
                # One may have ended between two of the files: who is really two is so at the next look.
                if len(found) > 1 and len(found & self._run.active(index)) > 1:
                    self.broken.append(f"{time.time():.3f}: {name} has two that are active: {sorted(found)}")
            self.looks += 1

    def __enter__(self) -> Actives:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self._stop.set()
        self._thread.join(30)
