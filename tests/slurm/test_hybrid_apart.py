"""Hybrid load balancing over a network: a node that does not lead its engine is switched off under load.

Dynamo's leases are set so long that they would outlive the test: what is gone before was ended by somebody.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from gms_launch.control.client import Etcd
from gms_launch.control.keys import DYNAMO_INSTANCES, Keys, dynamo_lease
from gms_launch.node.severing import HEARD
from gms_launch.process.listener import advertised
from gms_launch.run.rundir import RunDir
from tests.integration.test_hybrid import of_instance
from tests.load import Load
from tests.slurm.lab import Lab
from tests.slurm.moving import routed
from tests.slurm.test_groups import Groups
from tests.support import LONG, PATIENCE, eventually, kill

HYBRID = ("--virtual-gpus=2", "--dp=4", "--dp-lb=hybrid", "--activation=agent")
FLAGS = (*HYBRID, "--lease-ttl=3", "--node-wait=300", f"--dynamo-lease-ttl={3 * LONG:g}")
#: To the engine. Four replicas on two nodes, with their weights shared out over all.
OWN = ("--", "--enable-expert-parallel")
SLOW = {"REFERENCE_TOKEN_SECONDS": "0.05"}


class Spread(Groups):
    """What is registered with Dynamo, and what is told of lost nodes, of a run with hybrid load balancing."""

    def under(self, prefix: str) -> dict[str, bytes]:
        one = Etcd(RunDir(self.home).credentials().access(tuple(self.run_file()["etcd_endpoints"])))
        try:
            return one.get_prefix(prefix, retry=PATIENCE)
        finally:
            one.close()

    def registered(self) -> dict[str, set[int]]:
        """By machine: the leases under which engines are registered that take requests there."""
        names, found = {node.address: name for name, node in self.lab.nodes.items()}, dict[str, set[int]]()
        for key, record in self.under(DYNAMO_INSTANCES).items():
            lease, where = dynamo_lease(key), advertised(record)
            if "/generate/" in key and lease is not None and where is not None:
                found.setdefault(names[where[0]], set()).add(lease)
        return found

    def serve_at(self, *names: str) -> dict[str, set[int]]:
        """Wait until one engine is registered on each of these machines, and nothing else, and each gives the text."""

        def look() -> dict[str, set[int]]:
            found = self.registered()
            return found if set(found) == set(names) and all(len(n) == 1 for n in found.values()) else {}

        found = eventually(look, LONG, lambda: f"engines on {names}: {self.registered()}")
        url = self.run_file()["frontend_url"]
        for (instance,) in found.values():
            said = eventually(lambda i=instance: s if (s := of_instance(url, i, "hello", 8))[1] == {i} else None, LONG)  # type: ignore[misc]
            assert said[0] == self.text()
        return found

    def dark(self) -> list[str]:
        return sorted(self.under(Keys(self.run).dark))

    def revoked(self) -> set[int]:
        """The leases that the run's leader has ended for a lost node."""
        return {
            int(e["detail"].partition(":")[0], 16) for e in self.events("lease_revoked") if "is lost" in e["detail"]
        }

    def switch_off(self, *names: str) -> float:
        for name in names:
            self.lab.node(name).power_off()
        return time.monotonic()

    def switch_on(self, *ranks: int) -> None:
        """As after a loss of power: its agent is begun anew."""
        for rank in ranks:
            self.processes[rank].wait(60)
            self.lab.node(self.nodes[rank]).start(daemons=False)
            routed(self.lab, self.nodes[rank])
            self.hand(rank)
            self.processes[rank] = self.processes.pop()


def in_flight(load: Load, moment: float) -> int:
    return sum(len(load.in_flight_at(moment, stream)) for stream in (True, False))


def nothing_is_severed_now(run: Spread, load: Load, severed: Sequence[dict[str, Any]]) -> None:
    """Connections with who is back are new ones: for longer than it takes to end those of a lost node."""
    load.wait_busy(2 * HEARD)
    assert run.events("severed") == severed and run.events("not_severed") == []


@pytest.mark.slow
def test_the_second_node_is_switched_off_and_nothing_waits_for_it(model: Path) -> None:
    with Lab(2, slurm=False) as lab:
        routed(lab)
        with Spread(lab, model, *FLAGS, *OWN, **SLOW).hand() as run:
            before, url = run.serve_at("node1", "node2"), run.run_file()["frontend_url"]
            with Load(url, streams=8, unary=4, tokens=60, timeout=2 * LONG) as load:
                load.wait_busy(1.0)
                off = run.switch_off("node2")
                eventually(lambda: not run.registered(), LONG, "neither node's engine is registered")
                print(f"nothing is registered after {time.monotonic() - off:.1f} s")
                eventually(lambda: in_flight(load, off) >= 12, LONG, "all that was in flight has ended")
                print(f"all that was in flight has ended after {time.monotonic() - off:.1f} s")
                load.wait_busy(1.0)
            print(load.said(), {a.error[:160] for a in load.lost})
            assert load.lost and load.wrong == [], load.said()
            assert not any("Timeout" in a.error for a in load.lost), load.said()
            severed = eventually(lambda: run.events("severed"), LONG, "its connections were ended")
            assert run.revoked() == before["node2"]
            (lost,) = run.events("node_lost")
            assert max(e["time"] for e in run.events("lease_revoked")) - lost["time"] < PATIENCE
            assert [(e["node_rank"], "node2" in e["detail"]) for e in severed] == [(0, True)]
            assert run.dark() == [Keys(run.run).dark_of("", 1)]
            run.switch_on(1)
            run.wait_full()
            after = run.serve_at("node1", "node2")
            assert not set.union(*after.values()) & set.union(*before.values()), "both are new"
            eventually(lambda: run.dark() == [], LONG, "it is not lost any more")
            with Load(url, streams=8, unary=4, tokens=20) as load:
                nothing_is_severed_now(run, load, severed)
            assert load.lost == [] and load.wrong == [], load.said()
            assert run.registered() == after and run.revoked() == before["node2"]
            assert not run.events("internal_error")


@pytest.mark.slow
def test_an_agent_that_was_cut_off_registers_anew_and_nothing_of_that_is_ended(model: Path) -> None:
    """The same agent at the same address: what it had told before, and what was said of it, is not held against it."""
    with Lab(2, slurm=False) as lab:
        routed(lab)
        with Spread(lab, model, *FLAGS, *OWN, **SLOW).hand() as run:
            before, agent = run.serve_at("node1", "node2"), run.status()["nodes"][1]["agent_pid"]
            lab.node("node2").cut()
            eventually(lambda: not run.registered(), LONG, "neither node's engine is registered")
            eventually(lambda: run.events("severed"), LONG, "nor is anything waited for there")
            severed = run.events("severed")
            lab.node("node2").join()
            run.wait_full()
            assert run.status()["nodes"][1]["agent_pid"] == agent, "the agent had stayed"
            after = run.serve_at("node1", "node2")
            eventually(lambda: run.dark() == [], LONG, "it is not lost any more")
            with Load(run.run_file()["frontend_url"], streams=8, unary=4, tokens=20) as load:
                nothing_is_severed_now(run, load, severed)
            assert load.lost == [] and load.wrong == [], load.said()
            assert run.registered() == after and run.revoked() == before["node2"]
            assert not run.events("internal_error")


@pytest.mark.slow
def test_the_second_nodes_agent_is_killed_and_its_engine_is_forgotten_before_its_lease_is_over(model: Path) -> None:
    """By its guard's word. Nobody holds what its engine was asked: the port is closed."""
    with Lab(2, slurm=False) as lab:
        routed(lab)
        flags = ("--lease-ttl=100", "--node-wait=300", f"--dynamo-lease-ttl={3 * LONG:g}")
        with Spread(lab, model, *HYBRID, *flags, *OWN).hand() as run:
            before = run.serve_at("node1", "node2")
            kill(run.agents()[1])
            eventually(lambda: run.revoked() == before["node2"], LONG, "its engine is forgotten")
            assert run.status()["missing_nodes"] == [], "its lease is not over"


@pytest.mark.slow
def test_nodes_of_one_group_are_switched_off_and_the_other_gives_their_answers(model: Path) -> None:
    """The second node of a group, then the first, then both at once. The other group serves the same model."""
    names = ("node1", "node2", "node3", "node4")
    with Lab(4, slurm=False) as lab:
        routed(lab)
        with Spread(lab, model, "--groups=2", "--frontends=2", *FLAGS, *OWN, **SLOW).hand() as run:
            run.full("g0", "g1")
            untouched, ended, severed = run.lives("g0"), set[int](), 0
            urls = eventually(lambda: u if len(u := run.run_file()["frontend_urls"]) == 2 else None, LONG)
            for lost in (("node4",), ("node3",), ("node3", "node4")):
                found = run.serve_at(*names)
                with (
                    Load(urls[0], streams=6, unary=2, tokens=40) as load,
                    Load(urls[1], streams=6, unary=2, tokens=40, texts=load.texts) as other,
                ):
                    load.wait_busy(1.0)
                    other.wait_busy(1.0)
                    run.switch_off(*lost)
                    eventually(lambda: set(run.registered()) == {"node1", "node2"}, LONG, "g1 is forgotten")
                    severed += 2 * len(lost)
                    eventually(lambda n=severed: len(run.of("g1", "severed")) >= n, LONG, "by both frontends")  # type: ignore[misc]
                    load.wait_busy(1.0)
                    other.wait_busy(1.0)
                assert load.lost == [] and load.wrong == [], load.said()
                assert other.lost == [] and other.wrong == [], other.said()
                ended |= {lease for name in lost for lease in found[name]}
                assert run.revoked() == ended
                assert run.dark() == [Keys(run.run).dark_of("g1", names.index(name)) for name in lost]
                run.switch_on(*(names.index(name) for name in lost))
                run.full("g1")
                eventually(lambda: run.dark() == [], LONG, "they are not lost any more")
            run.serve_at(*names)
            assert len(run.of("g1", "severed")) == severed and run.of("g0", "severed") == []
            assert run.lives("g0") == untouched and not run.events("internal_error")


@pytest.mark.slow
def test_a_spare_takes_the_place_of_a_node_and_registers_there(model: Path) -> None:
    """Who is back is the spare, at the address that was lost; then it takes over in its turn."""
    with Lab(3, slurm=False) as lab:
        routed(lab)
        with Spread(lab, model, *FLAGS, "--spares=1", "--spare-wait=4", *OWN, **SLOW).hand() as run:
            eventually(lambda: run.status()["spares"], LONG, "the spare has come")
            ended = set[int]()
            for number, (lost, spare) in enumerate((("node2", "node3"), ("node3", "node2")), 1):
                before = run.serve_at("node1", lost)
                run.switch_off(lost)
                eventually(lambda n=number: len(run.events("spare_takes_over")) == n, LONG)  # type: ignore[misc]
                eventually(lambda: not before[lost] & run.registered().get(lost, set()), LONG)  # noqa: B023
                run.wait_full()
                after = run.serve_at("node1", spare)
                ended |= before[lost]
                assert run.revoked() == ended
                eventually(lambda: run.dark() == [], LONG, "that node rank is not without an agent any more")
                severed = run.events("severed")
                assert len(severed) == number and lost in severed[-1]["detail"]
                run.switch_on(run.nodes.index(lost))
                eventually(lambda s=lost: [n["host"] for n in run.status()["spares"]] == [s], LONG)  # type: ignore[misc]
                with Load(run.run_file()["frontend_url"], streams=4, unary=2, tokens=20) as load:
                    nothing_is_severed_now(run, load, severed)
                assert load.lost == [] and load.wrong == [], load.said()
                assert run.registered() == after
            assert not run.events("internal_error")
