"""Runs in miniature. They make records and never write or read them as JSON: so they run where nothing is installed."""

from __future__ import annotations

import importlib.util
import sys
from types import ModuleType

if importlib.util.find_spec("msgspec") is None:
    sys.modules["msgspec"] = ModuleType("msgspec")
