"""The plan of a node for people and tests. Pure."""

from __future__ import annotations

from typing import Any

from gms_launch.process.lifecycle import Command
from gms_launch.run.plan import Layout
from gms_launch.urls import HIDDEN

_SECRET = ("PASSWORD", "SECRET", "CLIENT_KEY", "AUTH_TOKEN")


def to_json(layout: Layout) -> dict[str, Any]:
    """The plan for people and tests; secrets are hidden."""
    ports = layout.ports
    return {
        "schema": 1,
        "run": layout.run,
        "node_rank": layout.topology.node_rank,
        "nnodes": layout.topology.nnodes,
        **({"spare": layout.is_spare} if layout.settings.spares else {}),
        "leader_address": layout.topology.leader_address,
        "engine": layout.settings.engine,
        "gms_server": layout.gms_kind,
        "gms_memory": layout.gms_memory,
        "frontend_url": layout.front.url,
        "run_dir": str(layout.run_dir.path),
        "node_dir": str(layout.node_dir.path),
        "ports": {
            "frontend": ports.frontend,
            "etcd": ports.etcd,
            "etcd_peer": ports.etcd_peer,
            "nats": ports.nats,
            "master": [ports.master(k, 1) for k in range(layout.settings.cohorts)],
            "system": list(ports.system),
            "nixl": list(ports.nixl),
            "vllm": list(ports.vllm),
            "word": ports.word,
            **({"frontend_inner": ports.frontend_inner} if ports.frontend_inner else {}),
            **({"etcd_proxy": ports.etcd_proxy} if ports.etcd_proxy else {}),
            **{name: list(numbers) for name, numbers in ports.extra.items()},
        },
        "processes": [
            {"name": name, "argv": list(command.argv), "env": _public(command)} for name, command in layout.processes()
        ],
    }


def _public(command: Command) -> dict[str, str | None]:
    return {k: HIDDEN if v and any(s in k for s in _SECRET) else v for k, v in sorted(command.env.items())}
