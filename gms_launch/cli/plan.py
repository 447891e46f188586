"""`gms-launch plan`: what `up` would run, on this node or on every node. Starts nothing, writes nothing, binds nothing.

Also where the run will not be: a login node can plan for its cluster.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from gms_launch import engines
from gms_launch.engines import vllm
from gms_launch.errors import LaunchError, UsageError
from gms_launch.gms import devices
from gms_launch.gms.devices import Device
from gms_launch.gms.gpus import none_visible
from gms_launch.numbers import numbered
from gms_launch.run import model, outside, parts, placement, ports, topology
from gms_launch.run.credentials import Credentials
from gms_launch.run.fit import GIB, Fit, fit
from gms_launch.run.nodedir import NodeDir
from gms_launch.run.placement import Placed
from gms_launch.run.plan import Layout
from gms_launch.run.printed import to_json
from gms_launch.run.rundir import RunDir
from gms_launch.run.topology import Topology
from gms_launch.settings import groups
from gms_launch.settings.declared import Settings
from gms_launch.settings.resolve import checked
from gms_launch.urls import HIDDEN


def layout(settings: Settings, place: Topology | None = None) -> Layout:
    """The layout with the wanted ports: `up` moves those that are taken, unless they were fixed."""
    run = settings.run_id or "RUN"
    return Layout(
        run=run,
        settings=settings,
        topology=place or topology.discover(settings),
        ports=ports.layout(settings, lambda _: True, engines.get(settings.engine, settings.engine_file).ports),
        credentials=Credentials.hidden(HIDDEN, outside.placeholder(settings, HIDDEN)),
        run_dir=RunDir.of(run),
        node_dir=NodeDir.of(run, settings.gms_socket_dir, settings.node_rank),
    )


def elsewhere(settings: Settings, node_rank: int) -> Topology:
    """A node's place as it will see it, with a name where only that node knows its address."""
    leader = topology.resolve(settings.leader_addr)
    if node_rank == 0:
        return Topology(0, settings.serving_nodes, "leader", leader, leader)
    return Topology(node_rank, settings.serving_nodes, f"node-{node_rank}", f"<address of node {node_rank}>", leader)


def of_hosts(settings: Settings) -> Settings:
    """The settings that `up --hosts` gives its agents, but for the node rank. Raises `UsageError`."""
    from gms_launch.cli import up_hosts  # paramiko takes a while

    hosts = up_hosts.checked_hosts(settings)
    sources = {k: v for k, v in settings.sources.items() if k != "hosts"} | {"nnodes": "--hosts"}
    own = replace(settings, hosts="", nnodes=len(hosts), sources=sources)
    if not settings.was_set("tp"):
        own = replace(own, tp=max(1, (len(hosts) - settings.spares) // settings.pp))
    if len(hosts) > 1:
        leader = up_hosts.leader_of(hosts, settings)
        own = replace(own, leader_addr=leader, sources=sources | {"leader_addr": "--hosts"})
    return checked(own)


def memory(settings: Settings, gpu_gib: int = 0) -> Fit | None:
    """Whether the engines fit on GPUs of that size, or on this node's smallest. None where neither is known, and for
    engines of whose memory nothing is known."""
    if settings.engine != "vllm":
        return None
    total = gpu_gib * GIB or min((d.memory for d in devices.real_devices()), default=0)
    return fit(settings, total, vllm.ENGINE.line(settings).layered) if total else None


def only_memory(settings: Settings, gpu_gib: int, as_json: bool) -> None:
    """Say whether the engines would fit on GPUs that need not be here. Raises `LaunchError` when they would not."""
    room = memory(settings, gpu_gib)
    if room is None:
        raise UsageError(f"--gpu-gib: nothing is known of what --engine {settings.engine} takes of a GPU")
    model.check(settings)
    print(json.dumps({"schema": 1, "gpu_memory": room.to_json()}, indent=1) if as_json else "\n".join(room.lines()))
    if room.problem:
        raise LaunchError("the engines do not fit")


def main(settings: Settings, gpu_gib: int, as_json: bool, gpus_per_node: int = 0) -> None:
    if settings.hosts:
        settings = of_hosts(settings)
    if settings.grouped:
        of_groups(settings, gpu_gib, gpus_per_node, as_json)
        return
    if gpus_per_node:
        raise UsageError("--gpus-per-node says where groups lie, and the run has none; see --tp and --pp")
    if gpu_gib:
        only_memory(settings, gpu_gib, as_json)
        return
    room = memory(settings)
    if settings.nnodes == 1 or settings.was_set("node_rank"):
        found = layout(settings, None if settings.nnodes == 1 else elsewhere(settings, settings.node_rank))
        found.check()
        data = to_json(found) | {"gpu_memory": room and room.to_json()}
        print(json.dumps(data, indent=1)) if as_json else show(data, room)
        return
    if not settings.was_set("leader_addr"):
        raise UsageError(
            f"{settings.nnodes} nodes need --leader-addr (or LEADER_ADDR): how the others reach the leader"
        )
    plans = []
    for rank in range(settings.nnodes):
        found = layout(replace(settings, node_rank=rank), elsewhere(settings, rank))
        found.check()
        plans.append(to_json(found) | {"gpu_memory": room and room.to_json()})
    if as_json:
        print(json.dumps({"schema": 1, "nodes": plans}, indent=1))
        return
    for data in plans:
        show(data, room)
        print()


@dataclass(frozen=True)
class Elsewhere(Layout):
    """A node of which is known that it has `count` GPUs."""

    count: int = 0

    def devices(self) -> list[Device]:
        found, size = self.gpus or range(self.count), self.settings.virtual_gpu_mib * 2**20
        made_up = self.gms_memory == "host"
        return [Device(n, f"<GPU {k} of node {self.home.node_rank}>", size, made_up) for n, k in enumerate(found)]


def of_groups(settings: Settings, gpu_gib: int, gpus: int, as_json: bool) -> None:
    """Where each group lies, whether it can be there, and what runs on which node. Raises `UsageError`.

    `gpus`: how many a node has, as this one where it is 0; with `gpu_gib` only whether the engines fit is said.
    """
    own = settings
    if gpus and not settings.was_set("virtual_gpus") and settings.gms_memory == "auto":
        own = replace(settings, gms_memory="cuda")  # whatever this node has
    nodes = [_node_of_groups(own, gpus, n) for n in range(settings.nnodes)]
    gpus = gpus or len(nodes[0].devices())
    if not gpus:
        raise UsageError(
            f"how many GPUs each node has decides where groups lie, and {none_visible()}; for other nodes say "
            "--gpus-per-node"
        )
    placed = placement.place(groups.expand(own, gpus), settings.serving_nodes, gpus)
    rooms: list[Fit | None] = []
    for p in placed:
        parts.check_events(p, nodes[0])
        parts.check_engine(p)
        rooms.append(memory(p.group.settings, gpu_gib))
    if gpu_gib and not any(rooms):
        raise UsageError("--gpu-gib: nothing is known of what the engines of these groups take of a GPU")
    plans = []
    for node in [] if gpu_gib else nodes:
        node.check()
        if not settings.was_set("node_rank") or node.topology.node_rank == settings.node_rank:
            plans.append(to_json(_with_groups(node, placed, [n.topology.address for n in nodes])))
    if as_json:
        rows = [p.to_json() | {"gpu_memory": r and r.to_json()} for p, r in zip(placed, rooms, strict=True)]
        spare = {"spares": settings.spares} if settings.spares else {}
        store, front = nodes[0].store, nodes[0].front
        whole = {"schema": 1, "nnodes": settings.nnodes, **spare, "gpus": gpus, "groups": rows}
        whole |= {"etcd_nodes": list(range(store.members)), "frontend_nodes": list(range(front.number))}
        print(json.dumps(whole | ({} if gpu_gib else {"nodes": plans}), indent=1))
    else:
        print(f"run {settings.run_id or 'RUN'}: {placement.summary(placed, settings.nnodes, gpus)}")
        print("\n".join(placement.drawing(placed, settings.nnodes, gpus, settings.spares)))
        print(placement.around(settings))
        for p, room in zip(placed, rooms, strict=True):
            if room is not None:
                print(f"\n# memory of each GPU of group {p.group.name}", *room.lines(), sep="\n# ")
        for data in plans:
            print()
            show(data, None)
    if gpu_gib and (wrong := [p.group.name for p, r in zip(placed, rooms, strict=True) if r is not None and r.problem]):
        raise LaunchError(f"the engines of group {wrong[0]} do not fit")


def _node_of_groups(settings: Settings, gpus: int, rank: int) -> Layout:
    """A node as it is known before its groups are; with the `gpus` that it is said to have."""
    place = elsewhere(settings, rank)
    if not settings.was_set("leader_addr") and settings.nnodes > 1:
        leader = "<address of node 0>"
        place = replace(place, leader_address=leader, address=place.address if rank else leader)
    found = layout(replace(settings, node_rank=rank), place)
    return Elsewhere(**{f.name: getattr(found, f.name) for f in fields(found)}, count=gpus) if gpus else found


def _with_groups(node: Layout, placed: Sequence[Placed], addresses: Sequence[str]) -> Layout:
    """The node with its groups, whose leaders' `addresses` are told by these when they want a life."""
    found = parts.with_groups(node, lambda _: True)
    leaders = [addresses[placed[p.index].leader] for p in found.parts]
    return replace(
        found,
        parts=tuple(
            replace(p, topology=replace(p.topology, leader_address=a))
            for p, a in zip(found.parts, leaders, strict=True)
        ),
    )


def show(data: dict[str, Any], room: Fit | None) -> None:
    """One node's plan as a script would say it."""
    which = ", a spare" if data.get("spare") else f" of {data['nnodes']}"
    engine = "" if "groups" in data else f", engine {data['engine']}, GMS {data['gms_server']}"
    print(f"run {data['run']}, node {data['node_rank']}{which}{engine}")
    print(f"run directory {data['run_dir']}, node-local directory {data['node_dir']}, frontend {data['frontend_url']}")
    print("ports, as wanted (`up` moves those in use that you did not set): " + _listed(data["ports"]))
    for g in data.get("groups", ()):
        size = f"rank {g['rank']} of {g['nnodes']}, {numbered(len(g['gpus']), 'GPU')}"
        print(f"group {g['name']}: {size}, engine {g['engine']}, GMS {g['gms_server']}, ports {_listed(g['ports'])}")
    if room is not None:
        print("\n# memory of each GPU", *room.lines(), sep="\n# ")
    for process in data["processes"]:
        print(f"\n# {process['name']}")
        for key, value in process["env"].items():
            print(f"unset {key}" if value is None else f"export {key}={shlex.quote(value)}")
        print(shlex.join(process["argv"]))


def _listed(ports: Mapping[str, Any]) -> str:
    return ", ".join(f"{k} {v}" for k, v in ports.items())
