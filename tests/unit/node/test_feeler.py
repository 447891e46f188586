"""What answers at a rank's system port is believed only if it is the rank."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from gms_launch.cohort.model import Phase
from gms_launch.node import pulse
from gms_launch.node.pulse import Feeler
from gms_launch.process import proc

#: An engine's system port in few words: it listens, says where, and answers everything with 200.
SERVER = """
import fcntl, http.server, sys
held = open(sys.argv[1], "w")
fcntl.flock(held, fcntl.LOCK_EX)
class Answer(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.send_header("content-length", "0"); self.end_headers()
server = http.server.HTTPServer(("127.0.0.1", 0), Answer)
print(server.server_port, flush=True)
server.serve_forever()
"""


@pytest.fixture
def rank(tmp_path: Path) -> Iterator[tuple[proc.ProcessId, int]]:
    """A rank's leader and where it listens. It has the lock."""
    argv = [sys.executable, "-c", SERVER, tmp_path / "failover.lock"]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True) as process:
        try:
            assert process.stdout is not None
            port = int(process.stdout.readline())
            who = proc.identity(process.pid)
            assert who is not None
            yield who, port
        finally:
            process.kill()


def feeler(leader: proc.ProcessId, port: int) -> Feeler:
    return Feeler(leader, "127.0.0.1", port, Path("/nowhere/lock"), 20.0, lambda _: False)


def test_a_rank_is_asked_at_its_own_port(rank: tuple[proc.ProcessId, int]) -> None:
    look = feeler(*rank).feel((), Phase.PARKED, fresh=True)
    assert look.signals is not None and look.signals.health.healthy is True


def test_who_has_the_lock_is_seen_without_the_list_of_all_locks(
    rank: tuple[proc.ProcessId, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another user can make that one so long that it takes minutes to read, and everybody's locks wait meanwhile."""
    lock, other = tmp_path / "failover.lock", tmp_path / "other" / "failover.lock"
    other.parent.mkdir()
    other.touch()
    opened, really = [], open
    monkeypatch.setattr("builtins.open", lambda *args, **named: opened.append(str(args[0])) or really(*args, **named))
    seen = []
    for path in (lock, other, tmp_path / "none"):
        look = Feeler(rank[0], "127.0.0.1", rank[1], path, 20.0, lambda _: False).feel((), Phase.PARKED, fresh=True)
        assert look.signals is not None
        seen.append(look.signals.holds_lock)
    assert seen == [True, False, False]
    assert any("fdinfo" in path for path in opened) and "/proc/locks" not in opened


def test_one_that_uses_memory_is_looked_at_whole_for_the_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The lock was handed to a child that was born since the last whole look, and its parent has let go of it."""
    lock = tmp_path / "failover.lock"
    shell = 'read _; exec 9>"$0"; flock 9; sleep 600 & exec 9>&-; echo; wait'
    argv = ["sh", "-c", shell, lock]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True) as process:
        who = proc.identity(process.pid)
        assert who is not None and process.stdin is not None and process.stdout is not None
        try:
            looks = Feeler(who, "127.0.0.1", 1, lock, 20.0, lambda _: False)
            for _ in range(pulse.MEMBERS_EVERY):
                assert not looks.feel((), Phase.PARKED, fresh=False).signals.holds_lock  # type: ignore[union-attr]
            looks.feel((), Phase.PARKED, fresh=False)  # the last whole one for a while
            process.stdin.write(b"\n")
            process.stdin.flush()
            process.stdout.readline()
            monkeypatch.setattr(pulse, "_uses", lambda socket, pids: True)
            look = looks.feel((tmp_path / "gms.sock",), Phase.PARKED, fresh=False)
            assert look.signals is not None and look.signals.holds_lock and not look.woken
        finally:
            os.killpg(process.pid, signal.SIGKILL)


def test_who_else_listens_there_is_not_asked(rank: tuple[proc.ProcessId, int]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as stranger:
        heard: list[bytes] = []

        def answer() -> None:
            try:
                connection, _ = stranger.accept()
            except OSError:
                return
            with connection:
                heard.append(connection.recv(4096))
                connection.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n")

        thread = threading.Thread(target=answer, daemon=True)
        thread.start()
        look = feeler(rank[0], stranger.getsockname()[1]).feel((), Phase.PARKED, fresh=True)
        assert look.signals is not None and look.signals.health.healthy is None and not heard
        assert os.getpid() not in look.members
        stranger.shutdown(socket.SHUT_RDWR)
        thread.join(60)
