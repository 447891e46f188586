"""What is asked for is carried out while somebody waits for it, and not afterwards."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

from gms_launch.cohort.records import CommandRecord, CommandResult
from gms_launch.control.access import Access
from gms_launch.control.client import Etcd
from gms_launch.control.door import Door
from gms_launch.control.errand import Errand
from gms_launch.control.keys import Keys
from gms_launch.observe.journal import Tail
from tests.support import GMS_LAUNCH, LONG, Deployment, EtcdServer, eventually, stopped


def asked(run: Deployment) -> list[str]:
    """The keys of the commands that stand."""
    door = Door(run.access)
    try:
        return list(door.get_prefix(Keys(run.run).commands))
    finally:
        door.close()


def test_a_kill_that_nobody_waits_for_any_more_is_not_carried_out(tmp_path: Path, model: Path) -> None:
    with Deployment(tmp_path, model) as run:
        found = run.wait_full()
        before, primary = [c["incarnation"] for c in found["cohorts"]], found["primary"]
        with stopped(run.agent.pid):
            late = run.cli("kill-primary", "--timeout", "1")
            assert late.returncode == 4, late.stderr
            assert "the request was withdrawn, and nothing was done" in late.stderr
            assert asked(run) == []
            for sig, code in ((signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -9)):
                command = subprocess.Popen(
                    [*GMS_LAUNCH, "kill-primary", "--run", run.run], env=run.env, stderr=subprocess.PIPE, text=True
                )
                eventually(lambda: asked(run), what="the command stands")
                command.send_signal(sig)
                _, told = command.communicate(timeout=LONG)
                assert command.returncode == code
                assert sig == signal.SIGKILL or "withdrawn" in told
                eventually(lambda: not asked(run), what="it lapses with whoever asked")
        # The agent has been told of all four by now, and of the next one after them.
        done = run.cli("kill-primary", "--json")
        assert done.returncode == 0, done.stderr
        assert len({(e["cohort_id"], e["incarnation"]) for e in run.events("kill")}) == 1
        after = [c["incarnation"] for c in run.wait_full()["cohorts"]]
        assert after[primary] == before[primary] + 1 and after[1 - primary] == before[1 - primary]
        assert asked(run) == []


def test_down_from_elsewhere_is_withdrawn_when_nobody_waits(tmp_path: Path, model: Path) -> None:
    """From a machine of another name, so that it is asked for through etcd."""
    with Deployment(tmp_path, model) as run:
        elsewhere = ["unshare", "--uts", "bash", "-c", 'hostname elsewhere; exec "$@"', "-", *GMS_LAUNCH]
        with stopped(run.agent.pid):
            argv = [*elsewhere, "down", "--run", run.run, "--timeout", "1"]
            done = subprocess.run(argv, env=run.env, capture_output=True, text=True, timeout=LONG, check=False)
            assert done.returncode == 4 and "withdrawn" in done.stderr, done.stderr
        assert run.cli("kill-primary").returncode == 0, "it goes on"
        done = subprocess.run([*elsewhere, "down", "--run", run.run], env=run.env, timeout=LONG, check=False)
        assert done.returncode == 0
        assert run.run_file["exit_code"] == 0


def test_who_is_interrupted_after_the_request_was_taken_is_told_what_is_known(tmp_path: Path, model: Path) -> None:
    with Deployment(tmp_path, model) as run:

        def begin(*words: str) -> subprocess.Popen[str]:
            argv = [*GMS_LAUNCH, *words, "--run", run.run]
            return subprocess.Popen(argv, env=run.env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

        for k, (sig, code) in enumerate(((signal.SIGINT, 130), (signal.SIGTERM, 143))):
            run.wait_full()
            command = begin("roll")
            assert command.stdout is not None
            assert "0 of 1 shadows" in command.stdout.readline()
            command.send_signal(sig)
            _, told = command.communicate(timeout=LONG)
            assert command.returncode == code
            assert f"generation {k + 1} is under way" in told and "the next failover" in told
            run.wait_full()
            (frontend,) = [s for s in run.status()["nodes"][0]["services"] if s["name"] == "frontend"]
            with stopped(frontend["pid"]):  # no token comes through it, so the command goes on
                command = begin("kill-primary" if sig == signal.SIGINT else "switch-over")
                eventually(lambda k=k: len(run.events("kill")) == 2 * k + 2, what="taken")  # type: ignore[misc]
                eventually(lambda: not asked(run), what="and answered")
                command.send_signal(sig)
                _, told = command.communicate(timeout=LONG)
                assert command.returncode == code
                # The second where the command had not heard of the answer yet.
                assert re.search(r"is being killed or is dead, as asked|was granted \(.*\) and is carried out", told), (
                    told
                )


def test_a_command_that_was_answered_before_it_was_withdrawn_says_how(tmp_path: Path) -> None:
    etcd, keys = EtcdServer(tmp_path).start(), Keys("r")
    door = Door(Access((etcd.url,)))
    try:
        client = Etcd(Access((etcd.url,)))
        client.get("/ready", retry=60.0)
        client.close()
        for ok, says in ((None, "carries it out"), (True, "was granted by then (killed)"), (False, "nothing was done")):
            command = CommandRecord(f"c{ok}", "kill", 0.0)
            with Errand(door, keys, command) as errand:
                door.put(keys.command(command.uuid), command.encode(), 0)
                if ok is not None:
                    door.put(keys.result(command.uuid), CommandResult(ok, "killed", 0, 1, 0.0).encode())
                assert says in errand.withdraw()
    finally:
        door.close()
        etcd.kill()


def test_ctrl_c_while_the_program_is_still_loaded_ends_it_without_a_word(tmp_path: Path) -> None:
    """A `typer` that presses it: by both ways in, of which the second is what the package declares as its command."""
    (tmp_path / "typer.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\nimport missing\n")
    (declared,) = re.findall(r'^gms-launch = "(.*)"$', Path("pyproject.toml").read_text(), re.M)
    module, _, function = declared.partition(":")
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    for argv in (GMS_LAUNCH, [sys.executable, "-c", f"from {module} import {function} as f; f()"]):
        done = subprocess.run(argv, env=env, capture_output=True, text=True, timeout=LONG, check=False)
        assert (done.returncode, done.stdout + done.stderr) == (130, "")


def test_while_the_agent_stands_still_no_more_is_told_than_is_known(tmp_path: Path, model: Path) -> None:
    with Deployment(tmp_path, model) as run:
        primary = run.wait_full()["primary"]
        (rank,) = run.cohort(primary)["ranks"]
        with stopped(run.agent.pid):
            begun = time.monotonic()
            os.killpg(rank["pgid"], signal.SIGKILL)
            eventually(lambda: time.monotonic() > begun + 7.0 and run.status()["leader_silent"])
            assert run.status()["redundancy"] != "full"
            row = next(line for line in run.cli("status").stdout.splitlines() if f" {rank['pid']} " in line)
            assert "primary ?" in row and "active ?" in row and "not heard of since" in row
        run.wait_full()
        stalls = run.happened("stood_still")  # a busy machine may have made others
        stall = max(stalls, key=lambda e: float(e["data"]["seconds"]))
        assert stall["data"]["seconds"] > 5
        (failover,) = json.loads(run.cli("timeline", "--json").stdout)["failovers"]
        assert failover["victim"]["cohort_id"] == primary
        assert failover["agent_stood_still"]["seconds"] == stall["data"]["seconds"]
        assert failover["requests"]["gap"] is None and failover["requests"]["lost"] is None
        assert "those of its wake-up" in run.cli("timeline").stdout


def test_a_journal_is_followed_line_by_line(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    path.write_text('{"time":1,"node_rank":0,"kind":"old"}\n')
    tail = Tail(path)
    assert tail.new() == []
    with open(path, "a") as file:
        file.write('{"time":2,"node_rank":0,"kind":"a"}\n{"time":3,')
        file.flush()
        assert [e.kind for e in tail.new()] == ["a"]
        file.write('"node_rank":0,"kind":"b"}\n')
    assert [e.kind for e in tail.new()] == ["b"]
    assert tail.new() == []
