"""GMS servers of a node: ours or upstream's, one set a device.

Upstream's supervisor looks at every GPU of the machine and ignores CUDA_VISIBLE_DEVICES, so its single-device form
is used, in the engine's own device view, one process a tag (the form that releases 1.1 to 1.6 share).
"""

from __future__ import annotations

from pathlib import Path

from gms_launch.cohort.process import Command
from gms_launch.engines.dynamo import missing_modules
from gms_launch.errors import UsageError
from gms_launch.gms import probe
from gms_launch.gms.devices import TAGS, Device, socket_path
from gms_launch.services.base import NotReadyError, Service


def choose(setting: str, engine: str, python: str) -> str:
    """`builtin` or `upstream` for the value of --gms-server. Raises `UsageError` for a pair that cannot work.

    The reference engine maps host memory and vLLM a GPU's, so a server that owns the other kind is of no use to it.
    """
    if setting == "auto":
        if engine == "reference":
            return "builtin"
        return "builtin" if missing_modules(python, ("gpu_memory_service",)) else "upstream"
    if setting == "upstream" and engine == "reference":
        raise UsageError("--gms-server upstream owns GPU memory, and --engine reference maps host memory; use builtin")
    if setting == "upstream" and missing_modules(python, ("gpu_memory_service",)):
        raise UsageError("--gms-server upstream: gpu_memory_service cannot be imported (it is on no package index)")
    if setting == "builtin" and engine == "vllm":
        raise UsageError("--gms-server builtin owns host memory, and --engine vllm needs a GPU's; use upstream")
    return setting


def services(kind: str, python: str, devices: list[Device], directory: Path, timeout: float) -> list[Service]:
    """The servers for `devices`. A dead one stays dead: a new one would be empty, and engines hold the old memory."""
    made = []
    env: dict[str, str | None] = {"GMS_SOCKET_DIR": str(directory), "DYN_GMS_USE_V1": None}
    for device in devices:
        if kind == "builtin":
            mib = str(device.memory // (1024 * 1024))
            argv = (python, "-m", "gms_launch.gms", "--device", str(device.index), "--memory-mib", mib)
            made.append(_service(f"gms-{device.index}", argv, env, directory, device, TAGS, timeout))
        else:
            for tag in TAGS:
                argv = (python, "-m", "gpu_memory_service", "--device", str(device.index), "--tag", tag)
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
    paths = [socket_path(directory, device.uuid, tag) for tag in tags]

    def ready() -> None:
        for path in paths:
            try:
                probe.runtime_state(path)
            except probe.ProbeError as exc:
                raise NotReadyError(str(exc)) from None

    return Service(name, Command(argv, env), ready, timeout, restart=False)
