"""What NVML is asked of a GPU, with newer and older drivers."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from gms_launch.gms import gpus


class Nvml:
    """NVML of one GPU with 600 MiB reserved, with or without the newer memory call."""

    class NVMLError(Exception):
        pass

    nvmlMemory_v2 = 0x2000028

    def __init__(self, knows_v2: bool) -> None:
        self._knows_v2 = knows_v2

    def nvmlDeviceGetMemoryInfo(self, handle: int, version: int | None = None) -> SimpleNamespace:
        if version is None:
            return SimpleNamespace(total=80 << 30, used=(10 << 30) + (600 << 20))
        if not self._knows_v2:
            raise self.NVMLError("function not found")
        assert version == self.nvmlMemory_v2
        return SimpleNamespace(total=80 << 30, used=10 << 30, reserved=600 << 20)

    def __getattr__(self, name: str) -> Any:
        return lambda *_: {"nvmlDeviceGetUUID": "GPU-a", "nvmlDeviceGetComputeRunningProcesses": []}.get(name, 0)


@pytest.mark.parametrize(("knows_v2", "mib"), [(True, 10240), (False, 10840)])
def test_used_memory_is_what_nvidia_smi_shows(knows_v2: bool, mib: int) -> None:
    assert gpus._gpu(Nvml(knows_v2), 0, mig=False).used >> 20 == mib
