"""What dynamo.vllm and the reference engine have in common: how they are started, told and read.

Flags and environment are those of upstream's recipe and of Dynamo 1.1 to 1.6 (components' backend_args.py and
worker_factory.py); the log lines too. What only vLLM needs is in `vllm`.
"""

from __future__ import annotations

import re

from gms_launch.cohort.model import Phase
from gms_launch.cohort.steps import Step
from gms_launch.engines import installed
from gms_launch.engines.base import MEETING_SECRET, RankSpec
from gms_launch.gms.devices import CUDA_ORDER
from gms_launch.process.lifecycle import Command

#: In the order they are written. "sleeping" became "paused" in 1.5; the failover_state lines came with 1.4.
_PHASES: tuple[tuple[re.Pattern[str], Phase], ...] = (
    (re.compile(r"startup probe now passing, waiting for lock"), Phase.PARKED),
    (re.compile(r"\[Shadow\] Lock acquired, waking engine"), Phase.WAKING),
    (re.compile(r"\[Shadow\] failover_state engine=\S+ -> active"), Phase.ACTIVE),
)
#: Steps of a start, for people. Dynamo 1.3 logs neither "Committed" nor "Read mode"; vLLM has lines of its own.
_STEPS: tuple[tuple[re.Pattern[str], Step], ...] = (
    (re.compile(r"\[GMS\] Committed |\[GMS\] Read mode: imported |Model loading took "), Step.WARM_UP),
    (re.compile(r"Connected with \w+ lock \(granted=|gms_read_only=True|Starting to load model "), Step.WEIGHTS),
)
_AWAKE = re.compile(r"\[Shadow\] Engine awake, registering with discovery")


def speaks_tls_to_nats(version: str) -> bool:
    """Whether that release of Dynamo does; one that is not known does."""
    found = re.match(r"([0-9]+)\.([0-9]+)", version)
    return found is None or (int(found[1]), int(found[2])) >= (1, 5)


class Spoken:
    """How an engine that speaks as dynamo.vllm does is read. It has no ports but those that every engine gets."""

    @property
    def ports(self) -> dict[str, int]:
        return {}

    @property
    def imports(self) -> tuple[str, ...]:
        return ()

    def phase_of(self, line: str) -> Phase | None:
        return next((phase for pattern, phase in _PHASES if pattern.search(line)), None)

    def step_of(self, line: str) -> Step | None:
        return next((step for pattern, step in _STEPS if pattern.search(line)), None)

    def is_awake(self, line: str) -> bool:
        return _AWAKE.search(line) is not None


def _nodes(spec: RankSpec, always_master_port: bool) -> list[str]:
    """One engine core, whose workers meet over the nodes."""
    argv = []
    if spec.nnodes > 1:
        argv += ["--distributed-executor-backend", "mp", "--nnodes", str(spec.nnodes)]
        argv += ["--node-rank", str(spec.node_rank), "--master-addr", spec.leader_address]
    if spec.nnodes > 1 or always_master_port:
        argv += ["--master-port", str(spec.master_port)]
    return argv


def _replicas(spec: RankSpec) -> list[str]:
    """An engine core a replica, so many on each node; the first node shares out the requests (internal load balancing).

    A start rank says which replicas a headless node has; one that is not headless takes requests for these itself
    (hybrid load balancing), and vLLM wants it said of the first node, whose start rank is none.
    """
    local = spec.dp // spec.nnodes
    argv = ["--data-parallel-size", str(spec.dp), "--data-parallel-size-local", str(local)]
    argv += ["--data-parallel-address", spec.leader_address, "--data-parallel-rpc-port", str(spec.rpc_port)]
    if spec.node_rank > 0:
        argv += ["--data-parallel-start-rank", str(local * spec.node_rank)]
    if spec.hybrid:
        argv.append("--data-parallel-hybrid-lb")
    return argv


def command(spec: RankSpec, module: str, always_master_port: bool) -> Command:
    """The rank's command line and environment. `always_master_port`: also on one node."""
    argv = [*installed.module(spec.python, module), "--model", spec.model]
    if spec.served_model_name:
        argv += ["--served-model-name", spec.served_model_name]
    argv += ["--load-format", "gms", "--enforce-eager", "--enable-sleep-mode"]
    argv += ["--tensor-parallel-size", str(spec.tp)]
    if spec.pp > 1:
        argv += ["--pipeline-parallel-size", str(spec.pp)]
    if spec.role != "agg":
        argv += ["--disaggregation-mode", spec.role]
    if spec.component:
        argv += ["--endpoint", f"dyn://{spec.plane.namespace}.{spec.component}.generate"]
    argv += _replicas(spec) if spec.dp > 1 else _nodes(spec, always_master_port)
    if spec.headless:
        argv.append("--headless")
    env: dict[str, str | None] = {
        "ENGINE_ID": str(spec.cohort_id),
        "DYN_VLLM_GMS_SHADOW_MODE": "true",
        "GMS_SOCKET_DIR": str(spec.gms_dir),
        "FAILOVER_LOCK_PATH": str(spec.lock_path),
        "TMPDIR": str(spec.scratch_dir),
        MEETING_SECRET: spec.meeting_secret,
        # What an agent's environment may carry and would change a rank's place, its health or its loader.
        **dict.fromkeys(("DYN_VLLM_HEADLESS", "DYN_GMS_USE_V1", "DYN_SNAPSHOT_CONTROL_DIR", "DYN_ENDPOINT")),
        **dict.fromkeys(("DYN_HEALTH_CHECK_ENABLED", "DYN_SYSTEM_USE_ENDPOINT_HEALTH_STATUS")),
    }
    if spec.gms_memory == "cuda":
        env |= CUDA_ORDER
    env |= spec.device_view
    if not spec.headless:
        env |= spec.plane.environment()
        env |= {
            "DYN_SYSTEM_PORT": str(spec.system_port),
            "DYN_SYSTEM_STARTING_HEALTH_STATUS": "notready",
        }
    return Command((*argv, *spec.engine_args), env)
