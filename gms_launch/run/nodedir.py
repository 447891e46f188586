"""The node-local directory of a run: mode 0700 under /dev/shm, for sockets, the lock, etcd's data, `engine-<id>.pgid`
files, and copies of what the leader's run directory says (`RunDir.keep`).

All runs of a user are below /dev/shm/gms-launch-UID. Where another user has taken that name, they are below one that
nobody could foresee, /dev/shm/gms-launch-UID.XXXXXXXX, which is found by its owner.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from gms_launch.errors import RefusedError, UsageError
from gms_launch.process import places, proc
from gms_launch.settings.rules import shortened

LOCAL_ROOT = Path("/dev/shm")
#: In a node directory: the path of the run directory that its copies are of.
KEPT_IN = "run-directory"
#: How the run ended, where the run directory did not take that.
END = "end.json"
#: What an agent has put there before it clears what an earlier one left.
OWN = ("agent.lock", KEPT_IN, "run.json", "credentials.json", "failover-*.lock")
#: The part of a group.
GROUP = re.compile(r"g[0-9]{1,4}")
#: A sweep that only looks has an agent's place for an instant (seconds).
SWEPT_WITHIN = 0.5
#: sockaddr_un holds 107 bytes and a terminator; the longest name is gms_GPU-<36>_kv_cache.sock.
SOCKET_NAME_MAX = len("gms_GPU-" + "0" * 36 + "_kv_cache.sock")
SOCKET_PATH_MAX = 107
#: For sockets, locks and what engines put into their temporary directory before anything is served (bytes).
ROOM = 16 * 2**20
#: Engines make sockets in their temporary directory: vLLM's are named by a UUID, multiprocessing's have 31 bytes.
SCRATCH_NAME_MAX = 36


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
                "choose a shorter --gms-socket-dir or --run"
            )

        longest = len(os.fsencode(self.scratch(9, 99999))) + 1 + SCRATCH_NAME_MAX
        if longest > SOCKET_PATH_MAX:
            raise UsageError(
                f"engines' sockets under {self.path} would have paths of {longest} bytes, and the kernel takes "
                f"{SOCKET_PATH_MAX}; choose a shorter --run"
            )

    def usable(self) -> None:
        """Raise `UsageError` when the GMS sockets could not be made, before anything is, and `RefusedError` when
        others could make them: whoever has the lock decides that nobody serves."""
        if self.gms != self.path:
            places.check(self.gms, "--gms-socket-dir", private=True)
            must_be_writable(self.gms, "--gms-socket-dir")

    def create(self) -> None:
        """Make the directory and take the agent's place on this node. Raises `RefusedError` if it is taken."""
        self.check()
        self._agent_lock = fd = self._take_place()
        me = proc.identity(os.getpid())
        assert me is not None
        os.ftruncate(fd, 0)
        os.pwrite(fd, f"{me.pid} {me.start} {proc.namespace()}\n".encode(), 0)
        self.gms.mkdir(mode=0o700, parents=True, exist_ok=True)

    def _take_place(self) -> int:
        """The agent's lock. A sweep has it while it judges this directory, and while it removes it with the lock."""
        deadline = time.monotonic() + SWEPT_WITHIN
        while True:
            self.path.mkdir(mode=0o700, exist_ok=True)
            flags = os.O_CREAT | os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC
            with contextlib.suppress(FileNotFoundError):
                fd = os.open(self.path / "agent.lock", flags, 0o600)
                try:
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    if os.path.samestat(os.fstat(fd), os.stat(self.path / "agent.lock")):
                        return fd
                except BlockingIOError:
                    if time.monotonic() > deadline:
                        os.close(fd)
                        run = self.path.name.partition("+")[0]
                        raise RefusedError(
                            f"another agent of run {run} is on this node (it holds {self.path}/agent.lock)"
                        ) from None
                except FileNotFoundError:
                    pass
                os.close(fd)
            time.sleep(0.02)

    def undo(self) -> None:
        """Remove the directory that `create` made, if this process has the agent's place in it."""
        if self._agent_lock is not None:
            self.remove()

    def agent(self) -> proc.ProcessId | None:
        """The agent that took this directory last, alive or not, by its number here.

        None when there is none on record, or it has no number here: it is in a container that is not below us, or it
        was in one that has ended.
        """
        try:
            pid, start, *where = places.read_own(self.path / "agent.lock").split()
            return proc.seen_from_here(proc.ProcessId(int(pid), int(start)), "".join(where[:1]))
        except (OSError, ValueError):
            return None

    def of_group(self, index: int) -> NodeDir:
        """The part of a group; with a short name, for sockets are in it."""
        name = f"g{index}"
        return NodeDir(self.path / name, None if self.gms == self.path else self.gms / name)

    def pgid_file(self, cohort_id: int) -> Path:
        return self.path / f"engine-{cohort_id}.pgid"

    def scratch(self, cohort_id: int, incarnation: int) -> Path:
        """Temporary files and sockets of one life (TMPDIR): made when it is started, removed when it is fenced."""
        return self.path / "tmp" / f"{cohort_id}.{incarnation}"

    def make_scratch(self, cohort_id: int, incarnation: int) -> None:
        """Raises `OSError`."""
        self.scratch(cohort_id, incarnation).mkdir(mode=0o700, parents=True, exist_ok=True)

    def warm_scratch(self, number: int) -> Path:
        """The same of a process in a warm slot; it becomes the life's."""
        return self.path / "tmp" / f"w.{number}"

    def make_warm_scratch(self, number: int) -> Path:
        """Raises `OSError`."""
        path = self.warm_scratch(number)
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        return path

    def hand_scratch(self, warm: Path, cohort_id: int, incarnation: int) -> None:
        """Let the directory of a warm slot's process be that of a life. Raises `OSError`."""
        warm.rename(self.scratch(cohort_id, incarnation))

    def gate(self, cohort_id: int) -> Path:
        """The lock of one cohort alone (--activation agent)."""
        return self.gms / f"failover-{cohort_id}.lock"

    @property
    def locks(self) -> list[Path]:
        """The failover locks that there are on this node."""
        return sorted([*self.gms.glob("failover*.lock"), *self.gms.glob("g*/failover*.lock")])

    def forget_store(self) -> None:
        """Remove what etcd kept here: its member is a new one."""
        shutil.rmtree(self.etcd_data, ignore_errors=True)

    def clear(self) -> None:
        """Remove what an earlier agent of this run left in it: its etcd knew other lives. What is ours stays."""
        for path in self.path.iterdir():
            if GROUP.fullmatch(path.name) and path.is_dir():
                NodeDir(path).clear()
            elif not any(path.match(own) for own in OWN):
                shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)

    def remove(self) -> None:
        """Remove everything of the run on this node. Only once nothing of it is alive: the lock goes too."""
        shutil.rmtree(self.path, ignore_errors=True)
        if self.gms != self.path and self.gms.is_dir():
            # A directory the user chose may hold other things: take out only what is ours.
            patterns = ("gms_*.sock", "failover_metrics_engine-*.json", "failover-*.lock")
            for place in self.gms.glob("g*"):
                if GROUP.fullmatch(place.name) and place.is_dir():
                    shutil.rmtree(place, ignore_errors=True)
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


def wanting(needed: int) -> str:
    """Why `needed` bytes cannot be had for node-local files, for people; empty when they can. Raises `OSError`."""
    free = shutil.disk_usage(LOCAL_ROOT).free
    if free >= needed:
        return ""
    return (
        f"{LOCAL_ROOT} has {free >> 20} MiB free, and this node's part of a run may take {needed >> 20} there (etcd's "
        f"records and its log on the leader's, sockets); `du -s {LOCAL_ROOT}/*` shows who has it, and in a container "
        "its size is a flag (docker's --shm-size)"
    )


def node_name(run: str, node_rank: int) -> str:
    """The name of a run's node-local directory: nodes of one run may share a machine. No run id has a plus in it."""
    return run if node_rank == 0 else f"{run}+{node_rank}"


def user_root() -> Path:
    """The node-local directory of all runs of this user, made if it is not there. Raises `RefusedError`.

    Made rather than only named: a name that is free is anybody's until it is taken.
    """
    uid = os.getuid()
    plain = LOCAL_ROOT / f"gms-launch-{uid}"
    found = [plain] if places.own_directory(plain) else roots(uid)
    if not found:
        with _one_at_a_time():
            found = roots(uid) or [_make_root(plain)]
    if found[0].lstat().st_mode & 0o777 != 0o700:
        found[0].chmod(0o700)
    return found[0]


def roots(uid: int, shm: Path | None = None) -> list[Path]:
    """Every directory of a user's runs in /dev/shm, or in `shm`, the one in use first.

    Others' under these names do not count.
    """
    shm = LOCAL_ROOT if shm is None else shm
    plain = f"gms-launch-{uid}"
    with contextlib.suppress(OSError):
        names = [plain, *sorted(n for n in os.listdir(shm) if n.startswith(f"{plain}."))]
        return [shm / n for n in names if places.own_directory(shm / n, uid)]
    return []


def _make_root(plain: Path) -> Path:
    places.check(LOCAL_ROOT, "the directory for node-local files")
    try:
        with contextlib.suppress(FileExistsError):
            plain.mkdir(mode=0o700)
        if not places.own_directory(plain):  # somebody else's, or a file
            return Path(tempfile.mkdtemp(prefix=f"{plain.name}.", dir=LOCAL_ROOT))
    except OSError as exc:
        raise RefusedError(
            f"{plain} cannot be made: {exc.strerror}; runs of this user need a directory there"
        ) from None
    return plain


@contextlib.contextmanager
def _one_at_a_time() -> Iterator[None]:
    """Two of this user's commands shall not make two directories. Whoever holds this up does so for a second."""
    try:
        fd = os.open(LOCAL_ROOT, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as exc:
        raise RefusedError(f"{LOCAL_ROOT}: {exc.strerror}; runs of this user need a directory there") from None
    try:
        deadline = time.monotonic() + 1.0
        while time.monotonic() < deadline:
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            time.sleep(0.01)  # nothing announces that a lock is free to somebody who will not wait for ever
        yield
    finally:
        os.close(fd)


def cache_dir(chosen: str) -> Path:
    """The directory that `--cache-dir` means, given or not."""
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(chosen or f"{base}/gms-launch").expanduser()
