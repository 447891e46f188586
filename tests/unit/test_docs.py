"""The documents follow the code."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from tests import documents, reference

ROOT = Path(__file__).parents[2]


def test_the_table_of_settings_is_what_is_declared() -> None:
    text = reference.PAGE.read_text()
    assert text == reference.rendered(text), "make reference"


def test_every_test_the_failure_policy_names_exists() -> None:
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


def test_every_command_line_is_run_or_says_why_not() -> None:
    """What is run is run by tests/slurm/test_documents.py: every block of `sh`, and every span of these two."""
    tests = "".join(p.read_text() for p in (ROOT / "tests").rglob("test_*.py"))
    wrong = []
    for text in [*documents.blocks(), *documents.spans()]:
        if text.language not in (*documents.LANGUAGES, "span"):
            wrong.append(f"{text.where}: say which language the block is in: {', '.join(documents.LANGUAGES)}")
        if text.language == "text" and any(documents.TOOL.match(line) for line in text.text.splitlines()):
            wrong.append(f"{text.where}: a command line in a block that is not sh")
        if text.mark == "run by" and any(f"def {name}(" not in tests for name in text.reason.split(", ")):
            wrong.append(f"{text.where}: there is no {text.reason}")
        span = text.language == "span" and not text.mark and text.page not in documents.SCRIPTS
        if span and text.tool not in (*documents.RUN, *documents.LOOKED_UP):
            wrong.append(f"{text.where}: {text.text}: no test runs it and no mark says why")
    assert wrong == []


def test_every_make_target_exists() -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    said = [(t.where, t.text.split()[1]) for t in documents.spans() if t.tool == "make"]
    for block in documents.blocks():
        said += [
            (block.where, c.split()[1]) for c in block.commands if block.language == "sh" and c.startswith("make ")
        ]
    assert said and [s for s in said if s[1] not in targets] == []


def test_every_bench_takes_the_flags_that_are_given() -> None:
    lines = {c for b in documents.blocks() if b.language == "sh" for c in b.commands}
    lines |= {t.text for t in documents.spans()}
    for line in sorted(c for c in lines if re.match(r"python3? (-m (bench|tests)\.|bench/)", c)):
        words = line.split()
        module = words[2] if words[1] == "-m" else words[1].removesuffix(".py").replace("/", ".")
        done = subprocess.run(
            [sys.executable, "-m", module, "--help"], capture_output=True, text=True, cwd=ROOT, check=False
        )
        assert done.returncode == 0, f"{line}: {done.stderr}"
        assert [w for w in words if w.startswith("--") and w not in done.stdout] == [], line
