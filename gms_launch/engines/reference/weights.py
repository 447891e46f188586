"""The model's weights: from a safetensors file into GMS once, and from GMS ever after; and what is computed of them.

Tokens follow from the weights by exact integer arithmetic, so that the same prompt gives the same text on any number
of GPUs, and a single wrong byte gives another text. Prefill reads every byte, a decode step a window of it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gms_launch.gms.client import GmsClient

Words = NDArray[np.uint64]

#: Tensors begin at multiples of this in an allocation (bytes), as CUDA libraries like it.
ALIGNMENT = 256
#: Tensors are packed into allocations of at least this size (bytes): the cost of a remap goes with their number.
CHUNK = 64 * 1024 * 1024
#: Words a decode step reads.
WINDOW = 4096
_BLOCK = 1 << 17
_MASK = (1 << 64) - 1


class ModelError(Exception):
    """The model directory is not usable."""


@dataclass(frozen=True)
class Shard:
    """This worker's part of one tensor: `words` start at word `first` of the whole tensor's `total`."""

    index: int
    name: str
    first: int
    total: int
    words: Words


def tensor_files(model: Path) -> list[Path]:
    """The safetensors files of a model directory. Raises `ModelError`."""
    found = sorted(model.glob("*.safetensors"))
    if not found:
        raise ModelError(f"{model} holds no .safetensors file; `gms-launch demo-model {model}` makes a small model")
    return found


def _split(total: int, rank: int, world: int) -> tuple[int, int]:
    """First and last-plus-one word of a rank's part of `total` words."""
    return total * rank // world, total * (rank + 1) // world


def _as_words(raw: bytes) -> Words:
    if len(raw) % 8:
        raw = raw + bytes(8 - len(raw) % 8)
    return np.frombuffer(raw, dtype=np.uint64)


def load_from_disk(model: Path, client: GmsClient, rank: int, world: int) -> int:
    """Read this rank's part of every tensor into GMS allocations; returns the bytes. The client must hold RW.

    Metadata per tensor: key = name; place = allocation and offset; value = JSON with the tensor's number, the first
    word and the number of words of this part, and the words of the whole. Raises `ModelError`.
    """
    from safetensors import SafetensorError, safe_open

    parts: list[tuple[str, int, int, Words]] = []
    try:
        for file in tensor_files(model):
            with safe_open(file, framework="np") as tensors:
                for name in sorted(tensors.keys()):
                    words = _as_words(tensors.get_tensor(name).tobytes())
                    first, last = _split(len(words), rank, world)
                    parts.append((name, first, len(words), words[first:last]))
    except (SafetensorError, OSError) as exc:
        raise ModelError(f"weights of {model} cannot be read: {exc}") from None
    loaded = 0
    for group in _pack(parts):
        size = sum(_padded(part.nbytes) for _, (_, _, _, part) in group)
        mapping = client.allocate(size, "weights")
        view = mapping.view()
        offset = 0
        for index, (name, first, total, part) in group:
            view[offset : offset + part.nbytes] = part.tobytes()
            value = json.dumps({"index": index, "first": first, "words": len(part), "total": total})
            client.put(name, mapping.allocation_id, offset, value.encode())
            offset += _padded(part.nbytes)
            loaded += part.nbytes
    return loaded


def _padded(size: int) -> int:
    return max(ALIGNMENT, -(-size // ALIGNMENT) * ALIGNMENT)


def _pack(parts: list[Any]) -> list[list[tuple[int, Any]]]:
    groups: list[list[tuple[int, Any]]] = [[]]
    filled = 0
    for index, part in enumerate(parts):
        if filled >= CHUNK:
            groups.append([])
            filled = 0
        groups[-1].append((index, part))
        filled += _padded(part[3].nbytes)
    return groups


def shards(client: GmsClient) -> list[Shard]:
    """What is mapped, tensor by tensor, without a copy."""
    by_id = {m.allocation_id: m for m in client.mappings.values()}
    found = []
    for name in client.keys():  # noqa: SIM118 - a request to the server, not a dict
        entry = client.get(name)
        assert entry is not None
        allocation_id, offset, value = entry
        meta = json.loads(value)
        view = by_id[allocation_id].view()[offset : offset + 8 * meta["words"]]
        words = np.frombuffer(view, dtype=np.uint64)
        found.append(Shard(meta["index"], name, meta["first"], meta["total"], words))
    return sorted(found, key=lambda s: s.index)


# -- arithmetic, all modulo 2**64 ----------------------------------------------------------------------------------

_COEFFICIENTS: Words = np.arange(_BLOCK, dtype=np.uint64) * np.uint64(2) + np.uint64(1)


def mix(value: int) -> int:
    """Scatter the bits of a 64-bit number (the finaliser of splitmix64)."""
    value = (value + 0x9E3779B97F4A7C15) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


def weighted_sum(words: Words, first: int) -> int:
    """The sum of word i times 2 (first + i) + 1: it notices a changed word and a moved one."""
    total = 0
    for start in range(0, len(words), _BLOCK):
        block = words[start : start + _BLOCK]
        total += int(np.dot(block, _COEFFICIENTS[: len(block)]))
        total += 2 * (first + start) * int(block.sum(dtype=np.uint64))
    return total & _MASK


def digest(parts: list[Shard]) -> int:
    """This worker's share of a number that every byte of the model takes part in."""
    return sum(mix(s.index) * weighted_sum(s.words, s.first) for s in parts) & _MASK


def window(parts: list[Shard], state: int) -> int:
    """This worker's share of the window of weights that `state` points at."""
    shard = parts[state % len(parts)]
    length = min(WINDOW, shard.total)
    start = (state >> 16) % (shard.total - length + 1)
    low = max(start, shard.first)
    high = min(start + length, shard.first + len(shard.words))
    if low >= high:
        return 0
    return weighted_sum(shard.words[low - shard.first : high - shard.first], low)
