"""What scripts go by: the exit codes of `status`, and its layouts."""

from __future__ import annotations

import json
import os
import signal
from contextlib import suppress
from pathlib import Path

import yaml  # type: ignore[import-untyped]

from tests.support import Deployment, eventually

#: A module that an engine imports when it starts, and that lets it no further while the gate is shut.
GATE = """
import os, time
while os.path.exists({!r}):
    time.sleep(0.02)
"""


def test_exit_codes_and_layouts_say_how_it_stands(tmp_path: Path, model: Path) -> None:
    shut = tmp_path / "shut"
    (tmp_path / "gate.py").write_text(GATE.format(str(shut)))
    with Deployment(tmp_path / "home", model, REFERENCE_IMPORTS="gate", PYTHONPATH=str(tmp_path)) as run:
        run.wait_full()
        assert run.cli("status", "--exit-code").returncode == 0
        layouts(run)
        shut.touch()
        primary = run.status()["primary"]
        # No shadow comes back while the gate is shut, and then no primary either.
        for victim, state, code in ((1 - primary, "none", 1), (primary, "down", 2)):
            with suppress(ProcessLookupError):
                os.killpg(run.cohort(victim)["ranks"][0]["pgid"], signal.SIGKILL)
            eventually(lambda: run.status()["redundancy"] == state, what=state)  # noqa: B023
            assert run.cli("status", "--exit-code").returncode == code
            assert run.cli("status").returncode == 0, "nobody asked for it"
        shut.unlink()
        run.wait_full()
        assert run.cli("status", "--exit-code", "-o", "json").returncode == 0
    assert run.cli("status", "--exit-code").returncode == 5, "a run that is over is none of them"


def layouts(run: Deployment) -> None:
    def said(*flags: str) -> str:
        done = run.cli("status", *flags)
        assert done.returncode == 0, done
        return done.stdout

    as_json = json.loads(said("-o", "json"))
    assert as_json.keys() == json.loads(said("--json")).keys() == yaml.safe_load(said("-o", "yaml")).keys()
    assert as_json["redundancy"] == yaml.safe_load(said("-o", "yaml"))["redundancy"] == "full"
    run.env["COLUMNS"] = "30"
    widest = max(map(len, said("-o", "wide").splitlines()))
    assert widest > 60 and max(map(len, said().splitlines())) <= widest
    refused = run.cli("status", "-o", "json", "--html", "x")
    assert refused.returncode == 2 and "--html" in refused.stderr
    assert run.cli("status", "-o", "xml").returncode == 2
