"""The engine files for SGLang and TensorRT-LLM: what they do before the engine starts is what Dynamo waits for."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from gms_launch.cohort.model import Phase
from gms_launch.engines import command
from gms_launch.run.printed import to_json
from gms_launch.settings.resolve import resolve
from tests.unit.engines.test_engines import plan_of

FILES = sorted((Path(__file__).parents[3] / "docs" / "engines").glob("*.toml"))
#: In the place of python: says how it was called, and what lies in the control directory.
PROGRAM = """#!{python}
import json, os, pathlib, sys
control = pathlib.Path(os.environ["DYN_SNAPSHOT_CONTROL_DIR"])
print(json.dumps([os.getpid(), sys.argv[1:], {{p.name: p.read_text() for p in control.iterdir()}}]))
"""


def test_there_are_two() -> None:
    assert [f.name for f in FILES] == ["sglang.toml", "trtllm.toml"]


@pytest.mark.parametrize("file", FILES, ids=lambda f: f.stem)
def test_the_engine_finds_that_it_is_restored_already(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gms_launch.run.plan.find_binary", lambda _s, _c, name, _p: f"/usr/bin/{name}")
    program = tmp_path / "a program"
    program.write_text(PROGRAM.format(python=sys.executable))
    program.chmod(0o755)
    model = tmp_path / "a model; touch x"
    model.mkdir()
    flags = {"engine": "command", "engine_file": str(file), "model": str(model), "run_id": "r1"}
    flags |= {"python": str(program), "served_model_name": "m $(touch y)", "virtual_gpus": "1"}
    shown = to_json(plan_of(resolve(flags, {})))
    rank = next(p for p in shown["processes"] if p["name"].startswith("cohort 1 "))
    env = {k: str(v) for k, v in rank["env"].items() if v is not None}
    assert env["DYN_SNAPSHOT_CONTROL_DIR"].startswith(env["TMPDIR"]), "of this life, and removed with it"
    assert env["DYN_ENDPOINT"] == "dyn://dynamo.backend.generate" and env["DYN_SYSTEM_PORT"] == "8081"
    assert env["ENGINE_ID"] == "1" and env["FAILOVER_LOCK_PATH"] and env["GMS_SOCKET_DIR"]
    env["DYN_SNAPSHOT_CONTROL_DIR"] = str(tmp_path / "scratch" / "snapshot")
    started = subprocess.Popen(rank["argv"], env=os.environ | env, stdout=subprocess.PIPE, text=True, cwd=tmp_path)
    said, _ = started.communicate(timeout=60)
    pid, argv, found = json.loads(said)
    assert pid == started.pid, "the engine is the process that the agent watches"
    assert found.keys() == {"restore-context.json", "restore-complete"}
    assert json.loads(found["restore-context.json"]) == {"env": {}}
    assert argv[:2] == ["-m", f"dynamo.{file.stem}"] and str(model) in argv and "m $(touch y)" in argv
    assert argv[argv.index("--load-format") + 1] == "gms"
    assert not list(tmp_path.glob("[xy]"))


@pytest.mark.parametrize("file", FILES, ids=lambda f: f.stem)
def test_its_log_shows_its_phases(file: Path) -> None:
    engine = command.read(str(file))
    stamp = "2026-11-29T02:00:00.000Z  INFO lifecycle.elect_and_wake: "
    said = stamp + "[Shadow] Engine paused, startup probe now passing, waiting for lock"
    assert engine.phase_of(said) is Phase.PARKED
    assert engine.phase_of(stamp + "[Shadow] Lock acquired, waking engine") is Phase.WAKING
    assert engine.is_awake(stamp + "[Shadow] Engine awake, registering with discovery")
