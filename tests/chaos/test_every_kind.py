"""A short run of the chaos test: every kind of fault once, in a random order that the output tells."""

from __future__ import annotations

import random
import time
from pathlib import Path

import pytest

from tests.chaos import chaos
from tests.slurm.lab import Lab
from tests.slurm.support import LabRun


@pytest.mark.timeout(400)
def test_every_kind_of_fault_once(model: Path) -> None:
    seed = int(time.time())
    print(f"seed {seed}")
    rng = random.Random(seed)
    with Lab(3, slurm=False) as lab, LabRun(lab, model, *chaos.FLAGS).hand() as run:
        done = chaos.rounds(run, chaos.plan(len(chaos.KINDS), rng), rng)
    assert {r["kind"] for r in done} == {k.__name__ for k in chaos.KINDS}
    harmless = {"kill_nats", "shadow_rank", "stop_shadow", "cut_briefly"}
    assert sum(r["failed"] for r in done if r["kind"] not in harmless) > 0, "the faults were felt"
