"""--engine command: the reference engine, described in a file, fails over like any other."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from tests.support import Deployment, eventually, free_port

FILE = """
[engine]
command = ["{python}", "-m", "gms_launch.engines.reference", "--model", "{model}", "--served-model-name",
           "{served_model_name}", "--load-format", "gms", "--master-port", "{master_port}"]
needs = ["gms_launch.engines.reference", "dynamo.llm"]
[engine.environment]
DYN_VLLM_GMS_SHADOW_MODE = "true"
DYN_SYSTEM_PORT = "{system_port}"
DYN_SYSTEM_HOST = "{address}"
DYN_SYSTEM_STARTING_HEALTH_STATUS = "notready"
MY_PORT = "{port_mine}"
[engine.ports]
mine = @port
@phases
"""
LINES = """
[engine.phase]
parked = "startup probe now passing"
waking = "Lock acquired"
awake = "Engine awake"
"""


@pytest.mark.parametrize(
    ("phases", "metrics"), [(LINES, "1"), ("", "1"), ("", "0")], ids=["by its log", "by its metrics", "by its signs"]
)
def test_an_engine_described_in_a_file_fails_over(tmp_path: Path, model: Path, phases: str, metrics: str) -> None:
    """Without phases in the file the log is not read. Then its metrics show them, or health, lock and discovery."""
    file, port = tmp_path / "engine.toml", free_port()
    file.write_text(FILE.replace("@phases", phases).replace("@port", str(port)))
    extra = ["--engine", "command", "--engine-file", str(file), "--health-interval", "0.2"]
    with Deployment(tmp_path / "home", model, *extra, REFERENCE_METRICS=metrics) as run:
        before = run.text()
        assert before
        found = run.wait_full()
        victim = found["cohorts"][found["primary"]]["ranks"][0]
        environ = Path(f"/proc/{victim['pid']}/environ").read_bytes().split(b"\0")
        assert f"MY_PORT={port + found['primary']}".encode() in environ
        os.killpg(victim["pgid"], signal.SIGKILL)
        assert eventually(run.text, 20) == before
        after = run.wait_full()
        assert after["primary"] != found["primary"]
        assert after["cohorts"][found["primary"]]["incarnation"] == 2
