"""What a figure was taken on."""

from __future__ import annotations

import os
import platform


def machine(*parts: str) -> str:
    """This one in a line: `parts`, its cores and its system."""
    return ", ".join([*parts, f"{os.cpu_count()} cores", platform.platform()])
