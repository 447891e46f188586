"""`gms-launch logs`."""

from __future__ import annotations

import sys
import time
from pathlib import Path

from gms_launch.cli.timeline import directory as find_directory
from gms_launch.errors import UsageError
from gms_launch.numbers import count, numbered
from gms_launch.services.base import plain


def main(component: str | None, run: str | None, follow: bool, tail: int, node: int) -> None:
    directory = find_directory(run)
    run_file = directory.read()
    if run_file is not None and node >= run_file.nnodes:
        raise UsageError(
            f"--node {node}: run {directory.run} has {numbered(run_file.nnodes, 'node')}, ranks count from 0"
        )
    logs = directory.logs / f"node{node}"
    names = {log.stem: log for log in directory.logs.glob("*.log")} | {log.stem: log for log in logs.glob("*.log")}
    if component is None:
        for name in sorted(names):
            print(f"{name}\t{names[name]}")
        return
    log = names.get(component) or newest(names, component)
    if log is None:
        raise UsageError(
            f"run {directory.run} has no log of {component!r} on node {node}; it has: {', '.join(sorted(names))}"
        )
    text = log.read_text(errors="replace")
    lines = (text if sys.stdout.isatty() else plain(text)).splitlines()
    print(*(lines[-tail:] if tail else lines), sep="\n")
    if follow:
        _follow(log, len(text.encode()))


def newest(names: dict[str, Path], component: str) -> Path | None:
    """The log of the newest life of a component (`cohort-0` -> `cohort-0.7`)."""
    found = [(count(n.rpartition(".")[2]), p) for n, p in names.items() if n.rpartition(".")[0] == component]
    lives = [(life, path) for life, path in found if life is not None]
    return max(lives)[1] if lives else None


def _follow(log: Path, offset: int) -> None:
    while True:
        time.sleep(0.2)  # the log may be on a network file system, where nothing announces a change
        size = log.stat().st_size
        if size < offset:
            offset = 0
        with open(log, "rb") as file:
            file.seek(offset)
            data = file.read()
        offset += len(data)
        added = data.decode(errors="replace")
        sys.stdout.write(added if sys.stdout.isatty() else plain(added))
        sys.stdout.flush()
