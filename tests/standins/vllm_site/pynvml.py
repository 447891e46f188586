"""NVML with as many GPUs as STANDIN_GPUS says, named as the reference engine names made-up devices, held by nobody."""

import os
import types


class NVMLError(Exception):
    pass


def nvmlInit():
    pass


def nvmlDeviceGetCount():
    return int(os.environ.get("STANDIN_GPUS", "1"))


def nvmlDeviceGetHandleByIndex(index):
    return index


def nvmlDeviceGetUUID(handle):
    from gms_launch.gms.devices import virtual_devices

    return virtual_devices(handle + 1, 1)[handle].uuid


def nvmlDeviceGetName(handle):
    return "stand-in"


nvmlMemory_v2 = 2


def nvmlDeviceGetMemoryInfo(handle, version=None):
    return types.SimpleNamespace(total=512 << 20, used=1 << 20)


def nvmlDeviceGetComputeMode(handle):
    return 0


def nvmlDeviceGetMigMode(handle):
    raise NVMLError


def nvmlDeviceGetComputeRunningProcesses(handle):
    return []
