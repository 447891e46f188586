"""GMS servers of a node: ours or upstream's, one set a device.

Upstream's supervisor looks at every GPU of the machine and ignores CUDA_VISIBLE_DEVICES, so its single-device form
is used, in the engine's own device view, one process a tag (the form that releases 1.1 to 1.6 share).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from gms_launch.engines import installed
from gms_launch.errors import UsageError
from gms_launch.gms import probe
from gms_launch.gms.devices import CUDA_ORDER, TAGS, Device, find_socket
from gms_launch.process.lifecycle import Command
from gms_launch.services.base import NotReadyError, Service


def choose(setting: str, engine: str, python: str) -> str:
    """`builtin` or `upstream` for the value of --gms-server. Raises `UsageError` for a pair that cannot work.

    The reference engine speaks to the builtin server alone. vLLM brings upstream's client, which speaks to either;
    where its package can be imported, its server is the default.
    """
    if setting == "auto":
        if engine == "reference":
            return "builtin"
        return "builtin" if _no_upstream(python) else "upstream"
    if setting == "upstream" and engine == "reference":
        raise UsageError("--engine reference speaks to the builtin GMS server; use --gms-server builtin")
    if setting == "upstream" and _no_upstream(python):
        raise UsageError("--gms-server upstream: gpu_memory_service cannot be imported (it is on no package index)")
    return setting


def _no_upstream(python: str) -> bool:
    return bool(installed.look(python, ("gpu_memory_service",)).missing)


@dataclass(frozen=True)
class Servers:
    """What a node's servers have in common: `choose`'s kind, `host` or `cuda` memory, the directory of their sockets.

    `timeout` seconds until one is ready. `view` is the environment in which devices have their numbers.
    `by_nvml`: the engine has upstream's client, which looks for sockets by NVML's order, without CUDA_VISIBLE_DEVICES.
    """

    kind: str
    memory: str
    python: str
    directory: Path
    timeout: float
    by_nvml: bool = False
    view: Mapping[str, str] = field(default_factory=dict)


def services(servers: Servers, devices: list[Device]) -> list[Service]:
    """The servers for `devices`. A dead one stays dead: a new one would be empty, and engines hold the old memory."""
    made = []
    env: dict[str, str | None] = {"GMS_SOCKET_DIR": str(servers.directory), "DYN_GMS_USE_V1": None}
    if servers.memory == "cuda":
        env |= CUDA_ORDER
    env |= servers.view
    for device in devices:
        if servers.kind == "builtin":
            mib = str(device.memory // (1024 * 1024))
            argv = installed.module(servers.python, "gms_launch.gms", "--device", str(device.index))
            argv += ("--memory", "cuda") if servers.memory == "cuda" else ("--memory-mib", mib)
            argv += ("--socket-uuid", device.alias) if servers.by_nvml and device.alias else ()
            made.append(_service(f"gms-{device.index}", Command(argv, env), servers, device, TAGS))
        else:
            for tag in TAGS:
                module = ("gpu_memory_service", "--device", str(device.index), "--tag", tag)
                command = Command(installed.module(servers.python, *module), env)
                made.append(_service(f"gms-{device.index}-{tag}", command, servers, device, (tag,)))
    return made


def _service(name: str, command: Command, servers: Servers, device: Device, tags: tuple[str, ...]) -> Service:
    def ready() -> None:
        for tag in tags:
            try:
                probe.runtime_state(find_socket(servers.directory, device, tag))
            except probe.ProbeError as exc:
                raise NotReadyError(str(exc)) from None

    return Service(name, command, ready, servers.timeout, restart=False)
