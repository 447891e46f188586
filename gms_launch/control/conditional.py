"""Writes that hold only while other keys say what the writer was told: what somebody who was replaced wants is refused.

Etcd compares and writes in one step, so there is no moment between the look and the write.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gms_launch.control.client import Etcd

#: By key what it must hold; None: it must not be there.
Conditions = Mapping[str, bytes | None]


def write(
    etcd: Etcd,
    conditions: Conditions,
    values: Mapping[str, bytes | None],
    lease: int = 0,
    unless: str = "",
    retry: float = 8.0,
) -> bool:
    """Store or (None) delete keys at once if the conditions hold; says whether they do. Blocks.

    If the key `unless` is given and there, nothing is written all the same. Raises `NoContactError`.
    """

    def request(client: Any) -> bool:
        t = client.transactions
        holds = [t.create(k) == 0 if v is None else t.value(k) == v for k, v in conditions.items()]
        steps = [t.delete(k) if v is None else t.put(k, v, lease or None) for k, v in values.items()]
        first = [t.create(unless) == 0] if unless else []
        done, _ = client.transaction(compare=[*holds, *first], success=steps, failure=[])
        if done or not unless:
            return bool(done)
        return bool(client.transaction(compare=holds, success=[], failure=[])[0])

    return etcd.call(request, retry)
