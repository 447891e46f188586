"""What `up` says while it waits, with the reference engine: a line a step, and the live view of a terminal."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import signal
import struct
import subprocess
import termios
from pathlib import Path

from tests.support import GMS_LAUNCH, LONG, Deployment, eventually

#: Long enough to be seen at, and told as, a step of its own.
SLOW = {"REFERENCE_START_SECONDS": "2.5"}


def test_every_step_is_a_line_and_the_next_start_says_how_long_it_took(tmp_path: Path, model: Path) -> None:
    cache = {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    run = Deployment(tmp_path / "home", model, **SLOW, **cache)
    done = run.up()
    try:
        assert done.returncode == 0, done.stdout + done.stderr
        said = [line.partition("] ")[2] for line in done.stdout.splitlines()]
        for cohort_id in (0, 1):
            mine = [line for line in said if line.startswith(f"cohort {cohort_id}: ")]
            assert mine[0] == f"cohort {cohort_id}: imports"
            assert any(re.search(r"parked [\d.]+ s after its start", line) for line in mine)
        first = [line for line in said if line.startswith("cohort 0: ")]
        assert any("; weights" in line for line in first), first
        assert any(re.search(r"weights took|warm-up took", line) for line in first), first
        assert any("first token" in line for line in said if line.startswith("cohort "))
        shown = run.status()
        assert shown["starting"] is False and shown["missing_nodes"] == []
        eventually(lambda: run.status()["nodes"][0]["gms"][0]["allocated_bytes"], LONG, "GMS is asked once more then")
        kept = tmp_path / "cache" / "gms-launch" / "starts.json"
        eventually(kept.exists, LONG)
        (times,) = json.loads(kept.read_text()).values()
        assert times["writer"]["imports"] > 2 and times["reader"]["imports"] > 2
    finally:
        run.__exit__()
    with Deployment(tmp_path / "home", model, **SLOW, **cache) as again:
        log = again.home / again.run / "logs" / "agent.log"
        told = re.compile(r"cohort 0: (.*; )?\S+.*\(last time \d+ s\)")
        eventually(lambda: told.search(log.read_text()), what=log.read_text)


def test_a_terminal_shows_what_each_cohort_is_at_and_for_how_long(tmp_path: Path, model: Path) -> None:
    run = Deployment(tmp_path / "home", model, **SLOW, TERM="xterm", XDG_CACHE_HOME=str(tmp_path / "cache"))
    screen, end = pty.openpty()
    fcntl.ioctl(end, termios.TIOCSWINSZ, struct.pack("HHHH", 60, 200, 0, 0))
    up = subprocess.Popen([*GMS_LAUNCH, "up", *run.flags], env=run.env, stdin=end, stdout=end, stderr=end)
    os.close(end)
    os.set_blocking(screen, False)
    shown = ""

    def see(pattern: str) -> bool:
        nonlocal shown
        try:
            shown += re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", os.read(screen, 1 << 20).decode(errors="replace"))
        except OSError:
            pass
        return re.search(pattern, shown) is not None

    try:
        eventually(lambda: see(r"redundancy starting"), LONG, "a first start is not down")
        eventually(lambda: see(r"imports for [1-9]"), LONG, "the step and its time, which go on")
        eventually(lambda: see(r"redundancy full"), LONG)
        assert "redundancy down" not in shown
    finally:
        up.send_signal(signal.SIGTERM)
        eventually(lambda: see("$^") or up.poll() is not None, LONG, "the run ends while its words are read")
        os.close(screen)
        run.__exit__()
