"""`gms-launch logs`."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

from gms_launch.cli import which
from gms_launch.cli.timeline import directory as find_directory
from gms_launch.errors import LaunchError, UsageError
from gms_launch.numbers import count, numbered
from gms_launch.printable import coloured, plain


def main(component: str | None, run: str | None, group: str | None, follow: bool, tail: int, node: int | None) -> None:
    directory = find_directory(run)
    run_file = directory.read()
    chosen = which.group(run_file, group)
    nodes = 0 if run_file is None else run_file.nnodes + int(run_file.settings.get("spares", 0))
    if node is not None and run_file is not None and node >= nodes:
        raise UsageError(f"--node {node}: run {directory.run} has {numbered(nodes, 'node')}, ranks count from 0")
    found = of_group(directory.logs, chosen, node) if chosen else on_node(directory.logs, node or 0)
    if run_file is not None and run_file.groups and not chosen and node is None and component is not None:
        # A group's log is where the group is.
        found |= {k: on_node(directory.logs, k)[k] for k in range(1, run_file.nnodes)}
    whose = f"group {chosen} of run {directory.run}" if chosen else f"run {directory.run}"
    if component is None:
        rows = sorted((name, path) for names in found.values() for name, path in names.items())
        if not rows:
            of_node = f" of node {node}" if node is not None else ""
            raise LaunchError(f"{whose} has no logs{of_node} in {directory.logs}")
        for name, path in rows:
            print(f"{name}\t{path}")
        return
    logs = (names.get(component) or newest(names, component) for _, names in sorted(found.items()))
    log = next((path for path in logs if path is not None), None)
    if log is None:
        there = sorted({name for names in found.values() for name in names})
        where = f" on node {node or 0}" if node is not None or not (chosen or len(found) > 1) else ""
        which_one = "; say which group's with --group" if len(found) > 1 and not chosen else ""
        raise UsageError(f"{whose} has no log of {component!r}{where}{which_one}; it has: {', '.join(there) or 'none'}")
    text = log.read_text(errors="replace")
    lines = _shown(text).splitlines()
    print(*(lines[-tail:] if tail else lines), sep="\n")
    if follow:
        _follow(log, len(text.encode()))


def _shown(text: str) -> str:
    """A log may hold what clients have sent: of its control sequences a terminal is shown the colours alone."""
    return coloured(text) if sys.stdout.isatty() else plain(text)


def on_node(logs: Path, node: int) -> dict[int, dict[str, Path]]:
    """The logs of the run as a whole and of one node, by name."""
    places = (logs, logs / f"node{node}")
    return {node: {log.stem: log for place in places for log in place.glob("*.log")}}


def of_group(logs: Path, group: str, node: int | None) -> dict[int, dict[str, Path]]:
    """The logs of a group by node rank and by their names in it, of one node or of all."""
    found: dict[int, dict[str, Path]] = {}
    for log in logs.glob(f"node*/{group}.*.log"):
        rank = count(log.parent.name.removeprefix("node"))
        if rank is not None and node in (None, rank):
            of_node = found.setdefault(rank, {})
            of_node[log.stem.removeprefix(f"{group}.")] = log
            for agent in (log.with_name("agent.log"), logs / "agent.log"):
                if "agent" not in of_node and agent.exists() and (rank == 0 or agent.parent == log.parent):
                    of_node["agent"] = agent
    return found


def newest(names: dict[str, Path], component: str) -> Path | None:
    """The log of the newest life of a component (`cohort-0` -> `cohort-0.7`)."""
    found = [(count(n.rpartition(".")[2]), p) for n, p in names.items() if n.rpartition(".")[0] == component]
    lives = [(life, path) for life, path in found if life is not None]
    return max(lives)[1] if lives else None


def _follow(log: Path, offset: int) -> None:
    while True:
        time.sleep(0.2)  # the log may be on a network file system, where nothing announces a change
        try:
            with open(log, "rb") as file:
                if os.fstat(file.fileno()).st_size < offset:
                    offset = 0
                file.seek(offset)
                data = file.read()
        except FileNotFoundError:
            continue  # renamed as it was full, or the home is away: the next line makes it anew
        offset += len(data)
        added = data.decode(errors="replace")
        sys.stdout.write(_shown(added))
        sys.stdout.flush()
