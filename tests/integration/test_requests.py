"""What a client sees of a failover: which requests in flight go on with the same text, and which do not.

The rows are those of docs/requests.md. Every kind of request is asked undisturbed, and then all of them at once while
the primary is killed: by a client that reads what comes, by `curl -N`, and by the official `openai` client.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import openai
import pytest

from tests.load import Answer, Load, Question, ask
from tests.support import LONG, Deployment, eventually

#: So slow that on a busy machine, too, no answer is over before another has begun.
TOKENS, TOKEN_SECONDS = 60, 0.12
#: The kill comes when every stream has so many tokens; the stop string that is cut begins before and ends after.
EARLY, CUT_FROM, CUT_TO = 15, 5, 55
SEEDED = {"temperature": 0.8, "seed": 7}
TOOLS = [{"type": "function", "function": {"name": "tide", "parameters": {"type": "object", "properties": {}}}}]


def question(stream: bool = True, chat: bool = False, prompt: str = "the sea", **more: Any) -> Question:
    return Question(prompt, TOKENS, stream, chat, json.dumps(more))


PLAIN = {
    "completion, stream": question(),
    "completion, unary": question(stream=False),
    "chat, stream": question(chat=True),
    "chat, unary": question(stream=False, chat=True),
}
#: What moves whole.
MOVED = PLAIN | {
    "seed": question(**SEEDED),
    "seed, chat, unary": question(stream=False, chat=True, **SEEDED),
    "logprobs": question(logprobs=2),
    "logprobs, unary": question(stream=False, logprobs=2),
    "logprobs, chat": question(chat=True, logprobs=True, top_logprobs=2),
    "logprobs, chat, unary": question(stream=False, chat=True, logprobs=True, top_logprobs=2),
    "tools": question(chat=True, tools=TOOLS),
    "tools, unary": question(stream=False, chat=True, tools=TOOLS),
    "several prompts": Question("", TOKENS, more=json.dumps({"prompt": ["the sea", "the land"]})),
    "several prompts, unary": Question("", TOKENS, False, more=json.dumps({"prompt": ["the sea", "the land"]})),
    "token ids": Question("", TOKENS, more=json.dumps({"prompt": [901, 17, 3020]})),
}
#: What the frontend does not move: the client reads an error.
REFUSED = {
    "n": question(n=2, **SEEDED),
    "n, unary": question(stream=False, n=2, **SEEDED),
    "guided decoding": question(chat=True, response_format={"type": "json_object"}),
    "a tool that must be called": question(chat=True, tools=TOOLS, tool_choice="required"),
}
#: Made of what the model says; see `seen`.
OF_THE_TEXT = ["no max_tokens", "stop string", "stop string that is cut"]


@dataclass
class Seen:
    """The answers, undisturbed and across the failover, and when that was."""

    calm: dict[str, Answer] = field(default_factory=dict)
    moved: dict[str, Answer] = field(default_factory=dict)
    killed: float = 0.0
    at_the_kill: dict[str, int] = field(default_factory=dict)
    curl: dict[str, str] = field(default_factory=dict)
    client: dict[str, str] = field(default_factory=dict)


async def _ask_all(url: str, rows: dict[str, Question], into: dict[str, Answer]) -> None:
    into |= {name: Answer(q) for name, q in rows.items()}
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=300)) as session:
        await asyncio.gather(*(ask(session, url, a.question, into=a) for a in into.values()))


def _of_the_text(url: str) -> dict[str, Question]:
    """Questions that need to know what the model says."""
    more = [json.dumps({"max_tokens": None, "prompt": f"sea {k}"}) for k in range(12)]
    found: dict[str, Answer] = {}
    rows = {"tokens": question(stream=False, logprobs=1)} | {m: Question("", TOKENS, more=m) for m in more}
    asyncio.run(_ask_all(url, rows, found))
    words = found.pop("tokens").choices[0]["logprobs"]["tokens"]
    # Long enough that the kill comes in the middle.
    longest = max(found.values(), key=lambda a: a.chunks)
    assert longest.chunks > 2 * EARLY, [a.chunks for a in found.values()]
    return {
        "no max_tokens": longest.question,
        "stop string": question(stop=["".join(words[TOKENS - 3 :]).strip()]),
        "stop string that is cut": question(stop=["".join(words[CUT_FROM:CUT_TO]).strip()]),
    }


def _curl(url: str, row: str) -> str:
    """The text of a stream as `curl -N` prints it."""
    asked = PLAIN[row]
    argv = ["curl", "-sSN", "--fail-with-body", url + asked.path, "-H", "content-type: application/json"]
    done = subprocess.run(
        [*argv, "-d", json.dumps(asked.body("tiny"))], capture_output=True, text=True, timeout=300, check=False
    )
    lines = done.stdout.splitlines()
    assert done.returncode == 0 and "data: [DONE]" in lines, done.stdout[-500:] + done.stderr
    assert not [line for line in lines if line.startswith("event:")], done.stdout[-500:]
    answer = Answer(asked)
    for line in lines:
        if line.startswith("data: {"):
            answer.take(json.loads(line[6:]), 0.0)
    return answer.text


def _client(url: str, row: str) -> str:
    """The same by the official client, which asks once."""
    asked = PLAIN[row]
    client = openai.OpenAI(base_url=url + "/v1", api_key="none", max_retries=0, timeout=300)
    common: dict[str, Any] = {"model": "tiny", "max_tokens": asked.tokens, "temperature": 0, "stream": asked.stream}
    if asked.chat:
        said = client.chat.completions.create(messages=[{"role": "user", "content": asked.prompt}], **common)
        if not asked.stream:
            return str(said.choices[0].message.content)
        return "".join(c.choices[0].delta.content or "" for c in said if c.choices)
    said = client.completions.create(prompt=asked.prompt, **common)
    if not asked.stream:
        return str(said.choices[0].text)
    return "".join(c.choices[0].text or "" for c in said if c.choices)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Iterator[Deployment]:
    seconds = str(TOKEN_SECONDS)
    with Deployment(tmp_path_factory.mktemp("home"), model, REFERENCE_TOKEN_SECONDS=seconds) as deployment:
        yield deployment


@pytest.fixture(scope="module")
def seen(run: Deployment) -> Seen:
    url, status, found = run.run_file["frontend_url"], run.wait_full(), Seen()
    rows = MOVED | REFUSED | _of_the_text(url)
    asyncio.run(_ask_all(url, rows, found.calm))
    assert [(name, a.error) for name, a in found.calm.items() if a.error] == [], "undisturbed"
    streams = [name for name in PLAIN if PLAIN[name].stream]
    victim = status["cohorts"][status["primary"]]["ranks"][0]["pgid"]
    with ThreadPoolExecutor(8) as pool:
        by_curl = {row: pool.submit(_curl, url, row) for row in streams}
        by_client = {row: pool.submit(_client, url, row) for row in PLAIN}
        asking = threading.Thread(target=lambda: asyncio.run(_ask_all(url, rows, found.moved)))
        asking.start()
        watched = [*streams, "no max_tokens", "n", "logprobs"]  # not every one is told as it grows
        eventually(lambda: len(found.moved) == len(rows) and all(found.moved[w].chunks >= EARLY for w in watched), LONG)
        found.at_the_kill = {w: found.moved[w].chunks for w in watched}
        found.killed = time.monotonic()
        os.killpg(victim, signal.SIGKILL)
        asking.join()
        found.client = {row: _told(future.result) for row, future in by_client.items()}
        found.curl = {row: _told(future.result) for row, future in by_curl.items()}
    assert run.wait_full()["primary"] == 1 - status["primary"]
    return found


def _told(result: Callable[[], str]) -> str:
    """A text, or what came instead."""
    try:
        return result()
    except Exception as exc:
        return repr(exc)


def test_the_kill_came_in_the_middle_of_every_answer(seen: Seen) -> None:
    for name, answer in seen.moved.items():
        assert answer.sent < seen.killed < answer.done, name
    for name, chunks in seen.at_the_kill.items():
        choices = len(seen.calm[name].texts)
        assert EARLY <= chunks < CUT_TO * choices, (name, chunks)


def _logprobs(answer: Answer) -> list[Any]:
    found: list[Any] = []
    for choice in answer.choices:
        told = choice.get("logprobs") or {}
        found += told.get("content") or zip(told.get("tokens", []), told.get("token_logprobs", []), strict=True)
    return found


@pytest.mark.parametrize("row", [*MOVED, "no max_tokens", "stop string"])
def test_what_moves_has_the_text_of_an_undisturbed_run(row: str, seen: Seen) -> None:
    calm, moved = seen.calm[row], seen.moved[row]
    assert not moved.error
    assert moved.texts == calm.texts and moved.finish == calm.finish
    assert _logprobs(moved) == _logprobs(calm) and bool(_logprobs(calm)) == row.startswith("logprobs")


@pytest.mark.parametrize("row", MOVED)
def test_usage_counts_what_was_sent_before_the_move_as_prompt(row: str, seen: Seen) -> None:
    """The engine counts from the request it got; the frontend counts completion tokens itself, and takes its prompt."""
    calm, moved = seen.calm[row].usage, seen.moved[row].usage
    assert calm is not None and moved is not None
    assert moved["completion_tokens"] == calm["completion_tokens"]
    assert calm["prompt_tokens"] < moved["prompt_tokens"] < calm["prompt_tokens"] + calm["completion_tokens"]
    assert moved["total_tokens"] == moved["prompt_tokens"] + moved["completion_tokens"]


@pytest.mark.parametrize("row", REFUSED)
def test_what_the_frontend_does_not_move_ends_with_an_error(row: str, seen: Seen) -> None:
    assert seen.moved[row].error and not seen.moved[row].finish


def test_a_stop_string_that_is_cut_by_the_move_is_not_seen(seen: Seen) -> None:
    calm, moved = seen.calm["stop string that is cut"], seen.moved["stop string that is cut"]
    assert calm.finish == {0: "stop"} and not moved.error
    assert moved.finish == {0: "length"} and moved.text == seen.calm["completion, stream"].text


@pytest.mark.parametrize("row", [name for name in PLAIN if PLAIN[name].stream])
def test_curl_reads_the_same_stream(row: str, seen: Seen) -> None:
    assert seen.curl[row] == seen.calm[row].text


@pytest.mark.parametrize("row", PLAIN)
def test_the_official_client_reads_the_same(row: str, seen: Seen) -> None:
    assert seen.client[row] == seen.calm[row].text


@pytest.mark.parametrize("how", ["SIGKILL", "kill-primary"])
def test_a_failover_under_load_loses_nothing(how: str, run: Deployment) -> None:
    primary = run.wait_full()["primary"]
    with Load(run.run_file["frontend_url"], streams=24, unary=8, rate=10, tokens=40) as load:
        load.wait_busy(1.0)
        killed = time.monotonic()
        if how == "SIGKILL":
            os.killpg(run.cohort(primary)["ranks"][0]["pgid"], signal.SIGKILL)
        else:
            assert run.cli("kill-primary").returncode == 0
        assert run.wait_full()["primary"] == 1 - primary
    assert not load.lost and not load.wrong, load.said()
    assert len(load.in_flight_at(killed, True)) >= 20 and len(load.in_flight_at(killed, False)) >= 6
