"""The reference engine's texts: the same whether they are cut and asked again or not; others for other weights."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from gms_launch.engines.reference import handover
from gms_launch.engines.reference.answer import Answer, answers, read, usage
from gms_launch.engines.reference.batch import Batch
from gms_launch.engines.reference.weights import mix

DIGEST, VOCABULARY, CONTEXT = 0x1234, 4096, 400
PROMPT = [901, 17, 3020]


def request(tokens: list[int] = PROMPT, sampling: dict[str, Any] | None = None, **stop: Any) -> dict[str, Any]:
    """As Dynamo's preprocessor hands it over."""
    return {
        "token_ids": tokens,
        "stop_conditions": {"max_tokens": 40} | stop,
        "sampling_options": {"temperature": 0.0} | (sampling or {}),
        "output_options": {"logprobs": 2},
    }


def told(asked: dict[str, Any], digest: int = DIGEST, choice: int = 0) -> list[dict[str, Any]]:
    """All chunks of an answer."""
    one = Answer(asked, read(digest, asked["token_ids"]), VOCABULARY, CONTEXT, choice)
    chunks = []
    while not one.finished:
        chunks.append(one.take(mix(one.state ^ 0xABCDEF)))  # the weights' part: any function of the state
    return chunks


def tokens(chunks: list[dict[str, Any]]) -> list[int]:
    return [t for c in chunks for t in c["token_ids"]]


def moved(asked: dict[str, Any], so_far: list[int]) -> dict[str, Any]:
    """The same request as a frontend asks it again, elsewhere, after `so_far`."""
    limit = asked["stop_conditions"]["max_tokens"]
    stop = {"max_tokens": None if limit is None else limit - len(so_far)}
    return asked | {
        "token_ids": asked["token_ids"] + so_far,
        "stop_conditions": asked["stop_conditions"] | stop,
    }


@pytest.mark.parametrize(
    "asked",
    [
        request(),
        request(sampling={"temperature": 0.7, "seed": 5}),
        request([901, 0], max_tokens=None),
        request(max_tokens=None, ignore_eos=True),
        request(stop_token_ids=[tokens(told(request()))[30]]),
    ],
    ids=["max_tokens", "seed", "ends by itself", "runs to the end of the context", "stop token"],
)
def test_a_text_that_is_cut_anywhere_goes_on_as_if_it_had_not_been(asked: dict[str, Any]) -> None:
    whole = told(asked)
    assert len(whole) > 5 and whole[-1]["finish_reason"]
    for cut in range(len(whole)):
        assert told(moved(asked, tokens(whole[:cut]))) == whole[cut:], cut
    for cut in range(0, len(whole) - 3, 7):  # and a second time, elsewhere
        once = moved(asked, tokens(whole[:cut]))
        assert told(moved(once, tokens(whole[cut : cut + 3]))) == whole[cut + 3 :], cut


def test_a_text_follows_from_prompt_weights_and_seed() -> None:
    texts = [
        tokens(told(request())),
        tokens(told(request([901, 17, 3021]))),
        tokens(told(request([17, 901, 3020]))),
        tokens(told(request(), digest=DIGEST ^ 1)),
        tokens(told(request(sampling={"temperature": 0.7, "seed": 5}))),
        tokens(told(request(sampling={"temperature": 0.7, "seed": 6}))),
        tokens(told(request(sampling={"temperature": 0.7, "seed": 5}), choice=1)),
    ]
    assert len({tuple(t) for t in texts}) == len(texts)
    assert tokens(told(request(sampling={"seed": 5}))) == texts[0], "at temperature 0 no seed matters"
    assert all(300 <= t < VOCABULARY for t in texts[0])


def test_why_an_answer_ends() -> None:
    whole = tokens(told(request()))
    assert [c["finish_reason"] for c in told(request())] == [None] * 39 + ["length"]
    assert told(request(stop_token_ids_hidden=[whole[9]]))[-1]["finish_reason"] == "stop"
    assert len(told(request(stop_token_ids=[whole[9]]))) == 10
    assert len(told(request(stop_token_ids=[whole[9]], min_tokens=11))) == 40
    assert told(request(max_tokens=None))[-1]["finish_reason"] == "stop"
    full = told(request(max_tokens=None, ignore_eos=True))
    assert len(full) == CONTEXT - len(PROMPT) and full[-1]["finish_reason"] == "length"
    assert told(request(max_tokens=0)) == []


def test_choices_are_alike_at_temperature_0_and_others_when_sampled() -> None:
    def several(**sampling: Any) -> list[list[int]]:
        found = answers(request(sampling={"n": 3} | sampling), DIGEST, VOCABULARY, CONTEXT)
        return [[one.take(0)["token_ids"][0] for _ in range(5)] for one in found]

    alike, apart = several(), several(temperature=1.0, seed=3)
    assert alike[0] == alike[1] == alike[2]
    assert len({tuple(t) for t in apart}) == 3 and apart == several(temperature=1.0, seed=3)
    assert several(temperature=1.0) != several(temperature=1.0), "without a seed each time another"


def test_usage_is_counted_from_this_request_on() -> None:
    asked = moved(request(), tokens(told(request()))[:30])
    (one,) = answers(asked, DIGEST, VOCABULARY, CONTEXT)
    while not one.finished:
        one.take(mix(one.state ^ 0xABCDEF))
    assert usage(asked, [one]) == {"prompt_tokens": 33, "completion_tokens": 10, "total_tokens": 43}


class Group:
    """Two workers that answer when told to."""

    def __init__(self) -> None:
        self.asked: list[dict[str, Any]] = []
        self.go = asyncio.Semaphore(0)

    async def some(self, ranks: range, **message: Any) -> list[dict[str, Any]]:
        assert len(ranks) == 2
        self.asked.append(message)
        await self.go.acquire()
        if message["op"] == "prefill":
            return [{"part": (1 << 64) - 1}, {"part": 8}]
        return [{"parts": [s * k for s in message["states"]]} for k in (1, 2)]


def test_what_waits_while_the_group_works_is_one_step() -> None:
    async def scene() -> None:
        group = Group()
        batch = Batch(group, range(2))  # type: ignore[arg-type]
        first = asyncio.create_task(batch.step(5, 0))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        later = [asyncio.create_task(batch.step(s, s)) for s in (6, 7)]
        digests = [asyncio.create_task(batch.digest()) for _ in range(2)]
        given_up = asyncio.create_task(batch.step(8, 8))
        await asyncio.sleep(0)
        given_up.cancel()
        for _ in range(3):
            group.go.release()
        assert await first == 15
        assert await asyncio.gather(*later) == [18, 21]
        assert await asyncio.gather(*digests) == [7, 7]
        assert [m["op"] for m in group.asked] == ["steps", "prefill", "steps"]
        assert group.asked[2]["states"] == [6, 7, 8] and group.asked[2]["positions"] == [6, 7, 8]

    asyncio.run(scene())


def test_a_decode_engine_goes_on_from_the_handle_and_refuses_any_other() -> None:
    asked, state = request(), read(DIGEST, PROMPT)
    given = asked | {"prefill_result": {"disaggregated_params": handover.give(asked, state, "engine")}}
    assert handover.take(given) == state
    assert handover.take(asked | {"annotations": [handover.ALONE]}) is None, "it may be asked to do both parts"
    for wrong, says in (
        (asked, "without a handle"),
        (asked | {"prefill_result": {"disaggregated_params": None}}, "without a handle"),
        (given | {"token_ids": [*PROMPT, 9]}, "not of this prompt"),
        (with_params(given, state="1"), "not of this prompt"),
        (with_params(given, seal="none"), "no handle that can be read"),
    ):
        with pytest.raises(handover.HandoverError, match=says):
            handover.take(wrong)


def with_params(given: dict[str, Any], **other: str) -> dict[str, Any]:
    params = given["prefill_result"]["disaggregated_params"]["kv_transfer_params"] | other
    return given | {"prefill_result": {"disaggregated_params": {"kv_transfer_params": params}}}
