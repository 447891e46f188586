"""The model's weights: from a safetensors file into GMS once, and from GMS ever after; and what is computed of them.

Tokens follow from the weights by exact integer arithmetic, so that the same prompt gives the same text on any number
of GPUs, and a single wrong byte gives another text. Prefill reads every byte, a decode step a window of it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from gms_launch.engines.reference.compute.base import Compute, Piece, Span
from gms_launch.gms.client import GmsClient

#: Tensors begin at multiples of this in an allocation (bytes), as CUDA libraries like it.
ALIGNMENT = 256
#: Tensors are packed into allocations of this size (bytes) or of their own, if larger: what a remap costs goes with the
#: number of allocations, about 75 us each on an H200, and hardly with bytes. 2 GiB makes 64 GiB 32 allocations.
CHUNK = 2 * 1024 * 1024 * 1024
#: Words a decode step reads.
WINDOW = 4096
_MASK = (1 << 64) - 1


class ModelError(Exception):
    """The model directory is not usable."""


@dataclass(frozen=True)
class Shard:
    """This worker's part of one tensor: `words` words at `address`, from word `first` of the whole's `total` on."""

    index: int
    name: str
    first: int
    total: int
    words: int
    address: int


@dataclass(frozen=True)
class _Part:
    """A rank's part of a tensor in a file: bytes `offset` to `offset + size`, padded to `words` words."""

    index: int
    name: str
    fd: int
    offset: int
    size: int
    first: int
    words: int
    total: int


def tensor_files(model: Path) -> list[Path]:
    """The safetensors files of a model directory. Raises `ModelError`."""
    found = sorted(model.glob("*.safetensors"))
    if not found:
        raise ModelError(f"{model} holds no .safetensors file; `gms-launch demo-model {model}` makes a small model")
    return found


def _split(total: int, rank: int, world: int) -> tuple[int, int]:
    """First and last-plus-one word of a rank's part of `total` words."""
    return total * rank // world, total * (rank + 1) // world


def _offsets(file: Path) -> dict[str, tuple[int, int]]:
    """Where each tensor's bytes lie in a file: offset and size. The library checks the file; it does not tell this."""
    from safetensors import safe_open

    with safe_open(file, framework="np") as checked:
        names = sorted(checked.keys())
    with open(file, "rb") as raw:
        length = int.from_bytes(raw.read(8), "little")
        header = json.loads(raw.read(length))
    spans = {name: header[name]["data_offsets"] for name in names}
    return {name: (8 + length + low, high - low) for name, (low, high) in spans.items()}


def _parts(fds: dict[Path, int], rank: int, world: int) -> list[_Part]:
    parts: list[_Part] = []
    for file, fd in fds.items():
        for name, (offset, size) in _offsets(file).items():
            total = -(-size // 8)
            first, end = _split(total, rank, world)
            length = max(0, min(8 * end, size) - 8 * first)
            parts.append(_Part(len(parts), name, fd, offset + 8 * first, length, first, end - first, total))
    return parts


def load_from_disk(model: Path, client: GmsClient, compute: Compute, rank: int, world: int) -> int:
    """Read this rank's part of every tensor into GMS allocations; returns the bytes. The client must hold RW.

    Metadata per tensor: key = name; place = allocation and offset; value = JSON with the tensor's number, the first
    word and the number of words of this part, and the words of the whole. Raises `ModelError`.
    """
    from safetensors import SafetensorError

    fds: dict[Path, int] = {}
    try:
        for file in tensor_files(model):
            fds[file] = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
        parts = _parts(fds, rank, world)
        for group in _pack(parts):
            mapping = client.allocate(sum(_padded(8 * p.words) for p in group), "weights")
            pieces = []
            offset = 0
            for part in group:
                if part.size:
                    pieces.append(Piece(part.fd, part.offset, part.size, mapping.address + offset))
                if part.size < 8 * part.words:
                    compute.zero(mapping.address + offset + part.size, 8 * part.words - part.size)
                value = {"index": part.index, "first": part.first, "words": part.words, "total": part.total}
                client.put(part.name, mapping.allocation_id, offset, json.dumps(value).encode())
                offset += _padded(8 * part.words)
            compute.fill(pieces)
    except (SafetensorError, OSError, ValueError, KeyError) as exc:
        raise ModelError(f"{model}: its weights cannot be read: {exc}") from None
    finally:
        for fd in fds.values():
            os.close(fd)
    return sum(p.size for p in parts)


def _padded(size: int) -> int:
    return max(ALIGNMENT, -(-size // ALIGNMENT) * ALIGNMENT)


def _pack(parts: list[_Part]) -> list[list[_Part]]:
    """Tensors in groups, each for one allocation."""
    groups: list[list[_Part]] = [[]]
    filled = 0
    for part in parts:
        size = _padded(8 * part.words)
        if groups[-1] and filled + size > CHUNK:
            groups.append([])
            filled = 0
        groups[-1].append(part)
        filled += size
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
        address = by_id[allocation_id].address + offset
        found.append(Shard(meta["index"], name, meta["first"], meta["total"], meta["words"], address))
    return sorted(found, key=lambda s: s.index)


# -- arithmetic, all modulo 2**64 ----------------------------------------------------------------------------------


def mix(value: int) -> int:
    """Scatter the bits of a 64-bit number (the finaliser of splitmix64)."""
    value = (value + 0x9E3779B97F4A7C15) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


def digest(compute: Compute, parts: list[Shard]) -> int:
    """This worker's share of a number that every byte of the model takes part in."""
    sums = compute.weighted_sums([Span(s.address, s.words, s.first) for s in parts])
    return sum(mix(s.index) * total for s, total in zip(parts, sums, strict=True)) & _MASK


def windows(compute: Compute, parts: list[Shard], states: Sequence[int]) -> list[int]:
    """This worker's share of the window of weights that each state points at."""
    spans = [_span(parts, state) for state in states]
    mine = [span for span in spans if span is not None]
    sums = iter(compute.weighted_sums(mine) if mine else ())
    return [0 if span is None else next(sums) for span in spans]


def _span(parts: list[Shard], state: int) -> Span | None:
    shard = parts[state % len(parts)]
    length = min(WINDOW, shard.total)
    start = (state >> 16) % (shard.total - length + 1)
    low = max(start, shard.first)
    high = min(start + length, shard.first + shard.words)
    if low >= high:
        return None
    return Span(shard.address + 8 * (low - shard.first), high - low, low)
