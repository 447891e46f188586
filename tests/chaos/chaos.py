"""Faults at random moments against a real three-node deployment under load, judged from outside.

    python -m tests.chaos.chaos [--rounds 300] [--seed 1] [--only KIND ...] [--out FILE]

Each round injects one fault, waits until redundancy is full again, and checks what does not depend on what gms-launch
says of itself: every text that a client got, that no client read an error where a shadow could take over, the lock's
file and holder, who is registered in Dynamo's discovery, which processes live, by their tags, how often the weights
were written, and that no two cohorts served at once. One line a round; the first broken invariant ends it. The same
seed injects the same faults. Needs root, for the namespaces.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import signal
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from gms_launch.control.door import Door
from gms_launch.gms import probe
from gms_launch.process import proc
from gms_launch.run.rundir import RunDir
from tests.chaos.ends import Keep, Row, command, nowhere, shuffled, telling
from tests.load import Load
from tests.slurm.lab import Lab
from tests.slurm.support import LabRun
from tests.support import LONG, eventually, flock_holders

FLAGS = ("--health-interval", "0.3", "--health-timeout", "2", "--canary-interval", "1", "--canary-timeout", "4")
FLAGS += ("--lease-ttl", "3", "--node-wait", "60", "--dynamo-lease-ttl", "12", "--service-liveness", "2")
FLAGS += ("--restart-limit", "50", "--restart-backoff", "0.2", "--promotion-timeout", "10")
INSTANCES = "v1/instances/dynamo/backend/generate/"


class BrokenError(AssertionError):
    """An invariant does not hold."""


#: Kinds in which a request may be lost, and why. In all others not one: docs/failure-policy.md says the same.
MAY_LOSE = {
    "both_cohorts": "no shadow is left that could take over",
    "during_promotion": "the shadow dies while it takes over",
    "kill_frontend": "it is what clients are connected to",
    "kill_gms": "without it the group starts cold",
    "cut_for_longer_than_the_lease": "every cohort has lost a rank",
    "freeze_node": "every cohort has lost a rank",
    "kill_agent": "every cohort has lost a rank",
}
#: And in the round after these, whatever its kind: Dynamo's frontend takes seconds to find etcd again, and until then
#: does not hear of the engine that has taken over.
DEAF_AFTER = ("kill_etcd", "freeze_etcd")
#: A token's time, so that there always are requests in the middle of an answer.
ENVIRON = {"REFERENCE_TOKEN_SECONDS": "0.02"}


class Struck(Protocol):
    """What a fault needs of a round that it has in common with those of `groups`."""

    rng: random.Random

    @property
    def primary(self) -> int: ...

    @property
    def shadow(self) -> int: ...

    def processes(self, cohort_id: int, /) -> list[proc.Stat]: ...

    def wait_next_life(self, cohort_id: int, /) -> None: ...


@dataclass
class Round:
    """What faults act on. `undo` is done before redundancy is waited for."""

    run: LabRun
    rng: random.Random
    status: dict[str, Any]
    undo: list[Callable[[], object]] = field(default_factory=list)

    @property
    def primary(self) -> int:
        return int(self.status["primary"])

    @property
    def shadow(self) -> int:
        return 1 - self.primary

    def group(self, cohort_id: int, node_rank: int) -> int:
        life = self.status["cohorts"][cohort_id]["incarnation"]
        (pgid,) = {i.pgid for i in self.run.tagged(cohort_id, life, node_rank)}
        return pgid

    def processes(self, cohort_id: int) -> list[proc.Stat]:
        return self.run.tagged(cohort_id, self.status["cohorts"][cohort_id]["incarnation"])

    def any_node(self, first: int = 0) -> int:
        return self.rng.randrange(first, 3)

    def service(self, name: str, node_rank: int = 0) -> int:
        """The process of a service, as this machine numbers it."""
        return next(i.pid for i in self.run.on_node(node_rank, name) if i.pid == i.pgid)

    def wait_next_life(self, cohort_id: int) -> None:
        """Wait until a fault that nobody sees at once has been seen: the cohort's next life is wanted."""
        now = self.status["cohorts"][cohort_id]["incarnation"]
        eventually(lambda: self.run.status()["cohorts"][cohort_id]["incarnation"] > now, LONG)

    def kill_group(self, cohort_id: int, node_rank: int) -> str:
        os.killpg(self.group(cohort_id, node_rank), signal.SIGKILL)
        return f"cohort {cohort_id} rank {node_rank}"


# -- the kinds of fault --------------------------------------------------------------------------------------------


def primary_leader(r: Round) -> str:
    return r.kill_group(r.primary, 0)


def primary_remote(r: Round) -> str:
    return r.kill_group(r.primary, r.any_node(1))


def primary_one_process(r: Round) -> str:
    who = r.rng.choice(r.processes(r.primary))
    os.kill(who.pid, signal.SIGKILL)
    return f"process {who.pid} of cohort {r.primary}"


def shadow_rank(r: Round) -> str:
    return r.kill_group(r.shadow, r.any_node())


def both_cohorts(r: Round) -> str:
    return r.kill_group(r.primary, r.any_node()) + ", " + r.kill_group(r.shadow, r.any_node())


def during_promotion(r: Round) -> str:
    first = r.kill_group(r.primary, r.any_node())
    pause = r.rng.uniform(0.0, 0.25)
    time.sleep(pause)  # the moment is the point: anywhere in the promotion
    with contextlib.suppress(ProcessLookupError, ValueError):
        return f"{first}, and {pause * 1000:.0f} ms later {r.kill_group(r.shadow, r.any_node())}"
    return first


def stop_primary(r: Struck) -> str:
    return _stop(r, r.primary)


def stop_shadow(r: Struck) -> str:
    return _stop(r, r.shadow)


def _stop(r: Struck, cohort_id: int) -> str:
    who = r.rng.choice(r.processes(cohort_id))
    os.kill(who.pid, signal.SIGSTOP)
    r.wait_next_life(cohort_id)
    return f"process {who.pid} of cohort {cohort_id} stopped"


def no_tokens(r: Round) -> str:
    life = r.status["cohorts"][r.primary]["incarnation"]
    _lock(r.run).with_name(f"wedge-{r.primary}-{life}").touch()
    r.wait_next_life(r.primary)
    return f"cohort {r.primary} gives no more tokens"


def users_command(r: Round) -> str:
    done = r.run.cli("kill-primary")
    if done.returncode != 0:
        raise BrokenError(f"kill-primary: exit code {done.returncode}: {done.stderr}")
    return "kill-primary"


def kill_service(name: str) -> Callable[[Round], str]:
    def fault(r: Round) -> str:
        os.kill(pid := r.service(name), signal.SIGKILL)
        return f"{name} {pid}"

    fault.__name__ = f"kill_{name}"
    return fault


def freeze_service(name: str) -> Callable[[Round], str]:
    def fault(r: Round) -> str:
        os.kill(pid := r.service(name), signal.SIGSTOP)
        return f"{name} {pid} stopped"

    fault.__name__ = f"freeze_{name}"
    return fault


def kill_gms(r: Round) -> str:
    node_rank = r.any_node()
    os.kill(r.service("gms-0", node_rank), signal.SIGKILL)
    eventually(lambda: r.run.status()["redundancy"] == "none")
    if r.run.text() is None:
        raise BrokenError("the primary stopped serving when a GMS died")
    return f"GMS of node {node_rank}, then {r.kill_group(r.primary, r.any_node())}"


def cut_briefly(r: Round) -> str:
    node = r.run.lab.node(r.run.nodes[r.any_node(1)])
    node.cut()
    time.sleep(1.0)  # well inside the lease
    node.join()
    return f"{node.name} cut off for 1 s"


def cut_for_longer_than_the_lease(r: Round) -> str:
    node = r.run.lab.node(r.run.nodes[r.any_node(1)])
    node.cut()
    r.undo.append(node.join)
    eventually(lambda: r.run.status()["lost_nodes"])
    return f"{node.name} cut off until it was lost"


def freeze_node(r: Round) -> str:
    node = r.run.lab.node(r.run.nodes[r.any_node(1)])
    node.freeze()
    r.undo.append(node.thaw)
    eventually(lambda: r.run.status()["lost_nodes"])
    return f"{node.name} frozen until it was lost"


def kill_agent(r: Round) -> str:
    node_rank = r.any_node(1)
    pid = int(r.status["nodes"][node_rank]["agent_pid"])
    node = r.run.lab.node(r.run.nodes[node_rank])
    assert node.init is not None
    # The record has the pid as its node's own namespace numbers it.
    (agent,) = [p for p in proc.pids() if _inner_pid(p) == pid and _root(p) == _root(node.init.pid)]
    os.kill(agent, signal.SIGKILL)
    eventually(lambda: not r.run.on_node(node_rank), what="everything of a dead agent is dead")
    eventually(lambda: node_rank in r.run.status()["lost_nodes"])
    r.run.hand(node_rank)
    return f"agent of node {node_rank}, and a new one"


def _inner_pid(pid: int) -> int:
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("NSpid:"):
                return int(line.split()[-1])
    return -1


def _root(pid: int) -> str:
    with contextlib.suppress(OSError):
        return os.readlink(f"/proc/{pid}/ns/mnt")
    return ""


KINDS: tuple[Callable[[Round], str], ...] = (
    *(primary_leader, primary_remote, primary_one_process, shadow_rank, both_cohorts, during_promotion),
    *(stop_primary, stop_shadow, no_tokens, users_command, kill_service("etcd"), kill_service("nats")),
    *(kill_service("frontend"), freeze_service("etcd"), kill_gms, cut_briefly, cut_for_longer_than_the_lease),
    *(freeze_node, kill_agent),
)


# -- the invariants ------------------------------------------------------------------------------------------------


def _lock(run: LabRun) -> Path:
    """The failover lock as this machine sees it, inside the leader node's own /dev/shm."""
    init = run.lab.node(run.nodes[0]).init
    assert init is not None
    return Path(f"/proc/{init.pid}/root") / run.run_file()["node_dir"].lstrip("/") / "failover.lock"


def _sockets(run: LabRun, node_rank: int) -> list[Path]:
    init = run.lab.node(run.nodes[node_rank]).init
    assert init is not None
    place = run.run_file()["node_dir"] + (f"+{node_rank}" if node_rank else "")
    return sorted((Path(f"/proc/{init.pid}/root") / place.lstrip("/")).glob("gms_*_weights.sock"))


def check(run: LabRun, inode: int, load: Load) -> None:
    """Everything that must hold when redundancy is full. Raises `BrokenError`."""
    if load.wrong:
        raise BrokenError(f"a client got another text: {load.said()}")
    status = run.status()
    lock = _lock(run)
    if lock.stat().st_ino != inode:
        raise BrokenError("the lock file is another one")
    primary, life = status["primary"], status["cohorts"][status["primary"]]["incarnation"]
    tags = {tag for pid in flock_holders(str(lock)) if (tag := proc.tag_of(pid))}
    if tags != {f"{run.run}/{primary}/{life}/0"}:
        raise BrokenError(f"the lock is held by {tags}, and the primary is cohort {primary} life {life}")
    for info, tag in proc.tagged(run.run):
        cohort, incarnation = [*tag.split("/"), "", ""][1:3]
        if cohort.isdigit() and int(incarnation) != status["cohorts"][int(cohort)]["incarnation"]:
            raise BrokenError(f"process {info.pid} of an old life is alive: {tag}")
    for node_rank in range(len(run.nodes)):
        for cohort_id, slot in enumerate(status["cohorts"]):
            groups = {i.pgid for i in run.on_node(node_rank, cohort_id, slot["incarnation"], node_rank)}
            if len(groups) != 1:
                raise BrokenError(f"cohort {cohort_id} has {len(groups)} groups on node {node_rank}")
        for socket in _sockets(run, node_rank):
            written = sum(e.kind == "committed" for e in probe.event_history(socket))
            if written != 1:
                raise BrokenError(f"the weights of node {node_rank} were published {written} times")
    file = run.run_file()
    door = Door(RunDir(run.home).credentials().access(tuple(file["etcd_endpoints"])))
    eventually(lambda: len(door.get_prefix(INSTANCES)) == 1, what="one registered engine, and no dead one")
    door.close()
    serving: dict[tuple[int, int], float] = {}
    for event in run.events():
        who = (event["cohort_id"], event["incarnation"])
        if event["kind"] == "registered":
            if serving:
                raise BrokenError(f"{who} registered while {list(serving)} was not dead")
            serving[who] = event["time"]
        elif event["kind"] in ("dead", "exit", "kill") and event["node_rank"] == 0:
            serving.pop(who, None)


# -- rounds --------------------------------------------------------------------------------------------------------


def rounds(
    run: LabRun,
    kinds: list[Callable[[Round], str]],
    rng: random.Random,
    keep: Keep = nowhere,
) -> list[Row]:
    """One round for each of `kinds`, each kept. Raises `BrokenError` or what a wait raises."""
    results: list[Row] = []
    settled, forgiven = 0.0, False  # when the round before was over, and whether what it lost by then was its to lose
    inode = _lock(run).stat().st_ino
    with Load(run.run_file()["frontend_url"], 3, 3, 5.0, tokens=30, prompts=4, timeout=60.0) as load:
        check(run, inode, load)
        for number, kind in enumerate(kinds, 1):
            time.sleep(rng.uniform(0.0, 0.5))  # a random moment
            this = Round(run, rng, run.wait_full())
            begun = time.monotonic()
            what = kind(this)
            for undo in this.undo:
                undo()
            run.wait_full()
            took = time.monotonic() - begun
            # Full may be from before the fault: what follows must hold a moment later too.
            eventually(lambda since=begun: any(a.sent >= since and not a.error for a in list(load.answers)[-50:]), LONG)
            run.wait_full()
            check(run, inode, load)
            lost = [a for a in load.lost if a.done >= begun and not (forgiven and a.sent < settled)]
            deaf = bool(results) and results[-1]["kind"] in DEAF_AFTER
            forgiven = kind.__name__ in MAY_LOSE or deaf
            if lost and not forgiven:
                raise BrokenError(f"{len(lost)} requests were lost by {kind.__name__}: {lost[0]}")
            settled = time.monotonic()
            row = {"round": number, "kind": kind.__name__, "what": what, "outage_s": round(load.outage(begun), 3)}
            row |= {"failed": len(lost), "longest_s": round(load.longest_wait(begun), 3), "full_s": round(took, 2)}
            results.append(row)
            keep(row)
            print(
                f"{number:4d} {kind.__name__:32s} outage {row['outage_s']:7.3f} s, {len(lost):4d} failed, "
                f"longest answer {row['longest_s']:7.3f} s, full again after {took:6.2f} s: {what}",
                flush=True,
            )
    return results


def go(options: argparse.Namespace, rng: random.Random, keep: Keep) -> list[Row]:
    from gms_launch.engines.reference.demo_model import make

    with tempfile.TemporaryDirectory(prefix="chaos-") as name, Lab(3, slurm=False) as lab:
        make(Path(name) / "model", 8)
        with LabRun(lab, Path(name) / "model", *FLAGS, **ENVIRON).hand() as run, telling(run, options.seed):
            return rounds(run, shuffled(KINDS, options.rounds, rng, options.only), rng, keep)


if __name__ == "__main__":
    command(__doc__, 300, KINDS, go, {"outage_s": "outage", "full_s": "full again"})
