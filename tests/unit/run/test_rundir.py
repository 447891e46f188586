"""Which run is meant when nobody says."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import ssl
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from gms_launch.control.authority import Authority
from gms_launch.errors import NoContactError, RefusedError, UsageError
from gms_launch.process import proc
from gms_launch.run import contact
from gms_launch.run.rundir import RunDir, RunFile, find


@contextlib.contextmanager
def etcd_of(authority: Authority) -> Iterator[int]:
    """Something that listens with a certificate of that authority, as an etcd does; gives its port."""
    leaf = authority.leaf("etcd", ("127.0.0.1",), server=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    with tempfile.TemporaryDirectory() as name:
        (Path(name) / "pem").write_text(leaf.cert + leaf.key)
        context.load_cert_chain(Path(name) / "pem")
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            with contextlib.suppress(OSError):
                while True:
                    connection, _ = server.accept()
                    with contextlib.suppress(OSError), context.wrap_socket(connection, server_side=True) as secure:
                        secure.recv(1)

        threading.Thread(target=serve, daemon=True).start()
        try:
            yield server.getsockname()[1]
        finally:
            server.shutdown(socket.SHUT_RDWR)


def recorded(name: str, port: int, authority: Authority) -> None:
    """A run as its leader on another machine last wrote it down: up."""
    directory = RunDir.of(name)
    directory.path.mkdir(parents=True)
    endpoints = (f"https://127.0.0.1:{port}",)
    run = RunFile(name, "1", time.time(), "elsewhere", "boot", 1, 1, "/nowhere", endpoints, etcd_ca=authority.cert)
    directory.write(run)


def test_a_run_whose_agents_were_killed_does_not_stand_beside_the_one_that_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GMS_LAUNCH_HOME", str(tmp_path))
    for name in ("GMS_LAUNCH_RUN", "GMS_LAUNCH_RUN_ID", "SLURM_JOB_ID"):
        monkeypatch.delenv(name, raising=False)
    mine, others = Authority.create(), Authority.create()
    with socket.socket() as gone, etcd_of(mine) as port:
        gone.bind(("127.0.0.1", 0))  # bound and not listening: refused
        recorded("killed", gone.getsockname()[1], others)
        recorded("serving", port, mine)
        assert find(None)[0].run == "serving"
        recorded("replaced", port, others)  # it had this port before, and is gone
        assert find(None)[0].run == "serving"
        recorded("another", port, mine)
        with pytest.raises(UsageError, match="another"):
            find(None)
    # None answers: all are named, for none is known to be the one that is meant.
    with pytest.raises(UsageError, match="killed"):
        find(None)


def test_a_node_that_others_go_on_without_is_told_why_they_cannot_take_it_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One member of three answers, and the agent of this very node is dead: that is not a run that is up here."""
    monkeypatch.setenv("GMS_LAUNCH_HOME", str(tmp_path))
    authority, own = Authority.create(), proc.identity(os.getpid())
    assert own is not None
    with etcd_of(authority) as port:
        directory = RunDir.of("r")
        directory.path.mkdir()
        where = tuple(f"https://127.0.0.1:{p}" for p in (port, 1, 2))
        first = (socket.gethostname(), proc.boot_id(), own.pid, own.start)
        run = RunFile("r", "1", time.time(), *first, "/nowhere", where, etcd_ca=authority.cert, settings={"groups": 2})
        run = replace(run, pid_namespace=proc.namespace())
        directory.write(run)
        with pytest.raises(RefusedError, match="already up"):
            directory.refuse_live()
        directory.write(replace(run, agent_start=own.start + 1))  # that process has ended
        with pytest.raises(RefusedError, match="up on other nodes, and too few members of its etcd answer"):
            directory.refuse_live()


def test_a_run_of_an_older_version_is_said_to_be_that(tmp_path: Path) -> None:
    directory = RunDir(tmp_path)
    secrets = {"admin_password": "p", "dynamo_user": "dynamo", "dynamo_password": "p", "nats_user": "n"}
    directory.credentials_json.write_text(json.dumps(secrets))
    endpoints = ("http://127.0.0.1:2379",)
    run = RunFile("old", "0.0.9", time.time(), "elsewhere", "boot", 1, 1, "/nowhere", endpoints, etcd_auth=True)
    with pytest.raises(NoContactError, match=r"was started by gms-launch 0\.0\.9.*use that version"):
        contact.door(directory, run)
