"""What a failover costs as the number of nodes grows: the simulator with the real decisions, 4 to 1,024 nodes.

    python -m bench.simulate [--nodes 4 16 64 256 1024] [--plot simulate.svg]

A remote rank of the primary dies. Counted until the group is whole again: records written to etcd, messages that etcd
hands out (the leader watches every record, the others what `Keys.followed` says), decisions taken. Timed on this
machine, one core: the decision of the agent that sees the exit, that of an agent which hears of it, and the leader's.
What the network adds is not in it.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from pathlib import Path
from typing import Any

from bench.stopping import stoppable
from gms_launch.cohort import controller
from gms_launch.cohort.model import Phase
from tests.simulation.world import Node, World

COHORTS = 2


def measure(nnodes: int, repeats: int = 5) -> dict[str, Any]:
    """One failover, and how long its decisions take."""
    world = World(nnodes, COHORTS, lambda n: 0)
    world.settle()
    primary = next(p for p in world.nodes[0].procs.values() if p.phase is Phase.ACTIVE)
    last = world.nodes[-1]
    # The decisions of the kill itself, apart: who sees it, who hears of it, the leader.
    sees = [timed(world.agent, last) for _ in range(repeats)]
    leads = []
    for _ in range(repeats):
        begun = time.perf_counter()
        view = world.view()
        controller.decide(view, world.memory, world.policy, world.now)
        leads.append(time.perf_counter() - begun)
    world.messages = world.decisions = 0
    written = world.revision
    world.die(last.procs[primary.cohort])
    first = timed(world.agent, last)
    other = world.nodes[nnodes // 2]
    world.deliver_all(other)
    hears = timed(world.agent, other)
    assert other.procs[primary.cohort].dead, "the agent that hears of it has killed its rank"
    to_kill = first + hears
    world.settle()
    assert world.full()
    return {
        "nodes": nnodes,
        "records_written": world.revision - written,
        "messages": world.messages,
        "decisions": world.decisions,
        "kill_decided_and_sent_ms": round(1000 * to_kill, 2),
        "an_agents_look_ms": round(1000 * statistics.median(sees), 2),
        "the_leaders_look_ms": round(1000 * statistics.median(leads), 2),
    }


def timed(agent: Any, node: Node) -> float:
    begun = time.perf_counter()
    agent(node)
    return time.perf_counter() - begun


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """A plain SVG: both axes logarithmic, one line a quantity."""
    import math

    lines = {"records_written": "#1b6", "messages": "#c33", "decisions": "#36c"}
    width, height, left, top = 640, 400, 70, 20
    most = math.log10(max(r[k] for r in rows for k in lines))
    xs = [math.log2(r["nodes"]) for r in rows]

    def x(value: float) -> float:
        return left + (value - xs[0]) / (xs[-1] - xs[0]) * (width - left - 150)

    def y(value: float) -> float:
        return top + (1 - math.log10(value) / most) * (height - top - 50)

    out = [f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" font-family="sans-serif">']
    out.append(f'<rect width="{width}" height="{height}" fill="white"/>')
    for power in range(int(most) + 1):
        out.append(f'<text x="8" y="{y(10**power) + 4:.0f}" font-size="12">10^{power}</text>')
        out.append(f'<path d="M{left} {y(10**power):.0f}H{width - 150}" stroke="#ddd"/>')
    for row, value in zip(rows, xs, strict=True):
        out.append(f'<text x="{x(value) - 10:.0f}" y="{height - 25}" font-size="12">{row["nodes"]}</text>')
    for name, colour in lines.items():
        points = " ".join(f"{x(v):.1f},{y(r[name]):.1f}" for r, v in zip(rows, xs, strict=True))
        out.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"/>')
        label = f'<text x="{width - 145}" y="{y(rows[-1][name]) + 4:.0f}" font-size="12" fill="{colour}">'
        out.append(f"{label}{name.replace('_', ' ')}</text>")
    out.append(f'<text x="{left}" y="{height - 6}" font-size="12">nodes, one failover</text></svg>')
    path.write_text("\n".join(out) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, nargs="+", default=[4, 16, 64, 256, 1024])
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("results") / "simulate.json")
    parser.add_argument("--plot", type=Path, default=Path(__file__).parents[1] / "docs" / "simulate.svg")
    options = parser.parse_args()
    rows = []
    for nnodes in options.nodes:
        rows.append(measure(nnodes))
        print(rows[-1], flush=True)
    result = {"machine": f"{os.cpu_count()} cores, {platform.platform()}", "command": "python -m bench.simulate"}
    options.out.write_text(json.dumps(result | {"cohorts": COHORTS, "rows": rows}, indent=1) + "\n")
    plot(rows, options.plot)


if __name__ == "__main__":
    stoppable(main)
