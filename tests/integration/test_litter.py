"""A life that litters: after failovers nothing of the dead ones has piled up."""

from __future__ import annotations

import os
from pathlib import Path

from gms_launch.process import scratch
from tests.support import Deployment, eventually


def segments(pid: int) -> set[str]:
    """The names of the shared memory that an engine's main process has mapped."""
    return {s.name for s in scratch.mapped([pid]) if s.name.startswith(("psm_", "sem.loky-"))}


def test_after_three_failovers_nothing_has_piled_up(tmp_path: Path, model: Path) -> None:
    with Deployment(tmp_path / "home", model, "--health-interval", "0.2", REFERENCE_LITTER="1") as run:
        dead: set[str] = set()
        for _ in range(3):
            status = run.wait_full()
            primary = run.cohort(status["primary"])
            made = segments(primary["ranks"][0]["pid"])
            assert len(made) == 2, "a life did litter: one name tells nothing, one has its pid"
            dead |= made
            assert run.cli("kill-primary").returncode == 0
        status = run.wait_full()
        assert sum(c["incarnation"] for c in status["cohorts"]) == 5, "three lives have ended"
        living = {f"{c['cohort_id']}.{c['incarnation']}" for c in status["cohorts"]}
        eventually(lambda: set(os.listdir(run.node_dir / "tmp")) == living, what="only the living have a directory")
        for life in living:
            place = run.node_dir / "tmp" / life
            assert any(p.is_socket() for p in place.iterdir()) and list(place.glob("vllm_prometheus_*/elsewhere"))
        eventually(lambda: not dead & set(os.listdir("/dev/shm")), what="no shared memory of the dead is left")
        kept = {name for c in status["cohorts"] for name in segments(c["ranks"][0]["pid"])}
        assert len(kept) == 4, "the living keep theirs"
        assert run.events("left_behind") == []
        node_dir = run.node_dir
        assert run.cli("down").returncode == 0
        assert not node_dir.exists() and not kept & set(os.listdir("/dev/shm"))
