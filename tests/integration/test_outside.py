"""An etcd and a NATS of the user's own that speak TLS."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from gms_launch.control.access import Access
from gms_launch.control.authority import Authority
from gms_launch.run import outside
from gms_launch.services.base import NotReadyError
from gms_launch.settings.resolve import resolve
from tests.support import Deployment, EtcdServer, NatsServer, etcdctl, eventually


class Files:
    """An authority of the user's own, and certificates of it, as files."""

    def __init__(self, directory: Path) -> None:
        self.authority = Authority.create()
        server = self.authority.leaf("server", ["127.0.0.1"], server=True, client=True)
        client = self.authority.leaf("me", client=True)
        texts = {"ca": self.authority.cert, "server.crt": server.cert, "server.key": server.key}
        self.client = client
        for name, text in (texts | {"me.crt": client.cert, "me.key": client.key}).items():
            (directory / name).write_text(text)
        self.ca, self.cert, self.key = (directory / name for name in ("ca", "me.crt", "me.key"))
        self.server_cert, self.server_key = directory / "server.crt", directory / "server.key"


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return Files(tmp_path)


@pytest.fixture(params=["mutual", pytest.param("system", marks=pytest.mark.slow)])
def etcd(request: pytest.FixtureRequest, files: Files, fast_dir: Path) -> Iterator[EtcdServer]:
    """One that asks for a certificate, or shows its own only."""
    flags = ["--cert-file", str(files.server_cert), "--key-file", str(files.server_key)]
    if request.param == "mutual":
        flags += ["--client-cert-auth", "--trusted-ca-file", str(files.ca)]
    server = EtcdServer(fast_dir, *flags, scheme="https").start()
    server.mutual = request.param == "mutual"  # type: ignore[attr-defined]
    try:
        yield server
    finally:
        server.kill()


def test_a_run_on_an_etcd_of_the_users_own_by_tls(etcd: EtcdServer, files: Files, tmp_path: Path, model: Path) -> None:
    mutual = etcd.mutual  # type: ignore[attr-defined]
    mine = Access((etcd.url,), files.authority.cert, *((files.client.cert, files.client.key) if mutual else ("", "")))
    eventually(lambda: etcdctl(mine, "get", "x").returncode == 0)
    assert not mutual or etcdctl(Access((etcd.url,), mine.ca), "get", "x").returncode, "nobody comes in without"
    flags = [f"--etcd-endpoints={etcd.url}"]
    environ = {} if mutual else {"SSL_CERT_FILE": str(files.ca)}  # as the system's
    if mutual:
        flags += [f"--etcd-ca={files.ca}", f"--etcd-cert={files.cert}", f"--etcd-key={files.key}"]
    run = Deployment(tmp_path / "home", model, "--no-nats", *flags, **environ)
    doctor = run.cli("doctor", *run.flags)
    assert f"{etcd.url} answers" in doctor.stdout, doctor.stdout + doctor.stderr
    with run:
        before = run.wait_full() and run.text()
        assert before
        assert "etcd" not in [s["name"] for s in run.status()["nodes"][0]["services"]]
        assert "/gms-launch/" in etcdctl(mine, "get", "--prefix", "--keys-only", "/gms-launch/").stdout
        assert "v1/instances" in etcdctl(mine, "get", "--prefix", "--keys-only", "v1/").stdout
        plan = run.cli("plan", "--json", *run.flags).stdout
        assert run.cli("kill-primary").returncode == 0
        assert eventually(run.text) == before
        assert run.cli("down").returncode == 0
    env = next(p["env"] for p in json.loads(plan)["processes"] if p["name"] == "frontend")
    assert env["ETCD_ENDPOINTS"] == etcd.url and env["ETCD_AUTH_CLIENT_KEY"] == "<hidden>" and "PRIVATE" not in plan


@pytest.mark.parametrize("etcd", ["system"], indirect=True)
def test_an_etcd_whose_authority_nobody_knows_is_refused(
    etcd: EtcdServer, files: Files, tmp_path: Path, model: Path
) -> None:
    eventually(lambda: etcdctl(Access((etcd.url,), files.authority.cert), "get", "x").returncode == 0)
    run = Deployment(tmp_path / "home", model, "--no-nats", f"--etcd-endpoints={etcd.url}")
    done = run.up()
    assert done.returncode == 5 and "name it with --etcd-ca" in done.stderr, done.stderr
    doctor = run.cli("doctor", *run.flags)
    assert "FAIL  etcd" in doctor.stdout and "--etcd-ca" in doctor.stdout
    assert not (run.home / run.run).exists()


def test_tls_to_nats_is_asked_for_and_refused_before_dynamo_can(
    files: Files, tmp_path: Path, fast_dir: Path, model: Path
) -> None:
    names = {"cert_file": files.server_cert, "key_file": files.server_key, "ca_file": files.ca}
    tls = f"tls {{ {', '.join(f'{k}: {json.dumps(str(v))}' for k, v in names.items())}, verify: true }}"
    with NatsServer(fast_dir, tls, scheme="tls") as nats:
        mine = {"nats_ca": str(files.ca), "nats_cert": str(files.cert), "nats_key": str(files.key)}
        settings = resolve({"nats_server": nats.url, **mine}, {})
        said = eventually(lambda: _asked(settings))
        assert said == f"tls://127.0.0.1:{nats.port} answers and knows the login"
        with pytest.raises(NotReadyError):
            outside.ask_nats(resolve({"nats_server": nats.url, "nats_ca": mine["nats_ca"]}, {}))
        flags = [f"--{name.replace('_', '-')}={path}" for name, path in mine.items()]
        run = Deployment(tmp_path / "home", model, *flags, NATS_SERVER=nats.url)
        done = run.up()
    assert done.returncode == 2 and "speaks no TLS to NATS; 1.5 is the first" in done.stderr
    assert done.stderr.count("\n") == 1 and nats.password not in done.stderr


def _asked(settings: object) -> str:
    try:
        return outside.ask_nats(settings)  # type: ignore[arg-type]
    except NotReadyError:
        return ""
