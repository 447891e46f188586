"""Which log `gms-launch logs` shows, in a run of groups on several nodes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gms_launch.cli import logs
from gms_launch.errors import UsageError


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
