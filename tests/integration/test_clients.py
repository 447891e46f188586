"""Who is connected to a port of ours, as the kernel tells it."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

import pytest

from gms_launch.process import proc
from gms_launch.process.clients import Client, Clients, connections, waiting
from tests.integration.test_strangers import DROP, STRANGER
from tests.support import eventually

CONNECT = (
    "import socket, sys; c = socket.create_connection((sys.argv[1], int(sys.argv[2]))); print(1); sys.stdin.read()"
)


@pytest.mark.parametrize(("host", "family"), [("127.0.0.1", socket.AF_INET), ("::1", socket.AF_INET6)])
def test_a_client_of_this_machine_is_a_process(host: str, family: socket.AddressFamily) -> None:
    mine = proc.identity(os.getpid())
    with (
        socket.create_server((host, 0), family=family) as listening,
        socket.create_server((host, 0), family=family) as b,
    ):
        port = listening.getsockname()[1]
        argv = [sys.executable, "-uc", CONNECT, host, str(port)]
        other = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert other.stdout is not None and other.stdout.readline()
        clients = Clients(os.getpid)
        with socket.create_connection((host, port)) as own:
            (found, none) = clients.of(port, b.getsockname()[1])
            assert none == {}
            assert found[own.getsockname()[:2]] == Client("", mine) == clients.own()
            assert set(found.values()) == {Client("", mine), Client("", proc.identity(other.pid))}
            assert all(c.alive for c in found.values()) and clients.of(port) == [found]
        assert clients.of(port) == [{a: c for a, c in found.items() if c != Client("", mine)}]
        (theirs,) = clients.of(port)[0].values()
        other.kill()
        other.communicate()
        assert not theirs.alive
        eventually(lambda: clients.of(port) == [{}], what="its connection is closed")


@pytest.mark.skipif(os.getuid() != 0, reason="becoming another user needs root")
def test_another_user_of_this_machine_is_no_client() -> None:
    """A dead engine's lease stands until all of its clients have been at its successor; he would never go there."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
        argv = [*DROP, "/usr/bin/python3", "-uc", CONNECT, "127.0.0.1", str(port)]
        other = subprocess.Popen(argv, cwd="/", stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert other.stdout is not None and other.stdout.readline()
        with socket.create_connection(("127.0.0.1", port)) as own:
            rows = [row for row in connections() if row.there[1] == port]
            assert sorted(row.user for row in rows) == [0, STRANGER], "both are connected"
            clients = Clients(os.getpid)
            assert clients.of(port) == [{own.getsockname()[:2]: clients.own()}]
        other.kill()
        other.communicate()


def test_where_no_frontend_runs_there_is_none() -> None:
    assert Clients().own() is None


def test_who_was_taken_in_and_sent_away_does_not_wait() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        place = listening.getsockname()
        with socket.create_connection(place):  # holds its end open
            listening.accept()[0].close()
            assert waiting(place[1]) == {}
            late = socket.create_connection(place)
            address = late.getsockname()
            eventually(lambda: waiting(place[1]) == {address: True}, what="it waits")
            late.close()
            eventually(lambda: waiting(place[1]) == {address: False}, what="it has given up")
