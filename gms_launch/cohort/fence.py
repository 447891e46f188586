"""Kill a rank and prove it dead on this node.

Proof is: its process group is empty, no process carries its tag, no GMS session of its processes is left, and NVML
lists none of them on the GPUs: the driver takes its time to free what a process had there.
Blocking; runs in a thread. What cannot be killed is named.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from gms_launch.cohort import proc, process
from gms_launch.cohort.proc import ProcessId
from gms_launch.gms import gpus, probe


@dataclass(frozen=True)
class Fenced:
    """The outcome. Times are Unix seconds; `strays` had left their group and were found by their tag.

    `leftovers` are pids that would not die, `sessions` GMS sockets that still list one of the dead, `on_gpu` pids that
    NVML still lists. `gpu_free_at` is 0 without GPUs.
    """

    dead_at: float
    fenced_at: float
    strays: tuple[int, ...] = ()
    leftovers: tuple[int, ...] = ()
    sessions: tuple[str, ...] = ()
    on_gpu: tuple[int, ...] = ()
    gpu_free_at: float = 0.0

    @property
    def proved(self) -> bool:
        return not self.leftovers and not self.sessions and not self.on_gpu


def destroy(
    leader: ProcessId, tag: str, sockets: Sequence[Path], timeout: float, gpu_uuids: frozenset[str] = frozenset()
) -> Fenced:
    """SIGKILL the rank led by `leader`, whose processes carry `tag`, and wait for proof, at most `timeout` seconds.

    `leader` must be an unreaped child, so that its number still means it.
    """
    deadline = time.monotonic() + timeout
    process.kill_group(leader)
    seen = {info.identity for info in proc.group(leader.pid)} | {leader}
    fds = [fd for who in seen if (fd := process.open_pidfd(who)) is not None]
    process.wait_gone(fds, max(0.0, deadline - time.monotonic()))
    dead_at = time.time()
    strays: set[int] = set()
    while True:
        left = [info.identity for info, _ in proc.tagged(tag)]
        left += [info.identity for info in proc.group(leader.pid) if not info.dead]
        if not left or time.monotonic() > deadline:
            break
        seen |= set(left)
        strays |= {who.pid for who in left}
        fds = [fd for who in left if (fd := process.kill_process(who)) is not None]
        process.wait_gone(fds, max(0.0, deadline - time.monotonic()))
        dead_at = time.time()
    leftovers = tuple(sorted({who.pid for who in left}))
    pids = {who.pid for who in seen}
    while (held := _sessions(sockets, pids)) and time.monotonic() < deadline:
        time.sleep(0.005)  # the server drops a session when it reads the end of file; nothing announces it
    on_gpu: set[int] = set()
    while gpu_uuids and (on_gpu := gpus.pids_on(gpu_uuids) & pids) and time.monotonic() < deadline:
        time.sleep(0.005)  # NVML announces nothing
    now = time.time()
    free_at = now if gpu_uuids and not on_gpu else 0.0
    return Fenced(dead_at, now, tuple(sorted(strays)), leftovers, tuple(held), tuple(sorted(on_gpu)), free_at)


def _sessions(sockets: Sequence[Path], pids: set[int]) -> list[str]:
    """The sockets that list one of `pids`. A socket that does not answer holds no session; its server is gone."""
    held = []
    for path in sockets:
        try:
            state = probe.runtime_state(path)
        except probe.ProbeError:
            continue
        if any(s.pid in pids for s in state.sessions):
            held.append(path.name)
    return held
