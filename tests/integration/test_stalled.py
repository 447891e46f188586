"""HAProxy, as it is configured before the frontend: who says nothing is ended, and who waits for an answer is not."""

from __future__ import annotations

import hashlib
import http.client
import http.server
import socket
import ssl
import threading
import time
from pathlib import Path

from gms_launch.engines.base import LOOPBACK
from gms_launch.services import proxy
from gms_launch.services.frontend import Where
from tests import certificates
from tests.integration.test_etcd_proxy import begin
from tests.support import eventually, free_port

KEY = "a-key-0123456789"
LATE = 3.0


class Late(http.server.BaseHTTPRequestHandler):
    """Answers late, and stands still in the middle."""

    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["content-length"]))
        time.sleep(LATE)
        self.send_response(200)
        self.send_header("content-length", "4")
        self.end_headers()
        self.wfile.write(b"on")
        time.sleep(LATE)
        self.wfile.write(b"ce")

    def log_message(self, *_: object) -> None:
        pass


def test_a_handshake_that_stands_still_is_ended_and_an_answer_that_does_is_not(tmp_path: Path) -> None:
    cert, key = certificates.make(tmp_path / "tls")
    server = http.server.ThreadingHTTPServer((LOOPBACK, 0), Late)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    inner, port = Where(LOOPBACK, server.server_address[1]), free_port()
    made = proxy.Proxy(LOOPBACK, port, True, inner, Where(LOOPBACK, port, True), tmp_path)
    proxy.configure(made, (hashlib.sha256(KEY.encode()).hexdigest().upper(),), cert.read_text() + key.read_text())
    text = made.config.read_text()
    assert "timeout client 5m\n" in text
    made.config.write_text(text.replace("timeout client 5m\n", "timeout client 1s\n"))
    listens, process = begin(proxy.service(made, "/usr/sbin/haproxy", 60.0))
    context = ssl.create_default_context(cafile=cert)
    context.check_hostname = False

    def answers() -> http.client.HTTPSConnection | None:
        client = http.client.HTTPSConnection(LOOPBACK, port, timeout=60, context=context)
        try:
            client.request("POST", "/v1/completions", "{}", {"authorization": f"Bearer {KEY}"})
        except OSError:  # a busy machine may be too slow with the handshake for so short a time
            client.close()
            return None
        return client

    try:
        waits = eventually(answers, what="it is up")
        stands = socket.create_connection((LOOPBACK, port), 60)
        assert stands.recv(1) == b"", "ended"
        stands.close()
        assert waits.getresponse().read() == b"once"
        waits.close()
    finally:
        process.kill()
        process.wait()
        listens.close()
        server.shutdown()
        server.server_close()
