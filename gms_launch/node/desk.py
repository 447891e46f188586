"""What a group's leader has to do with the frontend, which is on the run's leader's node: at once there, else by etcd.

A question of another node's goes to where the run's leader alone reads, and the answer to where that group's leader
alone does: the messages of a failover do not depend on how many groups there are. `Clerk` answers.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, TimeoutError
from typing import Protocol

from gms_launch.cohort.records import AnswerRecord, QuestionRecord
from gms_launch.control.keys import Keys
from gms_launch.node.reporter import Reporter
from gms_launch.services import frontend
from gms_launch.services.base import AwayError, NotReadyError
from gms_launch.services.frontend import Where

#: How long an answer may take on its way through etcd (seconds).
WAY = 3.0
#: Most questions of other nodes that are asked of the frontend at once: each takes a thread.
AT_ONCE = 64


class Desk(Protocol):
    """How the frontend is asked. Blocks: in a thread."""

    def host(self) -> str:
        """By which address its connections come from another node; empty where it is on this one."""

    def pid(self) -> int:
        """Of the frontend, where it is on this node; 0 while none runs here."""

    def one_token(self, model: str, instance: int, timeout: float, name: str, fresh: bool) -> bool:
        """Have one token of an engine (`instance` 0: of any) come through the frontend. Unless it is to be `fresh`, one
        that has come will do.

        Returns whether it is certain that it is that engine's. Raises `NotReadyError` when none comes, and `AwayError`
        when nobody could be asked.
        """

    def listed(self, model: str) -> bool:
        """Whether the frontend has an engine for a model. Raises `NotReadyError`."""

    def moves(self) -> tuple[float, float] | None:
        """How many requests have moved and were lost so far; None where nobody says."""


class Near:
    """On the frontend's own node. `ready`: whether it runs and listens there.

    Between two of its starts its port is anybody's: who listens there then is asked nothing, and so cannot have an
    engine taken for hung, or for well.
    """

    def __init__(self, where: Where, pid: Callable[[], int], ready: Callable[[], bool]) -> None:
        self._at, self.pid, self._ready = where, pid, ready

    def host(self) -> str:
        return ""

    @property
    def _where(self) -> Where:
        """Where it is. Raises `AwayError` while it is not."""
        if not self._ready():
            raise AwayError("the frontend is not there: it is being started")
        return self._at

    def one_token(self, model: str, instance: int, timeout: float, name: str, fresh: bool) -> bool:
        try:
            given = frontend.has_given(self._where, instance)
        except NotReadyError as exc:
            raise AwayError(f"the frontend: {exc}") from None
        return (given and not fresh) or self.any_token(model, timeout, name, instance)

    def any_token(self, model: str, timeout: float, name: str, instance: int = 0) -> bool:
        """Have one token come through the frontend, for a promotion or a hang. Raises as `Desk.one_token`."""
        return frontend.one_token(self._where, model, timeout, name, instance)

    def listed(self, model: str) -> bool:
        return frontend.listed(self._where, model)

    def moves(self) -> tuple[float, float] | None:
        return frontend.moves(self._at) if self._ready() else None

    def traffic(self) -> tuple[float, float] | None:
        """Tokens that have come through it, and requests in flight; None where its metrics do not tell.

        Raises `NotReadyError`.
        """
        return frontend.traffic(self._where)


class Far:
    """On another node than the first. The frontend that is asked is that of the run's leader: at the address that
    `leader` says, or `near`, where that is empty since this very agent leads the run by now.
    """

    def __init__(self, leader: Callable[[], str], near: Near, group: str, keys: Keys, report: Reporter) -> None:
        self.host, self._near = leader, near
        self._group, self._keys, self._report = group, keys, report
        self._waiting: dict[str, Future[AnswerRecord]] = {}

    def pid(self) -> int:
        return 0 if self.host() else self._near.pid()

    def hear(self, answers: Mapping[str, AnswerRecord]) -> None:
        """On the loop: what has been answered so far."""
        for which in self._waiting.keys() & answers.keys():
            if (waiting := self._waiting.pop(which, None)) is not None:
                waiting.set_result(answers[which])

    def one_token(self, model: str, instance: int, timeout: float, name: str, fresh: bool) -> bool:
        which = uuid.uuid4().hex
        said = self._ask(QuestionRecord(which, self._group, "token", model, instance, timeout, name, fresh))
        if said is None:
            raise AwayError("the run's leader, who has the frontend, does not answer")
        if not said.ok:
            raise (AwayError if said.away else NotReadyError)(said.why)
        return said.certain

    def listed(self, model: str) -> bool:
        said = self._ask(QuestionRecord(uuid.uuid4().hex, self._group, "listed", model))
        if said is None:
            raise AwayError("the run's leader, who has the frontend, does not answer")
        return said.ok

    def moves(self) -> tuple[float, float] | None:
        said = self._ask(QuestionRecord(uuid.uuid4().hex, self._group, "moves"))
        return said.moves if said is not None else None

    def _ask(self, question: QuestionRecord) -> AnswerRecord | None:
        which, waiting = question.uuid, Future[AnswerRecord]()
        self._waiting[which] = waiting
        self._report.put(self._keys.question(which), question.encode(), lease=self._report.lease)
        try:
            return waiting.result(question.wait + WAY)
        except TimeoutError:
            return None
        finally:
            self._waiting.pop(which, None)
            self._report.delete(self._keys.question(which))
            self._report.delete(self._keys.answer(which))


class Clerk:
    """The run's leader's: puts what other nodes ask to the frontend."""

    def __init__(self, run: str, near: Near, report: Reporter) -> None:
        self._run, self._near, self._report = run, near, report
        self._threads = ThreadPoolExecutor(AT_ONCE, "clerk")
        self._taken: set[str] = set()

    def look(self, asked: Mapping[str, QuestionRecord]) -> None:
        """On the loop: begin with what is new."""
        new = asked.keys() - self._taken
        self._taken = set(asked)
        for which in new:
            asyncio.get_running_loop().run_in_executor(self._threads, self._answer, asked[which])

    def _answer(self, question: QuestionRecord) -> None:
        self._report.put(Keys(self._run, question.group).answer(question.uuid), self._said(question).encode())

    def _said(self, question: QuestionRecord) -> AnswerRecord:
        if question.what == "moves":
            return AnswerRecord(True, moves=self._near.moves())
        try:
            if question.what == "listed":
                return AnswerRecord(self._near.listed(question.model))
            asked = (question.model, question.instance, question.wait, question.name, question.fresh)
            return AnswerRecord(True, certain=self._near.one_token(*asked))
        except NotReadyError as exc:
            return AnswerRecord(False, str(exc), away=isinstance(exc, AwayError))

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)
