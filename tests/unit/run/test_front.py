"""Who may come in is said, and not fallen into."""

from __future__ import annotations

from pathlib import Path

import pytest

from gms_launch.engines.base import LOOPBACK
from gms_launch.errors import UsageError
from gms_launch.run import ports
from gms_launch.run.front import Front
from gms_launch.run.nodedir import NodeDir
from gms_launch.run.topology import Topology
from gms_launch.settings.resolve import resolve


def front(monkeypatch: pytest.MonkeyPatch, nnodes: int = 2, **flags: object) -> Front:
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    settings = resolve({"model": "m", "nnodes": str(nnodes), **flags}, {})
    address = "10.0.0.1" if nnodes > 1 else LOOPBACK
    place = Topology(0, nnodes, "node1", address, address)
    return Front(settings, place, ports.layout(settings, lambda _: True), NodeDir(Path("/dev/shm/none")))


def test_it_listens_on_loopback_unless_somebody_is_let_in(monkeypatch: pytest.MonkeyPatch) -> None:
    alone, closed = front(monkeypatch, nnodes=1), front(monkeypatch)
    assert (alone.address, alone.url, alone.hint) == ("127.0.0.1", "http://127.0.0.1:8000", "")
    assert (closed.address, closed.url) == ("127.0.0.1", "http://127.0.0.1:8000")
    assert closed.hint == ", on node1 only; from elsewhere: ssh -L 8000:127.0.0.1:8000 node1"
    opened = front(monkeypatch, open_frontend=True)
    assert (opened.url, opened.hint, opened.proxied) == ("http://10.0.0.1:8000", "", False)
    keyed = front(monkeypatch, api_key_file="/k", tls_cert="/c", tls_key="/k")
    assert (keyed.url, keyed.proxied) == ("https://10.0.0.1:8000", True)
    assert (keyed.where.address, keyed.where.port, keyed.where.tls) == ("127.0.0.1", 8001, False), "behind the proxy"
    alone = front(monkeypatch, tls_cert="/c", tls_key="/k")
    assert (alone.where.port, alone.where.tls, alone.url) == (8000, True, "https://127.0.0.1:8000")


@pytest.mark.parametrize("host", ["0.0.0.0", "10.0.0.1", "::", "::ffff:127.0.0.1", "login", "localhost.evil"])
def test_another_address_is_refused_with_the_ways_out(host: str) -> None:
    with pytest.raises(UsageError, match=r"frontend_host .* lets everybody in") as refused:
        resolve({"model": "m", "frontend_host": host}, {})
    assert all(way in str(refused.value) for way in ("--api-key-file FILE", "ssh -L", "--open-frontend"))
    for way in ({"api_key_file": "/k"}, {"open_frontend": True}):
        assert resolve({"model": "m", "frontend_host": host, **way}, {}).frontend_host == host


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.9", "::1", "localhost"])
def test_loopback_needs_no_word(host: str) -> None:
    assert resolve({"model": "m", "frontend_host": host}, {}).frontend_host == host


def test_what_contradicts_itself() -> None:
    with pytest.raises(UsageError, match="leave one out"):
        resolve({"model": "m", "api_key_file": "/k", "open_frontend": True}, {})
    with pytest.raises(UsageError, match=r"tls_cert \(from --tls-cert\) needs --tls-key too"):
        resolve({"model": "m", "tls_cert": "/c"}, {})
    with pytest.raises(UsageError, match=r"tls_key \(from GMS_LAUNCH_TLS_KEY\) needs --tls-cert too"):
        resolve({"model": "m"}, {"GMS_LAUNCH_TLS_KEY": "/c"})
