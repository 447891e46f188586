"""The lock file: everything that pyproject.toml asks for, with hashes, and nothing of where it came from."""

from __future__ import annotations

import re
from itertools import chain
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from gms_launch.settings.resolve import read_toml

ROOT = Path(__file__).parents[2]
LOCK = (ROOT / "requirements.lock").read_text()


def test_it_has_what_is_asked_for() -> None:
    entries = re.findall(
        r"^([A-Za-z0-9._-]+)==([^ ;]+)([^\\\n]*)\\\n((?: +--hash=sha256:[0-9a-f]{64}[ \\]*\n)+)", LOCK, re.M
    )
    assert len(entries) == len(re.findall(r"^[A-Za-z0-9]", LOCK, re.M)), "each has a version and hashes"
    locked: dict[str, list[str]] = {}
    for name, version, *_ in entries:
        locked.setdefault(canonicalize_name(name), []).append(version)
    project = read_toml(ROOT / "pyproject.toml", "project")
    extras = [project["optional-dependencies"][name] for name in ("reference", "dynamo", "test")]
    asked = [Requirement(r) for r in (*project["dependencies"], *chain.from_iterable(extras))]
    assert len(asked) > 20
    for wanted in asked:
        assert all(map(wanted.specifier.contains, locked[canonicalize_name(wanted.name)])), wanted
    names = [wanted.name for wanted in asked]
    assert len(set(names)) == len(names), "each is named once"


def test_it_names_no_place() -> None:
    assert "://" not in LOCK and "--index" not in LOCK and "--find-links" not in LOCK
