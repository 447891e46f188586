"""The plan of a node for people and tests. Pure."""

from __future__ import annotations

from typing import Any

from gms_launch.process import waiting
from gms_launch.process.lifecycle import Command
from gms_launch.run.plan import Layout
from gms_launch.urls import HIDDEN

#: What a member of etcd is told of those that are there, when they are.
JOINS = "(all members that are there)"
_SECRET = ("PASSWORD", "SECRET", "CLIENT_KEY", "AUTH_TOKEN")


def to_json(layout: Layout) -> dict[str, Any]:
    """The plan for people and tests; secrets are hidden. In a run of groups what is a group's own is in `groups`."""
    several = layout.number_of_groups > 0
    return {
        "schema": 1,
        "run": layout.run,
        "node_rank": layout.topology.node_rank,
        "nnodes": layout.topology.nnodes,
        **({"spare": layout.is_spare} if layout.settings.spares else {}),
        "leader_address": layout.topology.leader_address,
        **({} if several else _engine(layout)),
        "frontend_url": layout.front.url,
        "run_dir": str(layout.run_dir.path),
        "node_dir": str(layout.node_dir.path),
        "ports": _ports(layout, not several),
        **({"groups": [_group(g) for g in layout.groups]} if several else {}),
        "processes": [
            {"name": name, "argv": list(command.argv), "env": _public(command)} for name, command in processes(layout)
        ],
    }


def processes(layout: Layout) -> list[tuple[str, Command]]:
    """Every process of a node in the order of its start; those of a group have its name before their own."""
    groups = () if layout.is_spare else layout.groups
    found = [(s.name, s.command) for g in groups for s in g.gms_services()]
    if layout.store.is_member:
        found.append(("etcd", layout.store.service(JOINS if layout.home.node_rank else "").command))
    if layout.is_spare:
        return found
    found += [(s.name, s.command) for s in layout.store.near_services()]
    if layout.topology.is_leader and layout.own_nats:
        found.append(("nats", layout.nats_service().command))
    if layout.front.here:
        found += [(s.name, s.command) for s in layout.front_services()]
    return found + [rank for g in groups for rank in _ranks(g)]


def _ranks(group: Layout) -> list[tuple[str, Command]]:
    found = []
    for cohort_id in range(group.settings.cohorts):
        command = group.rank_command(cohort_id, 1, group.ports.master(cohort_id, 1))
        found.append((f"{group.prefix}cohort {cohort_id} rank {group.topology.node_rank}", command))
    warm = waiting.command(group.python, group.engine.imports, group.warm_environment())
    return found + [(f"{group.prefix}warm-{n}", warm) for n in range(1, group.settings.warm_slots + 1)]


def _engine(layout: Layout) -> dict[str, str]:
    return {
        "engine": layout.settings.engine,
        "gms_server": layout.gms_kind,
        "gms_memory": layout.gms_memory,
    }


def _group(group: Layout) -> dict[str, Any]:
    """A node's part in a group."""
    return {
        "name": group.group,
        "rank": group.topology.node_rank,
        "nnodes": group.topology.nnodes,
        "gpus": list(group.gpus or ()),
        "leader_address": group.topology.leader_address,
        **_engine(group),
        "node_dir": str(group.node_dir.path),
        "ports": _engines_ports(group),
    }


def _ports(layout: Layout, engines: bool) -> dict[str, Any]:
    ports = layout.ports
    return {
        "frontend": ports.frontend,
        "etcd": ports.etcd,
        "etcd_peer": ports.etcd_peer,
        "nats": ports.nats,
        **(_engines_ports(layout) if engines else {}),
        "word": ports.word,
        **({"frontend_inner": ports.frontend_inner} if ports.frontend_inner else {}),
        **({"etcd_proxy": ports.etcd_proxy} if ports.etcd_proxy else {}),
    }


def _engines_ports(layout: Layout) -> dict[str, list[int]]:
    """By kind, one for each cohort."""
    ports = layout.ports
    return {
        "master": [ports.master(k, 1) for k in range(layout.settings.cohorts)],
        "system": list(ports.system),
        "nixl": list(ports.nixl),
        "vllm": list(ports.vllm),
        **{name: list(numbers) for name, numbers in ports.extra.items()},
    }


def _public(command: Command) -> dict[str, str | None]:
    return {k: HIDDEN if v and any(s in k for s in _SECRET) else v for k, v in sorted(command.env.items())}
