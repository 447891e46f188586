"""`gms-launch sweep`: clear this node of runs whose agent is dead. Also what a Slurm epilog calls."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from gms_launch.cohort import proc, process
from gms_launch.errors import LaunchError
from gms_launch.rundir import NodeDir, user_root


def main(run: str | None, dry_run: bool) -> None:
    found = dead_runs()
    if run is not None:
        found = {run: found[run]} if run in found else {}
    if not found:
        print("nothing to sweep")
        return
    for name, processes in sorted(found.items()):
        pids = ", ".join(f"{i.pid} ({i.comm})" for i in processes) or "no process"
        print(f"run {name}: {pids}" + (", files" if (user_root() / name).exists() else ""))
        if dry_run:
            continue
        left = process.kill_tagged(name, 30.0, spare=frozenset({os.getpid()}))
        if left:
            raise LaunchError(f"processes {', '.join(str(w.pid) for w in left)} of run {name} could not be killed")
        NodeDir.of(name).remove()
        print(f"run {name}: swept")


def dead_runs() -> dict[str, list[proc.Stat]]:
    """Runs on this node without a living agent, each with its processes of this user."""
    runs: dict[str, list[proc.Stat]] = {}
    for pid in proc.pids():
        tag = proc.tag_of(pid)
        info = proc.stat(pid)
        if tag and info and not info.dead and pid != os.getpid():
            runs.setdefault(tag.split("/")[0], []).append(info)
    root = user_root()
    if root.is_dir():
        for path in root.iterdir():
            if path.is_dir() and path.name != "ports":
                runs.setdefault(path.name, [])
    return {name: found for name, found in runs.items() if not agent_alive(root / name)}


def agent_alive(node_dir: Path) -> bool:
    """True while an agent holds its place in the node-local directory."""
    try:
        fd = os.open(node_dir / "agent.lock", os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
    return False
