"""Where each group of a run lies: which nodes, and which of their GPUs. Pure.

Every node works the same out for itself, from the settings and the number of GPUs that every node has.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from gms_launch.errors import UsageError
from gms_launch.numbers import numbered
from gms_launch.settings.declared import Settings
from gms_launch.settings.groups import Group


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
            "shadows": s.shadows,
            "engine_args": list(s.engine_args),
        }


def place(groups: Sequence[Group], nnodes: int, gpus: int) -> tuple[Placed, ...]:
    """The groups in their places, in the order given. Raises `UsageError` with the arithmetic when they do not fit.

    Groups with nodes of their own come first, one behind another; then the others, the largest first, each on the
    first node that has GPUs left for it.
    """
    found: dict[int, Placed] = {}
    taken = 0
    for k, group in enumerate(groups):
        if group.whole:
            found[k] = Placed(group, tuple(range(taken, taken + group.nodes)), range(group.gpus))
            taken += group.nodes
    if taken > nnodes:
        wanted = " + ".join(f"{p.group.nodes} ({p.group.name})" for p in found.values())
        raise UsageError(f"the groups need {taken} whole nodes: {_short(wanted)}; the run has {nnodes}")
    used = [gpus] * taken + [0] * (nnodes - taken)
    for k in sorted((k for k, g in enumerate(groups) if not g.whole), key=lambda k: -groups[k].gpus):
        need = groups[k].gpus
        node = next((n for n, busy in enumerate(used) if busy + need <= gpus), None)
        if node is None:
            raise UsageError(_no_room(groups, groups[k], nnodes - taken, gpus, max(gpus - busy for busy in used)))
        found[k] = Placed(groups[k], (node,), range(used[node], used[node] + need))
        used[node] += need
    return tuple(found[k] for k in range(len(groups)))


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


def one_only(settings: Settings, verb: str) -> None:
    """Raise `UsageError` for a run of groups, of which a verb does not know yet."""
    if settings.grouped:
        raise UsageError(f"`{verb}` does not know of groups so far; `plan` shows where they lie, and `up` runs them")


def drawing(placed: Sequence[Placed], nnodes: int, gpus: int) -> list[str]:
    """Who has what, a line for each part of each node."""
    rows = []
    for node in range(nnodes):
        here = sorted((p for p in placed if node in p.nodes), key=lambda p: p.gpus.start)
        name, free = f"node {node}", range(here[-1].gpus.stop if here else 0, gpus)
        for p in here:
            rows.append((name, _span(p.gpus), p.group.name, _words(p, node)))
            name = ""
        if len(free):
            rows.append((name, _span(free), "", "kept by the group" if here and here[0].group.whole else "free"))
    widths = [max(len(row[k]) for row in rows) for k in range(3)]
    return ["  ".join([*(c.ljust(w) for c, w in zip(r, widths, strict=False)), r[3]]).rstrip() for r in rows]


def _span(gpus: range) -> str:
    last = gpus.stop - 1
    return f"GPU {gpus.start}" if len(gpus) == 1 else f"GPUs {gpus.start}-{last}"


def _words(p: Placed, node: int) -> str:
    s, rank = p.group.settings, p.nodes.index(node)
    if rank:
        return f"rank {rank}"
    size = f"tp {s.tp}" + (f" pp {s.pp}" if s.pp > 1 else "")
    return f"leads, {p.group.role}, {s.engine}, {s.model or 'no model'}, {size}, {numbered(s.shadows, 'shadow')}"
