"""What people are shown follows from the records, and never says more than they do."""

from __future__ import annotations

import io
from dataclasses import replace

from rich.console import Console

from gms_launch.cohort.model import Phase, Redundancy
from gms_launch.cohort.records import (
    DesiredCohort,
    GmsStatus,
    NodeRecord,
    RankRecord,
    RunRecord,
    Wanted,
)
from gms_launch.control.mirror import Mirror
from gms_launch.gms.protocol import GetRuntimeStateResponse
from gms_launch.observe import snapshot, views

NODE = NodeRecord(0, "h", "127.0.0.1", "b", 1, 2, ("GPU-x",), gms=(GmsStatus(0, "GPU-x", "weights", "RO"),))
RANK = RankRecord(0, 0, 1, Phase.ACTIVE, 10, 10, 99, 5.0, leftovers=(7,))


def filled(announced: str = "full") -> Mirror:
    mirror = Mirror("r")
    keys = mirror.keys
    run = RunRecord("r", "d", "127.0.0.1", "0", 1.0, shadows=1, redundancy=announced)
    mirror.replace(
        {
            keys.run: run.encode(),
            keys.node(0): NODE.encode(),
            keys.cohort(0): DesiredCohort(0, 1, Wanted.RUNNING, 29500).encode(),
            keys.cohort(1): DesiredCohort(1, 2, Wanted.RUNNING, 29601).encode(),
            keys.rank(0, 0): RANK.encode(),
            keys.rank(1, 0): RankRecord(1, 0, 2, Phase.PARKED).encode(),
        }
    )
    return mirror


def test_a_snapshot_of_the_mirror() -> None:
    mirror = filled()
    shot = snapshot.build(mirror)
    assert shot.redundancy is Redundancy.FULL
    assert shot.primary is not None and shot.primary.cohort_id == 0
    mirror.apply(mirror.keys.rank(1, 0), RankRecord(1, 0, 1, Phase.PARKED).encode())
    assert snapshot.build(mirror).redundancy is Redundancy.NONE, "a record of an earlier life says nothing of this one"
    mirror.apply(mirror.keys.node(0), None)
    assert mirror.nodes == {}


def test_no_more_redundancy_is_shown_than_the_leader_has_announced() -> None:
    """A user who sees `full` may kill at once, and the leader must be ready for it."""
    assert snapshot.build(filled("")).redundancy is Redundancy.DOWN
    assert snapshot.build(filled("none")).redundancy is Redundancy.NONE
    mirror = filled("full")
    mirror.apply(mirror.keys.rank(0, 0), RankRecord(0, 0, 1, Phase.FAILING).encode())
    assert snapshot.build(mirror).redundancy is Redundancy.DOWN, "nor more than the records show"


def test_one_bad_record_does_not_hide_the_others() -> None:
    mirror = filled()
    mirror.apply(mirror.keys.rank(1, 0), b"garbage")
    assert list(mirror.problems) == [mirror.keys.rank(1, 0)]
    assert snapshot.build(mirror).redundancy is Redundancy.FULL, "the last good one stands"
    mirror.apply(mirror.keys.rank(1, 0), RankRecord(1, 0, 2, Phase.FAILING).encode())
    assert mirror.problems == {}


def test_status_json_layout() -> None:
    data = snapshot.build(filled()).to_json()
    assert data["schema"] == 2
    assert set(data) == {
        *("schema", "run", "redundancy", "primary", "stopping", "frontend_url", "model", "created", "cohorts", "nodes"),
        *("nnodes", "lost_nodes", "missing_nodes", "starting", "generation", "rolling", "alarms", "groups"),
        *("leader", "leader_reported_ago", "leader_silent", "spares", "frontend_urls"),
    }
    assert data["cohorts"][0]["role"] == "primary" and data["cohorts"][1]["role"] == "shadow"
    (whole,) = data["groups"]
    assert whole["name"] == "" and whole["cohorts"] == data["cohorts"] and whole["nodes"] == data["nodes"]


def test_a_size_that_a_gms_server_does_not_tell_is_null_and_not_shown() -> None:
    silent = GmsStatus(0, "u", "weights", "COMMITTED", allocations=26)
    for gms, told in ((silent, None), (replace(silent, allocated_bytes=1 << 30), 1 << 30)):
        mirror = filled()
        mirror.apply(mirror.keys.node(0), replace(NODE, gms=(gms,)).encode())
        shot = snapshot.build(mirror)
        assert shot.to_json()["nodes"][0]["gms"][0]["allocated_bytes"] == told
        console = Console(record=True, width=200, file=io.StringIO())
        console.print(views.status(shot))
        shown = console.export_text()
        assert "26 allocations" in shown and ("GiB" in shown) == (told is not None)
    assert GetRuntimeStateResponse("RO").allocated_bytes is None, "upstream's answer has no such field"
