"""The run directory, on the shared home: what must be seen from everywhere and outlive the run.

`run.json`, credentials, logs, the timeline. A run is found by its id, by SLURM_JOB_ID, or as the user's only live run.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import secrets
import shutil
import socket
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from gms_launch import __version__
from gms_launch.control import tls
from gms_launch.control.access import Access
from gms_launch.errors import NoContactError, RefusedError, UsageError
from gms_launch.process import places, proc
from gms_launch.run.credentials import Credentials
from gms_launch.run.nodedir import END, KEPT_IN, NodeDir, user_root
from gms_launch.settings.rules import RUN_ID, shortened, unprintable
from gms_launch.spool.files import trouble, write_private
from gms_launch.spool.reading import PATIENCE, within

#: In the home: where the nodes of each run serve their metrics. No run has a name with a dot in front.
TARGETS = ".metrics-targets"


def home() -> Path:
    """Where runs are recorded: GMS_LAUNCH_HOME, else ~/.gms-launch. Raises `UsageError` for what can be no path."""
    text = os.environ.get("GMS_LAUNCH_HOME", "")
    if wrong := unprintable(text):
        raise UsageError(f"GMS_LAUNCH_HOME {shortened(text)}: there is {wrong} in it")
    try:
        return Path(text or Path.home() / ".gms-launch")
    except RuntimeError as exc:
        raise UsageError(f"{exc}; say where runs are recorded with GMS_LAUNCH_HOME") from None


def named(environ: Mapping[str, str]) -> str:
    """The run that the environment names, under its name of today or its old one; empty when it names none."""
    return environ.get("GMS_LAUNCH_RUN") or environ.get("GMS_LAUNCH_RUN_ID") or ""


def slurm_run_id(environ: Mapping[str, str]) -> str:
    """The run id of a Slurm job; empty outside of Slurm. Raises `UsageError` for what is no job's number."""
    job = environ.get("SLURM_JOB_ID", "")
    if job and not RUN_ID.match(job):
        raise UsageError(f"SLURM_JOB_ID is {shortened(job)}, and Slurm would have put a number there; unset it")
    return job


def slurm_step(environ: Mapping[str, str]) -> str:
    """job.restart.step of this process; empty outside of Slurm. Nodes that have a step each are of one run."""
    if not (job := environ.get("SLURM_JOB_ID")):
        return ""
    step = "nodes" if environ.get("GL_NODES") else environ.get("SLURM_STEP_ID", "batch")
    return f"{job}.{environ.get('SLURM_RESTART_COUNT', '0')}.{step}"


def shared_run_id(leader: str) -> str:
    """The run id that agents started by hand agree on without being told: it follows from the leader they all name."""
    return leader if RUN_ID.match(leader) else hashlib.sha256(leader.encode()).hexdigest()[:12]


def new_run_id() -> str:
    return time.strftime("%m%d-%H%M%S-") + secrets.token_hex(2)


@dataclass(frozen=True)
class NodeEnd:
    """How a node of the run ended. `clean`: nothing of the run is alive there, proved; else `detail` says why not.

    `by_agent` is False for a look without its agent, which knew what descends from it: by tag and lock only.
    """

    node_rank: int
    host: str
    clean: bool
    detail: str = ""
    by_agent: bool = True


@dataclass(frozen=True)
class RunFile:
    """What `run.json` says: enough to find the run, to join it, and to know how it ended.

    `attempt` tells this run from an earlier one of the same name. `slurm` is "job.restart.step" under Slurm.
    `unwritten` counts events and lines of the agent's log that had not come to the home when the run ended. `etcd_ca`
    is the certificate, as PEM text, that its etcd's follows from; empty for one without TLS. In `pid_namespace` the
    agent has its number. `groups`, by name: `nodes` (ranks, as at first), `shadows` and `engine` of each.
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
    frontend_urls: tuple[str, ...] = ()
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
    unwritten: int = 0
    etcd_ca: str = ""
    pid_namespace: str = ""
    groups: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    leader_rank: int = 0

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1)

    @property
    def local(self) -> bool:
        """True when this is the leader's machine, not a later boot of it, and its agent has a number here.

        It has none for who is in another container than it, and none any more when its container has ended.
        """
        here = self.leader_host == socket.gethostname() and self.leader_boot_id == proc.boot_id()
        return here and self._agent is not None

    @property
    def agent(self) -> proc.ProcessId:
        """The leader's agent, by its number here where it is `local`."""
        return self._agent or proc.ProcessId(self.agent_pid, self.agent_start)

    @property
    def _agent(self) -> proc.ProcessId | None:
        return proc.seen_from_here(proc.ProcessId(self.agent_pid, self.agent_start), self.pid_namespace)

    @property
    def grouped(self) -> bool:
        """Whether it is a run of groups."""
        return bool(self.settings.get("tables")) or self.settings.get("groups", 1) != 1

    @property
    def live(self) -> bool:
        """False when the run is known to have ended; True when it runs, others without this node, or who knows."""
        if self.ended is not None:
            return False
        others = self.grouped and len(self.etcd_endpoints) > 1
        return not self.local or proc.alive(self.agent) or (others and self.responds())

    def responds(self, timeout: float = 2.0) -> bool:
        """True when the run's etcd answers: one that holds a certificate of this run, and not another one's.

        An etcd of the user's own is not the run's alone, so that says little; nor does one without TLS.
        """
        return tls.answers(Access(self.etcd_endpoints, self.etcd_ca), timeout)

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
        self.ranks_json = self.ranks_of("")
        # Beside the runs: Prometheus takes a pattern for the name of a file, and none for a directory's.
        self.targets_json = path.parent / TARGETS / f"{path.name}.json"

    @classmethod
    def of(cls, run: str) -> RunDir:
        return cls(home() / run)

    @property
    def run(self) -> str:
        return self.path.name

    def ranks_of(self, group: str) -> Path:
        """Where the leader of a group lists its nodes and ranks; that of the run without a name."""
        return self.path / (f"ranks.{group}.json" if group else "ranks.json")

    def keep(self, place: NodeDir, run: RunFile, credentials: Credentials) -> None:
        """Copies on this node, the leader's: there a live run is found without the shared home. Raises `OSError`."""
        write_private(place.path / KEPT_IN, str(self.path.absolute()))
        write_private(place.path / self.credentials_json.name, credentials.to_json())
        write_private(place.path / self.run_json.name, run.to_json())

    def create(self, run: RunFile, credentials: Credentials) -> None:
        """Make the directory of a new run, complete, and put it in its place at once.

        What an earlier run of that name left is moved aside. Raises `RefusedError` when somebody else is that run, and
        when the home takes no files.
        """
        fresh = RunDir(self.path.with_name(f".{self.run}.{socket.gethostname()}.{os.getpid()}"))
        try:
            home().mkdir(parents=True, exist_ok=True, mode=0o700)
            shutil.rmtree(fresh.path, ignore_errors=True)
            fresh.path.mkdir(mode=0o700)
            fresh.logs.mkdir(mode=0o700)
            write_private(fresh.credentials_json, credentials.to_json())
            fresh.write(run)
        except OSError as exc:
            shutil.rmtree(fresh.path, ignore_errors=True)
            raise RefusedError(
                f"the run directory cannot be made in {self.path.parent}, which is {trouble(exc)} ({exc.strerror}); "
                "mend that, or name another place with GMS_LAUNCH_HOME"
            ) from None
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
        elif not previous.local and abs(time.time() - previous.created) > 60.0 and not previous.responds():
            return
        why = f"already up (agent {previous.agent_pid} on {previous.leader_host})"
        if previous.local and not proc.alive(previous.agent):
            why = "up on other nodes, and too few members of its etcd answer to take this one back"
        end = f"stop it with `gms-launch down --run {self.run}` or choose another --run"
        raise RefusedError(f"run {self.run} is {why}; {end}")

    def text(self, path: Path) -> str:
        """One of the files that the leader's agent keeps in its node directory too: that copy while the agent lives,
        since the shared home may be full, gone or hanging. Raises `OSError`."""
        return kept(self, path.name) or self._on_home(path)

    def _on_home(self, path: Path) -> str:
        """Raises `OSError`, and `RefusedError` where others could have put it: it says whom we signal and believe."""
        places.check(self.path, "run directory")
        return path.read_text()

    def read(self) -> RunFile | None:
        """What run.json says, or what would stand there if the home had taken it. Raises `NoContactError`."""
        end = self._end_here()
        if end is None:
            return self._decode(lambda: self.text(self.run_json))
        try:
            on_home = self._decode(
                lambda: within(PATIENCE, lambda: end if places.flaw(self.path) else self.run_json.read_text(), end)
            )
        except NoContactError:
            on_home = None
        ended = self._decode(lambda: end)
        return on_home if on_home is not None and ended and on_home.attempt != ended.attempt else ended

    @property
    def end_unrecorded(self) -> bool:
        """True when the run's end is known on this node only."""
        return self._end_here() is not None

    def leave_end(self, place: NodeDir, end: RunFile) -> None:
        """Put down on this node how the run ended, since the home does not take it. Raises `OSError`."""
        place.path.mkdir(mode=0o700, exist_ok=True)
        write_private(place.path / KEPT_IN, str(self.path.absolute()))
        write_private(place.path / END, end.to_json())

    def _end_here(self) -> str | None:
        place = NodeDir.of(self.run).path
        try:
            if places.read_own(place / KEPT_IN) != str(self.path.absolute()):
                return None
            return places.read_own(place / END)
        except OSError:
            return None

    def _decode(self, text: Callable[[], str]) -> RunFile | None:
        try:
            data = json.loads(text())
            known = {f.name for f in dataclasses.fields(RunFile)}
            data = {"frontend_urls": ()} | {k: v for k, v in data.items() if k in known}
            data |= {k: tuple(data[k]) for k in ("etcd_endpoints", "frontend_urls")}
            return RunFile(**data | {"nodes": tuple(NodeEnd(**n) for n in data.get("nodes", ()))})
        except FileNotFoundError:
            return None
        except OSError as exc:
            raise NoContactError(f"{self.run_json} cannot be read: {exc.strerror}") from None
        except (ValueError, TypeError, KeyError) as exc:
            raise NoContactError(
                f"{self.run_json} cannot be understood ({exc}); was it written by another version?"
            ) from None

    def write(self, run: RunFile) -> None:
        """Raises `OSError`."""
        write_private(self.run_json, run.to_json())

    def credentials(self, run: RunFile | None = None) -> Credentials:
        """What only the run's own processes know. `run` tells whose they are. Raises `NoContactError`."""
        try:
            return Credentials.from_json(self.text(self.credentials_json))
        except OSError as exc:
            raise NoContactError(f"{self.credentials_json} cannot be read: {exc.strerror}") from None
        except msgspec.MsgspecError:
            version = f"gms-launch {run.version}" if run is not None else "another version of gms-launch"
            raise NoContactError(
                f"{self.credentials_json} has no certificates that this gms-launch ({__version__}) understands: run "
                f"{self.run} was started by {version}, which asks its etcd in another way; use that version for it "
                "(`gms-launch down` on the leader's machine ends it all the same)"
            ) from None


def kept(directory: RunDir, name: str) -> str | None:
    """A file of the run as its leader's agent keeps it on this node; None without a live one here."""
    place = NodeDir.of(directory.run)
    try:
        if places.read_own(place.path / KEPT_IN) != str(directory.path.absolute()):
            return None
        agent = place.agent()
        return places.read_own(place.path / name) if agent is not None and proc.alive(agent) else None
    except OSError:
        return None


def find(run: str | None) -> tuple[RunDir, RunFile]:
    """The run meant by `run`, GMS_LAUNCH_RUN, SLURM_JOB_ID or, failing these, the user's only live run.

    Raises `NoContactError` when there is none and `UsageError` when several are live.
    """
    wanted = run or named(os.environ)
    if wanted:
        if not RUN_ID.match(wanted):
            raise UsageError(f"{wanted!r} is not the name of a run")
        directory = RunDir.of(wanted)
        found = directory.read()
        if found is None:
            raise NoContactError(f"there is no run {wanted}: {directory.run_json} does not exist. {_known()}")
        return directory, found
    if job := slurm_run_id(os.environ):
        directory = RunDir.of(job)
        found = directory.read()
        if found is not None:
            return directory, found
    live = [(d, f) for d, f in all_runs() if f.live]
    if len(live) > 1:
        # A run whose agents were all killed has nobody left to write down its end, and may be judged on its node only.
        live = [(d, f) for d, f in live if f.local or not f.etcd_endpoints or f.responds()] or live
    if len(live) == 1:
        return live[0]
    if not live:
        raise NoContactError(f"no run is up. {_known()}")
    raise UsageError("several runs are up, say which with --run: " + ", ".join(d.run for d, _ in live))


def all_runs() -> list[tuple[RunDir, RunFile]]:
    """Every recorded run, newest first. What cannot be understood, or is another user's, is left out.

    Raises `RefusedError` when the home itself is another user's.
    """
    found = []
    places.check(home(), "GMS_LAUNCH_HOME")
    paths = {path.parent for path in home().absolute().glob("*/run.json")}
    for note in user_root().glob(f"*/{KEPT_IN}"):
        with contextlib.suppress(OSError):
            paths |= {p for p in [Path(places.read_own(note))] if p.parent == home().absolute()}
    for directory in map(RunDir, paths):
        with contextlib.suppress(NoContactError, RefusedError):
            if (run := directory.read()) is not None:
                found.append((directory, run))
    return sorted(found, key=lambda pair: pair[1].created, reverse=True)


def _known() -> str:
    if names := [d.run for d, _ in all_runs()][:5]:
        return f"Recorded in {home()}, newest first: {', '.join(names)}."
    return f"No run is recorded in {home()}; start one with `gms-launch up`."
