"""A bench that is stopped leaves nothing behind: the way every bench's `main` is called.

A signal becomes an exception, so that what is open is closed in order, as after any other error. What that misses (a
lab or a run that was being made at that moment) is found by descent and by the list of open labs, and ended here.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from gms_launch.process import lifecycle, proc

#: A detached agent ends its run and removes its directories when it is asked to; this long at most (seconds).
ORDERLY = 60.0


def stoppable(main: Callable[[], None]) -> None:
    """Call `main`; SIGTERM, SIGHUP and SIGINT end it with exit code 128 and the signal's number. Returns as it does."""
    lifecycle.become_subreaper()  # what detaches itself stays ours
    for sig in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        signal.signal(sig, _stop)
    # Theirs too: a killed frontend or engine leaves its temporary files.
    os.environ["TMPDIR"] = tempfile.tempdir = tempfile.mkdtemp(prefix="bench-")
    try:
        main()
    finally:
        for sig in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
            signal.signal(sig, signal.SIG_IGN)  # the clearing up is not stopped half-way
        clear_up()
        shutil.rmtree(os.environ["TMPDIR"], ignore_errors=True)


def whole(path: Path, text: str) -> None:
    """Write a result so that whoever reads, or a bench that is stopped, finds the one before or this one, whole."""
    beside = path.with_name(path.name + ".part")
    try:
        beside.write_text(text)
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def _stop(number: int, _: object) -> None:
    for sig in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        signal.signal(sig, signal.SIG_IGN)
    print(f"stopped by {signal.Signals(number).name}; clearing up", file=sys.stderr, flush=True)
    raise SystemExit(128 + number)


def clear_up() -> None:
    """Close the labs that are open, and end every process that descends from this one."""
    if (lab := sys.modules.get("tests.slurm.lab")) is not None:
        for one in list(lab.OPEN):
            try:
                one.close()
            except Exception as exc:  # the others are closed all the same
                print(f"{one.dir} could not be closed: {exc}", file=sys.stderr, flush=True)
    _end_children(signal.SIGTERM, ORDERLY)
    _end_children(signal.SIGKILL, 10.0)


def _end_children(sig: signal.Signals, timeout: float) -> None:
    """Signal the children, and what becomes a child because its parent has ended, until none is left."""
    deadline = time.monotonic() + timeout
    told: set[proc.ProcessId] = set()
    while time.monotonic() < deadline:
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        living = [who for pid in proc.children(os.getpid()) if (who := proc.identity(pid)) is not None]
        if not living:
            return
        for who in living:
            if who not in told:
                told.add(who)
                with contextlib.suppress(ProcessLookupError):
                    os.kill(who.pid, sig)  # an unreaped child: nobody else can have its number
        time.sleep(0.02)
