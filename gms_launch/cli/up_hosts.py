"""`gms-launch up --hosts a,b,c`: an agent on each host by SSH; it lives as long as this command.

Every agent is told to stop on its standard input, and stops at the end of that too, so nothing outlives this command,
however that ends. In a run of groups that is up, an agent that is gone, or whose connection is, is a lost node: another
is started there as soon as its host lets us in.
"""

from __future__ import annotations

import json
import os
import queue
import re
import signal
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import FrameType

from gms_launch.cli import background
from gms_launch.cli.reporters import Notify, Terminal
from gms_launch.errors import LaunchError, NoContactError, UsageError, by_code
from gms_launch.numbers import numbered
from gms_launch.run import rundir, topology
from gms_launch.settings.declared import MOST_NODES, Settings
from gms_launch.settings.rules import host_problem, shortened
from gms_launch.transport import gms_launch, ssh

#: How long after an agent was lost, and then after each try, another is started there (seconds).
AGAIN = 10.0
#: The last word to an agent. Without it, what it reads from is broken.
STOP = "stop\n"
#: What a stop may take beyond kill_wait before the connections are closed under it (seconds).
PATIENCE = 10.0


def main(settings: Settings, detach: bool, notify_fd: int) -> None:
    hosts = checked_hosts(settings)
    if detach:
        background.start(settings)
        return
    reporter: Notify | Terminal = Notify(notify_fd) if notify_fd >= 0 else Terminal()
    try:
        Hosts(hosts, settings, reporter).run()
    except LaunchError as exc:
        reporter.failed(exc)
        raise
    finally:
        reporter.close()


def checked_hosts(settings: Settings) -> list[str]:
    """The hosts, if they fit the other settings. Raises `UsageError`."""
    hosts = expand(settings.hosts)
    if settings.was_set("nnodes") and settings.nnodes != len(hosts):
        raise UsageError(f"--hosts names {numbered(len(hosts), 'host')}, and nnodes is {settings.nnodes}")
    if settings.spares >= len(hosts):
        raise UsageError(f"--spares {settings.spares} of {numbered(len(hosts), 'host')} leaves none for an engine")
    if settings.tp % (len(hosts) - settings.spares) and settings.was_set("tp") and not settings.grouped:
        raise UsageError(f"tp {settings.tp} cannot be spread evenly over {numbered(len(hosts), 'host')}")
    return hosts


def leader_of(hosts: list[str], settings: Settings) -> str:
    """How the hosts reach the first of them: as said, else by the name that leads there from here."""
    if settings.was_set("leader_addr"):
        return settings.leader_addr
    _, name, _ = ssh.split(hosts[0])
    return str(ssh.options(name).get("hostname", name))


def expand(hosts: str) -> list[str]:
    """The hosts of `--hosts`: separated by commas, each [user@]host[:port], with ranges as in node[1-3].

    Raises `UsageError`, also for a host named twice.
    """
    found: list[str] = []
    for part in re.split(r",(?![^\[]*\])", hosts):
        if not part.strip():
            raise UsageError(f"--hosts {shortened(hosts)}: there is an empty name in it")
        names = topology.expand(part.strip()) if "[" in part else [part.strip()]
        found += names
        if len(found) > MOST_NODES:
            raise UsageError(f"--hosts names more than {MOST_NODES} hosts")
    for host, times in Counter(found).items():
        _, name, _ = ssh.split(host)
        if why := host_problem(name):
            raise UsageError(f"--hosts: {shortened(host)}: {why}")
        if times > 1:
            raise UsageError(f"--hosts names {host} twice; one agent runs on each host")
    return found


class Hosts:
    """The agents of a run, each behind its connection."""

    def __init__(self, hosts: list[str], settings: Settings, reporter: Notify | Terminal) -> None:
        self._hosts, self._settings, self._reporter = hosts, settings, reporter
        self._news: queue.Queue[tuple[int, str, str]] = queue.Queue()
        self._failures: dict[int, LaunchError] = {}
        self._connections: list[ssh.Connection] = []
        self._remotes: dict[int, ssh.Remote] = {}
        self._over = threading.Event()
        self._is_up = False

    def run(self) -> None:
        """Until the last agent has ended. Raises what the run failed with."""
        self._connections = self._connect()
        try:
            for rank, connection in enumerate(self._connections):
                self._remotes[rank] = connection.start(self._argv(rank), self._secrets())
            for sig in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                signal.signal(sig, self._signalled)
            for rank, remote in self._remotes.items():
                threading.Thread(target=self._read, args=(rank, remote), daemon=True).start()
            self._follow()
        finally:
            self._over.set()
            for connection in self._connections:
                connection.close()
        if self._failures:
            # Two agents may fail for one reason; the one that failed by itself says it best.
            raise min(self._failures.values(), key=lambda e: e.exit_code not in (2, 3, 4))

    def _connect(self) -> list[ssh.Connection]:
        """All connections, or none and an error that names every host that could not be reached."""

        def one(host: str) -> ssh.Connection | NoContactError:
            try:
                return ssh.connect(host)
            except NoContactError as exc:
                return exc

        with ThreadPoolExecutor(min(32, len(self._hosts))) as pool:
            found = list(pool.map(one, self._hosts))
        errors = [f for f in found if isinstance(f, NoContactError)]
        connections = [f for f in found if isinstance(f, ssh.Connection)]
        if errors:
            for connection in connections:
                connection.close()
            raise NoContactError("nothing was started: " + "; ".join(map(str, errors)))
        return connections

    def _argv(self, rank: int) -> list[str]:
        settings, nnodes = self._settings, len(self._hosts)
        named = {"hosts", "nnodes", "node_rank", "run_id", "leader_addr"}
        own = replace(settings, sources={k: v for k, v in settings.sources.items() if k not in named})
        flags = [f"--run={settings.run_id}", f"--nnodes={nnodes}", f"--node-rank={rank}"]
        if nnodes > 1:
            flags.append(f"--leader-addr={leader_of(self._hosts, self._settings)}")
        # In the working directory of this command where the host has it, as srun does: paths may be relative.
        read = "".join(f"IFS= read -r {name}; export {name}; " for name in background.as_environment(settings))
        here = ["sh", "-c", f'{read}cd -- "$0" 2>/dev/null; exec "$@"', os.getcwd()]
        home = ["env", f"GMS_LAUNCH_HOME={rundir.home().absolute()}"]
        return [*here, *home, *gms_launch("up", "--until-eof", "--notify-fd=1", *flags, *background.as_flags(own))]

    def _secrets(self) -> str:
        """What an agent gets before anything else on its standard input: anybody there can read its command line."""
        return "".join(f"{value}\n" for value in background.as_environment(self._settings).values())

    def _read(self, rank: int, remote: ssh.Remote) -> None:
        """In a thread: pass on what one agent says, and how it ended."""
        said = ""
        try:
            for line in remote.lines():
                try:
                    message = dict(json.loads(line))
                except (ValueError, TypeError):  # what the host's own shell says before it, say
                    self._news.put((rank, "progress", line))
                    continue
                for kind in ("progress", "ready"):
                    if kind in message:
                        self._news.put((rank, kind, message[kind]))
                said = message.get("failed", said)
            code, errors = remote.exit_code(), remote.errors()
        except OSError as exc:
            code, errors = -1, str(exc)
        if code == -1:
            said = said or "the connection broke; its agent stops by itself when it notices"
        self._news.put((rank, "ended", json.dumps([code, said or errors.removeprefix("gms-launch: ")])))

    def _again(self, rank: int) -> None:
        """In a thread: start another agent on a host as soon as it lets us in, and read what that says."""
        while not self._over.wait(AGAIN):
            self._connections[rank].close()
            try:
                self._connections[rank] = ssh.connect(self._hosts[rank])
                remote = self._remotes[rank] = self._connections[rank].start(self._argv(rank), self._secrets())
            except NoContactError:
                continue  # that it is away has been said
            if self._over.is_set():
                remote.end_input(STOP)
            self._news.put((rank, "again", "another agent was started"))
            self._read(rank, remote)
            return

    def _signalled(self, number: int, _: FrameType | None) -> None:
        self._news.put((-1, "stop", f"signal {signal.Signals(number).name}"))

    def _follow(self) -> None:
        running = set(self._remotes)
        deadline: float | None = None

        def stop(why: str) -> None:
            nonlocal deadline
            if deadline is None:
                self._reporter.progress(f"stopping: {why}")
                deadline = time.monotonic() + self._settings.kill_wait + PATIENCE
                self._over.set()
                for remote in list(self._remotes.values()):
                    remote.end_input(STOP)

        while running:
            try:
                # Python runs a signal's handler only between waits that end.
                rank, kind, text = self._news.get(
                    timeout=0.5 if deadline is None else max(0.01, deadline - time.monotonic())
                )
            except queue.Empty:
                if deadline is not None and time.monotonic() > deadline:
                    left = ", ".join(self._hosts[r] for r in sorted(running))
                    self._failures[-1] = NoContactError(
                        f"no word of their end came from {left}; look with `gms-launch down`"
                    )
                    return
                continue
            if kind == "stop":
                stop(text)
            elif kind == "progress":
                self._reporter.progress(f"{self._hosts[rank]}: {text}")
            elif kind == "ready" and rank == 0:
                self._is_up = True
                self._reporter.ready(text)
            elif kind == "again":
                running.add(rank)
                self._reporter.progress(f"{self._hosts[rank]}: {text}")
            elif kind == "ended":
                running.discard(rank)
                code, said = json.loads(text)
                where, said = self._hosts[rank], said or f"ended with code {code}"
                if code and rank and deadline is None and self._settings.grouped and self._is_up:
                    more = "" if code == UsageError.exit_code else ", another is started when the host lets us in"
                    self._reporter.progress(f"{where}: its agent is lost ({said}), the others go on{more}")
                    if more:
                        threading.Thread(target=self._again, args=(rank,), daemon=True).start()
                    continue
                if code:
                    self._failures[rank] = by_code(code, f"{where}: {said}")
                # One agent is missing: the cohorts, which span all hosts, are broken; or the run is over.
                stop(f"the agent on {where} has ended" + (f" with code {code}" if code else ""))
