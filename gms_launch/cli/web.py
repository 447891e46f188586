"""`gms-launch web`: status and timeline as pages, for the one who started it, on this machine's loopback.

Whoever has an account here can connect too, so the address holds a secret, as Jupyter's does; a page of another site
that a browser is made to send here (DNS rebinding) comes with that site's name and is refused. Nothing can be changed.
"""

from __future__ import annotations

import contextlib
import hmac
import secrets
import sys
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from gms_launch.cli import status, timeline, which
from gms_launch.errors import LaunchError, UsageError
from gms_launch.observe import pages
from gms_launch.run.rundir import RunDir
from gms_launch.urls import public

#: A browser asks again after so long, and a page is made no more often (seconds).
REFRESH, FRESH = 3, 1.0
#: How long one may take to say what it wants (seconds), and how many at once.
PATIENCE, MOST = 5.0, 32
#: Names under which loopback is reached, also through `ssh -L`, whatever the port there.
OUR_NAMES = frozenset(("127.0.0.1", "localhost"))
STILL = "?still"


def main(run: str | None, group: str | None, port: int) -> None:
    directory = timeline.directory(run)
    name = which.group(directory.read(), group)
    secret = secrets.token_urlsafe(32)
    try:
        server = Server(port, secret, directory, name)
    except OSError as exc:
        raise UsageError(f"--port {port}: 127.0.0.1 port {port} cannot be listened on: {exc.strerror}") from None
    with server:
        print(f"run {directory.run}{f', group {name}' if name else ''}: {server.url}", flush=True)
        print("Ctrl-C ends it. Whoever has this address can read the pages; nothing can be changed there.", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            server.serve_forever()


class Server(ThreadingHTTPServer):
    """Serves the pages of one run, or of one group of it, below `/<secret>/`, on loopback.

    Raises `OSError` when the port is taken.
    """

    daemon_threads = True
    request_queue_size = 16

    def __init__(self, port: int, secret: str, directory: RunDir, group: str = "") -> None:
        self.secret, self._run, self._group = secret, directory, group
        self._places = threading.BoundedSemaphore(MOST)
        self._making = threading.Lock()
        self._made: dict[str, tuple[float, bytes]] = {}
        super().__init__(("127.0.0.1", port), Handler)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/{self.secret}/"

    def page(self, name: str, still: bool) -> bytes | None:
        """A page; None for one that there is not."""
        makers: dict[str, Callable[[list[tuple[str, str]]], str]] = {
            "": lambda links: status.page(self._run, links, self._group),
            "timeline": lambda links: timeline.page(self._run, False, links, self._group),
            "events": lambda links: timeline.page(self._run, True, links, self._group),
        }
        if name not in makers:
            return None
        way = ("keep it up to date", f"./{name}") if still else ("hold it still", f"./{name}{STILL}")
        links = [("status", "./"), ("timeline", "timeline"), ("events", "events"), way]
        key = name + (STILL if still else "")
        with self._making:
            made, text = self._made.get(key, (0.0, b""))
            if time.monotonic() - made > FRESH or not text:
                try:
                    text = makers[name](links).encode()
                except LaunchError as exc:
                    text = pages.trouble(self._run.run, public(str(exc)), time.time(), links).encode()
                self._made[key] = time.monotonic(), text
        return text

    # A crowd, or somebody who says nothing, costs a bounded number of threads.
    def process_request(self, request: Any, client_address: Any) -> None:
        if self._places.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._places.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """One that went away is nobody's concern; an error of ours is told without what was asked for."""
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            print(f"gms-launch: a page could not be made: {error!r}", file=sys.stderr)


class Handler(BaseHTTPRequestHandler):
    """One request: only GET, only for us, only with the secret."""

    timeout = PATIENCE
    server: Server
    server_version, sys_version = "gms-launch", ""

    def do_GET(self) -> None:
        host = self.headers.get("Host", "").rpartition(":")
        if (host[0] or host[2]) not in OUR_NAMES:
            self._answer(421, "text/plain", b"this is not the server of that name\n")
            return
        path, _, query = self.path.partition("?")
        before, secret, name = path.split("/", 2) if path.count("/") > 1 else ("", "", "")
        # Compared whole, so that how long it takes tells nothing of the secret.
        known = hmac.compare_digest(secret.encode("utf-8", "replace"), self.server.secret.encode()) and not before
        body = self.server.page(name, query == STILL[1:]) if known else None
        if body is None:
            self._answer(
                404, "text/plain", b"there is no such page; the whole address is what `gms-launch web` printed\n"
            )
            return
        self._answer(200, "text/html; charset=utf-8", body, "" if query else str(REFRESH))

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """What is not understood, and every other method than GET."""
        self._answer(405 if code == 501 else code, "text/plain", b"these pages can be read with GET\n")

    def _answer(self, code: int, kind: str, body: bytes, refresh: str = "") -> None:
        self.close_connection = True
        self.send_response(code)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Connection", "close")
        self.send_header("Cache-Control", "no-store")
        self.send_header("Referrer-Policy", "no-referrer")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("Content-Security-Policy", "frame-ancestors 'none'")
        self.send_header("Cross-Origin-Resource-Policy", "same-origin")
        if refresh:
            self.send_header("Refresh", refresh)
        if code == 405:
            self.send_header("Allow", "GET")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: a line would hold the secret."""
