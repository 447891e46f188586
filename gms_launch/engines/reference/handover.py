"""What the prefill half hands to the decode half: a handle on what it has read, as a KV connector's parameters are.

It stands for the KV cache of one prompt: the decode half goes on from it, without reading the prompt or the weights for
it, and refuses one that is missing, of another prompt, or changed. It holds what it stands for, which a real one does
not: a prefill engine that dies after it has answered is not missed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gms_launch.engines.reference.answer import read
from gms_launch.engines.reference.weights import mix

#: By this note a decode half does both parts itself (Dynamo 1.4 and later call it so).
ALONE = "bypass_remote_prefill"


class HandoverError(RuntimeError):
    """A decode half was asked without what a prefill half has to give it."""


def give(request: Mapping[str, Any], state: int, engine: str) -> dict[str, Any]:
    """The handle on a prompt whose state is `state`, with whose it is."""
    params = {"remote_engine_id": engine, "state": f"{state:x}", "seal": f"{_seal(request, state):x}"}
    return {"kv_transfer_params": params}


def take(request: Mapping[str, Any]) -> int | None:
    """The state of the request's prompt, from its handle; None where no other half was to read it.

    Raises `HandoverError`.
    """
    if ALONE in (request.get("annotations") or []):
        return None
    given = (request.get("prefill_result") or {}).get("disaggregated_params") or {}
    params = given.get("kv_transfer_params")
    if not params:
        raise HandoverError("decode without a handle from a prefill engine")
    try:
        state, seal = int(params["state"], 16), int(params["seal"], 16)
    except (KeyError, TypeError, ValueError):
        raise HandoverError(f"no handle that can be read: {params!r}") from None
    if seal != _seal(request, state):
        raise HandoverError(f"the handle of {params.get('remote_engine_id')} is not of this prompt, or was changed")
    return state


def _seal(request: Mapping[str, Any], state: int) -> int:
    return read(mix(state + 1), request["token_ids"])
