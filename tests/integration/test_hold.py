"""Requests in flight survive the primary's end. Real frontend, runtime and etcd."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gms_launch.cohort import proc
from tests.load import Load
from tests.support import Deployment, eventually

SLOW_TOKENS = {"REFERENCE_TOKEN_SECONDS": "0.02"}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Iterator[Deployment]:
    with Deployment(tmp_path_factory.mktemp("hold"), model, **SLOW_TOKENS) as run:
        yield run


def primary(run: Deployment) -> dict[str, Any]:
    found = run.wait_full(60)
    cohort: dict[str, Any] = found["cohorts"][found["primary"]]
    life = (cohort["cohort_id"], cohort["incarnation"])
    eventually(lambda: [e for e in run.events("hold_armed") if (e["cohort_id"], e["incarnation"]) == life])
    return cohort


def whole(run: Deployment, kill: Any, failovers: int = 1) -> Load:
    """Every request of a load that `kill(primary)` breaks into is answered, with the undisturbed text."""
    with Load(run.run_file["frontend_url"], streams=12, unary=4, rate=10, tokens=80) as load:
        for _ in range(failovers):
            old, released = primary(run), len(run.events("released"))
            load.wait_busy()
            kill(old)
            eventually(lambda n=released: len(run.events("released")) > n, 30)
    assert load.answers and not load.lost, [a.error for a in load.lost][:3]
    assert not load.wrong
    return load


def kill_group(cohort: dict[str, Any]) -> None:
    os.killpg(cohort["ranks"][0]["pgid"], signal.SIGKILL)


def kill_worker(cohort: dict[str, Any]) -> None:
    os.kill(proc.children(cohort["ranks"][0]["pid"])[0], signal.SIGKILL)


def test_streams_go_on_over_two_failovers_in_a_row(run: Deployment) -> None:
    before = len(run.events("released"))
    whole(run, kill_group, failovers=2)
    released = run.events("released")[before:]
    assert len(released) == 2 and all(e["data"]["moved"] for e in released)
    assert sum(e["data"]["connections"] for e in released) > 0, "somebody waited"


def test_streams_go_on_when_a_part_of_the_primary_dies(run: Deployment) -> None:
    whole(run, kill_worker)


def test_streams_go_on_over_kill_primary(run: Deployment) -> None:
    whole(run, lambda _: run.cli("kill-primary"))
