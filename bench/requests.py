"""Requests in flight across failovers: how many are lost, whether texts are the same, how long anybody waits.

    python -m bench.requests [--nodes 1 3] [--kills 20] [--streams 200] [--unary 200] [--rate 50] [--python PYTHON]
    python -m bench.requests --only cost
    python -m bench.requests --write-docs

Nodes are network namespaces of this machine (tests/slurm/lab.py). Half of the requests go through chat. A rank of the
primary, chosen at random, is SIGKILLed whenever redundancy is full, and every answer is compared with the undisturbed
one. A pause is the longest time between two pieces of a stream that was in flight at a kill; `without_a_kill` is the
same at moments at which nothing happened, since a token takes its time (--token-seconds) and a full machine takes more.
Rows: the hold, the same with `--migration-limit 0`, and, given an interpreter with torch, torchrun's restart of the
same ranks, whose outage is to be compared (nothing in flight survives it).

`cost` is what the hold costs while all is well: deployments asked in turns, one with it, one in which pidfd_getfd is
refused, so that everything is the same but that no socket is taken ("not armed"), and one without it, whose frontend
does not keep what it would need to move a request either.

A row is written to bench/results/requests.json after every kill, with the kills so far, and takes the place of an
earlier one of the same number of nodes and kind; the others stay, so that the parts may be run one by one. Each row has
its own command, machine and load. `--write-docs` measures nothing: it puts these figures into docs/measurements.md.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import random
import shlex
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

from bench.failover import summary
from bench.machine import machine
from bench.peers.__main__ import Peer
from bench.stopping import stoppable, whole
from gms_launch.engines.reference.demo_model import make
from tests import no_getfd, support
from tests.load import Load, Question
from tests.slurm.lab import Lab
from tests.slurm.support import LabRun
from tests.support import GMS_LAUNCH, Deployment, eventually

OUT = Path(__file__).with_name("results") / "requests.json"
DOCS = Path(__file__).parents[1] / "docs" / "measurements.md"
FIRST, LAST = "<!-- figures: bench/results/requests.json -->\n", "<!-- end of figures -->"
#: A life that was killed on purpose does not use the budget up, and a busy machine is slow to answer.
FLAGS = ("--canary-timeout", "60", "--health-timeout", "30")
CONFIGS: dict[str, tuple[str, ...]] = {"hold": (), "no hold": ("--migration-limit", "0")}
#: What is compared while nothing dies, and by what command each is started.
COST = {
    "hold": (GMS_LAUNCH, ()),
    "not armed": ([sys.executable, str(Path(no_getfd.__file__)), *GMS_LAUNCH], ()),
    "no hold": (GMS_LAUNCH, CONFIGS["no hold"]),
}
PEER = "torchrun, restarts, fastest"


class Under:
    """What is killed: `kill` ends a rank and returns when (monotonic) and which; `settle` waits until it may again."""

    def __init__(self, url: str, settle: Callable[[], Any], kill: Callable[[], str]) -> None:
        self.url, self.settle, self._kill = url, settle, kill

    def kill(self) -> tuple[float, str]:
        self.settle()
        begun = time.monotonic()
        return begun, self._kill()


@contextlib.contextmanager
def launched(lab: Lab, model: Path, flags: tuple[str, ...], rng: random.Random, **environ: str) -> Iterator[Under]:
    with LabRun(lab, model, *FLAGS, *flags, **environ).hand() as run:

        def kill() -> str:
            primary, node_rank = run.wait_full(120)["primary"], rng.randrange(len(run.nodes))
            run.kill_rank(primary, node_rank)
            return f"cohort {primary} rank {node_rank}"

        yield Under(run.run_file()["frontend_url"], lambda: run.wait_full(120), kill)


@contextlib.contextmanager
def restarted(lab: Lab, model: Path, python: Path, **environ: str) -> Iterator[Under]:
    os.environ.update(environ)
    try:
        with Peer(lab, len(lab.names), model, PEER, python.parent) as peer:

            def kill() -> str:
                os.kill(victim := peer.victim(), signal.SIGKILL)
                return f"process {victim} of the last rank"

            yield Under(f"http://{peer.leader}:8000", lambda: peer.wait_answer(120), kill)
    finally:
        for name in environ:
            del os.environ[name]


def failovers(
    under: Under, options: argparse.Namespace, rng: random.Random, write: Callable[[dict[str, Any]], None]
) -> None:
    """Kill again and again under load; `write` gets the row after every kill, and when all is answered."""
    kills: list[tuple[float, str]] = []
    calm: list[float] = []
    with Load(
        under.url,
        options.streams,
        options.unary,
        options.rate,
        tokens=options.tokens,
        timeout=options.timeout,
    ) as load:
        load.wait_busy(options.tokens * options.token_seconds)
        for _ in range(options.kills):
            under.settle()
            calm.append(time.monotonic())
            time.sleep(2.0 + rng.uniform(0, 1))  # a random moment, and a calm one before it
            kills.append(under.kill())
            print(f"  kill {len(kills)}: {kills[-1][1]}; {load.said()}", flush=True)
            under.settle()
            load.wait_busy(2.0)
            write(row_of(load, kills, calm) | {"unfinished": "more kills, and answers that were not over"})
    write(row_of(load, kills, calm))


def row_of(load: Load, kills: list[tuple[float, str]], calm: list[float]) -> dict[str, Any]:
    """What has come of a load so far."""
    # Two of one answer's pauses may be of two kills: each is asked for with its moment.
    pauses = [load.longest_pauses(moment) for moment, _ in kills]
    outages = [load.outage(moment) for moment, _ in kills]
    new = [a for a in load.answers if a.question.tokens == load.short]
    row = {
        "kills": len(kills),
        "answers": len(load.answers),
        "in_flight_at_a_kill": [[len(load.in_flight_at(m, True)), len(load.in_flight_at(m, False))] for m, _ in kills],
        "lost": len(load.lost),
        "lost_new": sum(bool(a.error) for a in new),
        "wrong_text": len(load.wrong),
        "wrong_usage": len(load.wrong_usage),
        "first_error": load.lost[0].error if load.lost else None,
        "outage": summary(outages),
        "worst_new": summary([a.done - a.sent for a in new if not a.error] or [float("nan")]),
    }
    if all(pauses):
        row |= {
            "longest_pause_of_a_stream": summary([p for some in pauses for p in some]),
            "longest_pause_of_a_kill": summary([max(some) for some in pauses]),
            "without_a_kill": summary([p for m in calm for p in load.longest_pauses(m)]),
        }
    return row | {"raw": {"outages_s": [round(o, 4) for o in outages], "kills": [what for _, what in kills]}}


def cost(options: argparse.Namespace) -> dict[str, Any]:
    """Tokens a second and latency with the hold armed, not armed and without it, in turns, nothing dying."""
    found: dict[str, dict[str, list[float]]] = {name: {"tokens_per_s": [], "latency_s": []} for name in COST}
    with tempfile.TemporaryDirectory(prefix="requests-") as name, contextlib.ExitStack() as stack:
        model = Path(name) / "model"
        make(model, 8)
        runs = {}
        for config, (program, flags) in COST.items():
            support.GMS_LAUNCH = program
            run = Deployment(Path(name) / config.replace(" ", "-"), model, *FLAGS, *flags)
            runs[config] = stack.enter_context(run)
        support.GMS_LAUNCH = GMS_LAUNCH
        texts: dict[Question, str] = {}
        for config, run in runs.items():
            run.wait_full()
            if kind := {"hold": "hold_armed", "not armed": "hold_refused"}.get(config):
                eventually(partial(run.events, kind), what=f"{config}: {kind}")
        for turn in range(options.turns + 1):
            for config, run in random.Random(turn).sample(list(runs.items()), len(runs)):
                begun = time.monotonic()
                with Load(run.run_file["frontend_url"], 16, 16, tokens=32, texts=texts) as load:
                    load.wait_busy(options.turn_seconds)
                if load.lost or load.wrong:
                    raise RuntimeError(f"{config}: {load.said()}")
                if turn:  # the first is to warm up
                    done = [a for a in load.answers if a.done - begun < options.turn_seconds]
                    took = max(a.done for a in done) - min(a.sent for a in done)
                    found[config]["tokens_per_s"].append(32 * len(done) / took)
                    found[config]["latency_s"] += [a.done - a.sent for a in done]
    rows: dict[str, Any] = {
        config: {
            "tokens_per_s": {
                "median": round(statistics.median(f["tokens_per_s"]), 1),
                "each": [round(t, 1) for t in f["tokens_per_s"]],
            },
            "latency": summary(f["latency_s"]),
        }
        for config, f in found.items()
    }
    with_it, without = rows["hold"], rows["not armed"]
    return rows | {
        "ratio_tokens": round(with_it["tokens_per_s"]["median"] / without["tokens_per_s"]["median"], 3),
        "ratio_p99": round(with_it["latency"]["p99_ms"] / without["latency"]["p99_ms"], 3),
    }


def merged(rows: list[dict[str, Any]], row: dict[str, Any]) -> list[dict[str, Any]]:
    """`rows` with `row` in the place of the one of the same nodes and kind."""
    return sorted([r for r in rows if _key(r) != _key(row)] + [row], key=_key)


def _key(row: dict[str, Any]) -> tuple[int, int]:
    return row["nodes"], [*CONFIGS, "torchrun"].index(row["config"])


def figures(result: dict[str, Any]) -> str:
    """The block of docs/measurements.md, as Markdown, and nothing that was not measured."""
    lines = [
        "| nodes, kind | kills | load | answers | lost | other text or counts | pause of a stream, p50 / p99 "
        "| the same without a kill | outage, p50 / p99 |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in result["rows"]:
        load = row["load"]
        lines.append(
            f"| {row['nodes']}, {row['config']} | {row['kills']} "
            f"| {load['streams']} streams, {load['unary']} unary, {load['rate']:g} new a second "
            f"| {row['answers']:,} | {row['lost']:,} | {row['wrong_text'] + row['wrong_usage']} "
            f"| {_seconds(row.get('longest_pause_of_a_stream'))} | {_seconds(row.get('without_a_kill'))} "
            f"| {_seconds(row['outage'])} |"
        )
    lines.append("")
    for row in result["rows"]:
        if "unfinished" in row:
            lines.append(f"{row['nodes']} nodes, {row['config']}: stopped before its end ({row['unfinished']}).\n")
    if "cost_when_all_is_well" in result:
        cost = result["cost_when_all_is_well"]
        lines.append("| while nothing dies | tokens a second, median | latency, p50 / p99 |\n| --- | --- | --- |")
        lines += [
            f"| {name} | {cost[name]['tokens_per_s']['median']:g} | {_seconds(cost[name]['latency'])} |"
            for name in COST
        ]
        lines.append(f"\nArmed beside not armed: tokens {cost['ratio_tokens']:g}, p99 {cost['ratio_p99']:g}.\n")
    have = {(r["nodes"], r["config"]) for r in result["rows"]}
    missing = [f"{n} nodes, {c}" for n in (1, 3) for c in (*CONFIGS, "torchrun") if (n, c) not in have]
    missing += [] if "cost_when_all_is_well" in result else ["the cost"]
    if missing:
        lines.append(f"Not run: {'; '.join(missing)}.\n")
    commands = {r["command"]: r["machine"] for r in [*result["rows"], result.get("cost_when_all_is_well")] if r}
    lines += [f"By `{command}` on {machine}.\n" for command, machine in commands.items()]
    lines.append(
        "The pause is the longest between two pieces of a stream that was in flight at a kill and not lost.\n"
        "The outage is from the kill to the first answer to a request sent after the first one lost; 0 where none was."
    )
    return "\n".join(lines) + "\n"


def _seconds(found: dict[str, float] | None) -> str:
    return "-" if found is None else f"{found['p50_ms'] / 1000:.2f} / {found['p99_ms'] / 1000:.2f} s"


def with_figures(text: str, result: dict[str, Any]) -> str:
    """`text` with its block of figures made anew. Raises ValueError when it has none."""
    before, first, rest = text.partition(FIRST)
    _, last, after = rest.partition(LAST)
    if not (first and last):
        raise ValueError(f"there is no block of {FIRST.strip()}")
    return before + first + figures(result) + last + after


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, nargs="+", default=[1, 3])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--streams", type=int, default=200)
    parser.add_argument("--unary", type=int, default=200)
    parser.add_argument("--rate", type=float, default=50.0, help="new requests a second, of 4 tokens")
    parser.add_argument("--tokens", type=int, default=40, help="of each stream and unary request")
    parser.add_argument("--token-seconds", type=float, default=0.25)
    parser.add_argument("--timeout", type=float, default=90.0, help="seconds for one answer")
    parser.add_argument("--turns", type=int, default=8, help="of each kind, for the cost")
    parser.add_argument("--turn-seconds", type=float, default=5.0)
    parser.add_argument("--only", nargs="+", choices=[*CONFIGS, "torchrun", "cost"])
    parser.add_argument("--python", type=Path, help="interpreter with torch, for torchrun")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--write-docs", action="store_true", help="put --out's figures into docs/measurements.md")
    options = parser.parse_args()
    if options.write_docs:
        whole(DOCS, with_figures(DOCS.read_text(), json.loads(options.out.read_text())))
        return
    wanted = options.only or [*CONFIGS, *(["torchrun"] if options.python else []), "cost"]
    about: dict[str, Any] = {
        "command": shlex.join(["python", "-m", "bench.requests", *sys.argv[1:]]),
        "machine": machine(),
        "versions": {n: metadata.version(n) for n in ("ai-dynamo", "etcd3", "protobuf", "grpcio")}
        | {"python": platform.python_version()},
    }
    load = {n: getattr(options, n) for n in ("streams", "unary", "rate", "tokens", "token_seconds")}
    result: dict[str, Any] = json.loads(options.out.read_text()) if options.out.exists() else {"rows": []}

    def write() -> None:
        whole(options.out, json.dumps(result, indent=1) + "\n")

    environ = {"REFERENCE_TOKEN_SECONDS": str(options.token_seconds)}
    for count in options.nodes:
        for config in [w for w in wanted if w != "cost"]:
            rng = random.Random(options.seed)
            print(f"{count} nodes, {config}", flush=True)
            with tempfile.TemporaryDirectory(prefix="requests-") as name, Lab(count, slurm=False) as lab:
                model = Path(name) / "model"
                make(model, 8)
                if config == "torchrun":
                    assert options.python is not None, "--python says where torch is"
                    place = restarted(lab, model, options.python, **environ)
                else:
                    place = launched(lab, model, CONFIGS[config], rng, **environ)

                def written(found: dict[str, Any], nodes: int = count, config: str = config) -> None:
                    row = {"nodes": nodes, "config": config, "load": load} | about | found
                    result["rows"] = merged(result["rows"], row)
                    write()

                with place as under:
                    failovers(under, options, rng, written)
            row = next(r for r in result["rows"] if (r["nodes"], r["config"]) == (count, config))
            print(json.dumps({k: v for k, v in row.items() if k not in ("raw", "in_flight_at_a_kill")}), flush=True)
    if "cost" in wanted:
        result["cost_when_all_is_well"] = about | cost(options)
        write()
        print(json.dumps(result["cost_when_all_is_well"]), flush=True)


if __name__ == "__main__":
    stoppable(main)
