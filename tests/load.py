"""Many users at once: streams and unary requests that are always in flight, and new ones at a rate.

    with Load(url, streams=24, unary=8, rate=20, tokens=60) as load:
        load.wait_busy()
        kill_something()
    assert not load.lost and not load.wrong

Every answer is compared with the undisturbed one to the same question, which is asked before anything else. A request
is lost when it ends with anything but a whole answer: an error in its stream counts, and so does a stream that just
stops. Nothing is asked twice: there are no retries.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import ssl
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import aiohttp

from tests.support import eventually

#: Pauses between two chunks of a stream from here on (seconds) are remembered.
PAUSE = 0.02


@dataclass(frozen=True)
class Question:
    """One request. `more` are further members of its body, as JSON."""

    prompt: str
    tokens: int
    stream: bool = True
    chat: bool = False
    more: str = "{}"

    @property
    def path(self) -> str:
        return "/v1/chat/completions" if self.chat else "/v1/completions"

    def body(self, model: str) -> dict[str, Any]:
        said = {"messages": [{"role": "user", "content": self.prompt}]} if self.chat else {"prompt": self.prompt}
        asked = {"model": model, "max_tokens": self.tokens, "temperature": 0, "stream": self.stream, **said}
        if self.stream:
            asked["stream_options"] = {"include_usage": True}
        return asked | json.loads(self.more)


@dataclass
class Answer:
    """What came of a question. Times are of the monotonic clock; `pauses` are (begin, seconds)."""

    question: Question
    sent: float = 0.0
    done: float = 0.0
    error: str = ""
    chunks: int = 0
    last: float = 0.0
    usage: dict[str, Any] | None = None
    texts: dict[int, str] = field(default_factory=dict)
    finish: dict[int, str] = field(default_factory=dict)
    choices: list[dict[str, Any]] = field(default_factory=list)
    pauses: list[tuple[float, float]] = field(default_factory=list)

    @property
    def text(self) -> str:
        return self.texts.get(0, "")

    def pause_at(self, moment: float) -> float:
        """The longest pause that began before `moment` + 1 s and was not over at `moment` (seconds)."""
        return max((s for begun, s in self.pauses if begun < moment + 1.0 and begun + s > moment), default=0.0)

    def take(self, data: dict[str, Any], now: float) -> None:
        """One chunk of a stream, or the whole of an answer."""
        if "error" in data or ("message" in data and "choices" not in data):
            self.error = self.error or json.dumps(data)[:300]
            return
        self.usage = data.get("usage") or self.usage
        for choice in data.get("choices", []):
            part = choice.get("message") or choice.get("delta") or {}
            text = choice.get("text") or part.get("content") or ""
            index = choice["index"]
            self.choices.append(choice)
            self.texts[index] = self.texts.get(index, "") + text
            if choice.get("finish_reason"):
                self.finish[index] = choice["finish_reason"]
            if text:
                since = self.last or self.sent
                if now - since > PAUSE:
                    self.pauses.append((since, now - since))
                self.chunks, self.last = self.chunks + 1, now


async def ask(
    session: aiohttp.ClientSession, url: str, question: Question, model: str = "tiny", into: Answer | None = None
) -> Answer:
    """Ask once, `into` an answer that others may watch grow. Never raises: what went wrong is in `error`."""
    answer = into or Answer(question)
    answer.sent = time.monotonic()
    try:
        async with session.post(url + question.path, json=question.body(model)) as response:
            if response.status != 200:
                answer.error = f"HTTP {response.status}: {(await response.text())[:300]}"
            elif question.stream:
                await _read_events(response, answer)
            else:
                answer.take(await response.json(), time.monotonic())
        if not answer.error and not answer.finish:
            answer.error = "it ended without a finish_reason"
    except (aiohttp.ClientError, asyncio.TimeoutError, ValueError) as exc:
        answer.error = f"{type(exc).__name__}: {exc}"
    answer.done = time.monotonic()
    return answer


async def _read_events(response: aiohttp.ClientResponse, answer: Answer) -> None:
    event = ""
    async for raw in response.content:
        line = raw.decode().rstrip("\r\n")
        if line.startswith("event:"):
            event = line[6:].strip()
        elif line.startswith("data:"):
            data = line[5:].strip()
            if data == "[DONE]":
                return
            if event == "error":
                answer.error = answer.error or data[:300]
            else:
                answer.take(json.loads(data), time.monotonic())
        elif line.startswith(":"):
            if event == "error":  # Dynamo says what it was in a comment
                answer.error = answer.error or line[1:].strip()[:300] or "event: error"
        elif not line:
            event = ""
    answer.error = answer.error or "the stream ended without [DONE]"


class Load:
    """Use as a context manager; leaving it waits until everything asked has been answered.

    `streams` and `unary` requests of `tokens` tokens are always in flight, every other one through chat; `rate` more
    come each second, of `short` tokens. `prompts` is how many different questions there are; `timeout` (seconds) is
    for one answer. `headers` go with every request, `tls` says whose certificate is good.
    """

    def __init__(
        self,
        url: str,
        streams: int = 0,
        unary: int = 0,
        rate: float = 0.0,
        *,
        tokens: int = 40,
        short: int = 4,
        prompts: int = 8,
        timeout: float = 60.0,
        model: str = "tiny",
        texts: dict[Question, str] | None = None,
        headers: Mapping[str, str] | None = None,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self._headers, self._tls = headers, tls
        self.url, self.model = url, model
        self._counts, self._rate, self._timeout = (streams, unary), rate, timeout
        self._tokens, self.short, self._prompts = tokens, short, prompts
        #: Undisturbed texts, by question.
        self.texts: dict[Question, str] = texts if texts is not None else {}
        self.answers: list[Answer] = []
        self._open: set[int] = set()
        self._stop = threading.Event()
        self._ready = threading.Event()
        self._failed = ""
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Load:
        self._thread.start()
        eventually(self._ready.is_set, 120, "undisturbed answers")
        assert not self._failed, self._failed
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(self._timeout + 30)
        assert not self._thread.is_alive(), "requests that never end"

    # -- what came of it -----------------------------------------------------------------------------------------

    @property
    def lost(self) -> list[Answer]:
        return [a for a in list(self.answers) if a.error]

    @property
    def wrong(self) -> list[Answer]:
        """Whole answers with another text than the undisturbed one."""
        return [a for a in list(self.answers) if not a.error and a.text != self.texts[_plain(a.question)]]

    @property
    def wrong_usage(self) -> list[Answer]:
        """Whole answers whose count of tokens is not what was asked for."""
        done = [a for a in list(self.answers) if not a.error]
        return [a for a in done if a.usage and a.usage["completion_tokens"] != a.question.tokens]

    def in_flight_at(self, moment: float, stream: bool) -> list[Answer]:
        """Answers that were being given at `moment` and are over now."""
        return [a for a in list(self.answers) if a.question.stream is stream and a.sent < moment < a.done]

    def longest_pauses(self, moment: float) -> list[float]:
        """For each stream that was in flight at `moment`, and was not lost, its longest pause there (seconds)."""
        return [a.pause_at(moment) for a in self.in_flight_at(moment, True) if not a.error]

    def pauses(self, since: float, until: float) -> list[float]:
        """The pauses of all streams between two moments, the shortest first (seconds); of answers that are over."""
        found = [p for a in list(self.answers) if a.question.stream for p in a.pauses]
        return sorted(seconds for begun, seconds in found if begun < until and begun + seconds > since)

    def outage(self, moment: float) -> float:
        """From `moment` to the first answer to a request sent after the first one lost; 0 when none was (seconds)."""
        later = [a for a in list(self.answers) if a.done >= moment]
        lost = [a.done for a in later if a.error]
        if not lost:
            return 0.0
        return min((a.done for a in later if not a.error and a.sent >= min(lost)), default=float("inf")) - moment

    def longest_wait(self, since: float) -> float:
        """The longest that a request took that was answered whole after `since` (seconds)."""
        return max((a.done - a.sent for a in list(self.answers) if not a.error and a.done >= since), default=0.0)

    def wait_busy(self, seconds: float = 0.0) -> None:
        """Wait until all places are taken, and then for a while."""
        eventually(lambda: len(self._open) >= sum(self._counts), 60, "all requests in flight")
        if seconds:
            self._stop.wait(seconds)

    def said(self) -> str:
        """The first of what is lost or wrong, for an assertion's message."""
        lost, wrong = self.lost, self.wrong
        first = f"; first error: {lost[0].question} {lost[0].error}" if lost else ""
        if wrong:
            first += f"; first wrong text: {wrong[0].text!r} for {self.texts[_plain(wrong[0].question)]!r}"
        return f"{len(self.answers)} answers, {len(lost)} lost, {len(wrong)} with another text{first}"

    # -- the other thread ----------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            asyncio.run(self._main())
        except Exception as exc:  # told where it is asked for
            self._failed = repr(exc)
        finally:
            self._ready.set()

    async def _main(self) -> None:
        limits = self._limits()
        connector = aiohttp.TCPConnector(limit=0, ssl=self._tls or True)
        async with aiohttp.ClientSession(timeout=limits, connector=connector, headers=self._headers) as session:
            await self._learn(session)
            self._ready.set()
            places = [self._keep(session, n, n < self._counts[0]) for n in range(sum(self._counts))]
            await asyncio.gather(*places, self._come(session))

    def _limits(self) -> aiohttp.ClientTimeout:
        return aiohttp.ClientTimeout(total=self._timeout)

    async def _learn(self, session: aiohttp.ClientSession) -> None:
        wanted = [q for q in self._questions() if q not in self.texts]
        for first in range(0, len(wanted), 32):
            some = wanted[first : first + 32]
            for answer in await asyncio.gather(*(ask(session, self.url, q, self.model) for q in some)):
                assert not answer.error, f"undisturbed, and yet {answer.error}"
                self.texts[answer.question] = answer.text

    def _questions(self) -> Iterator[Question]:
        for tokens in {self._tokens, self.short}:
            for number in range(self._prompts):
                for chat in (False, True):
                    yield _plain(self._question(number, tokens, chat=chat))

    def _question(self, number: int, tokens: int, stream: bool = False, chat: bool = False) -> Question:
        return Question(f"question {number % self._prompts}", tokens, stream, chat)

    async def _keep(self, session: aiohttp.ClientSession, number: int, stream: bool) -> None:
        turn = 0
        # Not all at once: their first and last tokens should come spread over the time that one takes.
        await asyncio.sleep(number / max(1, sum(self._counts)))
        while not self._stop.is_set():
            question = self._question(number + turn, self._tokens, stream, chat=(number + turn) % 2 == 1)
            self._open.add(number)
            answer = await self._ask(session, question)
            self._note(answer)
            turn += 1
            if answer.error:
                await asyncio.sleep(0.2)  # as somebody would who sees it; else one outage is ten thousand errors
        self._open.discard(number)

    async def _ask(self, session: aiohttp.ClientSession, question: Question) -> Answer:
        return await ask(session, self.url, question, self.model)

    def _note(self, answer: Answer) -> None:
        answer.choices = []  # of hundreds of thousands of chunks, the text is enough
        self.answers.append(answer)

    async def _come(self, session: aiohttp.ClientSession) -> None:
        loop, number, asked = asyncio.get_running_loop(), 0, set()
        begun = loop.time()
        while not self._stop.is_set():
            if not self._rate:
                await asyncio.sleep(0.05)
                continue
            await asyncio.sleep(max(0.0, begun + number / self._rate - loop.time()))
            question = self._question(number, self.short, stream=number % 4 > 1, chat=number % 2 == 1)
            task = loop.create_task(self._ask(session, question))
            asked.add(task)
            task.add_done_callback(lambda t: (self._note(t.result()), asked.discard(t)))
            number += 1
        await asyncio.gather(*asked)


class Either(Load):
    """A client that knows two frontends, `urls`, which may be set anew: what one does not answer whole, it asks the
    other, once. Each in its turn is the first to be asked. `sent` of an answer is when the first was.

    A machine that is switched off says nothing: `CONNECT` and `SILENT` are how long the client waits for a connection,
    and for the next word on one (seconds).
    """

    CONNECT, SILENT = 2.0, 5.0

    def __init__(self, urls: tuple[str, str], streams: int = 0, unary: int = 0, rate: float = 0.0, **more: Any) -> None:
        super().__init__(urls[0], streams, unary, rate, **more)
        self.urls = urls
        #: First tries that failed.
        self.retried: list[Answer] = []
        self._turn = itertools.count()

    def _limits(self) -> aiohttp.ClientTimeout:
        return aiohttp.ClientTimeout(total=self._timeout, sock_connect=self.CONNECT, sock_read=self.SILENT)

    async def _ask(self, session: aiohttp.ClientSession, question: Question) -> Answer:
        first, second = self.urls if next(self._turn) % 2 == 0 else self.urls[::-1]
        answer = await ask(session, first, question, self.model)
        if not answer.error:
            return answer
        self.retried.append(answer)
        again = await ask(session, second, question, self.model)
        if again.error:
            again.error = f"{second}: {again.error}; before that {first}: {answer.error}"
        again.sent = answer.sent
        return again


def _plain(question: Question) -> Question:
    """The same question without a stream: the text must be the same."""
    return Question(question.prompt, question.tokens, False, question.chat, question.more)
