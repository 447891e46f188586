"""The node-local directory of a run: mode 0700 under /dev/shm, for sockets, the lock, etcd's data, `engine-<id>.pgid`
files, and copies of what the leader's run directory says (`RunDir.keep`).
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
from pathlib import Path

from gms_launch.errors import RefusedError, UsageError
from gms_launch.process import proc
from gms_launch.settings.rules import shortened

LOCAL_ROOT = Path("/dev/shm")
#: In a node directory: the path of the run directory that its copies are of.
KEPT_IN = "run-directory"
#: How the run ended, where the run directory did not take that.
END = "end.json"
#: What an agent has put there before it clears what an earlier one left.
OWN = ("agent.lock", KEPT_IN, "run.json", "credentials.json", "failover-*.lock")
#: sockaddr_un holds 107 bytes and a terminator; the longest name is gms_GPU-<36>_kv_cache.sock.
SOCKET_NAME_MAX = len("gms_GPU-" + "0" * 36 + "_kv_cache.sock")
SOCKET_PATH_MAX = 107
#: Engines make sockets in their temporary directory: vLLM's are named by a UUID, multiprocessing's have 31 bytes.
SCRATCH_NAME_MAX = 36


class NodeDir:
    """The node-local directory of one run on this node."""

    def __init__(self, path: Path, gms_dir: Path | None = None) -> None:
        self.path = path
        self.gms = gms_dir or path
        self.lock = self.gms / "failover.lock"
        self.etcd_data = path / "etcd"
        self.ranks_json = path / "ranks.json"
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
                "choose a shorter --gms-socket-dir or --run"
            )

        longest = len(os.fsencode(self.scratch(9, 99999))) + 1 + SCRATCH_NAME_MAX
        if longest > SOCKET_PATH_MAX:
            raise UsageError(
                f"engines' sockets under {self.path} would have paths of {longest} bytes, and the kernel takes "
                f"{SOCKET_PATH_MAX}; choose a shorter --run"
            )

    def usable(self) -> None:
        """Raise `UsageError` when the GMS sockets could not be made, before anything is."""
        if self.gms != self.path:
            must_be_writable(self.gms, "--gms-socket-dir")

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

    def undo(self) -> None:
        """Remove the directory that `create` made, if this process has the agent's place in it."""
        if self._agent_lock is not None:
            self.remove()

    def agent(self) -> proc.ProcessId | None:
        """The agent that took this directory last, alive or not; None when there is none on record."""
        try:
            pid, start = (self.path / "agent.lock").read_text().split()
        except (OSError, ValueError):
            return None
        return proc.ProcessId(int(pid), int(start))

    def pgid_file(self, cohort_id: int) -> Path:
        return self.path / f"engine-{cohort_id}.pgid"

    def scratch(self, cohort_id: int, incarnation: int) -> Path:
        """Temporary files and sockets of one life (TMPDIR): made when it is started, removed when it is fenced."""
        return self.path / "tmp" / f"{cohort_id}.{incarnation}"

    def make_scratch(self, cohort_id: int, incarnation: int) -> None:
        """Raises `OSError`."""
        self.scratch(cohort_id, incarnation).mkdir(mode=0o700, parents=True, exist_ok=True)

    def gate(self, cohort_id: int) -> Path:
        """The lock of one cohort alone (--activation agent)."""
        return self.gms / f"failover-{cohort_id}.lock"

    @property
    def locks(self) -> list[Path]:
        """The failover locks that there are on this node."""
        return sorted(self.gms.glob("failover*.lock"))

    def clear(self) -> None:
        """Remove what an earlier agent of this run left in it: its etcd knew other lives. What is ours stays."""
        for path in self.path.iterdir():
            if not any(path.match(own) for own in OWN):
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


def must_be_writable(path: Path, setting: str) -> None:
    """Raise `UsageError` unless `path` is a directory that takes files, or one that can be made there."""
    try:
        there = next(p for p in (path.absolute(), *path.absolute().parents) if p.exists() or p.is_symlink())
    except OSError as exc:
        raise UsageError(f"{setting} {shortened(str(path))}: {exc.strerror}") from None
    if not there.is_dir():
        raise UsageError(f"{setting} {path}: {there} is no directory")
    if not os.access(there, os.W_OK | os.X_OK):
        raise UsageError(f"{setting} {path}: {there} takes no files of this user")


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
