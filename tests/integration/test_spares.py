"""A spare takes the place of a node that leads a group; all agents are on this machine's loopback."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.test_groups import Grouped
from tests.support import LONG, eventually, free_port, gms_launch, kill


class Spared(Grouped):
    """Two groups of a node each, and a spare."""

    nodes = 3


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
