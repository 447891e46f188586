"""What comes next in a text: pure arithmetic on its tokens, with no memory of how it came to them.

The state of a text follows from the weights' digest and from its tokens alone, whether they were asked or answered. So
a text that is cut anywhere and asked again, with the tokens so far behind the prompt and `max_tokens` less by their
number, goes on as if nobody had cut it: that is what a frontend does with a request when an engine dies.

A miniature of sampling: temperature 0 draws from the state; above 0 the seed is mixed in at every token, where a real
engine would start its generator anew. There are no penalties and no guided decoding.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from gms_launch.engines.reference.weights import mix

#: Token ids below this are special tokens and single bytes; the demo model's words begin here.
FIRST_WORD = 300
#: A text whose length nobody set ends at a token with this chance: 1 in so many. One with `max_tokens` runs to its end.
ENDING = 32


def read(state: int, tokens: Sequence[int]) -> int:
    """The state of a text after these tokens of it; at its beginning it is the weights' digest."""
    for token in tokens:
        state = mix(state ^ token)
    return state


class Answer:
    """One choice of an answer, while it grows. `request` is Dynamo's preprocessed one, `state` that of its prompt."""

    def __init__(
        self, request: Mapping[str, Any], state: int, vocabulary: int, context: int, choice: int = 0, salt: int = 0
    ) -> None:
        stop, sampling = request.get("stop_conditions") or {}, request.get("sampling_options") or {}
        output = request.get("output_options") or {}
        self._vocabulary, self._choice = vocabulary, choice
        self._salt = _salt(sampling, choice, salt)
        limit = stop.get("max_tokens")
        self._ends_by_itself = limit is None and not stop.get("ignore_eos")
        room = max(0, context - len(request["token_ids"]))
        self._limit = room if limit is None else min(limit, room)
        self._least = stop.get("min_tokens") or 0
        self._stops = frozenset([*(stop.get("stop_token_ids") or []), *(stop.get("stop_token_ids_hidden") or [])])
        self._logprobs = output.get("logprobs")
        self.state, self.position, self.count = state, len(request["token_ids"]), 0
        #: Why it ended, in vLLM's words; None while it goes on.
        self.finished: str | None = None if self._limit else "length"

    def take(self, share: int) -> dict[str, Any]:
        """One more token, from what the weights have to say about the state. Returns a chunk as dynamo.vllm's."""
        drawn = mix(mix(self.state + share) ^ self._salt)
        token = self._word(drawn)
        self.state = read(self.state, [token])
        self.position += 1
        self.count += 1
        if self.count >= self._least and (token in self._stops or (self._ends_by_itself and mix(drawn) % ENDING == 0)):
            self.finished = "stop"
        elif self.count == self._limit:
            self.finished = "length"
        chunk = {"index": self._choice, "token_ids": [token], "finish_reason": self.finished}
        return chunk | self._chances(drawn, token)

    def _word(self, drawn: int) -> int:
        return FIRST_WORD + drawn % (self._vocabulary - FIRST_WORD)

    def _chances(self, drawn: int, token: int) -> dict[str, Any]:
        if self._logprobs is None:
            return {}
        best = -(drawn >> 40) / (1 << 24)
        others = [self._word(mix(drawn + k)) for k in range(1, int(self._logprobs))]
        ranked = [
            {"rank": k + 1, "token_id": t, "token": f"token_id:{t}", "logprob": best - k}
            for k, t in enumerate([token, *others])
        ]
        return {"log_probs": [best], "top_logprobs": [ranked]}


def _salt(sampling: Mapping[str, Any], choice: int, salt: int) -> int:
    """What makes a sampled text another one than the greedy: nothing at temperature 0, where all choices are alike."""
    if not sampling.get("temperature"):
        return 0
    seed = sampling.get("seed")
    return mix((salt if seed is None else int(seed)) + (choice << 32))


def answers(request: Mapping[str, Any], state: int, vocabulary: int, context: int) -> list[Answer]:
    """The choices that were asked for, `n` of them. Sampled without a seed they are others each time."""
    count = (request.get("sampling_options") or {}).get("n") or 1
    salt = int.from_bytes(os.urandom(8), "big")
    return [Answer(request, state, vocabulary, context, choice, salt) for choice in range(count)]


def usage(request: Mapping[str, Any], found: Sequence[Answer]) -> dict[str, Any]:
    """Token counts as dynamo.vllm gives them with a last chunk: of this request, whatever it was before it moved."""
    asked, told = len(request["token_ids"]), sum(a.count for a in found)
    return {"prompt_tokens": asked, "completion_tokens": told, "total_tokens": asked + told}
