"""Planned hand-overs with real parts: `switch-over`, `roll`, and `--activation agent`."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from gms_launch.node.gates import Gates
from gms_launch.process import lifecycle, proc
from tests.support import LONG, Deployment, complete, eventually, stopped


def command_line(run: Deployment, cohort_id: int) -> str:
    return proc.command_line(run.cohort(cohort_id)["ranks"][0]["pid"])


def test_the_agents_choose_who_takes_over(tmp_path: Path, model: Path) -> None:
    with Deployment(tmp_path / "home", model, "--shadows", "2", "--activation", "agent") as run:
        before, first = run.text(), run.wait_full()["primary"]
        assert before
        eventually(
            lambda: {n["lock_holder"] for n in run.status()["nodes"]} == {f"cohort {first}"}, what="the kernel says so"
        )

        # A user's choice, whoever has been parked longest.
        shadows = sorted({0, 1, 2} - {first}, key=lambda k: run.cohort(k)["since"])
        done = run.cli("switch-over", "--to", str(shadows[-1]), "--json")
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["promoted"]["cohort_id"] == shadows[-1]
        assert run.text() == before
        assert run.wait_full()["primary"] == shadows[-1]

        # A death from outside: the one that has been parked longest, and not before the dead one was fenced.
        (rank,) = run.cohort(shadows[-1])["ranks"]
        assert lifecycle.kill_group(proc.ProcessId(rank["pid"], proc.identity(rank["pid"]).start))  # type: ignore[union-attr]
        eventually(lambda: run.status()["primary"] == shadows[0], what="the next in line")
        eventually(lambda: run.text() == before)
        fenced = eventually(lambda: [e for e in run.events("fenced") if e["cohort_id"] == shadows[-1]])[0]
        told = [e for e in run.events("activated") if e["cohort_id"] == shadows[0]]
        assert told and told[-1]["time"] >= fenced["time"]
        run.wait_full()

        refused = run.cli("switch-over", "--to", str(shadows[0]))
        assert refused.returncode == 3 and f"cohort {shadows[0]} is not parked" in refused.stderr
        for wrong in ("3", "x", "-1", "١"):
            done = run.cli("switch-over", "--to", wrong)
            assert done.returncode == 2 and "cohorts 0 to 2" in done.stderr, wrong


def test_no_engine_becomes_active_by_the_death_of_its_agent(tmp_path: Path, model: Path) -> None:
    """With its guard standing still, so that only the locks keep the shadows from serving.

    It is the second guard: the first was killed, and the agent started another with all that the first had.
    """
    with Deployment(tmp_path / "home", model, "--shadows", "2", "--activation", "agent") as run:
        primary, paths = run.wait_full()["primary"], sorted(run.node_dir.glob("failover-*.lock"))
        assert len(paths) == 3
        (first,) = [i.pid for i, tag in proc.tagged(f"{run.run}/guard")]
        os.kill(first, signal.SIGKILL)

        def replaced() -> int:
            (row,) = [s for s in run.status()["nodes"][0]["services"] if s["name"] == "guard"]
            return int(row["pid"]) if (row["state"], row["starts"]) == ("ready", 2) else 0

        guard = eventually(replaced, what="a new guard")
        assert f"(pid {first})" in run.happened("guard_exited")[0]["detail"]
        eventually(lambda: "SIGKILL" in run.cli("logs", "agent").stdout)
        eventually(lambda: proc.stat(guard).state == "S", what="it waits")  # type: ignore[union-attr]
        logs = run.home / run.run / "logs" / "node0"
        with stopped(guard):
            os.kill(run.agent.pid, signal.SIGKILL)
            eventually(lambda: not proc.alive(run.agent), what="the agent is gone")
            free = [p for p in paths if can_lock(p)]
            assert all(str(primary) in p.name for p in free), "the guard goes on holding the shadows' locks"
        eventually(lambda: run.alive() == [], what="everything of the run is dead")
        for cohort_id in {0, 1, 2} - {primary}:
            assert "Lock acquired" not in (logs / f"cohort-{cohort_id}.1.log").read_text()


def can_lock(path: Path) -> bool:
    """True when nobody holds the lock; it is free again afterwards."""
    with open(path) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    return True


def test_a_gate_stays_shut_while_an_heir_has_its_descriptor(tmp_path: Path) -> None:
    path = tmp_path / "failover-0.lock"
    holder = (
        "import subprocess, sys; from pathlib import Path; from gms_launch.node.gates import Gates\n"
        "gates = Gates({0: Path(sys.argv[1])}); gates.take(); fds = gates.descriptors\n"
        "heir = subprocess.Popen(['sleep', '600'], pass_fds=fds); print(heir.pid, flush=True); sys.stdin.read()"
    )
    agent = subprocess.Popen(
        [sys.executable, "-c", holder, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert agent.stdout is not None
    heir = proc.identity(int(agent.stdout.readline()))
    assert heir is not None
    try:
        assert not can_lock(path)
        agent.kill()
        agent.wait()
        assert not can_lock(path), "although the process that took it is dead"
    finally:
        lifecycle.kill_process(heir)
        agent.communicate()
    eventually(lambda: can_lock(path))
    gates = Gates({0: path})
    gates.take()
    gates.open(0)
    assert can_lock(path)
    with open(path) as stray:
        fcntl.flock(stray, fcntl.LOCK_EX)
        assert not gates.shut(0), "an engine that will not die has it"
    assert gates.shut(0) and not can_lock(path)


@pytest.fixture
def pair(tmp_path: Path, model: Path) -> Iterator[Deployment]:
    with Deployment(tmp_path / "home", model, REFERENCE_TOKEN_SECONDS="0.02") as deployment:
        yield deployment


def test_switch_over_waits_for_a_quiet_moment_and_rolls_change_the_arguments(pair: Deployment) -> None:
    run = pair
    before, first = run.text(), run.wait_full()["primary"]
    assert before
    host, port = run.run_file["frontend_url"].removeprefix("http://").split(":")
    long = threading.Thread(target=complete, args=(host, int(port), "hello", 500, LONG))
    long.start()
    eventually(lambda: in_flight(host, int(port)) > 0, what="a request is in flight")
    busy = run.cli("switch-over", "--when-idle", "0.2")
    assert busy.returncode == 4 and "1 request was in flight" in busy.stderr and "nothing was done" in busy.stderr
    assert run.status()["primary"] == first
    done = run.cli("switch-over", "--when-idle", "120")
    assert done.returncode == 0, done.stderr
    long.join()
    assert run.text() == before
    assert run.wait_full()["primary"] != first

    # Other engine arguments: every life has them in the end, and clients see the same engine.
    assert "--seed" not in command_line(run, 0)
    done = run.cli("roll", "--", "--seed", "7")
    assert done.returncode == 0, done.stdout + done.stderr
    status = run.status()
    assert status["redundancy"] == "full" and status["generation"] == 1 and not status["rolling"]
    assert [c["generation"] for c in status["cohorts"]] == [1, 1]
    assert all(command_line(run, k).endswith("--seed 7") for k in (0, 1))
    assert run.text() == before
    told = json.loads(run.cli("timeline", "--json").stdout)["failovers"]
    assert [f["cause"] for f in told] == ["switch-over", "roll"]

    # Arguments that the engine does not know: the run goes back by itself, and the primary has not moved.
    done = run.cli("roll", "--", "--no-such-argument")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "the run went back to the old ones" in done.stderr and "Traceback" not in done.stderr
    after = run.wait_full()
    assert after["primary"] == status["primary"] and after["generation"] == 1
    assert all(command_line(run, k).endswith("--seed 7") for k in (0, 1))

    # Those that gms-launch owns are refused before anything is done.
    done = run.cli("roll", "--", "--tensor-parallel-size", "2")
    assert done.returncode == 2 and "use --tp" in done.stderr
    # Without arguments: the same again, as after an upgrade in place. And only the shadow, if that is wanted.
    lives = [c["incarnation"] for c in run.status()["cohorts"]]
    done = run.cli("roll", "--shadow-only")
    assert done.returncode == 0, done.stdout + done.stderr
    assert run.status()["primary"] == after["primary"]
    assert sum(c["incarnation"] for c in run.status()["cohorts"]) == sum(lives) + 1
    assert all(command_line(run, k).endswith("--seed 7") for k in (0, 1))


def in_flight(host: str, port: int) -> float:
    from gms_launch.services import frontend

    counted = frontend.traffic(frontend.Where(host, port))
    return counted[1] if counted else 0.0
