"""What verbs refuse before they look at a run or start anything: code 2, one message."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
from typer.testing import CliRunner

from gms_launch.cli.main import app
from gms_launch.cli.options import seconds
from gms_launch.errors import LaunchError


@pytest.fixture(autouse=True)
def _nothing_around(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [n for n in os.environ if n.startswith(("GMS_LAUNCH_", "SLURM_")) or n == "ENGINE_ID"]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("GMS_LAUNCH_HOME", str(tmp_path / "home"))


def call(*args: str) -> tuple[int, str]:
    """The verb in this process: exit code and what was said."""
    done = CliRunner().invoke(app, args)
    if isinstance(done.exception, LaunchError):
        return done.exception.exit_code, str(done.exception)
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done.exit_code, done.output


@pytest.mark.parametrize("value", ["0", "-5", "nan", "inf", "1_0", "x"])
@pytest.mark.parametrize(
    "verb",
    [
        ["kill-primary", "--timeout"],
        ["switch-over", "--timeout"],
        ["switch-over", "--when-idle"],
        ["roll", "--timeout"],
        ["down", "--timeout"],
        ["wait", "--timeout"],
    ],
)
def test_a_duration_is_a_finite_number_above_0(verb: list[str], value: str) -> None:
    code, text = call(*verb, value)
    assert code == 2 and f"Invalid value for '{verb[1]}'" in text, text


def test_every_duration_of_every_verb_is_read_by_one_helper() -> None:
    found = 0
    for verb in app.registered_commands:
        for name, hint in get_type_hints(verb.callback, include_extras=True).items():
            if any(
                t is float for t in (hint, *get_args(hint), *get_args(get_args(hint)[0] if get_args(hint) else None))
            ):
                assert get_args(hint)[1].parser is seconds, f"{verb.name} {name}: use options.Seconds"
                found += 1
    assert found == 6


@pytest.mark.parametrize("verb", ["up", "plan", "doctor", "roll"])
def test_a_word_before_the_dashes_is_no_engine_argument(verb: str) -> None:
    code, text = call(verb, "extra")
    assert code == 2 and "'extra' stands alone: engine arguments come after --" in text
    code, text = call(verb, "extra", "--", "--max-model-len", "8")
    assert code == 2 and "engine arguments come after --" in text
    assert "stands alone" not in call(verb, "--", "--max-model-len", "8")[1]


def test_a_model_that_the_disk_does_not_hold_is_not_begun(tmp_path: Path) -> None:
    code, text = call("demo-model", str(tmp_path / "a" / "m"), "--mib", str(2**40))
    assert code == 2 and "MiB of weights, and there are" in text, text
    assert not (tmp_path / "a").exists()


def test_sweep_of_a_run_that_is_not_dead() -> None:
    code, text = call("sweep", "--run", "../x")
    assert code == 2 and "is not the name of a run" in text
    code, text = call("sweep", "--run", "nobody-knows-it")
    assert code == 5 and "nothing of a run nobody-knows-it is on this node" in text


def test_sweep_of_a_live_run(monkeypatch: pytest.MonkeyPatch) -> None:
    from gms_launch.cli import sweep

    monkeypatch.setattr(sweep, "look", lambda: ([], {(0, "busy+2")}))
    code, text = call("sweep", "--run", "busy")
    assert code == 3 and "run busy is up on this node" in text and "gms-launch down --run busy" in text


def test_logs_of_a_node_that_the_run_does_not_have(tmp_path: Path) -> None:
    directory = tmp_path / "home" / "r1"
    (directory / "logs").mkdir(parents=True)
    ended = {"run": "r1", "version": "0", "created": 1.0, "leader_host": "a", "leader_boot_id": "", "agent_pid": 1}
    more = {"agent_start": 1, "node_dir": "/x", "etcd_endpoints": [], "ended": 2.0, "nnodes": 2}
    (directory / "run.json").write_text(json.dumps(ended | more))
    code, text = call("logs", "--run", "r1", "--node", "2")
    assert code == 2 and "--node 2: run r1 has 2 nodes, ranks count from 0" in text


def test_wait_says_what_it_waits_for() -> None:
    done = CliRunner().invoke(app, ["wait", "--run", "nosuch", "--timeout", "0.5"])
    assert isinstance(done.exception, LaunchError) and done.exception.exit_code == 4
    assert done.output.count("there is no run nosuch yet: waiting for it") == 1


def test_every_summary_fits_its_line() -> None:
    text = CliRunner().invoke(app, ["--help"], env={"COLUMNS": "80"}).output
    assert "..." not in text.partition("Commands:")[2], text
