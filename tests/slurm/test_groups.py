"""Groups on nodes of their own, over a network: what dies in one is not seen in the other."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gms_launch.engines.reference import demo_model
from tests import listening
from tests.listening import Row
from tests.load import Load
from tests.slurm.lab import Lab
from tests.slurm.support import QUICK, LabRun
from tests.support import LONG, eventually, groups_full

#: As docs/security.md has it, but for the door that tests leave open.
PORTS = listening.documented(4) - {Row("frontend", "clients", "loopback")} | {Row("frontend", "clients", "network")}


class Groups(LabRun):
    """Two groups of two nodes: g0 on the first two, with the frontend, and g1 on the others."""

    def groups(self) -> dict[str, dict[str, Any]]:
        return {g["name"]: g for g in self.status()["groups"]}

    def full(self, *names: str) -> dict[str, dict[str, Any]]:
        return groups_full(self.groups, names)

    def of(self, group: str, kind: str) -> list[dict[str, Any]]:
        return [e for e in self.events(kind) if e["group"] == group]

    def lives(self, group: str) -> list[tuple[int, int, int]]:
        cohorts = self.groups()[group]["cohorts"]
        return [(c["cohort_id"], c["incarnation"], r["pid"]) for c in cohorts for r in c["ranks"]]

    def kill_primary(self, group: str, index: int, rank: int) -> None:
        """SIGKILL a rank of the primary of a group, the run's `index`th, as a fault would."""
        found = self.full(group)[group]
        primary = found["cohorts"][found["primary"]]
        slot = 10 * index + primary["cohort_id"]
        for pgid in {i.pgid for i in self.tagged(slot, primary["incarnation"], 2 * index + rank)}:
            os.killpg(pgid, signal.SIGKILL)


@pytest.fixture(scope="module")
def four() -> Iterator[Lab]:
    with Lab(4, slurm=False) as lab:
        for name in ("node1", "node2"):
            # Dynamo's frontend takes answers at the address of the default route, where an interface has IPv6 too.
            lab.node(name).run(["ip", "route", "add", "default", "via", f"{lab.net}.254"], check=True)
        yield lab


def test_ranks_of_one_group_die_and_nobody_loses_a_request(four: Lab, model: Path) -> None:
    kills = 2
    with Groups(four, model, *QUICK, "--groups", "2", REFERENCE_TOKEN_SECONDS="0.02").hand() as run:
        assert [g["nnodes"] for g in run.full("g0", "g1").values()] == [2, 2]
        eventually(lambda: listening.of_run(run.run, run.run_file()["ports"])[0] == PORTS)
        untouched = run.lives("g0")
        with Load(run.run_file()["frontend_url"], streams=12, unary=4, rate=5, tokens=40) as load:
            for k in range(kills):
                load.wait_busy(0.5)
                run.kill_primary("g1", 1, k % 2)
                eventually(lambda k=k: len(run.of("g1", "first_token")) == k + 2, LONG, "promoted")  # type: ignore[misc]
                eventually(lambda k=k: len(run.of("g1", "hold_over")) == k + 1, LONG, "let go")  # type: ignore[misc]
        assert load.lost == [] and load.wrong == [], load.said()
        assert run.lives("g0") == untouched and run.of("g0", "kill") == []
        assert len(run.of("g1", "exit")) >= kills
        assert all(e["data"]["moves"] is not None for e in run.of("g1", "hold_over")), "node 0 was asked"
        assert any(e["data"]["moves"] for e in run.of("g1", "hold_over"))


def test_a_group_whose_nodes_do_not_fit_together_ends_the_start_and_says_why(
    four: Lab, model: Path, tmp_path: Path
) -> None:
    run = Groups(four, model, *QUICK, "--groups", "2")
    demo_model.make(tmp_path, 8, seed=7)
    four.node("node4").run(["mount", "--bind", str(tmp_path), str(run.model)], check=True)
    try:
        assert run.hand().exit_codes() == [2] * 4, run.output()
        says = "group g1: node 3 (node4) has another model in the same place than node 2 (node3)"
        assert says in run.output() and run.of("g1", "started") == [], run.output()
    finally:
        four.node("node4").run(["umount", str(run.model)], check=True)
        run.__exit__()


@pytest.mark.parametrize("node", ["node3", pytest.param("node4", marks=pytest.mark.slow)])
def test_a_node_of_one_group_is_lost_and_the_other_gives_its_answers(four: Lab, model: Path, node: str) -> None:
    """Both serve the same model: what the lost one was asked goes on at the other, from the token where it was, through
    whichever frontend; the second one's node neither leads the run nor has a member of etcd.
    """
    flags = ["--lease-ttl=3", "--node-wait=120", "--groups", "2", "--frontends", "2"]
    with Groups(four, model, *flags, REFERENCE_TOKEN_SECONDS="0.02").hand() as run:
        run.full("g0", "g1")
        untouched, before, number = run.lives("g0"), run.lives("g1"), int(node[-1]) - 1
        urls = eventually(lambda: u if len(u := run.run_file()["frontend_urls"]) == 2 else None)
        with (
            Load(urls[0], streams=12, unary=4, rate=5, tokens=40) as load,
            Load(urls[1], streams=6, unary=2, tokens=40, texts=load.texts) as other,
        ):
            load.wait_busy(1.0)
            other.wait_busy(1.0)
            four.node(node).power_off()
            if node == "node3":
                eventually(lambda: {e["node_rank"] for e in run.of("g1", "severed")} == {0, 1}, LONG, "it is lost")
            else:
                eventually(lambda: run.of("g1", "node_lost"), LONG, "it is lost")
            load.wait_busy(1.0)
            other.wait_busy(1.0)
        assert load.lost == [] and load.wrong == [], load.said()
        assert other.lost == [] and other.wrong == [], other.said()
        run.processes.pop(number).wait(60)
        assert run.lives("g0") == untouched and run.of("g0", "kill") == []
        four.node(node).start(daemons=False)
        run.hand(number)
        run.full("g1")
        assert not {life[:2] for life in run.lives("g1")} & {life[:2] for life in before}, "all of it is new"
        assert run.lives("g0") == untouched and run.text()


@pytest.mark.slow
def test_an_agent_of_one_group_is_killed_and_the_run_knows_before_its_lease_is_over(four: Lab, model: Path) -> None:
    """Nobody holds what its engine was asked: the port is closed. So the frontend must not go on asking there."""
    with Groups(four, model, "--lease-ttl=100", "--node-wait=200", "--groups", "2").hand() as run:
        run.full("g0", "g1")
        untouched = run.lives("g0")
        os.kill(run.agents()[2], signal.SIGKILL)
        eventually(lambda: run.of("g1", "lease_revoked"), LONG, "its engine is forgotten")
        assert run.status()["missing_nodes"] == [], "its lease is not over"
        run.processes.pop(2).wait(60)
        run.hand(2)
        run.full("g1")
        assert run.lives("g0") == untouched and len(run.of("g1", "lease_revoked")) == 1, "its successor is not meant"
