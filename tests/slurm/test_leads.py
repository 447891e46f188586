"""The run's leader role moves: node 0 is switched off, or its agent stands still, and the run goes on without it."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.slurm.lab import Lab
from tests.slurm.moving import Led, routed
from tests.slurm.support import since
from tests.support import LONG, complete, eventually

#: Three nodes with a member of etcd, a group and a frontend each.
FLAGS = ("--groups=3", "--etcd-members=3", "--frontends=auto", "--lease-ttl=3", "--node-wait=300")


def served(where: tuple[str, int]) -> str | None:
    return complete(*where, "hello", 8, 10.0)


def lab(nodes: int) -> Lab:
    return Lab(nodes, slurm=False)


@pytest.fixture
def three() -> Iterator[Lab]:
    with lab(3) as made:
        routed(made)
        yield made


def test_the_first_node_is_switched_off_and_another_leads(three: Lab, model: Path) -> None:
    with Led(three, model, *FLAGS).hand() as run:
        run.full("g0", "g1", "g2")
        assert run.leader() == 0
        fronts = eventually(lambda: f if len(f := run.fronts()) == 3 else None)
        before = served(fronts[1])
        lives = run.lives("g1") + run.lives("g2")
        three.node("node1").power_off()
        off = time.monotonic()
        eventually(lambda: run.leader() == 1, LONG, "the next one leads")
        print(f"led again after {since(off):.1f} s")
        eventually(lambda: run.run_file()["leader_host"] == "node2", LONG, "run.json says so")
        assert run.run_file()["ended"] is None
        # What is sent to the lost node's engine waits until its registration is ended.
        eventually(lambda: served(fronts[1]) == before and served(fronts[2]) == before, LONG)
        assert run.lives("g1") + run.lives("g2") == lives, "nobody noticed"
        assert run.cli("kill-primary", "--group", "g2").returncode == 0
        run.full("g1", "g2")
        # Switched on again, it comes to the run that goes on.
        run.processes.pop(0).wait(60)
        three.node("node1").start(daemons=False)
        routed(three, "node1")
        run.hand(0)
        run.full("g0", "g1", "g2")
        assert run.leader() == 1 and run.lives("g1") == lives[: len(lives) // 2]
        assert not run.events("internal_error")
        done = run.cli("down")
        assert done.returncode == 0, done.stdout + done.stderr
        ended: dict[str, Any] = run.run_file()
        assert ended["exit_code"] == 0 and ended["ended"] is not None and len(ended["nodes"]) == 3
    run.wait_gone()


def test_a_leader_that_stood_still_does_no_harm(three: Lab, model: Path) -> None:
    with Led(three, model, *FLAGS).hand() as run:
        run.full("g0", "g1", "g2")
        lives = run.lives("g1") + run.lives("g2")
        agent = run.agents()[0]
        os.kill(agent, signal.SIGSTOP)
        try:
            eventually(lambda: run.leader() == 1, LONG, "the next one leads")
            eventually(lambda: run.run_file()["leader_host"] == "node2", LONG)
        finally:
            os.kill(agent, signal.SIGCONT)
        run.full("g0", "g1", "g2")
        assert run.leader() == 1 and run.run_file()["leader_host"] == "node2"
        assert run.lives("g1") + run.lives("g2") == lives
        assert not run.events("internal_error")


def test_a_spare_takes_the_first_nodes_place(model: Path) -> None:
    """Two groups of two nodes and a spare; node 0 leads the run and the first group, and has a frontend."""
    flags = ("--groups=2", "--spares=1", "--etcd-members=3", "--frontends=auto", "--lease-ttl=3", "--spare-wait=4")
    with lab(5) as made:
        routed(made)
        with Led(made, model, *flags, "--node-wait=300").hand() as run:
            run.full("g0", "g1")
            fronts = eventually(lambda: f if len(f := run.fronts()) == 3 else None)
            before, untouched = served(fronts[1]), run.lives("g1")
            made.node("node1").power_off()
            off = time.monotonic()
            run.processes.pop(0).wait(60)
            eventually(lambda: run.leader() == 1, LONG)
            eventually(lambda: served(fronts[2]) == before, LONG)
            eventually(lambda: run.events("spare_takes_over"), LONG)
            found = run.full("g0", "g1")
            print(f"full on the spare after {since(off):.1f} s")
            assert [n["host"] for n in found["g0"]["nodes"]] == ["node5", "node2"]
            assert run.lives("g1") == untouched, "nobody noticed there"
            again = eventually(lambda: f if (f := run.fronts())[0] != fronts[0] else None, LONG, "a frontend there")
            eventually(lambda: served(again[0]) == before, LONG)
            assert not run.events("internal_error")
            # Switched on again, node 1 is the spare, though it is told that it is the first.
            made.node("node1").start(daemons=False)
            routed(made, "node1")
            run.hand(0)
            eventually(lambda: [n["host"] for n in run.status()["spares"]] == ["node1"], LONG)
