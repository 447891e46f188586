"""Data parallelism inside an engine: several replicas, one registration, one lock, and one failover of all of it."""

from __future__ import annotations

import os
import re
import signal
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from gms_launch.process import proc
from tests.integration.test_groups import Grouped
from tests.load import Load
from tests.support import LONG, Deployment, eventually


class OneNode(Grouped):
    def pgids(self, cohort_id: int) -> list[int]:
        return [r["pgid"] for r in self.cohort(cohort_id)["ranks"]]

    def answered(self) -> dict[str, float]:
        """Requests by replica, as the engines count them."""
        found: dict[str, float] = {}
        for port in self.system_ports():
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=LONG) as answer:
                text = answer.read().decode()
            for replica, count in re.findall(r'reference_replica_requests_total\{.*dp_rank="(\d+)".*\} (\S+)', text):
                found[replica] = found.get(replica, 0.0) + float(count)
        return found

    def system_ports(self) -> list[int]:
        argvs = [proc.command_line(pgid) for c in (0, 1) for pgid in self.pgids(c)]
        assert all("--data-parallel-size 2" in argv for argv in argvs), argvs
        return [p for c in (0, 1) if (p := system_port(self.pgids(c)[0]))]


class TwoNodes(OneNode):
    nodes = 2


def system_port(pid: int) -> int:
    environ = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    return next((int(e.partition(b"=")[2]) for e in environ if e.startswith(b"DYN_SYSTEM_PORT=")), 0)


@pytest.fixture
def text(tmp_path: Path, model: Path) -> str:
    """What an engine without replicas says."""
    (tmp_path / "one").mkdir()
    with Deployment(tmp_path / "one", model, "--no-canary") as one:
        found = one.text("what comes next", 40)
    assert found
    return found


@pytest.fixture
def one_node(tmp_path: Path, model: Path) -> Iterator[OneNode]:
    with OneNode(tmp_path, model, "--virtual-gpus", "4", "--tp", "2", "--dp", "2", "--no-canary") as run:
        yield run


@pytest.fixture
def two_nodes(tmp_path: Path, model: Path) -> Iterator[TwoNodes]:
    own = ["--virtual-gpus", "1", "--dp", "2", "--no-canary", "--", "--enable-expert-parallel"]
    with TwoNodes(tmp_path, model, *own) as run:
        yield run


def fails_over(run: OneNode, victim: int, primary: int) -> None:
    """Kill one process of the primary under load: all of it ends, nothing is lost, and the slot is filled again."""
    ranks = run.pgids(primary)
    with Load(run.run_file["frontend_url"], streams=4, unary=2, tokens=30) as load:
        load.wait_busy(1.0)
        os.kill(victim, signal.SIGKILL)
        eventually(lambda: len(run.events("first_token")) == 2, LONG, "promoted")
    assert run.wait_full()["primary"] == 1 - primary
    eventually(lambda: all(not proc.group(pgid) for pgid in ranks), what="every rank of it has ended")
    assert load.lost == [] and load.wrong == [], load.said()


def test_replicas_on_one_node_share_the_requests_and_fail_over_as_one(text: str, one_node: OneNode) -> None:
    run = one_node
    primary = run.wait_full()["primary"]
    assert {run.text("what comes next", 40) for _ in range(4)} == {text}
    assert set(run.answered()) == {"0", "1"}, "both have answered"
    workers = {proc.command_line(m.identity.pid): m.identity.pid for m in proc.group(run.pgids(primary)[0])}
    victim = next(pid for line, pid in workers.items() if "reference.worker 3 3 " in line)
    fails_over(run, victim, primary)
    assert run.text("what comes next", 40) == text


def test_replicas_on_two_nodes_with_their_experts_shared_out_fail_over_as_one(text: str, two_nodes: TwoNodes) -> None:
    run = two_nodes
    primary = run.wait_full()["primary"]
    assert {run.text("what comes next", 40) for _ in range(4)} == {text}
    assert set(run.answered()) == {"0", "1"}
    ranks = run.pgids(primary)
    assert len(ranks) == 2 and "--data-parallel-start-rank 1" in proc.command_line(ranks[1])
    fails_over(run, ranks[1], primary)
    assert run.text("what comes next", 40) == text
