"""What tests share: free ports, etcd, the command line, a way to wait for something with a deadline."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from gms_launch.control.access import Access
from gms_launch.process import lifecycle, proc
from gms_launch.run.rundir import RunDir

T = TypeVar("T")
GMS_LAUNCH = [sys.executable, "-m", "gms_launch"]


def free_port() -> int:
    """A port below the ephemeral range: outgoing connections cannot take it, and Dynamo reads it as 16 bits, signed."""
    while True:
        port = random.randrange(12000, 31000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def eventually(look: Callable[[], T], timeout: float = 20.0, what: str = "") -> T:
    """Call `look` until its result is true, and return that."""
    deadline = time.monotonic() + timeout
    while True:
        found = look()
        if found:
            return found
        assert time.monotonic() < deadline, f"not within {timeout:g} s: {what or look}"
        time.sleep(0.01)


class EtcdServer:
    """A real etcd that can be killed, frozen, wiped and started again on the same ports."""

    def __init__(self, directory: Path, *extra: str, scheme: str = "http") -> None:
        self.directory = directory
        self.data = directory / "data"
        self.port, self.peer_port = free_port(), free_port()
        self.url = f"{scheme}://127.0.0.1:{self.port}"
        self._extra = extra
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> EtcdServer:
        peer = f"http://127.0.0.1:{self.peer_port}"
        argv = ["etcd", "--name", "t", "--data-dir", str(self.data), "--listen-client-urls", self.url]
        argv += ["--advertise-client-urls", self.url, "--listen-peer-urls", peer]
        argv += ["--initial-advertise-peer-urls", peer, "--initial-cluster", f"t={peer}", "--logger", "zap"]
        argv += ["--heartbeat-interval", "20", "--election-timeout", "200", "--bcrypt-cost", "4", *self._extra]
        with open(self.directory / "etcd.log", "ab") as log:
            self._process = subprocess.Popen(
                argv, stdout=log, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True
            )
        return self

    def send(self, sig: int) -> None:
        assert self._process is not None
        self._process.send_signal(sig)

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None


def etcdctl(access: Access, *args: str) -> subprocess.CompletedProcess[str]:
    """etcd's own client, with what `access` has to show."""
    env = os.environ | {"ETCDCTL_API": "3"}
    flags = ["--endpoints", ",".join(access.endpoints), "--dial-timeout", "2s", "--command-timeout", "5s"]
    with tempfile.TemporaryDirectory() as name:
        for flag, text in (("cacert", access.ca), ("cert", access.cert), ("key", access.key)):
            if text:
                (Path(name) / flag).write_text(text)
                flags += [f"--{flag}", f"{name}/{flag}"]
        return subprocess.run(["etcdctl", *flags, *args], env=env, capture_output=True, text=True, check=False)


def gms_launch(
    *args: str, env: dict[str, str], timeout: float = 90.0, within: Sequence[str] = ()
) -> subprocess.CompletedProcess[str]:
    """Run the command line, `within` something else, and collect what it says."""
    return subprocess.run(
        [*within, *GMS_LAUNCH, *args], env=env, capture_output=True, text=True, timeout=timeout, check=False
    )


def complete(host: str, port: int, prompt: str, tokens: int, timeout: float = 10.0, model: str = "tiny") -> str | None:
    """The completion of `prompt`; None for anything but a whole 200 in time: a server may die while it answers."""
    connection = http.client.HTTPConnection(host, port, timeout=timeout)
    try:
        body = json.dumps({"model": model, "prompt": prompt, "max_tokens": tokens, "temperature": 0})
        connection.request("POST", "/v1/completions", body, {"content-type": "application/json"})
        answer = connection.getresponse()
        data = answer.read()
        return str(json.loads(data)["choices"][0]["text"]) if answer.status == 200 else None
    except (OSError, http.client.HTTPException, ValueError):
        return None
    finally:
        connection.close()


class Deployment:
    """One run, started by `up -d` and always ended. `extra` are more flags of `up`."""

    def __init__(self, home: Path, model: Path, *extra: str, **environ: str) -> None:
        self.run = "t" + uuid.uuid4().hex[:8]
        self.home = home
        self.extra = extra
        self.model = model
        self.env = {k: v for k, v in os.environ.items() if not k.startswith(("GMS_LAUNCH_", "SLURM_", "COLUMNS"))}
        self.env |= {"GMS_LAUNCH_HOME": str(home), **environ}

    @property
    def flags(self) -> list[str]:
        own = ["--run-id", self.run, "--engine", "reference", "--model", str(self.model), "--served-model-name", "tiny"]
        return [*own, *self.extra]

    def up(self) -> subprocess.CompletedProcess[str]:
        return gms_launch("up", "-d", *self.flags, env=self.env)

    def __enter__(self) -> Deployment:
        done = self.up()
        if done.returncode != 0:
            self.__exit__()
            raise AssertionError(f"up -d failed with {done.returncode}:\n{done.stdout}{done.stderr}")
        return self

    def __exit__(self, *_: object) -> None:
        gms_launch("down", "--run", self.run, env=self.env)
        assert lifecycle.kill_tagged(self.run, 10.0) == []

    def cli(self, verb: str, *args: str) -> subprocess.CompletedProcess[str]:
        return gms_launch(verb, "--run", self.run, *args, env=self.env)

    def status(self) -> dict[str, Any]:
        done = self.cli("status", "--json")
        assert done.returncode == 0, done.stderr
        found: dict[str, Any] = json.loads(done.stdout)
        return found

    def wait_full(self, timeout: float = 40.0) -> dict[str, Any]:
        """Wait until every shadow is parked."""
        found: dict[str, Any] = {}

        def full() -> bool:
            nonlocal found
            found = self.status()
            return found["redundancy"] == "full"

        eventually(full, timeout, "redundancy full")
        return found

    def cohort(self, cohort_id: int) -> dict[str, Any]:
        found: dict[str, Any] = self.status()["cohorts"][cohort_id]
        return found

    @property
    def run_file(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.home / self.run / "run.json").read_text())
        return found

    @property
    def node_dir(self) -> Path:
        return Path(self.run_file["node_dir"])

    @property
    def agent(self) -> proc.ProcessId:
        run = self.run_file
        return proc.ProcessId(run["agent_pid"], run["agent_start"])

    @property
    def access(self) -> Access:
        """The run's etcd, as its agents reach it."""
        return RunDir(self.home / self.run).credentials().access(tuple(self.run_file["etcd_endpoints"]))

    def etcdctl(self, *args: str) -> str:
        """Ask the run's etcd, as its agents may."""
        done = etcdctl(self.access, *args)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def alive(self) -> list[int]:
        return [info.pid for info, _ in proc.tagged(self.run)]

    def text(self, prompt: str = "hello", tokens: int = 8, timeout: float = 10.0) -> str | None:
        """The completion of `prompt`; None when nobody answers in time."""
        host, port = self.run_file["frontend_url"].removeprefix("http://").split(":")
        return complete(host, int(port), prompt, tokens, timeout)

    def events(self, kind: str | None = None) -> list[dict[str, Any]]:
        lines = (self.home / self.run / "events.jsonl").read_text().splitlines()
        found = [json.loads(line) for line in lines]
        return [e for e in found if kind is None or e["kind"] == kind]


@contextlib.contextmanager
def stopped(pid: int) -> Iterator[None]:
    """Freeze a process for a while."""
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)
