"""Who gives tokens, and how one is asked for: what `confirm` and `canary` look at.

In a run of one engine that is the frontend, whose every token is that engine's. Where several engines serve behind one
frontend, a token that came through it proves nothing of any one of them: there a request is sent to that engine alone,
and the answer says whose it is. All of it blocks: in a thread.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from gms_launch.engines.base import LOOPBACK
from gms_launch.node.desk import Desk, Near
from gms_launch.services.base import AwayError, NotReadyError, http_get

#: What an engine of Dynamo's has sent to frontends, errors too; the name is that of 1.1 to 1.6.
_ANSWERED = "dynamo_component_response_bytes_total{"


class Asked(Protocol):
    """What shows that an engine answers."""

    def signs(self) -> float | None:
        """What grows as long as it answers; None where nobody counts. Raises `AwayError` when who counts is away, which
        says nothing of the engine.
        """

    def ask(self, timeout: float, name: str, fresh: bool = True) -> None:
        """Ask for one token, for at most `timeout` seconds, under a request id; unless it is to be `fresh`, one that a
        user has got will do. Raises `NotReadyError` when none comes, and `AwayError` when nobody could be asked.
        """


class Tokens(Asked, Protocol):
    """What shows that an engine gives tokens."""

    def missing(self) -> str:
        """Why none can be asked for now; empty when one can. Raises `NotReadyError`."""

    def users(self) -> tuple[float, float] | None:
        """How many tokens users have got of it, in all, and how many requests are in flight; None where that cannot be
        told of this engine. Raises `NotReadyError`.
        """


class OfTheFrontend:
    """Of a run of one engine: whatever comes through its frontend."""

    def __init__(self, near: Near, model: str) -> None:
        self._near, self._model = near, model

    def missing(self) -> str:
        there = self._near.listed(self._model)
        return "" if there else f"nothing serves {self._model}: the frontend lists no engine for it"

    def users(self) -> tuple[float, float] | None:
        return self._near.traffic()

    def signs(self) -> float | None:
        try:
            counted = self.users()
        except NotReadyError as exc:
            raise AwayError(str(exc)) from None
        return counted[0] if counted else None

    def ask(self, timeout: float, name: str, fresh: bool = True) -> None:
        self._near.any_token(self._model, timeout, name)


class OfAnEngine:
    """Of one among several engines. `port` is its system port, on this node; `instance` gives the lease that it is
    registered under, 0 while it is not.

    Where the frontend does not say whose an answer is (before Dynamo 1.4), the engine must have counted one.
    """

    def __init__(self, desk: Desk, model: str, port: int, instance: Callable[[], int]) -> None:
        self._desk, self._model, self._port, self._instance = desk, model, port, instance

    def missing(self) -> str:
        return "" if self._instance() else "it is not registered with Dynamo"

    def users(self) -> tuple[float, float] | None:
        return None

    def signs(self) -> float | None:
        try:
            lines = http_get(LOOPBACK, self._port, "/metrics").splitlines()
        except NotReadyError:
            return None  # whether it answers there is for `pulse` to judge
        return sum((float(line.rpartition("}")[2]) for line in lines if line.startswith(_ANSWERED)), 0.0)

    def ask(self, timeout: float, name: str, fresh: bool = True) -> None:
        instance, before = self._instance(), self.signs()
        if not instance:
            raise NotReadyError(self.missing())
        certain = self._desk.one_token(self._model, instance, timeout, name, fresh)
        if not certain and before is not None and self.signs() == before:
            raise NotReadyError("it was asked for a token, and has not counted an answer: another engine gave that one")
