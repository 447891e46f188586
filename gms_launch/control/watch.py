"""Watch a prefix of etcd and never miss or invent anything.

One thread and one stream a watch. It reads a snapshot, watches from the revision after it, and after a broken stream
resumes from the last revision it saw. It starts over with a new snapshot when history was compacted away or when the
store is not the one it knew (wiped, restored). Callbacks come in order, from the watch's own thread; they should only
hand the message over.
"""

from __future__ import annotations

import queue
import random
import threading
from collections.abc import Callable
from dataclasses import dataclass

import gms_launch.control.store as door
from gms_launch.control.store import Connection, Etcd, KeyValue, describe

etcd3 = door.etcd3


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
        prefix: str,
        on_snapshot: Callable[[dict[str, KeyValue]], None],
        on_change: Callable[[Change], None],
        on_state: Callable[[str | None], None] = lambda _: None,
    ) -> None:
        super().__init__(name=f"watch {prefix}", daemon=True)
        self._etcd = etcd
        self._prefix = prefix.encode()
        self._end = etcd3.utils.increment_last_byte(self._prefix)
        self._on_snapshot, self._on_change, self._on_state = on_snapshot, on_change, on_state
        self._revision = 0
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
                if self._revision and not self._same_store(connection):
                    self._revision = 0
                if not self._revision:
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

    def _range(self, connection: Connection, **request: object) -> object:
        return connection.client.kvstub.Range(
            etcd3.etcdrpc.RangeRequest(**request), timeout=self._etcd.timeout, metadata=connection.metadata
        )

    def _snapshot(self, connection: Connection) -> None:
        reply = self._range(connection, key=self._prefix, range_end=self._end)
        found = {
            kv.key.decode(): KeyValue(kv.key.decode(), kv.value, kv.create_revision, kv.mod_revision, kv.lease)
            for kv in reply.kvs  # type: ignore[attr-defined]
        }
        oldest = min(found.values(), key=lambda kv: kv.create_revision, default=None)
        self._landmark = (oldest.key.encode(), oldest.create_revision) if oldest else None
        self._revision = reply.header.revision  # type: ignore[attr-defined]
        self.resyncs += 1
        self._on_snapshot(found)

    def _same_store(self, connection: Connection) -> bool:
        """False when the oldest key we know is not there as we knew it: wiped, or deleted, and a resync is due."""
        if self._landmark is None:
            return False
        key, created = self._landmark
        reply = self._range(connection, key=key)
        kvs = reply.kvs  # type: ignore[attr-defined]
        same_key = bool(kvs) and kvs[0].create_revision == created
        return same_key and reply.header.revision >= self._revision  # type: ignore[attr-defined]

    def _stream(self, connection: Connection) -> None:
        """Follow the stream until it must be made anew; sets the revision to 0 when a snapshot is needed."""
        rpc = etcd3.etcdrpc
        requests: queue.SimpleQueue[object] = queue.SimpleQueue()
        create = rpc.WatchCreateRequest(
            key=self._prefix, range_end=self._end, start_revision=self._revision + 1, progress_notify=True
        )
        requests.put(rpc.WatchRequest(create_request=create))
        call = rpc.WatchStub(connection.client.channel).Watch(iter(requests.get, None), metadata=connection.metadata)
        self._call = call
        try:
            for message in call:
                if message.compact_revision or message.canceled:
                    # Compacted: history is gone. Cancelled otherwise: no longer allowed, so connect anew.
                    self._revision = 0
                    if not message.compact_revision:
                        raise ConnectionError(f"etcd ended the watch: {message.cancel_reason or 'no reason given'}")
                    return
                if message.created:
                    if message.header.revision < self._revision:
                        self._revision = 0
                        return
                    self.resumes += 1
                    self._on_state(None)
                    continue
                for event in message.events:
                    kv = event.kv
                    deleted = event.type == 1  # DELETE
                    self._on_change(Change(kv.key.decode(), None if deleted else kv.value, kv.mod_revision, kv.lease))
                self._revision = max(self._revision, message.header.revision)
        finally:
            requests.put(None)
            call.cancel()
