"""Which GMS server runs for which engine and under which names."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from gms_launch.errors import UsageError
from gms_launch.gms.devices import Device
from gms_launch.services import gms as gms_services


def test_the_builtin_gms_serves_vllm_under_the_names_that_its_client_looks_for() -> None:
    assert gms_services.choose("builtin", "vllm", sys.executable) == "builtin"
    with pytest.raises(UsageError, match="speaks to the builtin"):
        gms_services.choose("upstream", "reference", sys.executable)
    device = Device(0, "GPU-bbb", 1 << 30, False, alias="GPU-aaa")
    for by_nvml in (True, False):
        (service,) = gms_services.services(
            gms_services.Servers("builtin", "cuda", "python", Path("/d"), 1.0, by_nvml), [device]
        )
        assert ("--socket-uuid" in service.command.argv) is by_nvml
        assert ("GPU-aaa" in service.command.argv) is by_nvml
