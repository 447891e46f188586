"""Whose token it was: of one engine among several behind one frontend."""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest

from gms_launch.cohort.records import AnswerRecord, QuestionRecord
from gms_launch.control.keys import Keys
from gms_launch.node.confirm import TokenWatch
from gms_launch.node.desk import Clerk, Far, Near
from gms_launch.node.tokens import OfAnEngine, OfTheFrontend
from gms_launch.services import frontend
from gms_launch.services.base import AwayError, NotReadyError
from gms_launch.services.frontend import Where


class Engine:
    """What an engine's system port and the frontend say, as far as it matters here."""

    def __init__(self) -> None:
        self.bytes = 0
        self.first: list[int] = []
        self.by: Any = {}
        self.asked: list[dict[str, Any]] = []
        self.answers = True


@pytest.fixture
def world() -> Iterator[tuple[Engine, int]]:
    engine = Engine()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            lines = [f'dynamo_component_response_bytes_total{{worker_id="7"}} {engine.bytes}']
            name = "dynamo_frontend_worker_last_time_to_first_token_seconds"
            lines += [f'{name}{{worker_id="{n}",worker_type="decode"}} 0.1' for n in engine.first]
            self._say("\n".join(lines))

        def do_POST(self) -> None:
            import json

            engine.asked.append(json.loads(self.rfile.read(int(self.headers["content-length"]))))
            engine.bytes += engine.answers
            self._say(json.dumps({"choices": [{"text": "x"}], "nvext": {"worker_id": engine.by}}))

        def _say(self, text: str) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *_: Any) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield engine, server.server_port
    server.shutdown()


def of(port: int, instance: int = 7) -> OfAnEngine:
    return OfAnEngine(Near(Where("127.0.0.1", port), lambda: 0, lambda: True), "tiny", port, lambda: instance)


def test_an_answer_counts_that_names_the_engine(world: tuple[Engine, int]) -> None:
    engine, port = world
    engine.by = {"prefill_worker_id": 7, "decode_worker_id": 7}
    of(port).ask(2.0, "x")
    assert engine.asked[0]["nvext"] == {"backend_instance_id": 7, "extra_fields": ["worker_id"]}


def test_another_engines_answer_does_not(world: tuple[Engine, int]) -> None:
    engine, port = world
    engine.by = {"decode_worker_id": 8}
    watch = TokenWatch(of(port))
    assert not watch.a_token_came() and "another engine answered in its place" in watch.why


def test_where_nobody_says_whose_it_is_the_engine_must_have_counted_it(world: tuple[Engine, int]) -> None:
    engine, port = world
    of(port).ask(2.0, "x")
    engine.answers = False
    with pytest.raises(NotReadyError, match="has not counted an answer"):
        of(port).ask(2.0, "x")


def test_a_users_token_will_do_for_a_promotion_and_not_for_the_canary(world: tuple[Engine, int]) -> None:
    engine, port = world
    engine.first, engine.by = [8], {"decode_worker_id": 8}
    assert not TokenWatch(of(port)).a_token_came(), "that was another engine's"
    engine.first, engine.asked = [8, 7], []
    assert TokenWatch(of(port)).a_token_came() and engine.asked == []
    with pytest.raises(NotReadyError):
        of(port).ask(2.0, "x")


def test_one_that_is_not_registered_is_not_asked_for(world: tuple[Engine, int]) -> None:
    engine, port = world
    watch = TokenWatch(of(port, instance=0))
    assert not watch.a_token_came() and watch.why == "it is not registered with Dynamo" and engine.asked == []


def test_without_a_frontend_nothing_is_said_of_the_engine() -> None:
    with pytest.raises(AwayError):
        of(1).ask(1.0, "x")


def test_who_listens_where_the_frontend_is_not_is_asked_nothing(world: tuple[Engine, int]) -> None:
    """Between two of its starts its port is anybody's, and the engine is given its time once there is one again."""
    engine, port = world
    there = False
    near = Near(Where("127.0.0.1", port), lambda: 0, lambda: there)
    for tokens in (OfTheFrontend(near, "tiny"), OfAnEngine(near, "tiny", port, lambda: 7)):
        there = False
        watch = TokenWatch(tokens)
        for _ in range(2):
            assert not watch.a_token_came() and watch.asked_since == math.inf and "frontend" in watch.why
        assert engine.asked == [] and near.moves() is None
        with pytest.raises(AwayError):
            tokens.ask(1.0, "x")
        there, before = True, time.monotonic()
        watch.a_token_came()
        assert before <= watch.asked_since <= time.monotonic()


class Etcd:
    """What a reporter does with questions and answers: they come at once."""

    lease = 5

    def __init__(self) -> None:
        self.kept: dict[str, bytes] = {}
        self.deleted: list[str] = []
        self.put_event = threading.Event()

    def put(self, key: str, value: bytes, lease: int = 0, later: bool = False) -> None:
        self.kept[key] = value
        self.put_event.set()

    def delete(self, key: str) -> None:
        self.deleted.append(key)


def question_of(etcd: Etcd) -> QuestionRecord:
    assert etcd.put_event.wait(60)
    return next(QuestionRecord.decode(v) for k, v in etcd.kept.items() if "/asked/" in k)


@pytest.mark.parametrize(
    ("answer", "raised"),
    [
        (AnswerRecord(True, certain=True), None),
        (AnswerRecord(False, "HTTP 500"), NotReadyError),
        (AnswerRecord(False, "no frontend", away=True), AwayError),
    ],
)
def test_another_node_is_asked_through_etcd(answer: AnswerRecord, raised: type[Exception] | None) -> None:
    etcd = Etcd()
    far = Far(lambda: "10.0.0.1", None, "g1", Keys("r", "g1"), etcd)  # type: ignore[arg-type]
    with ThreadPoolExecutor() as pool:
        asked = pool.submit(far.one_token, "tiny", 7, 1.0, "x", True)
        question = question_of(etcd)
        assert (question.group, question.what, question.instance, question.fresh) == ("g1", "token", 7, True)
        far.hear({"somebody else's": AnswerRecord(True), question.uuid: answer})
        if raised is None:
            assert asked.result(5) is True
        else:
            with pytest.raises(raised) as caught:
                asked.result(5)
            assert type(caught.value) is raised
    assert etcd.deleted == [f"/gms-launch/r/asked/{question.uuid}", f"/gms-launch/r/group/g1/answers/{question.uuid}"]


def test_nobody_who_answers_says_nothing_of_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gms_launch.node.desk.WAY", 0.05)
    far = Far(lambda: "10.0.0.1", None, "g1", Keys("r", "g1"), Etcd())  # type: ignore[arg-type]
    with pytest.raises(AwayError, match="run's leader"):
        far.one_token("tiny", 7, 0.0, "x", True)
    assert far.moves() is None


def test_each_question_is_put_to_the_frontend_once(monkeypatch: pytest.MonkeyPatch) -> None:
    etcd, counted = Etcd(), []
    monkeypatch.setattr(frontend, "moves", lambda _: counted.append(1) or (3.0, 0.0))
    clerk = Clerk("r", Near(Where("127.0.0.1", 1), lambda: 0, lambda: True), etcd)  # type: ignore[arg-type]

    async def look() -> None:
        asked = {"a": QuestionRecord("a", "g1", "moves")}
        for _ in range(3):
            clerk.look(asked)
        await asyncio.to_thread(etcd.put_event.wait, 5)

    asyncio.run(look())
    clerk.close()
    assert counted == [1]
    assert AnswerRecord.decode(etcd.kept["/gms-launch/r/group/g1/answers/a"]).moves == (3.0, 0.0)
