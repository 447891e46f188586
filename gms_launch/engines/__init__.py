"""Engines: how a rank is started, with which environment, and how its phase shows.

One module an engine; `get` finds it.
"""

from __future__ import annotations

from gms_launch.engines.base import Engine
from gms_launch.errors import UsageError


def get(name: str, file: str = "") -> Engine:
    """The engine called `name`; `file` describes the engine `command`. Raises `UsageError`."""
    if name == "vllm":
        from gms_launch.engines import vllm

        return vllm.ENGINE
    if name == "reference":
        from gms_launch.engines.reference import launch

        return launch.ENGINE
    if name == "command":
        from gms_launch.engines import command

        return command.read(file)
    raise UsageError(f"unknown engine {name!r}")
