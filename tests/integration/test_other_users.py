"""Two users without rights on one node, and root who sweeps it: nobody's files or processes are another's to take.

All in mount and pid namespaces of their own, so that root's sweep finds what these tests made and nothing else, and
/dev/shm is theirs. What users do is done by processes that are these users.
"""

from __future__ import annotations

import contextlib
import gc
import json
import mmap
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from gms_launch.engines.reference.demo_model import make
from gms_launch.process import become
from gms_launch.process.become import Owner
from tests.support import LONG, complete, eventually, free_port

REPOSITORY = Path(__file__).parents[2]
PACKAGES = next(p for p in sys.path if p.endswith("site-packages"))
Done = subprocess.CompletedProcess[str]

pytestmark = [
    pytest.mark.skipif(os.getuid() != 0, reason="becoming two other users needs root"),
]


class Machine:
    """A /dev/shm, a /mnt and a table of processes of their own."""

    def __init__(self, *mounts: str) -> None:
        steps = ["mount -t tmpfs -o mode=755 none /mnt", "mount -t tmpfs -o mode=1777,size=2g none /dev/shm", *mounts]
        self._holder = subprocess.Popen(
            ["unshare", "-m", "-p", "-f", "--mount-proc", "sh", "-c", " && ".join([*steps, "echo ok"]) + "; cat"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert self._holder.stdout is not None and self._holder.stdout.readline() == b"ok\n"
        (self.init,) = (
            int(p) for p in Path(f"/proc/{self._holder.pid}/task/{self._holder.pid}/children").read_text().split()
        )
        self.root = Path(f"/proc/{self.init}/root")
        self.within = ["nsenter", "-t", str(self.init), "-m", "-p", "--"]

    def end(self) -> None:
        assert self._holder.stdin is not None
        self._holder.stdin.close()
        self._holder.wait(60)  # with its init all that is in it dies, and with its mounts all files


class User:
    """Somebody on that machine, with a home; root has one too."""

    def __init__(self, machine: Machine, uid: int) -> None:
        self.machine, self.uid = machine, uid
        self.home = Path(f"/mnt/{uid}")
        self.runs = self.home / "runs"
        self.shm = Path(f"/dev/shm/gms-launch-{uid}")
        drop = ["setpriv", "--reuid", str(uid), "--regid", str(uid), "--clear-groups"] if uid else []
        self.prefix = [*machine.within, *drop]
        self.env = {
            k: v for k, v in os.environ.items() if not k.startswith(("GMS_LAUNCH_", "SLURM_", "COLUMNS", "XDG_"))
        }
        self.env |= {
            "HOME": str(self.home),
            "GMS_LAUNCH_HOME": str(self.runs),
            "PYTHONPATH": f"{REPOSITORY}:{PACKAGES}",
        }
        subprocess.run([*machine.within, "install", "-d", "-m", "755", "-o", str(uid), self.home], check=True, cwd="/")

    def sh(self, script: str, *args: object) -> str:
        """Done by this user; `args` are $1 and so on."""
        argv = [*self.prefix, "sh", "-ec", script, "sh", *map(str, args)]
        done = subprocess.run(argv, capture_output=True, text=True, check=False, cwd="/", timeout=LONG)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def start(self, *argv: object, **environ: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [*self.prefix, *map(str, argv)], env=self.env | environ, cwd="/", start_new_session=True
        )

    def gms_launch(self, *args: object, timeout: float = LONG, **environ: str) -> Done:
        argv = [*self.prefix, python(), "-m", "gms_launch", *map(str, args)]
        return subprocess.run(
            argv, env=self.env | environ, cwd="/", capture_output=True, text=True, timeout=timeout, check=False
        )

    def up(self, run: str, *flags: object, **environ: str) -> Done:
        own = ["--run", run, "--engine", "reference", "--model", "/mnt/model", "--served-model-name", "tiny"]
        own += [f"--{name}-port={free_port()}" for name in ("frontend", "etcd", "etcd-peer", "nats")]
        return self.gms_launch("up", "-d", *own, *flags, **environ)

    def record(self, run: str) -> dict[str, object]:
        found: dict[str, object] = json.loads((self.at(self.runs) / run / "run.json").read_text())
        return found

    def at(self, path: Path) -> Path:
        """A path of that machine as it is reached from here."""
        return self.machine.root / path.relative_to("/")

    def text(self, run: str) -> str | None:
        host, port = str(self.record(run)["frontend_url"]).removeprefix("http://").split(":")
        return complete(host, int(port), "hello", 8)

    def runs_process(self, pid: int) -> bool:
        return not subprocess.run(
            [*self.machine.within, "kill", "-0", str(pid)], check=False, capture_output=True
        ).returncode


def python() -> str:
    """An interpreter that every user may run: this one may be in root's home."""
    for found in (sys.executable, shutil.which(f"python3.{sys.version_info[1]}", path="/usr/bin:/usr/local/bin")):
        # Within a shell: setpriv itself still has root's rights when it executes something.
        argv = [
            "setpriv",
            "--reuid",
            "65533",
            "--regid",
            "65533",
            "--clear-groups",
            "sh",
            "-c",
            '"$0" -c ""',
            str(found),
        ]
        if not subprocess.run(argv, check=False, capture_output=True, cwd="/").returncode:
            return str(found)
    pytest.skip("there is no Python here that other users may run")


@contextlib.contextmanager
def a_machine(*mounts: str) -> Iterator[tuple[User, User, User]]:
    """A machine with a model; root and two users of it."""
    machine = Machine(*mounts)
    try:
        uid = random.randrange(30000, 60000, 2)
        users = User(machine, 0), User(machine, uid), User(machine, uid + 1)
        make(machine.root / "mnt" / "model", 8)
        users[0].sh("chmod -R a+rX /mnt/model")
        yield users
    finally:
        machine.end()


def run_id() -> str:
    return "u" + uuid.uuid4().hex[:6]


@pytest.fixture(scope="module")
def people() -> Iterator[tuple[User, User, User, str]]:
    """Root, A with a living run, and B, who wishes A ill."""
    with a_machine() as (root, a, b):
        run = run_id()
        done = a.up(run)
        assert done.returncode == 0, done.stdout + done.stderr
        yield root, a, b, run
        assert a.gms_launch("down", "--run", run).returncode == 0


# -- sweep as root -------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def unharmed(a: User, run: str) -> Iterator[None]:
    """A's papers and living run are afterwards what they were before."""
    before = a.text(run)
    assert before
    a.sh('mkdir -p "$1/papers" && echo mine >"$1/papers/thesis"', a.home)
    yield
    assert (a.at(a.home / "papers") / "thesis").exists(), "A's files are gone"
    assert a.at(a.shm / run / "agent.lock").exists(), "the files of A's living run are gone"
    assert a.text(run) == before and a.gms_launch("status", "--run", run).returncode == 0


def test_sweep_follows_no_link_that_a_user_put_in_place_of_a_directory(people: tuple[User, User, User, str]) -> None:
    root, a, b, run = people
    b.sh('rm -rf "$2"; ln -s "$1" "$2"', a.home, b.shm)
    with unharmed(a, run):
        assert root.gms_launch("sweep").returncode == 0


def test_sweep_follows_no_mount_of_a_user(people: tuple[User, User, User, str]) -> None:
    root, a, b, run = people
    b.sh('rm -rf "$1" && mkdir -m 755 "$1"', b.shm)
    mounted = b.start(
        *("unshare", "-Um", "--map-root-user", "sh", "-ec"),
        # In a /dev/shm of B's own, or else removing the name outside would end the mount.
        'mount -t tmpfs none /dev/shm; mkdir -p "$1/zz"; mount --bind "$2" "$1/zz"; echo >"$3"; exec sleep 600',
        *("sh", b.shm, a.home, b.home / "ready"),
        GMS_LAUNCH_TAG="zz/0/1/0",
    )
    eventually(lambda: b.at(b.home / "ready").exists())
    with unharmed(a, run):
        assert f"run zz of user {b.uid}" in root.gms_launch("sweep").stdout
        assert mounted.wait(60) == -signal.SIGKILL, "B's own process is dead"


def test_sweep_takes_no_name_for_a_runs_that_is_none(people: tuple[User, User, User, str]) -> None:
    root, a, b, run = people
    b.sh('rm -rf "$1" && mkdir -m 755 "$1"', b.shm)
    tags = ["../c/1/0", "a/b/1/²", "x+²/0/1/0", "/0/1/0", "../../etc/0/1/0", f"zz/0/1/{'9' * 5000}", "zz"]
    tagged = [b.start("sleep", "601", GMS_LAUNCH_TAG=tag) for tag in tags]
    eventually(lambda: len(b.sh("pgrep -u $(id -u) -fx 'sleep 601' || :").split()) == len(tags))
    with unharmed(a, run):
        done = root.gms_launch("sweep")
        assert done.returncode == 0 and "nothing to sweep" in done.stdout, done.stdout + done.stderr
        assert all(one.poll() is None for one in tagged)
    b.sh("pkill -u $(id -u) -fx 'sleep 601'")
    for one in tagged:
        one.wait(60)


def test_one_users_junk_keeps_nobody_elses_run_from_being_swept(people: tuple[User, User, User, str]) -> None:
    root, a, b, run = people
    a.sh(
        'cd "$1"; mkdir -m 700 dead+2 gone; echo >dead+2/agent.lock; echo >gone/agent.lock; ln -s "$2" dead+2/papers',
        a.shm,
        a.home / "papers",
    )
    left = a.start("sleep", "600", GMS_LAUNCH_TAG="dead/0/1/2")
    eventually(lambda: "dead/0/1/2" in a.sh("cat /proc/[0-9]*/environ 2>/dev/null || :"))
    b.sh('rm -rf "$1" && mkdir -m 755 "$1"', b.shm)
    b.sh(
        """
        cd "$1"; mkdir dir sock loop fifo none deep 'x+²' 'x+9999999999'; echo file >file; mkfifo pipe
        mkdir dir/agent.lock; ln -s agent.lock loop/agent.lock; mkfifo fifo/agent.lock; mkfifo fifo/failover.lock
        python3 -c 'import socket; socket.socket(socket.AF_UNIX).bind("sock/agent.lock")'
        echo >none/agent.lock; chmod 0 none/agent.lock
        python3 -c 'import os
for name in range(20000): open(f"junk{name}", "w").close()
os.chdir("deep")
for _ in range(3000): os.mkdir("d"); os.chdir("d")'
        """,
        b.shm,
    )
    with unharmed(a, run):
        dry = root.gms_launch("sweep", "--dry-run")
        assert f"run gone of user {a.uid}: no process, files" in dry.stdout and f"run {run} " not in dry.stdout
        assert a.at(a.shm / "gone").exists() and left.poll() is None
        begun = time.monotonic()
        done = root.gms_launch("sweep")
        assert time.monotonic() - begun < 60.0, "a Slurm epilog has a minute"
        assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
        assert f"uid {b.uid}: {b.shm}/none/agent.lock: Permission denied" in done.stderr
        assert "/deep could not be removed: directories in it are nested too deeply" in done.stderr
        assert f"uid {a.uid}" not in done.stderr
    assert left.wait(60) == -signal.SIGKILL and not a.at(a.shm / "dead+2").exists()
    assert not a.at(a.shm / "gone").exists(), "what is dead is swept all the same"
    for name in ("dir", "sock", "loop", "fifo"):
        assert not b.at(b.shm / name).exists(), f"{name}: no agent made that lock"


def test_what_is_done_for_a_user_is_done_by_a_process_that_is_that_user_for_good() -> None:
    first, second, third = (Owner(uid, uid) for uid in random.sample(range(30000, 60000), 3))
    begun = time.monotonic()

    def work() -> str:
        if os.getuid() == second.uid:
            time.sleep(600)
        if os.getuid() == third.uid:
            os._exit(0)
        bytearray(64 << 20)
        status = Path("/proc/self/status").read_text()
        new = next(line.split()[1] for line in status.splitlines() if line.startswith("NoNewPrivs"))
        caps = next(line.split()[1] for line in status.splitlines() if line.startswith("CapEff"))
        with contextlib.suppress(PermissionError):
            os.setuid(0)
        files = [os.readlink(f"/proc/self/fd/{fd}") for fd in (0, 1, 2)]
        opened = [fd for fd in os.listdir("/proc/self/fd") if int(fd) > 2]
        return json.dumps([os.getresuid(), os.getresgid(), os.getgroups(), new, int(caps, 16), files, len(opened)])

    with mmap.mmap(-1, become.MEMORY, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS):  # as an agent with many threads has
        said = become.each([first, second, third], work, 20.0)
    assert time.monotonic() - begun < 60.0
    uid = first.uid
    assert not said[first].wrong
    assert json.loads(said[first].text) == [[uid] * 3, [uid] * 3, [], "1", 0, ["/dev/null"] * 3, 2]
    assert said[second].wrong == "given up after 20 s", "one who does not answer keeps nobody waiting"
    assert "was killed" in said[third].wrong
    assert os.getuid() == 0


def test_what_the_parent_has_thrown_away_is_not_ended_by_the_child() -> None:
    parent, other = os.getpid(), Owner(random.randrange(30000, 60000), 65534)

    class Thrown:
        """As a channel of gRPC's that nobody has any more: its end needs the threads that it was made with."""

        def __init__(self) -> None:
            self.ring = self

        def __del__(self) -> None:
            if os.getpid() != parent:
                os.abort()

    gc.disable()
    try:
        Thrown()
        said = become.each([other], lambda: f"{gc.collect()} {gc.isenabled()}", LONG)
        assert not gc.isenabled(), "as it was"
    finally:
        gc.enable()
    assert said[other].wrong == "" and said[other].text.endswith(" True")


# -- other verbs, and directories ------------------------------------------------------------------------------------


def planted(b: User, agent: tuple[int, int], run: str = "bait") -> None:
    """A run directory of B's, whose run.json names a process of another."""
    record = {"run": run, "version": "0", "created": 1.0, "leader_host": os.uname().nodename, "node_dir": "/x"}
    record |= {"leader_boot_id": Path("/proc/sys/kernel/random/boot_id").read_text().strip(), "etcd_endpoints": []}
    record |= {"agent_pid": agent[0], "agent_start": agent[1]}
    b.sh(
        'mkdir -p "$1/logs/node0" && chmod -R 755 "$1/.." && echo "$2" >"$1/run.json"', b.runs / run, json.dumps(record)
    )
    b.sh('ln -sf "$2" "$1/logs/agent.log"; ln -sf "$2" "$1/events.jsonl"', b.runs / run, "/mnt/secret")


VERBS: Sequence[Sequence[str]] = (["down"], ["status"], ["logs", "agent"], ["timeline"], ["wait", "--timeout", "1"])


def test_a_run_directory_that_another_user_made_is_not_believed(people: tuple[User, User, User, str]) -> None:
    root, a, b, _ = people
    root.sh("echo the-secret >/mnt/secret; chmod 600 /mnt/secret")
    victim = a.start("sleep", "600")
    pid = int(eventually(lambda: a.sh("pgrep -u $(id -u) -x sleep || :")).split()[-1])
    start = int((a.machine.root / "proc" / str(pid) / "stat").read_text().rpartition(")")[2].split()[19])
    planted(b, (pid, start))
    for who in (root, a):
        for verb in VERBS:
            for named in (["--run", "bait"], []):
                done = who.gms_launch(*verb, *named, GMS_LAUNCH_HOME=str(b.runs))
                assert done.returncode == 3, f"{who.uid} {verb}: {done.stdout}{done.stderr}"
                assert f"belongs to uid {b.uid}" in done.stderr and done.stderr.count("\n") == 1
                assert "the-secret" not in done.stdout + done.stderr
    assert f"sudo -u '#{b.uid}'" in root.gms_launch("down", "--run", "bait", GMS_LAUNCH_HOME=str(b.runs)).stderr
    assert victim.poll() is None, "a process that B chose was ended"
    # where all may write, what is B's is B's, and the rest is found
    done = a.gms_launch(
        "up", "--run", "bait", "--engine", "reference", "--model", "/mnt/model", GMS_LAUNCH_HOME=str(b.runs)
    )
    assert done.returncode == 3 and f"belongs to uid {b.uid}" in done.stderr
    victim.kill()
    victim.wait(60)


def test_directories_in_which_others_may_write_are_refused(people: tuple[User, User, User, str]) -> None:
    _, a, b, _ = people
    a.sh('echo precious >"$1"; mkdir -p "$2" && chmod 777 "$2"', a.home / "file", a.home / "open")
    b.sh('mkdir -p -m 777 "$1" && ln -s "$2" "$1/failover.lock"', b.home / "s", a.home / "file")
    run = run_id()
    for flags, environ, found in (
        (["--gms-socket-dir", b.home / "s"], {}, f"{b.home} belongs to uid {b.uid}"),
        (["--gms-socket-dir", "/dev/shm"], {}, "/dev/shm can be written by everybody"),
        (["--gms-socket-dir", a.home / "open" / "s"], {}, f"{a.home}/open can be written by everybody"),
        (["--cache-dir", b.home / "s"], {}, f"{b.home} belongs to uid {b.uid}"),
        ([], {"XDG_CACHE_HOME": str(b.home)}, f"{b.home} belongs to uid {b.uid}"),
        ([], {"GMS_LAUNCH_HOME": str(a.home / "open" / "h")}, f"{a.home}/open can be written by everybody"),
    ):
        done = a.up(run, *flags, **environ)
        assert done.returncode == 3 and found in done.stderr, f"{flags} {environ}: {done.stderr}"
        assert done.stderr.count("\n") == 1, done.stderr
        assert not a.at(a.shm / run).exists(), "nothing was begun"
    assert a.at(a.home / "file").read_text() == "precious\n"


def test_a_run_begins_though_its_name_is_taken_and_what_was_killed_goes_with_the_next(model: Path) -> None:
    with a_machine() as (root, a, b):
        b.sh('mkdir -m 755 "$1" && ln -s "$2" "$1/one"', a.shm, a.home)
        assert a.up("one").returncode == 0
        place = Path(str(a.record("one")["node_dir"]))
        assert place.parent.name.startswith(f"{a.shm.name}.") and a.at(place).is_dir()
        assert a.at(place).stat().st_uid == a.uid and a.at(place.parent).stat().st_mode & 0o777 == 0o700
        for verb in (["status"], ["logs"], ["timeline"], ["kill-primary"]):
            assert a.gms_launch(*verb).returncode == 0, verb
        assert a.text("one")
        assert "run one is up" in root.gms_launch("sweep", "--run", "one").stderr
        a.sh('kill -9 "$1"', a.record("one")["agent_pid"])
        eventually(lambda: a.text("one") is None)
        eventually(
            lambda: not a.sh("pgrep -u $(id -u) -f gms_launch.process.[g]uard || :"), what="the guard has done its work"
        )
        assert "run one " in root.gms_launch("sweep", "--dry-run").stdout
        assert a.at(place / "etcd").is_dir(), "there is something to clear"
        a.sh('find "$1" -exec touch -h -d "10 minutes ago" {} +', place)
        done = a.up("two")
        assert done.returncode == 0, done.stderr
        assert not a.at(place).exists(), "what is long dead goes with the next start"
        assert a.gms_launch("down", "--run", "two").returncode == 0
        assert b.at(a.shm / "one").is_symlink()

        # No room: nothing is begun, and it is told how much is wanted.
        root.sh("mount -o remount,size=100m /dev/shm")
        done = a.up("three")
        assert done.returncode == 3 and "MiB free, and this node's part of a run may take" in done.stderr, done.stderr
        checked = a.gms_launch("doctor", "--engine", "reference", "--model", "/mnt/model")
        assert checked.returncode == 1 and "FAIL  node-local directory" in checked.stdout
