"""Which group of this node an engine that registered with Dynamo belongs to: that of the rank which listens there."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Generic, Protocol, TypeVar

from gms_launch.engines.base import LOOPBACK
from gms_launch.process.listener import advertised

#: How often it is looked whose an engine is that registered on this machine, and the first pause (seconds; each is
#: twice the last).
LOOKS, PAUSE = 6, 0.1


class Listening(Protocol):
    """What has ranks here."""

    def listens(self, host: str, port: int) -> bool:
        """Whether one of its living ranks takes connections there."""


G = TypeVar("G", bound=Listening)


class Whose(Generic[G]):
    """Remembers whose each instance is. `address` is this node's.

    The kernel's table is read in pieces, and a socket may be missed while others come and go: what is nobody's is
    looked for again before it is taken for a stranger's.
    """

    def __init__(self, groups: Sequence[G], address: str) -> None:
        self._groups, self._here = groups, (address, LOOPBACK)
        self._found: dict[str, G | None] = {}
        self._looks: dict[str, int] = {}

    def look(self, instances: Mapping[str, bytes]) -> Mapping[str, G | None]:
        """Whose each instance is, by its key; None of nobody here, so far."""
        return {key: self._whose(key, record) for key, record in instances.items()}

    def settled(self, keys: Collection[str]) -> bool:
        """Whether another look would say the same of all of them."""
        return self._found.keys() >= set(keys)

    def _whose(self, key: str, record: bytes) -> G | None:
        if key in self._found:
            return self._found[key]
        where = advertised(record)
        if where is None or where[0] not in self._here:
            return self._found.setdefault(key, None)
        found = next((g for g in self._groups if g.listens(*where)), None)
        self._looks[key] = self._looks.get(key, 0) + 1
        if found is not None or self._looks[key] >= LOOKS:
            self._found[key] = found
        return found
