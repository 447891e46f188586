"""Run the real argument parsers of dynamo.vllm and vLLM on our command lines. For an interpreter that has both.

    python tests/wheels/vllm_parser.py < commands.json

Reads a list of {"argv": [...], "env": {...}} and prints what each was understood as. No GPU is needed: a platform
plugin says that this is a CPU, since vLLM wants to know before it parses anything. Nothing of gms-launch is imported.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path

PLUGIN = "[vllm.platform_plugins]\ncpu = no_gpu:platform\n"


def pretend_cpu() -> None:
    """Make vLLM find its CPU platform through the entry point that it has for this."""
    place = Path(tempfile.mkdtemp(prefix="no-gpu-"))
    (place / "no_gpu.py").write_text("def platform():\n    return 'vllm.platforms.cpu.CpuPlatform'\n")
    info = place / "no_gpu-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: no-gpu\nVersion: 1\n")
    (info / "entry_points.txt").write_text(PLUGIN)
    sys.path.insert(0, str(place))


def understood(argv: list[str], env: dict[str, str | None]) -> dict[str, object]:
    """What the engine would run with."""
    from dynamo.vllm.args import parse_args

    before = dict(os.environ)
    os.environ.update({k: v for k, v in env.items() if v is not None})
    for name in (k for k, v in env.items() if v is None):
        os.environ.pop(name, None)
    try:
        config = parse_args(argv)
    finally:
        os.environ.clear()
        os.environ.update(before)
    engine = config.engine_args
    fields = ("model", "load_format", "tensor_parallel_size", "pipeline_parallel_size", "nnodes", "node_rank")
    fields += ("master_addr", "master_port", "distributed_executor_backend", "enforce_eager", "enable_sleep_mode")
    fields += ("max_model_len", "gpu_memory_utilization", "enable_expert_parallel", "data_parallel_size")
    fields += ("data_parallel_size_local", "data_parallel_start_rank", "data_parallel_address")
    fields += ("data_parallel_rpc_port", "data_parallel_hybrid_lb", "data_parallel_external_lb")
    found = {name: getattr(engine, name) for name in fields}
    found |= {"headless": config.headless, "gms_shadow_mode": config.gms_shadow_mode}
    found |= {"event_plane": config.event_plane, "namespace": config.namespace, "endpoint": config.endpoint}
    found["disaggregation_mode"] = config.disaggregation_mode.value
    return found | {"served_model_name": config.served_model_name, "component": config.component}


def main() -> None:
    pretend_cpu()
    asked = json.load(sys.stdin)
    answers = [understood(a["argv"], a["env"]) for a in asked]
    print("UNDERSTOOD " + json.dumps(answers))


if __name__ == "__main__":
    main()
