"""The worker processes of one rank."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys

from gms_launch.engines.base import MEETING_SECRET
from gms_launch.engines.reference.args import EngineConfig
from gms_launch.interpreter import module


class Workers:
    """Starts one worker for each local GPU. They end when this process does: it holds their standard input."""

    def __init__(self, config: EngineConfig, host: str, port: int) -> None:
        env = os.environ | {MEETING_SECRET: config.meeting_secret.hex()}
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        for local in range(config.local_workers):
            rank = config.first_worker + local
            which = (str(rank), str(local), host, str(port))
            argv = module(sys.executable, "gms_launch.engines.reference.worker", *which)
            self._processes[f"Worker_TP{rank}"] = subprocess.Popen(
                [*argv, "--", *sys.argv[1:]], stdin=subprocess.PIPE, env=env
            )

    async def first_exit(self) -> tuple[str, int]:
        """Wait until a worker ends; returns its name and exit code (negative: the signal)."""
        loop = asyncio.get_running_loop()
        ended: asyncio.Queue[str] = asyncio.Queue()
        fds = []
        for name, process in self._processes.items():
            fd = os.pidfd_open(process.pid)
            fds.append(fd)
            loop.add_reader(fd, ended.put_nowait, name)
        try:
            first = await ended.get()
        finally:
            for fd in fds:
                loop.remove_reader(fd)
                os.close(fd)
        return first, self._processes[first].wait()

    def stop(self) -> None:
        for process in self._processes.values():
            if process.stdin:
                process.stdin.close()
        for process in self._processes.values():
            process.wait()
