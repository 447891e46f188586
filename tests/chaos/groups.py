"""Faults in one of two groups, each with a model of its own under load: what happens in one is not seen in the other.

    python -m tests.chaos.groups [--rounds 100] [--seed 1] [--only KIND ...] [--out FILE]

Four agents on this machine's loopback, two groups of two nodes behind one frontend. Each round injects one fault into a
group chosen at random (or, for what they share, into that), waits until both are full again, and checks from outside
what `chaos` does, for each group, and of the other one: the same ranks in the same lives, with the same pids, nothing
said of its redundancy, no event of it, and not one of its requests lost or wrong. How long its answers took is told.
The same seed injects the same faults. The first broken invariant ends it. Needs no root.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import signal
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gms_launch.control.client import Etcd
from gms_launch.control.door import Door
from gms_launch.control.keys import DYNAMO_INSTANCES, Keys
from gms_launch.gms import probe
from gms_launch.process import proc
from tests.chaos.chaos import ENVIRON, FLAGS, BrokenError, stop_primary, stop_shadow
from tests.chaos.ends import Keep, Row, command, nowhere, often, telling
from tests.integration.test_groups import Grouped
from tests.load import Load
from tests.support import LONG, eventually, flock_holders, free_port, kill

NAMES = ("a", "b")
#: A group's nodes in the run: its first leads it, and node 0 the run.
NODES = {"a": (0, 1), "b": (2, 3)}
#: Slots of a group in tags (`Layout.slot`).
SLOTS = 10


class TwoModels(Grouped):
    """Two groups of two nodes, and of each the model that it serves under its own name."""

    nodes = 4

    def __init__(self, home: Path, models: dict[str, Path], *extra: str, **environ: str) -> None:
        file = home / "settings.toml"
        size = "nodes = 2" if self.nodes > 1 else "gpus = 1"
        tables = [
            f'[[group]]\nname = "{name}"\n{size}\nmodel = "{models[name]}"\nserved_model_name = "{name}"\n'
            for name in NAMES
        ]
        file.write_text("\n".join(tables))
        more = (
            "--config",
            str(file),
            "--virtual-gpus",
            "1" if self.nodes > 1 else "2",
            "--frontend-port",
            str(free_port()),
        )
        super().__init__(home, models["a"], *more, *extra, **environ)

    def times_written(self, key: str) -> int:
        """By the client of the agents: this runs where there is no etcdctl."""
        store = Etcd(self.access)
        try:
            return int(store.call(lambda client: client.get(key)[1].version))
        finally:
            store.close()

    def place(self, group: str, node: int) -> Path:
        """The directory of a group's part on one of its nodes."""
        number = NODES[group][node]
        return Path(f"{self.run_file['node_dir']}{f'+{number}' if number else ''}") / f"g{NAMES.index(group)}"

    def slot(self, group: str, cohort_id: int) -> int:
        return SLOTS * NAMES.index(group) + cohort_id


@dataclass
class Round:
    """What faults act on: `group` of the two, as it stood before."""

    run: TwoModels
    rng: random.Random
    group: str
    status: dict[str, Any]

    @property
    def primary(self) -> int:
        return int(self.status["primary"])

    @property
    def shadow(self) -> int:
        return 1 - self.primary

    def life(self, cohort_id: int) -> int:
        return int(self.status["cohorts"][cohort_id]["incarnation"])

    def processes(self, cohort_id: int) -> list[proc.Stat]:
        tag = f"{self.run.run}/{self.run.slot(self.group, cohort_id)}/{self.life(cohort_id)}"
        return [info for info, _ in proc.tagged(tag)]

    def kill_rank(self, cohort_id: int, node: int) -> str:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.status["cohorts"][cohort_id]["ranks"][node]["pgid"], signal.SIGKILL)
        return f"cohort {cohort_id} rank {node}"

    def any_rank(self, cohort_id: int) -> str:
        return self.kill_rank(cohort_id, self.rng.randrange(2))

    def now(self) -> dict[str, Any]:
        return self.run.groups()[self.group]

    def wait_next_life(self, cohort_id: int) -> None:
        eventually(lambda: self.now()["cohorts"][cohort_id]["incarnation"] > self.life(cohort_id), LONG)

    def said(self, verb: str) -> str:
        done = self.run.cli(verb, "--group", self.group)
        if done.returncode != 0:
            raise BrokenError(f"{verb}: exit code {done.returncode}: {done.stderr}")
        return verb


# -- the kinds of fault --------------------------------------------------------------------------------------------


def primary_leader(r: Round) -> str:
    return r.kill_rank(r.primary, 0)


def primary_remote(r: Round) -> str:
    return r.kill_rank(r.primary, 1)


def primary_one_process(r: Round) -> str:
    who = r.rng.choice(r.processes(r.primary))
    kill(who.pid)
    return f"process {who.pid} of cohort {r.primary}"


def shadow_rank(r: Round) -> str:
    return r.any_rank(r.shadow)


def both_cohorts(r: Round) -> str:
    return r.any_rank(r.primary) + ", " + r.any_rank(r.shadow)


def during_promotion(r: Round) -> str:
    first, pause = r.any_rank(r.primary), r.rng.uniform(0.0, 0.25)
    time.sleep(pause)  # the moment is the point: anywhere in the promotion
    return f"{first}, and {pause * 1000:.0f} ms later {r.any_rank(r.shadow)}"


def no_tokens(r: Round) -> str:
    (r.run.place(r.group, 0) / f"wedge-{r.run.slot(r.group, r.primary)}-{r.life(r.primary)}").touch()
    r.wait_next_life(r.primary)
    return f"cohort {r.primary} gives no more tokens"


def users_command(r: Round) -> str:
    return r.said("kill-primary")


def switch_over(r: Round) -> str:
    return r.said("switch-over")


def kill_gms(r: Round) -> str:
    node = r.rng.randrange(2)
    number = NODES[r.group][node]
    record = next(n for n in r.run.status()["nodes"] if n["node_rank"] == number)
    (server,) = [s["pid"] for s in record["services"] if "gms" in s["name"]]
    kill(server)
    eventually(lambda: r.now()["redundancy"] == "none", LONG)
    return f"GMS of node {number}, then {r.any_rank(r.primary)}"


def kill_agent(r: Round) -> str:
    return _kill_agent(r, NODES[r.group][1])


def kill_leading_agent(r: Round) -> str:
    """Of group b: node 0 leads a, and is the run's leader."""
    r.group = "b"
    return _kill_agent(r, NODES["b"][0])


def _kill_agent(r: Round, number: int) -> str:
    kill(r.run.agent_of(number))
    eventually(lambda: not proc.tagged(r.run.run, node_rank=number), LONG, "everything of a dead agent is dead")
    eventually(lambda: number not in {n["node_rank"] for n in r.run.status()["nodes"]}, LONG, "it is missed")
    done = r.run.node(number)
    if done.returncode != 0:
        raise BrokenError(f"the new agent of node {number}: {done.returncode}: {done.stderr}")
    return f"agent of node {number}, and a new one"


def kill_etcd(r: Round) -> str:
    return _shared(r, "etcd")


def kill_frontend(r: Round) -> str:
    return _shared(r, "frontend")


def _shared(r: Round, name: str) -> str:
    """Something that both groups use dies and is started again."""
    r.group = ""
    (pid,) = [s["pid"] for n in r.run.status()["nodes"] for s in n["services"] if s["name"] == name]

    def again() -> list[dict[str, Any]]:
        return [e for e in r.run.events("service_restarted") if e["detail"].startswith(name)]

    before = len(again())
    kill(pid)
    eventually(lambda: len(again()) > before, LONG, f"{name} is back")
    return f"{name} {pid}"


KINDS: tuple[Callable[[Round], str], ...] = (
    *(primary_leader, primary_remote, primary_one_process, shadow_rank, both_cohorts, during_promotion),
    *(stop_primary, stop_shadow, no_tokens, users_command, switch_over, kill_gms, kill_agent, kill_leading_agent),
    *(kill_etcd, kill_frontend),
)
#: Kinds in which a request of that group may be lost: no shadow is left there that could take over.
MAY_LOSE = {"both_cohorts", "during_promotion", "kill_gms", "kill_agent", "kill_leading_agent"}
#: And of both: it is what clients are connected to.
BOTH_LOSE = {"kill_frontend"}
#: After this the frontend does not hear for seconds of the engine that has taken over.
DEAF_AFTER = {"kill_etcd"}


# -- the invariants ------------------------------------------------------------------------------------------------


def check(run: TwoModels, found: dict[str, dict[str, Any]]) -> None:
    """Everything that must hold of each group when both are full. Raises `BrokenError`."""
    for name in NAMES:
        group = found[name]
        lives = {c["cohort_id"]: c["incarnation"] for c in group["cohorts"]}
        lock = run.place(name, 0) / "failover.lock"
        primary = group["primary"]
        holders = {tag for pid in flock_holders(str(lock)) if (tag := proc.tag_of(pid))}
        wanted = {f"{run.run}/{run.slot(name, primary)}/{lives[primary]}/{NODES[name][0]}"}
        if holders != wanted:
            raise BrokenError(f"the lock of {name} is held by {holders}, and its primary is {wanted}")
        for cohort_id, life in lives.items():
            tagged = proc.tagged(f"{run.run}/{run.slot(name, cohort_id)}")
            if old := [tag for _, tag in tagged if tag.split("/")[2] != str(life)]:
                raise BrokenError(f"processes of an old life are alive: {old}")
            for number in NODES[name]:
                groups = {info.pgid for info, tag in tagged if tag.split("/")[3] == str(number)}
                if len(groups) != 1:
                    raise BrokenError(f"cohort {cohort_id} of {name} has {len(groups)} groups on node {number}")
        for node in range(2):
            for socket in sorted(run.place(name, node).glob("gms_*_weights.sock")):
                written = sum(e.kind == "committed" for e in probe.event_history(socket))
                if written != 1:
                    raise BrokenError(f"the weights of {name} on its node {node} were published {written} times")
    door = Door(run.access)
    eventually(lambda: len(door.get_prefix(DYNAMO_INSTANCES)) == len(NAMES), LONG, "one registered engine a group")
    door.close()
    serving: dict[tuple[str, int, int], float] = {}
    for event in run.events():
        who = (event["group"], event["cohort_id"], event["incarnation"])
        if event["kind"] == "registered":
            if others := [s for s in serving if s[0] == who[0]]:
                raise BrokenError(f"{who} registered while {others} was not dead")
            serving[who] = event["time"]
        elif event["group"] and event["kind"] in ("dead", "exit", "kill"):
            serving.pop(who, None)
        elif event["kind"] in ("node_lost", "lease_revoked"):
            serving = {s: t for s, t in serving.items() if s[0] != event["group"]}


@dataclass
class Untouched:
    """A group as it stood before a fault that is no business of its."""

    name: str
    lives: list[tuple[int, int, int]]
    said: int
    events: int

    @classmethod
    def of(cls, run: TwoModels, name: str) -> Untouched:
        return cls(name, run.lives(name), run.times_written(Keys(run.run, name).run), len(cls._events(run, name)))

    @staticmethod
    def _events(run: TwoModels, name: str) -> list[dict[str, Any]]:
        return [e for e in run.events() if e["group"] == name]

    def check(self, run: TwoModels, shared: bool) -> None:
        """Raise `BrokenError` when it is not as it was. After a fault in what is `shared` it may say so."""
        if (lives := run.lives(self.name)) != self.lives:
            raise BrokenError(f"group {self.name} was touched: {self.lives} before, and {lives}")
        if shared:
            return
        if new := self._events(run, self.name)[self.events :]:
            raise BrokenError(f"group {self.name} has events of its own: {new}")
        if (said := run.times_written(Keys(run.run, self.name).run)) != self.said:
            raise BrokenError(f"group {self.name} said something of itself {said - self.said} times")


# -- rounds --------------------------------------------------------------------------------------------------------


def rounds(
    run: TwoModels,
    kinds: list[tuple[Callable[[Round], str], str]],
    rng: random.Random,
    keep: Keep = nowhere,
) -> list[Row]:
    """One round for each of `kinds` and the group it is for, each kept. Raises `BrokenError`, or what a wait raises."""
    results: list[Row] = []
    deaf = False
    with contextlib.ExitStack() as stack:
        url = run.run_file["frontend_url"]
        loads = {n: stack.enter_context(Load(url, 2, 1, 2.0, tokens=30, prompts=4, model=n)) for n in NAMES}
        check(run, run.full(*NAMES))
        for number, (kind, group) in enumerate(kinds, 1):
            time.sleep(rng.uniform(0.0, 0.5))  # a random moment
            found = run.full(*NAMES)
            this = Round(run, rng, group, found[group])
            before = {name: Untouched.of(run, name) for name in NAMES}
            begun = time.monotonic()
            what = kind(this)
            if this.group:  # seen, before anybody asks whether it is over
                eventually(lambda g=this.group, b=before: len(Untouched._events(run, g)) > b[g].events, LONG)  # type: ignore[misc]
            run.full(*NAMES)
            for name in NAMES:
                eventually(
                    lambda n=name, b=begun: any(a.sent >= b and not a.error for a in list(loads[n].answers)[-50:]), LONG
                )
            took = time.monotonic() - begun
            check(run, run.full(*NAMES))
            for name in NAMES:
                if name != this.group:
                    before[name].check(run, shared=not this.group)
                load = loads[name]
                if load.wrong:
                    raise BrokenError(f"a client of {name} got another text: {load.said()}")
                lost = [a for a in load.lost if a.done >= begun]
                may = kind.__name__ in BOTH_LOSE or (name == this.group and (kind.__name__ in MAY_LOSE or deaf))
                if lost and not may:
                    raise BrokenError(f"{len(lost)} requests of {name} were lost by {kind.__name__}: {lost[0]}")
            for load in loads.values():
                # What was lost is the round's own; it is looked at no more.
                load.answers = [a for a in load.answers if not a.error]
            row = {"round": number, "kind": kind.__name__, "group": this.group, "what": what, "full_s": round(took, 2)}
            for name in NAMES:
                row[f"longest_answer_{name}_s"] = round(loads[name].longest_wait(begun), 3)
            results.append(row)
            keep(row)
            deaf = kind.__name__ in DEAF_AFTER
            print(
                f"{number:4d} {this.group or '-'} {kind.__name__:20s} full again after {took:6.2f} s, longest answers "
                f"{row['longest_answer_a_s']:6.3f} s (a) {row['longest_answer_b_s']:6.3f} s (b): {what}",
                flush=True,
            )
    return results


def plan(count: int, rng: random.Random, only: list[str] | None = None) -> list[tuple[Callable[[Round], str], str]]:
    """Which faults in which group, in which order: every kind equally often, shuffled."""
    many = [(kind, rng.choice(NAMES)) for kind in often(KINDS, count, only)]
    rng.shuffle(many)
    return many


def make_models(directory: Path) -> dict[str, Path]:
    """Two that answer differently."""
    from gms_launch.engines.reference.demo_model import make

    for seed, name in enumerate(NAMES, 1):
        make(directory / name, 4, seed)
    return {name: directory / name for name in NAMES}


def go(options: argparse.Namespace, rng: random.Random, keep: Keep) -> list[Row]:
    with tempfile.TemporaryDirectory(prefix="chaos-") as name:
        home = Path(name) / "home"
        home.mkdir()
        with TwoModels(home, make_models(Path(name)), *FLAGS, **ENVIRON) as run, telling(run, options.seed):
            return rounds(run, plan(options.rounds, rng, options.only), rng, keep)


if __name__ == "__main__":
    command(__doc__, 100, KINDS, go, {"full_s": "full again"})
