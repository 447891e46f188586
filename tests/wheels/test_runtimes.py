"""A failover on the native runtime and frontend of every release line. 75 MB each: `make test-releases`.

Both are the release's own, so this is also where it is seen which releases move requests in flight.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gms_launch.engines.vllm import LINES
from tests.load import Load
from tests.support import Deployment, eventually

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
#: Whether requests in flight survive on a release, as docs/compatibility.md has it.
MOVES = {"1.3.1": False, "1.4.2": True, "1.5.1": True, "1.6.1": True}
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
    slow = {"REFERENCE_TOKEN_SECONDS": "0.03"}
    with Deployment(tmp_path / "home", model, "--python", str(python), **slow) as run:
        before, primary = run.text(), run.wait_full()["primary"]
        victim = run.cohort(primary)["ranks"][0]
        maps = Path(f"/proc/{victim['pid']}/maps").read_text()
        assert f"{site}/dynamo/_core" in maps, "the engine runs on that release"
        os.killpg(victim["pgid"], signal.SIGKILL)
        assert eventually(run.text) == before
        assert run.wait_full()["primary"] == 1 - primary
        kills = []
        with Load(run.run_file["frontend_url"], streams=16, unary=8, rate=10, tokens=60) as load:
            for _ in range(3):
                primary = run.wait_full()["primary"]
                load.wait_busy(1.0)
                kills.append(time.monotonic())
                os.killpg(run.cohort(primary)["ranks"][0]["pgid"], signal.SIGKILL)
                assert run.wait_full()["primary"] == 1 - primary
                load.wait_busy(1.0)
        assert min(len(load.in_flight_at(killed, True)) for killed in kills) >= 12
        print(f"{release}: {load.said()}")
        assert not load.wrong, load.said()
        assert release not in MOVES or bool(load.lost) != MOVES[release], load.said()
