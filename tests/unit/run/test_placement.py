"""Groups lie where they fit, none on another's GPUs, and what does not fit is refused."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gms_launch.errors import UsageError
from gms_launch.run import placement
from gms_launch.run.placement import Placed
from gms_launch.settings import groups
from gms_launch.settings.groups import Group
from gms_launch.settings.resolve import resolve


def made(nnodes: int, *tables: dict[str, Any]) -> tuple[Group, ...]:
    return groups.expand(resolve({"nnodes": str(nnodes)}, {}, {"group": list(tables)}), 8)


def where(placed: tuple[Placed, ...]) -> dict[str, tuple[tuple[int, ...], int, int]]:
    return {p.group.name: (p.nodes, p.gpus.start, p.gpus.stop) for p in placed}


def test_whole_nodes_first_and_then_the_largest() -> None:
    found = made(
        4, {"name": "s", "gpus": 2}, {"name": "m", "gpus": 7}, {"name": "w", "nodes": 2}, {"name": "t", "gpus": 6}
    )
    assert where(placement.place(found, 4, 8)) == {
        "w": ((0, 1), 0, 8),
        "m": ((2,), 0, 7),
        "t": ((3,), 0, 6),
        "s": ((3,), 6, 8),
    }
    assert placement.drawing(placement.place(found, 4, 8), 4, 8) == [
        "node 0  GPUs 0-7  w  leads, agg, vllm, no model, tp 16, 1 shadow",
        "node 1  GPUs 0-7  w  rank 1",
        "node 2  GPUs 0-6  m  leads, agg, vllm, no model, tp 7, 1 shadow",
        "        GPU 7        free",
        "node 3  GPUs 0-5  t  leads, agg, vllm, no model, tp 6, 1 shadow",
        "        GPUs 6-7  s  leads, agg, vllm, no model, tp 2, 1 shadow",
    ]


@pytest.mark.parametrize(
    ("tables", "says"),
    [
        ([{"name": "a", "nodes": 3}, {"name": "b", "nodes": 2}], r"5 whole nodes: 3 \(a\) \+ 2 \(b\); the run has 4"),
        (
            [{"name": "w", "nodes": 2}, {"name": "p", "count": 3, "gpus": 5}],
            r"3 groups with gpus want 15 GPUs of 16 \(2 nodes that no group has to itself x 8\); group p-2 wants 5 on "
            "one node, and no node has more than 3 GPUs left",
        ),
        ([{"name": "w", "nodes": 4}, {"name": "p", "gpus": 1}], "1 group with gpus want 1 .* no node has any left"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_arithmetic(tables: list[dict[str, Any]], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        placement.place(made(4, *tables), 4, 8)


TABLE = st.one_of(
    st.fixed_dictionaries({"nodes": st.integers(1, 3)}),
    st.fixed_dictionaries({"gpus": st.integers(1, 8)}),
)


@settings(max_examples=200, derandomize=True, deadline=None, database=None)
@given(st.lists(TABLE, max_size=8), st.integers(1, 6))
def test_no_gpu_has_two_groups(tables: list[dict[str, Any]], nnodes: int) -> None:
    found = made(nnodes, *({"name": f"n{k}", **t} for k, t in enumerate(tables)))
    try:
        placed = placement.place(found, nnodes, 8)
    except UsageError:
        return
    assert [p.group for p in placed] == list(found)
    for p in placed:
        assert (len(p.nodes), len(p.gpus)) == (p.group.nodes, p.group.gpus)
    taken = [(n, g) for p in placed for n in p.nodes for g in p.gpus]
    assert len(taken) == len(set(taken))
    assert all(n < nnodes and g < 8 for n, g in taken)
    alone = {n for p in placed if p.group.whole for n in p.nodes}
    assert not alone & {n for p in placed if not p.group.whole for n in p.nodes}


def said(toml: dict[str, Any], **flags: str) -> Any:
    return resolve(flags, {}, toml)


@pytest.mark.parametrize(
    ("settings", "given", "nodes_and_gpus"),
    [
        (said({}, groups="4"), (4, 8), (4, 8)),
        (said({}, groups="4", tp="2"), (0, 8), (1, 8)),
        (said({}, groups="5", tp="2"), (0, 8), (2, 8)),
        (said({}, groups="4", tp="2"), (4, 0), (4, 2)),
        (said({}, groups="4", tp="2"), (2, 0), (2, 4)),
        (said({"group": [{"name": "a", "nodes": 2, "tp": 8}, {"name": "b", "nodes": 2, "tp": 16}]}), (0, 0), (4, 8)),
        (said({"group": [{"name": "a", "nodes": 2}, {"name": "b", "gpus": 3, "count": 3}]}), (0, 8), (4, 8)),
        (said({"group": [{"name": "a", "gpus": 2, "count": 3}]}), (1, 0), (1, 6)),
    ],
)
def test_what_groups_take_where_it_was_not_said(settings: Any, given: tuple[int, int], nodes_and_gpus: Any) -> None:
    assert placement.wanted(settings, *given) == nodes_and_gpus


@pytest.mark.parametrize(
    ("settings", "given", "says"),
    [
        (said({}, groups="4"), (4, 0), "say with --gpus-per-node how many there are"),
        (said({}, groups="4"), (0, 8), "say how many there are, with -N"),
        (said({}, groups="4", tp="2"), (0, 0), "say -N or --gpus-per-node"),
        (said({"group": [{"name": "a", "nodes": 2}]}), (0, 0), "say with --gpus-per-node how many there are"),
        (said({"group": [{"name": "a", "gpus": 9}]}), (0, 8), "gpus 9, and a node has 8 GPUs"),
    ],
)
def test_what_nothing_tells_is_asked_for(settings: Any, given: tuple[int, int], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        placement.wanted(settings, *given)


def test_a_spare_node_is_drawn_as_one() -> None:
    found = made(3, {"name": "a", "nodes": 2})
    assert placement.drawing(placement.place(found, 2, 8), 3, 8, 1)[-1].endswith(
        "a spare: takes the place of a node that is lost"
    )


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ({}, "etcd on node 0, frontend on node 0"),
        (
            {"nnodes": "2"},
            "etcd on node 0, frontend on node 0: the run ends when node 0 is lost; the groups of one that is lost wait "
            "for it",
        ),
        (
            {"nnodes": "4"},
            "etcd on node 0, frontend on node 0: the run ends when node 0 is lost (without --etcd-members 3 "
            "--frontends auto); the groups of one that is lost wait for it",
        ),
        (
            {"nnodes": "4", "etcd_members": "3"},
            "etcd on nodes 0-2, frontend on node 0: no single node ends the run, but without node 0 nobody gets in "
            "(--frontends auto); the groups of one that is lost wait for it",
        ),
        (
            {"nnodes": "5", "etcd_members": "auto", "frontends": "2", "spares": "1"},
            "etcd on nodes 0-2, frontend on nodes 0-1: no single node ends the run; a spare takes the place of one "
            "that is lost",
        ),
        (
            {"nnodes": "3", "etcd_endpoints": "http://e:2379"},
            "frontend on node 0: the run ends when node 0 is lost; the groups of one that is lost wait for it",
        ),
    ],
)
def test_where_etcd_and_the_frontends_lie_and_what_a_lost_node_comes_to(said: dict[str, str], told: str) -> None:
    assert placement.around(resolve({"leader_addr": "a", "groups": "2", **said}, {}, {})) == told
