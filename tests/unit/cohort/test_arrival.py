"""The nodes of a large run come one behind another."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gms_launch.cohort import arrival
from gms_launch.run import rendezvous
from gms_launch.run.rundir import RunDir
from gms_launch.run.topology import Topology
from gms_launch.settings.declared import Settings


@pytest.mark.parametrize("nnodes", [1, 2, 8, arrival.AT_ONCE])
def test_a_small_runs_nodes_come_at_once(nnodes: int) -> None:
    assert {arrival.pause(rank, nnodes) for rank in range(nnodes)} == {0.0}
    assert arrival.patience(nnodes, 20.0) == 2.0


def test_a_thousand_nodes_come_in_a_stream() -> None:
    pauses = [arrival.pause(rank, 1024) for rank in range(1024)]
    assert pauses.count(0.0) == arrival.AT_ONCE + 1 and pauses == sorted(pauses) and pauses[-1] < 10.0
    for second in range(10):
        came = sum(second < p <= second + 1 for p in pauses)
        assert came <= arrival.A_SECOND, f"in second {second}"
    assert arrival.patience(1024, 20.0) == 20.0, "etcd has more to do than to answer each at once"


def test_a_node_pauses_once_between_the_leaders_file_and_its_etcd(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    looks = iter([None, "run", "run", "run"])
    answers = iter([None, "found"])

    def look() -> object:
        return object.__new__(rendezvous.RunFile) if next(looks) else None

    monkeypatch.setattr(RunDir, "read", lambda directory: done.append("file") or look())  # type: ignore[func-returns-value]
    monkeypatch.setattr(rendezvous.RunFile, "ended", None, raising=False)
    monkeypatch.setattr(rendezvous, "_ask", lambda *_: done.append("etcd") or next(answers))  # type: ignore[func-returns-value]
    monkeypatch.setattr(rendezvous.time, "sleep", lambda seconds: done.append(f"{seconds:g}"))
    place = Topology(564, 1024, "n564", "10.0.2.52", "10.0.0.1")
    found = rendezvous.find_leader(RunDir(tmp_path / "r"), Settings(), place, lambda _: None)
    assert found == "found"
    assert done == ["file", "0.1", "file", "5", "etcd", "0.1", "file", "0", "etcd"], json.dumps(done)
