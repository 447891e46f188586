"""The way in: HAProxy before the real frontend asks for keys and speaks HTTPS, and that is all of it."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import signal
import socket
import ssl
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, TimeoutError
from pathlib import Path

import pytest

from gms_launch.engines.base import LOOPBACK
from gms_launch.process import proc
from gms_launch.services import frontend
from tests import certificates
from tests.integration.test_strangers import DROP, SQUATTER, STRANGER
from tests.load import Load
from tests.support import Deployment, eventually, free_port, gms_launch, stopped

KEYS = ["alices-key-0123456789abcdef", "c2Vjb25kIGtleSBvZiBib2I/+=="]
LATER = "a-key-that-comes-later-42"
#: As many tokens take a minute.
LONG = 3000


class Closed(Deployment):
    """A run with keys, and HTTPS by a certificate that is not made out to 127.0.0.1."""

    def __init__(self, directory: Path, model: Path) -> None:
        self.cert, key = certificates.make(directory / "tls")
        self.keys = directory / "keys"
        self.write_keys(*KEYS)
        tls = ["--tls-cert", str(self.cert), "--tls-key", str(key)]
        # A port that no run beside this one takes once it is free again.
        keys = ["--api-key-file", str(self.keys), "--migration-limit", "50", "--frontend-port", str(free_port())]
        super().__init__(directory / "home", model, *tls, *keys, REFERENCE_TOKEN_SECONDS="0.02")

    def write_keys(self, *keys: str) -> None:
        new = self.keys.with_name("keys.new")
        new.touch(0o600)
        new.write_text("# who may come in\n" + "".join(f"{key}   # somebody\n" for key in keys))
        new.replace(self.keys)

    @property
    def port(self) -> int:
        return int(self.run_file["ports"]["frontend"])

    @property
    def context(self) -> ssl.SSLContext:
        context = ssl.create_default_context(cafile=self.cert)
        context.check_hostname = False
        return context

    def connection(self) -> http.client.HTTPSConnection:
        return http.client.HTTPSConnection(LOOPBACK, self.port, timeout=60, context=self.context)

    def ask(self, path: str, key: str = "", method: str = "GET", body: str = "") -> tuple[int, str]:
        with contextlib.closing(self.connection()) as connection:
            headers = {"authorization": f"Bearer {key}"} if key else {}
            connection.request(method, path, body or None, headers | {"content-type": "application/json"})
            answer = connection.getresponse()
            return answer.status, answer.read().decode()

    def begin(self, stream: bool, key: str = KEYS[0]) -> http.client.HTTPSConnection:
        """A request that takes a minute."""
        connection = self.connection()
        body = {"model": "tiny", "prompt": "hello", "max_tokens": LONG, "temperature": 0, "stream": stream}
        headers = {"authorization": f"Bearer {key}", "content-type": "application/json"}
        connection.request("POST", "/v1/completions", json.dumps(body), headers)
        return connection

    def in_flight(self) -> int:
        """Requests in the frontend behind the proxy, as it counts them; -1 when it is not there."""
        try:
            counted = frontend.traffic(frontend.Where(LOOPBACK, self.run_file["ports"]["frontend_inner"]))
        except Exception:
            return -1
        return int(counted[1]) if counted else 0

    def service(self, name: str) -> dict[str, object]:
        found: dict[str, object] = next(s for s in self.status()["nodes"][0]["services"] if s["name"] == name)
        return found


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Iterator[Closed]:
    with Closed(tmp_path_factory.mktemp("front"), model) as deployment:
        yield deployment


def test_without_a_key_nobody_comes_in_and_with_one_all_is_as_without_a_proxy(run: Closed) -> None:
    assert run.status()["frontend_url"] == f"https://127.0.0.1:{run.port}"
    prompt = json.dumps({"model": "tiny", "prompt": "hello", "max_tokens": 4, "temperature": 0})
    thresholds = json.dumps({"model": "tiny", "active_decode_blocks_threshold": 0.5})
    for key in ("", "x" * 30, KEYS[0][:-1], KEYS[0] + "x", KEYS[0].upper(), f"{KEYS[0]} {KEYS[1]}"):
        for method, path, body in (
            ("GET", "/v1/models", ""),
            ("GET", "/metrics", ""),
            ("GET", "/health/../v1/models", ""),
            ("GET", "/health/", ""),
            ("POST", "/v1/completions", prompt),
            ("POST", "/busy_threshold", thresholds),
            ("POST", "/health", prompt),
            ("OPTIONS", "/v1/completions", ""),
        ):
            status, text = run.ask(path, key, method, body)
            assert (status, json.loads(text)["error"]["code"]) == (401, "invalid_api_key"), (key, method, path)
        for path in ("/health", "/live"):
            assert run.ask(path, key) == (200, "ok\n"), "nothing of engines and addresses"
    texts = set()
    for key in KEYS:
        assert "dynamo_frontend" in run.ask("/metrics", key)[1]
        assert "instances" in run.ask("/health", key)[1], "whoever may come in hears what the frontend says"
        assert run.ask("/busy_threshold", key, "POST", thresholds)[0] != 401
        status, text = run.ask("/v1/completions", key, "POST", prompt)
        assert status == 200
        texts.add(json.loads(text)["choices"][0]["text"])
    assert len(texts) == 1
    with pytest.raises(ConnectionError):
        plain(run.port)


def plain(port: int) -> None:
    """A request without TLS."""
    with contextlib.closing(http.client.HTTPConnection(LOOPBACK, port, timeout=10)) as connection:
        connection.request("GET", "/health")
        connection.getresponse()


def test_keys_are_in_no_file_and_on_no_command_line(run: Closed) -> None:
    pids = [*run.alive(), run.agent.pid]
    shown = [Path(f"/proc/{pid}/{what}").read_bytes() for pid in pids for what in ("cmdline", "environ")]
    files = [p for root in (run.home, run.node_dir) for p in root.rglob("*") if p.is_file()]
    own = [p for p in files if p.name.startswith("proxy")]
    assert {"proxy.keys", "proxy.pem", "proxy.cfg"} <= {p.name for p in own}
    assert all(p.stat().st_mode & 0o077 == 0 for p in own if p.parent == run.node_dir)
    shown += [p.read_bytes() for p in files]
    done = gms_launch("plan", "--json", *run.flags, env=run.env)
    assert done.returncode == 0, done.stderr
    assert [p["name"] for p in json.loads(done.stdout)["processes"]][-4:-2] == ["frontend", "proxy"]
    shown.append(done.stdout.encode())
    assert not [key for key in KEYS for text in shown if key.encode() in text]


@pytest.mark.parametrize("stream", [True, False])
def test_tokens_are_not_held_back_and_who_hangs_up_is_heard(run: Closed, stream: bool) -> None:
    eventually(lambda: run.in_flight() == 0, what="quiet")
    connection = run.begin(stream)
    eventually(lambda: run.in_flight() == 1, what="asked")
    if stream:
        answer = connection.getresponse()
        assert answer.status == 200
        for _ in range(3):
            eventually(lambda: answer.readline().startswith(b"data: {"), what="a token")
            eventually(lambda: run.in_flight() == 1, 30.0, what="while the rest is still to come")
        answer.close()
    assert connection.sock is not None
    connection.close()
    eventually(
        lambda: run.in_flight() == 0, what="the frontend heard that the client is gone, of an answer of a minute"
    )


def test_keys_are_exchanged_while_streams_go_on(run: Closed) -> None:
    with contextlib.closing(run.begin(True)) as connection:
        answer = connection.getresponse()
        assert answer.readline().startswith(b"data: {")
        run.write_keys(KEYS[1], LATER)
        eventually(lambda: run.ask("/v1/models", LATER)[0] == 200, what="the new key holds")
        assert run.ask("/v1/models", KEYS[0])[0] == 401 and run.ask("/v1/models", KEYS[1])[0] == 200
        for _ in range(5):  # whoever came in by the old key stays
            eventually(lambda: answer.readline().startswith(b"data: {"), what="a token")
    eventually(lambda: [e for e in run.events("keys") if e["detail"] == "2 keys from now on"])
    # A file that will not do changes nothing, and is told once.
    run.keys.chmod(0o644)
    eventually(lambda: run.events("keys_refused"))
    assert "has mode 0644" in run.events("keys_refused")[-1]["detail"]
    assert run.ask("/v1/models", LATER)[0] == 200
    # A proxy that is started anew has the keys of now.
    killed = run.service("proxy")
    os.kill(int(str(killed["pid"])), signal.SIGKILL)
    eventually(lambda: run.service("proxy")["starts"] == 2 and run.service("proxy")["state"] == "ready")
    assert (run.ask("/v1/models", LATER)[0], run.ask("/v1/models", KEYS[0])[0]) == (200, 401)
    run.write_keys(*KEYS)
    eventually(lambda: run.ask("/v1/models", KEYS[0])[0] == 200)


def test_a_failover_through_proxy_and_https_loses_no_request(run: Closed) -> None:
    run.wait_full()
    url, headers = run.run_file["frontend_url"], {"authorization": f"Bearer {KEYS[1]}"}
    with Load(url, streams=12, unary=6, rate=10, tokens=40, headers=headers, tls=run.context) as load:
        load.wait_busy(0.5)
        done = run.cli("kill-primary")
        assert done.returncode == 0, done.stderr
        eventually(
            lambda: any(e["data"]["connections"] > 0 for e in run.events("released")), what="requests that waited"
        )
        load.wait_busy(1.0)
    assert not load.lost and not load.wrong, load.said()
    run.wait_full()


def test_a_proxy_and_a_frontend_that_are_killed_come_back(run: Closed) -> None:
    before = run.wait_full()
    for name in ("frontend", "proxy"):
        killed = run.service(name)
        os.kill(int(str(killed["pid"])), signal.SIGKILL)
        eventually(lambda: int(str(run.service(name)["starts"])) > int(str(killed["starts"])), what=name)  # noqa: B023
        eventually(lambda: run.service(name)["state"] == "ready", what=name)  # noqa: B023
        eventually(lambda: '"tiny"' in run.ask("/v1/models", KEYS[0])[1], what=f"served again after {name}")
    after = run.wait_full()
    assert (after["primary"], [c["incarnation"] for c in after["cohorts"]]) == (
        before["primary"],
        [c["incarnation"] for c in before["cohorts"]],
    ), "cohorts are not touched"
    # A frontend that is away is told as such, and a proxy is not restarted for it.
    frozen, proxy = int(str(run.service("frontend")["pid"])), run.service("proxy")
    os.kill(frozen, signal.SIGKILL)
    assert run.service("proxy")["pid"] == proxy["pid"]
    eventually(lambda: '"tiny"' in run.ask("/v1/models", KEYS[0])[1])


@pytest.mark.skipif(os.getuid() != 0, reason="becoming another user needs root")
def test_nobody_takes_the_port_of_a_proxy_that_is_started_again(run: Closed) -> None:
    """He would be shown keys and prompts. The agent listens there itself: who comes meanwhile waits for the next."""
    run.wait_full()
    killed = run.service("proxy")
    code = SQUATTER.format(uid=STRANGER, port=run.port)
    stranger = subprocess.Popen([*DROP, "/usr/bin/python3", "-c", code], cwd="/", stdout=subprocess.PIPE, text=True)
    try:
        with ThreadPoolExecutor(1) as pool:
            with stopped(run.agent.pid):  # so that nobody is quicker than he
                os.kill(int(str(killed["pid"])), signal.SIGKILL)
                waits = pool.submit(run.ask, "/v1/models", KEYS[0])
                with pytest.raises(TimeoutError):
                    waits.result(2.0)
            assert waits.result(60.0)[0] == 200, "it was answered by the proxy's next life"
        again = int(str(killed["starts"])) + 1
        eventually(lambda: run.service("proxy")["starts"] == again, what="its next life is told of")
    finally:
        stranger.kill()
        assert stranger.communicate()[0] == "", "he never had it"


def test_after_down_nothing_of_the_way_in_is_left(run: Closed) -> None:
    port, node_dir = run.port, run.node_dir
    pid = int(str(run.service("proxy")["pid"]))
    start = proc.identity(pid)
    done = run.cli("down")
    assert done.returncode == 0, done.stdout + done.stderr
    assert start is not None and not proc.alive(start) and not run.alive()
    assert not node_dir.exists()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((LOOPBACK, port), 1)


def test_https_of_dynamos_own_frontend(tmp_path: Path, model: Path) -> None:
    cert, key = certificates.make(tmp_path / "tls")
    flags = ["--tls-cert", str(cert), "--tls-key", str(key), "--no-nats"]
    with Deployment(tmp_path / "home", model, *flags) as run:
        url = run.status()["frontend_url"]
        assert re.fullmatch(r"https://127\.0\.0\.1:\d+", url)
        context = ssl.create_default_context(cafile=cert)
        context.check_hostname = False
        with Load(url, streams=2, unary=2, tokens=20, tls=context) as load:
            load.wait_busy()
            assert run.cli("kill-primary").returncode == 0
        assert not load.lost and not load.wrong, load.said()
        run.wait_full()
        done = run.cli("switch-over", "--when-idle", "120")
        assert done.returncode == 0, done.stderr
        assert not [s for s in run.status()["nodes"][0]["services"] if s["name"] == "proxy"]
        assert [s["starts"] for s in run.status()["nodes"][0]["services"] if s["name"] == "frontend"] == [1]


def test_what_will_not_do_ends_before_anything_starts(tmp_path: Path, model: Path) -> None:
    cert, key = certificates.make(tmp_path / "tls")
    _, other = certificates.make(tmp_path / "other")
    keys = tmp_path / "keys"
    keys.touch(0o644)
    for flags, said in (
        (["--frontend-host", "0.0.0.0"], "lets everybody in who reaches it"),
        (["--api-key-file", str(keys)], "has mode 0644"),
        (["--tls-cert", str(cert), "--tls-key", str(other)], "belong to different pairs"),
        (["--tls-cert", str(cert)], "needs --tls-key too"),
    ):
        refused = Deployment(tmp_path / "home", model, *flags)
        done = refused.up()
        assert done.returncode == 2 and said in done.stderr, done.stderr
        assert len(done.stderr.strip().splitlines()) == 1 and not (tmp_path / "home").exists() and not refused.alive()
    keys.chmod(0o600)
    keys.write_text(KEYS[0])
    absent = gms_launch(
        *("doctor", "--json", "--engine", "reference", "--model", str(model), "--api-key-file", str(keys)),
        *("--haproxy-bin", str(tmp_path / "none"), "--tls-cert", str(cert), "--tls-key", str(key)),
        env=refused.env,
    )
    checks = {c["check"]: c for c in json.loads(absent.stdout)["checks"]}
    assert absent.returncode == 1 and not checks["proxy"]["ok"] and checks["certificate"]["ok"]
    assert "haproxy_bin" in checks["proxy"]["detail"]
