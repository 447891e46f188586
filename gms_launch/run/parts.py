"""A node's part in a run of groups: a layout for each group that has ranks here. No side effects."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from gms_launch import engines
from gms_launch.errors import UsageError
from gms_launch.run import model, placement, ports, reach
from gms_launch.run.placement import Placed
from gms_launch.run.plan import Layout
from gms_launch.run.topology import Topology
from gms_launch.settings import groups


def placed(layout: Layout) -> tuple[Placed, ...]:
    """Where all groups of a run lie, whose nodes have as many GPUs as this one. Raises `UsageError`."""
    settings, gpus = layout.settings, len(layout.devices())
    return placement.place(groups.expand(settings, gpus), settings.serving_nodes, gpus)


def check(layout: Layout) -> None:
    """Raise `UsageError` for what would stop a group of this node, before anything is started."""
    found = placed(layout)
    wide, fronts = any(map(_is_wide, found)), layout.front.number
    reach.of(layout.home, wide)
    if layout.is_spare and (layout.role_moves or fronts > 1):
        # The place that it takes may have a frontend. Who cannot have one is told so now, and not in the hour of need.
        reach.of(replace(layout.home, node_rank=0), wide or fronts > 1, fronts)
    for p in found:
        check_events(p, layout)
        if layout.is_spare or layout.home.node_rank in p.nodes:
            check_engine(p)
        elif _seen(p):  # what is wrong with it stops those that are to serve it, and the others would wait for them
            _check_model(p)


def unseen(layout: Layout) -> list[str]:
    """Models of other nodes' groups that are not seen from this node, in words: each is there, or a mistake."""
    found = [p for p in placed(layout) if layout.home.node_rank not in p.nodes and not _seen(p)]
    return [f"group {p.group.name}: model {p.group.settings.model!r} is not seen from this node" for p in found]


def _seen(p: Placed) -> bool:
    s = p.group.settings
    try:
        return not model.is_directory(s) or Path(s.model or "/").exists()
    except OSError:  # a name too long, a place that may not be entered from here
        return False


def _check_model(p: Placed) -> None:
    try:
        model.check(p.group.settings)
    except UsageError as exc:
        raise UsageError(f"group {p.group.name}: {exc}") from None


def check_engine(p: Placed) -> None:
    """Raise `UsageError` for what would stop the engine of a group."""
    s = p.group.settings
    try:
        model.check(s)
        problems = engines.get(s.engine, s.engine_file).problems(s)
    except UsageError as exc:
        problems = [str(exc)]
    if problems:
        raise UsageError(f"group {p.group.name}: {problems[0]}")


def _is_wide(p: Placed) -> bool:
    """Whether the frontend reaches engines of a group on another node than its own."""
    return bool(p.leader) or p.group.settings.hybrid


def check_events(p: Placed, layout: Layout) -> None:
    """Raise `UsageError` for events that would not get from a group's engines to the frontend."""
    if _is_wide(p) and layout.own_nats and layout.settings.event_plane == "nats":
        raise UsageError(
            f"group {p.group.name} has engines on node {max(p.nodes)}, and the run's own NATS is on the first node's "
            "loopback: leave --event-plane as it is, or name a NATS of your own (--nats-server)"
        )


def with_groups(layout: Layout, free: Callable[[int], bool]) -> Layout:
    """The layout with this node's parts; the same without groups. Raises `UsageError`."""
    if not layout.settings.grouped:
        return layout
    found, here = placed(layout), layout.topology
    mine = [(k, p) for k, p in enumerate(found) if here.node_rank in p.nodes]
    wanted = []
    for seat, (_, p) in enumerate(mine):
        s = p.group.settings
        wanted.append((s, seat, engines.get(s.engine, s.engine_file).ports))
    made, shift = [], 0
    for (k, p), own in zip(mine, ports.of_groups(layout.ports, wanted, free), strict=True):
        rank = p.nodes.index(here.node_rank)
        # The leader says its address when it wants a life (`master_addr`).
        place = Topology(rank, len(p.nodes), here.host, here.address, here.address if rank == 0 else "")
        made.append(
            replace(
                layout,
                settings=p.group.settings,
                topology=place,
                place=here,
                ports=own,
                node_dir=layout.node_dir.of_group(k),
                group=p.group.name,
                index=k,
                gpus=p.gpus,
                wide=_is_wide(p),
                role=p.group.role,
                component=p.group.component,
                shift=shift,
            )
        )
        shift += p.group.settings.cohorts * p.group.settings.dp
    return replace(layout, parts=tuple(made), number_of_groups=len(found), wide=any(map(_is_wide, found)))
