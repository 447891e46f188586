"""`gms-launch web`: who gets in, and that nobody can change or hold up anything."""

from __future__ import annotations

import http.client
import json
import os
import shutil
import signal
import socket
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from gms_launch.cli import web
from gms_launch.run.rundir import RunDir
from tests.support import GMS_LAUNCH, eventually, gms_launch

RECORDED = Path(__file__).parents[1] / "observe" / "failovers.jsonl"


@pytest.fixture
def directory(tmp_path: Path) -> RunDir:
    """A run of three nodes that is over."""
    found = RunDir(tmp_path / "home" / "r1")
    found.path.mkdir(parents=True, mode=0o700)
    shutil.copy(RECORDED, found.events)
    first = json.loads(RECORDED.read_text().partition("\n")[0])["time"]
    run = {"run": "r1", "version": "0", "created": first - 1, "leader_host": "elsewhere", "leader_boot_id": "b"}
    run |= {"agent_pid": 1, "agent_start": 1, "node_dir": "/nowhere", "etcd_endpoints": [], "nnodes": 3}
    found.run_json.write_text(json.dumps(run | {"ended": first + 60, "exit_code": 1, "reason": "<b>why</b>"}))
    found.run_json.chmod(0o600)
    return found


@pytest.fixture
def server(directory: RunDir) -> Iterator[web.Server]:
    with web.Server(0, "the-secret", directory) as made:
        thread = threading.Thread(target=made.serve_forever, args=(0.02,))
        thread.start()
        yield made
        made.shutdown()
        thread.join()


def ask(
    server: web.Server, path: str, method: str = "GET", host: str | None = None
) -> tuple[int, dict[str, str | None], str]:
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=60)
    try:
        connection.request(method, path, headers={"Host": host} if host is not None else {})
        answer = connection.getresponse()
        return answer.status, dict(answer.getheaders()), answer.read().decode()
    finally:
        connection.close()


def test_the_pages_come_to_whoever_has_the_whole_address(server: web.Server) -> None:
    code, head, text = ask(server, "/the-secret/timeline")
    assert code == 200 and head["Refresh"] == "3" and 'id="failover-3"' in text and "&lt;b&gt;why&lt;/b&gt;" in text
    assert head["Cache-Control"] == "no-store" and head["Referrer-Policy"] == "no-referrer"
    code, head, text = ask(server, "/the-secret/timeline?still")
    assert code == 200 and "Refresh" not in head and "keep it up to date" in text, "who reads can hold it still"
    code, _, text = ask(server, "/the-secret/")
    assert code == 200 and "run r1 is not up; it ended at 20" in text, "no status of a run that is over"
    assert "first_token" in ask(server, "/the-secret/events")[2]


@pytest.mark.parametrize(
    "path",
    [
        *("/", "/timeline", "/the-secre/timeline", "/the-secret", "/the-secret2/", "x/the-secret/timeline"),
        *("/the-secret/../run.json", "/the-secret/run.json", "/the-secret/%2e%2e/run.json", "/the-s%65cret/"),
    ],
)
def test_nobody_else_is_told_anything(server: web.Server, path: str) -> None:
    code, _, text = ask(server, path)
    assert code == 404 and "r1" not in text and "the-secret" not in text


def test_a_page_of_another_site_cannot_read_by_a_name_that_leads_here(server: web.Server) -> None:
    for host in ("evil.example", "evil.example:80", "127.0.0.1.evil.example", "localhost.evil.example:8000", ""):
        code, _, text = ask(server, "/the-secret/timeline", host=host)
        assert code == 421 and "r1" not in text, host
    for host in ("localhost", "localhost:9999", "127.0.0.1:1234"):  # as behind `ssh -L 9999:127.0.0.1:PORT`
        assert ask(server, "/the-secret/timeline", host=host)[0] == 200


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS", "HEAD", "CONNECT", "NONSENSE"])
def test_there_is_nothing_but_reading(server: web.Server, method: str) -> None:
    code, head, text = ask(server, "/the-secret/timeline", method)
    assert code == 405 and head["Allow"] == "GET" and "r1" not in text


def test_a_crowd_gets_no_more_than_there_are_places(server: web.Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(web.Handler, "timeout", 60.0)
    before = threading.active_count()
    silent = [socket.create_connection(("127.0.0.1", server.server_port)) for _ in range(web.MOST)]
    try:
        eventually(lambda: threading.active_count() >= before + web.MOST)
        with socket.create_connection(("127.0.0.1", server.server_port), timeout=60) as late:
            assert late.recv(1) == b"", "one more is shown the door"
    finally:
        for each in silent:
            each.close()
    eventually(lambda: threading.active_count() <= before)
    assert ask(server, "/the-secret/timeline")[0] == 200


def test_who_says_nothing_has_to_go(server: web.Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(web.Handler, "timeout", 0.2)
    with socket.create_connection(("127.0.0.1", server.server_port), timeout=60) as silent:
        assert silent.recv(1) == b""


def test_the_command(directory: RunDir) -> None:
    env = {k: v for k, v in os.environ.items() if not k.startswith(("GMS_LAUNCH_", "SLURM_"))}
    env |= {"GMS_LAUNCH_HOME": str(directory.path.parent)}
    process = subprocess.Popen([*GMS_LAUNCH, "web"], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None and process.stderr is not None
        address = process.stdout.readline().split()[-1]
        port, secret = address.removeprefix("http://127.0.0.1:").strip("/").split("/")
        assert len(secret) >= 43, "256 bits"
        connection = http.client.HTTPConnection("127.0.0.1", int(port), timeout=60)
        connection.request("GET", f"/{secret}/timeline")
        assert connection.getresponse().status == 200
        told = Path(f"/proc/{process.pid}/cmdline").read_bytes() + Path(f"/proc/{process.pid}/environ").read_bytes()
        assert secret.encode() not in told, "what others can read in /proc has no secret in it"
        taken = gms_launch("web", "--port", port, env=env)
        assert taken.returncode == 2 and f"127.0.0.1 port {port} cannot be listened on" in taken.stderr
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0 and process.stderr.read() == ""
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize("port", ["65536", "99999"])
def test_a_number_that_is_no_port_is_refused(port: str) -> None:
    refused = subprocess.run([*GMS_LAUNCH, "web", "--port", port], capture_output=True, text=True, check=False)
    assert refused.returncode == 2
    assert f"{port} is no port (0 to 65535)" in refused.stderr
