"""A node is lost and a spare takes its place: the rest keeps its weights, and who comes back is the new spare."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from gms_launch.process import proc
from gms_launch.transport import sbatch
from tests.slurm.lab import Lab
from tests.slurm.support import LabRun, since
from tests.support import LONG, eventually

#: Three nodes, of which the last is a spare.
SPARE = ("--spares=1", "--lease-ttl=3", "--spare-wait=4", "--node-wait=300")


def hosts(status: dict[str, Any]) -> list[str]:
    return [n["host"] for n in status["nodes"]]


def spares(run: LabRun) -> list[str]:
    return [n["host"] for n in run.status()["spares"]]


def errors(run: LabRun) -> list[dict[str, Any]]:
    """Errors of the agents' own."""
    return run.events("internal_error")


def gms_of(status: dict[str, Any], host: str) -> list[tuple[int, int]]:
    """The GMS servers of a node, as they were started."""
    (node,) = (n for n in status["nodes"] if n["host"] == host)
    return [(s["pid"], s["starts"]) for s in node["services"] if s["name"].startswith("gms")]


def test_a_spare_takes_the_place_of_a_node_that_is_switched_off(bare_lab: Lab, model: Path) -> None:
    run = LabRun(bare_lab, model, *SPARE).hand()
    with run:
        begun = run.wait_full()
        before = run.text()
        assert hosts(begun) == ["node1", "node2"]
        eventually(lambda: spares(run) == ["node3"], LONG, "the spare has come")
        assert not run.on_node(2, "gms-0") and not run.engines(2), "a spare has an agent and nothing else"
        weights = gms_of(begun, "node1")
        bare_lab.node("node2").power_off()
        off = time.monotonic()
        run.processes.pop(1).wait(60)
        eventually(lambda: run.events("spare_takes_over"), LONG)
        status = run.wait_full()
        print(f"full on the spare after {since(off):.1f} s")
        assert hosts(status) == ["node1", "node3"] and status["lost_nodes"] == []
        assert run.text() == before
        assert gms_of(status, "node1") == weights, "the same server as before"
        eventually(lambda: run.loads() == {"node1": 1, "node3": 1}, what="the spare alone has read weights")
        # Switched on again, it is the spare, though it is told its old rank; and takes over in its turn.
        bare_lab.node("node2").start(daemons=False)
        run.hand(1)
        eventually(lambda: spares(run) == ["node2"], LONG)
        assert hosts(run.wait_full()) == ["node1", "node3"]
        bare_lab.node("node3").power_off()
        eventually(lambda: len(run.events("spare_takes_over")) == 2, LONG)
        assert hosts(run.wait_full()) == ["node1", "node2"]
        assert run.text() == before
        assert gms_of(run.status(), "node1") == weights
        assert not errors(run)
        bare_lab.node("node3").start(daemons=False)


def test_an_agent_that_stood_still_finds_its_place_taken_and_does_no_harm(bare_lab: Lab, model: Path) -> None:
    """Stopped for longer than its lease: its guard ends what runs there, and awake it is the spare."""
    run = LabRun(bare_lab, model, *SPARE).hand()
    with run:
        before = run.text()
        old = run.engines(1)
        agent = run.agents()[1]
        os.kill(agent, signal.SIGSTOP)
        try:
            eventually(lambda: not any(proc.alive(i.identity) for i in old), what="they are dead")
            assert not run.events("spare_takes_over"), "before anybody else is in their place"
            eventually(lambda: run.events("spare_takes_over"), LONG)
            status = run.wait_full()
            assert hosts(status) == ["node1", "node3"]
            lives = [(c["incarnation"], [r["pid"] for r in c["ranks"]]) for c in status["cohorts"]]
        finally:
            os.kill(agent, signal.SIGCONT)
        eventually(lambda: spares(run) == ["node2"], LONG)
        assert run.agents()[1] == agent, "the same process"
        assert not run.lab.node("node2").pids("gms"), "and nothing of its old place is left"
        status = run.wait_full()
        assert hosts(status) == ["node1", "node3"]
        assert [(c["incarnation"], [r["pid"] for r in c["ranks"]]) for c in status["cohorts"]] == lives, (
            "nobody noticed"
        )
        assert run.text() == before


@pytest.mark.slow
def test_a_stopped_agent_on_a_node_that_is_cut_off_has_no_ranks_when_the_spare_starts(
    bare_lab: Lab, model: Path
) -> None:
    """Nobody's word reaches its guard, which knows until when the node has its place."""
    run = LabRun(bare_lab, model, *SPARE).hand()
    with run:
        before, old = run.text(), run.engines(1)
        agent = run.agents()[1]
        os.kill(agent, signal.SIGSTOP)
        bare_lab.node("node2").cut()
        try:
            eventually(lambda: not any(proc.alive(i.identity) for i in old), what="they are dead")
            assert not run.events("spare_takes_over"), "before anybody else is in their place"
            eventually(lambda: run.events("spare_takes_over"), LONG)
            assert hosts(run.wait_full()) == ["node1", "node3"]
        finally:
            bare_lab.node("node2").join()
            os.kill(agent, signal.SIGCONT)
        eventually(lambda: spares(run) == ["node2"], LONG)
        assert hosts(run.wait_full()) == ["node1", "node3"]
        assert run.text() == before and not errors(run)


def test_a_node_that_slurm_calls_down_is_not_waited_for(fragile_lab: Lab, model: Path) -> None:
    flags = ("--spares=1", "--lease-ttl=3", "--spare-wait=250", "--node-wait=300")
    run = LabRun(fragile_lab, model, *flags).srun(*sbatch.SURVIVES)
    with run:
        before = run.text()
        assert hosts(run.status()) == ["node1", "node2"]
        eventually(lambda: spares(run) == ["node3"], LONG, "the spare has come")
        fragile_lab.run(["scontrol", "update", "nodename=node2", "state=down", "reason=test"])
        eventually(lambda: run.events("node_down"), 60, lambda: str(fragile_lab.run(["scontrol", "show", "job"])))
        eventually(lambda: run.events("spare_takes_over"), LONG)
        assert hosts(run.wait_full()) == ["node1", "node3"]
        assert run.text() == before and not errors(run)
        down = run.cli("down")
        assert all(host in down.stdout + down.stderr for host in ("node1", "node2", "node3")), down
        run.processes[0].terminate()  # this Slurm's srun waits for the lost node
    run.wait_gone()


@pytest.mark.slow
def test_a_groups_leader_that_has_a_member_of_etcd_is_followed_by_a_spare(model: Path) -> None:
    """Two groups of two nodes and a spare; the third node leads a group, and the run's etcd has a member there."""
    flags = ("--groups=2", "--spares=1", "--etcd-members=3", "--lease-ttl=3", "--spare-wait=4", "--node-wait=300")

    def group(name: str) -> dict[str, Any]:
        (found,) = (g for g in run.status()["groups"] if g["name"] == name)
        return dict(found)

    def lives(name: str) -> list[tuple[int, list[int]]]:
        return [(c["incarnation"], [r["pid"] for r in c["ranks"]]) for c in group(name)["cohorts"]]

    with Lab(nodes=5, slurm=False) as lab:
        # Dynamo's frontend takes answers at the address of the default route, where an interface has IPv6 too.
        for name in ("node1", "node5"):  # the spare may come to have it too
            lab.node(name).run(["ip", "route", "add", "default", "via", f"{lab.net}.254"], check=True)
        run = LabRun(lab, model, *flags).hand()
        with run:
            untouched, before = lives("g0"), run.text()
            lab.node("node3").power_off()
            off = time.monotonic()
            run.processes.pop(2).wait(60)
            eventually(lambda: run.events("spare_takes_over"), LONG)
            eventually(lambda: hosts(group("g1")) == ["node5", "node4"], LONG, "the spare leads the group")
            run.wait_full()
            print(f"full on the spare after {since(off):.1f} s")
            eventually(lambda: len([e for e in run.events("member_joined") if e["node_rank"] == 2]) == 2, LONG, "etcd")
            assert lives("g0") == untouched, "nobody noticed there"
            assert {run.text() for _ in range(4)} == {before} and not errors(run)
            # The group that has moved fails over as before.
            assert run.cli("kill-primary", "--group", "g1").returncode == 0
            run.wait_full()
            assert lives("g0") == untouched
