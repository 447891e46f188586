"""The reference engine is held to a record of the real one: the same lines in the same order, and what it cannot do.

The lines are those of Dynamo 1.3.1 with vLLM 0.23.0 on an H200 (docs/gpu.md), numbers left out.
"""

from __future__ import annotations

import os
import re
import signal
from pathlib import Path

import pytest

from gms_launch.cohort.model import Phase
from gms_launch.engines import get
from gms_launch.process import proc
from tests.support import Deployment, eventually

START = "[GMS] Failover enabled: will use scratch KV for initialization until engine is primary"
WRITER = ["Connected with rw_or_ro lock (granted=rw), committed=False", "[GMS] Committed #, switched to read mode"]
READER = ["[GMS] gms_read_only=True, forcing RO mode", "Connected with ro lock (granted=ro), committed=True"]
READER += ["[GMS] Read mode: imported #"]
PARK = ["Sleep freed #", "[Shadow] Engine sleeping, startup probe now passing, waiting for lock"]
WAKE = ["Failover lock acquired: engine-#", "[Shadow] Lock acquired, waking engine", "Connected with ro lock"]
WAKE += ["Connected with rw lock", "It took # seconds to wake up tags {'weights', 'kv_cache'}"]
WAKE += ["[Shadow] Engine awake, registering with discovery"]
PHASES = {PARK[1]: Phase.PARKED, WAKE[1]: Phase.WAKING}


def missing(log: str, wanted: list[str]) -> list[str]:
    """The first of the wanted lines that does not come in its place; empty when all do."""
    place = 0
    for line in wanted:
        found = re.compile(re.escape(line).replace(r"\#", r"[\d.]+(?: GiB)?")).search(log, place)
        if found is None:
            return [line]
        place = found.end()
    return []


@pytest.mark.parametrize("engine", ["vllm", "reference"])
def test_the_modules_read_the_record_line_by_line(engine: str) -> None:
    module = get(engine)
    for line in [START, *WRITER, *READER, *PARK, *WAKE]:
        written = "2026-11-23T10:00:00Z INFO worker_factory.py:359 " + line.replace("#", "0.55")
        assert module.phase_of(written) is PHASES.get(line), line
        assert module.is_awake(written) == (line == WAKE[-1]), line


def test_the_vital_processes_of_the_real_engine_are_known_by_their_titles() -> None:
    vllm = get("vllm")
    assert vllm.is_vital("VLLM::EngineCore") and vllm.is_vital("VLLM::Worker_TP1")
    assert vllm.is_vital("MINE::Worker_PP1_TP0")
    assert not vllm.is_vital(
        "/usr/bin/python3 -c from multiprocessing.spawn import spawn_main; spawn_main(tracker_fd=5)"
    )
    assert not vllm.is_vital("/usr/bin/python3 -c from multiprocessing.resource_tracker import main;main(4)")
    assert not vllm.is_vital("/usr/bin/python3 -m dynamo.vllm --model m")


def test_the_reference_engine_writes_the_record(tmp_path: Path, model: Path) -> None:
    with Deployment(tmp_path / "home", model) as run:
        primary = run.wait_full()["primary"]
        os.killpg(run.cohort(primary)["ranks"][0]["pgid"], signal.SIGKILL)
        eventually(lambda: run.status()["primary"] == 1 - primary)
        logs = run.home / run.run / "logs" / "node0"
        woken = logs / f"cohort-{1 - primary}.1.log"
        eventually(lambda: WAKE[-1] in woken.read_text(), what="the lines of a wake-up are written")
        texts = [(logs / f"cohort-{k}.1.log").read_text() for k in (0, 1)]
        assert missing(texts[0], [START, *WRITER, *PARK]) == []
        assert missing(texts[1], [START, *READER, *PARK]) == []
        for text in texts:
            assert missing(text, [*PARK, *WAKE]) == []
        run.wait_full()
        again = logs / f"cohort-{primary}.2.log"
        back = ["Connected with rw_or_ro lock (granted=ro), committed=True", READER[2]] if primary == 0 else READER
        eventually(lambda: missing(again.read_text(), [START, *back, *PARK]) == [], what="who comes again reads")


def test_a_parked_engine_does_not_end_on_sigterm(tmp_path: Path, model: Path) -> None:
    """Nor does upstream's, while it waits for the lock; that is why a stop kills it."""
    with Deployment(tmp_path / "home", model) as run:
        shadow = run.cohort(1 - run.wait_full()["primary"])["ranks"][0]
        who = proc.identity(shadow["pid"])
        assert who is not None
        log = run.home / run.run / "logs" / "node0" / Path(shadow["log"]).name
        os.kill(who.pid, signal.SIGTERM)
        # The runtime has heard it and is done with its shutdown; an engine that serves ends then.
        eventually(lambda: "Phase 3: Connections to backend services" in log.read_text())
        assert proc.alive(who)
        assert run.status()["cohorts"][1 - run.status()["primary"]]["ranks"][0]["pid"] == who.pid
