"""`gms-launch up`: become this node's agent, or with -d start one in the background and wait until it is ready."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from typing import Any

from gms_launch import __version__, ports, rundir, topology
from gms_launch.cohort import proc
from gms_launch.config import SETTINGS, Settings
from gms_launch.errors import DeadlineError, LaunchError, NoContactError, RefusedError, UsageError
from gms_launch.observe.snapshot import Snapshot
from gms_launch.plan import Layout
from gms_launch.rundir import Credentials, NodeDir, RunDir, RunFile

_ERRORS = {e.exit_code: e for e in (LaunchError, UsageError, RefusedError, DeadlineError, NoContactError)}


def main(settings: Settings, detach: bool, notify_fd: int) -> None:
    if not settings.run_id:
        chosen = os.environ.get("SLURM_JOB_ID") or rundir.new_run_id()
        settings = replace(settings, run_id=chosen, sources={**settings.sources, "run_id": "made up"})
    reservation = ports.Reservation(_ports_dir(), topology.discover(settings).leader_address)
    layout = prepare(settings, reservation)
    if detach:
        # The background agent makes its own reservation, of the same ports.
        reservation.close()
        background(settings)
        return
    run_agent(layout, notify_fd)


def _ports_dir() -> Any:
    rundir.private_directory(rundir.user_root())
    return rundir.user_root() / "ports"


def prepare(settings: Settings, reservation: ports.Reservation) -> Layout:
    """Everything that can go wrong before something is started. Raises `UsageError` and `RefusedError`."""
    run = settings.run_id
    layout = Layout(
        run=run,
        settings=settings,
        topology=topology.discover(settings),
        ports=ports.layout(settings, reservation.free),
        credentials=Credentials.generate(),
        run_dir=RunDir.of(run),
        node_dir=NodeDir.of(run, settings.gms_socket_dir),
    )
    layout.check()
    previous = layout.run_dir.read()
    if previous is not None and previous.live:
        raise RefusedError(
            f"run {run} is already up (agent {previous.agent_pid} on {previous.leader_host}); "
            f"stop it with `gms-launch down --run {run}` or choose another --run-id"
        )
    return layout


def run_agent(layout: Layout, notify_fd: int) -> None:
    """Be the agent until the run ends. Raises what ended it early."""
    from gms_launch.agent import Agent

    layout.run_dir.create()
    layout.node_dir.create()
    layout.run_dir.write_credentials(layout.credentials)
    me = proc.identity(os.getpid())
    assert me is not None
    record = RunFile(
        run=layout.run,
        version=__version__,
        created=time.time(),
        leader_host=layout.topology.host,
        leader_boot_id=proc.boot_id(),
        agent_pid=me.pid,
        agent_start=me.start,
        node_dir=str(layout.node_dir.path),
        etcd_endpoints=layout.etcd_endpoints,
        etcd_auth=layout.own_etcd,
        frontend_url=layout.frontend_url,
        model_name=layout.model_name,
        settings=layout.settings.to_json(),
    )
    layout.run_dir.write(record)
    logging.basicConfig(
        filename=layout.run_dir.agent_log, level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s"
    )
    reporter = Notify(notify_fd) if notify_fd >= 0 else Terminal()

    async def live() -> None:
        agent = Agent(layout, reporter.progress, reporter.changed)

        async def announce() -> None:
            await agent.ready.wait()
            reporter.ready(layout)

        waiting = asyncio.get_running_loop().create_task(announce())
        try:
            await agent.run()
        finally:
            waiting.cancel()

    try:
        asyncio.run(live())
    except LaunchError as exc:
        logging.error("%s", exc)
        reporter.failed(exc)
        raise
    finally:
        layout.run_dir.write(replace(record, ended=time.time()))
        reporter.close()


class Terminal:
    """Reports to the person at the terminal: lines, and a live view below them where there is a screen."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.live import Live

        self._console = Console(stderr=True)
        self._live = (
            Live(console=self._console, auto_refresh=False, transient=True) if self._console.is_terminal else None
        )
        if self._live:
            self._live.start()

    def progress(self, text: str) -> None:
        logging.info("%s", text)
        self._console.print(f"[{time.strftime('%H:%M:%S')}] {text}", markup=False, highlight=False, soft_wrap=True)

    def changed(self, shot: Snapshot) -> None:
        if self._live:
            from gms_launch.observe import views

            self._live.update(views.status(shot), refresh=True)

    def ready(self, layout: Layout) -> None:
        self.progress(f"ready: {layout.frontend_url}/v1/completions, model {layout.model_name}")

    def failed(self, error: LaunchError) -> None:
        pass  # the caller prints it

    def close(self) -> None:
        if self._live:
            self._live.stop()


class Notify:
    """Reports to the `up -d` that waits for us, as JSON lines on a pipe; silently once that is gone."""

    def __init__(self, fd: int) -> None:
        os.set_inheritable(fd, False)
        self._fd = fd

    def _send(self, **message: Any) -> None:
        if self._fd < 0:
            return
        try:
            os.write(self._fd, json.dumps(message).encode() + b"\n")
        except BrokenPipeError:
            self.close()

    def progress(self, text: str) -> None:
        logging.info("%s", text)
        self._send(progress=text)

    def changed(self, shot: Snapshot) -> None:
        pass

    def ready(self, layout: Layout) -> None:
        self._send(ready=f"{layout.frontend_url}/v1/completions, model {layout.model_name}")
        self.close()

    def failed(self, error: LaunchError) -> None:
        self._send(failed=str(error), exit=error.exit_code)

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
        self._fd = -1


def background(settings: Settings) -> None:
    """Start the agent in a session of its own and wait until it is ready. Raises what it failed with."""
    reader, writer = os.pipe()
    command = [sys.executable, "-m", "gms_launch", "up", f"--notify-fd={writer}", *_as_flags(settings)]
    env = {k: v for k, v in os.environ.items() if not k.startswith("GMS_LAUNCH_") or k == "GMS_LAUNCH_HOME"}
    directory = RunDir.of(settings.run_id)
    agent = subprocess.Popen(
        command,
        env=env,
        pass_fds=(writer,),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    os.close(writer)
    try:
        _wait_ready(reader, agent, directory)
    except KeyboardInterrupt:
        print("\ninterrupted: stopping the run", file=sys.stderr)
        agent.send_signal(signal.SIGTERM)
        agent.wait()
        raise
    print(f"the run is up in the background: gms-launch status --run {settings.run_id}")


def _wait_ready(reader: int, agent: subprocess.Popen[bytes], directory: RunDir) -> None:
    with open(reader, "rb") as lines:
        for line in lines:
            message = json.loads(line)
            if "progress" in message:
                print(f"[{time.strftime('%H:%M:%S')}] {message['progress']}", flush=True)
            elif "ready" in message:
                print(f"[{time.strftime('%H:%M:%S')}] ready: {message['ready']}", flush=True)
                return
            elif "failed" in message:
                agent.wait()
                raise _ERRORS.get(message["exit"], LaunchError)(message["failed"])
    # The pipe closed without a verdict: the agent is gone.
    _, err = agent.communicate()
    code = agent.returncode
    text = err.decode(errors="replace").strip()
    raise _ERRORS.get(code, LaunchError)(
        text.removeprefix("gms-launch: ") or f"the agent ended with code {code}; its log: {directory.agent_log}"
    )


def _as_flags(settings: Settings) -> list[str]:
    """The settings that are not defaults, as flags for the background agent."""
    flags = []
    for s in SETTINGS:
        if not settings.was_set(s.name):
            continue
        value = getattr(settings, s.name)
        if s.kind is bool:
            flags.append(s.flag if value else f"--no-{s.flag[2:]}")
        else:
            flags.append(f"{s.flag}={value}")
    return [*flags, "--", *settings.engine_args] if settings.engine_args else flags
