"""bench/gpu/vllm_failover.py from end to end, with stand-ins for the GPU, vLLM and NVIDIA's memory service."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from gms_launch.process import proc

ROOT = Path(__file__).parents[2]
SCRIPT = [sys.executable, str(ROOT / "bench" / "gpu" / "vllm_failover.py")]


def test_a_machine_that_lacks_something_is_told_at_once(tmp_path: Path) -> None:
    done = subprocess.run(SCRIPT, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert "gpu_memory_service" in done.stderr and "1 GPUs" in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_two_nodes_under_the_launcher_and_under_the_recipe(tmp_path: Path, model: Path) -> None:
    """The launcher answers whichever rank is killed; the recipe, which watches nobody, does not."""
    env = os.environ | {"PYTHONPATH": str(ROOT / "tests" / "standins" / "vllm_site"), "STANDIN_GPUS": "2"}
    args = [
        "--nodes",
        "2",
        "--kills",
        "2",
        "--recipe-kills",
        "1",
        "--watch",
        "8",
        "--after",
        "1",
        "--model",
        str(model),
    ]
    done = subprocess.run([*SCRIPT, *args], cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "vllm-failover.json").read_text())
    ours = found["gms_launch"]
    assert [k["rank"] for k in ours["kills"]] == [0, 1]
    assert ours["answered"] == "2 of 2" and ours["same_text_every_time"]
    assert ours["weights_written"] == [1, 1]
    assert len(ours["timeline"]) == 2
    recipe = {k["killed"]: k for k in found["recipe"]["kills"]}
    for scope in ("leader alone", "remote rank alone"):
        assert recipe[scope]["first_answer_s"] is None, recipe[scope]
        assert recipe[scope]["first_answer_after_the_rest_was_killed_s"] > 0
    assert recipe["whole group"]["first_answer_s"] > 0
    assert all(k["same_text"] for k in recipe.values())
    assert [p for p in proc.pids() if b"/dev/shm/vf-" in _cmdline(p)] == [], "nothing that it started is left"


def test_an_outage_is_not_reported_as_a_failover() -> None:
    from bench.gpu.vllm_failover import outages

    assert outages([{"first_answer_s": 0.2}, {"first_answer_s": 4.9}]) == []
    long, never = outages([{"first_answer_s": 0.2}, {"first_answer_s": 67.0}, {"first_answer_s": None}])
    assert "kill 2" in long and "67.0 s" in long and "kill 3" in never and "no answer at all" in never


def _cmdline(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes() + Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:
        return b""
