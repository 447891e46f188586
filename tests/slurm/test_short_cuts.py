"""A node that is cut off for less than its lease: nothing happens, whichever way packets are lost."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from gms_launch.cohort.controller import NODE_GRACE
from gms_launch.control import terms
from tests.slurm.lab import Lab
from tests.slurm.support import LabRun
from tests.support import LONG, eventually

WAYS = ("both", "from the node", "to the node")


def cut(lab: Lab, way: str) -> Callable[[], None]:
    """Lose the packets between the leader and node2, one way or both; returns what ends it."""
    leader, node = lab.node("node1"), lab.node("node2")
    if way == "both":
        node.cut()
        return node.join
    sender, receiver = (node, leader) if way == "from the node" else (leader, node)
    sender.mute(receiver)
    return lambda: sender.unmute(receiver)


def reaches(run: LabRun) -> bool:
    """True when node2 gets a connection to the leader's etcd within half a second."""
    host, port = run.run_file()["etcd_endpoints"][0].partition("//")[2].split(":")
    connect = f"exec timeout 0.5 bash -c '</dev/tcp/{host}/{port}'"
    return run.lab.node("node2").run(["bash", "-c", connect]).returncode == 0


def endure(run: LabRun, cuts: int, lease_ttl: float, seed: int) -> None:
    """Cut `cuts` times for 80 % of the lease, at random moments between two renewals, and see that nobody minds."""
    rng = random.Random(seed)
    engines = {i.identity for i in run.engines()}
    for number in range(cuts):
        time.sleep(terms.renewal(lease_ttl) * rng.uniform(1.0, 3.0))  # the moment of the cut is what is tried
        way = WAYS[number % len(WAYS)]
        assert reaches(run)
        begun = time.monotonic()
        end = cut(run.lab, way)
        try:
            assert not reaches(run), f"the cut ({way}) cuts nothing"
            time.sleep(max(0.0, begun + 0.8 * lease_ttl - time.monotonic()))
        finally:
            end()
        # The ranks' own connection, too, is only as good as TCP's back-off, which doubles with each packet lost: cut
        # anew before it has recovered it may stand still for minutes, and no token for a minute is a hang.
        eventually(lambda: run.text(2.0), LONG, f"tokens after cut {number} ({way})")
        assert {i.identity for i in run.engines()} == engines, f"cut {number} ({way})"
    time.sleep(terms.granted(lease_ttl) + NODE_GRACE)  # whatever was to come of the last one has come
    assert {i.identity for i in run.engines()} == engines
    for kind in ("node_lost", "cut_off", "lease_lost"):
        assert run.events(kind) == []
    assert run.text()


@pytest.mark.slow
def test_cuts_of_most_of_a_lease(bare_lab: Lab, model: Path) -> None:
    with LabRun(bare_lab, model, "--lease-ttl=6", nodes=["node1", "node2"]).hand() as run:
        endure(run, 3, 6.0, seed=1)


@pytest.mark.slow
def test_thirty_cuts_of_most_of_a_lease_under_load(bare_lab: Lab, model: Path) -> None:
    with LabRun(bare_lab, model, nodes=["node1", "node2"]).hand() as run:
        over = threading.Event()

        def ask() -> None:
            while not over.is_set():
                run.text(2.0)

        clients = [threading.Thread(target=ask) for _ in range(4)]
        for client in clients:
            client.start()
        try:
            endure(run, 30, 5.0, seed=7)
        finally:
            over.set()
            for client in clients:
                client.join()
