"""The agent in the background: started, waited for, told its settings. What `up` and `up --hosts` share."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

from gms_launch.errors import by_code
from gms_launch.interpreter import module
from gms_launch.printable import plain
from gms_launch.run.rundir import RunDir
from gms_launch.settings.declared import SETTINGS, Settings
from gms_launch.settings.resolve import TABLES_ENV


def start(settings: Settings) -> None:
    """Start the agent in a session of its own and wait until it is ready. Raises what it failed with."""
    reader, writer = os.pipe()
    command = module(sys.executable, "gms_launch", "up", f"--notify-fd={writer}", *as_flags(settings))
    env = {k: v for k, v in os.environ.items() if not k.startswith("GMS_LAUNCH_") or k == "GMS_LAUNCH_HOME"}
    env |= as_environment(settings)
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
                print(f"[{time.strftime('%H:%M:%S')}] {plain(message['progress'])}", flush=True)
            elif "ready" in message:
                print(f"[{time.strftime('%H:%M:%S')}] ready: {plain(message['ready'])}", flush=True)
                return
            elif "failed" in message:
                agent.wait()
                raise by_code(message["exit"], message["failed"])
    # The pipe closed without a verdict: the agent is gone.
    _, err = agent.communicate()
    code = agent.returncode
    text = err.decode(errors="replace").strip()
    raise by_code(
        code, text.removeprefix("gms-launch: ") or f"the agent ended with code {code}; its log: {directory.agent_log}"
    )


def as_environment(settings: Settings) -> dict[str, str]:
    """What no flag may or can hold, by name in the environment: secrets, and the tables of groups."""
    found = {s.env: getattr(settings, s.name) for s in SETTINGS if s.secret and settings.was_set(s.name)}
    return found | ({TABLES_ENV: json.dumps(settings.tables)} if settings.tables else {})


def as_flags(settings: Settings) -> list[str]:
    """The other settings that are not defaults, as flags for the background agent."""
    flags = []
    for s in SETTINGS:
        if s.secret or not settings.was_set(s.name):
            continue
        value = getattr(settings, s.name)
        if s.kind is bool:
            flags.append(s.flag if value else f"--no-{s.flag[2:]}")
        else:
            flags.append(f"{s.flag}={value}")
    return [*flags, "--", *settings.engine_args] if settings.engine_args else flags
