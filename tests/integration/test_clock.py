"""The clock is set by an hour in the middle of a start and of a failover: nothing ends, and no duration shows it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

from gms_launch.observe import journal
from tests.support import LONG, Deployment, eventually

SITE = Path(__file__).parents[1] / "standins" / "clock_site"
HOUR = 3600


def test_the_clock_is_set_by_an_hour_and_back(tmp_path: Path, model: Path) -> None:
    setting = tmp_path / "clock"

    def set_clock(seconds: int) -> None:
        (tmp_path / "new").write_text(str(seconds))
        (tmp_path / "new").replace(setting)

    set_clock(0)
    fake = {"PYTHONPATH": str(SITE), "CLOCK_FILE": str(setting)}

    def told() -> float:
        code = "import time; print(time.time())"
        done = subprocess.run([sys.executable, "-c", code], env=os.environ | fake, capture_output=True, check=True)
        return float(done.stdout) - time.time()

    flags = ("--start-timeout", "600", "--promotion-timeout", "300")
    run = Deployment(tmp_path / "home", model, *flags, REFERENCE_START_SECONDS="3", **fake)
    events = tmp_path / "home" / run.run / "events.jsonl"

    def ahead() -> None:
        eventually(lambda: events.exists() and '"started"' in events.read_text(), LONG)
        set_clock(HOUR)

    setter = threading.Thread(target=ahead)
    setter.start()
    with run:
        setter.join()
        assert abs(told() - HOUR) < 60, "the clock was set while the engines started"
        assert not [e for e in run.events("kill") if "start_timeout" in e["detail"]]
        before, victim = run.text(), run.wait_full()["primary"]
        shown = run.cli("status").stdout
        assert "1h0m" not in shown and "59m" not in shown, shown
        pgid = run.cohort(victim)["ranks"][0]["pgid"]
        os.killpg(pgid, signal.SIGKILL)
        set_clock(-HOUR)
        assert abs(told() + HOUR) < 60, "and back while the shadow took over"
        eventually(lambda: [e for e in run.events("first_token") if e["cohort_id"] == 1 - victim], LONG)
        eventually(lambda: run.text() == before)
        assert run.wait_full()["primary"] == 1 - victim
        (failover,) = run.timeline(1)
        assert all(0 <= s < 600 for s in failover["steps"].values()), failover
        times = [e.time for e in journal.read(events)]
        assert max(times) - min(times) < 600, "one hour is in none of the distances"
