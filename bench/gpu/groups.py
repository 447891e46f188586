"""Two groups on one node, each on a GPU of its own: kills in one under load, and what the other's requests see of it.

    python -m bench.gpu.groups [--gib 16] [--kills 10] [--out bench/results/gpu-groups.json]

First two engines with a model each behind one frontend: the primary of `a` is killed again and again, and no request of
`b` may be lost, nor one of its processes be another one. Then prefill and decode, a GPU each: their text is that of a
whole engine, and each half's primary is killed. The memory is what NVML says of each GPU. `--virtual` tries it on
made-up devices, whose figures say nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench.bare import complete, free_port
from bench.failover import summary
from bench.gpu.failover import GIB, make_model
from bench.machine import machine
from bench.stopping import stoppable
from gms_launch.gms import gpus
from gms_launch.process import proc
from tests.load import Load
from tests.support import eventually

RUN = "groups"
LONG = 180.0
HALVES = '[[group]]\nname = "p"\ngpus = 1\nrole = "prefill"\n\n[[group]]\nname = "d"\ngpus = 1\nrole = "decode"\n'


class Run:
    """One run on this node, from `up` to `down`."""

    def __init__(self, place: Path, memory: list[str], tables: str, *flags: str) -> None:
        self.port = free_port()
        file = place / "settings.toml"
        file.write_text(tables)
        self._env = os.environ | {"GMS_LAUNCH_HOME": str(place / "home"), "REFERENCE_KV_MIB": "2048"}
        self._env |= {"REFERENCE_TOKEN_SECONDS": "0.02"}
        self._flags = ["--engine", "reference", "--config", str(file), "--no-nats", *memory, *flags]
        self._flags += ["--frontend-port", str(self.port), "--frontend-host", "127.0.0.1"]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def cli(self, verb: str, *args: str) -> str:
        argv = [sys.executable, "-m", "gms_launch", verb, *args]
        done = subprocess.run(argv, env=self._env, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{verb}: {done.stdout}{done.stderr}")
        return done.stdout

    @contextlib.contextmanager
    def up(self) -> Iterator[Run]:
        try:
            self.cli("up", "-d", "--run-id", RUN, *self._flags)
            yield self
        finally:
            with contextlib.suppress(RuntimeError):
                print(self.cli("down", "--run", RUN))

    def groups(self) -> dict[str, Any]:
        return {g["name"]: g for g in json.loads(self.cli("status", "--run", RUN, "--json"))["groups"]}

    def full(self) -> dict[str, Any]:
        def found() -> dict[str, Any]:
            groups = self.groups()
            return groups if all(g["redundancy"] == "full" for g in groups.values()) else {}

        return eventually(found, LONG, "both groups are full")

    def kill_primary(self, name: str) -> float:
        """SIGKILL of its process group, from outside; returns when (monotonic seconds)."""
        group = self.full()[name]
        pid = group["cohorts"][group["primary"]]["ranks"][0]["pid"]
        who = proc.identity(pid)
        now = time.monotonic()
        os.killpg(group["cohorts"][group["primary"]]["ranks"][0]["pgid"], signal.SIGKILL)
        eventually(lambda: who is None or not proc.alive(who), LONG, "it is dead")
        return now


def lives(group: dict[str, Any]) -> list[tuple[int, int, int]]:
    return [(c["cohort_id"], c["incarnation"], r["pid"]) for c in group["cohorts"] for r in c["ranks"]]


def used() -> list[float]:
    """GiB in use on each GPU."""
    return [round(g.used / GIB, 2) for g in gpus.look()]


def told(load: Load, moments: list[float]) -> dict[str, Any]:
    """What users saw."""
    pauses = [p for m in moments for p in load.longest_pauses(m)]
    found: dict[str, Any] = {"answers": len(load.answers), "lost": len(load.lost), "wrong": len(load.wrong)}
    found["pauses_at_the_kills"] = summary(pauses) if pauses else None
    found["longest_pause_ms"] = round(1000 * max((s for a in load.answers for _, s in a.pauses), default=0.0), 1)
    if load.lost:
        found["first_error"] = load.lost[0].error
    return found


def two_models(place: Path, memory: list[str], gib: int, kills: int) -> dict[str, Any]:
    """Kills in `a` while both have users."""
    tables = []
    for name in "ab":
        make_model(place / name, gib)
        tables.append(f'[[group]]\nname = "{name}"\ngpus = 1\nmodel = "{place / name}"\nserved_model_name = "{name}"\n')
    with Run(place, memory, "\n".join(tables)).up() as run:
        before = run.full()
        memory_full = used()
        with Load(run.url, 16, 4, 10.0, model="a", timeout=120.0) as a, Load(run.url, 16, 4, 10.0, model="b") as b:
            a.wait_busy()
            b.wait_busy(5.0)
            quiet = time.monotonic()
            moments = []
            for _ in range(kills):
                moments.append(run.kill_primary("a"))
                run.full()
                b.wait_busy(1.0)
        after, status = run.full(), run.cli("status", "--run", RUN, "-v")
        weights = {n: [g["loads"] for g in s["gms"] if g["tag"] == "weights"] for n, s in by_group(run).items()}
    calm = [s for x in b.answers for begun, s in x.pauses if begun + s < quiet]
    return {
        "kills": kills,
        "a": told(a, moments),
        "b": told(b, moments) | {"longest_pause_before_the_first_kill_ms": round(1000 * max(calm, default=0.0), 1)},
        "b_has_the_same_processes": lives(before["b"]) == lives(after["b"]),
        "lives_of_a": sum(c["incarnation"] for c in after["a"]["cohorts"]),
        "memory_gib_of_each_gpu": memory_full,
        "loads_of_weights": weights,
        "status": status,
    }


def by_group(run: Run) -> dict[str, Any]:
    """The first node's part in each group."""
    return {name: group["nodes"][0] for name, group in run.groups().items()}


def halves(place: Path, memory: list[str], gib: int, kills: int) -> dict[str, Any]:
    """Prefill and decode, and kills of each."""
    model = place / "a"
    with Run(place, memory, f'[[group]]\nname = "one"\ngpus = 1\nmodel = "{model}"\n').up() as run:
        run.full()
        text = complete(run.port, str(model), tokens=24)
    with Run(place, memory, HALVES, "--model", str(model)).up() as run:
        run.full()
        same = [complete(run.port, str(model), tokens=24) == text]
        with Load(run.url, 16, 4, 5.0, model=str(model), timeout=120.0) as load:
            load.wait_busy(2.0)
            moments = []
            for _ in range(kills):
                for name in ("p", "d"):
                    moments.append(run.kill_primary(name))
                    run.full()
                    load.wait_busy(1.0)
        same.append(complete(run.port, str(model), tokens=24) == text)
    return {"kills_of_each": kills, "users": told(load, moments), "text_of_one_engine_before_and_after": same}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gib", type=int, default=16, help="weights of each model")
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--virtual", action="store_true", help="made-up devices; for a try")
    parser.add_argument("--place", type=Path, default=Path("/dev/shm"))
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "results" / "gpu-groups.json")
    options = parser.parse_args()
    found = gpus.look()
    if len(found) < 2 and not options.virtual:
        sys.exit(f"needs two GPUs; there are {len(found)}")
    memory = ["--virtual-gpus", "2", "--virtual-gpu-mib", "16384"] if options.virtual else ["--gms-memory", "cuda"]
    result = {
        "command": " ".join(["python", "-m", "bench.gpu.groups", *sys.argv[1:]]),
        "machine": machine(str([g.name for g in found])),
        "weights_gib": options.gib,
        "memory_gib_before": used(),
    }
    with tempfile.TemporaryDirectory(prefix="groups-", dir=options.place) as name:
        for what in (two_models, halves):
            result[what.__name__] = what(Path(name), memory, options.gib, options.kills)
            options.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    stoppable(main)
