"""A real Slurm cluster on one machine: slurmctld and a slurmd per node, each node in namespaces of its own.

    with Lab(nodes=3) as lab:
        lab.run(["srun", "-N3", "hostname"])          # from the "login node": this machine
        lab.node("node2").run(["ip", "addr"])         # inside a node
        lab.node("node2").cut()                       # and what can happen to one

Needs root. A node is one `unshare` whose first process is `nodeinit.sh`: killing that kills the node. Nodes share this
machine's file system (the shared home) and have /dev/shm, /run and a network of their own, joined by a bridge.
Nothing has a route to anywhere else. Several labs may run side by side.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from gms_launch.process import lifecycle, proc

HERE = Path(__file__).parent
FREEZER = Path("/sys/fs/cgroup/freezer")
#: Where there is no such hierarchy, nodes cannot be frozen, and Slurm does not run.
INTO_CGROUP = '[ ! -d "$0" ] || echo $$ > "$0/cgroup.procs"; '
#: Labs of this process that are not closed, half-made ones too.
OPEN: list[Lab] = []


def sh(*argv: str, check: bool = True) -> str:
    """Run a command of the lab's own; its error becomes ours."""
    done = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=120)
    if check and done.returncode:
        raise RuntimeError(f"{' '.join(argv)}: exit code {done.returncode}: {done.stdout}{done.stderr}")
    return done.stdout


def wait_for(look: object, timeout: float, what: str) -> None:
    deadline = time.monotonic() + timeout
    while not look():  # type: ignore[operator]
        if time.monotonic() > deadline:
            raise RuntimeError(f"not within {timeout:g} s: {what}")
        time.sleep(0.02)


def end(who: proc.ProcessId) -> None:
    """SIGKILL that very process, if it lives."""
    if (gone := lifecycle.kill_process(who)) is not None:
        os.close(gone)


class Node:
    """One machine of the lab."""

    def __init__(self, lab: Lab, name: str, address: str) -> None:
        self.lab, self.name, self.address = lab, name, address
        self.dir = lab.dir / "nodes" / name
        self.veth = f"{lab.bridge}{name.removeprefix('node')}"
        self.netns = f"{lab.bridge}-{name}"
        self.cgroup = FREEZER / f"{lab.bridge}-{name}"
        self._unshare: subprocess.Popen[bytes] | None = None
        self.init: proc.ProcessId | None = None

    # -- life ----------------------------------------------------------------------------------------------------

    def start(self, daemons: bool = True) -> None:
        """Boot it: namespaces, network, and slurmd and sshd (slurmctld on the controller)."""
        self.dir.mkdir(parents=True, exist_ok=True)
        (self.dir / "ready").unlink(missing_ok=True)
        if FREEZER.is_dir():
            self.cgroup.mkdir(exist_ok=True)
        with open(self.dir / "init.log", "wb") as log:
            # Into its freezer cgroup before the cgroup namespace is made, so that this is the namespace's root.
            self._unshare = subprocess.Popen(
                [
                    *("bash", "-c", INTO_CGROUP + 'exec "$@"', str(self.cgroup)),
                    # Whatever kills the tests kills the node.
                    *(
                        "setpriv",
                        "--pdeathsig",
                        "KILL",
                        "unshare",
                        "--kill-child",
                        "--fork",
                        "--pid",
                        "--mount",
                        "--uts",
                        "--ipc",
                        "--net",
                        "--cgroup",
                    ),
                    *(str(HERE / "nodeinit.sh"), self.name, str(self.dir)),
                ],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        wait_for((self.dir / "ready").exists, 180, f"{self.name} boots: {self.dir / 'init.log'}")
        (pid,) = proc.children(self._unshare.pid)
        self.init = proc.identity(pid)
        sh("ip", "netns", "del", self.netns, check=False)
        sh("ip", "netns", "attach", self.netns, str(pid))
        sh("ip", "link", "add", self.veth, "type", "veth", "peer", "name", "eth0", "netns", self.netns)
        sh("ip", "link", "set", self.veth, "master", self.lab.bridge, "up")
        sh("ip", "-n", self.netns, "addr", "add", f"{self.address}/24", "dev", "eth0")
        sh("ip", "-n", self.netns, "link", "set", "eth0", "up")
        if daemons:
            self.start_daemons()

    def start_daemons(self) -> None:
        if self.name == "ctl":
            self.run(["slurmctld"], check=True)
            return
        self.run(["slurmd"], check=True)
        etc = self.lab.dir / "etc"
        options = ["-o", f"ListenAddress={self.address}", "-E", str(self.dir / "log" / "sshd.log")]
        self.run(["/usr/sbin/sshd", "-f", str(etc / "sshd_config"), *options], check=True)

    def _argv(self, argv: Sequence[str]) -> list[str]:
        assert self.init is not None
        enter = 'exec nsenter -t "$1" -m -u -i -n -p -C -- /bin/sh -c \'cd "$0"; exec "$@"\' "${@:2}"'
        return [
            "bash",
            "-c",
            INTO_CGROUP + enter,
            str(self.cgroup),
            str(self.init.pid),
            os.getcwd(),
            *argv,
        ]

    def popen(self, argv: Sequence[str], env: dict[str, str] | None = None, **options: object) -> subprocess.Popen[str]:
        """Start a command on the node. Signals to it reach nsenter only: see `pid_of`."""
        return subprocess.Popen(self._argv(argv), env=self.lab.env | (env or {}), text=True, **options)  # type: ignore[call-overload,no-any-return]

    def run(
        self, argv: Sequence[str], env: dict[str, str] | None = None, check: bool = False, timeout: float = 180.0
    ) -> subprocess.CompletedProcess[str]:
        with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
            # Files, not pipes: a daemon that keeps its standard output would keep a pipe open.
            done = subprocess.run(
                self._argv(argv),
                env=self.lab.env | (env or {}),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                timeout=timeout,
                check=False,
            )
            out.seek(0)
            err.seek(0)
            result = subprocess.CompletedProcess(argv, done.returncode, out.read(), err.read())
        if check and result.returncode:
            raise RuntimeError(f"{argv} on {self.name}: {result.returncode}: {result.stdout}{result.stderr}")
        return result

    def pids(self, *names: str) -> list[int]:
        """Processes of the node by command name, as this machine numbers them."""
        if self.init is None:
            return []
        namespace = os.readlink(f"/proc/{self.init.pid}/ns/pid")
        found = []
        for pid in proc.pids():
            with contextlib.suppress(OSError):
                if os.readlink(f"/proc/{pid}/ns/pid") == namespace and (info := proc.stat(pid)) and info.comm in names:
                    found.append(pid)
        return found

    # -- what can happen to it -----------------------------------------------------------------------------------

    def cut(self) -> None:
        """Pull the cable."""
        sh("ip", "link", "set", self.veth, "down")

    def join(self) -> None:
        """Put the cable back."""
        sh("ip", "link", "set", self.veth, "up")

    def mute(self, peer: Node) -> None:
        """One way only: whatever this node sends to `peer` is lost without a word, as by a wrong hardware address."""
        wrong = ["lladdr", "02:de:ad:00:00:01", "dev", "eth0", "nud", "permanent"]
        sh("ip", "-n", self.netns, "neigh", "replace", peer.address, *wrong)

    def unmute(self, peer: Node) -> None:
        sh("ip", "-n", self.netns, "neigh", "del", peer.address, "dev", "eth0")

    def freeze(self) -> None:
        """Stop every process; the kernel's network stack lives on."""
        (self.cgroup / "freezer.state").write_text("FROZEN")

    def thaw(self) -> None:
        (self.cgroup / "freezer.state").write_text("THAWED")

    def power_off(self) -> None:
        """The cable first, so that nobody gets a farewell; then every process."""
        self.cut()
        self._kill_init()
        sh("ip", "link", "del", self.veth, check=False)

    def _kill_init(self) -> None:
        if self.init is not None:
            end(self.init)
        if self._unshare is not None:
            if self.init is None:  # interrupted while it booted
                for pid in [*proc.children(self._unshare.pid), self._unshare.pid]:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
            deadline = time.monotonic() + 60
            while self._unshare.poll() is None and time.monotonic() < deadline:
                # A namespace ends when all in it are reaped, and a subreaper (bench/stopping.py) has its orphans.
                lifecycle.reap_orphans(frozenset({self._unshare.pid}))
                time.sleep(0.02)
            self._unshare.wait(1)
            self._unshare = None

    def kill(self, name: str) -> None:
        """SIGKILL every process of that command name on the node."""
        for pid in self.pids(name):
            with contextlib.suppress(ProcessLookupError):  # of several, one may end with another
                os.kill(pid, signal.SIGKILL)

    def stop(self) -> None:
        if self.cgroup.exists():
            self.thaw()  # a frozen process cannot die
        self._kill_init()
        sh("ip", "netns", "del", self.netns, check=False)
        sh("ip", "link", "del", self.veth, check=False)
        for path in sorted(self.cgroup.rglob("*"), reverse=True):
            if path.is_dir():
                with contextlib.suppress(OSError):
                    path.rmdir()
        with contextlib.suppress(OSError):
            self.cgroup.rmdir()


class Lab:
    """The cluster. Times in seconds; `kill_wait` and `slurmd_timeout` are Slurm's."""

    def __init__(
        self,
        nodes: int = 3,
        gpus: int = 4,
        kill_wait: int = 20,  # not the default, so that it is seen whether Slurm was asked
        slurmd_timeout: int = 60,
        epilog: str = "",
        slurm: bool = True,
    ) -> None:
        if os.geteuid() != 0:
            raise RuntimeError("the lab makes namespaces and needs root")
        self.net = self.bridge = ""
        self._all: list[Node] = []
        self._munged: proc.ProcessId | None = None
        OPEN.append(self)
        self.dir = Path(
            tempfile.mkdtemp(prefix=f"lab-{os.getpid()}-", dir="/tmp")
        )  # short: munge's socket has a path in it
        self._slurm = slurm
        self._gpus, self._epilog = gpus, epilog
        self._kill_wait, self._slurmd_timeout = kill_wait, slurmd_timeout
        self._pick_network()
        self.nodes = {f"node{k}": Node(self, f"node{k}", f"{self.net}.{k}") for k in range(1, nodes + 1)}
        self.controller = Node(self, "ctl", f"{self.net}.100")
        self._all = [*self.nodes.values(), self.controller]
        tools = Path(sys.executable).parent
        self.env = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "GMS_LAUNCH_"))}
        self.env |= {
            "SLURM_CONF": str(self.dir / "etc" / "slurm.conf"),
            "PATH": f"{tools}:/usr/sbin:/usr/bin:/sbin:/bin",
            "GMS_LAUNCH_HOME": str(self.dir / "home"),
            # Clients look for munge's socket where slurm.conf says; no proxy stands between the nodes.
            "no_proxy": "*",
        }

    def _pick_network(self) -> None:
        """A bridge and a /24 that nobody uses; the bridge's creation decides between two labs."""
        for _ in range(50):
            number = random.randrange(100, 250)  # three digits: with a node's number behind it no other lab's name
            self.net, self.bridge = f"10.{random.randrange(64, 128)}.{number}", f"lab{os.getpid() % 10000}x{number}"
            taken = sh("ip", "-4", "route", "show", "root", f"{self.net}.0/24")
            if taken or Path(f"/sys/class/net/{self.bridge}").exists():
                continue
            sh("ip", "link", "add", self.bridge, "type", "bridge", check=False)
            if Path(f"/sys/class/net/{self.bridge}").exists():
                return
        raise RuntimeError("no free network was found")

    def node(self, name: str) -> Node:
        return self.nodes[name]

    @property
    def names(self) -> list[str]:
        return list(self.nodes)

    def split(self, *names: str) -> None:
        """Nothing that these nodes send reaches the others any more, nor the other way; this machine hears both."""
        for one, other in self._across(names):
            one.mute(other)
            other.mute(one)

    def heal(self, *names: str) -> None:
        for one, other in self._across(names):
            one.unmute(other)
            other.unmute(one)

    def _across(self, names: Sequence[str]) -> list[tuple[Node, Node]]:
        return [(self.nodes[n], node) for n in names for node in self.nodes.values() if node.name not in names]

    # -- up and down ---------------------------------------------------------------------------------------------

    def __enter__(self) -> Lab:
        try:
            self._write_files()
            # Without the bridge, or with a node gone, these addresses must not leave by a default route.
            sh("ip", "route", "add", "unreachable", f"{self.net}.0/24", "metric", "9999")
            sh("ip", "addr", "add", f"{self.net}.254/24", "dev", self.bridge)
            sh("ip", "link", "set", self.bridge, "up")
            if not self._slurm:
                for node in self.nodes.values():
                    node.start(daemons=False)
                return self
            self._start_munge()
            self.controller.start()
            for node in self.nodes.values():
                node.start()
            wait_for(self.all_idle, 300, f"all nodes idle: {self.dir}")
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def all_idle(self) -> bool:
        states = self.run(["sinfo", "-h", "-N", "-o", "%T"]).stdout.split()
        return states == ["idle"] * len(self.nodes)

    def _write_files(self) -> None:
        etc = self.dir / "etc"
        for path in (etc, self.dir / "state", self.dir / "munge", self.dir / "home", self.dir / "dev"):
            path.mkdir()
        hosts = ["127.0.0.1 localhost", f"{self.net}.100 ctl", f"{self.net}.254 login"]
        hosts += [f"{n.address} {n.name}" for n in self.nodes.values()]
        (etc / "hosts").write_text("\n".join(hosts) + "\n")
        (etc / "resolv.conf").write_text("")
        if not self._slurm:
            return
        (etc / "munge.key").write_bytes(os.urandom(128))
        (etc / "munge.key").chmod(0o400)
        count, gpus = len(self.nodes), self._gpus
        epilog = ""
        if self._epilog:
            (etc / "epilog.sh").write_text(self._epilog)
            (etc / "epilog.sh").chmod(0o755)
            epilog = f"Epilog={etc}/epilog.sh"
        (etc / "slurm.conf").write_text(
            f"""ClusterName=lab
SlurmctldHost=ctl({self.net}.100)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={self.dir}/munge/munge.sock
CredType=cred/munge
StateSaveLocation={self.dir}/state
SlurmdSpoolDir={self.dir}/nodes/%n/spool
SlurmctldPidFile={self.dir}/slurmctld.pid
SlurmdPidFile={self.dir}/nodes/%n/slurmd.pid
SlurmctldLogFile={self.dir}/slurmctld.log
SlurmdLogFile={self.dir}/nodes/%n/log/slurmd.log
MailProg=/bin/true
ProctrackType=proctrack/cgroup
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/builtin
SlurmdParameters=config_overrides
ReturnToService=2
SlurmdTimeout={self._slurmd_timeout}
SlurmctldTimeout=10
KillWait={self._kill_wait}
UnkillableStepTimeout=20
MessageTimeout=10
TCPTimeout=2
MinJobAge=60
InactiveLimit=0
Waittime=0
GresTypes=gpu
{epilog}
NodeName=node[1-{count}] NodeAddr={self.net}.[1-{count}] CPUs=16 RealMemory=4000 Gres=gpu:{gpus} State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""
        )
        for index in range(gpus):
            os.mknod(self.dir / "dev" / f"nvidia{index}", 0o666 | 0o020000, os.makedev(1, 3))
        (etc / "gres.conf").write_text(f"Name=gpu File={self.dir}/dev/nvidia[0-{gpus - 1}]\n")
        (etc / "cgroup.conf").write_text(
            "CgroupPlugin=cgroup/v1\nCgroupMountpoint=/sys/fs/cgroup\nCgroupAutomount=no\n"
            "ConstrainCores=no\nConstrainRAMSpace=no\nConstrainDevices=no\n"
        )
        for name in ("id_ed25519", "ssh_host_ed25519_key"):
            sh("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(etc / name))
        shutil.copy(etc / "id_ed25519.pub", etc / "authorized_keys")
        (etc / "sshd_config").write_text(
            f"""HostKey {etc}/ssh_host_ed25519_key
AuthorizedKeysFile {etc}/authorized_keys
PidFile none
StrictModes no
UsePAM no
PermitRootLogin prohibit-password
PasswordAuthentication no
KbdInteractiveAuthentication no
UseDNS no
PrintMotd no
Subsystem sftp internal-sftp
SetEnv SLURM_CONF={etc}/slurm.conf
"""
        )

    def _start_munge(self) -> None:
        munge = self.dir / "munge"
        munge.chmod(0o755)
        sh(
            *("munged", f"--key-file={self.dir}/etc/munge.key", f"--socket={munge}/munge.sock"),
            *(f"--pid-file={munge}/pid", f"--log-file={munge}/log", f"--seed-file={munge}/seed"),
            *("--num-threads=4", "--force"),
        )
        wait_for(lambda: (munge / "pid").exists() and (munge / "pid").read_text().strip(), 180, "munged")
        self._munged = proc.identity(int((munge / "pid").read_text()))

    def close(self) -> None:
        """Remove every trace; safe after a start that failed half-way, and twice."""
        if self not in OPEN:
            return
        conf = f"SLURM_CONF={self.dir}/etc/slurm.conf".encode()
        for pid in proc.pids():  # clients hang for ever once the cluster is gone
            info = proc.stat(pid)
            if info is None or info.comm not in ("srun", "sbatch", "salloc", "scancel", "squeue", "sinfo"):
                continue
            with contextlib.suppress(OSError):
                if conf in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
                    os.kill(pid, signal.SIGKILL)
        with contextlib.ExitStack() as each:  # one that fails keeps nothing of the others; the last is called first
            each.callback(self._forget)
            if self.bridge:
                each.callback(
                    sh, "ip", "route", "del", "unreachable", f"{self.net}.0/24", "metric", "9999", check=False
                )
                each.callback(sh, "ip", "link", "del", self.bridge, check=False)
            if self._munged is not None:
                each.callback(end, self._munged)
            for node in reversed(self._all):
                each.callback(node.stop)

    def _forget(self) -> None:
        OPEN.remove(self)
        if not os.environ.get("LAB_KEEP"):
            shutil.rmtree(self.dir, ignore_errors=True)

    # -- use -----------------------------------------------------------------------------------------------------

    def run(
        self, argv: Sequence[str], env: dict[str, str] | None = None, timeout: float = 180.0
    ) -> subprocess.CompletedProcess[str]:
        """A command on the login node."""
        return subprocess.run(
            argv,
            env=self.env | (env or {}),
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
            stdin=subprocess.DEVNULL,
        )

    def popen(self, argv: Sequence[str], env: dict[str, str] | None = None, **options: object) -> subprocess.Popen[str]:
        return subprocess.Popen(  # type: ignore[call-overload,no-any-return]
            argv, env=self.env | (env or {}), text=True, stdin=subprocess.DEVNULL, start_new_session=True, **options
        )
