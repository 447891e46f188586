"""Watch ranges of keys in etcd and never miss or invent anything.

One thread and one stream a watch. It reads a snapshot, watches from the revision after it, and after a broken stream
resumes each range from the last revision that it saw of it. It starts over with a new snapshot when history was
compacted away or when the store is not the one it knew (wiped, restored). Callbacks come in order for each range, from
the watch's own thread; they should only hand the message over.
"""

from __future__ import annotations

import queue
import random
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import gms_launch.control.client as door
from gms_launch.control.client import Connection, Etcd, KeyValue, describe
from gms_launch.control.keys import Range

etcd3 = door.etcd3


_REQUIRE_LEADER = (("hasleader", "true"),)


@dataclass(frozen=True)
class Change:
    """One key put (`value` set) or deleted (`value` None), with the store's revision."""

    key: str
    value: bytes | None
    revision: int
    lease: int = 0


class Watch(threading.Thread):
    """A running watch. `on_snapshot` replaces everything known, `on_change` alters it.

    `on_state` gets None when the stream stands and a reason when it broke.
    """

    def __init__(
        self,
        etcd: Etcd,
        ranges: Sequence[Range],
        on_snapshot: Callable[[dict[str, KeyValue]], None],
        on_change: Callable[[Change], None],
        on_state: Callable[[str | None], None] = lambda _: None,
    ) -> None:
        super().__init__(name=f"watch {ranges[0].first}", daemon=True)
        self._etcd = etcd
        self._ranges = [{"key": r.first.encode(), "range_end": r.end.encode()} for r in ranges]
        self._on_snapshot, self._on_change, self._on_state = on_snapshot, on_change, on_state
        self._seen: list[int] = []
        self._landmark: tuple[bytes, int] | None = None
        self._stopping = threading.Event()
        self._call: object = None
        self.resyncs = 0
        self.resumes = 0

    def stop(self) -> None:
        self._stopping.set()
        call = self._call
        if call is not None:
            call.cancel()  # type: ignore[attr-defined]

    def run(self) -> None:
        delay = 0.1
        while not self._stopping.is_set():
            generation: int | None = None
            try:
                connection = self._etcd.connection()
                generation = connection.generation
                if not self._seen or not self._same_store(connection):
                    self._snapshot(connection)
                self._stream(connection)
                delay = 0.1
                continue
            except Exception as exc:
                if self._stopping.is_set():
                    return
                self._on_state(describe(exc))
            if generation is not None:
                self._etcd.drop(generation)
            self._stopping.wait(delay * random.uniform(0.5, 1.0))
            delay = min(delay * 2, 1.0)

    def _read(self, connection: Connection, ranges: Sequence[dict[str, bytes]]) -> tuple[dict[str, KeyValue], int]:
        """What is in the ranges, all at one revision, and that."""
        rpc = etcd3.etcdrpc
        steps = [rpc.RequestOp(request_range=rpc.RangeRequest(**r)) for r in ranges]
        reply = connection.client.kvstub.Txn(rpc.TxnRequest(success=steps), timeout=self._etcd.timeout)
        kvs = [kv for response in reply.responses for kv in response.response_range.kvs]
        found = [KeyValue(kv.key.decode(), kv.value, kv.create_revision, kv.mod_revision, kv.lease) for kv in kvs]
        return {kv.key: kv for kv in found}, reply.header.revision

    def _snapshot(self, connection: Connection) -> None:
        found, revision = self._read(connection, self._ranges)
        oldest = min(found.values(), key=lambda kv: kv.create_revision, default=None)
        self._landmark = (oldest.key.encode(), oldest.create_revision) if oldest else None
        self._seen = [revision] * len(self._ranges)
        self.resyncs += 1
        self._on_snapshot(found)

    def _same_store(self, connection: Connection) -> bool:
        """False when the oldest key we know is not there as we knew it: wiped, or deleted, and a resync is due."""
        if self._landmark is None:
            return False
        key, created = self._landmark
        found, revision = self._read(connection, [{"key": key}])
        same_key = any(kv.create_revision == created for kv in found.values())
        return same_key and revision >= max(self._seen)

    def _stream(self, connection: Connection) -> None:
        """Follow the stream until it must be made anew; forgets what was seen when a snapshot is needed."""
        rpc = etcd3.etcdrpc
        requests: queue.SimpleQueue[object] = queue.SimpleQueue()
        for where, revision in zip(self._ranges, self._seen, strict=True):
            create = rpc.WatchCreateRequest(**where, start_revision=revision + 1, progress_notify=True)
            requests.put(rpc.WatchRequest(create_request=create))
        # A member that the others have lost is to say so, and not to be silent.
        call = rpc.WatchStub(connection.client.channel).Watch(iter(requests.get, None), metadata=_REQUIRE_LEADER)
        self._call = call
        which: dict[int, int] = {}  # etcd's number of a range -> ours; it answers in the order of the requests
        try:
            for message in call:
                if message.compact_revision or message.canceled:
                    # Compacted: history is gone. Cancelled otherwise: no longer allowed, so connect anew.
                    self._seen = []
                    if not message.compact_revision:
                        raise ConnectionError(f"etcd ended the watch: {message.cancel_reason or 'no reason given'}")
                    return
                if message.created:
                    which[message.watch_id] = len(which)
                    if message.header.revision < max(self._seen):
                        self._seen = []
                        return
                    if len(which) == len(self._ranges):
                        self.resumes += 1
                        self._on_state(None)
                    continue
                for event in message.events:
                    kv = event.kv
                    deleted = event.type == 1  # DELETE
                    self._on_change(Change(kv.key.decode(), None if deleted else kv.value, kv.mod_revision, kv.lease))
                index = which[message.watch_id]
                self._seen[index] = max(self._seen[index], message.header.revision)
        finally:
            requests.put(None)
            call.cancel()
