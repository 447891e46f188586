"""GMS servers of a node: ours or upstream's, one set a device.

Upstream's supervisor looks at every GPU of the machine and ignores CUDA_VISIBLE_DEVICES, so its single-device form
is used, in the engine's own device view, one process a tag (the form that releases 1.1 to 1.6 share).
"""

from __future__ import annotations

from collections.abc import Mapping
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


def services(
    kind: str,
    memory: str,
    python: str,
    devices: list[Device],
    directory: Path,
    timeout: float,
    by_nvml: bool = False,
    view: Mapping[str, str] | None = None,
) -> list[Service]:
    """The servers for `devices`. A dead one stays dead: a new one would be empty, and engines hold the old memory.

    `view` is the environment in which `devices` have their numbers.
    `by_nvml`: the engine has upstream's client, which looks for sockets by NVML's order, without CUDA_VISIBLE_DEVICES.
    """
    made = []
    env: dict[str, str | None] = {"GMS_SOCKET_DIR": str(directory), "DYN_GMS_USE_V1": None}
    if memory == "cuda":
        env |= CUDA_ORDER
    env |= view or {}
    for device in devices:
        if kind == "builtin":
            mib = str(device.memory // (1024 * 1024))
            argv = installed.module(python, "gms_launch.gms", "--device", str(device.index))
            argv += ("--memory", "cuda") if memory == "cuda" else ("--memory-mib", mib)
            argv += ("--socket-uuid", device.alias) if by_nvml and device.alias else ()
            made.append(_service(f"gms-{device.index}", argv, env, directory, device, TAGS, timeout))
        else:
            for tag in TAGS:
                argv = installed.module(python, "gpu_memory_service", "--device", str(device.index), "--tag", tag)
                name = f"gms-{device.index}-{tag}"
                made.append(_service(name, argv, env, directory, device, (tag,), timeout))
    return made


def _service(
    name: str,
    argv: tuple[str, ...],
    env: dict[str, str | None],
    directory: Path,
    device: Device,
    tags: tuple[str, ...],
    timeout: float,
) -> Service:
    def ready() -> None:
        for tag in tags:
            try:
                probe.runtime_state(find_socket(directory, device, tag))
            except probe.ProbeError as exc:
                raise NotReadyError(str(exc)) from None

    return Service(name, Command(argv, env), ready, timeout, restart=False)
