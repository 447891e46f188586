"""What a failover costs as a run grows, by the simulator with the real decisions: one group of 4 to 1,024 nodes, and 1
to 128 groups of 8.

    python -m bench.simulate [--nodes 4 16 64 256 1024] [--groups 1 2 4 16 64 128]

A remote rank of the primary dies. Counted until the group is whole again: records written to etcd, messages that etcd
hands out (the leader watches every record, the others what `Keys.followed` says), decisions taken. Timed on this
machine, one core: the decision of the agent that sees the exit, that of an agent which hears of it, and the leader's.
What the network adds is not in it.

In a run of groups one group loses a rank, and all that is sent to anybody for it is counted, by who it is sent to: the
group, the run's leader, or the leaders of other groups. What the groups share is under the names and in the ranges that
the code has; what engines register with Dynamo is in the count.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.machine import machine
from bench.stopping import stoppable
from gms_launch.cohort import census, controller
from gms_launch.cohort.model import Phase
from tests.simulation.groups import Run
from tests.simulation.world import Node, World

COHORTS = 2
#: Nodes of a group.
SIZE = 8


def measure(nnodes: int, repeats: int = 5) -> dict[str, Any]:
    """One failover, and how long its decisions take."""
    world = World(nnodes, COHORTS, lambda n: 0)
    world.settle()
    times = looks(world, repeats)
    world.messages = world.decisions = 0
    written = world.revision
    to_kill = lose_a_rank(world)
    world.settle()
    assert world.full()
    return {
        "nodes": nnodes,
        "records_written": world.revision - written,
        "messages": world.messages,
        "decisions": world.decisions,
        "kill_decided_and_sent_ms": round(1000 * to_kill, 2),
    } | times


def measure_groups(number: int, repeats: int = 5) -> dict[str, Any]:
    """One failover in the last of `number` groups, and how long its decisions take."""
    run = Run([range(SIZE * k, SIZE * (k + 1)) for k in range(number)], COHORTS, quiet=False)
    run.settle()
    assert run.redundancy == "full" and not run.awake
    group = run.groups[-1]
    times = looks(group, repeats)
    sums = []
    for _ in range(repeats):
        begun = time.perf_counter()
        census.redundancy(run.records, number)
        census.too_few(run.records, number, 1, up=True)
        sums.append(time.perf_counter() - begun)
    for agent in run.agents:
        agent.messages = 0
    for one in run.groups:
        one.decisions = 0
    written = run.revision
    group.touched = True
    run.awake = [group]
    for cohort in range(COHORTS):  # who hears of it is looked up in advance: that is etcd's work
        ended = group.named(("ended", cohort, 1))
        run.hearers(ended), run.takers(ended)
    to_kill = lose_a_rank(group)
    run.settle()
    assert group.full() and group.said == "full"
    to_group = sum(a.messages for a in group.agents)
    to_leader = 0 if run.agents[0] in group.agents else run.agents[0].messages
    return {
        "groups": number,
        "nodes": number * SIZE,
        "records_written": run.revision - written,
        "messages": sum(a.messages for a in run.agents),
        "messages_to_the_group": to_group,
        "messages_to_the_runs_leader": to_leader,
        "messages_to_leaders_of_other_groups": sum(a.messages for a in run.agents) - to_group - to_leader,
        "decisions": run.decisions,
        "kill_decided_and_sent_ms": round(1000 * to_kill, 2),
        "the_runs_leaders_sum_ms": round(1000 * statistics.median(sums), 3),
    } | times


def looks(world: World, repeats: int) -> dict[str, float]:
    """How long an agent's look takes at which nothing is to be done, and the leader's."""
    sees = [timed(world.agent, world.nodes[-1]) for _ in range(repeats)]
    leads = []
    for _ in range(repeats):
        begun = time.perf_counter()
        controller.decide(world.view(), world.memory, world.policy, world.now)
        leads.append(time.perf_counter() - begun)
    return {
        "an_agents_look_ms": round(1000 * statistics.median(sees), 2),
        "the_leaders_look_ms": round(1000 * statistics.median(leads), 2),
    }


def lose_a_rank(world: World) -> float:
    """The last node's rank of the primary dies; returns what the decisions of the kill took, in seconds: of the agent
    that sees it and of one that hears of it.
    """
    primary = next(p for p in world.nodes[0].procs.values() if p.phase is Phase.ACTIVE)
    last, other = world.nodes[-1], world.nodes[len(world.nodes) // 2]
    world.die(last.procs[primary.cohort])
    first = timed(world.agent, last)
    world.deliver_all(other)
    hears = timed(world.agent, other)
    assert other.procs[primary.cohort].dead, "the agent that hears of it has killed its rank"
    return first + hears


def several(measure: Callable[[int], dict[str, Any]], size: int, times: int = 5) -> dict[str, Any]:
    """The same several times: what is counted is the same each time, and of what is timed the median."""
    found = [measure(size) for _ in range(times)]
    for row in found:
        assert all(v == found[0][k] for k, v in row.items() if not k.endswith("_ms")), (row, found[0])
    return found[0] | {k: statistics.median(row[k] for row in found) for k in found[0] if k.endswith("_ms")}


def timed(agent: Any, node: Node) -> float:
    begun = time.perf_counter()
    agent(node)
    return time.perf_counter() - begun


def plot(rows: list[dict[str, Any]], path: Path, by: str = "nodes") -> None:
    """A plain SVG: both axes logarithmic, one line a quantity."""
    import math

    lines = {"records_written": "#1b6", "messages": "#c33", "decisions": "#36c"}
    lines |= {"messages_to_the_group": "#e90"} if by == "groups" else {}
    label_of = {"groups": f"groups of {SIZE} nodes, one failover in one of them", "nodes": "nodes, one failover"}[by]
    width, height, left, top = 640, 400, 70, 20
    most = math.log10(max(r[k] for r in rows for k in lines))
    xs = [math.log2(r[by]) for r in rows]

    def x(value: float) -> float:
        return left + (value - xs[0]) / (xs[-1] - xs[0] or 1.0) * (width - left - 150)

    def y(value: float) -> float:
        return top + (1 - math.log10(value) / most) * (height - top - 50)

    out = [f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" font-family="sans-serif">']
    out.append(f'<rect width="{width}" height="{height}" fill="white"/>')
    for power in range(int(most) + 1):
        out.append(f'<text x="8" y="{y(10**power) + 4:.0f}" font-size="12">10^{power}</text>')
        out.append(f'<path d="M{left} {y(10**power):.0f}H{width - 150}" stroke="#ddd"/>')
    for row, value in zip(rows, xs, strict=True):
        out.append(f'<text x="{x(value) - 10:.0f}" y="{height - 25}" font-size="12">{row[by]}</text>')
    for name, colour in lines.items():
        points = " ".join(f"{x(v):.1f},{y(r[name]):.1f}" for r, v in zip(rows, xs, strict=True))
        out.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"/>')
        label = f'<text x="{width - 145}" y="{y(rows[-1][name]) + 4:.0f}" font-size="12" fill="{colour}">'
        out.append(f"{label}{name.replace('_', ' ')}</text>")
    out.append(f'<text x="{left}" y="{height - 6}" font-size="12">{label_of}</text></svg>')
    path.write_text("\n".join(out) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, nargs="+", default=[4, 16, 64, 256, 1024])
    parser.add_argument("--groups", type=int, nargs="+", default=[1, 2, 4, 16, 64, 128])
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("results") / "simulate.json")
    options = parser.parse_args()
    rows, grouped = [], []
    for nnodes in options.nodes:
        rows.append(several(measure, nnodes))
        print(rows[-1], flush=True)
    for number in options.groups:
        grouped.append(several(measure_groups, number))
        print(grouped[-1], flush=True)
    result = {"machine": machine(), "command": "python -m bench.simulate"}
    found = result | {"cohorts": COHORTS, "rows": rows, "nodes_of_a_group": SIZE, "groups": grouped}
    options.out.write_text(json.dumps(found, indent=1) + "\n")
    docs = Path(__file__).parents[1] / "docs"
    plot(rows, docs / "simulate.svg")
    plot(grouped, docs / "simulate-groups.svg", "groups")


if __name__ == "__main__":
    stoppable(main)
