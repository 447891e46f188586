"""An etcd without TLS, for what TLS costs: a run is told of it as of any that is somebody else's (--etcd-endpoints).

Its flags are those of a run's own (services/etcd.py), without certificates and users.
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from bench.bare import free_port


class PlainEtcd:
    """Listens at `url` while the context is open; `popen` starts it, on another machine of a lab say."""

    def __init__(self, data: Path, address: str = "127.0.0.1", popen: Callable[..., Any] = subprocess.Popen) -> None:
        self.url, peer = f"http://{address}:{free_port()}", f"http://127.0.0.1:{free_port()}"
        argv: Sequence[str] = (
            *("etcd", "--name", "plain", "--data-dir", str(data)),
            *("--listen-client-urls", self.url, "--advertise-client-urls", self.url),
            *("--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer, "--initial-cluster", f"plain={peer}"),
            *("--heartbeat-interval", "20", "--election-timeout", "200", "--logger", "zap", "--log-level", "warn"),
        )
        out = subprocess.DEVNULL
        self._process = popen(argv, stdin=out, stdout=out, stderr=out)

    def __enter__(self) -> PlainEtcd:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.wait()
