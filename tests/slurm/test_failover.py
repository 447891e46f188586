"""Whole-group failover over three nodes: a rank dies, its whole life is dead everywhere, the shadow serves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from gms_launch.process import proc
from tests.slurm.lab import Lab
from tests.slurm.support import LabRun
from tests.support import LONG, eventually, kill


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("times", [1, pytest.param(10, marks=pytest.mark.slow)])
def test_every_rank_of_the_primary_killed_again_and_again_and_then_the_shadows(
    lab: Lab, model: Path, times: int
) -> None:
    with LabRun(lab, model) as run:
        before = run.text()
        assert before
        for number in range(3 * times):
            status = run.wait_full()
            victim = run.kill_rank(status["primary"], number % 3)
            eventually(lambda: run.text(2.0) == before, what=f"an answer after kill {number}")
            run.wait_dead(*victim)
            status = run.wait_full()
            assert status["primary"] != victim[0]
            assert status["cohorts"][victim[0]]["incarnation"] == victim[1] + 1
        primary = status["primary"]
        serving = {i.identity for i in run.tagged(primary)}
        for node_rank in range(3):
            victim = run.kill_rank(1 - primary, node_rank)
            run.wait_dead(*victim)
            eventually(lambda victim=victim: run.life(1 - primary) == victim[1] + 1)
            assert run.wait_full()["primary"] == primary
        assert {i.identity for i in run.tagged(primary)} == serving, "the primary was not touched"
        assert run.text() == before
        once = {"node1": 1, "node2": 1, "node3": 1}
        eventually(lambda: run.loads() == once, what="one load from disk on every node")

        def told() -> list[dict[str, Any]]:
            found: list[dict[str, Any]] = json.loads(run.cli("timeline", "--json").stdout)["failovers"]
            return found if all(f["complete"] for f in found) else []

        failovers = eventually(told, LONG, "all are complete")
        assert len(failovers) == 3 * times
        for failover in failovers:
            assert set(failover["steps"]) >= {
                "detected",
                "dead",
                "lock",
                "awake",
                "registered",
                "first_token",
                "fenced",
            }
            assert failover["cause"].startswith("killed by SIGKILL")
        down = run.cli("down")
        assert down.returncode == 0, down.stderr
        assert all(f"node {k} node{k + 1}: nothing of it is alive" in down.stdout for k in range(3))
        assert run.left() == {}
        assert run.exit_codes() == [0]


def test_without_the_fast_path_the_leaders_death_leaves_a_shadow_that_waits_for_an_orphan(
    lab: Lab, model: Path
) -> None:
    """What the recipe does: the shadow has the lock, and a worker of the dead primary has the KV memory it needs."""
    with LabRun(lab, model, "--no-group-kill") as run:
        before = run.text()
        primary = run.status()["primary"]
        victim = run.kill_rank(primary, 0)
        eventually(
            lambda: [e for e in run.events("lock") if e["cohort_id"] == 1 - primary], what="the shadow has the lock"
        )
        assert run.text(4.0) is None, "nobody serves"
        orphans = run.tagged(*victim)
        assert len(orphans) == 4, "a rank process and its worker, on two nodes"
        for orphan in orphans:
            kill(orphan.pid)  # its rank's end may have been its own
        eventually(lambda: run.text(2.0) == before, what="the shadow goes on")


def test_without_the_fast_path_a_remote_ranks_death_is_an_outage_that_nobody_notices(lab: Lab, model: Path) -> None:
    with LabRun(lab, model, "--no-group-kill") as run:
        before = run.text()
        primary = run.status()["primary"]
        victim = run.kill_rank(primary, 2)
        assert run.text(4.0) is None, "nobody serves"
        leader = run.tagged(*victim, 0)
        assert leader, "the leader is up"
        assert run.status()["nodes"][0]["lock_holder"] == f"cohort {primary}", "and has the lock"
        for rank in (0, 1):
            for info in run.tagged(*victim, rank):
                kill(info.pid)  # its rank's end may have been its own
        eventually(lambda: run.text(2.0) == before, what="the shadow serves once the leader is dead too")


def test_with_the_fast_path_both_come_to_an_end(lab: Lab, model: Path) -> None:
    with LabRun(lab, model) as run:
        before = run.text()
        for node_rank in (0, 2):
            primary = run.wait_full()["primary"]
            victim = run.kill_rank(primary, node_rank)
            eventually(lambda: run.text(2.0) == before)
            run.wait_dead(*victim)


def test_a_stray_that_holds_the_lock_is_found_and_promotion_goes_on(lab: Lab, model: Path) -> None:
    """Setsid, double fork, empty environment, the lock's descriptor: and a rank of the primary dies on another node."""
    with LabRun(lab, model, REFERENCE_STRAY="hard") as run:
        before = run.text()
        primary = run.status()["primary"]
        mark = f"stray-of-{run.run}/"
        (stray,) = [i for pid in proc.pids() if mark in proc.command_line(pid) and (i := proc.stat(pid)) is not None]
        assert proc.alive(stray.identity) and proc.tag_of(stray.pid) is None
        run.kill_rank(primary, 2)
        eventually(lambda: run.text() == before)
        eventually(lambda: not proc.alive(stray.identity))
        eventually(lambda: any("found outside the group" in e["detail"] for e in run.events("dead")))
        run.wait_full()
        done = run.cli("down")
        assert done.returncode == 0 and done.stdout.count("nothing of it is alive") == 3, done.stdout + done.stderr
        assert not [pid for pid in proc.pids() if mark in proc.command_line(pid)], "nor is the next primary's stray"


def test_several_shadows_and_several_gpus_a_node(lab: Lab, model: Path) -> None:
    run = LabRun(lab, model, "--shadows=2").srun("--gres=gpu:2")
    with run:
        status = run.status()
        assert len(status["cohorts"]) == 3 and [len(n["gms"]) for n in status["nodes"]] == [4, 4, 4]
        before = run.text()
        first = run.kill_rank(status["primary"], 1)
        eventually(lambda: run.text(2.0) == before)
        others = {0, 1, 2} - {first[0]}
        primary = eventually(lambda: {run.status()["primary"]} & others, what="the status tells of the next").pop()
        second = run.kill_rank(primary, 2)
        eventually(lambda: run.text(2.0) == before)
        run.wait_full()
        assert not run.tagged(*first) and not run.tagged(*second)


def test_exit_code_0_counts_as_a_failure(lab: Lab, model: Path) -> None:
    # So seldom are ranks looked at that the worker's own end is not waited for; see test_a_worker_that_dies_...
    with LabRun(lab, model, "--health-interval", "60", "--health-timeout", "120") as run:
        before = run.text()
        primary, life = run.status()["primary"], 1
        # A headless rank whose worker dies ends with exit code 0, as upstream's do.
        workers = [i for i in run.tagged(primary, life, 1) if i.pid != i.pgid]
        assert len(workers) == 1
        kill(workers[0].pid)
        eventually(lambda: run.text(2.0) == before and run.status()["primary"] == 1 - primary)
        (exited,) = eventually(
            lambda: [e for e in run.events("exit") if e["node_rank"] == 1 and e["detail"] == "exit code 0"]
        )
        assert exited["cohort_id"] == primary
        run.wait_full()


def test_drills_kill_one_rank_only_and_the_rest_follows(lab: Lab, model: Path) -> None:
    with LabRun(lab, model) as run:
        before = run.text()
        for scope, node_rank in (("leader", 0), ("rank:2", 2)):
            run.wait_full()
            done = run.cli("kill-primary", "--scope", scope, "--json")
            assert done.returncode == 0, done.stderr
            failover = json.loads(done.stdout)
            assert failover["cause"] == "drill"
            life = (failover["victim"]["cohort_id"], failover["victim"]["incarnation"])

            def kills(life: tuple[int, int] = life) -> list[dict[str, Any]]:
                return [e for e in run.events("kill") if (e["cohort_id"], e["incarnation"]) == life]

            (first,) = eventually(lambda: [e for e in kills() if e["detail"] == "drill"])
            assert first["node_rank"] == node_rank and first["time"] == min(e["time"] for e in kills())
            assert {e["detail"] for e in kills()} <= {
                "drill",
                *(f"a rank of the same life ended: rank {k}" for k in range(3)),
            }
            assert run.text() == before
