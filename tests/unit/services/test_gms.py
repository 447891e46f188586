"""Which GMS server runs for which engine and under which names, and what NVML is asked."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from gms_launch.errors import UsageError
from gms_launch.gms import gpus
from gms_launch.gms.devices import Device
from gms_launch.services import gms as gms_services


def test_the_builtin_gms_serves_vllm_under_the_names_that_its_client_looks_for() -> None:
    assert gms_services.choose("builtin", "vllm", sys.executable) == "builtin"
    with pytest.raises(UsageError, match="speaks to the builtin"):
        gms_services.choose("upstream", "reference", sys.executable)
    device = Device(0, "GPU-bbb", 1 << 30, False, alias="GPU-aaa")
    for by_nvml in (True, False):
        (service,) = gms_services.services("builtin", "cuda", "python", [device], Path("/d"), 1.0, by_nvml)
        assert ("--socket-uuid" in service.command.argv) is by_nvml
        assert ("GPU-aaa" in service.command.argv) is by_nvml


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
