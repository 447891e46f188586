"""bench/gpu/groups.py from end to end, on made-up devices: what it checks holds there too."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_two_groups_and_two_halves_on_made_up_devices(tmp_path: Path) -> None:
    out = tmp_path / "groups.json"
    args = ["--virtual", "--gib", "1", "--kills", "1", "--place", str(tmp_path), "--out", str(out)]
    done = subprocess.run(
        [sys.executable, "-m", "bench.gpu.groups", *args], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(out.read_text())
    two, halves = found["two_models"], found["halves"]
    assert [two[g]["lost"] + two[g]["wrong"] for g in "ab"] == [0, 0]
    assert two["lives_of_a"] == 3 and two["b_has_the_same_processes"], "two first starts, and one after the kill"
    assert two["loads_of_weights"] == {"a": [1], "b": [1]}
    assert halves["users"]["lost"] == halves["users"]["wrong"] == 0
    assert halves["text_of_one_engine_before_and_after"] == [True, True]
