"""Who is at work: also who waits for a processor that others have."""

from __future__ import annotations

import os
import subprocess
import sys
import time

from gms_launch.process import proc
from tests.support import LONG, eventually


def test_who_waits_for_a_processor_is_at_work() -> None:
    """Three that want the same one: together they can have had it for as long as it was there, and no longer."""
    core = min(os.sched_getaffinity(0))
    busy = f"import os\nos.sched_setaffinity(0, {{{core}}})\nprint(flush=True)\nwhile True: pass"
    three = [subprocess.Popen([sys.executable, "-c", busy], stdout=subprocess.PIPE) for _ in range(3)]
    try:
        for one in three:
            assert one.stdout is not None and one.stdout.readline()
        before, begun = [proc.worked(one.pid) for one in three], time.monotonic()

        def wanted() -> float:
            return sum(proc.worked(one.pid) - was for one, was in zip(three, before, strict=True))

        eventually(lambda: wanted() > 2.0, LONG)
        assert wanted() > 1.5 * (time.monotonic() - begun)
    finally:
        for one in three:
            one.kill()
            one.communicate()
    assert proc.worked(three[0].pid) == 0.0, "it is gone"
