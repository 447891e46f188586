"""A remote rank dies: what each launcher makes of it, with the same ranks, on the same machine, in one run.

    python -m bench.peers [--python DIR/bin/python] [--kills 10] [--nodes 2 4] [--only NAME ...]

The ranks are the reference engine's, one on each node (a set of network namespaces), and etcd, the frontend and a GMS
server on every node stand beside them, so that weights are mapped and not loaded, whoever launches. The last node's
rank is SIGKILLed. Measured from outside: until the last process of the old group is dead; until a whole group is awake
again; until a client has an answer. A peer that has not answered after --watch seconds is written down as that, and
started anew. One that does not start within --start seconds is a row that says so, and the next one's turn comes. Every
kill is written down as soon as it is measured.

`--python` is an interpreter with torch and nvidia-resiliency-ext, for torchrun and ft_launcher, which are left out
without it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from bench.failover import summary
from bench.machine import machine
from bench.stopping import stoppable, whole
from gms_launch.engines.reference.demo_model import make
from gms_launch.process import proc
from tests.slurm.lab import Lab
from tests.slurm.support import LabRun
from tests.support import complete

RANK = str(Path(__file__).with_name("rank.py"))
AWAKE = "[Shadow] Engine awake, registering with discovery"
FAST = ["--monitor-interval=0.01", "--rdzv-conf", "keep_alive_interval=1,keep_alive_max_attempt=2"]
#: name -> (tool, its flags). `--max-restarts` is 0 by default: then the job ends, and nobody answers again.
CONFIGS: dict[str, tuple[str, list[str]]] = {
    "gms-launch, default": ("gms-launch", []),
    "plain script, as the recipe": ("script", []),
    "torchrun, default": ("torchrun", []),
    "torchrun, restarts": ("torchrun", ["--max-restarts=1000"]),
    "torchrun, restarts, fastest": ("torchrun", ["--max-restarts=1000", *FAST]),
    "ft_launcher, default": ("ft_launcher", []),
    "ft_launcher, restarts": ("ft_launcher", ["--max-restarts=1000"]),
    "ft_launcher, restarts, fastest": (
        "ft_launcher",
        ["--max-restarts=1000", *FAST, "--ft-restart-check-interval=0.05", "--workers-stop-timeout=1"],
    ),
}


class Peer:
    """The toy group under a launcher that is not ours. Use as a context manager."""

    def __init__(self, lab: Lab, count: int, model: Path, config: str, tools: Path | None, start: float = 90.0) -> None:
        self._start = start
        self.lab, self.count, self.tag = lab, count, "peers" + os.urandom(3).hex()
        self.tool, self.flags = CONFIGS[config]
        self.tools, self.model = tools, model
        self.logs = Path(tempfile.mkdtemp(prefix="logs-", dir=lab.dir))
        self.nodes = [lab.node(name) for name in lab.names[:count]]
        self.leader = self.nodes[0].address
        self._started: list[subprocess.Popen[str]] = []

    def __enter__(self) -> Peer:
        try:
            self._services()
            for k, node in enumerate(self.nodes):
                self._launch(k, node)
            self.wait_answer(self._start)
        except BaseException:
            self.__exit__()
            raise
        return self

    def _popen(self, node: Any, name: str, argv: list[str], **env: str) -> None:
        with open(self.logs / f"{name}.log", "a") as log:
            self._started.append(
                node.popen(
                    ["env", "GMS_LAUNCH_TAG=" + self.tag + "-own/" + name, *argv],
                    env=env,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                )
            )

    def _services(self) -> None:
        url, peer = f"http://{self.leader}:2379", f"http://{self.leader}:2380"
        argv = ["etcd", "--name", "n", "--data-dir", str(self.logs / "etcd"), "--listen-client-urls", url]
        argv += ["--advertise-client-urls", url, "--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer]
        self._popen(self.nodes[0], "etcd", [*argv, "--initial-cluster", f"n={peer}"])
        for k, node in enumerate(self.nodes):
            node.run(["mkdir", "-p", "/dev/shm/peers"], check=True)
            gms = [sys.executable, "-m", "gms_launch.gms", "--device", "0"]
            self._popen(node, f"gms{k}", gms, GMS_SOCKET_DIR="/dev/shm/peers")
        argv = [sys.executable, "-m", "dynamo.frontend", "--http-host", self.leader, "--http-port", "8000"]
        env = {"ETCD_ENDPOINTS": url, "DYN_TCP_RPC_HOST": self.leader, "DYN_TCP_RESPONSE_STREAM_HOST": "lo"}
        self._popen(self.nodes[0], "frontend", argv, **env)

    def _launch(self, k: int, node: Any) -> None:
        env = {"PEERS_TAG": self.tag, "PEERS_ETCD": f"http://{self.leader}:2379", "PEERS_LOGS": str(self.logs)}
        env |= {"PEERS_ADDRESS": node.address, "PEERS_LEADER": self.leader, "PEERS_MODEL": str(self.model)}
        if self.tool == "script":
            place = {"RANK": str(k), "WORLD_SIZE": str(self.count)}
            line = f"setsid {shlex.join([sys.executable, RANK])} & wait"
            self._popen(node, f"script{k}", ["bash", "-c", line], **env, **place)
            return
        assert self.tools is not None
        argv = [str(self.tools / self.tool), f"--nnodes={self.count}", "--nproc-per-node=1", "--rdzv-backend=c10d"]
        argv += [f"--rdzv-endpoint={self.leader}:29400", f"--rdzv-id={self.tag}", f"--local-addr={node.address}"]
        argv += ["--ignore-missing-fault-tol-cfg"] if self.tool == "ft_launcher" else []
        argv += [*self.flags, "--no-python", sys.executable, RANK]
        self._popen(node, f"{self.tool}{k}", argv, GLOO_SOCKET_IFNAME="eth0", TP_SOCKET_IFNAME="eth0", **env)

    def __exit__(self, *_: object) -> None:
        for _ in range(50):
            left = [i for t in (self.tag, f"{self.tag}-own") for i, _ in proc.tagged(t)]
            for info in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(info.pid, signal.SIGKILL)
            if not left:
                break
            time.sleep(0.1)  # a launcher may have started another one meanwhile
        for process in self._started:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(10)
        for node in self.nodes:
            node.run(["rm", "-rf", "/dev/shm/peers"])

    # -- what is measured --------------------------------------------------------------------------------------

    def ranks(self) -> list[tuple[proc.Stat, str]]:
        return proc.tagged(self.tag)

    def awake(self) -> int:
        return sum(AWAKE in f.read_text(errors="replace") for f in self.logs.glob("rank0-*.log"))

    def answer(self) -> bool:
        return complete(self.leader, 8000, "hello", 1, 1.0) is not None

    def victim(self) -> int:
        """The main process of the last rank: the one whose parent is none of its rank's."""
        mine = [i for i, tag in self.ranks() if tag == f"{self.tag}/{self.count - 1}"]
        pids = {i.pid for i in mine}
        return next(i.pid for i in mine if i.ppid not in pids)

    def wait_answer(self, timeout: float) -> None:
        deadline = time.monotonic() + timeout
        while not self.answer():
            if time.monotonic() > deadline:
                raise TimeoutError(f"{self.tool}: no answer within {timeout:g} s; logs in {self.logs}")
            time.sleep(0.05)

    def settle(self) -> None:
        """Until the next kill: all ranks are there and answer."""
        self.wait_answer(60)


class Ours(Peer):
    """The same under gms-launch, which brings its own etcd, frontend and GMS."""

    def __enter__(self) -> Ours:
        self.run = LabRun(self.lab, self.model, *self.flags, nodes=self.lab.names[: self.count])
        try:
            self.run.hand().__enter__()
        except BaseException:
            self.run.__exit__()
            raise
        host, port = self.run.run_file()["frontend_url"].removeprefix("http://").split(":")
        self._host, self._port = host, int(port)
        return self

    def __exit__(self, *_: object) -> None:
        self.run.__exit__()

    def settle(self) -> None:
        self._status = self.run.wait_full()

    def ranks(self) -> list[tuple[proc.Stat, str]]:
        primary = self._status["primary"]
        return proc.tagged(f"{self.run.run}/{primary}/{self._status['cohorts'][primary]['incarnation']}")

    def victim(self) -> int:
        return next(i.pid for i, tag in self.ranks() if tag.endswith(f"/{self.count - 1}") and i.pid == i.pgid)

    def awake(self) -> int:
        return sum(AWAKE in f.read_text(errors="replace") for f in (self.run.home / "logs/node0").glob("cohort-*.log"))

    def answer(self) -> bool:
        return complete(self._host, self._port, "hello", 1, 1.0) is not None


def kill(peer: Peer, watch: float) -> dict[str, float | None]:
    """Kill the last node's rank; seconds until all dead, awake, answered; None for what did not come in time."""
    peer.settle()
    old = [i.identity for i, _ in peer.ranks()]
    awake = peer.awake()
    victim = peer.victim()
    seen: dict[str, float | None] = {"all_dead": None, "group_awake": None, "first_answer": None}
    begun = time.monotonic()
    os.kill(victim, signal.SIGKILL)
    while time.monotonic() < begun + watch and None in seen.values():
        if seen["all_dead"] is None and not any(proc.alive(who) for who in old):
            seen["all_dead"] = time.monotonic() - begun
        if seen["group_awake"] is None and peer.awake() > awake:
            seen["group_awake"] = time.monotonic() - begun
        # An engine that has lost a rank still takes requests: only an answer after the old leader's end counts.
        if seen["first_answer"] is None and seen["group_awake"] is not None and peer.answer():
            seen["first_answer"] = time.monotonic() - begun
        time.sleep(0.002)
    return seen


def trials(
    lab: Lab, count: int, model: Path, config: str, tools: Path | None, options: argparse.Namespace
) -> Iterator[dict[str, float | None]]:
    """As many kills as wanted; after a group has not come back twice that is taken for the answer."""
    kind = Ours if CONFIGS[config][0] == "gms-launch" else Peer
    done = lost = 0
    kills, watch = options.kills, options.watch
    while done < kills and lost < 2:
        with kind(lab, count, model, config, tools, options.start) as peer:
            while done < kills:
                found = kill(peer, watch)
                done += 1
                yield found
                if found["first_answer"] is None:
                    lost += 1
                    break


def measure(
    lab: Lab,
    count: int,
    model: Path,
    config: str,
    tools: Path | None,
    options: argparse.Namespace,
    write: Callable[[dict[str, Any]], None],
) -> dict[str, Any]:
    """One row. `write` gets it anew after each kill; a peer that does not start (again) ends it with `failed`."""
    raw: list[dict[str, float | None]] = []
    row: dict[str, Any] = {"nodes": count, "config": config, "flags": CONFIGS[config][1]}
    try:
        for found in trials(lab, count, model, config, tools, options):
            raw.append(found)
            row |= counted(raw)
            write(row)
    except Exception as exc:  # whatever a peer does, the others' turn comes
        row |= counted(raw) | {"failed": f"{type(exc).__name__}: {exc}"}
    write(row)
    return row


def counted(raw: list[dict[str, float | None]]) -> dict[str, Any]:
    row: dict[str, Any] = {"kills": len(raw), "raw": raw}
    for what in ("all_dead", "group_awake", "first_answer"):
        came = [t for trial in raw if (t := trial[what]) is not None]
        row |= {what: summary(came) if came else None, f"{what}_never": len(raw) - len(came)}
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", type=Path, help="interpreter with torch and nvidia-resiliency-ext")
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--nodes", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--watch", type=float, default=30.0)
    parser.add_argument("--start", type=float, default=90.0, help="how long a peer may take to start (seconds)")
    parser.add_argument("--only", nargs="*", choices=CONFIGS)
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "results" / "peers.json")
    options = parser.parse_args()
    tools = options.python.parent if options.python else None
    chosen = [c for c in CONFIGS if not options.only or c in options.only]
    chosen = [c for c in chosen if tools is not None or CONFIGS[c][0] in ("gms-launch", "script")]
    result: dict[str, Any] = {
        "command": shlex.join(["python", "-m", "bench.peers", *sys.argv[1:]]),
        "machine": machine(),
        "versions": versions(options.python),
        "watch_s": options.watch,
        "rows": [],
    }
    with tempfile.TemporaryDirectory(prefix="peers-") as name, Lab(max(options.nodes), slurm=False) as lab:
        make(Path(name) / "model", 8)
        for count in options.nodes:
            for config in chosen:

                def write(row: dict[str, Any], before: list[dict[str, Any]] = result["rows"]) -> None:
                    result["rows"] = [*before, row]
                    whole(options.out, json.dumps(result, indent=1) + "\n")

                print(line(measure(lab, count, Path(name) / "model", config, tools, options, write)), flush=True)


def line(row: dict[str, Any]) -> str:
    cells = [f"{row['nodes']} nodes  {row['config']:32s} {row['kills']:3d} kills"]
    for what in ("all_dead", "group_awake", "first_answer"):
        found = row[what]
        text = f"p50 {found['p50_ms']:8.0f} p99 {found['p99_ms']:8.0f} ms" if found else "never"
        cells.append(f"{what} {text}" + (f" ({row[what + '_never']} never)" if found and row[what + "_never"] else ""))
    return "; ".join([*cells, *([f"FAILED: {row['failed']}"] if "failed" in row else [])])


def versions(python: Path | None) -> dict[str, str]:
    found = {"python": platform.python_version()}
    if python is not None:
        code = (
            "from importlib.metadata import version\n"
            "print(*[f'{n}={version(n)}' for n in ('torch', 'nvidia-resiliency-ext')])"
        )
        done = subprocess.run([str(python), "-c", code], capture_output=True, text=True, check=True)
        found |= dict(pair.split("=", 1) for pair in done.stdout.split())
    return found


if __name__ == "__main__":
    stoppable(main)
