"""The documents follow the code."""

from __future__ import annotations

from pathlib import Path

from gms_launch.config import SETTINGS

ROOT = Path(__file__).parents[2]


def test_every_setting_is_in_the_reference_with_its_default() -> None:
    rows = [line for line in (ROOT / "docs/reference.md").read_text().splitlines() if line.startswith("| ")]
    for s in SETTINGS:
        (row,) = [r for r in rows if r.startswith(f"| {s.name} |")]
        assert s.flag in row and s.env in row and f"| {s.default} |" in row and s.help in row, s.name


def test_every_test_the_failure_policy_names_exists() -> None:
    import re

    named = re.findall(r"`(test_\w+)`", (ROOT / "docs/failure-policy.md").read_text())
    code = "".join(p.read_text() for p in (ROOT / "tests").rglob("test_*.py"))
    assert named
    assert [n for n in named if f"def {n}(" not in code] == []


def test_every_dependency_has_its_line() -> None:
    try:
        import tomllib
    except ModuleNotFoundError:
        import tomli as tomllib
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    text = (ROOT / "docs/dependencies.md").read_text()
    for requirement in project["dependencies"]:
        name = requirement.split(";")[0].split(">")[0].split("=")[0].strip()
        assert name in text, name
