"""Keep logs at a size. Processes write to them directly, so a log is copied and then emptied in place."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from gms_launch.numbers import count

#: Logs of dead lives that are kept for each component.
KEEP_LIVES = 20


def rotate(directory: Path, limit: int) -> None:
    """Move the contents of every log above `limit` bytes to `<log>.1`, and drop the logs of the oldest lives.

    What is written between the copy and the emptying is lost: a few lines at most, and never a writer's time.
    """
    for log in directory.glob("*.log"):
        if log.stat().st_size > limit:
            shutil.copyfile(log, log.with_suffix(".log.1"))
            os.truncate(log, 0)
    lives: dict[str, list[tuple[int, Path]]] = {}
    for log in directory.glob("*.log"):
        component, _, suffix = log.stem.rpartition(".")
        if (life := count(suffix)) is not None:
            lives.setdefault(component, []).append((life, log))
    for logs in lives.values():
        for _, log in sorted(logs)[:-KEEP_LIVES]:
            log.unlink(missing_ok=True)
            log.with_suffix(".log.1").unlink(missing_ok=True)
