"""What is asked for is carried out while somebody waits for it, and not afterwards."""

from __future__ import annotations

import signal
import subprocess
from pathlib import Path

from gms_launch.control.gateway import Gateway
from gms_launch.control.keys import Keys
from gms_launch.observe.journal import Tail
from gms_launch.run.rundir import Credentials, RunDir
from tests.support import GMS_LAUNCH, Deployment, eventually, stopped


def asked(run: Deployment) -> list[str]:
    """The keys of the commands that stand."""
    directory = RunDir(run.home / run.run)
    credentials: Credentials = directory.credentials()
    door = Gateway(tuple(run.run_file["etcd_endpoints"]), "root", credentials.admin_password)
    try:
        return list(door.get_prefix(Keys(run.run).commands))
    finally:
        door.close()


def test_a_kill_that_nobody_waits_for_any_more_is_not_carried_out(tmp_path: Path, model: Path) -> None:
    with Deployment(tmp_path, model) as run:
        before = [(c["cohort_id"], c["incarnation"], c["ranks"]) for c in run.wait_full()["cohorts"]]
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
                _, told = command.communicate(timeout=20)
                assert command.returncode == code
                assert sig == signal.SIGKILL or "withdrawn" in told
                eventually(lambda: not asked(run), what="it lapses with whoever asked")
        # The agent has been told of all four by now, and of the next one after them.
        done = run.cli("kill-primary", "--json")
        assert done.returncode == 0, done.stderr
        assert len({(e["cohort_id"], e["incarnation"]) for e in run.events("kill")}) == 1
        after = [(c["cohort_id"], c["incarnation"], c["ranks"]) for c in run.wait_full()["cohorts"]]
        assert after[0] != before[0] and after[1][:2] == before[1][:2]
        assert asked(run) == []


def test_down_from_elsewhere_is_withdrawn_when_nobody_waits(tmp_path: Path, model: Path) -> None:
    """From a machine of another name, so that it is asked for through etcd."""
    with Deployment(tmp_path, model) as run:
        elsewhere = ["unshare", "--uts", "bash", "-c", 'hostname elsewhere; exec "$@"', "-", *GMS_LAUNCH]
        with stopped(run.agent.pid):
            argv = [*elsewhere, "down", "--run", run.run, "--timeout", "1"]
            done = subprocess.run(argv, env=run.env, capture_output=True, text=True, timeout=60, check=False)
            assert done.returncode == 4 and "withdrawn" in done.stderr, done.stderr
        assert run.cli("kill-primary").returncode == 0, "it goes on"
        done = subprocess.run([*elsewhere, "down", "--run", run.run], env=run.env, timeout=60, check=False)
        assert done.returncode == 0
        assert run.run_file["exit_code"] == 0


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
