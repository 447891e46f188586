"""Which devices this node has, and what their sockets are called.

A machine without a GPU gets made-up devices whose UUIDs follow from the machine, so that they are the same after a
restart and differ between machines.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import tempfile
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

TAGS = ("weights", "kv_cache")
_NAMESPACE = uuid.UUID("5f0c6c1e-8a53-4c1e-9d0e-0b1f5d9b7a11")


@dataclass(frozen=True)
class Device:
    """A GPU of this node, real or made up. `index` is in the engine's view; `memory` in bytes."""

    index: int
    uuid: str
    memory: int
    virtual: bool


def virtual_devices(count: int, mib: int, node: str | None = None) -> list[Device]:
    """Made-up devices of `mib` MiB each. `node` names the machine; its machine id and host name when not given."""
    name = node or f"{_machine_id()}/{socket.gethostname()}"
    return [
        Device(k, f"GPU-{uuid.uuid5(_NAMESPACE, f'{name}/{k}')}", mib * 1024 * 1024, virtual=True) for k in range(count)
    ]


def real_devices(environ: Mapping[str, str] = os.environ) -> list[Device]:
    """The GPUs of this node in the engine's view (CUDA_VISIBLE_DEVICES), as nvidia-smi lists them; maybe none."""
    binary = shutil.which("nvidia-smi")
    if binary is None:
        return []
    query = [binary, "--query-gpu=uuid,memory.total", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return parse_smi(done.stdout, environ.get("CUDA_VISIBLE_DEVICES"))


def parse_smi(text: str, visible: str | None) -> list[Device]:
    """Devices from nvidia-smi's `uuid, MiB` lines, numbered as a process with that CUDA_VISIBLE_DEVICES sees them."""
    physical = []
    for line in text.splitlines():
        gpu, _, mib = line.partition(",")
        if gpu.strip():
            physical.append((gpu.strip(), int(mib)))
    chosen = physical
    if visible is not None:
        chosen = []
        for word in (w.strip() for w in visible.split(",")):
            match = [p for k, p in enumerate(physical) if word == str(k) or (word and p[0].startswith(word))]
            if not match:
                break  # CUDA stops at the first entry that names nothing
            chosen.append(match[0])
    return [Device(k, gpu, mib * 1024 * 1024, virtual=False) for k, (gpu, mib) in enumerate(chosen)]


def socket_dir() -> Path:
    """Where sockets are, as upstream says it: GMS_SOCKET_DIR, else the directory for temporary files."""
    return Path(os.environ.get("GMS_SOCKET_DIR") or tempfile.gettempdir())


def socket_path(directory: Path, device_uuid: str, tag: str) -> Path:
    """`gms_<GPU-UUID>_<tag>.sock`, upstream's name (common/utils.py)."""
    return directory / f"gms_{device_uuid}_{tag}.sock"


def _machine_id() -> str:
    try:
        return Path("/etc/machine-id").read_text().strip()
    except OSError:
        return "no-machine-id"
