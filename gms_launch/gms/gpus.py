"""What NVML says of this node's GPUs: names, memory, and which processes are on them. The one door to NVML.

Without a driver there are none, and `problem` says why. Reads only; never makes a CUDA context.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Gpu:
    """One GPU, or one MIG instance of it. Memory in bytes; `processes` are (pid, bytes), bytes -1 when not told.

    Inside a container NVML gives the pids of the host, or none.
    """

    uuid: str
    name: str
    total: int
    used: int
    mode: str
    processes: tuple[tuple[int, int], ...] = ()
    mig: bool = False


def _library() -> Any:
    import pynvml

    pynvml.nvmlInit()
    return pynvml


def problem() -> str:
    """Why NVML cannot be used; empty when it can."""
    try:
        _library()
    except Exception as exc:  # ImportError, and NVML's own of every kind
        return f"{type(exc).__name__}: {exc}"
    return ""


def none_visible() -> str:
    """Why there is no GPU, for people."""
    return f"no GPU is visible: {problem() or 'CUDA_VISIBLE_DEVICES leaves none'}"


def look() -> list[Gpu]:
    """Every GPU of this machine in NVML's order, each followed by its MIG instances. Empty without a driver."""
    try:
        nvml = _library()
    except Exception:
        return []
    found = []
    for index in range(nvml.nvmlDeviceGetCount()):
        handle = nvml.nvmlDeviceGetHandleByIndex(index)
        found.append(_gpu(nvml, handle, mig=False))
        for slot in range(_mig_slots(nvml, handle)):
            try:
                found.append(_gpu(nvml, nvml.nvmlDeviceGetMigDeviceHandleByIndex(handle, slot), mig=True))
            except nvml.NVMLError:
                continue  # a slot without an instance
    return found


def _mig_slots(nvml: Any, handle: Any) -> int:
    try:
        current, _ = nvml.nvmlDeviceGetMigMode(handle)
    except nvml.NVMLError:
        return 0  # this GPU knows no MIG
    return int(nvml.nvmlDeviceGetMaxMigDeviceCount(handle)) if current else 0


def _gpu(nvml: Any, handle: Any, mig: bool) -> Gpu:
    try:  # as nvidia-smi has it: the first version of the call counts what the driver reserves for itself as used
        memory = nvml.nvmlDeviceGetMemoryInfo(handle, version=nvml.nvmlMemory_v2)
    except nvml.NVMLError:
        memory = nvml.nvmlDeviceGetMemoryInfo(handle)  # a driver that does not know the second
    modes = {0: "default", 2: "prohibited", 3: "exclusive process"}
    try:
        mode = modes.get(nvml.nvmlDeviceGetComputeMode(handle), "unknown")
    except nvml.NVMLError:
        mode = "default"
    return Gpu(
        uuid=_text(nvml.nvmlDeviceGetUUID(handle)),
        name=_text(nvml.nvmlDeviceGetName(handle)),
        total=int(memory.total),
        used=int(memory.used),
        mode=mode,
        processes=_processes(nvml, handle),
        mig=mig,
    )


def _processes(nvml: Any, handle: Any) -> tuple[tuple[int, int], ...]:
    try:
        listed = nvml.nvmlDeviceGetComputeRunningProcesses(handle)
    except nvml.NVMLError:
        return ()
    return tuple(sorted((int(p.pid), -1 if p.usedGpuMemory is None else int(p.usedGpuMemory)) for p in listed))


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


def pids_on(uuids: frozenset[str]) -> set[int]:
    """The processes that NVML sees on these GPUs. Empty without a driver."""
    return {pid for gpu in look() if gpu.uuid in uuids for pid, _ in gpu.processes}
