"""dynamo.vllm and the reference engine, which is started, told and read the same way.

Flags and environment are those of upstream's recipe and of Dynamo 1.1 to 1.6 (components' backend_args.py and
worker_factory.py); the log lines too. What is specific to one release of vLLM is not here.
"""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import dataclass
from importlib.util import find_spec

from gms_launch.cohort.model import Phase
from gms_launch.cohort.process import Command
from gms_launch.engines import RankSpec
from gms_launch.gms.devices import CUDA_ORDER

#: In the order they are written. "sleeping" became "paused" in 1.5; the failover_state lines came with 1.4.
_PHASES: tuple[tuple[re.Pattern[str], Phase], ...] = (
    (re.compile(r"startup probe now passing, waiting for lock"), Phase.PARKED),
    (re.compile(r"\[Shadow\] Lock acquired, waking engine"), Phase.WAKING),
    (re.compile(r"\[Shadow\] failover_state engine=\S+ -> active"), Phase.ACTIVE),
)
_AWAKE = re.compile(r"\[Shadow\] Engine awake, registering with discovery")


@dataclass(frozen=True)
class DynamoEngine:
    """An engine with dynamo.vllm's command line. `needs` are the modules it imports."""

    name: str
    module: str
    needs: tuple[str, ...]
    hint: str

    def problems(self, python: str) -> list[str]:
        missing = missing_modules(python, self.needs)
        if not missing:
            return []
        who = python or sys.executable
        return [f"--engine {self.name} needs {' and '.join(missing)}, which {who} cannot import; {self.hint}"]

    def command(self, spec: RankSpec) -> Command:
        argv = [spec.python, "-m", self.module, "--model", spec.model]
        if spec.served_model_name:
            argv += ["--served-model-name", spec.served_model_name]
        argv += ["--load-format", "gms", "--enforce-eager", "--enable-sleep-mode"]
        argv += ["--tensor-parallel-size", str(spec.tp)]
        if spec.nnodes > 1:
            argv += ["--distributed-executor-backend", "mp", "--nnodes", str(spec.nnodes)]
            argv += ["--node-rank", str(spec.node_rank), "--master-addr", spec.leader_address]
        if spec.nnodes > 1 or self.name == "reference":
            argv += ["--master-port", str(spec.master_port)]
        if spec.node_rank > 0:
            argv.append("--headless")
        env: dict[str, str | None] = {
            "ENGINE_ID": str(spec.cohort_id),
            "DYN_VLLM_GMS_SHADOW_MODE": "true",
            "GMS_SOCKET_DIR": str(spec.gms_dir),
            "FAILOVER_LOCK_PATH": str(spec.lock_path),
            "VLLM_NIXL_SIDE_CHANNEL_PORT": str(spec.nixl_port),
            "VLLM_NIXL_SIDE_CHANNEL_HOST": spec.plane.address,
            "VLLM_PORT": str(spec.vllm_port),
            "VLLM_HOST_IP": spec.plane.address,
            "DYN_HEALTH_CHECK_ENABLED": None,
            "DYN_SYSTEM_USE_ENDPOINT_HEALTH_STATUS": None,
        }
        if spec.gms_memory == "cuda":
            env |= CUDA_ORDER
            env["REFERENCE_DEVICE"] = "cuda" if self.name == "reference" else None
        if spec.node_rank == 0:
            env |= spec.plane.environment()
            env |= {
                "DYN_SYSTEM_PORT": str(spec.system_port),
                "DYN_SYSTEM_HOST": spec.plane.address,
                "DYN_SYSTEM_STARTING_HEALTH_STATUS": "notready",
            }
        return Command((*argv, *spec.engine_args), env)

    def phase_of(self, line: str) -> Phase | None:
        for pattern, phase in _PHASES:
            if pattern.search(line):
                return phase
        return None

    def is_awake(self, line: str) -> bool:
        return _AWAKE.search(line) is not None


def missing_modules(python: str, names: tuple[str, ...]) -> list[str]:
    """Those of `names` that the interpreter cannot find; nothing is imported but parents of dotted names."""
    if not python or python == sys.executable:
        return [n for n in names if not _found(n)]
    code = (
        "import sys\nfrom importlib.util import find_spec\n"
        "def found(n):\n try: return find_spec(n) is not None\n except ImportError: return False\n"
        "print(*[n for n in sys.argv[1:] if not found(n)])"
    )
    try:
        done = subprocess.run([python, "-c", code, *names], capture_output=True, text=True, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError) as exc:
        return [f"a working interpreter ({python}: {exc})"]
    return done.stdout.split()


def _found(name: str) -> bool:
    try:
        return find_spec(name) is not None
    except ImportError:
        return False


VLLM = DynamoEngine(
    "vllm",
    "dynamo.vllm",
    ("dynamo.vllm", "vllm", "gpu_memory_service"),
    "run inside NVIDIA's vllm-runtime image from 1.4 on, or use --engine reference on a machine without a GPU",
)
REFERENCE = DynamoEngine(
    "reference",
    "gms_launch.engines.reference",
    ("dynamo.llm", "numpy", "safetensors"),
    "pip install 'gms-launch[reference,dynamo]'",
)
