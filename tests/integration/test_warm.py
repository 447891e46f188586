"""Warm slots: the process that waits becomes the engine, and nothing depends on it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from gms_launch.process import proc, warm_child
from tests.integration.test_groups import Grouped
from tests.support import Deployment, eventually, flock_holders, kill


def warm(run: Deployment) -> dict[str, Any]:
    """The row of the only slot in status."""
    (row,) = [s for s in run.status()["nodes"][0]["services"] if s["name"] == "warm-1"]
    found: dict[str, Any] = row
    return found


def ready(run: Deployment, other_than: int = 0) -> int:
    """The process that waits, once one does."""

    def look() -> int:
        row = warm(run)
        return int(row["pid"]) if row["state"] == "ready" and row["pid"] != other_than else 0

    return eventually(look, what="a warm process")


def pids(run: Deployment) -> set[int]:
    return {c["ranks"][0]["pid"] for c in run.status()["cohorts"]}


def environment_of_children(pid: int) -> dict[str, str]:
    """What a process gives to what it starts."""
    children = eventually(lambda: proc.children(pid), what="a worker")
    words = Path(f"/proc/{children[0]}/environ").read_bytes().split(b"\0")
    return dict(w.decode().split("=", 1) for w in words if w)


def test_a_waiting_process_becomes_the_engine(tmp_path: Path, model: Path) -> None:
    with Deployment(tmp_path / "home", model, "--warm-slots", "1", REFERENCE_IMPORTS="sqlite3") as run:
        before, status = run.text(), run.wait_full()
        pid = ready(run)
        cold = run.cohort(1 - status["primary"])["ranks"][0]["pid"]
        assert before and (proc.tag_of(pid) or "").startswith(f"{run.run}/warm/")
        assert pid not in flock_holders(str(run.node_dir / "failover.lock"))
        opened = [os.readlink(f"/proc/{pid}/fd/{fd}") for fd in os.listdir(f"/proc/{pid}/fd")]
        assert not [name for name in opened if str(run.node_dir) in name], "no lock and no socket of GMS"

        assert run.cli("kill-primary").returncode == 0
        dead = status["primary"]
        status = run.wait_full()
        (rank,) = status["cohorts"][dead]["ranks"]
        assert rank["pid"] == pid, "the slot's process is the new life"
        assert run.events("started")[-1]["detail"] == f"from a warm slot, pid {pid}"
        assert proc.tag_of(pid) == f"{run.run}/{dead}/2/0"
        cold_line = proc.command_line(cold).split()
        warm_line = proc.command_line(pid).split()
        assert len(warm_line) == len(cold_line) and warm_line[:6] == cold_line[:6], "ps shows what runs"
        one, other = environment_of_children(pid), environment_of_children(cold)
        assert set(one) == set(other) and one["ENGINE_ID"] == str(dead) and one["GMS_LAUNCH_TAG"] == proc.tag_of(pid)
        assert one["TMPDIR"] == str(run.node_dir / "tmp" / f"{dead}.2") and Path(one["TMPDIR"]).is_dir()
        log = run.home / run.run / "logs" / "node0" / f"cohort-{dead}.2.log"
        eventually(lambda: "startup probe now passing" in log.read_text(), what="what it prints is in its life's log")
        assert run.text() == before

        # It serves in its turn, and is fenced as any other.
        assert run.cli("kill-primary").returncode == 0
        run.wait_full()
        assert run.text() == before and run.status()["primary"] == dead
        assert run.cli("kill-primary").returncode == 0
        run.wait_full()
        assert run.text() == before and not Path(f"/proc/{pid}").exists()
        assert [e["cohort_id"] for e in run.events("fenced")][-1] == dead

        # One that dies is replaced; one that does not answer is not waited for.
        pid = ready(run)
        os.kill(pid, signal.SIGKILL)
        pid = ready(run, other_than=pid)
        os.kill(pid, signal.SIGSTOP)
        assert run.cli("kill-primary").returncode == 0
        run.wait_full()
        assert "did not answer within" in run.events("warm_lost")[-1]["detail"] and pid not in pids(run)
        eventually(lambda: not Path(f"/proc/{pid}").exists(), what="it was ended")
        assert run.text() == before

        # Arguments that were not known when it was started.
        pid = ready(run)
        done = run.cli("roll", "--", "--seed", "7")
        assert done.returncode == 0, done.stdout + done.stderr
        assert pid in pids(run) and all(proc.command_line(p).endswith("--seed 7") for p in pids(run))
        assert run.text() == before
        ready(run)
        node_dir = run.node_dir
        assert run.cli("down").returncode == 0
        assert run.alive() == [] and not node_dir.exists()


def test_it_dies_with_its_agent(tmp_path: Path, model: Path) -> None:
    with Deployment(tmp_path / "home", model, "--warm-slots", "1", "--shadows", "0") as run:
        who = proc.identity(ready(run))
        assert who is not None
        os.kill(run.agent.pid, signal.SIGKILL)
        eventually(lambda: not proc.alive(who), what="the warm process is gone")
        eventually(lambda: run.alive() == [], what="and all else")


def test_an_engine_that_says_nothing_of_imports_has_no_warm_slots(tmp_path: Path, model: Path) -> None:
    file = tmp_path / "engine.toml"
    file.write_text('command = ["sleep", "1000"]\n[phase]\nparked = "x"\n')
    flags = ["--engine", "command", "--engine-file", str(file), "--warm-slots", "1", "--model", str(model)]
    done = subprocess.run(
        [sys.executable, "-m", "gms_launch", "plan", *flags], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2 and "--warm-slots: --engine command" in done.stderr


def test_what_has_opened_the_gpu_becomes_no_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    device = tmp_path / "nvidia-uvm"
    device.touch()
    monkeypatch.setattr(warm_child, "UVM", str(device))
    assert warm_child.uses_gpu() == ""
    with open(device):
        assert warm_child.uses_gpu() == str(device)


def test_the_slot_of_one_group_is_no_business_of_another(tmp_path: Path, model: Path) -> None:
    flags = ["--virtual-gpus", "2", "--groups", "2", "--warm-slots", "1", "--no-canary"]
    with Grouped(tmp_path, model, *flags) as run:
        run.full("g0", "g1")

        def slots(other_than: int = 0) -> dict[str, int]:
            """The processes that wait, once each group has one."""
            rows = [s for s in run.status()["nodes"][0]["services"] if "warm-" in s["name"]]
            found = {s["name"]: int(s["pid"]) for s in rows if s["state"] == "ready" and s["pid"] != other_than}
            return found if len(found) == 2 else {}

        before = eventually(slots, what="a warm process of each")
        assert set(before) == {"g0.warm-1", "g1.warm-1"}
        assert len({proc.tag_of(pid) for pid in before.values()}) == 2
        kill(before["g0.warm-1"])
        after = eventually(lambda: slots(before["g0.warm-1"]), what="another one of g0")
        assert after["g1.warm-1"] == before["g1.warm-1"]
        assert {e["group"] for e in run.events("warm_lost")} == {"g0"}
