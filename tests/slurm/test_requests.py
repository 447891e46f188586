"""Requests in flight when a rank on another node dies: nobody loses anything, and nobody gets another text."""

from __future__ import annotations

import time
from pathlib import Path

from tests.load import Load
from tests.slurm.lab import Lab
from tests.slurm.support import LabRun


def test_a_remote_ranks_death_is_a_pause_for_every_client(model: Path) -> None:
    with Lab(2, slurm=False) as lab, LabRun(lab, model, REFERENCE_TOKEN_SECONDS="0.05").hand() as run:
        kills = []
        with Load(run.run_file()["frontend_url"], streams=24, unary=8, rate=10, tokens=40) as load:
            for _ in range(2):
                primary = run.wait_full()["primary"]
                load.wait_busy(1.0)
                kills.append(time.monotonic())
                life = run.kill_rank(primary, 1)
                run.wait_dead(*life)
                assert run.wait_full()["primary"] == 1 - primary
                load.wait_busy(1.0)
        assert min(len(load.in_flight_at(killed, True)) for killed in kills) >= 20
        assert not load.lost and not load.wrong, load.said()
