"""What keys say by themselves: their order is that of time, and which lease is in them."""

from __future__ import annotations

from gms_launch.control.keys import Keys, dynamo_lease


def test_keys_sort_by_time_and_leases_are_read() -> None:
    keys = Keys("r")
    assert keys.event(9, 0, 1) < keys.event(10, 0, 0) < keys.event(10, 0, 1)
    assert dynamo_lease("v1/instances/dynamo/backend/generate/5b18a2") == 0x5B18A2
    assert dynamo_lease("v1/mdc/dynamo/backend/generate/5b18a2") is None
    assert dynamo_lease("v1/instances/dynamo/backend/generate/x") is None
    assert dynamo_lease("v1/instances/dynamo/backend/router-discovery/5b18a2") is None, "a frontend's own"
