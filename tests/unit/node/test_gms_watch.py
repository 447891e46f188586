"""When a GMS server is taken for gone, and of which that is told."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from gms_launch.gms import probe
from gms_launch.gms.devices import TAGS, virtual_devices
from gms_launch.node.gms_watch import DOWN, SILENT_LOOKS, GmsWatch

STATE: Any = SimpleNamespace(
    state="RO", committed=True, ro_session_count=1, allocation_count=1, allocated_bytes=1, memory_layout_hash=""
)


@pytest.fixture
def silent(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The tags whose sockets do not answer."""
    found: set[str] = set()

    def state(path: Path) -> Any:
        if path.name in found:
            raise probe.ProbeError("no answer")
        return STATE

    monkeypatch.setattr("gms_launch.node.gms_watch.find_socket", lambda directory, device, tag: directory / tag)
    monkeypatch.setattr(probe, "runtime_state", state)
    monkeypatch.setattr(probe, "event_history", lambda path: [])
    return found


@pytest.fixture
def watch(silent: set[str], tmp_path: Path) -> GmsWatch:
    made = GmsWatch(virtual_devices(1, 16), tmp_path, first=2)
    made.look()
    return made


def down(watch: GmsWatch) -> list[str]:
    return [g.tag for g in watch.status if g.state == DOWN]


def test_one_that_answers_no_more_is_gone_after_three_looks_and_told_once(watch: GmsWatch, silent: set[str]) -> None:
    silent.add("weights")
    told = []
    for _ in range(SILENT_LOOKS + 2):
        watch.look()
        told.append((watch.newly_silent(), down(watch)))
    assert told == [
        *[([], [])] * (SILENT_LOOKS - 1),
        (["gpu 2 weights"], ["weights"]),
        *[([], ["weights"])] * 2,
    ]
    silent.clear()
    watch.look()
    assert down(watch) == [] and watch.newly_silent() == []


@pytest.mark.parametrize("name", ["gms-0-weights", "g1.gms-0-weights", "my-group.gms-0-weights"])
def test_one_that_has_ended_is_gone_at_once_and_the_other_has_its_looks(
    name: str, watch: GmsWatch, silent: set[str]
) -> None:
    silent.add("weights")
    watch.lost(name)
    assert down(watch) == ["weights"] and watch.newly_silent() == [], "its exit is told"
    silent.add("kv_cache")
    watch.look()
    assert down(watch) == ["weights"] and watch.missed and watch.newly_silent() == []


def test_the_server_of_all_of_a_device_takes_all_with_it(watch: GmsWatch) -> None:
    watch.lost("my-group.gms-0")
    assert down(watch) == list(TAGS)
