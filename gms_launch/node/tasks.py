"""Work beside the agent's loop, and what becomes of its errors.

A `LaunchError` is meant, and ends the run, or the group whose work it was. Any other error is one of ours, and a run
is not to end for it: it is told, and what should be is compared with what is again. The same for callbacks of the loop
(readers, signal handlers).
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any

from gms_launch.errors import LaunchError

#: How soon a task that goes on although it was cancelled is cancelled again (seconds).
AGAIN = 0.5


class Tasks:
    """Keeps tasks until they end. `fail` gets what ends the run, `outlived` what happened and any other error."""

    def __init__(self, fail: Callable[[LaunchError], None], outlived: Callable[[str, BaseException], None]) -> None:
        self._fail, self._outlived = fail, outlived
        self._tasks: set[asyncio.Task[Any]] = set()

    def watch(self, loop: asyncio.AbstractEventLoop) -> None:
        """Take what goes wrong in the loop's callbacks, too."""
        loop.set_exception_handler(self._in_loop)

    def spawn(self, work: Coroutine[Any, Any, Any], fail: Callable[[LaunchError], None] | None = None) -> None:
        """Run `work` beside the loop; `fail` gets what it is to end, in place of the run."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(partial(self._ended, fail or self._fail))

    async def cancel(self) -> None:
        """End whatever is left."""
        await _end(*self._tasks)
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _ended(self, fail: Callable[[LaunchError], None], task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._judge(getattr(task.get_coro(), "__qualname__", "a task"), error, fail)

    def _in_loop(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        error = context.get("exception") or RuntimeError(context["message"])
        self._judge(str(context.get("handle") or context["message"]), error, self._fail)

    def _judge(self, what: str, error: BaseException, fail: Callable[[LaunchError], None]) -> None:
        if isinstance(error, LaunchError):
            fail(error)
        else:
            self._outlived(what, error)


async def until(event: asyncio.Event, work: Coroutine[Any, Any, None]) -> None:
    """Await `work`, but no longer than until the event. Raises what `work` raises."""
    task = asyncio.get_running_loop().create_task(work)
    stopped = asyncio.get_running_loop().create_task(event.wait())
    await asyncio.wait({task, stopped}, return_when=asyncio.FIRST_COMPLETED)
    stopped.cancel()
    if task.done():
        await task
        return
    await _end(task)
    with contextlib.suppress(asyncio.CancelledError):
        await task


async def _end(*tasks: asyncio.Task[Any]) -> None:
    """Cancel tasks, and come back when they have ended.

    One word is not enough: `asyncio.wait_for` forgets that it was cancelled when what it waited for comes in the same
    moment (before Python 3.12), and a stop wakes whoever waits.
    """
    left = set(tasks)
    while left:
        for task in left:
            task.cancel()
        _, left = await asyncio.wait(left, timeout=AGAIN)
