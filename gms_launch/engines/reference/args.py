"""What the reference engine is told: dynamo.vllm's flags and environment names.

REFERENCE_DEVICE says whether GMS owns host memory (host) or a GPU's (cuda). Knobs for tests come from the environment,
as REFERENCE_* too: costs of start and wake, and where to fail (`burden` reads what to import).
"""

from __future__ import annotations

import argparse
import os
import re
import signal
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from gms_launch.engines.base import MEETING_SECRET
from gms_launch.engines.reference import meeting
from gms_launch.settings.groups import COMPONENTS

#: Points at which an engine can be made to fail, in the order it passes them, and the ways to fail.
POINTS = ("starting", "before_commit", "parked", "waking", "serving", "tokens", "unregistered")
KINDS = ("crash", "hang", "error")


class InjectedError(RuntimeError):
    """A fault that a test asked for."""


@dataclass(frozen=True)
class Knobs:
    """For tests. Times in seconds, sizes in MiB.

    `monitor_seconds` is how long a leader rank goes on, lock in hand, when a worker of its is dead: upstream's monitor
    looks every 2 s. Without `metrics` it shows no failover metrics, as Dynamo before 1.4.

    `dying_gib` of address space, one small file mapped again and again, are taken apart when a leader rank dies (about
    40 ms a GiB). It lets go of the lock at once and is seen dead only then, as an engine that gives back GPU memory.

    With `litter` it leaves files, sockets and shared memory behind, as vLLM does (`litter`).

    `stray` is one of `lock.STRAYS`.

    `fault` is a list of `cohort.incarnation:point=kind` with commas between; `*` stands for any number.
    """

    start_seconds: float = 0.0
    wake_seconds: float = 0.0
    token_seconds: float = 0.0
    kv_mib: int = 16
    lock_poll_seconds: float = 0.1
    monitor_seconds: float = 2.0
    metrics: bool = True
    fault: str = ""
    stray: str = ""
    dying_gib: int = 0
    litter: bool = False

    @classmethod
    def from_environ(cls, environ: Mapping[str, str]) -> Knobs:
        return cls(
            start_seconds=float(environ.get("REFERENCE_START_SECONDS", "0")),
            wake_seconds=float(environ.get("REFERENCE_WAKE_SECONDS", "0")),
            token_seconds=float(environ.get("REFERENCE_TOKEN_SECONDS", "0")),
            kv_mib=int(environ.get("REFERENCE_KV_MIB", "16")),
            lock_poll_seconds=float(environ.get("REFERENCE_LOCK_POLL_SECONDS", "0.1")),
            monitor_seconds=float(environ.get("REFERENCE_MONITOR_SECONDS", "2")),
            metrics=environ.get("REFERENCE_METRICS", "1") == "1",
            fault=environ.get("REFERENCE_FAULT", ""),
            stray=environ.get("REFERENCE_STRAY", ""),
            litter=environ.get("REFERENCE_LITTER", "") == "1",
            dying_gib=int(environ.get("REFERENCE_DYING_GIB", "0")),
        )

    def __post_init__(self) -> None:
        """Raises `ValueError` for a fault that there is not: a test that asks for one must not pass without it."""
        for word in filter(None, self.fault.split(",")):
            point, _, kind = word.partition(":")[2].partition("=")
            if point not in POINTS or (kind or "crash") not in KINDS:
                raise ValueError(
                    f"REFERENCE_FAULT {word!r}: expected COHORT.LIFE:POINT=KIND with a point of {', '.join(POINTS)} "
                    f"and a kind of {', '.join(KINDS)}"
                )

    def fault_at(self, point: str, tag: str) -> str:
        """How this life is to fail at `point`; empty when it is not. `tag` is GMS_LAUNCH_TAG."""
        assert point in POINTS
        parts = tag.split("/")
        for word in filter(None, self.fault.split(",")):
            life, _, what = word.partition(":")
            where, _, kind = what.partition("=")
            cohort, _, incarnation = life.partition(".")
            if where == point and len(parts) == 4 and cohort in ("*", parts[1]) and incarnation in ("*", parts[2]):
                return kind or "crash"
        return ""

    def fail_here(self, point: str, tag: str) -> None:
        """Die by SIGKILL, block for ever or raise `InjectedError`, if this life is to fail at `point`."""
        kind = self.fault_at(point, tag)
        if not kind:
            return
        print(f"reference engine: {kind} at {point}, as REFERENCE_FAULT says", flush=True)
        if kind == "crash":
            os.kill(os.getpid(), signal.SIGKILL)
        while kind == "hang":
            signal.pause()
        raise InjectedError(f"{kind} at {point}")


@dataclass(frozen=True)
class EngineConfig:
    """One rank of the engine: the workers of one node. With `replicas` (data parallelism) each of these is whole and on
    one node, which has `local_replicas` of them from `first_replica` on, and `master_*` is where all workers meet.
    `hybrid`: every node's rank registers and takes requests for its own replicas.
    """

    model: Path
    served_model_name: str
    tensor_parallel_size: int
    nnodes: int
    node_rank: int
    master_addr: str
    master_port: int
    headless: bool
    engine_id: int
    lock_path: str
    gms_socket_dir: Path
    namespace: str
    knobs: Knobs
    tag: str
    device: str = "host"
    mode: str = "agg"
    component: str = "backend"
    replicas: int = 1
    local_replicas: int = 1
    first_replica: int = 0
    hybrid: bool = False
    expert_parallel: bool = False
    meeting_secret: bytes = field(default=b"", repr=False)

    @property
    def workers(self) -> int:
        """All of them, over all nodes."""
        return self.tensor_parallel_size * self.replicas

    @property
    def local_workers(self) -> int:
        return self.workers // self.nnodes if self.replicas == 1 else self.tensor_parallel_size * self.local_replicas

    @property
    def first_worker(self) -> int:
        """The first of this node, among all."""
        if self.replicas == 1:
            return self.node_rank * self.local_workers
        return self.tensor_parallel_size * self.first_replica

    @property
    def several_nodes(self) -> bool:
        return self.nnodes > 1 or self.local_replicas < self.replicas

    @property
    def own_replicas(self) -> range:
        """The replicas that this rank takes requests for."""
        return (
            range(self.first_replica, self.first_replica + self.local_replicas) if self.hybrid else range(self.replicas)
        )

    @property
    def own_workers(self) -> range:
        """The workers that this rank has load, sleep and wake."""
        return range(self.first_worker, self.first_worker + self.local_workers) if self.hybrid else range(self.workers)

    def part(self, rank: int) -> tuple[int, int]:
        """Which part of the weights a worker has, of how many: of all workers, or of its replica's.

        With expert parallelism no replica has all of them, and a step of one needs the workers of all.
        """
        whole = self.workers if self.expert_parallel else self.tensor_parallel_size
        return rank % whole, whole

    def workers_of(self, replica: int) -> range:
        """The workers that a step of a replica's needs."""
        if self.expert_parallel:
            return range(self.workers)
        return range(replica * self.tensor_parallel_size, (replica + 1) * self.tensor_parallel_size)


def parse(argv: list[str], environ: Mapping[str, str]) -> EngineConfig:
    """Read flags and environment; argparse ends the process with code 2 on wrong flags."""
    parser = argparse.ArgumentParser(prog="python -m gms_launch.engines.reference", description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--served-model-name")
    parser.add_argument("--load-format", choices=["gms"], required=True)
    parser.add_argument("--tensor-parallel-size", "-tp", type=int, default=1)
    parser.add_argument("--distributed-executor-backend", choices=["mp"], default="mp")
    parser.add_argument("--nnodes", type=int, default=1)
    parser.add_argument("--node-rank", type=int, default=0)
    parser.add_argument("--master-addr", default="127.0.0.1")
    parser.add_argument("--master-port", type=int, default=29501)
    parser.add_argument("--headless", action="store_true")
    parser.add_argument("--enforce-eager", action="store_true")
    parser.add_argument("--enable-sleep-mode", action="store_true")
    parser.add_argument("--seed", type=int, default=0, help="taken as vLLM takes it; nothing here is drawn by chance")
    parser.add_argument("--data-parallel-size", "-dp", type=int, default=1)
    parser.add_argument("--data-parallel-size-local", "-dpl", type=int, help="of this node; all when not given")
    parser.add_argument("--data-parallel-start-rank", "-dpr", type=int, default=0)
    parser.add_argument("--data-parallel-address", "-dpa", default="127.0.0.1")
    parser.add_argument("--data-parallel-rpc-port", "-dpp", type=int, default=29550)
    parser.add_argument("--data-parallel-hybrid-lb", "-dph", action="store_true")
    parser.add_argument("--enable-expert-parallel", "-ep", action="store_true")
    parser.add_argument("--disaggregation-mode", choices=["agg", "prefill", "decode"], default="agg")
    parser.add_argument("--endpoint", default="", help="dyn://NAMESPACE.COMPONENT.generate")
    # The same command line is to do for both engines; this one has no use for these.
    parser.add_argument("--max-model-len", help=argparse.SUPPRESS)
    parser.add_argument("--gpu-memory-utilization", help=argparse.SUPPRESS)
    parser.add_argument("--kv-transfer-config", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.tensor_parallel_size % options.nnodes:
        parser.error("--tensor-parallel-size must be a multiple of --nnodes")
    if options.endpoint and not re.fullmatch(r"dyn://[^.]+\.[^.]+\.generate", options.endpoint):
        parser.error("--endpoint: expected dyn://NAMESPACE.COMPONENT.generate")
    replicas, local = options.data_parallel_size, options.data_parallel_size_local or options.data_parallel_size
    if replicas > 1 and options.nnodes > 1:
        parser.error("with --data-parallel-size each replica is on one node: leave out --nnodes")
    if not 0 <= options.data_parallel_start_rank <= replicas - local:
        parser.error("--data-parallel-start-rank and --data-parallel-size-local are more than --data-parallel-size")
    # As vLLM takes them: a rank with a start rank that is not headless has requests of its own.
    hybrid = local < replicas and (
        options.data_parallel_hybrid_lb or (options.data_parallel_start_rank > 0 and not options.headless)
    )
    if options.headless and options.data_parallel_hybrid_lb:
        parser.error("--data-parallel-hybrid-lb: every node takes requests, and a headless one does not")
    if not hybrid and options.headless != (options.node_rank > 0 or options.data_parallel_start_rank > 0):
        parser.error("--headless goes with --node-rank or --data-parallel-start-rank above 0, and only with those")
    if environ.get("DYN_VLLM_GMS_SHADOW_MODE", "").lower() not in ("1", "true"):
        parser.error("DYN_VLLM_GMS_SHADOW_MODE must be true: this engine knows shadow mode only")
    try:
        # On one node nobody else needs to know it, and started by hand there is nobody to say it.
        secret = bytes.fromhex(environ.get(MEETING_SECRET, "")) or os.urandom(meeting.PROOF)
    except ValueError:
        parser.error(f"{MEETING_SECRET} is not hexadecimal")
    if (options.nnodes > 1 or local < replicas) and not environ.get(MEETING_SECRET):
        parser.error(f"ranks on several nodes need {MEETING_SECRET}: by it they know each other")
    try:
        knobs = Knobs.from_environ(environ)
    except ValueError as exc:
        parser.error(str(exc))
    return EngineConfig(
        model=options.model,
        served_model_name=options.served_model_name or str(options.model),
        tensor_parallel_size=options.tensor_parallel_size,
        nnodes=options.nnodes,
        node_rank=options.node_rank,
        master_addr=options.master_addr if replicas == 1 else options.data_parallel_address,
        master_port=options.master_port if replicas == 1 else options.data_parallel_rpc_port,
        replicas=replicas,
        local_replicas=local,
        first_replica=options.data_parallel_start_rank,
        hybrid=hybrid,
        expert_parallel=options.enable_expert_parallel,
        headless=options.headless,
        engine_id=int(environ.get("ENGINE_ID", "0")),
        lock_path=environ.get("FAILOVER_LOCK_PATH", "/shared/failover.lock"),
        gms_socket_dir=Path(environ["GMS_SOCKET_DIR"]),
        namespace=environ.get("DYN_NAMESPACE", "dynamo"),
        knobs=knobs,
        tag=environ.get("GMS_LAUNCH_TAG", ""),
        device=environ.get("REFERENCE_DEVICE", "host"),
        mode=options.disaggregation_mode,
        component=options.endpoint.split(".")[1] if options.endpoint else COMPONENTS[options.disaggregation_mode],
        meeting_secret=secret,
    )
