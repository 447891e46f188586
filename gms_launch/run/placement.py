"""Where each group of a run lies: which nodes, and which of their GPUs. Pure.

Every node works the same out for itself, from the settings and the number of GPUs that every node has.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from gms_launch.errors import UsageError
from gms_launch.numbers import numbered
from gms_launch.settings import groups
from gms_launch.settings.declared import Settings
from gms_launch.settings.groups import Group

#: GPUs of a node: more than there are.
MOST_GPUS = 64


@dataclass(frozen=True)
class Placed:
    """A group on `nodes` (node ranks, its leader first), with the GPUs `gpus` (indices) of each."""

    group: Group
    nodes: tuple[int, ...]
    gpus: range

    @property
    def leader(self) -> int:
        """The node rank that holds the group's lock and decides for it."""
        return self.nodes[0]

    def recorded(self) -> dict[str, Any]:
        """What run.json says of it, for verbs."""
        return {"nodes": list(self.nodes), "shadows": self.group.settings.shadows, "engine": self.group.settings.engine}

    def to_json(self) -> dict[str, Any]:
        group, s = self.group, self.group.settings
        return {
            "name": group.name,
            "role": group.role,
            "component": group.component or None,
            "leader": self.leader,
            "nodes": list(self.nodes),
            "gpus": list(self.gpus),
            "engine": s.engine,
            "model": s.model,
            "tp": s.tp,
            "pp": s.pp,
            "dp": s.dp,
            "dp_lb": s.dp_lb,
            "shadows": s.shadows,
            "engine_args": list(s.engine_args),
        }


def place(groups: Sequence[Group], nnodes: int, gpus: int) -> tuple[Placed, ...]:
    """The groups in their places, in the order given. Raises `UsageError` with the arithmetic when they do not fit.

    Groups with nodes of their own come first, one behind another; then the others, the largest first, each on the
    first node that has GPUs left for it.
    """
    whole = [g for g in groups if g.whole]
    if (needed := sum(g.nodes for g in whole)) > nnodes:
        wanted = " + ".join(f"{g.nodes} ({g.name})" for g in whole)
        raise UsageError(f"the groups need {needed} whole nodes: {_short(wanted)}; the run has {nnodes}")
    found: dict[int, Placed] = {}
    taken = 0
    for k, group in enumerate(groups):
        if group.whole:
            found[k] = Placed(group, tuple(range(taken, taken + group.nodes)), range(group.gpus))
            taken += group.nodes
    used = [gpus] * taken + [0] * (nnodes - taken)
    for k in sorted((k for k, g in enumerate(groups) if not g.whole), key=lambda k: -groups[k].gpus):
        need = groups[k].gpus
        node = next((n for n, busy in enumerate(used) if busy + need <= gpus), None)
        if node is None:
            raise UsageError(_no_room(groups, groups[k], nnodes - taken, gpus, max(gpus - busy for busy in used)))
        found[k] = Placed(groups[k], (node,), range(used[node], used[node] + need))
        used[node] += need
    return tuple(found[k] for k in range(len(groups)))


def wanted(s: Settings, nodes: int, gpus: int) -> tuple[int, int]:
    """How many nodes with how many GPUs each a run of groups takes, where neither need have been said (0).

    Raises `UsageError` where nothing tells, and with the arithmetic when the groups cannot fit.
    """
    tables, tp = s.tables or ({},), groups.own_tp(s)
    sized = all("gpus" in table or table.get("tp", tp) for table in tables)
    if not gpus and not sized:
        raise UsageError(
            "a group takes all GPUs of its nodes, or an equal part of them: say with --gpus-per-node how many there are"
        )
    if not nodes and not s.tables and not tp:
        raise UsageError("--groups makes equal groups of all nodes: say how many there are, with -N")
    if not gpus and not nodes and not all("nodes" in table for table in tables):
        raise UsageError("groups may lie beside each other on a node: say -N or --gpus-per-node, and the other follows")
    if nodes and not gpus:
        own = replace(s, nnodes=nodes)
        return nodes, _first(lambda n: place(groups.expand(own, n), own.serving_nodes, n), 1, MOST_GPUS)
    if not gpus:
        gpus = _first(lambda n: groups.expand(s, n), 1, MOST_GPUS)
    if not nodes:
        found = groups.expand(s, gpus)
        whole, parts = sum(g.nodes for g in found if g.whole), [g.gpus for g in found if not g.whole]
        least, most = whole - (-sum(parts) // gpus), whole + len(parts)
        nodes = s.spares + _first(lambda n: place(found, n, gpus), least, most)
    return nodes, gpus


def _first(holds: Callable[[int], object], least: int, most: int) -> int:
    """The first number of those for which it holds; else the error of the last."""
    for n in range(least, most):
        with contextlib.suppress(UsageError):
            holds(n)
            return n
    holds(most)
    return most


def _no_room(groups: Sequence[Group], without: Group, nodes: int, gpus: int, most: int) -> str:
    parts = [g for g in groups if not g.whole]
    total = sum(g.gpus for g in parts)
    there = f"{nodes * gpus} ({numbered(nodes, 'node')} that no group has to itself x {gpus})"
    left = f"no node has more than {numbered(most, 'GPU')} left" if most else "no node has any left"
    return (
        f"the groups do not fit: {numbered(len(parts), 'group')} with gpus want {total} GPUs of {there}; "
        f"group {without.name} wants {without.gpus} on one node, and {left}"
    )


def _short(text: str, longest: int = 200) -> str:
    return text if len(text) <= longest else text[:longest] + "..."


def summary(placed: Sequence[Placed], nnodes: int, gpus: int) -> str:
    return f"{numbered(len(placed), 'group')} on {numbered(nnodes, 'node')} with {numbered(gpus, 'GPU')} each"


def drawing(placed: Sequence[Placed], nnodes: int, gpus: int, spares: int = 0) -> list[str]:
    """Who has what, a line for each part of each node, of which the last are `spares`."""
    rows = []
    for node in range(nnodes):
        here = sorted((p for p in placed if node in p.nodes), key=lambda p: p.gpus.start)
        name, free = f"node {node}", range(here[-1].gpus.stop if here else 0, gpus)
        for p in here:
            rows.append((name, span(p.gpus), p.group.name, _words(p, node)))
            name = ""
        if len(free):
            left = "kept by the group" if here and here[0].group.whole else "free"
            spare = "a spare: takes the place of a node that is lost"
            rows.append((name, span(free), "", spare if node >= nnodes - spares else left))
    widths = [max(len(row[k]) for row in rows) for k in range(3)]
    return ["  ".join([*(c.ljust(w) for c, w in zip(r, widths, strict=False)), r[3]]).rstrip() for r in rows]


def around(s: Settings) -> str:
    """Where lies what all groups need, and what the loss of a node comes to."""
    members, fronts = 0 if s.etcd_endpoints else s.members(s.serving_nodes), s.fronts(s.serving_nodes)
    where = [f"{name} on {_from_0(count)}" for name, count in (("etcd", members), ("frontend", fronts)) if count]
    if s.nnodes == 1:
        return ", ".join(where)
    if members < 3:
        may = not s.etcd_endpoints and s.serving_nodes >= 3
        end = "the run ends when node 0 is lost" + (" (without --etcd-members 3 --frontends auto)" if may else "")
    elif fronts == 1:
        end = "no single node ends the run, but without node 0 nobody gets in (--frontends auto)"
    else:
        end = "no single node ends the run"
    spare = "a spare takes the place of one that is lost" if s.spares else "the groups of one that is lost wait for it"
    return f"{', '.join(where)}: {end}; {spare}"


def _from_0(count: int) -> str:
    return "node 0" if count == 1 else f"nodes 0-{count - 1}"


def span(gpus: range) -> str:
    """GPUs of a node for people."""
    last = gpus.stop - 1
    return f"GPU {gpus.start}" if len(gpus) == 1 else f"GPUs {gpus.start}-{last}"


def _words(p: Placed, node: int) -> str:
    s, rank = p.group.settings, p.nodes.index(node)
    if rank:
        return f"rank {rank}"
    size = f"tp {s.tp}" + (f" pp {s.pp}" if s.pp > 1 else "") + (f" dp {s.dp}" if s.dp > 1 else "")
    size += " hybrid" if s.hybrid else ""
    return f"leads, {p.group.role}, {s.engine}, {s.model or 'no model'}, {size}, {numbered(s.shadows, 'shadow')}"
