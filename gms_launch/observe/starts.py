"""How long the steps of a start took on this node: a small file in the cache directory, for people.

Never needed: a file that is not there, cannot be read or holds nonsense is an empty one. The directory may be a home
on a server that hangs, so `load` and `save` work in a thread of their own, and nobody waits for them.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
from collections.abc import Callable, Mapping
from pathlib import Path

#: How many kinds of starts are kept, and the largest file that is read (bytes).
KEPT = 50
SIZE_MAX = 256 * 1024

Times = Mapping[str, Mapping[str, float]]


def role(cohort_id: int, incarnation: int) -> str:
    """What a start is compared with: the one that may write the weights takes longer than those that find them."""
    return "writer" if (cohort_id, incarnation) == (0, 1) else "reader"


def read(path: Path, key: str) -> Times:
    """The times of starts like `key`, by role and step."""
    return _all(path).get(key, {})


def write(path: Path, key: str, times: Times) -> None:
    """Put new times in the place of those of `key`. Raises `OSError`."""
    known = {k: v for k, v in _all(path).items() if k != key}
    kept = dict([*known.items(), (key, times)][-KEPT:])
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    new = path.with_name(f"{path.name}.{os.getpid()}")
    new.write_text(json.dumps(kept, indent=1))
    new.replace(path)


def _all(path: Path) -> dict[str, dict[str, dict[str, float]]]:
    try:
        with open(path, "rb") as file:
            found = json.loads(file.read(SIZE_MAX))
    except (OSError, ValueError):
        return {}
    if not isinstance(found, dict):
        return {}
    return {
        str(key): {
            str(role): {str(s): float(t) for s, t in steps.items() if isinstance(t, (int, float))}
            for role, steps in roles.items()
            if isinstance(steps, dict)
        }
        for key, roles in found.items()
        if isinstance(roles, dict)
    }


class Starts:
    """The times of one kind of start. `path` is the file, `key` the kind."""

    def __init__(self, path: Path, key: str) -> None:
        self._path, self._key = path, key
        self._times: Times = {}

    def load(self) -> None:
        """Begin to read; until that is done nothing is known."""
        _aside(self._load)

    def _load(self) -> None:
        self._times = read(self._path, self._key)

    def of(self, cohort_id: int, incarnation: int) -> Mapping[str, float]:
        """How long each step took (seconds), at the last start of that kind."""
        return self._times.get(role(cohort_id, incarnation), {})

    def save(self, took: Mapping[int, Mapping[str, float]]) -> None:
        """Keep the times of the first lives, by cohort."""
        times = dict(self._times)
        for cohort_id, steps in took.items():
            if steps:
                times[role(cohort_id, 1)] = {step: round(t, 1) for step, t in steps.items()}
        _aside(lambda: write(self._path, self._key, times))


def _aside(work: Callable[[], None]) -> None:
    def quietly() -> None:
        with contextlib.suppress(OSError):
            work()

    threading.Thread(target=quietly, name="starts", daemon=True).start()
