"""The agent's line to etcd: one client, a publisher, a lease and a watch, opened and closed together.

Their threads never touch the agent: every callback goes through `post`, which runs it on the agent's loop.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from gms_launch.control import conditional, roles, terms
from gms_launch.control.access import Access
from gms_launch.control.client import Etcd, KeyValue
from gms_launch.control.conditional import Conditions
from gms_launch.control.keys import DYNAMO_INSTANCES, DYNAMO_ROOT, Keys, Range, prefix
from gms_launch.control.lease import LeaseKeeper
from gms_launch.control.publisher import Publisher
from gms_launch.control.watch import Change, Watch
from gms_launch.errors import MovedError, NoContactError


class Listener(Protocol):
    """What the agent is told, always on its loop."""

    def control_snapshot(self, found: dict[str, bytes]) -> None:
        """Everything etcd holds of the run: at the start, after compaction, or of a store that was wiped."""

    def control_change(self, key: str, value: bytes | None) -> None:
        """One key was put, or deleted (None)."""

    def control_state(self, reason: str | None) -> None:
        """The watch broke, and why; None when it stands again."""

    def lease_granted(self, lease: int) -> None:
        """This node has a (new) lease."""

    def lease_renewed(self, sent: float) -> None:
        """Etcd answered a renewal that was sent at `sent` (monotonic seconds)."""

    def lease_lost(self, reason: str) -> None:
        """This node's lease ran out or was taken."""

    def instances(self, found: dict[str, bytes]) -> None:
        """What is registered in Dynamo's discovery now, all of it: instance keys and what they hold."""


class ControlLink:
    """Blocking where it says so; `put` and `delete` never are."""

    def __init__(self, access: Access, post: Callable[..., None], brisk: bool = False) -> None:
        self._etcd = Etcd(access, brisk=brisk)
        self._post = post
        self._conditions: Conditions = {}
        self._lead: Conditions = {}
        self._publisher = Publisher(self._etcd)
        self._leading: Publisher | None = None
        self._keeper: LeaseKeeper | None = None
        self._lease = 0
        self._sent = 0.0
        self._watch: Watch | None = None

    @property
    def lease(self) -> int:
        """That of `claim`."""
        return self._lease

    def learn(self, endpoints: tuple[str, ...]) -> None:
        """Use these endpoints from the next connection on."""
        self._etcd.learn(endpoints)

    def connect(self, keys: Keys, wait: float) -> None:
        """Make sure that etcd answers, within `wait` seconds. Blocks. Raises `NoContactError`."""
        self._etcd.get(keys.run, retry=wait)

    def forget(self, keys: Keys) -> None:
        """Delete what an earlier run of that name left. Blocks."""
        self._etcd.delete_prefix(keys.prefix)

    def only_while(self, key: str, value: bytes | None, otherwise: Callable[[], None]) -> None:
        """Write from now on only as long as `key` holds `value` (None: is not there); else `otherwise` is called once,
        on the loop. Before `listen`.
        """
        self._conditions = {key: value}
        self._publisher = Publisher(self._etcd, self._conditions, lambda: self._post(otherwise))

    def hold(self, key: str, value: bytes, lease: int) -> bool:
        """Store a record under a lease of ours if we may still write; says whether we may. Blocks.

        Raises `NoContactError`.
        """
        return conditional.write(self._etcd, self._conditions, {key: value}, lease)

    def write_if(self, conditions: Conditions, records: Mapping[str, bytes]) -> bool:
        """Store records in one step if we lead the run and these conditions hold too; says whether. Blocks.

        Raises `NoContactError`.
        """
        return conditional.write(self._etcd, {**self._conditions, **self._lead, **conditions}, records)

    def take_lead(self, key: str, value: bytes, lease: int = 0) -> bool:
        """Take the role that `key` stands for under our lease, if nobody has it and we may write at all; says whether
        that was written. Blocks. Raises `NoContactError`.
        """
        return conditional.write(
            self._etcd, {**self._conditions, key: None}, {key: value}, lease or self._lease, retry=1.0
        )

    def lead_while(self, key: str, value: bytes) -> None:
        """`say` from now on only as long as `key` holds `value`."""
        before, self._lead = self._leading, {key: value}
        self._leading = Publisher(self._etcd, {**self._conditions, **self._lead})
        self._leading.start()
        if before is not None:
            before.stop(0.0)

    def say(self, key: str, value: bytes) -> None:
        """Store soon what the run's leader says, if we still are it."""
        (self._leading or self._publisher).put(key, value)

    def unsay(self, key: str) -> None:
        """Delete soon what the run's leader said, if we still are it."""
        (self._leading or self._publisher).delete(key)

    def claim(self, key: str, value: bytes, lease_ttl: float) -> bytes | None:
        """Store `value` under a new lease, which `listen` then keeps; blocks. Returns who has the key, if not we.

        Waits for a lease of the last holder to run out, since that may be dead. Raises `MovedError` when we may not
        write (`only_while`).
        """
        deadline = time.monotonic() + terms.granted(lease_ttl) + 2.0
        while True:
            self._sent = time.monotonic()
            self._lease = self._etcd.grant(terms.granted(lease_ttl))
            if self._create(key, value):
                return None
            self._etcd.revoke(self._lease)
            holder = self._etcd.get(key)
            if holder is not None and time.monotonic() > deadline:
                return holder
            time.sleep(0.2)  # the key goes when its lease does; a watch for this one moment is not worth it

    def _create(self, key: str, value: bytes) -> bool:
        """Store what nobody else may have stored; says whether it is ours."""
        if not self._conditions:
            return self._etcd.create(key, value, self._lease)
        if not conditional.write(self._etcd, self._conditions, {key: value}, self._lease, unless=key):
            self._etcd.revoke(self._lease)
            raise MovedError("another agent has this node's rank by now")
        return self._etcd.get(key) == value

    def listen(
        self, ranges: Sequence[Range], lease_ttl: float, listener: Listener, namespace: str | None = None
    ) -> None:
        """Begin to write, to keep the lease and to watch: the run's keys in `ranges`, and what registers in a namespace
        of Dynamo's.
        """
        post = self._post
        self._publisher.start()
        self._keeper = LeaseKeeper(
            self._etcd,
            lease_ttl,
            lambda lease: post(listener.lease_granted, lease),
            lambda reason: post(listener.lease_lost, reason),
            lambda sent: post(listener.lease_renewed, sent),
            self._lease,
            self._sent,
        )

        instances: dict[str, bytes] = {}  # the watch's thread alone touches it

        def found(known: dict[str, KeyValue]) -> None:
            instances.clear()
            instances.update((k, kv.value) for k, kv in known.items() if k.startswith(DYNAMO_INSTANCES))
            post(listener.control_snapshot, {k: kv.value for k, kv in known.items() if k not in instances})
            post(listener.instances, dict(instances))

        def changed(change: Change) -> None:
            if not change.key.startswith(DYNAMO_INSTANCES):
                post(listener.control_change, change.key, change.value)
                return
            if change.value is None:
                instances.pop(change.key, None)
            else:
                instances[change.key] = change.value
            post(listener.instances, dict(instances))

        dynamo = [prefix(f"{DYNAMO_INSTANCES}{namespace}/")] if namespace is not None else []
        self._watch = Watch(
            self._etcd, [*ranges, *dynamo], found, changed, lambda reason: post(listener.control_state, reason)
        )
        self._keeper.start()
        self._watch.start()

    def get(self, key: str) -> bytes | None:
        """What a key holds now. Blocks. Raises `NoContactError`."""
        return self._etcd.get(key)

    def under(self, prefix: str) -> dict[str, bytes]:
        """What keys hold that begin so. Blocks. Raises `NoContactError`."""
        return self._etcd.get_prefix(prefix)

    def put_now(self, key: str, value: bytes) -> None:
        """Store a value before going on. Blocks. Raises `NoContactError`."""
        self._etcd.put(key, value)

    def take(self, key: str, value: bytes) -> bool:
        """Put `value` in the place of a command that stands and is nobody's yet. Blocks. Raises `NoContactError`."""
        return self._etcd.replace_first_version(key, value, retry=2.0)

    def put(self, key: str, value: bytes, lease: int = 0, later: bool = False, unless: str = "") -> None:
        """Store a value soon, `later` when nobody acts on it; not if the key `unless` is there by then."""
        self._publisher.put(key, value, lease, later, unless)

    def delete(self, key: str) -> None:
        self._publisher.delete(key)

    def keep(self, lease: int) -> bool:
        """Keep a lease of anybody's alive once; False when it is over. Blocks. Raises `NoContactError`."""
        return self._etcd.keep(lease)

    def registration(self, lease: int) -> dict[str, bytes]:
        """All that an engine has stored in Dynamo's discovery under its lease. Blocks. Raises `NoContactError`."""
        return self._etcd.attached(DYNAMO_ROOT, lease)

    def grant(self, seconds: float) -> int:
        """A new lease, which nobody keeps. Blocks. Raises `NoContactError`."""
        return self._etcd.grant(seconds)

    def put_back(self, records: Mapping[str, bytes], seconds: float, lease: int = 0) -> int:
        """Store records where they are gone, under a lease of ours, or a new one; returns it. Blocks.

        Raises `NoContactError`.
        """
        lease = lease or self._etcd.grant(seconds)
        for key, value in records.items():
            self._etcd.create(key, value, lease)
        return lease

    def alarms(self) -> tuple[str, ...]:
        """See `Etcd.alarms`. Blocks. Raises `NoContactError`."""
        return self._etcd.alarms()

    def relieve(self, quota: int, members: Sequence[Access] = ()) -> bool:
        """See `Etcd.relieve`; each of several `members` has its own room. Blocks. Raises `NoContactError`."""
        if not members:
            return self._etcd.relieve(quota)
        return not [m for m in members if not _relieve(m, quota)]

    def revoke(self, lease: int) -> bool:
        """End a lease of anybody's. Blocks."""
        return self._etcd.revoke(lease)

    def establish(self, users: Mapping[str, Sequence[str]], again: bool = False) -> None:
        """See `roles.establish`. Blocks."""
        roles.establish(self._etcd, users, again)

    def close(self, timeout: float, leave: bool = False) -> None:
        """Stop listening and write what is left, for at most `timeout` seconds. Blocks.

        `leave`: end the lease too, so that nobody has to wait for its end.
        """
        if self._watch is not None:
            self._watch.stop()
        if self._keeper is not None:
            self._keeper.stop()
        for publisher in (self._leading, self._publisher):
            if publisher is not None and publisher.is_alive():
                publisher.stop(timeout)
        if leave and self._keeper is not None and self._keeper.lease:
            with contextlib.suppress(NoContactError):
                self._etcd.revoke(self._keeper.lease, retry=0.0)
        self._etcd.close()


def _relieve(member: Access, quota: int) -> bool:
    one = Etcd(member)
    try:
        return one.relieve(quota)
    finally:
        one.close()
