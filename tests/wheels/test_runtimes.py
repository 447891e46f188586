"""A failover on the native runtime and frontend of every release line. 75 MB each: `make test-releases`."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from gms_launch.engines.vllm import LINES
from tests.support import Deployment, eventually

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
STORE = Path(__file__).parents[2] / ".wheels"


@pytest.mark.parametrize("release", [line.release for line in LINES])
def test_a_failover_on_the_releases_own_runtime(release: str, tmp_path: Path, model: Path) -> None:
    site = STORE / f"runtime-{release}"
    if not site.exists():
        wanted = [f"ai-dynamo=={release}", f"ai-dynamo-runtime=={release}"]
        # Without what they require: the newest want packages of another index, which nothing here imports.
        argv = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(site), *wanted]
        subprocess.run(argv, check=True)
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH={site} exec {sys.executable} "$@"\n')
    python.chmod(0o755)
    with Deployment(tmp_path / "home", model, "--python", str(python)) as run:
        before, primary = run.text(), run.wait_full()["primary"]
        victim = run.cohort(primary)["ranks"][0]
        maps = Path(f"/proc/{victim['pid']}/maps").read_text()
        assert f"{site}/dynamo/_core" in maps, "the engine runs on that release"
        os.killpg(victim["pgid"], signal.SIGKILL)
        assert eventually(run.text) == before
        assert run.wait_full()["primary"] == 1 - primary
