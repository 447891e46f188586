"""The stack without the launcher: what a failover costs when nobody supervises it.

etcd, a GMS server, the frontend and two reference engines, started by hand as the recipe does, and a kill of the
primary's whole process group. What remains is lock hand-over, wake and registration: the floor.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from gms_launch.control.access import Access
from gms_launch.control.door import Door
from gms_launch.gms import gpus
from tests import support
from tests.support import free_port


def complete(port: int, model: str, prompt: str = "hello", tokens: int = 1, timeout: float = 5.0) -> str | None:
    """The completion's text, or None for anything but a 200."""
    return support.complete("127.0.0.1", port, prompt, tokens, timeout, model)


def wait_for_text(port: int, model: str, timeout: float, pause: float = 0.002) -> tuple[float, int]:
    """Ask for one token until it comes; returns when (perf_counter) and how many requests failed before."""
    deadline = time.perf_counter() + timeout
    failed = 0
    while time.perf_counter() < deadline:
        if complete(port, model):
            return time.perf_counter(), failed
        failed += 1
        time.sleep(pause)
    raise TimeoutError(f"no completion within {timeout:g} s")


class BareStack:
    """Use as a context manager. `model` is a model directory, `memory` whose GMS owns: host or cuda.

    `cold_start` is the time from the first engine's start to its first token (seconds), the weights read from disk.
    """

    def __init__(self, model: Path, memory: str = "host", ready: float = 60.0) -> None:
        self.model, self.memory, self._ready = model, memory, ready
        self.cold_start = 0.0
        self.used: dict[str, int] = {}
        self.port = free_port()
        self.directory = Path(tempfile.mkdtemp(prefix=f"bare-{os.getpid()}-", dir="/dev/shm"))
        self._processes: list[subprocess.Popen[bytes]] = []
        self._lives = 0
        self._etcd_port = free_port()

    def __enter__(self) -> BareStack:
        try:
            self._start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for process in reversed(self._processes):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        subprocess.run(["rm", "-rf", str(self.directory)], check=False)

    def _spawn(self, name: str, argv: list[str], **env: str) -> subprocess.Popen[bytes]:
        with open(self.directory / f"{name}.log", "ab") as log:
            process = subprocess.Popen(
                argv, env=os.environ | env, stdout=log, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True
            )
        self._processes.append(process)
        return process

    def _env(self) -> dict[str, str]:
        env = {"ETCD_ENDPOINTS": f"http://127.0.0.1:{self._etcd_port}", "GMS_SOCKET_DIR": str(self.directory)}
        return env | {
            "REFERENCE_DEVICE": self.memory,
            "DYN_TCP_RESPONSE_STREAM_HOST": "lo",
            "DYN_TCP_RPC_HOST": "127.0.0.1",
        }

    def _start(self) -> None:
        url, peer = f"http://127.0.0.1:{self._etcd_port}", f"http://127.0.0.1:{free_port()}"
        self._spawn(
            "etcd",
            [
                *("etcd", "--name", "n", "--data-dir", str(self.directory / "etcd"), "--listen-client-urls", url),
                *("--advertise-client-urls", url, "--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer),
                *("--initial-cluster", f"n={peer}"),
            ],
        )
        gms = [sys.executable, "-m", "gms_launch.gms", "--device", "0", "--memory", self.memory]
        self._spawn("gms", gms, **self._env())
        frontend = [sys.executable, "-m", "dynamo.frontend", "--http-host", "127.0.0.1", "--http-port", str(self.port)]
        self._spawn("frontend", frontend, **self._env())
        if self.memory == "cuda":
            self.used["before"] = gpu_used()
        begun = time.perf_counter()
        self.primary = self.engine(0)
        first, _ = wait_for_text(self.port, str(self.model), self._ready, 0.02)
        self.cold_start = first - begun
        if self.memory == "cuda":
            self.used["primary_serving"] = gpu_used()
        self.shadow = self.engine(1)
        self.wait_parked(self.shadow)
        if self.memory == "cuda":
            self.used["and_shadow_parked"] = gpu_used()

    def engine(self, engine_id: int) -> tuple[int, subprocess.Popen[bytes], Path]:
        """Start an engine; returns its id, process and log."""
        self._lives += 1
        name = f"engine-{engine_id}-{self._lives}"
        env = self._env() | {
            "ENGINE_ID": str(engine_id),
            "DYN_VLLM_GMS_SHADOW_MODE": "true",
            "FAILOVER_LOCK_PATH": str(self.directory / "failover.lock"),
            "DYN_SYSTEM_PORT": str(free_port()),
            "DYN_SYSTEM_HOST": "127.0.0.1",
            "DYN_SYSTEM_STARTING_HEALTH_STATUS": "notready",
        }
        argv = [
            sys.executable,
            "-m",
            "gms_launch.engines.reference",
            "--model",
            str(self.model),
            "--load-format",
            "gms",
        ]
        argv += ["--master-port", str(free_port())]
        return engine_id, self._spawn(name, argv, **env), self.directory / f"{name}.log"

    def wait_parked(self, engine: tuple[int, subprocess.Popen[bytes], Path]) -> None:
        deadline = time.monotonic() + self._ready
        while "waiting for lock" not in engine[2].read_text():
            if engine[1].poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"the shadow did not park:\n{engine[2].read_text()[-2000:]}")
            time.sleep(0.02)

    def failover(self) -> float:
        """Kill the primary's group; returns seconds from the kill to the first text from the shadow. Re-arms."""
        dead_id, process, _ = self.primary
        begun = time.perf_counter()
        os.killpg(process.pid, signal.SIGKILL)
        first, _ = wait_for_text(self.port, str(self.model), 60)
        process.wait()
        self._revoke_dead()
        self.primary = self.shadow
        self.shadow = self.engine(dead_id)
        self.wait_parked(self.shadow)
        return first - begun

    def _revoke_dead(self) -> None:
        """Forget instances nobody listens for any more, as an operator would with etcdctl."""
        url = self._env()["ETCD_ENDPOINTS"]
        door = Door(Access((url,)))
        found = door.get_prefix("v1/instances/dynamo/backend/generate/")
        for key, value in found.items():
            host, port = json.loads(value)["transport"]["tcp"].split("/")[0].rsplit(":", 1)
            with socket.socket() as probe:
                if probe.connect_ex((host, int(port))) == 0:
                    continue
            door.revoke(int(key.rpartition("/")[2], 16))
        door.close()


def gpu_used() -> int:
    """Bytes in use on the first GPU, by NVML."""
    return gpus.look()[0].used
