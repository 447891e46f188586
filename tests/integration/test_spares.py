"""A spare takes the place of a node that leads a group; all agents are on this machine's loopback."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.test_groups import Grouped
from tests.support import LONG, eventually, free_port, gms_launch, kill, stopped


class Spared(Grouped):
    """Two groups of a node each, and a spare."""

    nodes = 3

    def missing_of(self, group: str) -> list[int]:
        return list(self.groups()[group]["missing_nodes"])


@pytest.fixture
def run(tmp_path: Path, model: Path) -> Iterator[Spared]:
    flags = ["--virtual-gpus=1", "--groups=2", "--spares=1", "--spare-wait=3", f"--frontend-port={free_port()}"]
    with Spared(tmp_path, model, *flags) as made:
        yield made


def test_a_spare_takes_the_place_of_the_node_that_leads_a_group(run: Spared) -> None:
    run.full("g0", "g1")
    untouched, before = run.lives("g0"), run.lives("g1")
    spare = eventually(lambda: run.status()["spares"], LONG, "it is there")[0]["agent_pid"]
    kill(run.agent_of(1))
    eventually(lambda: run.events("spare_takes_over"), LONG)
    eventually(lambda: spare in [n["agent_pid"] for n in run.status()["nodes"]], LONG, "the spare has its rank")
    assert run.agent_of(1) == spare
    run.full("g1")
    assert not {pid for *_, pid in run.lives("g1")} & {pid for *_, pid in before}
    assert run.lives("g0") == untouched and run.text(), "nothing else was touched"
    eventually(lambda: run.status()["spares"] == [], what="there is none any more")
    # Who comes with the old rank is told that it is the spare now.
    assert run.node(1).returncode == 0
    (back,) = eventually(lambda: run.status()["spares"], LONG)
    assert back["node_rank"] == 2 and run.agent_of(1) == spare
    assert run.lives("g0") == untouched
    done = gms_launch("status", "--run", run.run, env=run.env)
    assert "spare" in done.stdout, done.stdout


def test_a_spare_that_finds_its_place_kept_says_so_and_who_leads_is_named_by_its_rank(run: Spared) -> None:
    """The lost node's agent stands still on the same machine, and has the directory that the spare would have."""
    run.full("g0", "g1")
    spare = eventually(lambda: run.status()["spares"], LONG, "it is there")[0]["agent_pid"]
    with stopped(run.agent_of(1)):
        eventually(lambda: run.missing_of("g1") == [0], LONG, "its lease is over")
        for verb in ("kill-primary", "switch-over", "roll"):
            refused = run.cli(verb, "--group", "g1")
            assert refused.returncode == 5 and "node 1, which leads group g1, is not here" in refused.stderr, refused
        (told,) = eventually(lambda: run.events("node_refused"), LONG, "the spare could not begin")
        assert f"(agent {spare})" in told["detail"] and f"another agent of run {run.run} is on this" in told["detail"]
        assert told["detail"].partition("another")[2] in run.cli("logs", "--group", "g1", "agent").stdout
    run.full("g1")
    named = {e["detail"].partition("takes the place of ")[2].split(" (")[0] for e in run.events("spare_takes_over")}
    assert named == {"node 1"}
