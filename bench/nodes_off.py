"""Each node of a run switched off in its turn, under load: what its group and the other one see, and when all is back.

    python -m bench.nodes_off [--rounds 30] [--streams 4] [--rate 3] [--out FILE] [--append]

Five machines of the lab (tests/slurm/lab.py, without Slurm): three members of etcd with a frontend each, two groups of
two nodes with a model each, and a spare; node 0 leads the run. A client of each model knows two frontends, one of them
on the machine that goes, if it has one; what the one does not answer whole it asks the other, once. In each round the
next machine is switched off, without a word to anybody: its cable first, then every process. The spare takes its place,
it is switched on again and is the spare, and when all is whole the next round begins; every sixth is the spare's own.
Judged from outside; the first broken invariant ends it. `--append` puts the rounds to those that the file has: 30 of
them take a quarter of an hour. Needs root, for the namespaces.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import platform
import statistics
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

from bench.machine import machine
from bench.stopping import stoppable
from gms_launch.process import proc
from tests.load import Either
from tests.slurm.lab import Lab
from tests.slurm.moving import NAMES, Actives, Pair, routed
from tests.slurm.support import since
from tests.support import LONG, eventually

NODES = 5
#: From when on no client may still wait for a machine that is off (seconds): its patience, twice, and some.
SETTLED = 2 * (Either.CONNECT + Either.SILENT)


class BrokenError(AssertionError):
    """An invariant does not hold."""


def urls(run: Pair, address: str) -> tuple[str, str]:
    """Two frontends, the first at this address if there is one."""
    found = sorted(run.fronts(), key=lambda front: front[0] != address)
    first, second = (f"http://{host}:{port}" for host, port in found[:2])
    return first, second


def gap(load: Either, begun: float) -> float:
    """The longest time without a whole answer since `begun` (seconds)."""
    done = sorted(a.done for a in list(load.answers) if not a.error and a.done >= begun)
    return max((b - a for a, b in zip([begun, *done], [*done, time.monotonic()], strict=True)), default=0.0)


def moment(run: Pair, kind: str, off: float) -> float | None:
    """When that first happened after `off`, in seconds after it (both by the nodes' one clock)."""
    return next((round(e["time"] - off, 2) for e in run.events(kind) if e["time"] > off), None)


def switch_off(run: Pair, number: int, loads: dict[str, Either]) -> dict[str, Any]:
    """One round, with that machine. Raises `BrokenError`, or what a wait raises."""
    name, made = run.nodes[number], run.lab
    rank, before = run.seats()[name], run.whole()
    mine = [g for g, found in before.items() if any(n["host"] == name for n in found["nodes"])]
    led = run.leader() == rank
    lives = {g: run.lives(g) for g in NAMES if g not in mine}
    for load in loads.values():
        load.urls = urls(run, made.node(name).address)
        load.wait_busy(0.5)
    front = made.node(name).address in loads["a"].urls[0]
    off, clock = time.monotonic(), time.time()
    made.node(name).power_off()
    init = made.node(name).init
    if init is None or proc.alive(init):
        raise BrokenError(f"{name} is not off")
    run.processes[number].wait(60)
    row: dict[str, Any] = {"machine": name, "node_rank": rank, "led_the_run": led, "frontend": front, "groups": mine}
    if mine:
        eventually(
            lambda: any(e["time"] > clock for e in run.events("spare_takes_over")), LONG, "a spare has its place"
        )
        after = run.full(*NAMES)
        row["full_s"] = round(since(off), 2)
        if name in [n["host"] for n in after[mine[0]]["nodes"]]:
            raise BrokenError(f"{name} is off, and {mine[0]} is said to be on it")
        again = time.monotonic()
        eventually(lambda: any(a.sent >= again and not a.error for a in list(loads[mine[0]].answers)[-50:]), LONG)
        row["answers_again_s"] = round(gap(loads[mine[0]], off), 2)
    else:
        eventually(lambda: run.spare() == [], LONG, "it is missed")
    row |= {"leads_s": moment(run, "leads", clock), "spare_takes_over_s": moment(run, "spare_takes_over", clock)}
    eventually(lambda: since(off) > SETTLED, LONG)
    made.node(name).start(daemons=False)
    routed(made, name)
    run.hand(number)
    run.processes[number] = run.processes.pop()
    eventually(lambda: run.spare() == [name], LONG, f"{name} is the spare")
    run.whole()
    row["whole_s"] = round(since(off), 2)
    for group, load in loads.items():
        done = [a for a in load.answers if a.done >= off]
        lost = [a for a in done if a.error]
        row[group] = {
            "answers": len(done) - len(lost),
            "errors": len(lost),
            "asked_twice": sum(a.done >= off for a in load.retried),
            "longest_answer_s": round(load.longest_wait(off), 2),
            "longest_gap_s": round(gap(load, off), 2),
        }
        if load.wrong:
            raise BrokenError(f"a client of {group} got another text: {load.said()}")
        if group not in mine and lost:
            raise BrokenError(f"{len(lost)} requests of {group}, which lost no node, failed: {lost[0].error}")
        load.answers, load.retried = [a for a in load.answers if not a.error][-100:], []
    for group, was in lives.items():
        if (now := run.lives(group)) != was:
            raise BrokenError(f"{group} was touched: {was} before, and {now}")
    if led and run.leader() == rank and rank in {n["node_rank"] for n in run.status()["nodes"] if n["host"] == name}:
        raise BrokenError(f"{name} was off and leads the run")
    return row


def rounds(run: Pair, number: int, streams: int, rate: float) -> list[dict[str, Any]]:
    """So many rounds, each with the next machine, the first one first; after all of them the spare."""
    found: list[dict[str, Any]] = []
    with contextlib.ExitStack() as stack:
        run.whole()
        actives = stack.enter_context(Actives(run))
        first = urls(run, "")
        loads = {
            name: stack.enter_context(Either(first, streams, 1, rate, tokens=30, prompts=4, model=name, timeout=45.0))
            for name in NAMES
        }
        for k in range(number):
            turn = k % (NODES + 1)
            victim = run.nodes[turn] if turn < NODES else run.spare()[0]
            row = {"round": k + 1} | switch_off(run, run.nodes.index(victim), loads)
            if actives.broken:
                raise BrokenError(actives.broken[0])
            if errors := run.events("internal_error"):
                raise BrokenError(f"an agent's own error: {errors[0]}")
            found.append(row)
            print(told(row), flush=True)
        if not actives.looks:
            raise BrokenError("nobody looked who is active")
    return found


def others(row: dict[str, Any]) -> list[str]:
    """The groups that lost no node in a round."""
    return [g for g in NAMES if g not in row["groups"]]


def told(row: dict[str, Any]) -> str:
    """A round as a line."""
    what = [f"node {row['node_rank']}"] + ["leads the run"] * row["led_the_run"] + ["a frontend"] * row["frontend"]
    after = "a spare      " if not row["groups"] else f"{row['groups'][0]} full {row['full_s']:6.2f} s"
    lead = f", another leads {row['leads_s']:.1f} s" if row["leads_s"] is not None else ""
    seen = ", ".join(
        f"{g}: {row[g]['answers']} answers {row[g]['errors']} errors {row[g]['asked_twice']} asked twice "
        f"longest {row[g]['longest_answer_s']:.1f} s"
        for g in others(row)
    )
    return (
        f"{row['round']:3d} {row['machine']} ({', '.join(what)}): {after}, whole {row['whole_s']:6.2f} s{lead}; {seen}"
    )


def spread(values: list[float]) -> dict[str, float]:
    """Seconds."""
    if not values:
        return {"n": 0}
    return {"n": len(values), "p50_s": statistics.median(values), "min_s": min(values), "max_s": max(values)}


def summary(found: list[dict[str, Any]]) -> dict[str, Any]:
    """All rounds, and what they come to."""
    lost = [r for r in found if r["groups"]]
    untouched = [r[g] for r in found for g in others(r)]
    return {
        "rounds": len(found),
        "the_group_that_lost_a_node": {
            "full_on_the_spare": spread([r["full_s"] for r in lost]),
            "without_an_answer": spread([r["answers_again_s"] for r in lost]),
        },
        "another_leads": spread([r["leads_s"] for r in found if r["led_the_run"]]),
        "groups_that_lost_none": {
            **{what: sum(u[what] for u in untouched) for what in ("answers", "errors", "asked_twice")},
            "longest_answer": spread([u["longest_answer_s"] for u in untouched]),
        },
        "all_whole_again": spread([r["whole_s"] for r in found]),
        "raw": found,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--streams", type=int, default=4)
    parser.add_argument("--rate", type=float, default=3.0)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("results") / "nodes-off.json")
    parser.add_argument("--append", action="store_true")
    options = parser.parse_args()
    with Lab(NODES, slurm=False) as lab:
        routed(lab)
        with Pair(lab) as run:
            flags = " ".join(run.flags)
            try:
                found = rounds(run, options.rounds, options.streams, options.rate)
            except BaseException:
                print(run.told()[-20000:], file=sys.stderr)
                raise
    command = " ".join([Path(sys.executable).name, "-m", "bench.nodes_off", *sys.argv[1:]])
    before = json.loads(options.out.read_text()) if options.append and options.out.exists() else {}
    result = {
        "commands": [*before.get("commands", []), command],
        "machine": machine(),
        "versions": {n: metadata.version(n) for n in ("gms-launch", "ai-dynamo", "etcd3", "protobuf", "grpcio")}
        | {"python": platform.python_version()},
        "flags": flags.replace(str(lab.dir), ""),
        **summary([*before.get("raw", []), *found]),
    }
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    result.pop("raw")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    stoppable(main)
