"""A frontend's address is told with the machine that it is on, where another would not reach it."""

from __future__ import annotations

import pytest

from gms_launch.cohort.records import NodeRecord, RunRecord
from gms_launch.control.mirror import Mirror
from gms_launch.observe import pages, snapshot, views, words


def shot(url: str, *hosts: str) -> snapshot.Snapshot:
    mirror = Mirror("r")
    records = {mirror.keys.run: RunRecord("r", "d", "10.0.0.1", "0", 1.0, nnodes=2, frontend_url=url).encode()}
    for rank, host in enumerate(hosts):
        records[mirror.keys.node(rank)] = NodeRecord(rank, host, "10.0.0.1", "b", 1, 1).encode()
    mirror.replace(records)
    return snapshot.build(mirror)


@pytest.mark.parametrize("url", ["http://127.0.0.1:8000", "http://[::1]:8000", "http://localhost:8000"])
def test_a_frontend_on_loopback_is_told_with_its_machine(url: str) -> None:
    found = shot(url, "tray0", "tray1")
    assert words.frontend(found) == f"{url} (only on tray0)"
    assert "(only on tray0)" in pages.status(found, 2.0, 2.0)
    with (out := views.console(cut=False)).capture() as text:
        out.print(views.status(found, 2.0))
    assert f"{url} (only on tray0)" in text.get()
    assert words.frontend(shot(url)) == f"{url} (only on the leader's node)"


def test_one_that_others_reach_is_told_as_it_is() -> None:
    assert words.frontend(shot("https://10.0.0.1:8000", "tray0")) == "https://10.0.0.1:8000"
    assert words.frontend(shot("", "tray0")) == ""
