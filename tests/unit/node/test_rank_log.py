"""How much of an engine's log its agent reads, and when: others can have an engine print as fast as it can."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

from gms_launch.cohort.model import Phase
from gms_launch.node.rank import Rank
from gms_launch.process.follow import READ_MAX


def test_a_log_is_read_in_pieces_to_its_end_and_not_any_more_once_the_engine_serves(tmp_path: Path) -> None:
    log, read = tmp_path / "log", list[str]()
    log.write_text("".join(f"{k:099d}\n" for k in range(3 * READ_MAX // 100)) + "parked\n")
    said = {"parked": Phase.PARKED, "waking": Phase.WAKING, "active": Phase.ACTIVE}
    engine = SimpleNamespace(is_awake=lambda line: bool(read.append(line)), step_of=lambda _: None, phase_of=said.get)
    events = list[str]()
    none = Path("/nowhere")
    rank = Rank(0, 1, 0, "r/0/1/0", none, cast(Any, engine), lambda r, kind, when, detail: events.append(kind))
    child: Any = SimpleNamespace(pidfd=os.pidfd_open(os.getpid()), output=SimpleNamespace(source=log))
    watcher: Any = SimpleNamespace(add=lambda path, call: 1, remove=lambda number: None)

    async def scene() -> None:
        loop = asyncio.get_running_loop()
        rank.start(child, 0.0, watcher, loop)
        assert rank.phase is Phase.STARTING and 0 < len(read) <= READ_MAX / 100, "others have their turn"
        while rank.phase is not Phase.PARKED:
            await asyncio.sleep(0.01)
        with log.open("a") as file:
            file.write("waking\nactive\nmore\n")
        rank.read_log()
        assert rank.phase is Phase.ACTIVE
        count = len(read)
        with log.open("a") as file:
            file.write("and more\n")
        rank.read_log()
        assert len(read) == count and read[-1] == "active"
        loop.remove_reader(child.pidfd)

    try:
        asyncio.run(asyncio.wait_for(scene(), 60.0))
    finally:
        os.close(child.pidfd)
    assert events == ["parked", "lock", "registered"]
