"""The page is served whoever else is there, and ends with its agent."""

from __future__ import annotations

import socket
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from gms_launch.observe import scrape
from tests.support import eventually


@pytest.fixture
def served() -> Iterator[tuple[str, int]]:
    listening = scrape.listen("127.0.0.1", 0)
    server = scrape.Server(listening, lambda: b"a 1\n", "text/plain; version=0.0.4")
    where: tuple[str, int] = listening.getsockname()
    server.start()
    yield where
    server.stop(10)
    assert "metrics" not in {t.name for t in threading.enumerate()}
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(where)


def get(where: tuple[str, int], path: str = "/metrics", method: str = "GET") -> tuple[int, bytes, str]:
    request = urllib.request.Request(f"http://{where[0]}:{where[1]}{path}", method=method)
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.status, answer.read(), answer.headers["content-type"]
    except urllib.error.HTTPError as exc:
        return exc.code, exc.read(), ""


def test_one_page_and_nothing_else(served: tuple[str, int]) -> None:
    assert get(served) == (200, b"a 1\n", "text/plain; version=0.0.4")
    assert get(served, "/metrics?x=1", "HEAD")[:2] == (200, b"")
    assert get(served, "/etc/passwd")[0] == 404
    assert get(served, method="POST")[0] == 405


def test_five_hundred_who_say_nothing_and_one_who_says_too_much(served: tuple[str, int]) -> None:
    with ExitStack() as stack:
        for _ in range(500):
            crowd = socket.socket()
            crowd.setblocking(False)
            crowd.connect_ex(served)
            stack.callback(crowd.close)
        assert get(served)[:2] == (200, b"a 1\n")
        with socket.create_connection(served, timeout=30) as loud, pytest.raises(ConnectionError):
            loud.sendall(b"x" * 50_000_000)
    assert eventually(lambda: get(served)[0] == 200)


def test_a_page_that_cannot_be_made_is_an_answer_too() -> None:
    listening = scrape.listen("127.0.0.1", 0)

    def broken() -> bytes:
        raise ValueError("no")

    server = scrape.Server(listening, broken, "text/plain")
    server.start()
    try:
        assert get(listening.getsockname())[0] == 500
    finally:
        server.stop(10)
