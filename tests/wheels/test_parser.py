"""vLLM's own parser on the command lines that we make. Heavy (9 GB): `make test-vllm`, which sets the interpreter."""

from __future__ import annotations

import json
import os
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gms_launch.process.lifecycle import Command
from gms_launch.run import ports, topology
from gms_launch.settings.groups import COMPONENTS
from gms_launch.settings.resolve import resolve
from tests.unit.engines.test_engines import plan_of

PYTHON = os.environ.get("GMS_LAUNCH_VLLM_PYTHON", "")
pytestmark = [pytest.mark.skipif(not PYTHON, reason="needs vLLM: make test-vllm"), pytest.mark.timeout(600)]


def test_every_rank_is_understood_as_it_was_meant(model: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    assert config["architectures"], "vLLM looks at the model's config while it parses"
    args = ["--max-model-len", "2048", "--gpu-memory-utilization", "0.08", "--kv-events-config"]
    args += ['{"enable_kv_cache_events": true, "publisher": "zmq", "endpoint": "tcp://*:5557"}']
    flags = {"engine": "vllm", "model": str(model), "tp": "4", "pp": "2", "served_model_name": "m"}
    settings = resolve(flags, {}, engine_args=args)
    plan = plan_of(settings)
    asked, meant = [], []
    for nnodes in (1, 2):
        for node_rank in range(nnodes):
            place = topology.Topology(node_rank, nnodes, "n", f"10.0.0.{node_rank + 1}", "10.0.0.1")
            here = replace(plan, topology=place, ports=ports.layout(settings, lambda _: True))
            for cohort_id in (0, 1):
                port = here.ports.master(cohort_id, 1)
                command = here.rank_command(cohort_id, 1, port)
                asked.append({"argv": arguments(command), "env": dict(command.env)})
                several = {"nnodes": nnodes, "node_rank": node_rank, "master_addr": "10.0.0.1", "master_port": port}
                meant.append(
                    {
                        **(several if nnodes > 1 else {"nnodes": 1, "node_rank": 0}),
                        "headless": node_rank > 0,
                        "distributed_executor_backend": "mp" if nnodes > 1 else None,
                        "load_format": "gms",
                        "tensor_parallel_size": 4,
                        "pipeline_parallel_size": 2,
                        "enforce_eager": True,
                        "enable_sleep_mode": True,
                        "gms_shadow_mode": True,
                        "max_model_len": 2048,
                        "gpu_memory_utilization": 0.08,
                        "model": str(model),
                        "served_model_name": "m",
                        "component": "backend",
                        "endpoint": "generate",
                    }
                )
                if node_rank == 0:
                    meant[-1] |= {"namespace": "dynamo", "event_plane": "zmq"}
    for found, wanted in zip(understood(asked), meant, strict=True):
        assert {k: found[k] for k in wanted} == wanted


def test_replicas_and_halves_are_understood_as_they_were_meant(model: Path) -> None:
    args = ["--enable-expert-parallel", "--kv-transfer-config", '{"kv_connector":"NixlConnector","kv_role":"kv_both"}']
    flags = {"engine": "vllm", "model": str(model), "tp": "2", "dp": "4", "served_model_name": "m"}
    settings = resolve(flags, {}, engine_args=args)
    plan = plan_of(settings)
    asked, meant = [], []
    for role, component in (("agg", ""), ("prefill", ""), ("decode", ""), ("decode", "late")):
        for nnodes, node_rank in ((1, 0), (2, 0), (2, 1)):
            place = topology.Topology(node_rank, nnodes, "n", f"10.0.0.{node_rank + 1}", "10.0.0.1")
            here = replace(plan, topology=place, ports=ports.layout(settings, lambda _: True))
            here = replace(here, role=role, component=component)
            port = here.ports.master(1, 1)
            command = here.rank_command(1, 1, port)
            asked.append({"argv": arguments(command), "env": dict(command.env)})
            meant.append(
                {
                    "headless": node_rank > 0,
                    "nnodes": 1,
                    "tensor_parallel_size": 2,
                    "data_parallel_size": 4,
                    "data_parallel_size_local": 4 // nnodes,
                    "data_parallel_start_rank": 2 if node_rank else None,
                    "data_parallel_address": "10.0.0.1",
                    "data_parallel_rpc_port": ports.rpc(port),
                    "data_parallel_hybrid_lb": False,
                    "data_parallel_external_lb": False,
                    "enable_expert_parallel": True,
                    "disaggregation_mode": role,
                    "component": component or COMPONENTS[role],
                    "endpoint": "generate",
                }
            )
    for found, wanted in zip(understood(asked), meant, strict=True):
        assert {k: found[k] for k in wanted} == wanted


def test_hybrid_load_balancing_is_understood_as_it_was_meant(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gms_launch.run.reach.interface", lambda _: "")  # those addresses are not of this machine
    flags = {"engine": "vllm", "model": str(model), "tp": "2", "dp": "4", "nnodes": "2", "served_model_name": "m"}
    settings = resolve(flags | {"dp_lb": "hybrid", "activation": "agent"}, {})
    plan = plan_of(replace(settings, nnodes=1))  # where each node is, is said below
    plan = replace(plan, settings=settings, ports=ports.layout(settings, lambda _: True))
    asked, meant = [], []
    for node_rank in (0, 1):
        place = topology.Topology(node_rank, 2, "n", f"10.0.0.{node_rank + 1}", "10.0.0.1")
        port = plan.ports.master(1, 1)
        command = replace(plan, topology=place).rank_command(1, 1, port)
        asked.append({"argv": arguments(command), "env": dict(command.env)})
        meant.append(
            {
                "headless": False,
                "data_parallel_size": 4,
                "data_parallel_size_local": 2,
                "data_parallel_start_rank": 2 if node_rank else None,
                "data_parallel_address": "10.0.0.1",
                "data_parallel_rpc_port": ports.rpc(port),
                "data_parallel_hybrid_lb": True,
                "data_parallel_external_lb": False,
                "namespace": "dynamo",
                "event_plane": "zmq",
            }
        )
    for found, wanted in zip(understood(asked), meant, strict=True):
        assert {k: found[k] for k in wanted} == wanted


def arguments(command: Command) -> list[str]:
    """What follows the name of the module."""
    return list(command.argv[command.argv.index("dynamo.vllm") + 1 :])


def understood(asked: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What the real parsers make of command lines with their environments."""
    script = Path(__file__).with_name("vllm_parser.py")
    done = subprocess.run(
        [PYTHON, str(script)], input=json.dumps(asked), capture_output=True, text=True, timeout=580, check=False
    )
    lines = [x for x in done.stdout.splitlines() if x.startswith("UNDERSTOOD ")]
    assert done.returncode == 0 and lines, done.stdout[-3000:] + done.stderr[-3000:]
    found: list[dict[str, Any]] = json.loads(lines[0].partition(" ")[2])
    return found
