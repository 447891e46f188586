"""Short runs of the chaos tests: the kinds of fault that no other test has, in a random order that the output tells."""

from __future__ import annotations

import random
import time
from pathlib import Path
from typing import Any

import pytest

from tests.chaos import chaos, groups, nodes
from tests.chaos.ends import shuffled
from tests.slurm.lab import Lab
from tests.slurm.moving import Pair, routed
from tests.slurm.support import LabRun

#: As patient as a machine must be on which other tests run: none of these deadlines is what is tried here.
PATIENT = ("--health-timeout", "8", "--canary-timeout", "15", "--lease-ttl", "8", "--promotion-timeout", "60")
KINDS = ["both_cohorts", "during_promotion", "cut_briefly", "kill_agent"]


def test_a_few_rounds_of_chaos(model: Path) -> None:
    seed = int(time.time())
    print(f"seed {seed}")
    rng = random.Random(seed)
    with Lab(3, slurm=False) as lab, LabRun(lab, model, *chaos.FLAGS, *PATIENT, **chaos.ENVIRON).hand() as run:
        done = chaos.rounds(run, shuffled(chaos.KINDS, len(KINDS), rng, KINDS), rng)
    assert {r["kind"] for r in done} == set(KINDS)
    felt = {"both_cohorts", "kill_agent"}  # where nobody can take over; elsewhere not one may be lost
    assert all(r["failed"] for r in done if r["kind"] in felt), done


def test_a_few_rounds_of_chaos_in_one_of_two_groups(tmp_path: Path) -> None:
    """What happens in one group is not seen in the other: neither by its ranks and events nor by its clients."""
    seed = int(time.time())
    print(f"seed {seed}")
    rng, kinds = random.Random(seed), ["during_promotion", "kill_etcd"]
    models = groups.make_models(tmp_path)
    with groups.TwoModels(tmp_path, models, *chaos.FLAGS, *PATIENT, **chaos.ENVIRON) as run:
        done = groups.rounds(run, groups.plan(len(kinds), rng, kinds), rng)
    assert {r["kind"] for r in done} == set(kinds)
    assert all(r["group"] for r in done if r["kind"] != "kill_etcd"), done


@pytest.mark.slow
def test_a_round_of_each_kind_of_chaos_with_nodes() -> None:
    """Leaders, members and spares are switched off, the network falls in two: one group sees nothing of the other."""
    seed = int(time.time())
    print(f"seed {seed}")
    rng, kept = random.Random(seed), list[dict[str, Any]]()
    with Lab(5, slurm=False) as lab:
        routed(lab)
        with Pair(lab) as run:
            done = nodes.rounds(run, shuffled(nodes.KINDS, len(nodes.KINDS), rng), rng, kept.append)
    assert kept == done and {r["kind"] for r in done} == {k.__name__ for k in nodes.KINDS}
