"""Which log `gms-launch logs` shows, in a run of groups on several nodes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gms_launch.cli import logs
from gms_launch.errors import LaunchError, UsageError


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GMS_LAUNCH_HOME", str(tmp_path / "home"))
    run = tmp_path / "home" / "r1"
    for log in (
        "agent",
        "node0/a.cohort-0.1",
        "node1/agent",
        "node1/b.cohort-0.1",
        "node1/b.cohort-0.2",
        "node2/agent",
    ):
        path = run / "logs" / f"{log}.log"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(log + "\n")
    ended = {"run": "r1", "version": "0", "created": 1.0, "leader_host": "a", "leader_boot_id": "", "agent_pid": 1}
    ended |= {"agent_start": 1, "node_dir": "/x", "etcd_endpoints": [], "ended": 2.0, "nnodes": 2}
    ended["settings"] = {"spares": 1}
    ended["groups"] = {"a": {"nodes": [0]}, "b": {"nodes": [1]}}
    (run / "run.json").write_text(json.dumps(ended))


@pytest.mark.parametrize(
    ("component", "group", "node", "shown"),
    [
        ("agent", None, None, "agent"),
        ("b.cohort-0", None, None, "node1/b.cohort-0.2"),
        ("b.cohort-0.1", None, None, "node1/b.cohort-0.1"),
        ("cohort-0", "b", None, "node1/b.cohort-0.2"),
        ("agent", "b", None, "node1/agent"),
        ("agent", "a", None, "agent"),
        ("agent", None, 1, "node1/agent"),
        ("agent", None, 2, "node2/agent"),  # a spare's
    ],
)
def test_a_groups_log_is_found_where_the_group_is(
    capsys: pytest.CaptureFixture[str], component: str, group: str | None, node: int | None, shown: str
) -> None:
    logs.main(component, "r1", group, False, 0, node)
    assert capsys.readouterr().out == shown + "\n"


def test_a_name_that_each_group_has_takes_its_group() -> None:
    with pytest.raises(UsageError, match=r"no log of 'cohort-0'; say which group's with --group; it has: a.cohort-0.1"):
        logs.main("cohort-0", "r1", None, False, 0, None)


def test_a_node_that_there_is_not_is_told_how_many_there_are() -> None:
    with pytest.raises(UsageError, match="--node 3: run r1 has 3 nodes"):
        logs.main("agent", "r1", None, False, 0, 3)


def test_no_logs_at_all_is_said(tmp_path: Path) -> None:
    with pytest.raises(LaunchError, match=r"group b of run r1 has no logs of node 0 in .*/r1/logs"):
        logs.main(None, "r1", "b", False, 0, 0)
    (tmp_path / "home" / "r1" / "logs").rename(tmp_path / "away")
    with pytest.raises(LaunchError, match=r"^run r1 has no logs in .*/r1/logs$"):
        logs.main(None, "r1", None, False, 0, None)


def test_a_log_that_is_followed_may_be_renamed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Between its renaming and the next line there is no file of that name."""
    log = tmp_path / "home" / "r1" / "logs" / "agent.log"
    happens = ["renamed", "written", "interrupted"]

    def sleep(_: float) -> None:
        what = happens.pop(0)
        if what == "renamed":
            log.rename(log.with_name("agent.log.1"))
        elif what == "written":
            log.write_text("new\n")
        else:
            raise KeyboardInterrupt

    monkeypatch.setattr("gms_launch.cli.logs.time.sleep", sleep)
    with pytest.raises(KeyboardInterrupt):
        logs.main("agent", "r1", None, True, 0, None)
    assert capsys.readouterr().out == "agent\nnew\n" and not happens
