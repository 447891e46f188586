"""The members of an etcd cluster: who they are, and how one is added, made a voter and removed. Only root may ask.

A new member comes as a learner: it gets everything and has no vote, so one that never comes up takes nobody's quorum.
The `etcd3` package is older than learners: what it lacks is put into its messages here, as etcd numbers the fields.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import gms_launch.control.client as door
from gms_launch.control.client import Etcd, describe
from gms_launch.errors import NoContactError

etcd3 = door.etcd3

#: Fields that the package does not know: MemberAddRequest.isLearner and Member.isLearner.
_ADD_LEARNER = bytes([2 << 3, 1])
_IS_LEARNER = 5
#: Between two tries of what the cluster is not ready for yet (seconds).
AGAIN = 0.2
#: What it says then: another change is under way, a member is not well, or the learner has not caught up.
_LATER = (
    "unhealthy cluster",
    "too many learner",
    "in sync with leader",
    "re-configuration failed",
    "not enough started",
)


@dataclass(frozen=True)
class Member:
    """One member. It has no `name` and no `clients` (URLs) before it was started for the first time."""

    id: int
    name: str
    peers: tuple[str, ...]
    clients: tuple[str, ...]
    learner: bool


@dataclass(frozen=True)
class Standing:
    """What one server says of itself: its cluster's leader (0: none) and whether that is itself."""

    leader: int
    leads: bool


def members(etcd: Etcd, retry: float = 8.0) -> tuple[Member, ...]:
    """All of them, as those decide who have the majority. Raises `NoContactError`."""
    rpc = etcd3.etcdrpc

    def ask(client: Any) -> Any:
        # A server lists what it knows itself, which may be long past: not before it has caught up with the others.
        client.kvstub.Range(rpc.RangeRequest(key=b"/"), timeout=etcd.timeout)
        return client.clusterstub.MemberList(rpc.MemberListRequest(), timeout=etcd.timeout)

    return tuple(_member(m) for m in etcd.call(ask, retry).members)


def _member(found: Any) -> Member:
    from google.protobuf.unknown_fields import UnknownFieldSet

    learner = any(f.field_number == _IS_LEARNER and f.data for f in UnknownFieldSet(found))
    return Member(int(found.ID), found.name, tuple(found.peerURLs), tuple(found.clientURLs), learner)


def take_place(etcd: Etcd, name: str, url: str, patience: float) -> tuple[Member, ...]:
    """Make room for a member called `name` at peer URL `url`, which is new and empty; returns all, with the new one.

    Whoever had its name or its URL is removed first: that one's data is gone. To be started within etcd's patience
    then, and `promote`d. Raises `NoContactError` when the cluster does not agree within `patience` seconds.
    """
    deadline = time.monotonic() + patience
    while True:
        found = members(etcd, max(1.0, deadline - time.monotonic()))
        waits = next((m for m in found if url in m.peers and not m.name and m.learner), None)
        if waits is not None:  # an attempt of ours whose answer was lost
            return found
        old = next((m for m in found if m.name == name or url in m.peers), None)
        if old is not None:
            _settled(lambda old=old: remove(etcd, old.id), deadline)
        else:
            _settled(lambda: _add_learner(etcd, url), deadline)


def _settled(change: Any, deadline: float) -> None:
    """Carry a change of the cluster out, or wait a moment where it is not ready for it."""
    try:
        change()
    except door.RpcError as exc:
        told = exc.details() or ""
        if "not found" in told or "already exist" in told or "has already been" in told:
            return  # it is as it should be
        if not any(words in told for words in _LATER):
            raise NoContactError(f"etcd refuses to change its members: {describe(exc)}") from exc
        if time.monotonic() > deadline:
            raise NoContactError(f"etcd's members cannot be changed yet: {describe(exc)}") from exc
        time.sleep(AGAIN)  # nothing announces it


def _add_learner(etcd: Etcd, url: str) -> None:
    rpc = etcd3.etcdrpc
    text = rpc.MemberAddRequest(peerURLs=[url]).SerializeToString() + _ADD_LEARNER
    _raw(etcd, "MemberAdd", text, rpc.MemberAddResponse)


def remove(etcd: Etcd, member: int, retry: float = 8.0) -> None:
    """Take a member out. Its server ends by itself. Raises grpc's errors and `NoContactError`."""
    request = etcd3.etcdrpc.MemberRemoveRequest(ID=member)
    etcd.call(lambda c: c.clusterstub.MemberRemove(request, timeout=etcd.timeout), retry)


def lead(etcd: Etcd, member: int, retry: float = 8.0) -> None:
    """Have `member` lead, if the server that `etcd` is connected to does. Raises grpc's errors and `NoContactError`."""
    if standing(etcd, retry).leads:
        request = etcd3.etcdrpc.MoveLeaderRequest(targetID=member)
        etcd.call(lambda c: c.maintenancestub.MoveLeader(request, timeout=etcd.timeout), retry)


def promote(etcd: Etcd, member: int, patience: float) -> None:
    """Give a learner its vote, once it knows what the others know. Raises `NoContactError` after `patience` seconds."""
    deadline = time.monotonic() + patience
    while any(m.id == member and m.learner for m in members(etcd)):
        # The request of a removal, which has the same one field.
        text = etcd3.etcdrpc.MemberRemoveRequest(ID=member).SerializeToString()
        _settled(lambda text=text: _raw(etcd, "MemberPromote", text, etcd3.etcdrpc.MemberListResponse), deadline)


def _raw(etcd: Etcd, method: str, text: bytes, reply: Any) -> Any:
    def ask(client: Any) -> Any:
        call = client.channel.unary_unary(
            f"/etcdserverpb.Cluster/{method}", request_serializer=bytes, response_deserializer=reply.FromString
        )
        return call(text, timeout=etcd.timeout)

    return etcd.call(ask)


def standing(etcd: Etcd, retry: float = 0.0) -> Standing:
    """What the server says that is connected to, a learner too. Raises `NoContactError`."""
    rpc = etcd3.etcdrpc
    told = etcd.call(lambda c: c.maintenancestub.Status(rpc.StatusRequest(), timeout=etcd.timeout), retry)
    return Standing(int(told.leader), int(told.leader) == int(told.header.member_id))


def started_with(found: Sequence[Member], name: str, url: str) -> str:
    """`--initial-cluster` for the new member `name` at `url` among all."""
    return ",".join(f"{name if url in m.peers else m.name}={peer}" for m in found for peer in m.peers)
