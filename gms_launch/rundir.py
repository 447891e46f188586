"""Where a run keeps its things: the run directory (shared home) and the node-local directory.

The run directory holds what must be seen from everywhere and outlive the run: `run.json`, credentials, logs, the
timeline. The node-local directory, mode 0700 under /dev/shm, holds sockets, the lock, etcd's data and
`engine-<id>.pgid` files. A run is found by its id, by SLURM_JOB_ID, or as the user's only live run.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import secrets
import shutil
import socket
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from gms_launch.cohort import proc
from gms_launch.errors import NoContactError, RefusedError, UsageError
from gms_launch.rules import RUN_ID

LOCAL_ROOT = Path("/dev/shm")
#: sockaddr_un holds 107 bytes and a terminator; the longest name is gms_GPU-<36>_kv_cache.sock.
SOCKET_NAME_MAX = len("gms_GPU-" + "0" * 36 + "_kv_cache.sock")
SOCKET_PATH_MAX = 107


def home() -> Path:
    """Where runs are recorded: GMS_LAUNCH_HOME, else ~/.gms-launch."""
    return Path(os.environ.get("GMS_LAUNCH_HOME") or Path.home() / ".gms-launch")


def slurm_run_id(environ: Mapping[str, str]) -> str:
    """The run id of a Slurm job; empty outside of Slurm."""
    return environ.get("SLURM_JOB_ID", "")


def slurm_step(environ: Mapping[str, str]) -> str:
    """job.restart.step of this process; empty outside of Slurm."""
    job = environ.get("SLURM_JOB_ID")
    if not job:
        return ""
    return f"{job}.{environ.get('SLURM_RESTART_COUNT', '0')}.{environ.get('SLURM_STEP_ID', 'batch')}"


def shared_run_id(leader: str) -> str:
    """The run id that agents started by hand agree on without being told: it follows from the leader they all name."""
    return leader if RUN_ID.match(leader) else hashlib.sha256(leader.encode()).hexdigest()[:12]


def new_run_id() -> str:
    return time.strftime("%m%d-%H%M%S-") + secrets.token_hex(2)


@dataclass(frozen=True)
class Credentials:
    """Passwords of one run, made up at its start. `admin` is etcd's root; `dynamo` sees only Dynamo's keys."""

    admin_password: str
    dynamo_user: str
    dynamo_password: str
    nats_user: str
    nats_password: str

    @classmethod
    def generate(cls) -> Credentials:
        return cls(secrets.token_hex(16), "dynamo", secrets.token_hex(16), "dynamo", secrets.token_hex(16))


@dataclass(frozen=True)
class NodeEnd:
    """How a node of the run ended. `clean`: nothing of the run is alive there, proved; else `detail` says why not."""

    node_rank: int
    host: str
    clean: bool
    detail: str = ""


@dataclass(frozen=True)
class RunFile:
    """What `run.json` says: enough to find the run, to join it, and to know how it ended.

    `attempt` tells this run from an earlier one of the same name. `slurm` is "job.restart.step" under Slurm.
    """

    run: str
    version: str
    created: float
    leader_host: str
    leader_boot_id: str
    agent_pid: int
    agent_start: int
    node_dir: str
    etcd_endpoints: tuple[str, ...] = ()
    etcd_auth: bool = False
    frontend_url: str = ""
    model_name: str = ""
    ended: float | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    attempt: str = ""
    nnodes: int = 1
    leader_address: str = ""
    slurm: str = ""
    ports: Mapping[str, Any] = field(default_factory=dict)
    exit_code: int | None = None
    reason: str = ""
    nodes: tuple[NodeEnd, ...] = ()

    @property
    def local(self) -> bool:
        """True when this is the leader's machine, and not a later boot of it."""
        return self.leader_host == socket.gethostname() and self.leader_boot_id == proc.boot_id()

    @property
    def agent(self) -> proc.ProcessId:
        return proc.ProcessId(self.agent_pid, self.agent_start)

    @property
    def live(self) -> bool:
        """False when the run is known to have ended; True when it runs or cannot be judged from here."""
        if self.ended is not None:
            return False
        return proc.alive(self.agent) if self.local else True

    def responds(self, timeout: float = 2.0) -> bool:
        """True when something listens at the run's etcd."""
        for url in self.etcd_endpoints:
            parts = urlsplit(url)
            with contextlib.suppress(OSError), socket.create_connection((parts.hostname, parts.port or 80), timeout):
                return True
        return False

    @property
    def slurm_job(self) -> str:
        return self.slurm.partition(".")[0]


class RunDir:
    """The shared directory of one run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.run_json = path / "run.json"
        self.credentials_json = path / "credentials.json"
        self.logs = path / "logs"
        self.events = path / "events.jsonl"
        self.agent_log = path / "logs" / "agent.log"
        self.ranks_json = path / "ranks.json"

    @classmethod
    def of(cls, run: str) -> RunDir:
        return cls(home() / run)

    @property
    def run(self) -> str:
        return self.path.name

    def create(self, run: RunFile, credentials: Credentials) -> None:
        """Make the directory of a new run, complete, and put it in its place at once.

        What an earlier run of that name left is moved aside. Raises `RefusedError` when somebody else is that run.
        """
        home().mkdir(parents=True, exist_ok=True, mode=0o700)
        fresh = RunDir(self.path.with_name(f".{self.run}.{socket.gethostname()}.{os.getpid()}"))
        shutil.rmtree(fresh.path, ignore_errors=True)
        fresh.logs.mkdir(parents=True, mode=0o700)
        fresh.path.chmod(0o700)
        fresh.write_credentials(credentials)
        fresh.write(run)
        try:
            self.refuse_live(run.slurm)
            if self.path.exists():
                self.path.rename(self.path.with_name(f"{self.path.name}.{time.time_ns() // 1_000_000}.old"))
            fresh.path.rename(self.path)  # fails when another leader was quicker: theirs is not empty
        except OSError as exc:
            raise RefusedError(f"run {self.run} cannot be made in {self.path.parent}: {exc.strerror}") from None
        finally:
            shutil.rmtree(fresh.path, ignore_errors=True)

    def refuse_live(self, slurm: str = "") -> None:
        """Raise `RefusedError` when a run of this name is up, as far as can be told. `slurm` is the asker's step."""
        previous = self.read()
        if previous is None or not previous.live:
            return
        if previous.slurm and slurm and previous.slurm != slurm and previous.slurm_job == slurm.partition(".")[0]:
            # A job that was requeued, or a later step of it: Slurm ended the earlier one.
            if not previous.responds():
                return
        elif not previous.local and time.time() - previous.created > 60.0 and not previous.responds():
            return
        raise RefusedError(
            f"run {self.run} is already up (agent {previous.agent_pid} on {previous.leader_host}); "
            f"stop it with `gms-launch down --run {self.run}` or choose another --run-id"
        )

    def read(self) -> RunFile | None:
        try:
            data = json.loads(self.run_json.read_text())
            known = {f.name for f in dataclasses.fields(RunFile)}
            data = {k: v for k, v in data.items() if k in known}
            data["etcd_endpoints"] = tuple(data["etcd_endpoints"])
            data["nodes"] = tuple(NodeEnd(**n) for n in data.get("nodes", ()))
            return RunFile(**data)
        except FileNotFoundError:
            return None
        except (ValueError, TypeError, KeyError) as exc:
            raise NoContactError(
                f"{self.run_json} cannot be understood ({exc}); was it written by another version?"
            ) from None

    def write(self, run: RunFile) -> None:
        write_private(self.run_json, json.dumps(asdict(run), indent=1))

    def write_credentials(self, credentials: Credentials) -> None:
        write_private(self.credentials_json, json.dumps(asdict(credentials)))

    def credentials(self) -> Credentials:
        try:
            return Credentials(**json.loads(self.credentials_json.read_text()))
        except OSError as exc:
            raise NoContactError(f"{self.credentials_json} cannot be read: {exc.strerror}") from None


def write_private(path: Path, text: str) -> None:
    """Replace `path` at once by a file that only its owner reads; a reader sees the old or the new text."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    fd = os.open(temporary, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o600)
    with open(fd, "w") as file:
        file.write(text)
    temporary.replace(path)


class NodeDir:
    """The node-local directory of one run on this node."""

    def __init__(self, path: Path, gms_dir: Path | None = None) -> None:
        self.path = path
        self.gms = gms_dir or path
        self.lock = self.gms / "failover.lock"
        self.etcd_data = path / "etcd"
        self._agent_lock: int | None = None

    @classmethod
    def of(cls, run: str, gms_dir: str = "", node_rank: int = 0) -> NodeDir:
        return cls(user_root() / node_name(run, node_rank), Path(gms_dir) if gms_dir else None)

    def check(self) -> None:
        """Raise `UsageError` when a GMS socket's path would not fit, before anything is made."""
        longest = len(os.fsencode(self.gms)) + 1 + SOCKET_NAME_MAX
        if longest > SOCKET_PATH_MAX:
            raise UsageError(
                f"GMS sockets in {self.gms} would have paths of {longest} bytes, and the kernel takes "
                f"{SOCKET_PATH_MAX}; "
                "choose a shorter --gms-socket-dir or --run-id"
            )

    def create(self) -> None:
        """Make the directory and take the agent's place on this node. Raises `RefusedError` if it is taken."""
        self.check()
        private_directory(user_root())
        self.path.mkdir(mode=0o700, exist_ok=True)
        fd = os.open(self.path / "agent.lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(fd)
            raise RefusedError(
                f"another agent of run {self.path.name} is on this node (it holds {self.path}/agent.lock)"
            ) from None
        me = proc.identity(os.getpid())
        assert me is not None
        os.ftruncate(fd, 0)
        os.pwrite(fd, f"{me.pid} {me.start}\n".encode(), 0)
        self._agent_lock = fd
        self.gms.mkdir(mode=0o700, parents=True, exist_ok=True)

    def agent(self) -> proc.ProcessId | None:
        """The agent that took this directory last, alive or not; None when there is none on record."""
        try:
            pid, start = (self.path / "agent.lock").read_text().split()
        except (OSError, ValueError):
            return None
        return proc.ProcessId(int(pid), int(start))

    def pgid_file(self, cohort_id: int) -> Path:
        return self.path / f"engine-{cohort_id}.pgid"

    def write_pgid(self, cohort_id: int, pgid: int) -> None:
        write_private(self.pgid_file(cohort_id), f"{pgid}\n")

    def clear_pgid(self, cohort_id: int) -> None:
        with contextlib.suppress(FileNotFoundError):
            self.pgid_file(cohort_id).unlink()

    def gate(self, cohort_id: int) -> Path:
        """The lock of one cohort alone (--activation agent)."""
        return self.gms / f"failover-{cohort_id}.lock"

    def clear(self) -> None:
        """Remove what an earlier agent of this run left in it: its etcd has other passwords. Our own place stays."""
        for path in self.path.iterdir():
            if path.name != "agent.lock":
                shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)

    def remove(self) -> None:
        """Remove everything of the run on this node. Only once nothing of it is alive: the lock goes too."""
        shutil.rmtree(self.path, ignore_errors=True)
        if self.gms != self.path and self.gms.is_dir():
            # A directory the user chose may hold other things: take out only what is ours.
            patterns = ("gms_*.sock", "failover_metrics_engine-*.json", "failover-*.lock")
            for file in [*(f for p in patterns for f in self.gms.glob(p)), self.lock]:
                with contextlib.suppress(FileNotFoundError):
                    file.unlink()


def node_name(run: str, node_rank: int) -> str:
    """The name of a run's node-local directory: nodes of one run may share a machine. No run id has a plus in it."""
    return run if node_rank == 0 else f"{run}+{node_rank}"


def user_root(uid: int | None = None) -> Path:
    """The node-local directory of all runs of a user; this one unless given."""
    return LOCAL_ROOT / f"gms-launch-{os.getuid() if uid is None else uid}"


def private_directory(path: Path) -> None:
    """Make `path` or check that it is ours alone: /dev/shm is everybody's."""
    path.mkdir(mode=0o700, exist_ok=True)
    info = path.lstat()
    if not path.is_dir() or path.is_symlink() or info.st_uid != os.getuid():
        raise RefusedError(f"{path} is not a directory of this user; remove it, or ask its owner to")
    path.chmod(0o700)


def find(run: str | None) -> tuple[RunDir, RunFile]:
    """The run meant by `run`, GMS_LAUNCH_RUN, SLURM_JOB_ID or, failing these, the user's only live run.

    Raises `NoContactError` when there is none and `UsageError` when several are live.
    """
    wanted = run or os.environ.get("GMS_LAUNCH_RUN")
    if wanted:
        if not RUN_ID.match(wanted):
            raise UsageError(f"{wanted!r} is not the name of a run")
        directory = RunDir.of(wanted)
        found = directory.read()
        if found is None:
            raise NoContactError(f"there is no run {wanted}: {directory.run_json} does not exist. {_known()}")
        return directory, found
    job = slurm_run_id(os.environ)
    if job:
        directory = RunDir.of(job)
        found = directory.read()
        if found is not None:
            return directory, found
    live = [(d, f) for d, f in all_runs() if f.live]
    if len(live) == 1:
        return live[0]
    if not live:
        raise NoContactError(f"no run is up. {_known()}")
    raise UsageError("several runs are up, say which with --run: " + ", ".join(d.run for d, _ in live))


def all_runs() -> list[tuple[RunDir, RunFile]]:
    """Every recorded run, newest first. Directories that cannot be understood are left out."""
    found = []
    for path in home().glob("*/run.json"):
        directory = RunDir(path.parent)
        with contextlib.suppress(NoContactError):
            run = directory.read()
            if run is not None:
                found.append((directory, run))
    return sorted(found, key=lambda pair: pair[1].created, reverse=True)


def _known() -> str:
    names = [d.run for d, _ in all_runs()][:5]
    if not names:
        return f"No run is recorded in {home()}; start one with `gms-launch up`."
    return f"Recorded in {home()}, newest first: {', '.join(names)}."
