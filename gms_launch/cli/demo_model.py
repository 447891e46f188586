"""`gms-launch demo-model`."""

from __future__ import annotations

import shutil
from pathlib import Path

from gms_launch.errors import UsageError
from gms_launch.settings.rules import shortened, unprintable


def main(directory: Path, mib: int, seed: int) -> None:
    if wrong := unprintable(str(directory)):
        raise UsageError(f"{str(directory)!r}: there is {wrong} in it")
    try:
        there = next(p for p in (directory.absolute(), *directory.absolute().parents) if p.exists())
        free = shutil.disk_usage(there).free >> 20
    except OSError as exc:
        raise UsageError(f"cannot write a model to {shortened(str(directory))}: {exc.strerror}") from None
    if mib >= free:
        raise UsageError(f"--mib {mib}: {mib} MiB of weights, and there are {free} MiB free in {there}")
    try:
        from gms_launch.engines.reference.demo_model import make

        size = make(directory, mib, seed)
    except ImportError as exc:
        raise UsageError(f"demo-model needs {exc.name}; pip install 'gms-launch[reference]'") from None
    except OSError as exc:
        raise UsageError(f"cannot write a model to {shortened(str(directory))}: {exc.strerror}") from None
    print(f"{directory}: {size / 2**20:.0f} MiB of weights")
