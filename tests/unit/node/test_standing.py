"""A dead engine's registration stands while somebody waits, and not a moment longer. (Real etcd: test_hold.py.)"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping

import pytest

from gms_launch.control.link import ControlLink
from gms_launch.node import standing
from gms_launch.node.standing import Standing


class Link(ControlLink):
    """Etcd in a dictionary: lease -> its records. Leases of ours count from 1000."""

    def __init__(self) -> None:  # no etcd
        self.leases: dict[int, dict[str, bytes]] = {7: {"v1/a": b"1", "v1/b": b"2"}}
        self.kept: list[int] = []

    def keep(self, lease: int) -> bool:
        self.kept.append(lease)
        return lease in self.leases

    def registration(self, lease: int) -> dict[str, bytes]:
        return dict(self.leases.get(lease, {}))

    def grant(self, seconds: float) -> int:
        lease = 1000 + len(self.leases)
        self.leases[lease] = {}
        return lease

    def put_back(self, records: Mapping[str, bytes], seconds: float, lease: int = 0) -> int:
        lease = lease or self.grant(seconds)
        self.leases[lease] |= records
        return lease

    def revoke(self, lease: int) -> bool:
        return self.leases.pop(lease, None) is not None


def play(work: object) -> tuple[Link, Standing]:
    link = Link()
    made: list[Standing] = []

    async def run() -> None:
        made.append(Standing(lambda: link, 20.0))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(standing, "LEARN", (0.0,))
            await made[0].learn(7)
        await work(link, made[0])  # type: ignore[operator]

    asyncio.run(run())
    return link, made[0]


def test_a_lease_that_lives_is_renewed_and_what_was_taken_away_is_put_back() -> None:
    async def work(link: Link, stands: Standing) -> None:
        await stands.keep([7])
        assert link.kept == [7] and list(link.leases) == [7]
        del link.leases[7]["v1/a"]
        await stands.keep([7])
        await stands.keep([7])
        assert [r for k, r in link.leases.items() if k >= 1000] == [{"v1/a": b"1"}], "once, and only what was gone"
        del link.leases[7]
        await stands.keep([7])

    link, _ = play(work)
    assert [*link.leases.values()] == [{"v1/a": b"1", "v1/b": b"2"}], "what goes later too"


def test_what_ran_out_is_put_back_and_what_is_ended_stays_away() -> None:
    async def work(link: Link, stands: Standing) -> None:
        link.leases.clear()
        await stands.keep([7])
        assert [*link.leases.values()] == [{"v1/a": b"1", "v1/b": b"2"}]
        assert await stands.end([7]) == [], "its own lease had run out"
        assert link.leases == {}
        await stands.keep([7])
        assert link.leases == {}, "a look that comes late puts nothing back"

    play(work)


def test_who_stands_in_has_names_of_its_own_and_none_once_it_is_ended() -> None:
    async def work(link: Link, stands: Standing) -> None:
        theirs = 0x7175A2261C2FD424
        link.leases[theirs] = {
            f"v1/instances/x/{theirs:x}": b'{"instance_id": %d, "at": "h:1"}' % theirs,
            f"v1/mdc/x/{theirs:x}": b'{"name": "m"}',
        }
        await stands.learn(theirs)
        ours = await stands.lease()
        assert ours is not None
        await stands.stand_in(theirs, ours)
        assert {k: json.loads(v) for k, v in link.leases[ours].items()} == {
            f"v1/instances/x/{ours:x}": {"instance_id": ours, "at": "h:1"},
            f"v1/mdc/x/{ours:x}": {"name": "m"},
        }
        assert await stands.end([ours]) == [ours]
        await stands.stand_in(theirs, ours)
        assert ours not in link.leases

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(standing, "LEARN", (0.0,))
        play(work)
