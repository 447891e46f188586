"""A node's member of etcd comes in sooner or later, whatever kept it out."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any, cast

import pytest

from gms_launch.errors import NoContactError
from gms_launch.node import members
from gms_launch.node.node import Node


def test_it_is_tried_until_it_is_in_and_each_reason_is_told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    fails = [OSError(28, "No space left on device"), NoContactError("away"), NoContactError("away"), ValueError()]
    monkeypatch.setattr(members, "AGAIN", 0.0)

    async def tries(me: Node) -> None:
        if fails:
            raise fails.pop(0)

    monkeypatch.setattr(members, "_join", tries)
    told: list[str] = []
    me = SimpleNamespace(
        stopping=asyncio.Event(),
        report=SimpleNamespace(emit=lambda kind, detail: told.append(detail)),
        progress=lambda text: None,
    )
    asyncio.run(members.join(cast(Any, me)))
    assert told == ["[Errno 28] No space left on device", "away", "ValueError"]
