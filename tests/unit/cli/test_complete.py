"""What Tab offers, asked for as each shell asks, and in a real bash; a home that hangs holds nobody up."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gms_launch.process import proc
from tests.support import eventually

COMMAND = Path(sys.executable).with_name("gms-launch")


@pytest.fixture
def env(tmp_path: Path) -> dict[str, str]:
    """A home with the runs `one`, of three nodes and three cohorts, which has ended, and `two`."""
    home = tmp_path / "home"
    for run, nnodes, created in (("one", 3, 2.0), ("two", 1, 1.0)):
        (home / run / "logs/node0").mkdir(parents=True, mode=0o700)
        (home / run / "logs/node1").mkdir(mode=0o700)
        (home / run).chmod(0o700)
        for log in ("agent", "node0/etcd", "node0/cohort-0.1", "node0/cohort-0.2", "node1/b2.cohort-1.4"):
            (home / run / f"logs/{log}.log").touch()
        record = {"run": run, "version": "1", "created": created, "leader_host": "h", "leader_boot_id": proc.boot_id()}
        record["groups"] = {"a1": {"nodes": [0]}, "b2": {"nodes": [1]}} if run == "one" else {}
        record |= {"agent_pid": 1, "agent_start": 1, "node_dir": "/none", "nnodes": nnodes, "ended": 3.0}
        (home / run / "run.json").write_text(json.dumps(record | {"etcd_endpoints": [], "settings": {"shadows": 2}}))
    home.chmod(0o700)
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("GMS_LAUNCH_", "SLURM_"))}
    return kept | {
        "GMS_LAUNCH_HOME": str(home),
        "HOME": str(tmp_path),
        "PATH": f"{COMMAND.parent}:{os.environ['PATH']}",
    }


def offered(env: dict[str, str], *words: str) -> list[str]:
    asked = {"_GMS_LAUNCH_COMPLETE": "complete_bash", "COMP_WORDS": " ".join(words), "COMP_CWORD": str(len(words) - 1)}
    done = subprocess.run([COMMAND], env=env | asked, capture_output=True, text=True, timeout=60, check=False)
    assert done.stderr == ""
    return done.stdout.split()


def offered_in_time(env: dict[str, str], *words: str) -> list[str]:
    """Whoever types on a machine that is too busy to read a directory within a second types again."""
    return eventually(lambda: offered(env, *words), what=f"something is offered after {words}")


def test_runs_cohorts_nodes_components_and_choices_are_offered(env: dict[str, str]) -> None:
    assert offered_in_time(env, "gms-launch", "status", "--run", "") == ["one", "two"]
    assert offered_in_time(env, "gms-launch", "down", "--run", "t") == ["two"]
    assert offered_in_time(env, "gms-launch", "logs", "--run", "one", "--node", "") == ["0", "1", "2"]
    assert offered_in_time(env, "gms-launch", "switch-over", "--run", "one", "--to", "") == ["0", "1", "2"]
    cohort = ["cohort-0", "cohort-0.1", "cohort-0.2"]
    assert offered_in_time(env, "gms-launch", "logs", "--run", "one", "coh") == cohort
    for verb in ("status", "kill-primary", "roll", "timeline", "web"):
        assert offered_in_time(env, "gms-launch", verb, "--run", "one", "--group", "") == ["a1", "b2"]
    assert offered_in_time(env, "gms-launch", "logs", "--run", "one", "--group", "b") == ["b2"]
    assert offered_in_time(env, "gms-launch", "logs", "--run", "one", "--group", "b2", "") == ["cohort-1", "cohort-1.4"]
    assert offered_in_time(env, "gms-launch", "logs", "a") == ["agent"], "the newest run's, as the verb does"
    assert offered_in_time(env, "gms-launch", "up", "--engine", "r") == ["reference"]
    assert offered_in_time(env, "gms-launch", "status", "-o", "") == ["wide", "json", "yaml"]
    assert "events" in offered_in_time(env, "gms-launch", "e")


def test_a_home_that_hangs_or_is_no_home_offers_nothing_and_ends(env: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "home/one/run.json").unlink()
    os.mkfifo(tmp_path / "home/one/run.json")  # whoever opens it waits for ever
    begun = time.monotonic()
    for words in (("status", "--run", ""), ("logs", "--run", "one", "")):
        assert offered(env, "gms-launch", *words) == []
    assert time.monotonic() - begun < 60
    assert offered(env | {"GMS_LAUNCH_HOME": "/dev/null"}, "gms-launch", "status", "--run", "") == []
    assert offered(env, "gms-launch", "status", "--run", "no\x07thing") == []


def test_a_real_bash_completes(env: dict[str, str]) -> None:
    script = """
    eval "$(gms-launch --show-completion bash)" || exit 9
    complete -p gms-launch || exit 8
    COMP_WORDS=(gms-launch status --run o); COMP_CWORD=3; COMP_LINE="${COMP_WORDS[*]}"
    function=$(complete -p gms-launch | sed 's/.*-F \\([^ ]*\\) .*/\\1/')
    $function gms-launch; echo "offered: ${COMPREPLY[*]}"
    """
    argv = ["bash", "--norc", "-c", script]
    done = subprocess.run(argv, env=env, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0 and "offered: one\n" in done.stdout, done


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_script_for_each_shell(shell: str, env: dict[str, str]) -> None:
    asked = env | {"_GMS_LAUNCH_COMPLETE": f"source_{shell}"}
    done = subprocess.run([COMMAND], env=asked, capture_output=True, text=True, timeout=60, check=False)
    assert f"complete_{shell}" in done.stdout and "gms-launch" in done.stdout
    if where := shutil.which(shell):
        assert subprocess.run([where, "-n"], input=done.stdout, text=True, check=False).returncode == 0


def test_zsh_and_fish_are_answered(env: dict[str, str]) -> None:
    asked = env | {"_TYPER_COMPLETE_ARGS": "gms-launch status --run ", "_TYPER_COMPLETE_FISH_ACTION": "get-args"}
    for shell in ("zsh", "fish"):
        words = asked | {"_GMS_LAUNCH_COMPLETE": f"complete_{shell}"}
        done = subprocess.run([COMMAND], env=words, capture_output=True, text=True, timeout=60, check=False)
        assert "one" in done.stdout and "two" in done.stdout, (shell, done)
