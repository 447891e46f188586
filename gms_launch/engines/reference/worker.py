"""One worker process: one GPU's memory and arithmetic.

`python -m gms_launch.engines.reference.worker RANK LOCAL_RANK MASTER_ADDR MASTER_PORT -- FLAGS OF THE ENGINE`. Follows
dynamo.vllm's order: load or import the weights, set up scratch KV, sleep (unmap, end sessions), and on waking remap the
weights and put real KV at the addresses the scratch had. It ends when its rank's process does.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import time

from gms_launch.engines.reference import args, compute, weights
from gms_launch.engines.reference.group import Reply, serve_worker
from gms_launch.gms.client import GmsClient
from gms_launch.gms.devices import device_uuid, socket_path
from gms_launch.gms.protocol import LockType

log = logging.getLogger("reference.worker")
GIB = 1 << 30


class Worker:
    """The memory of one GPU and the steps on it."""

    def __init__(self, config: args.EngineConfig, rank: int, local_rank: int) -> None:
        self.config = config
        self.rank = rank
        self.compute = compute.make(config.device, local_rank)
        uuid = device_uuid(config.device, local_rank)
        directory = config.gms_socket_dir
        self.weights = GmsClient(socket_path(directory, uuid, "weights"), self.compute.mapper)
        self.kv = GmsClient(socket_path(directory, uuid, "kv_cache"), self.compute.mapper)
        self.kv_size = config.knobs.kv_mib << 20
        self.kv_address = 0
        self.loads_file = directory / f"disk_loads_{uuid}"
        self.shards: list[weights.Shard] = []

    def handle(self, message: Reply) -> Reply:
        operation = message.pop("op")
        reply: Reply = getattr(self, "do_" + operation)(**message)
        return reply

    def _connect(self, client: GmsClient, mode: LockType) -> LockType:
        granted = client.connect(mode)
        log.info("Connected with %s lock (granted=%s), committed=%s", mode.value, granted.value, client.committed)
        return granted

    def do_load(self) -> Reply:
        """Weights into GMS as its writer, or from GMS as a reader; then scratch KV."""
        config = self.config
        if config.engine_id == 0:
            mode = LockType.RW_OR_RO
        else:
            log.info("[GMS] gms_read_only=True, forcing RO mode")
            mode = LockType.RO
        disk = 0
        if self._connect(self.weights, mode) is LockType.RW:
            begun = time.monotonic()
            part, parts = config.part(self.rank)
            disk = weights.load_from_disk(config.model, self.weights, self.compute, part, parts)
            took = time.monotonic() - begun
            rate = disk / GIB / max(took, 1e-9)
            log.info("Loading weights took %.2f seconds (%.2f GiB from disk, %.1f GiB/s)", took, disk / GIB, rate)
            with open(self.loads_file, "a") as file:
                file.write(f"{config.tag} {disk}\n")
            config.knobs.fail_here("before_commit", config.tag)
            self.weights.commit()
            self._connect(self.weights, LockType.RO)
            size = self.weights.remap_all()
            count = len(self.weights.mappings)
            log.info("[GMS] Committed %.2f GiB, switched to read mode with %d mappings", size / GIB, count)
        else:
            size = sum(m.aligned_size for m in self.weights.import_all())
            log.info("[GMS] Read mode: imported %.2f GiB", size / GIB)
        self.kv_address = self.kv.reserve_scratch(self.kv_size)
        return {"bytes": size, "disk": disk}

    def do_sleep(self) -> Reply:
        """Let go of every mapping and session; the addresses stay."""
        begun = time.monotonic()
        self.shards = []
        freed = self.weights.unmap_all()
        self.weights.disconnect()
        if self.kv.connected:
            freed += self.kv.unmap_all()
            self.kv.disconnect()
            self.kv.mappings.clear()
        else:
            freed += self.kv.drop_scratch(self.kv_address, self.kv_size)
        log.info("Sleep freed %.2f GiB memory", freed / GIB)
        return {"freed": freed, "seconds": time.monotonic() - begun}

    def do_wake(self) -> Reply:
        """Weights back to their addresses, and real KV where the scratch was."""
        begun = time.monotonic()
        self._connect(self.weights, LockType.RO)
        self.weights.remap_all()
        self._connect(self.kv, LockType.RW)
        mapping = self.kv.allocate(self.kv_size, "kv_cache", address=self.kv_address)
        assert mapping.address == self.kv_address
        self.shards = weights.shards(self.weights)
        self.config.knobs.fail_here("waking", self.config.tag)
        if self.config.knobs.wake_seconds:
            time.sleep(self.config.knobs.wake_seconds)
        seconds = time.monotonic() - begun
        log.info("It took %.6f seconds to wake up tags {'weights', 'kv_cache'}", seconds)
        return {"seconds": seconds}

    def do_prefill(self) -> Reply:
        """Read every byte of the weights."""
        return {"part": weights.digest(self.compute, self.shards)}

    def do_steps(self, states: list[int], positions: list[int]) -> Reply:
        """One token's share for each of several texts. What came before goes through the KV memory."""
        seen = []
        for state, position in zip(states, positions, strict=True):
            slot = self.kv_address + 8 * (position % (self.kv_size // 8))
            self.compute.store(slot, state)
            seen.append(self.compute.load(slot))
        return {"parts": weights.windows(self.compute, self.shards, seen)}


def _end_with_parent() -> None:
    """The rank's process holds the other end of our standard input and never writes."""
    os.read(0, 1)
    os._exit(0)


def main() -> None:
    rank, local_rank, host, port = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], int(sys.argv[4])
    config = args.parse(sys.argv[6:], os.environ)
    logging.basicConfig(
        level=logging.INFO,
        format=f"%(asctime)s (Worker_TP{rank} pid={os.getpid()}) %(levelname)s %(message)s",
        stream=sys.stdout,
    )
    threading.Thread(target=_end_with_parent, daemon=True).start()
    config.knobs.fail_here("starting", config.tag)
    if config.knobs.start_seconds:
        time.sleep(config.knobs.start_seconds)
    serve_worker(host, port, rank, config.meeting_secret, Worker(config, rank, local_rank).handle)


if __name__ == "__main__":
    main()
