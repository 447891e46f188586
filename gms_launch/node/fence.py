"""Kill a rank and prove it dead on this node.

Proof is: its process group is empty, no process carries its tag, no orphan of a dead rank is left, nobody keeps one of
the node's locks but the living ranks, no GMS session of its processes is left, and NVML lists none of them on the GPUs:
the driver takes its time to free what a process had there.
Blocking; runs in a thread. What cannot be killed is named.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from gms_launch.gms import gpus, probe
from gms_launch.process import clock, lifecycle, proc, strays
from gms_launch.process.proc import ProcessId, Stat


@dataclass(frozen=True)
class Fenced:
    """The outcome. Times are Unix seconds; `strays` (named) had left their group; descent, tag or lock showed them.

    `leftovers` are pids that would not die, with `names` for people, `sessions` GMS sockets that still list one of the
    dead, `on_gpu` pids that NVML still lists. `gpu_free_at` is 0 without GPUs. `pids` are all that
    were killed.
    """

    dead_at: float
    fenced_at: float
    strays: tuple[str, ...] = ()
    leftovers: tuple[int, ...] = ()
    names: tuple[str, ...] = ()
    sessions: tuple[str, ...] = ()
    on_gpu: tuple[int, ...] = ()
    gpu_free_at: float = 0.0
    pids: frozenset[int] = frozenset()

    @property
    def proved(self) -> bool:
        return not self.leftovers and not self.sessions and not self.on_gpu


def destroy(
    leader: ProcessId,
    tag: str,
    sockets: Sequence[Path],
    timeout: float,
    gpu_uuids: frozenset[str] = frozenset(),
    locks: Sequence[Path] = (),
) -> Fenced:
    """SIGKILL the rank led by `leader`, whose processes carry `tag`, and wait for proof, at most `timeout` seconds.

    `locks` are the locks of this node, which nobody but a living rank may keep.

    `leader` must be an unreaped child, so that its number still means it.
    """
    deadline = time.monotonic() + timeout
    lifecycle.kill_group(leader)
    seen = {info.identity for info in proc.group(leader.pid)} | {leader}
    fds = [fd for who in seen if (fd := lifecycle.open_pidfd(who)) is not None]
    lifecycle.wait_gone(fds, max(0.0, deadline - time.monotonic()))
    dead_at = clock.now()

    def look() -> list[Stat]:
        # The quick look first: what it finds may have the lock, and a shadow waits for that.
        if found := strays.orphans():
            return found
        found = [info for info, _ in proc.tagged(tag)] + [i for i in proc.group(leader.pid) if not i.dead]
        return found or strays.lock_keepers(tag.partition("/")[0], locks)

    found, left = lifecycle.kill_all(look, max(0.0, deadline - time.monotonic()))
    if found:
        dead_at = clock.now()
    seen |= set(found)
    pids = {who.pid for who in seen}
    while (held := _sessions(sockets, pids)) and time.monotonic() < deadline:
        time.sleep(0.005)  # the server drops a session when it reads the end of file; nothing announces it
    on_gpu: set[int] = set()
    while gpu_uuids and (on_gpu := gpus.pids_on(gpu_uuids) & pids) and time.monotonic() < deadline:
        time.sleep(0.005)  # NVML announces nothing
    now = clock.now()
    free_at = now if gpu_uuids and not on_gpu else 0.0
    return Fenced(
        dead_at,
        now,
        strays=tuple(found.values()),
        leftovers=tuple(who.pid for who in left),
        names=tuple(left.values()),
        sessions=tuple(held),
        on_gpu=tuple(sorted(on_gpu)),
        gpu_free_at=free_at,
        pids=frozenset(pids),
    )


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
