"""Which devices this node has, and what their sockets are called.

A machine without a GPU gets made-up devices whose UUIDs follow from the machine, so that they are the same after a
restart and differ between machines.
"""

from __future__ import annotations

import os
import socket
import tempfile
import uuid
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from gms_launch.gms import gpus
from gms_launch.numbers import count

#: CUDA numbers GPUs by speed unless told to number them as NVML does, by bus.
CUDA_ORDER = {"CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
#: Which of the machine's made-up devices a process sees, as CUDA_VISIBLE_DEVICES says it of real ones: 2,3.
VISIBLE = "GMS_VISIBLE_DEVICES"
TAGS = ("weights", "kv_cache")
_NAMESPACE = uuid.UUID("5f0c6c1e-8a53-4c1e-9d0e-0b1f5d9b7a11")


@dataclass(frozen=True)
class Device:
    """A GPU of this node, real or made up. `index` is in the engine's view; `memory` in bytes.

    `alias` is the UUID that NVML has for that index when CUDA_VISIBLE_DEVICES is not looked at: upstream names its
    sockets so, its server and its engines alike (common/utils.py, 1.1 to 1.6). Empty when it is the same.
    """

    index: int
    uuid: str
    memory: int
    virtual: bool
    alias: str = ""


def virtual_devices(count: int, mib: int, node: str | None = None) -> list[Device]:
    """Made-up devices of `mib` MiB each. `node` names the machine; its machine id and host name when not given."""
    name = node or f"{_machine_id()}/{socket.gethostname()}"
    return [
        Device(k, f"GPU-{uuid.uuid5(_NAMESPACE, f'{name}/{k}')}", mib * 1024 * 1024, virtual=True) for k in range(count)
    ]


@cache
def real_devices() -> tuple[Device, ...]:
    """The GPUs of this node in the engine's view (CUDA_VISIBLE_DEVICES), as NVML names them; maybe none.

    Asked once a process: NVML and CUDA must agree on the order, which `CUDA_ORDER` makes sure of.
    """
    return tuple(choose(gpus.look(), os.environ.get("CUDA_VISIBLE_DEVICES")))


def choose(found: list[gpus.Gpu], visible: str | None) -> list[Device]:
    """Devices numbered as a process with that CUDA_VISIBLE_DEVICES sees them: indices, GPU- or MIG- names or starts."""
    whole = [g for g in found if not g.mig]
    chosen = whole
    if visible is not None:
        chosen = []
        for word in (w.strip() for w in visible.split(",")):
            named = [g for g in found if word.startswith(("GPU-", "MIG-")) and g.uuid.startswith(word)]
            index = count(word)
            match = named or ([whole[index]] if index is not None and index < len(whole) else [])
            if not match or match[0] in chosen:
                break  # CUDA stops at the first entry that names nothing
            chosen.append(match[0])
    return [
        Device(k, gpu.uuid, gpu.total, False, whole[k].uuid if k < len(whole) and whole[k] is not gpu else "")
        for k, gpu in enumerate(chosen)
    ]


def device_uuid(kind: str, index: int) -> str:
    """The name of the device `index` of a kind (host, cuda) in this process's view. Raises `LookupError`."""
    if kind != "cuda" and (seen := os.environ.get(VISIBLE)):
        words = seen.split(",")
        if index >= len(words):
            raise LookupError(f"there is no device {index} here: {VISIBLE} is {seen}")
        index = int(words[index])
    known = real_devices() if kind == "cuda" else virtual_devices(index + 1, 1)
    if index >= len(known):
        raise LookupError(f"there is no GPU {index} here: NVML and CUDA_VISIBLE_DEVICES give {len(known)}")
    return known[index].uuid


def socket_dir() -> Path:
    """Where sockets are, as upstream says it: GMS_SOCKET_DIR, else the directory for temporary files."""
    return Path(os.environ.get("GMS_SOCKET_DIR") or tempfile.gettempdir())


def socket_path(directory: Path, device_uuid: str, tag: str) -> Path:
    """`gms_<GPU-UUID>_<tag>.sock`, upstream's name (common/utils.py)."""
    return directory / f"gms_{device_uuid}_{tag}.sock"


def find_socket(directory: Path, device: Device, tag: str) -> Path:
    """The socket of a device, under whichever of its names it is there; the first name when it is under none."""
    names = [socket_path(directory, name, tag) for name in (device.uuid, device.alias) if name]
    return next((path for path in names if path.exists()), names[0])


def _machine_id() -> str:
    try:
        return Path("/etc/machine-id").read_text().strip()
    except OSError:
        return "no-machine-id"
