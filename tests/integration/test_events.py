"""Events as they go out: followed on a terminal, and handed to a hook that may be as bad as it likes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest

from gms_launch.process import lifecycle, proc
from tests.support import GMS_LAUNCH, LONG, Deployment, eventually, journal


def test_events_are_followed_until_the_run_has_ended(tmp_path: Path, model: Path) -> None:
    with Deployment(tmp_path, model) as run:
        known = len(run.events())
        argv = [*GMS_LAUNCH, "events", "-f", "--json", "--run", run.run]
        follower = subprocess.Popen(argv, env=run.env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert follower.stdout is not None
        assert json.loads(follower.stdout.readline())["kind"]
        assert run.cli("kill-primary").returncode == 0
        run.wait_full()
        assert run.cli("down").returncode == 0
        out = follower.stdout.read()
        assert follower.wait(LONG) == 0 and follower.stderr is not None and "has ended" in follower.stderr.read()
        followed = [json.loads(line) for line in out.splitlines()]
        everything = run.events()
        assert len(everything) > known and followed == everything[len(everything) - len(followed) :]
        assert {"kill", "lock", "stopping"} <= {e["kind"] for e in followed}
        # Afterwards: all, the newest, and those since a moment.
        assert [json.loads(line) for line in run.cli("events", "--json").stdout.splitlines()] == everything
        assert len(run.cli("events", "-n", "3").stdout.splitlines()) == 3
        assert run.cli("events", "--since", "1d").stdout.splitlines() == run.cli("events").stdout.splitlines()
        assert run.cli("events", "--since", "2100-01-01").stdout == ""
        wrong = run.cli("events", "--since", "soon")
        assert wrong.returncode == 2 and "10m" in wrong.stderr


def test_events_are_followed_over_a_restart_of_the_agent(tmp_path: Path, model: Path) -> None:
    run = Deployment(tmp_path, model)
    try:
        assert run.up().returncode == 0
        argv = [*GMS_LAUNCH, "events", "-f", "--json", "--run", run.run]
        follower = subprocess.Popen(argv, env=run.env, stdout=subprocess.PIPE, text=True)
        assert follower.stdout is not None and follower.stdout.readline()
        first, agent = run.events(), run.agent
        fd = lifecycle.kill_process(agent)
        assert fd is not None and lifecycle.wait_gone([fd], LONG)
        assert run.up().returncode == 0
        assert run.cli("down").returncode == 0
        out = follower.stdout.read()
        assert follower.wait(LONG) == 0
        followed = [json.loads(line) for line in out.splitlines()]
        second = run.events()
        assert first[-1] in followed and followed[-len(second) :] == second
    finally:
        run.__exit__()


#: A hook each: what it does after it has noted down what it was given, and what the agent says of it.
HOOKS = {
    "hangs": ("sleep 1000", "killed after"),
    "forks": ("sleep 1000 & sleep 1000 >/dev/null 2>&1 &", ""),
    "missing": ("/no/such/hook", "exit code 127"),
    "floods": ("exec yes", "SIGPIPE"),
}


@pytest.mark.slow
def test_a_failover_takes_its_usual_time_whatever_the_hook_does(tmp_path: Path, model: Path) -> None:
    heard, does = tmp_path / "heard", tmp_path / "does"
    does.write_text("")
    flags = ("--on-event", f"cat >> {heard}; . {does}", "--on-event-timeout", "4")
    with Deployment(tmp_path / "home", model, *flags) as run:

        def state() -> tuple[str, str]:
            (found,) = [s for s in run.status()["nodes"][0]["services"] if s["name"] == "on-event"]
            return str(found["state"]), str(found["detail"])

        eventually(lambda: kinds(heard) == [e["kind"] for e in run.events()], what="it has heard of everything")
        assert state() == ("ready", "") and run.events("hook_failed") == []
        assert {e["run"] for e in read(heard)} == {run.run} and {e["dropped"] for e in read(heard)} == {0}
        failed = 0
        for kind, (script, wrong) in HOOKS.items():
            does.write_text(script)
            done = run.cli("kill-primary", "--json")
            assert done.returncode == 0, done.stderr
            # A failover has a dozen events: if it waited for the hook that hangs, it would take 40 s and more.
            assert json.loads(done.stdout)["steps"]["first_token"] < 20.0, kind
            failed += bool(wrong)
            if wrong:
                eventually(lambda f=failed: len(run.events("hook_failed")) >= f, what=kind)  # type: ignore[misc]
                assert wrong in run.events("hook_failed")[-1]["detail"]
                assert eventually(lambda: state()[0] == "failed") and "on-event" in run.cli("status").stdout
            does.write_text("")
            run.wait_full()
            # It may have been called for the last event before it was mended; then the next one shows it.
            while len(run.events("hook_well")) < failed:
                assert run.cli("kill-primary").returncode == 0
                run.wait_full()
        log = run.cli("logs", "on-event", "-n", "0").stdout
        assert "/no/such/hook: not found" in log and "was not read" in log
        assert not [kind for kind in kinds(heard) if kind.startswith("hook_")]
    assert run.alive() == []
    assert kinds(heard).count("kill") >= len(HOOKS) and "stopping" in kinds(heard)


def test_a_hook_dies_with_its_agent(tmp_path: Path, model: Path) -> None:
    pid_file = tmp_path / "pid"
    script = f"sleep 1000 & echo $$ $! > {pid_file}.new; mv {pid_file}.new {pid_file}; wait"
    run = Deployment(tmp_path / "home", model, "--on-event", script, "--on-event-timeout", "900")
    try:
        assert run.up().returncode == 0
        eventually(pid_file.exists, what="the hook runs")
        pids = [int(p) for p in pid_file.read_text().split()]
        # The second may still be on its way into its program.
        eventually(lambda: all(proc.tag_of(p) == f"{run.run}/on-event/1/0" for p in pids))
        agent = run.agent
        assert proc.identity(agent.pid) == agent
        os.kill(agent.pid, signal.SIGKILL)
        eventually(lambda: all((i := proc.stat(p)) is None or i.dead for p in pids), what="hook and child are dead")
    finally:
        run.__exit__()


def kinds(heard: Path) -> list[str]:
    return [e["kind"] for e in read(heard)]


def read(heard: Path) -> list[dict[str, Any]]:
    return journal(heard)
