"""The wheel of this checkout on a login node, by uv or pipx without extras, and the verbs that need no engine."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from tests import man

ROOT = Path(__file__).parents[2]


def run(*argv: str, env: Mapping[str, str] | None = None, code: int = 0) -> str:
    done = subprocess.run(argv, env=env, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == code, (argv, done.returncode, done.stdout, done.stderr)
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def uv(tmp_path_factory: pytest.TempPathFactory) -> str:
    """In an environment of its own: nothing else here needs it."""
    place = tmp_path_factory.mktemp("uv")
    run(sys.executable, "-m", "venv", str(place))
    run(str(place / "bin/pip"), "install", "-q", "uv", "pipx")
    return str(place / "bin/uv")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory, uv: str) -> Path:
    """Built from a copy: a build leaves directories behind."""
    place = tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, place / name)
    for name in ("gms_launch", "docs/man"):
        shutil.copytree(ROOT / name, place / name, ignore=shutil.ignore_patterns("__pycache__"))
    run(uv, "build", "-q", "--wheel", "-o", str(place / "out"), str(place))
    (found,) = (place / "out").glob("*.whl")
    return found


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("by", ["uv", "pipx"])
def test_verbs_that_need_no_engine_work_in_an_install_of_the_wheel_alone(
    tmp_path: Path, wheel: Path, uv: str, model: Path, by: str
) -> None:
    env = {k: v for k, v in os.environ.items() if not k.startswith(("GMS_LAUNCH_", "SLURM_", "PYTHON", "VIRTUAL_ENV"))}
    env |= {"UV_TOOL_DIR": str(tmp_path / "tools"), "UV_TOOL_BIN_DIR": str(tmp_path / "bin"), "NO_COLOR": "1"}
    env |= {"GMS_LAUNCH_HOME": str(tmp_path / "home")}
    env |= {"PIPX_HOME": str(tmp_path), "PIPX_BIN_DIR": str(tmp_path / "bin"), "PIPX_MAN_DIR": str(tmp_path / "man")}
    if by == "uv":
        run(uv, "tool", "install", "-q", "--python", sys.executable, str(wheel), env=env)
        installed = tmp_path / "tools/gms-launch"
    else:
        run(str(Path(uv).with_name("pipx")), "install", "-q", "--python", sys.executable, str(wheel), env=env)
        installed = tmp_path / "venvs/gms-launch"
    tool = str(tmp_path / "bin/gms-launch")
    packages = {p.name.partition("-")[0] for p in installed.glob("lib/python3*/site-packages/*.dist-info")}
    assert "gms_launch" in packages and not packages & {"ai_dynamo", "numpy", "tokenizers", "safetensors", "vllm"}

    assert run(tool, "--version", env=env) == f"gms-launch {man.__version__}\n"
    for verb in ("status", "logs", "events", "timeline", "web", "down", "kill-primary", "switch-over", "roll"):
        assert "no run is up" in run(tool, verb, env=env, code=5), verb
    assert "there is no run x" in run(tool, "wait", "--run", "x", "--timeout", "1", env=env, code=4)
    assert "nothing of a run x" in run(tool, "sweep", "--dry-run", "--run", "x", env=env, code=5)
    submit = ("submit", "-N", "2", "--gpus-per-node", "8", "--model", str(model), "--dry-run")
    assert "#SBATCH --nodes=2" in run(tool, *submit, env=env)

    fits = ("plan", "--model", str(model), "--gpu-gib", "80")
    assert "--gpu-memory-utilization may be up to 0.97" in run(tool, *fits, env=env)

    # The manual: the pages of the checkout, which its formatter takes without a word.
    manual = installed / "share/man/man1" if by == "uv" else tmp_path / "man/man1"
    pages = list(manual.glob("gms-launch*"))
    assert {p.name: p.read_text() for p in pages} == man.pages()
    for page in pages:
        if shutil.which("man"):
            shown = subprocess.run(["man", "--warnings=w", "-l", str(page)], capture_output=True, text=True, check=True)
            assert shown.stderr == "" and "SYNOPSIS" in shown.stdout
