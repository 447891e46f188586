"""What tests share: free ports, etcd, the command line, a way to wait for something with a deadline.

Deadlines here are there to end a test that hangs. They are long, since the machine may be busy with other things; what
a test shows, it shows by what came in which order.
"""

from __future__ import annotations

import atexit
import contextlib
import http.client
import json
import os
import random
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

from gms_launch.control.access import Access
from gms_launch.errors import LaunchError
from gms_launch.observe import look
from gms_launch.process import lifecycle, proc
from gms_launch.run import contact, nodedir
from gms_launch.run.ports import Reservation
from gms_launch.run.rundir import RunDir

T = TypeVar("T")
GMS_LAUNCH = [sys.executable, "-m", "gms_launch"]
#: Seconds after which something that a test waits for is taken not to come.
PATIENCE = 60.0
#: Seconds for a start, a failover with its re-arm, or a command: these are many processes one after another.
LONG = 300.0


def free_port() -> int:
    """A port that nobody else gets as long as this process lives, who asks it again neither.

    Below the ephemeral range, so that outgoing connections cannot take it and Dynamo can read it as 16 bits, signed;
    and in none of the ranges in which gms-launch looks for ports of its own.
    """
    while True:
        port = random.randrange(12000, 20000)
        if port not in _GIVEN and _reserved().free(port):
            _GIVEN.add(port)
            return port


#: The ports that this process has given away. What is reserved is free for who has reserved it, once more too.
_GIVEN: set[int] = set()


def _reserved(made: list[Reservation] = []) -> Reservation:  # noqa: B006 - one for this process
    if not made:
        made.append(Reservation("127.0.0.1", name="gms-launch-tests"))
        atexit.register(made[0].close)
    return made[0]


def _stopped(thread: Path) -> bool:
    try:
        return (thread / "stat").read_text().rpartition(")")[2].split()[0] in ("T", "Z")
    except (FileNotFoundError, ProcessLookupError):
        return True  # it has ended


def eventually(look: Callable[[], T], timeout: float = PATIENCE, what: str | Callable[[], str] = "") -> T:
    """Call `look` until its result is true, and return that. `what` is missed when it does not become so."""
    deadline = time.monotonic() + timeout
    while True:
        begun = time.monotonic()
        found = look()
        if found:
            return found
        now = time.monotonic()
        assert now < deadline, f"not within {timeout:g} s: {what() if callable(what) else what or look}"
        # A look that is a process of its own takes time from what it waits for: not one after another without a pause.
        time.sleep(min(0.2, max(0.01, 0.5 * (now - begun))))


def kill(pid: int, sig: int = signal.SIGKILL) -> None:
    """Signal a process of ours that may have ended by now, where the test does not care by whom."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, sig)


def flock_holders(path: str) -> list[int]:
    """The pids that acquired the flock on `path`, as /proc/locks has it: without those that this pid namespace has not.

    Empty when nobody has it or the file is not there.
    """
    try:
        info = os.stat(path)
    except OSError:
        return []
    want = f"{os.major(info.st_dev):02x}:{os.minor(info.st_dev):02x}:{info.st_ino}"
    # "1: FLOCK ADVISORY WRITE 1234 00:1a:56 0 EOF"; a waiter has "->" in second place.
    rows = [line.split() for line in Path("/proc/locks").read_text().splitlines()]
    return [int(row[4]) for row in rows if row[1] == "FLOCK" and row[5] == want and int(row[4]) > 0]


def journal(path: Path) -> list[dict[str, Any]]:
    """The events that are written down in whole; a line may be in the middle of being written."""
    try:
        text = path.read_text()
    except FileNotFoundError:
        return []
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


class Looks:
    """When to ask for a status while redundancy is waited for: that is a process, and takes time from what is awaited.

    At once, when the journal says that it is full, and else every `EVERY` seconds, since the journal may be somewhere
    where nothing can be written.
    """

    EVERY = 2.0

    def __init__(self, events: Path) -> None:
        self._events, self._next = events, 0.0

    def due(self) -> bool:
        try:
            text = self._events.read_text()
        except OSError:
            text = ""
        last = text[text.rfind('"kind":"redundancy"') :].partition("\n")[0]
        if '"detail":"full"' not in last and time.monotonic() < self._next:
            return False
        self._next = time.monotonic() + self.EVERY
        return True


class Told(Protocol):
    """Something that can say how it stands, for who must find out why a test failed."""

    def told(self) -> str: ...


#: What is up now; a test that fails shows how each stands (see conftest.py).
STANDING: list[Told] = []


def glance(directory: Path) -> dict[str, Any] | None:
    """What `status --json` says of a run, without a process for it; None where a user would read an error."""
    place = RunDir(directory)
    try:
        if (found := place.read()) is None:
            return None
        with contextlib.closing(contact.door(place, found)) as door:
            shot: dict[str, Any] = json.loads(json.dumps(look.now(place, found, door).to_json()))
            return shot
    except (LaunchError, OSError):
        return None


def _twice(look: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What was seen, if it was also seen a moment ago; empty when one of two looks found nothing.

    A glance may be quicker than the word of what was killed just now. A user is not.
    """
    if not look():
        return {}
    time.sleep(0.5)
    return look()


def twice_full(status: Callable[[], dict[str, Any] | None]) -> dict[str, Any]:
    """A status that says full redundancy, and said so a moment ago; empty when one did not."""
    return _twice(lambda: found if (found := status() or {}).get("redundancy") == "full" else {})


def groups_full(groups: Callable[[], dict[str, dict[str, Any]]], names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """The groups of a run once these are full, and were so a moment ago."""

    def look() -> dict[str, dict[str, Any]]:
        found = groups()
        return found if all(n in found and found[n]["redundancy"] == "full" for n in names) else {}

    return eventually(lambda: _twice(look), LONG, f"{names} full")


def how_it_stands(run: str, home: Path, status: Callable[[], str]) -> str:
    """A run's status, its events, and the ends of its agents' and engines' logs. Raises nothing."""
    try:
        said = status()[-20000:]
    except (OSError, subprocess.SubprocessError) as exc:
        said = repr(exc)
    parts = [f"== run {run}", said]
    logs = [(path, 60) for path in sorted(home.glob("logs/**/agent.log"))]
    logs += [(path, 10) for path in sorted(home.glob("logs/**/cohort-*.log"))]
    for path, lines in [(home / "events.jsonl", 150), *logs]:
        with contextlib.suppress(OSError):
            parts += [f"== {path}", *path.read_text(errors="replace").splitlines()[-lines:]]
    return "\n".join(parts)


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
        """Send it a signal; SIGSTOP has stopped all its threads when this returns."""
        assert self._process is not None
        if sig == signal.SIGSTOP:
            freeze(self._process.pid)
        else:
            self._process.send_signal(sig)

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def listens(self) -> bool:
        with socket.socket() as tried:
            return tried.connect_ex(("127.0.0.1", self.port)) == 0


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
    *args: str, env: dict[str, str], timeout: float = LONG, within: Sequence[str] = ()
) -> subprocess.CompletedProcess[str]:
    """Run the command line, `within` something else, and collect what it says."""
    return subprocess.run(
        [*within, *GMS_LAUNCH, *args], env=env, capture_output=True, text=True, timeout=timeout, check=False
    )


def complete(host: str, port: int, prompt: str, tokens: int, timeout: float = 30.0, model: str = "tiny") -> str | None:
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


class NatsServer:
    """A real NATS that asks for a password, at `address`; `more` are lines of its configuration."""

    def __init__(self, directory: Path, *more: str, address: str = "127.0.0.1", scheme: str = "nats") -> None:
        self.user, self.password = "dynamo", "Sesame-" + uuid.uuid4().hex
        self.port = free_port()
        self.url = f"{scheme}://{self.user}:{self.password}@{address}:{self.port}"
        self.config = directory / "nats.conf"
        lines = [f'listen: "{address}:{self.port}"', f'jetstream {{ store_dir: "{directory}/nats" }}', *more]
        lines += [f'authorization {{ user: "{self.user}", password: "{self.password}" }}']
        self.config.write_text("\n".join(lines))
        self.log = directory / "nats.log"
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def argv(self) -> list[str]:
        # Says who has come, and does not repeat what they said.
        return ["nats-server", "-c", str(self.config), "-D", "-l", str(self.log)]

    def __enter__(self) -> NatsServer:
        self._process = subprocess.Popen(self.argv, stdin=subprocess.DEVNULL, start_new_session=True)
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process is not None
        self._process.kill()
        self._process.wait()


class CommandLines:
    """Looks at the command lines of this machine's processes for as long as it lasts; `seen` are those with `word`."""

    def __init__(self, word: str) -> None:
        self._word, self.seen = word.encode(), set[bytes]()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._look)

    def _look(self) -> None:
        while not self._ended.wait(0.02):
            for pid in proc.pids():
                with contextlib.suppress(OSError):
                    line = Path(f"/proc/{pid}/cmdline").read_bytes()
                    if self._word in line:
                        self.seen.add(line)

    def __enter__(self) -> CommandLines:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()


class Deployment:
    """One run, started by `up -d` and always ended. `extra` are more flags of `up`.

    `by_command`: how it stands is asked by a command of its own each time, which bears a home that hangs.
    """

    by_command = False

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
        STANDING.append(self)
        done = self.up()
        if done.returncode != 0:
            told = self.told()
            self.__exit__()
            raise AssertionError(f"up -d failed with {done.returncode}:\n{done.stdout}{done.stderr}\n{told}")
        return self

    def __exit__(self, *error: object) -> None:
        if any(error):
            print(self.told())
        if self in STANDING:
            STANDING.remove(self)
        try:
            self._stop_agent()
            if self.alive() or any(nodedir.user_root().glob(f"{self.run}*")):
                gms_launch("down", "--run", self.run, env=self.env)
        finally:
            left = lifecycle.kill_tagged(self.run, PATIENCE)
        assert left == []

    def _stop_agent(self) -> None:
        """End the run as the signal of a terminal does: `down` is a process, and there is one such end a test."""
        try:
            agent = self.agent
        except (OSError, ValueError, KeyError):
            return
        found = proc.stat(agent.pid)
        if found is None or found.identity != agent or found.state == "T":
            return
        if (fd := lifecycle.open_pidfd(agent)) is not None:
            with open(fd):
                signal.pidfd_send_signal(fd, signal.SIGTERM)
                select.select([fd], [], [], PATIENCE / 2)

    def told(self) -> str:
        return how_it_stands(self.run, self.home / self.run, lambda: str(self.cli("status", "--json")))

    def cli(self, verb: str, *args: str) -> subprocess.CompletedProcess[str]:
        return gms_launch(verb, "--run", self.run, *args, env=self.env)

    def status(self) -> dict[str, Any]:
        """What `status --json` says; without a process of its own, unless `by_command` is set.

        Asked again while etcd gives no answer: a user who reads that error does the same.
        """

        def asked() -> dict[str, Any]:
            if not self.by_command and (shot := glance(self.home / self.run)):
                return shot
            done = self.cli("status", "--json")
            return dict(json.loads(done.stdout)) if done.returncode == 0 else {}

        return eventually(asked, what=lambda: str(self.cli("status", "--json")))

    def wait_full(self, timeout: float = LONG) -> dict[str, Any]:
        """Wait until every shadow is parked."""
        looks = Looks(self.home / self.run / "events.jsonl")
        return eventually(lambda: twice_full(self.status) if looks.due() else {}, timeout, "redundancy full")

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

    def text(self, prompt: str = "hello", tokens: int = 8, timeout: float = 30.0) -> str | None:
        """The completion of `prompt`; None when nobody answers in time."""
        host, port = self.run_file["frontend_url"].removeprefix("http://").split(":")
        return complete(host, int(port), prompt, tokens, timeout)

    def events(self, kind: str | None = None) -> list[dict[str, Any]]:
        found = journal(self.home / self.run / "events.jsonl")
        return [e for e in found if kind is None or e["kind"] == kind]

    def timeline(self, failovers: int) -> list[dict[str, Any]]:
        """What `timeline --json` says, once it has so many failovers and all of them are complete."""

        def look() -> list[dict[str, Any]]:
            found: list[dict[str, Any]] = json.loads(self.cli("timeline", "--json").stdout)["failovers"]
            return found if len(found) == failovers and all(f["complete"] for f in found) else []

        return eventually(look, LONG, lambda: f"{failovers} failovers: {self.cli('timeline', '--json').stdout}")

    def happened(self, kind: str) -> list[dict[str, Any]]:
        """The same, once there is one: an event is written a moment after what it tells of can be seen."""
        return eventually(lambda: self.events(kind), LONG, f"an event {kind}")


def freeze(pid: int) -> None:
    """Stop a process; all its threads have stopped when this returns."""
    os.kill(pid, signal.SIGSTOP)
    eventually(lambda: all(map(_stopped, Path(f"/proc/{pid}/task").glob("*"))), what="stopped")


@contextlib.contextmanager
def stopped(pid: int) -> Iterator[None]:
    """Freeze a process for a while; it may be killed meanwhile."""
    freeze(pid)
    try:
        yield
    finally:
        kill(pid, signal.SIGCONT)
