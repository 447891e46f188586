"""What an interpreter has installed, found without importing any of it.

Importing vLLM takes half a minute and wants a GPU; where its modules are, and which versions, is in the metadata.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib import metadata
from importlib.util import find_spec

if __name__ != "__main__":
    from gms_launch import interpreter

#: Longest that another interpreter may take to say what it has (seconds).
TIMEOUT = 60.0


@dataclass(frozen=True)
class Installed:
    """`missing` are the modules that cannot be found, `versions` those of the distributions that are there.

    `python` is its own version; `broken` says why the interpreter gave no answer.
    """

    missing: tuple[str, ...] = ()
    versions: dict[str, str] = field(default_factory=dict)
    python: tuple[int, ...] = sys.version_info[:2]
    broken: str = ""


def look(python: str, modules: Sequence[str] = (), distributions: Sequence[str] = ()) -> Installed:
    """Ask `python` (empty: this interpreter) for modules and distributions. One that does not run has none."""
    return _look(python or sys.executable, tuple(modules), tuple(distributions))


@cache
def _look(python: str, modules: tuple[str, ...], distributions: tuple[str, ...]) -> Installed:
    if python == sys.executable:
        return here(modules, distributions)
    try:
        done = subprocess.run(
            # By its path: that interpreter need not have gms-launch.
            [python, os.path.abspath(__file__), json.dumps([modules, distributions])],
            capture_output=True,
            text=True,
            timeout=TIMEOUT,
            check=True,
        )
        missing, versions, version = json.loads(done.stdout)
    except OSError as exc:
        why = exc.strerror or str(exc)
    except subprocess.TimeoutExpired:
        why = f"no answer within {TIMEOUT:g} s"
    except subprocess.CalledProcessError as exc:
        why = f"it ended with code {exc.returncode}: {(exc.stderr.strip().splitlines() or ['no message'])[-1]}"
    except ValueError:
        why = "it does not answer as Python does"
    else:
        return Installed(tuple(missing), versions, tuple(version))
    return Installed((f"a working interpreter ({python}: {why})",), broken=why)


def unusable(python: str) -> str:
    """Which interpreter does not work and why, in one line; empty when it does. Its answer is that of `gms.choose`."""
    why = look(python, ("gpu_memory_service",)).broken if python else ""
    return f"{python} is no interpreter that works: {why}" if why else ""


def module(python: str, name: str, *args: str) -> tuple[str, ...]:
    """The command line that runs a module with `python`, and imports nothing from the working directory."""
    return interpreter.module(python, name, *args, version=look(python, ("gpu_memory_service",)).python)


def here(modules: Sequence[str], distributions: Sequence[str]) -> Installed:
    """What this interpreter has. Only parents of dotted names are imported."""
    versions = {}
    for name in distributions:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return Installed(tuple(m for m in modules if not _found(m)), versions)


def _found(name: str) -> bool:
    try:
        return find_spec(name) is not None
    except (ImportError, ValueError):
        return False


if __name__ == "__main__":
    # The directory of this file is in front of sys.path when it is run by its path; its neighbours are not modules.
    sys.path[:] = [p for p in sys.path if os.path.abspath(p or ".") != os.path.dirname(os.path.abspath(__file__))]
    answer = here(*json.loads(sys.argv[1]))
    print(json.dumps([answer.missing, answer.versions, answer.python]))
