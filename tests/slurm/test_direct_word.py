"""The word of a life's end goes from node to node while etcd, or the leader's agent, stands still."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

from gms_launch.process import proc
from tests.slurm.lab import Lab
from tests.slurm.support import LabRun, since
from tests.support import LONG, eventually, stopped


def stands_still(pid: int) -> bool:
    found = proc.stat(pid)
    return found is not None and found.state == "T"


def test_a_life_ends_everywhere_while_etcd_is_frozen(bare_lab: Lab, model: Path) -> None:
    # So long that the leader's agent does not restart it before this is over.
    flags = ("--service-liveness=60", "--dynamo-lease-ttl=200")
    with LabRun(bare_lab, model, *flags, nodes=["node1", "node2"]).hand() as run:
        before = run.text()
        (etcd,) = run.on_node(0, "etcd")
        primary = run.status()["primary"]
        life = run.life(primary)
        with stopped(etcd.pid):
            begun = time.monotonic()
            kill_all(run.on_node(1, primary, life))
            eventually(lambda: not run.tagged(primary, life), what="dead on the leader's node too")
            assert stands_still(etcd.pid), "and etcd has not helped"
            dead = since(begun)
        eventually(lambda: run.text(2.0) == before, LONG, "the shadow serves once etcd is back")
        print(f"dead everywhere after {dead:.2f} s, served again after {since(begun):.2f} s")
        run.wait_full()


def kill_all(found: list[proc.Stat]) -> None:
    assert found
    for group in {info.pgid for info in found}:
        os.killpg(group, signal.SIGKILL)


def test_a_failover_while_the_leaders_agent_stands_still(bare_lab: Lab, model: Path) -> None:
    with LabRun(bare_lab, model, nodes=["node1", "node2"]).hand() as run:
        before = run.text()
        primary = run.status()["primary"]
        life = run.life(primary)
        agent = run.agents()[0]
        with stopped(agent):
            begun = time.monotonic()
            kill_all(run.on_node(1, primary, life))
            eventually(lambda: not run.tagged(primary, life), what="the guard kills the leader's rank of that life")
            dead = since(begun)
            eventually(lambda: run.text(2.0) == before, LONG, "the shadow serves")
            print(f"dead everywhere after {dead:.2f} s, served again after {since(begun):.2f} s")
            assert stands_still(agent)
            silent = eventually(lambda: (found := run.status())["leader_silent"] and found)
            assert silent["leader_reported_ago"] >= 3 and silent["redundancy"] != "full"
            told = run.cli("status").stdout
            assert "as of" in told and "the leader's agent (pid " in told and "node1) has not reported for" in told
        assert run.wait_full()["leader_silent"] is False
        told = eventually(lambda: run.events("guard_kill"), what="it is told")
        assert [(e["cohort_id"], e["incarnation"]) for e in told] == [(primary, life)]
        assert run.text() == before
