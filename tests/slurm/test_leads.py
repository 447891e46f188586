"""The run's leader role moves: node 0 is switched off, or its agent stands still, and the run goes on without it."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gms_launch.process import proc
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
        before = eventually(lambda: served(fronts[1]), LONG)
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
            before, untouched = eventually(lambda: served(fronts[1]), LONG), run.lives("g1")
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


@pytest.mark.slow
def test_a_spare_takes_the_place_of_a_leader_that_stands_still(model: Path) -> None:
    """Awake, the agent that began the run finds that it leads nothing, not even a node with work."""
    flags = ("--groups=2", "--spares=1", "--etcd-members=3", "--frontends=auto", "--lease-ttl=3", "--spare-wait=4")
    with lab(5) as made:
        routed(made)
        with Led(made, model, *flags, "--node-wait=300").hand() as run:
            run.full("g0", "g1")
            before = eventually(lambda: served(run.fronts()[1]), LONG)
            untouched, old = run.lives("g1"), run.engines_at("node1")
            agent = run.agents()[0]
            os.kill(agent, signal.SIGSTOP)
            try:
                eventually(lambda: not any(map(proc.alive, old)), LONG, "its guard ends them")
                assert not run.events("spare_takes_over"), "before anybody else is in their place"
                eventually(lambda: run.events("spare_takes_over"), LONG)
                found = run.full("g0", "g1")
                assert [n["host"] for n in found["g0"]["nodes"]] == ["node5", "node2"]
                lives, leads = run.lives("g0"), run.leader()
            finally:
                os.kill(agent, signal.SIGCONT)
            eventually(lambda: [n["host"] for n in run.status()["spares"]] == ["node1"], LONG)
            assert run.agents()[0] == agent, "the same process"
            eventually(lambda: not run.engines_at("node1"), LONG)
            run.full("g0", "g1")
            assert run.lives("g0") == lives and run.lives("g1") == untouched and run.leader() == leads == 1
            eventually(lambda: all(served(front) == before for front in run.fronts()), LONG)
            assert not run.events("internal_error")
            done = run.cli("down")
            assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("least", [1, 2])
def test_a_group_whose_leading_node_stays_away_is_over(model: Path, least: int) -> None:
    """There is no spare: the run's leader says so once node_wait is over, and the run ends if too few are left."""
    flags = ("--groups=2", f"--min-groups={least}", "--etcd-members=3", "--frontends=auto", "--lease-ttl=3")
    with lab(4) as made:
        routed(made)
        with Led(made, model, *flags, "--node-wait=15").hand() as run:
            run.full("g0", "g1")
            untouched = run.lives("g0")
            made.node("node3").power_off()
            off = time.monotonic()
            eventually(lambda: run.of("g1", "group_over"), LONG, "it is over")
            print(f"over after {since(off):.1f} s")
            why = "node 2 (node3), which leads it, was lost and did not come back within 15 s (node_wait)"
            assert run.of("g1", "group_over")[0]["detail"] == why
            if least == 2:
                codes = [p.wait(LONG) for k, p in enumerate(run.processes) if k != 2]
                assert codes == [4, 4, 4] and run.run_file()["exit_code"] == 4
                assert "1 group of 2 can still serve, and 2 must (--min-groups)" in run.run_file()["reason"]
                return
            eventually(lambda: run.groups()["g1"]["over"] == why, LONG, "and status says so")
            assert run.lives("g0") == untouched and served(run.fronts()[1]) is not None
            # What comes back too late does not begin it again.
            run.processes.pop(2).wait(60)
            made.node("node3").start(daemons=False)
            routed(made, "node3")
            run.hand(2)
            eventually(lambda: not run.status()["missing_nodes"], LONG)
            time.sleep(3.0)  # nothing is to happen
            assert run.groups()["g1"]["over"] == why and not run.engines_at("node3", "node4")
            assert run.lives("g0") == untouched and not run.events("internal_error")


@pytest.mark.slow
def test_one_engine_alone_is_a_group_whose_first_node_may_be_lost(model: Path, tmp_path: Path) -> None:
    """A run of one engine over three nodes and a spare, said as one `[[group]]`."""
    file = tmp_path / "settings.toml"
    file.write_text('[[group]]\nname = "all"\nnodes = 3\n')
    flags = (f"--config={file}", "--spares=1", "--etcd-members=3", "--frontends=auto", "--lease-ttl=3")
    with lab(4) as made:
        routed(made)
        with Led(made, model, *flags, "--spare-wait=4", "--node-wait=300").hand() as run:
            run.full("all")
            fronts = eventually(lambda: f if len(f := run.fronts()) == 3 else None)
            before = eventually(lambda: served(fronts[1]), LONG)
            made.node("node1").power_off()
            off = time.monotonic()
            run.processes.pop(0).wait(60)
            eventually(lambda: run.events("spare_takes_over"), LONG)
            found = run.full("all")
            print(f"full on the spare after {since(off):.1f} s")
            assert [n["host"] for n in found["all"]["nodes"]] == ["node4", "node2", "node3"]
            eventually(lambda: served(fronts[1]) == before and served(fronts[2]) == before, LONG)
            assert run.leader() == 1 and not run.events("internal_error")


@pytest.mark.slow
def test_a_spare_that_cannot_begin_ends_alone(model: Path) -> None:
    """It can have no frontend any more, since its default route is gone: the place stays empty, the others serve on."""
    flags = ("--groups=3", "--spares=1", "--etcd-members=3", "--frontends=auto", "--lease-ttl=3", "--spare-wait=4")
    with lab(4) as made:
        routed(made)
        with Led(made, model, *flags, "--node-wait=300").hand() as run:
            run.full("g0", "g1", "g2")
            fronts = eventually(lambda: f if len(f := run.fronts()) == 3 else None)
            before, lives = eventually(lambda: served(fronts[1]), LONG), run.lives("g1") + run.lives("g2")
            made.node("node4").run(["ip", "route", "del", "default"], check=True)
            made.node("node1").power_off()
            (refused,) = eventually(lambda: run.events("node_refused"), LONG)
            assert "has to take answers at" in refused["detail"]
            assert run.processes.pop(3).wait(60) == 2
            run.processes.pop(0).wait(60)
            eventually(lambda: run.groups()["g0"]["missing_nodes"] == [0], LONG, "its lease is over")
            assert run.lives("g1") + run.lives("g2") == lives and served(fronts[2]) == before
            assert not run.events("stopping")
            # Started again as it is, it is refused at once.
            run.hand(3)
            assert run.processes.pop().wait(60) == 2 and "has to take answers at" in run.output()[-3000:]
            assert not run.events("stopping") and run.lives("g1") + run.lives("g2") == lives
