"""Watch the GMS sockets of a node and its GPUs: states, how often the weights were written, who holds which memory."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from gms_launch.cohort.records import GmsStatus, GpuHolder, GpuStatus
from gms_launch.gms import gpus, probe
from gms_launch.gms.devices import TAGS, Device, find_socket
from gms_launch.numbers import count
from gms_launch.process import proc

#: The state of a socket whose server is gone or does not answer.
DOWN = "DOWN"


#: A server that is busy may miss a look; after so many in a row it is taken for gone. One that exits is at once. Looks
#: are closer together once one was missed (`upkeep`).
SILENT_LOOKS = 3


class GmsWatch:
    """`look` asks every socket (blocking); `status` is the last answer. `first`: its first device of the node's."""

    def __init__(self, devices: list[Device], directory: Path, first: int = 0) -> None:
        self.devices, self._first = devices, first
        self._directory = directory
        self.gpu_uuids = frozenset(d.uuid for d in devices if not d.virtual)
        self.status: tuple[GmsStatus, ...] = ()
        self._silent: dict[tuple[int, str], int] = {}
        self.gpus: tuple[GpuStatus, ...] = ()

    @property
    def sockets(self) -> list[Path]:
        return [find_socket(self._directory, d, tag) for d in self.devices for tag in TAGS]

    @property
    def told(self) -> tuple[GmsStatus, ...]:
        """`status` for everybody else, with devices by their numbers on the node."""
        return tuple(replace(g, device=self._first + g.device) for g in self.status)

    @property
    def missed(self) -> bool:
        """True while a server that is not yet taken for gone has missed its last look."""
        return any(g.missed for g in self.status)

    def answers(self) -> bool:
        """Ask every server now, for nothing but an answer (blocks for 2 s at most)."""

        def asked(socket: Path) -> bool:
            try:
                probe.runtime_state(socket)
            except probe.ProbeError:
                return False
            return True

        sockets = self.sockets
        with ThreadPoolExecutor(max(1, len(sockets))) as pool:
            return all(list(pool.map(asked, sockets)))

    def newly_silent(self) -> list[str]:
        """The sockets whose server was taken for gone by the last look: it is there and does not answer."""
        return [f"gpu {self._first + k} {tag}" for (k, tag), n in list(self._silent.items()) if n == SILENT_LOOKS]

    def look(self) -> None:
        wanted = [(d, tag) for d in self.devices for tag in TAGS]
        with ThreadPoolExecutor(max(1, len(wanted))) as pool:  # one that is silent takes its 2 s
            self.status = tuple(pool.map(lambda one: self._ask(*one), wanted))
        if self.gpu_uuids:
            self.gpus = tuple(_gpu(g) for g in gpus.look() if g.uuid in self.gpu_uuids)

    def lost(self, name: str) -> None:
        """A server (`[<group>.]gms-<device>[-<tag>]`) is gone: its sockets are down, without asking."""
        own = name.rpartition(".")[2]  # a group's name may have a dash too
        device, whole = int(own.split("-")[1]), own.count("-") == 1
        ended = {(g.device, g.tag) for g in self.status if g.device == device and (whole or name.endswith(g.tag))}
        self._silent |= dict.fromkeys(ended, SILENT_LOOKS + 1)  # that it does not answer any more is no news
        self.status = tuple(
            GmsStatus(g.device, g.uuid, g.tag, DOWN) if (g.device, g.tag) in ended else g for g in self.status
        )

    def _ask(self, device: Device, tag: str) -> GmsStatus:
        path, key = find_socket(self._directory, device, tag), (device.index, tag)
        try:
            state = probe.runtime_state(path)
            events = probe.event_history(path)
        except probe.ProbeError:
            self._silent[key] = self._silent.get(key, 0) + 1
            known = [g for g in self.status if (g.device, g.tag) == key]
            if known and self._silent[key] < SILENT_LOOKS:
                return replace(known[0], missed=self._silent[key])
            return GmsStatus(device.index, device.uuid, tag, DOWN)
        self._silent[key] = 0
        return GmsStatus(
            device=device.index,
            uuid=device.uuid,
            tag=tag,
            state=state.state,
            committed=state.committed,
            ro_sessions=state.ro_session_count,
            allocations=state.allocation_count,
            allocated_bytes=state.allocated_bytes,
            loads=sum(e.kind == "rw_connected" for e in events),
            layout_hash=state.memory_layout_hash,
        )


def _gpu(gpu: gpus.Gpu) -> GpuStatus:
    """A GPU with its processes by name: this user's by the front of their tag, as cohort/life or service. Root can read
    what others put into theirs."""
    holders = []
    for pid, size in gpu.processes:
        own = proc.owner(pid) == os.getuid()
        parts = (proc.tag_of(pid) or "" if own else "").split("/")
        cohort = len(parts) == 4 and count(parts[1]) is not None
        who = f"cohort {parts[1]}.{parts[2]}" if cohort else (parts[1:2] or ["?"])[0]
        holders.append(GpuHolder(pid, who, size))
    return GpuStatus(gpu.uuid, gpu.name, gpu.total, gpu.used, tuple(holders))
