"""Whatever lies in the directory that a command is given in: it is not executed."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

from tests.support import Deployment, eventually

PLANTED = """
import os, sys
with open({marks!r}, "a") as file:
    file.write(f"{{__name__}} in {{sys.argv}}\\n")
"""


@pytest.fixture
def elsewhere(tmp_path: Path) -> tuple[Path, Path]:
    """A directory with a module for every name that anybody could import, and the file in which these say so."""
    place, marks = tmp_path / "elsewhere", tmp_path / "marks"
    place.mkdir()
    marks.touch()
    text = PLANTED.format(marks=str(marks))
    names = {
        n
        for n in {*sys.stdlib_module_names, *packages_distributions(), "gpu_memory_service", "vllm"}
        if n.isidentifier()
    }
    assert {"json", "typer", "dynamo", "gms_launch", "numpy", "etcd3"} <= names
    for name in names:
        (place / f"{name}.py").write_text(text)
    return place, marks


def test_nothing_is_imported_from_where_a_run_is_started(
    elsewhere: tuple[Path, Path], tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place, marks = elsewhere
    monkeypatch.chdir(place)
    monkeypatch.setattr("tests.support.GMS_LAUNCH", [str(Path(sys.executable).with_name("gms-launch"))])
    monkeypatch.delenv("PYTHONSAFEPATH", raising=False)
    # Engines of another interpreter than ours are asked what they have.
    other = tmp_path / "python"
    other.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    other.chmod(0o755)
    with Deployment(tmp_path / "home", model, "--python", str(other)) as run:
        assert run.wait_full() and run.text()
        for pid in run.alive():
            with contextlib.suppress(FileNotFoundError):  # a look at a rank that has ended by now
                assert Path(f"/proc/{pid}/cwd").readlink() in (place, Path("/"))
        assert run.cli("kill-primary").returncode == 0
        assert eventually(run.text)
        for verb in (["plan", *run.flags], ["doctor", *run.flags], ["timeline"], ["logs", "agent"]):
            done = run.cli(*verb)
            assert "Traceback" not in done.stderr, done.stderr
        assert run.cli("down").returncode == 0
    assert marks.read_text() == ""


@pytest.mark.skipif(sys.version_info < (3, 11), reason="3.10 takes its runpy from there")
def test_nor_with_m_but_for_what_is_called_as_we_are(elsewhere: tuple[Path, Path], tmp_path: Path) -> None:
    place, marks = elsewhere
    env = {k: v for k, v in os.environ.items() if k != "PYTHONSAFEPATH"}
    for there in (True, False):
        done = subprocess.run(
            [sys.executable, "-m", "gms_launch", "status", "--run", "none"],
            cwd=place,
            env=env,
            capture_output=True,
            check=False,
        )
        assert done.returncode == (0 if there else 5)
        assert bool(marks.read_text()) == there
        marks.write_text("")
        (place / "gms_launch.py").unlink(missing_ok=True)
