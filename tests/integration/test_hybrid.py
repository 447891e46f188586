"""Hybrid load balancing: every node registers its replicas, and a cohort serves on all nodes or on none."""

from __future__ import annotations

import itertools
import json
import os
import signal
import threading
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from gms_launch.control.keys import dynamo_lease
from gms_launch.process import proc
from gms_launch.run.nodedir import NodeDir
from tests.integration.test_replicas import TwoNodes
from tests.integration.test_replicas import text as text  # a fixture
from tests.load import Load
from tests.support import LONG, eventually, kill

PROMPT = "what comes next"


class Hybrid(TwoNodes):
    def gates(self) -> dict[tuple[int, int], int]:
        """The inode of each private lock, by node and cohort."""
        return {(n, k): os.stat(NodeDir.of(self.run, "", n).gate(k)).st_ino for n in (0, 1) for k in (0, 1)}

    def instances(self) -> list[int]:
        """Under which leases engines are registered."""
        keys = self.etcdctl("get", "v1/instances/", "--prefix", "--keys-only").split()
        return sorted({n for key in keys if "/generate/" in key and (n := dynamo_lease(key)) is not None})


def of_instance(url: str, instance: int, prompt: str, tokens: int) -> tuple[str, set[int]]:
    """What one engine says, asked through the frontend at `url`, and who that says that it was."""
    more = {"backend_instance_id": instance, "extra_fields": ["worker_id"]}
    asked = {"model": "tiny", "prompt": prompt, "max_tokens": tokens, "temperature": 0, "nvext": more}
    headers = {"content-type": "application/json"}
    request = urllib.request.Request(f"{url}/v1/completions", json.dumps(asked).encode(), headers)
    with urllib.request.urlopen(request, timeout=LONG) as got:
        said = json.loads(got.read())
    return said["choices"][0]["text"], set(said["nvext"]["worker_id"].values())


class Watch:
    """Looks at the locks of both nodes, all at one moment, for as long as it lasts. `serving` is what was seen, anew
    whenever it changed: which nodes' ranks of which cohorts had their locks.
    """

    def __init__(self, run: Hybrid) -> None:
        self._gates = {inode: where for where, inode in run.gates().items()}
        self._agents = {str(run.agent_of(n)) for n in (0, 1)}
        self.serving: list[frozenset[tuple[int, int]]] = []
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._look)

    def _look(self) -> None:
        while not self._ended.wait(0.003):
            found = set()
            for line in Path("/proc/locks").read_text().splitlines():
                words = line.split()
                if words[1] != "FLOCK" or words[4] in self._agents:
                    continue
                if (where := self._gates.get(int(words[5].rpartition(":")[2]))) is not None:
                    found.add(where)
            if not self.serving or self.serving[-1] != found:
                self.serving.append(frozenset(found))

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    @property
    def split(self) -> list[frozenset[tuple[int, int]]]:
        """Moments at which two cohorts had a lock, on whichever nodes."""
        return [seen for seen in self.serving if len({cohort for _, cohort in seen}) > 1]


FLAGS = ("--virtual-gpus", "2", "--dp", "4", "--dp-lb", "hybrid", "--activation", "agent")


@pytest.fixture
def hybrid(tmp_path: Path, model: Path) -> Iterator[Hybrid]:
    with Hybrid(tmp_path, model, *FLAGS, "--no-canary", "--", "--enable-expert-parallel") as run:
        yield run


@pytest.fixture
def watched(tmp_path: Path, model: Path) -> Iterator[Hybrid]:
    with Hybrid(tmp_path, model, *FLAGS, "--canary-interval", "1", "--canary-timeout", "8") as run:
        yield run


def nobody_was_let_go_too_early(run: Hybrid) -> None:
    """Whoever served before was proved dead on both nodes by then."""
    let_go = run.events("activated")
    lives = list(dict.fromkeys((e["cohort_id"], e["incarnation"]) for e in let_go))
    for before, after in itertools.pairwise(lives):
        told = [e for e in let_go if (e["cohort_id"], e["incarnation"]) == after]
        proofs = [e for e in run.events("fenced") if (e["cohort_id"], e["incarnation"]) == before]
        assert {e["node_rank"] for e in told} == {e["node_rank"] for e in proofs} == {0, 1}
        assert max(e["time"] for e in proofs) < min(e["time"] for e in told)


def test_both_nodes_serve_and_fail_over_together_whichever_rank_dies(text: str, hybrid: Hybrid) -> None:
    run, url = hybrid, hybrid.run_file["frontend_url"]
    for victim in (1, 0):
        shot = run.wait_full()
        primary = shot["primary"]
        ranks = run.cohort(primary)["ranks"]
        assert [r["phase"] for r in ranks] == ["active", "active"]
        assert all("--data-parallel-hybrid-lb" in proc.command_line(r["pid"]) for r in ranks)
        instances = eventually(lambda: found if len(found := run.instances()) == 2 else [], LONG, "two are registered")
        for instance in instances:
            # Dynamo 1.4's frontend asks another one in its place where it does not know that engine (yet).
            said = eventually(
                lambda i=instance: said if (said := of_instance(url, i, PROMPT, 40))[1] == {i} else None, LONG
            )
            assert said[0] == text
        promoted = len(run.events("first_token"))
        with Watch(run) as watch, Load(run.run_file["frontend_url"], streams=4, unary=2, tokens=30) as load:
            load.wait_busy(1.0)
            kill(ranks[victim]["pid"], signal.SIGKILL)
            eventually(lambda n=promoted: len(run.events("first_token")) > n, LONG, "a token of both")
            assert run.wait_full()["primary"] == 1 - primary
        both = frozenset({(0, primary), (1, primary)})
        assert watch.serving[0] == both and watch.serving[-1] == frozenset((n, 1 - primary) for n in (0, 1))
        assert watch.split == [], watch.serving
        eventually(lambda: all(not proc.group(r["pgid"]) for r in ranks), what="every rank of it has ended")  # noqa: B023
        assert load.lost == [] and load.wrong == [], load.said()
        assert {e["node_rank"] for e in run.events("token")} == {0, 1}, "each node's engine gave one"
        assert {e["node_rank"] for e in run.events("held")} == {0, 1}, "each node's requests waited"
    nobody_was_let_go_too_early(run)


def test_an_engine_of_another_node_that_gives_no_tokens_is_replaced_with_all_of_its_cohort(watched: Hybrid) -> None:
    run = watched
    primary = run.wait_full()["primary"]
    life = run.cohort(primary)["incarnation"]
    with Watch(run) as watch:
        (NodeDir.of(run.run, "", 1).gate(0).parent / f"wedge-{primary}-{life}").touch()
        hung, *_ = eventually(lambda: run.events("hung"), LONG, "that node's agent took it for hung")
        assert hung["node_rank"] == 1 and "canary_timeout" in hung["detail"]
        eventually(lambda: len(run.events("first_token")) > 1, LONG, "the shadow has taken over")
    assert watch.split == [], watch.serving
    assert run.wait_full()["primary"] == 1 - primary and run.text()
    nobody_was_let_go_too_early(run)
