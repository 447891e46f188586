"""What a stranger on the nodes' network meets: which ports are open to him, and what he reads on the way."""

from __future__ import annotations

import contextlib
import http.client
import json
import select
import socket
import ssl
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

from tests import certificates, listening
from tests.listening import Row
from tests.slurm.lab import Lab
from tests.slurm.support import LabRun
from tests.support import eventually

KEY = "a-key-that-nobody-else-may-read-5f3a9c"
PROMPT = "a prompt that nobody on the way may read"
ETH_P_ALL = 3


class Guarded(LabRun):
    """A run as it is by default but for what clients are told: no `--open-frontend` is said for the tests' sake."""

    closed = True


class Sniffer:
    """Everything that crosses the bridge, by a raw socket on each of its ports, as it comes."""

    def __init__(self, lab: Lab) -> None:
        self._sockets = []
        for node in lab.nodes.values():
            raw = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_ALL))
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 64 * 1024 * 1024)
            raw.bind((node.veth, 0))
            self._sockets.append(raw)
        self.data: dict[tuple[bytes, bytes], bytearray] = {}
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._read)
        self._thread.start()

    def _read(self) -> None:
        while not self._over.is_set():
            for raw in select.select(self._sockets, [], [], 0.2)[0]:
                frame = raw.recv(1 << 17)
                if frame[12:14] == b"\x08\x00":
                    size, protocol = (frame[14] & 15) * 4, frame[23]
                    body = frame[14 + size :]
                    skip = (body[12] >> 4) * 4 if protocol == 6 else 8
                    # One way of one connection, so that what is cut into packets is found all the same.
                    self.data.setdefault((frame[26:34], body[:4]), bytearray()).extend(body[skip:])

    def close(self) -> None:
        self._over.set()
        self._thread.join()
        for raw in self._sockets:
            raw.close()

    def has(self, secret: bytes) -> bool:
        return any(secret in stream for stream in list(self.data.values()))

    def bytes_of(self, port: int) -> int:
        wanted = port.to_bytes(2, "big")
        return sum(len(s) for (_, ports), s in list(self.data.items()) if wanted in (ports[:2], ports[2:]))


@contextlib.contextmanager
def sniffing(lab: Lab) -> Iterator[Sniffer]:
    sniffer = Sniffer(lab)
    try:
        yield sniffer
    finally:
        sniffer.close()


def secrets_of(run: LabRun) -> dict[str, bytes]:
    """All that the run's credentials hold, each text in the form in which it would be sent."""
    found: dict[str, bytes] = {}

    def walk(name: str, value: object) -> None:
        if isinstance(value, dict):
            for key, inner in value.items():
                walk(f"{name}/{key}", inner)
        elif isinstance(value, str) and "PRIVATE KEY" in value:
            found[name] = "".join(value.splitlines()[1:-1])[:48].encode()
        elif isinstance(value, str) and "CERTIFICATE" not in value and len(value) >= 12:
            found[name] = value.encode()

    walk("", json.loads((run.home / "credentials.json").read_text()))
    return found


def test_no_password_token_key_or_prompt_is_in_clear_on_the_network(lab: Lab, model: Path, tmp_path: Path) -> None:
    """Over the start, requests and a failover, with keys and HTTPS for clients; the sniffer is shown to see."""
    keys = tmp_path / "keys"
    keys.touch(0o600)
    keys.write_text(f"{KEY}\n")
    cert, key = certificates.make(tmp_path / "tls")
    flags = ["--api-key-file", str(keys), "--tls-cert", str(cert), "--tls-key", str(key)]
    with sniffing(lab) as sniffer, Guarded(lab, model, *flags) as run:
        ports, url = run.run_file()["ports"], run.run_file()["frontend_url"]
        assert url.startswith("https://")
        host = url.removeprefix("https://").rpartition(":")[0]

        def ask() -> str:
            context = ssl.create_default_context(cafile=cert)
            context.check_hostname = False
            with contextlib.closing(
                http.client.HTTPSConnection(host, ports["frontend"], timeout=30, context=context)
            ) as connection:
                body = {"model": "tiny", "prompt": PROMPT, "max_tokens": 12, "temperature": 0}
                headers = {"authorization": f"Bearer {KEY}", "content-type": "application/json"}
                connection.request("POST", "/v1/completions", json.dumps(body), headers)
                answer = connection.getresponse()
                text = answer.read().decode()
                assert answer.status == 200, text
                return str(json.loads(text)["choices"][0]["text"])

        before = ask()
        victim = run.kill_rank(run.status()["primary"], 1)
        run.wait_dead(*victim)
        run.wait_full()
        assert ask() == before

        told = "a-word-that-everybody-may-read"
        code = f"import socket; socket.socket(type=socket.SOCK_DGRAM).sendto({told.encode()!r}, ({host!r}, 9))"
        assert lab.node("node2").run([sys.executable, "-c", code]).returncode == 0
        eventually(lambda: sniffer.has(told.encode()), what="what is in clear is seen")
        assert sniffer.bytes_of(ports["frontend"]) > 500, "the clients' way was looked at"
        assert sniffer.bytes_of(ports["etcd"]) > 10_000, "and etcd's"
        assert any(sniffer.bytes_of(ports["master_base"] + 100 * c) for c in (0, 1)), "and the ranks'"
        secrets = secrets_of(run)
        assert len(secrets) >= 5, list(secrets)
        assert [name for name, secret in secrets.items() if sniffer.has(secret)] == []
        assert not sniffer.has(KEY.encode()), "no key of a client's"
        assert not any(sniffer.has(line.encode()) for line in key.read_text().splitlines()[1:-1])
        assert not sniffer.has(b"nobody on the way"), "no prompt"
        assert not sniffer.has(before[:24].encode()), "and no answer"
        for value in (b"/gms-launch/", b"incarnation", b"agent_pid"):
            assert not sniffer.has(value), "no key or value of etcd's"


def test_three_nodes_listen_on_what_the_page_says_and_a_scan_finds_no_more(bare_lab: Lab, model: Path) -> None:
    """Nodes with nothing else on them, so that every port that a scan from another machine finds is the run's."""
    run = Guarded(bare_lab, model).hand()
    seen: set[Row] = set()
    over = threading.Event()

    def watch() -> None:
        while not over.wait(0.2):
            if (run.home / "run.json").exists() and (ports := run.run_file().get("ports")):
                seen.update(listening.of_run(run.run, ports)[0])

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        with run:
            ports = run.run_file()["ports"]

            def told() -> str:
                return str(listening.of_run(run.run, ports))

            eventually(lambda: listening.of_run(run.run, ports)[0] == listening.documented(3), what=told)
            victim = run.kill_rank(run.status()["primary"], 2)
            run.wait_dead(*victim)
            run.wait_full()
            eventually(lambda: listening.of_run(run.run, ports)[0] == listening.documented(3), what=told)
            sockets = listening.of_run(run.run, ports)[1]
            for node in bare_lab.nodes.values():
                here = {s.port for s in sockets if s.kind == "tcp" and s.address == node.address}
                assert scan(node.address) == here, f"from another machine, of {node.name}"
    finally:
        over.set()
        watcher.join()
    assert seen == listening.documented(3), "nor did it in between"


def scan(address: str) -> set[int]:
    """The TCP ports that take a connection there, of all that there are."""
    found = set()
    for port in range(1, 65536):
        with socket.socket() as one:
            one.settimeout(5.0)
            if one.connect_ex((address, port)) == 0:
                found.add(port)
    return found
