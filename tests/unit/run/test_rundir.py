"""Which run is meant when nobody says."""

from __future__ import annotations

import socket
import time
from pathlib import Path

import pytest

from gms_launch.errors import UsageError
from gms_launch.run.rundir import RunDir, RunFile, find


def recorded(name: str, port: int) -> None:
    """A run as its leader on another machine last wrote it down: up."""
    directory = RunDir.of(name)
    directory.path.mkdir(parents=True)
    directory.write(
        RunFile(name, "1", time.time(), "elsewhere", "boot", 1, 1, "/nowhere", (f"http://127.0.0.1:{port}",))
    )


def test_a_run_whose_agents_were_killed_does_not_stand_beside_the_one_that_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GMS_LAUNCH_HOME", str(tmp_path))
    for name in ("GMS_LAUNCH_RUN", "GMS_LAUNCH_RUN_ID", "SLURM_JOB_ID"):
        monkeypatch.delenv(name, raising=False)
    with socket.socket() as up, socket.socket() as gone:
        up.bind(("127.0.0.1", 0))
        up.listen()
        gone.bind(("127.0.0.1", 0))  # bound and not listening: refused
        recorded("killed", gone.getsockname()[1])
        recorded("serving", up.getsockname()[1])
        assert find(None)[0].run == "serving"
        recorded("another", up.getsockname()[1])
        with pytest.raises(UsageError, match="another"):
            find(None)
    # None answers: all are named, for none is known to be the one that is meant.
    with pytest.raises(UsageError, match="killed"):
        find(None)
