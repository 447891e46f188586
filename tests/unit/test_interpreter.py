"""Modules are run, on every Python, without importing from the working directory."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from gms_launch import interpreter


@pytest.mark.parametrize("version", [(3, 10), (3, 11)])
@pytest.mark.skipif(sys.version_info < (3, 11), reason="-P is of 3.11")
def test_a_module_and_what_it_imports_are_not_taken_from_the_working_directory(
    version: tuple[int, ...], tmp_path: Path
) -> None:
    for name in ("json", "runpy", "textwrap"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('planted')")
    env = {k: v for k, v in os.environ.items() if k != "PYTHONSAFEPATH"}

    def run(argv: tuple[str, ...]) -> subprocess.CompletedProcess[str]:
        return subprocess.run(argv, cwd=tmp_path, env=env, input="{}", capture_output=True, text=True, check=False)

    argv = interpreter.module(sys.executable, "json.tool", "--indent=1", version=version)
    done = run(argv)
    assert (done.returncode, done.stdout) == (0, "{}\n"), done.stderr
    assert "planted" in run((sys.executable, "-m", "json.tool")).stderr, "as it is without"


def test_it_is_the_main_module_and_has_its_own_arguments(tmp_path: Path) -> None:
    (tmp_path / "it").mkdir()
    (tmp_path / "it" / "__init__.py").write_text("")
    (tmp_path / "it" / "__main__.py").write_text(
        "import sys; print(__name__, sys.modules['__main__'].__spec__.name, sys.argv[1:])"
    )
    argv = interpreter.module(sys.executable, "it", "a", "--b", version=(3, 10))
    done = subprocess.run(
        argv, env=os.environ | {"PYTHONPATH": str(tmp_path)}, capture_output=True, text=True, check=True
    )
    assert done.stdout == "__main__ it.__main__ ['a', '--b']\n"
