"""`gms-launch up`: become this node's agent, or with -d start one in the background and wait until it is ready."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import secrets
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

from gms_launch import __version__, engines
from gms_launch.cli import background, supervised
from gms_launch.cli.reporters import Notify, Terminal
from gms_launch.control.keys import Keys
from gms_launch.engines.base import LOOPBACK
from gms_launch.errors import LaunchError, RefusedError, UsageError
from gms_launch.observe import snapshot, words
from gms_launch.observe.stamp import Formatter, stamp
from gms_launch.process import places, proc
from gms_launch.run import contact, credentials, dead, model, nodedir, outside, parts, ports, rundir, topology
from gms_launch.run.credentials import Credentials
from gms_launch.run.nodedir import NodeDir
from gms_launch.run.plan import Layout
from gms_launch.run.rundir import RunDir, RunFile
from gms_launch.run.topology import Topology
from gms_launch.settings.declared import Settings
from gms_launch.settings.resolve import checked
from gms_launch.spool.reading import PATIENCE, within
from gms_launch.spool.writer import LogHandler, Writer
from gms_launch.urls import public

if TYPE_CHECKING:
    from gms_launch.node.agent import Agent

#: What the last writes to the run directory may take (seconds).
LAST_WRITES = 3.0


def main(settings: Settings, detach: bool, notify_fd: int, until_eof: bool) -> None:
    settings = named(settings)
    manager = supervised.taken()
    if settings.hosts:
        from gms_launch.cli import up_hosts

        up_hosts.main(settings, detach, notify_fd)
        return
    settings = with_kill_wait(settings)
    place = topology.discover(settings)
    with contextlib.closing(ports.Reservation(place.address, LOOPBACK)) as reservation:
        # Everything that can go wrong on this node, before the leader is looked for.
        layout = prepare(settings, place, reservation)
        if detach:
            # The background agent makes its own reservation, of the same ports.
            reservation.close()
            background.start(settings)
        else:
            reporter: Notify | Terminal
            if notify_fd >= 0:
                reporter = Notify(notify_fd, stays=until_eof)
            else:
                reporter = supervised.Supervised(layout, manager) if manager else Terminal(layout)
            _agent(layout, reservation, reporter, until_eof)


def _agent(layout: Layout, reservation: ports.Reservation, reporter: Notify | Terminal, until_eof: bool) -> None:
    """Look for the leader if it is another node, and be this node's agent."""
    moved = not layout.founds
    try:
        if layout.founds:
            place = layout.topology
            hosts = (place.leader_address, place.address)
            begun = replace(layout, credentials=credentials.make(hosts, outside.pem(layout.settings)))
            if others := ports.moved(layout.settings, layout.ports):
                reporter.progress(f"ports in use here, so others were taken: {others}")
            for text in parts.unseen(layout) if layout.settings.grouped else ():
                reporter.progress(f"{text}; its own must have it")
            moved = run_agent(parts.with_groups(begun, reservation.free), reporter, until_eof)
        again = False
        while moved:  # it has another node rank now
            with _told(layout, again):
                followed = parts.with_groups(follow(layout, reservation, reporter.progress), reservation.free)
            moved, again = run_agent(followed, reporter, until_eof, again), True
    except LaunchError as exc:
        reporter.failed(exc)
        raise
    finally:
        reporter.close()


@contextlib.contextmanager
def _told(layout: Layout, again: bool) -> Iterator[None]:
    """What keeps an agent that was there before (`again`) from its new place: nobody reads what `up` says by then, so
    its log has it, and the run's leader makes it the event `node_refused`.
    """
    try:
        yield
    except LaunchError as exc:
        if again:
            place = layout.topology
            text = f"{place.host} (agent {os.getpid()}), which was given node rank {place.node_rank}, ends: {exc}"
            within(PATIENCE, lambda: _append(layout.log_dir / "agent.log", text), None)
            with contextlib.suppress(LaunchError):
                if (run := layout.run_dir.read()) is not None:
                    with contextlib.closing(contact.door(layout.run_dir, run)) as door:
                        who = f"{proc.boot_id()}-{os.getpid()}"
                        door.put(Keys(layout.run).refusal(who), public(text).encode())
        raise


def _append(log: Path, text: str) -> None:
    with open(log, "a", encoding="utf-8") as file:
        file.write(f"{stamp(time.time())} ERROR {public(text)}\n")


def named(settings: Settings) -> Settings:
    """The settings with a run id: given, Slurm's job, what the nodes agree on without being told, or made up."""
    if settings.run_id:
        return settings
    chosen = rundir.slurm_run_id(os.environ)
    if not chosen and settings.nnodes > 1 and settings.was_set("leader_addr"):
        chosen = rundir.shared_run_id(settings.leader_addr)
    source = {"run_id": "SLURM_JOB_ID" if chosen else "made up"}
    return checked(replace(settings, run_id=chosen or rundir.new_run_id(), sources={**settings.sources, **source}))


def with_kill_wait(settings: Settings) -> Settings:
    """Under Slurm an orderly stop must fit into its KillWait, which only Slurm knows."""
    if settings.was_set("kill_wait") or not rundir.slurm_run_id(os.environ):
        return settings
    from gms_launch.transport import slurm

    wait = slurm.kill_wait()
    if wait is None:
        return settings
    return checked(replace(settings, kill_wait=wait, sources={**settings.sources, "kill_wait": "Slurm's KillWait"}))


def prepare(settings: Settings, place: Topology, reservation: ports.Reservation) -> Layout:
    """Everything that can go wrong before something is started. Raises `UsageError` and `RefusedError`."""
    run = settings.run_id
    if not proc.own_numbers():
        raise UsageError(
            "/proc shows another pid namespace than this process is in, as in a container without a /proc of its own: "
            "nothing here could be told alive or dead; give it one (`unshare --mount-proc`, docs/containers.md)"
        )
    free = reservation.free if place.is_leader else lambda _: True
    layout = Layout(
        run=run,
        settings=settings,
        topology=place,
        ports=ports.layout(settings, free, engines.get(settings.engine, settings.engine_file).ports),
        credentials=Credentials.hidden(""),
        run_dir=RunDir.of(run),
        node_dir=NodeDir.of(run, settings.gms_socket_dir, place.node_rank),
        attempt=secrets.token_hex(8),
        origin=place.node_rank,
    )
    layout.check()
    if settings.grouped:
        parts.check(layout)
    layout.node_dir.usable()
    places.check(rundir.home(), "GMS_LAUNCH_HOME")
    nodedir.must_be_writable(rundir.home(), "GMS_LAUNCH_HOME")
    places.check(layout.cache_dir, "--cache-dir", private=True)
    dead.make_room(layout.node_dir.path.name, layout.local_room)
    if place.is_leader:
        topology.must_be_ours(settings.frontend_host, "--frontend-host")
        if layout.role_moves and _goes_on(layout):
            return replace(layout, follows=True)
        layout.run_dir.refuse_live(rundir.slurm_step(os.environ))
    return layout


def _goes_on(layout: Layout) -> bool:
    from gms_launch.run import rendezvous

    return rendezvous.goes_on(layout.run_dir)


def follow(layout: Layout, reservation: ports.Reservation, progress: Callable[[str], None]) -> Layout:
    """The layout of a node that is not the leader, completed by what the leader decided. Waits for it."""
    from gms_launch.run import rendezvous

    settings = layout.settings
    found = rendezvous.find_leader(layout.run_dir, settings, layout.topology, progress)
    layout.store.learn(found.run.etcd_endpoints if layout.store.several else ())
    place = topology.at_leader(layout.topology, found.run.leader_address, chosen=bool(settings.interface))
    rank, seat = found.seat_of(layout.origin)
    first = place.address if rank == 0 else place.leader_address
    layout = replace(layout, topology=replace(place, node_rank=rank, leader_address=first), seat=seat, follows=True)
    member, front = layout.store.is_member and layout.store.several, layout.front.here
    free, extra, near = reservation.free, layout.engine.ports, layout.store.several
    return replace(
        layout,
        node_dir=NodeDir.of(layout.run, settings.gms_socket_dir, rank),
        ports=ports.follow(settings, found.run.ports, free, extra, member, front, near),
        credentials=layout.run_dir.credentials(),
        attempt=found.run.attempt,
        differences=found.differences,
        clock_skew=found.clock_skew,
    )


def run_agent(layout: Layout, reporter: Notify | Terminal, until_eof: bool, again: bool = False) -> bool:
    """Be the agent until the run ends, or until this node has another rank; says whether it has. `again`: it had one.

    Raises what ended it early.
    """
    from gms_launch.node.agent import Agent

    record = run_file(layout)
    leader = layout.founds
    with _told(layout, again):
        _make_places(layout, record)
    writer = Writer(layout.run_dir.path, layout.log_dir, layout.node_dir.path, layout.settings.log_max_mib * 2**20)
    agent_log = layout.run_dir.agent_log if leader else layout.log_dir / "agent.log"
    lines = LogHandler(writer.append, agent_log)
    lines.setFormatter(Formatter())
    logging.basicConfig(level=logging.INFO, handlers=[lines], force=True)  # what was said before made one of its own
    agents: list[Agent] = []

    async def live() -> None:
        agent = Agent(layout, writer, reporter.progress, reporter.changed)
        agents.append(agent)
        agent.node.record = record
        loop = asyncio.get_running_loop()

        async def announce_end() -> None:
            await agent.node.stopping.wait()
            if not agent.node.has_moved:
                reporter.stopping()

        async def announce() -> None:
            await agent.node.ready.wait()
            models = [p.group.model_name for p in parts.placed(layout)] if layout.settings.grouped else []
            served = model.named(models or [layout.model_name])
            front = layout.front
            if front.number > 1:
                entrances = words.entrances(snapshot.build(agent.node.mirror), front.number)
                reporter.ready(f"{entrances}, {served}")
            else:
                reporter.ready(f"{front.url}/v1/completions, {served}{front.hint}")

        if until_eof:
            loop.add_reader(0, _input_ended, agent, loop)
        if "SLURM_STEP_ID" in os.environ and isinstance(reporter, Terminal):
            _watch_parent(agent, loop)  # a background agent outlives its parent, and so it should
        waiting = [loop.create_task(announce()), loop.create_task(announce_end())]
        try:
            await agent.run()
        finally:
            for task in waiting:
                task.cancel()

    code, reason = 1, "the agent was interrupted"
    try:
        asyncio.run(live())
        code, reason = 0, ""
    except LaunchError as exc:
        logging.error("%s", exc)
        code, reason = exc.exit_code, public(str(exc))
        raise
    except Exception as exc:
        logging.exception("internal error")
        reason = public(f"internal error in the agent: {exc!r}")
        raise LaunchError(reason) from exc
    finally:
        leader = agents[0].node.ends_run if agents else leader
        if leader:
            ends = agents[0].node.ends if agents else ()
            end = replace(
                (agents[0].node.record if agents else None) or record,
                ended=time.time(),
                exit_code=code,
                reason=reason,
                nodes=ends,
            )
            writer.replace(layout.run_dir.run_json, end.to_json())
        if wrong := writer.close(LAST_WRITES):
            lost = f"{writer.unwritten} entries of the events and the agent's log were not written there"
            reporter.progress(f"the run directory {layout.run_dir.path} is {wrong}: {lost}")
            if leader:
                end = replace(end, unwritten=writer.unwritten)
                with contextlib.suppress(OSError):
                    layout.run_dir.leave_end(layout.node_dir, end)
    return agents[0].node.has_moved


def _make_places(layout: Layout, record: RunFile) -> None:
    """The directories of this node's part of the run, with what others must find there. Raises `RefusedError`."""
    new = not layout.node_dir.path.exists()
    try:
        layout.node_dir.create()
        for part in layout.parts:
            part.node_dir.check()
            part.node_dir.path.mkdir(mode=0o700, exist_ok=True)
            part.node_dir.gms.mkdir(mode=0o700, parents=True, exist_ok=True)
        if layout.founds:
            layout.run_dir.create(record, layout.credentials)
            layout.run_dir.keep(layout.node_dir, record, layout.credentials)
            if layout.settings.metrics_port:
                layout.run_dir.targets_json.parent.mkdir(mode=0o700, exist_ok=True)
        layout.log_dir.mkdir(mode=0o700, exist_ok=True)
    except RefusedError:
        if new:
            layout.node_dir.undo()  # nothing was begun
        raise
    except OSError as exc:
        if new:
            layout.node_dir.undo()
        raise RefusedError(f"{exc.filename or layout.node_dir.path} cannot be made: {exc.strerror}") from None


def _input_ended(agent: Agent, loop: asyncio.AbstractEventLoop) -> None:
    """A word there means that the run is to stop. An end without one may be that of this one connection."""
    loop.remove_reader(0)
    word = b""
    with contextlib.suppress(OSError):
        word = os.read(0, 4096)
    if word:
        agent.node.interrupt("the command that started this agent stops the run")
    else:
        agent.node.abandoned("the command that started this agent is gone, or the connection with it")


def _watch_parent(agent: Agent, loop: asyncio.AbstractEventLoop) -> None:
    """Stop when the parent goes: a slurmstepd that was killed, or an entry point that did not pass SIGTERM on.

    Slurm no longer knows of us then, and nobody else would ever stop us.
    """
    parent = os.getppid()
    if not parent:
        return  # we are the first process of a container, or were put into it: its own runtime looks after that
    try:
        fd = os.pidfd_open(parent)
    except ProcessLookupError:
        agent.node.interrupt("its parent is gone")
        return

    def gone() -> None:
        loop.remove_reader(fd)
        os.close(fd)
        agent.node.interrupt(f"its parent (pid {parent}) is gone")

    loop.add_reader(fd, gone)


def run_file(layout: Layout) -> RunFile:
    """What run.json says of a run that begins."""
    me = proc.identity(os.getpid())
    assert me is not None
    return RunFile(
        run=layout.run,
        version=__version__,
        created=time.time(),
        leader_host=layout.topology.host,
        leader_boot_id=proc.boot_id(),
        agent_pid=me.pid,
        agent_start=me.start,
        pid_namespace=proc.namespace(),
        node_dir=str(layout.node_dir.path),
        etcd_endpoints=layout.etcd_endpoints,
        etcd_auth=layout.own_etcd,
        etcd_ca=layout.etcd_access.ca,
        frontend_url=layout.front.url,
        model_name=layout.model_name,
        settings=layout.settings.to_json(),
        attempt=layout.attempt,
        nnodes=layout.topology.nnodes,
        leader_address=layout.topology.leader_address if layout.founds else layout.topology.address,
        leader_rank=layout.home.node_rank,
        slurm=rundir.slurm_step(os.environ),
        ports=asdict(layout.ports),
        groups={p.group.name: p.recorded() for p in parts.placed(layout)} if layout.settings.grouped else {},
    )
