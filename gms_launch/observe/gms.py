"""Watch the GMS sockets of a node: their state, and how often the weights were written."""

from __future__ import annotations

from pathlib import Path

from gms_launch.control.records import GmsStatus
from gms_launch.gms import probe
from gms_launch.gms.devices import TAGS, Device, socket_path


class GmsWatch:
    """`look` asks every socket (blocking); `status` is the last answer."""

    def __init__(self, devices: list[Device], directory: Path) -> None:
        self.devices = devices
        self.sockets = [socket_path(directory, d.uuid, tag) for d in devices for tag in TAGS]
        self._directory = directory
        self.status: tuple[GmsStatus, ...] = ()

    def look(self) -> None:
        self.status = tuple(self._ask(d, tag) for d in self.devices for tag in TAGS)

    def lost(self, name: str) -> None:
        """A server (`gms-<device>[-<tag>]`) is gone: its sockets are down, without asking."""
        device = int(name.split("-")[1])
        self.status = tuple(
            GmsStatus(g.device, g.uuid, g.tag, "DOWN")
            if g.device == device and (name.count("-") == 1 or name.endswith(g.tag))
            else g
            for g in self.status
        )

    def _ask(self, device: Device, tag: str) -> GmsStatus:
        path = socket_path(self._directory, device.uuid, tag)
        try:
            state = probe.runtime_state(path)
            events = probe.event_history(path)
        except probe.ProbeError:
            return GmsStatus(device.index, device.uuid, tag, "DOWN")
        return GmsStatus(
            device=device.index,
            uuid=device.uuid,
            tag=tag,
            state=state.state,
            committed=state.committed,
            ro_sessions=state.ro_session_count,
            allocations=state.allocation_count,
            loads=sum(e.kind == "rw_connected" for e in events),
            layout_hash=state.memory_layout_hash,
        )
