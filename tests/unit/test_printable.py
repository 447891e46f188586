"""What others have said tells nobody's terminal anything."""

from __future__ import annotations

import io
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

from gms_launch.cohort.records import EventRecord
from gms_launch.gms.gpus import Gpu
from gms_launch.node import gms_watch
from gms_launch.observe import views
from gms_launch.printable import coloured, plain
from gms_launch.process import proc

#: What to show, and what is shown of it without colours.
SAID = {
    "\x1b[31mred\x1b[0m": "red",
    "a\x1b[2Jb\x1b[1;1Hc": "abc",
    "a\x1b]0;a title\x07b\x1b]8;;http://x\x1b\\c": "abc",
    "a\x1bPdcs\x1b\\b\x1bcc\x1b(0d\x1b#8e": "abcde",
    "a\x1b\x1b[2J[2Jb": "a[2Jb",
    "a\x1b]0;without an end": "a]0;without an end",
    "a\x9b2Jb\x00\x08\x7fc": "a2Jbc",
    "a\u202eb\u2066c": "abc",
    "one\r\ntwo\rthree\n\tfour": "one\ntwo\nthree\n\tfour",
    "ß [x] 価": "ß [x] 価",
}


@pytest.mark.parametrize(("said", "shown"), SAID.items())
def test_control_sequences_are_left_out(said: str, shown: str) -> None:
    assert plain(said) == shown
    assert coloured(said) == (said if "[31m" in said else shown)


def test_cells_of_a_table_are_text() -> None:
    """And no markup: an end that nothing began would end the command."""
    event = EventRecord(1.0, 0, "hung", 0, 1, "at [fe80::1], [/b] \x1b]0;x\x07 says")
    text = io.StringIO()
    views.console(text).print(views.events([event]))
    assert "at [fe80::1], [/b]  says" in text.getvalue() and "\x1b" not in text.getvalue()


SHOW = """
import pathlib, sys
from gms_launch.cli import logs
from gms_launch.run.rundir import RunDir
logs.find_directory = lambda run: RunDir(pathlib.Path(sys.argv[1]))
logs.main("frontend", "r1", None, False, 0, None)
"""


def test_a_log_on_a_terminal_is_in_colour_and_no_more(tmp_path: Path) -> None:
    log = tmp_path / "r1" / "logs" / "frontend.log"
    log.parent.mkdir(parents=True)
    log.write_text("\x1b[32m INFO\x1b[0m asked for \x1b]0;owned\x07\x1b[2Jmodel\n")
    ours, theirs = pty.openpty()
    argv = [sys.executable, "-c", SHOW, tmp_path / "r1"]
    done = subprocess.run(argv, stdout=theirs, stderr=subprocess.PIPE, check=False)
    os.close(theirs)
    assert done.returncode == 0, done.stderr.decode()
    assert os.read(ours, 4096) == b"\x1b[32m INFO\x1b[0m asked for model\r\n"
    os.close(ours)


@pytest.mark.skipif(os.getuid() != 0, reason="becoming another user needs root")
def test_who_is_on_a_gpu_is_not_taken_from_another_users_tag() -> None:
    tag = {proc.TAG_ENV: "run/0/7/0"}
    sleep = ["sleep", "60"]
    own = subprocess.Popen(sleep, env=os.environ | tag)
    other = subprocess.Popen(sleep, env=os.environ | tag, user=64111, group=64111, extra_groups=[])
    try:
        status = gms_watch._gpu(Gpu("GPU-1", "a", 2, 1, "default", ((own.pid, 1), (other.pid, 1))))
        assert [h.who for h in status.holders] == ["cohort 0.7", "?"]
    finally:
        for process in (own, other):
            process.kill()
            process.wait()
