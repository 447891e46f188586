"""The agents behind connections, one of which is lost while the run is up."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, cast

import pytest

from gms_launch.cli import up_hosts
from gms_launch.cli.up_hosts import Hosts
from gms_launch.errors import NoContactError
from gms_launch.settings.declared import Settings
from gms_launch.transport import ssh


class Remote:
    """An agent that says some lines and ends."""

    def __init__(self, *said: str) -> None:
        self._said = said

    def lines(self) -> Iterator[str]:
        return iter(self._said)

    def exit_code(self) -> int:
        return 5

    def errors(self) -> str:
        return "gms-launch: lost"


class Connection:
    """One by which a command can be started, or cannot."""

    def __init__(self, *said: str) -> None:
        self._said = said
        self.closed = False

    def start(self, argv: list[str], first: str) -> Remote:
        if not self._said:
            raise NoContactError("no channel")
        return Remote(*self._said)

    def close(self) -> None:
        self.closed = True


def news(hosts: Hosts) -> list[tuple[int, str, str]]:
    found = []
    while not hosts._news.empty():
        found.append(hosts._news.get())
    return found


@pytest.fixture
def hosts() -> Hosts:
    return Hosts(["a", "b"], Settings(hosts="a,b", run_id="r"), cast(Any, None))


def test_what_a_hosts_shell_says_of_its_own_is_passed_on(hosts: Hosts) -> None:
    hosts._read(1, cast(Any, Remote("42", "[1]", "null", "hello", json.dumps({"progress": "starts"}))))
    *said, end = news(hosts)
    assert said == [(1, "progress", text) for text in ("42", "[1]", "null", "hello", "starts")]
    assert end == (1, "ended", json.dumps([5, "lost"]))


def test_each_try_ends_the_connection_of_the_one_before(hosts: Hosts, monkeypatch: pytest.MonkeyPatch) -> None:
    made = [Connection(), Connection(), Connection("up")]
    left = iter(made)
    lost = [Connection("up"), Connection("up")]
    monkeypatch.setattr(up_hosts, "AGAIN", 0.001)
    monkeypatch.setattr(ssh, "connect", lambda _: next(left))
    hosts._connections = cast(Any, list(lost))
    hosts._again(1)
    assert [c.closed for c in (*lost, *made)] == [False, True, True, True, False]
    assert hosts._connections == [lost[0], made[2]]
    assert [kind for _, kind, _ in news(hosts)] == ["again", "progress", "ended"]
