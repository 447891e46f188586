"""--engine command: the reference engine, described in a file, fails over like any other."""

from __future__ import annotations

import os
import re
import signal
from pathlib import Path

import pytest

from tests import documents
from tests.support import Deployment, eventually, free_port

FILE = """
[engine]
command = ["{python}", "-m", "gms_launch.engines.reference", "--model", "{model}", "--served-model-name",
           "{served_model_name}", "--load-format", "gms", "--master-port", "{master_port}"]
needs = ["gms_launch.engines.reference", "dynamo.llm"]
[engine.environment]
DYN_VLLM_GMS_SHADOW_MODE = "true"
DYN_SYSTEM_PORT = "{system_port}"
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
        assert eventually(run.text) == before
        after = run.wait_full()
        assert after["primary"] != found["primary"]
        assert after["cohorts"][found["primary"]]["incarnation"] == 2


def test_an_engine_that_names_no_model_is_told_that_nothing_serves_it(tmp_path: Path, model: Path) -> None:
    """The sample engine of docs/engines.md without its register_model: it is in discovery and no request gets there."""
    files = {t.reason: t.text for t in documents.blocks() if t.mark == "file"}
    code, calls = re.subn(r"    await llm\.register_model\(.*", "    pass", files["sample_engine.py"])
    assert calls == 1
    (tmp_path / "engine.py").write_text(code)
    (tmp_path / "engine.toml").write_text(
        files["sample_engine.toml"].replace("sample_engine.py", f"{tmp_path}/engine.py")
    )
    extra = ["--engine", "command", "--engine-file", str(tmp_path / "engine.toml"), "--promotion-timeout", "4"]
    run = Deployment(tmp_path / "home", model, *extra)
    try:
        done = run.up()
        assert done.returncode != 0
        assert "no token within 4 s of the lock (promotion_timeout): nothing serves tiny" in done.stderr, done.stderr
    finally:
        run.__exit__()
