"""`python -m dynamo.vllm`, Dynamo 1.1 to 1.6: what the real engine needs beyond its command line.

`LINES` is what differs between the releases, read from their wheels; tests/wheels checks it against them, and
docs/compatibility.md is made from it. vLLM itself is never imported here: that takes half a minute and wants a GPU.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, replace

from gms_launch.engines import dynamo, installed
from gms_launch.engines.base import RankSpec
from gms_launch.numbers import count
from gms_launch.process.lifecycle import Command
from gms_launch.settings import arguments
from gms_launch.settings.declared import Settings

MODULES = ("dynamo.vllm", "vllm", "gpu_memory_service")
DISTRIBUTIONS = ("ai-dynamo", "vllm", "flashinfer-python", "gpu-memory-service")


@dataclass(frozen=True)
class Line:
    """One release line of Dynamo, as its wheel shows it.

    `control` is the prefix of the engine's sleep and wake routes, `parked` the word of the log line that says so,
    `metrics` whether there are failover metrics, `event_plane` the default with etcd. With `needs_system_port` a
    promotion fails at registration when DYN_SYSTEM_PORT is not set. `layered`: scratch KV takes a piece for each layer.
    """

    dynamo: str
    release: str
    vllm: str
    control: str
    parked: str
    metrics: bool
    event_plane: str
    needs_system_port: bool
    layered: bool


LINES = (
    Line("1.1", "1.1.1", "0.19.0", "", "sleeping", False, "nats", False, True),
    Line("1.2", "1.2.1", "0.20.1", "", "sleeping", False, "nats", False, True),
    Line("1.3", "1.3.1", "0.23.0", "control/", "sleeping", False, "zmq", False, True),
    Line("1.4", "1.4.2", "0.26.0", "control/", "sleeping", True, "zmq", True, False),
    Line("1.5", "1.5.1", "0.28.0", "control/", "paused", True, "zmq", True, False),
    Line("1.6", "1.6.1", "0.31.0", "control/", "paused", True, "zmq", True, False),
)
#: The front can be set (VLLM_PROCESS_NAME_PREFIX).
_VITAL = re.compile(r"\S*::(EngineCore|Worker)")
_HINT = "run inside NVIDIA's vllm-runtime image from 1.4 on, or use --engine reference on a machine without a GPU"


def line_of(version: str) -> Line | None:
    """The line that a version of Dynamo belongs to; the newest known for a newer one; None for one that is too old."""
    try:
        major, minor = (int(p) for p in version.split(".")[:2])
    except ValueError:
        return None
    known = {tuple(int(p) for p in line.dynamo.split(".")): line for line in LINES}
    if (major, minor) > max(known):
        return LINES[-1]
    return known.get((major, minor))


@dataclass(frozen=True)
class VllmEngine(dynamo.Spoken):
    """The module behind --engine vllm."""

    name: str = "vllm"

    @property
    def imports(self) -> tuple[str, ...]:
        # What its __main__ imports: vLLM and torch with it. A spawned core imports them once more, from a warm cache.
        return ("dynamo.vllm.main",)

    def problems(self, settings: Settings) -> list[str]:
        has = installed.look(settings.python, MODULES, DISTRIBUTIONS)
        found = []
        if has.missing:
            who = settings.python or "this Python"
            found.append(f"--engine vllm needs {' and '.join(has.missing)}, which {who} cannot import; {_HINT}")
        version = has.versions.get("ai-dynamo", "")
        if version and line_of(version) is None:
            found.append(
                f"--engine vllm: Dynamo {version} has no shadow mode with scratch KV; {LINES[0].dynamo} is the first"
            )
        if settings.dp > 1 and version and line_of(version) == LINES[0]:
            found.append(f"--engine vllm: Dynamo {version} hangs with several replicas on GMS; --dp needs 1.2 or later")
        return found

    def line(self, settings: Settings) -> Line:
        """Of the Dynamo that is installed; the newest known where none is, as on a login node."""
        version = installed.look(settings.python, MODULES, DISTRIBUTIONS).versions.get("ai-dynamo", "")
        return line_of(version) or LINES[-1]

    def describe(self, settings: Settings) -> str:
        """The versions found, for people."""
        versions = installed.look(settings.python, MODULES, DISTRIBUTIONS).versions
        text = ", ".join(f"{name} {version}" for name, version in versions.items())
        line = line_of(versions.get("ai-dynamo", ""))
        if line is not None and versions.get("vllm", line.vllm).split("+")[0] != line.vllm:
            text += f" (Dynamo {line.release} was released with vllm {line.vllm})"
        if installed.look(settings.python, ("setproctitle",)).missing:
            text += "; without setproctitle its core and workers have no titles, and only its main process is watched"
        return text

    def command(self, spec: RankSpec) -> Command:
        spec = replace(spec, engine_args=arguments.stagger_kv_events(spec.engine_args, spec.shift))
        made = dynamo.command(spec, "dynamo.vllm", always_master_port=False)
        env = {
            "VLLM_NIXL_SIDE_CHANNEL_PORT": str(spec.nixl_port),
            "VLLM_NIXL_SIDE_CHANNEL_HOST": spec.plane.address,
            "VLLM_PORT": str(spec.vllm_port),
            "VLLM_RPC_BASE_PATH": str(spec.scratch_dir),
            "VLLM_HOST_IP": spec.plane.address,
        }
        # A relaunched engine finds what the first compiled: a cold cache doubled a peer's time to be re-armed.
        suggested = {
            "VLLM_CACHE_ROOT": str(spec.cache_dir / "vllm"),
            "TORCHINDUCTOR_CACHE_DIR": str(spec.cache_dir / "torchinductor"),
            "TRITON_CACHE_DIR": str(spec.cache_dir / "triton"),
            "FLASHINFER_WORKSPACE_BASE": str(spec.cache_dir / "flashinfer"),
        }
        if installed.look(spec.python, ("flashinfer",)).missing:
            # Without it the engine core dies 40 s into the start.
            suggested["VLLM_USE_FLASHINFER_SAMPLER"] = "0"
        if spec.interface and spec.nnodes > 1:
            suggested |= {"NCCL_SOCKET_IFNAME": spec.interface, "GLOO_SOCKET_IFNAME": spec.interface}
        if port := os.environ.get("DYN_FORWARDPASS_METRIC_PORT", ""):
            number = count(port)
            env["DYN_FORWARDPASS_METRIC_PORT"] = port if number is None else str(number + spec.shift)
        env |= {k: v for k, v in suggested.items() if k not in os.environ}  # the user's own word wins
        return Command(made.argv, {**made.env, **env})

    def is_vital(self, command_line: str) -> bool:
        """The engine core and the workers, by the titles that vLLM gives them (VLLM::EngineCore, VLLM::Worker_TP0).

        The main process sees a dead one only when its monitor looks, every 2 s, and then takes up to 30 s to exit
        with the lock in its hand (engine_monitor.py).
        """
        return _VITAL.match(command_line) is not None


ENGINE = VllmEngine()
