"""An engine that registers is the group's whose rank listens there, also when the kernel did not show it at once."""

from __future__ import annotations

import json

from gms_launch.node.whose import LOOKS, Whose
from gms_launch.process.listener import advertised


class Ranks:
    """A group that is seen to listen at a port, from the look number `seen` on."""

    def __init__(self, port: int, seen: int = 1) -> None:
        self.port, self.seen, self.looks = port, seen, 0

    def listens(self, host: str, port: int) -> bool:
        self.looks += 1
        return port == self.port and self.looks >= self.seen


def instance(address: str) -> bytes:
    record = json.dumps({"transport": {"tcp": f"{address}/generate"}}).encode()
    assert advertised(record) is not None
    return record


def test_who_was_missed_is_found_at_a_later_look() -> None:
    first, second = Ranks(1), Ranks(2, seen=3)
    whose = Whose([first, second], "10.0.0.1")
    found = {"a": instance("10.0.0.1:1"), "b": instance("127.0.0.1:2")}
    assert whose.look(found) == {"a": first, "b": None} and not whose.settled(found)
    assert whose.look(found)["b"] is None
    assert whose.look(found) == {"a": first, "b": second} and whose.settled(found)


def test_a_stranger_is_looked_for_so_often_and_another_nodes_engine_never() -> None:
    group = Ranks(1)
    whose = Whose([group], "10.0.0.1")
    found = {"here": instance("10.0.0.1:9"), "there": instance("10.0.0.2:1")}
    for _ in range(LOOKS + 2):
        assert whose.look(found) == {"here": None, "there": None}
    assert group.looks == LOOKS and whose.settled(found)
