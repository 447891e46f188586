"""What the verbs say, to people and to pipes: true, dated, one line a thing."""

from __future__ import annotations

import contextlib
import json
import re
import signal
import socket
import subprocess
from pathlib import Path

import pytest

from gms_launch.run.ports import Reservation
from tests.support import GMS_LAUNCH, LONG, Deployment, eventually

MOMENT = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z"


def test_what_is_said_of_a_run_and_its_failover(tmp_path: Path, model: Path) -> None:
    run = Deployment(tmp_path / "home", model)
    reserved = Reservation("127.0.0.1")
    with socket.socket() as busy, contextlib.closing(reserved), contextlib.ExitStack() as after:
        if reserved.free(8000):  # else a run has it, or is about to: as good
            busy.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # else connections of the past are in the way
            busy.bind(("127.0.0.1", 8000))
            busy.listen()
        done = run.up()
        after.callback(run.__exit__)
        assert done.returncode == 0, done.stdout + done.stderr
        said = re.search(r"ports in use here, so others were taken: (.*)", done.stdout)
        assert said and re.match(r"[a-z_]+ \d+ instead of \d+(, |$)", said[1]), "ours, or what a run beside us has"
        watches = {}
        for name, more in ("table", []), ("json", ["--json"]):
            argv = [*GMS_LAUNCH, "status", "--run-id", run.run, "--watch", *more]  # the old spelling of --run
            out = open(tmp_path / name, "w")  # noqa: SIM115
            watches[name] = subprocess.Popen(argv, env=run.env, stdout=out, stderr=subprocess.STDOUT, text=True)
            after.callback(watches[name].kill)

        def seen(name: str) -> str:
            """What a watch has said so far, in whole lines."""
            text = (tmp_path / name).read_text()
            return text[: text.rfind("\n") + 1]

        eventually(lambda: "redundancy full" in seen("table") and seen("json"))
        before = run.status()["primary"]
        assert run.cli("kill-primary").returncode == 0
        run.wait_full()
        eventually(lambda: len(re.findall(rf"^{MOMENT}$", seen("table"), re.MULTILINE)) >= 2)
        eventually(lambda: json.loads(seen("json").splitlines()[-1])["primary"] == 1 - before)
        assert {json.loads(line)["run"] for line in seen("json").splitlines()} == {run.run}
        for watch in watches.values():
            watch.send_signal(signal.SIGINT)
            assert watch.wait(LONG) == 130

        known = len(run.events())
        head, *rows = run.cli("timeline", "--events").stdout.splitlines()
        assert head.split() == ["TIME", "NODE", "EVENT", "COHORT", "DETAIL"]
        assert len(rows) >= known, "a row each, however long"
        assert [row for row in rows if not re.match(MOMENT, row)] == []
        assert re.match(rf"{MOMENT}  cohort", run.cli("timeline").stdout)

        def written() -> list[str]:
            return (run.home / run.run / "logs" / "agent.log").read_text().splitlines()

        def said_full() -> int:
            return sum("redundancy full" in line for line in written())

        eventually(lambda: said_full() == 2, what="once for the start, once for the failover")
        log = written()
        assert all(re.match(rf"{MOMENT} (INFO|WARNING|ERROR) ", line) for line in log), log
        assert any(re.search(r"WARNING cohort \d\.1 exit killed by SIGKILL", line) for line in log), log
        ready = next(k for k, row in enumerate(rows) if " redundancy " in row)
        assert not any("WARNING" in line for line in log[:ready]), "nothing of a good start is a warning"
        assert "\x1b" in (run.home / run.run / "logs" / "node0" / "cohort-0.1.log").read_text(), "engines use colours"
        assert "\x1b" not in run.cli("logs", "cohort-0.1", "-n", "0").stdout


@pytest.mark.parametrize("detach", [[], ["-d"]], ids=["in the foreground", "with -d"])
def test_ctrl_c_in_the_middle_of_a_start_is_no_success(tmp_path: Path, model: Path, detach: list[str]) -> None:
    run = Deployment(tmp_path / "home", model, REFERENCE_START_SECONDS="60")
    out = tmp_path / "out"
    with open(out, "w") as file:
        up = subprocess.Popen([*GMS_LAUNCH, "up", *detach, *run.flags], env=run.env, stdout=file, stderr=file)
        try:
            eventually(lambda: "starting 2 cohorts" in out.read_text(), LONG)
            up.send_signal(signal.SIGINT)
            assert up.wait(LONG) == 130, out.read_text()
        finally:
            up.kill()
            up.wait()
            run.__exit__()
    found = run.run_file
    assert found["exit_code"] == 130 and "stopped before redundancy was full for the first time" in found["reason"]
