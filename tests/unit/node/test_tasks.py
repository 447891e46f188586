"""What becomes of errors beside the loop: those that are meant end the run, all others are told and outlived."""

from __future__ import annotations

import asyncio
import contextlib

from gms_launch.errors import LaunchError
from gms_launch.node.tasks import Tasks, until


def test_a_meant_error_fails_the_run_and_any_other_is_outlived_wherever_it_happens() -> None:
    failed: list[str] = []
    outlived: list[str] = []

    async def live() -> None:
        tasks = Tasks(lambda e: failed.append(str(e)), lambda what, e: outlived.append(f"{what}: {e!r}"))
        loop = asyncio.get_running_loop()
        tasks.watch(loop)

        async def end_in(error: Exception) -> None:
            raise error

        def fall_over() -> None:
            raise OSError(28, "no room")

        tasks.spawn(end_in(LaunchError("meant")))
        tasks.spawn(end_in(ValueError("ours")))
        loop.call_soon(fall_over)
        while len(failed) + len(outlived) < 3:
            await asyncio.sleep(0)
        tasks.spawn(asyncio.sleep(600))
        await tasks.cancel()

    asyncio.run(live())
    assert failed == ["meant"]
    outlived.sort(key=lambda o: "fall_over" in o)
    assert [o.rpartition(": ")[2] for o in outlived] == ["ValueError('ours')", "OSError(28, 'no room')"]
    assert "end_in" in outlived[0] and "fall_over" in outlived[1]


def test_work_is_given_up_when_the_event_comes() -> None:
    async def live() -> None:
        stop = asyncio.Event()
        asyncio.get_running_loop().call_soon(stop.set)
        await asyncio.wait_for(until(stop, asyncio.sleep(600)), 10.0)

    asyncio.run(live())


def test_work_that_is_woken_as_it_is_told_to_end_ends_all_the_same() -> None:
    """As begin waits for other nodes: the stop wakes it, and with that `wait_for` forgets that it was cancelled."""

    async def live() -> None:
        loop = asyncio.get_running_loop()
        wake, stopping = asyncio.Event(), asyncio.Event()
        waiting = loop.create_future()

        async def gather() -> None:
            while True:
                wake.clear()
                if not waiting.done():
                    waiting.set_result(None)
                with contextlib.suppress(asyncio.TimeoutError):
                    await asyncio.wait_for(wake.wait(), 60.0)

        async def stop() -> None:
            await waiting
            await asyncio.sleep(0)
            stopping.set()
            wake.set()

        told = loop.create_task(stop())
        await asyncio.wait_for(until(stopping, gather()), 20.0)
        await told
        beside = Tasks(lambda e: None, lambda what, e: None)
        waiting = loop.create_future()
        beside.spawn(gather())
        await waiting
        await asyncio.sleep(0)
        wake.set()
        await asyncio.sleep(0)
        await asyncio.wait_for(beside.cancel(), 20.0)

    asyncio.run(live())
