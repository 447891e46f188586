"""Steps of many requests as one step of the group: continuous batching, in miniature.

Every step costs a message to each worker and back, and needs all of them. Whatever waits when the last one is done goes
into the next, so that two hundred streams cost a few messages more than one.
"""

from __future__ import annotations

import asyncio
from typing import Any

from gms_launch.engines.reference.group import Leader, Peer

_MASK = (1 << 64) - 1


class Batch:
    """Collects steps and sends them out to `workers`; one object a replica, inside a running loop."""

    def __init__(self, group: Leader | Peer, workers: range) -> None:
        self._group, self._workers = group, workers
        self._prompts: list[asyncio.Future[int]] = []
        self._steps: list[tuple[int, int, asyncio.Future[int]]] = []
        self._some = asyncio.Event()
        self._pump: asyncio.Task[None] | None = None

    async def digest(self) -> int:
        """A number that every byte of the weights takes part in, read now."""
        future: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._prompts.append(future)
        return await self._asked(future)

    async def step(self, state: int, position: int) -> int:
        """What the window of weights at `state` adds up to, over all workers."""
        future: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._steps.append((state, position, future))
        return await self._asked(future)

    async def _asked(self, future: asyncio.Future[int]) -> int:
        if self._pump is None:
            self._pump = asyncio.get_running_loop().create_task(self._run())
        self._some.set()
        return await future

    async def _run(self) -> None:
        while True:
            await self._some.wait()
            self._some.clear()
            if self._prompts:
                prompts, self._prompts = self._prompts, []
                replies = await self._group.some(self._workers, op="prefill")
                for future in prompts:
                    _tell(future, [r["part"] for r in replies])
            if self._steps:
                steps, self._steps = self._steps, []
                states, positions = [s for s, _, _ in steps], [p for _, p, _ in steps]
                replies = await self._group.some(self._workers, op="steps", states=states, positions=positions)
                for k, (_, _, future) in enumerate(steps):
                    _tell(future, [r["parts"][k] for r in replies])


def _tell(future: asyncio.Future[int], parts: list[Any]) -> None:
    if not future.done():  # its request may have been given up meanwhile
        future.set_result(int(sum(parts) & _MASK))
