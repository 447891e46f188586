"""A command that is run to its end: bounded in time, in output, and in what it leaves."""

from __future__ import annotations

import time
from pathlib import Path

from gms_launch.process import lifecycle, once, proc
from gms_launch.process.lifecycle import Command
from tests.support import eventually


def run(script: str, seconds: float = 60.0, stdin: bytes = b"", most: int = 1000) -> once.Outcome:
    latest = time.monotonic() + seconds
    return once.run(Command(("sh", "-c", script), {}), "t-once/x/1/0", stdin, lambda: latest, most)


def test_what_it_is_given_and_what_it_says() -> None:
    done = run("cat; echo $GMS_LAUNCH_TAG; echo error >&2; exit 3", stdin=b"word\n")
    assert (done.wrong, done.output) == ("exit code 3", b"word\nt-once/x/1/0\nerror\n")
    assert run("true").wrong == "" and "127" in run("no-such-command").wrong


def test_one_that_hangs_is_killed_with_its_group(tmp_path: Path) -> None:
    done = run(f"sleep 1000 & echo $! > {tmp_path}/pid; trap '' TERM; wait", seconds=2.0)
    assert "killed after" in done.wrong
    gone(tmp_path / "pid")


def test_what_it_leaves_in_the_background_is_not_waited_for_and_ends_with_it(tmp_path: Path) -> None:
    done = run(f"sleep 1000 & echo $! > {tmp_path}/pid; echo done")
    assert (done.wrong, done.output) == ("", b"done\n") and done.seconds < 60
    gone(tmp_path / "pid")


def test_one_that_prints_without_end_is_read_no_further() -> None:
    done = run("exec yes")
    assert done.wrong == "killed by SIGPIPE" and len(done.output) == 1000


def test_the_time_may_be_cut_short_while_it_runs() -> None:
    begun = time.monotonic()
    late = once.run(
        Command(("sleep", "1000"), {}),
        "t-once/x/1/0",
        b"",
        lambda: begun + (1000.0 if time.monotonic() < begun + 0.5 else 0.0),
        10,
    )
    assert "killed after" in late.wrong


def gone(file: Path) -> None:
    """The process is, or is dead."""
    pid = int(file.read_text())
    eventually(lambda: (info := proc.stat(pid)) is None or info.dead, what=f"process {pid} ends")
    assert lifecycle.CHILDREN.pids == set() or pid not in lifecycle.CHILDREN.pids
