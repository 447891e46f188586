"""Each of five machines is switched off in its turn, as `bench.nodes_off` does it for longer."""

from __future__ import annotations

import pytest

from bench import nodes_off
from tests.slurm.lab import Lab
from tests.slurm.moving import Pair, routed


@pytest.mark.slow
def test_each_node_is_switched_off_in_its_turn() -> None:
    """The group that loses one comes back whole on the spare; the other's clients see nothing, nor does it."""
    with Lab(nodes_off.NODES, slurm=False) as lab:
        routed(lab)
        with Pair(lab) as run:
            found = nodes_off.rounds(run, nodes_off.NODES + 1, streams=2, rate=2.0)
            run.whole()
    assert [r["machine"] for r in found[:-1]] == [f"node{k}" for k in range(1, nodes_off.NODES + 1)]
    assert not found[-1]["groups"], "the spare"
    assert found[0]["led_the_run"] and found[0]["leads_s"] is not None
    assert all(r[g]["answers"] and not r[g]["errors"] for r in found for g in nodes_off.others(r))
