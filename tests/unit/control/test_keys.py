"""What keys say by themselves: their order is that of time, and which lease is in them."""

from __future__ import annotations

from gms_launch.cohort.dark import DarkRecord
from gms_launch.control.keys import Keys, Share, dynamo_lease, followed, prefix
from gms_launch.control.mirror import Mirror


def test_keys_sort_by_time_and_leases_are_read() -> None:
    keys = Keys("r")
    assert keys.event(9, 0, 1) < keys.event(10, 0, 0) < keys.event(10, 0, 1)
    assert dynamo_lease("v1/instances/dynamo/backend/generate/5b18a2") == 0x5B18A2
    assert dynamo_lease("v1/mdc/dynamo/backend/generate/5b18a2") is None
    assert dynamo_lease("v1/instances/dynamo/backend/generate/x") is None
    assert dynamo_lease("v1/instances/dynamo/backend/router-discovery/5b18a2") is None, "a frontend's own"


def test_every_agent_hears_which_nodes_are_lost() -> None:
    """Any of them may have a frontend, whatever else it follows."""
    keys, lost = Keys("r"), DarkRecord("node3", "10.0.0.3", (7,), 2, "b")
    for leads in (True, False):
        assert prefix(keys.dark) in followed(Share(keys, leads, 2), [Share(Keys("r", "a"), False, 2)])
    assert prefix(keys.dark) in keys.everywhere(), "a spare's agent"
    assert prefix(keys.dark) in followed(Share(keys, False, 2)), "an agent of one engine alone, with its own frontend"
    mirror = Mirror("r")
    mirror.apply(keys.dark_of("b", 2), lost.encode())
    assert mirror.dark == {"b/2": lost}
    mirror.apply(keys.dark_of("b", 2), None)
    assert mirror.dark == {}
