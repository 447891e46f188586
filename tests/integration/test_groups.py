"""Several engines in one run: each fails over by itself, and what dies in one is no business of the others."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from gms_launch.control.keys import Keys
from tests.load import Load
from tests.support import GMS_LAUNCH, LONG, Deployment, complete, eventually, free_port, gms_launch, groups_full, kill

KILLS = 2


class Grouped(Deployment):
    """A run of groups; its `nodes` are agents on this machine's loopback."""

    nodes = 1

    def node(self, node_rank: int) -> subprocess.CompletedProcess[str]:
        """Start the agent of one node; returns when the run is full for the first time."""
        place = ["--nnodes", str(self.nodes), "--node-rank", str(node_rank)] if self.nodes > 1 else []
        place += ["--leader-addr", "127.0.0.1", "--interface", "lo"] if self.nodes > 1 else []
        return gms_launch("up", "-d", *place, *self.flags, env=self.environment(node_rank))

    def environment(self, node_rank: int) -> dict[str, str]:
        return self.env

    def up(self) -> subprocess.CompletedProcess[str]:
        with ThreadPoolExecutor(self.nodes) as pool:
            done = list(pool.map(self.node, range(self.nodes)))
        return next((d for d in done if d.returncode), done[0])

    def groups(self) -> dict[str, dict[str, Any]]:
        return {g["name"]: g for g in self.status()["groups"]}

    def lives(self, group: str) -> list[tuple[int, int, int]]:
        """Every rank of a group, as (cohort, incarnation, pid)."""
        cohorts = self.groups()[group]["cohorts"]
        return [(c["cohort_id"], c["incarnation"], r["pid"]) for c in cohorts for r in c["ranks"]]

    def full(self, *names: str) -> dict[str, dict[str, Any]]:
        """Wait until these groups are."""
        return groups_full(self.groups, names)

    def starts(self, group: str) -> int:
        """How many lives a group has had."""
        return sum(c["incarnation"] for c in self.groups()[group]["cohorts"])

    def primary_ranks(self, group: str) -> list[int]:
        """The process groups of a group's primary, by their place in it."""
        found = self.full(group)[group]
        return [r["pgid"] for r in found["cohorts"][found["primary"]]["ranks"]]

    def agent_of(self, number: int) -> int:
        return next(int(n["agent_pid"]) for n in self.status()["nodes"] if n["node_rank"] == number)

    def times_written(self, key: str) -> int:
        return int(json.loads(self.etcdctl("get", key, "-w", "json"))["kvs"][0]["version"])

    def of(self, group: str, kind: str) -> list[dict[str, Any]]:
        return [e for e in self.events(kind) if e["group"] == group]


class Four(Grouped):
    nodes = 4


class Shared(Grouped):
    """Four groups, of which each node has two."""

    nodes = 2


class Two(Grouped):
    """Two groups of one node each; the engines of the second fail from their slots' second lives on."""

    nodes = 2

    def environment(self, node_rank: int) -> dict[str, str]:
        return self.env | ({"REFERENCE_FAULT": "*.2:tokens=error"} if node_rank else {})


@pytest.fixture
def one_node(tmp_path: Path, model: Path) -> Iterator[Grouped]:
    with Grouped(tmp_path, model, "--virtual-gpus", "4", "--groups", "4", "--no-canary") as run:
        yield run


@pytest.fixture
def patient(tmp_path: Path, model: Path) -> Iterator[Grouped]:
    """The agent would restart a frozen etcd sooner than a person notices."""
    flags = ["--virtual-gpus", "2", "--groups", "2", "--service-liveness", "60", "--dynamo-lease-ttl", "200"]
    flags += ["--metrics-port", str(free_port())]
    with Grouped(tmp_path, model, *flags) as run:
        yield run


@pytest.fixture
def pairs(tmp_path: Path, model: Path) -> Iterator[Four]:
    ports = ["--frontend-port", str(free_port())]
    with Four(tmp_path, model, "--virtual-gpus", "1", "--groups", "2", "--node-wait", "25", *ports) as run:
        yield run


@pytest.fixture
def shared(tmp_path: Path, model: Path) -> Iterator[Shared]:
    flags = ["--virtual-gpus", "2", "--groups", "4", "--node-wait", "120", "--frontend-port", str(free_port())]
    with Shared(tmp_path, model, *flags) as run:
        yield run


@pytest.fixture
def two(tmp_path: Path, model: Path) -> Iterator[Two]:
    proof = ["--promotion-timeout", "8", "--restart-backoff", "0.2", "--canary-interval", "1", "--canary-timeout", "8"]
    ports = ["--frontend-port", str(free_port())]
    with Two(tmp_path, model, "--virtual-gpus", "1", "--groups", "2", *proof, *ports) as run:
        yield run


def test_four_groups_on_one_node(one_node: Grouped) -> None:
    run = one_node
    found = run.full("g0", "g1", "g2", "g3")
    assert run.wait_full() and run.text()
    devices = [g["nodes"][0]["gms"][0]["uuid"] for g in found.values()]
    assert len(set(devices)) == 4, "each has a made-up GPU of its own"
    others = {name: run.lives(name) for name in ("g0", "g1", "g3")}
    before = found["g2"]["primary"]
    said = run.times_written(Keys(run.run).run)
    with Load(run.run_file["frontend_url"], streams=4, unary=2, tokens=30) as load:
        load.wait_busy(1.0)
        os.killpg(run.primary_ranks("g2")[0], signal.SIGKILL)
        eventually(lambda: run.groups()["g2"]["cohorts"][before]["incarnation"] == 2, LONG, "its end was seen")
        after = run.full("g2")["g2"]
    assert after["primary"] != before and after["cohorts"][before]["incarnation"] == 2
    assert load.lost == [] and load.wrong == [], load.said()
    assert {name: run.lives(name) for name in others} == others, "nobody else was touched"
    assert run.times_written(Keys(run.run).run) == said, "all nodes follow it, so a failover leaves it alone"
    assert run.times_written(Keys(run.run, "g2").run) > 1, "the group's own record is another matter"
    assert {e["group"] for e in run.events("exit")} == {"g2"}


def test_verbs_name_a_group(one_node: Grouped) -> None:
    run = one_node
    names = ["g0", "g1", "g2", "g3"]
    run.full(*names)
    shown = run.cli("status").stdout
    assert [line.split()[:2] for line in shown.splitlines() if line[:2] in names] == [[n, "full"] for n in names]
    ranks = run.cli("status", "-v").stdout
    assert "cohort-0" not in shown and ranks.count("primary  ") == 4
    assert re.findall(r"gpu (\d) weights", ranks) == ["0", "1", "2", "3"], "as the node numbers them"
    told = json.loads(run.cli("status", "--json").stdout)
    assert told["schema"] == 2 and [g["name"] for g in told["groups"]] == names and told["cohorts"] == []
    shown = json.loads(run.cli("status", "--group", "g3", "--json").stdout)
    assert (shown["schema"], shown["name"], shown["redundancy"]) == (2, "g3", "full")
    assert run.cli("status", "--group", "g3", "--exit-code").returncode == 0
    for verb in ("kill-primary", "switch-over", "roll"):
        refused = run.cli(verb)
        assert refused.returncode == 2 and "--group: the run has groups g0, g1, g2, g3" in refused.stderr
        done = run.cli(verb, "--group", "g1", "--json")
        assert done.returncode == 0, done.stderr
        failover = json.loads(done.stdout)
        assert (failover["group"], failover["kind"]) == ("g1", verb)
        run.full("g1")
    assert run.groups()["g1"]["generation"] == 1 and run.groups()["g0"]["generation"] == 0
    assert {e["group"] for e in run.events("exit")} == {"g1"}
    assert run.cli("switch-over", "--group", "g1", "--to", "9").returncode == 2
    for verb in ("status", "kill-primary", "switch-over", "roll", "logs", "timeline", "events", "web"):
        refused = run.cli(verb, "--group", "g9")
        assert refused.returncode == 2 and "--group 'g9': the run has groups g0, g1, g2, g3" in refused.stderr, refused

    assert "g1 cohort" in run.cli("timeline").stdout
    assert "has had no failover" in run.cli("timeline", "--group", "g0").stdout
    folded = json.loads(run.cli("timeline", "--group", "g1", "--json").stdout)["failovers"]
    assert [f["kind"] for f in folded] == ["kill-primary", "switch-over", "roll"]
    told_of = [json.loads(line) for line in run.cli("events", "--group", "g1", "--json", "-n0").stdout.splitlines()]
    assert {e["group"] for e in told_of} == {"g1"} and {"kill", "exit"} <= {e["kind"] for e in told_of}
    logs = run.cli("logs", "--group", "g2").stdout
    assert sorted(line.split()[0] for line in logs.splitlines()) == ["agent", "cohort-0.1", "cohort-1.1", "gms-0.1"]
    own = run.cli("logs", "--group", "g2", "cohort-0")
    assert own.returncode == 0 and own.stdout == run.cli("logs", "g2.cohort-0").stdout
    missing = run.cli("logs", "--group", "g2", "etcd")
    assert missing.returncode == 2 and "group g2 of run" in missing.stderr and "gms-0" in missing.stderr


def test_pages_show_every_group_and_one_of_them(one_node: Grouped, tmp_path: Path) -> None:
    run = one_node
    run.full("g0", "g1", "g2", "g3")
    assert run.cli("kill-primary", "--group", "g2").returncode == 0
    run.full("g2")

    def page(verb: str, *flags: str) -> str:
        file = tmp_path / "page.html"
        done = run.cli(verb, "--html", str(file), *flags)
        assert done.returncode == 0, done.stderr
        return file.read_text()

    whole = page("status")
    assert all(f'id="group-g{k}"' in whole and f'href="#group-g{k}"' in whole for k in range(4))
    assert "in 4 of 4 groups" in whole
    one = page("status", "--group", "g2")
    assert "group g2: full" in one and "g1" not in one
    failovers = page("timeline")
    assert "Failover 1: g2 cohort" in failovers and "full: a shadow is parked" in failovers
    assert "There has been none." in page("timeline", "--group", "g0")
    assert "group g2: failovers" in page("timeline", "--group", "g2")


@pytest.mark.slow
def test_one_group_is_killed_while_etcd_is_away(patient: Grouped) -> None:
    run = patient
    found = run.full("g0", "g1")
    listed = json.loads((run.home / run.run / "ranks.g1.json").read_text())
    assert {r["pid"] for r in listed["ranks"]} == {pid for *_, pid in run.lives("g1")}
    other = run.lives("g0")
    etcd = next(s["pid"] for n in run.status()["nodes"] for s in n["services"] if s["name"] == "etcd")
    pid = next(pid for cohort, _, pid in run.lives("g1") if cohort == found["g1"]["primary"])
    kill(etcd, signal.SIGSTOP)
    try:
        assert run.cli("kill-primary").returncode == 2
        argv = [*GMS_LAUNCH, "kill-primary", "--run", run.run, "--group", "g1", "--timeout", str(LONG), "--json"]
        command = subprocess.Popen(argv, env=run.env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        eventually(lambda: not Path(f"/proc/{pid}").exists(), LONG, "dead without etcd")
    finally:
        kill(etcd, signal.SIGCONT)
    out, err = command.communicate(timeout=LONG)
    assert command.returncode == 0 and "killing the recorded groups of cohort" in err, out + err
    failover = json.loads(out)
    assert (failover["group"], failover["victim"]["cohort_id"]) == ("g1", found["g1"]["primary"])
    run.full("g1")
    assert run.lives("g0") == other, "nobody else was touched"

    def page() -> str:
        with urllib.request.urlopen(f"http://127.0.0.1:{run.run_file['settings']['metrics_port']}/metrics") as answer:
            return str(answer.read().decode())

    died = 'gms_launch_failovers_total{cause="%s",group="%s"} %s'
    eventually(lambda: died % ("exit", "g1", "1.0") in page(), LONG, "counted")
    full = 'gms_launch_redundancy{group="%s",state="full"} 1.0'
    eventually(lambda: all(full % g in page() for g in ("g0", "g1")), LONG, "full")
    has = 'gms_launch_gms_bytes{device="0",group="%s",tag="weights"}'  # of the last look that was answered
    eventually(lambda: all(has % g in page() for g in ("g0", "g1")), LONG, "looked at")
    shown = page()
    assert [
        line
        for line in shown.splitlines()
        if "failovers_total{" in line and 'group="g0"' in line and " 0.0" not in line
    ] == []
    for group in ("g0", "g1"):
        assert f'gms_launch_slots_given_up{{group="{group}"}} 0.0' in shown


@pytest.mark.slow
def test_every_rank_of_one_group_dies_and_the_other_serves_on(pairs: Four) -> None:
    run = pairs
    assert [g["nnodes"] for g in run.full("g0", "g1").values()] == [2, 2]
    untouched = run.lives("g0")
    with Load(run.run_file["frontend_url"], streams=4, unary=2, tokens=30) as load:
        for k in range(KILLS):
            load.wait_busy(0.5)
            os.killpg(run.primary_ranks("g1")[k % 2], signal.SIGKILL)
            eventually(lambda k=k: run.starts("g1") == 2 + k + 1, LONG, "the killed cohort is started again")  # type: ignore[misc]
            run.full("g1")
    assert len(run.of("g1", "first_token")) == 1 + KILLS, "each time the other took over, and nobody else"
    assert load.lost == [] and load.wrong == [], load.said()
    assert run.lives("g0") == untouched and run.of("g0", "kill") == []


def test_a_lost_node_ends_its_own_group_alone(pairs: Four) -> None:
    run = pairs
    run.full("g0", "g1")
    untouched = run.lives("g0")
    kill(run.agent_of(3))
    eventually(lambda: run.of("g1", "node_lost"), LONG)
    (lost, *_) = run.of("g1", "node_lost")
    assert lost["detail"].startswith("node 3 ")
    ended = eventually(lambda: len(found := run.of("g1", "exit")) > 1 and found, LONG, "node 2's ranks of both cohorts")
    assert {e["cohort_id"] for e in ended} == {0, 1}
    assert all(e["time"] < lost["time"] for e in ended), "by its guard's word: nobody waited for the lease"
    eventually(lambda: run.groups()["g1"]["over"], LONG, "node_wait is over")
    assert "was lost and did not come back" in run.groups()["g1"]["over"]
    for verb in ("kill-primary", "switch-over", "roll"):
        refused = run.cli(verb, "--group", "g1")
        assert refused.returncode == 3 and "group g1 is over: node 3 " in refused.stderr, refused
    assert run.text() and run.lives("g0") == untouched, "the other serves on"
    eventually(lambda: run.status()["redundancy"] == "down", what="of all groups together")


def test_a_group_whose_memory_cannot_be_served_again_ends_alone(pairs: Four) -> None:
    """New GMS servers do not start on one of its nodes: something else has their names."""
    run = pairs
    run.full("g0")
    untouched, (primary, _) = run.lives("g0"), run.primary_ranks("g1")
    place = Path(f"{run.run_file['node_dir']}+3/g1")
    node = next(n for n in run.status()["nodes"] if n["node_rank"] == 3)
    kill(next(s["pid"] for s in node["services"] if "gms" in s["name"]))
    eventually(lambda: run.groups()["g1"]["redundancy"] == "none", LONG, "no shadow could take over any more")
    for socket in place.glob("gms_*.sock"):
        socket.unlink()
        (socket / "taken").mkdir(parents=True)
    os.killpg(primary, signal.SIGKILL)
    over = eventually(lambda: run.groups()["g1"]["over"], LONG, "the group is over")
    assert "gms" in over
    eventually(lambda: run.of("g1", "gms_restart"), LONG, "what was tried is told")
    eventually(lambda: run.of("g1", "group_over"), LONG, "it is told")
    eventually(run.text, LONG, "an answer, once nothing is sent to the other any more")
    assert run.lives("g0") == untouched and not run.of("g0", "kill")
    assert not run.events("node_lost"), "its agents are there"


def test_the_node_that_leads_a_group_comes_back(pairs: Four) -> None:
    run = pairs
    run.full("g0", "g1")
    untouched, before = run.lives("g0"), run.lives("g1")
    kill(run.agent_of(2))
    eventually(lambda: {e["cohort_id"] for e in run.of("g1", "exit")} == {0, 1}, LONG, "the other node's ranks end")
    eventually(lambda: run.status()["missing_nodes"] == [2], LONG, "its lease is over")
    assert run.node(2).returncode == 0
    run.full("g1")
    assert not {pid for *_, pid in run.lives("g1")} & {pid for *_, pid in before}
    assert run.lives("g0") == untouched and run.text()


def test_a_node_is_lost_with_all_of_its_groups_and_they_come_back_with_it(shared: Shared) -> None:
    run, own = shared, ("g2", "g3")
    found = run.full("g0", "g1", *own)
    assert [g["leader"] for g in found.values()] == [0, 0, 1, 1]
    untouched, before = [run.lives(n) for n in ("g0", "g1")], [pid for n in own for *_, pid in run.lives(n)]
    kill(run.agent_of(1))
    eventually(lambda: all(run.groups()[n]["redundancy"] == "down" for n in own), LONG, "both are lost")
    eventually(run.text, LONG, "an answer, once nothing is sent to those any more")
    eventually(lambda: run.status()["missing_nodes"] == [1], what="its lease is over")
    assert run.node(1).returncode == 0
    run.full(*own)
    assert not {pid for n in own for *_, pid in run.lives(n)} & set(before)
    assert [run.lives(n) for n in ("g0", "g1")] == untouched and run.text()


def test_an_engine_that_gives_no_tokens_is_found_although_another_serves_the_same_model(two: Two) -> None:
    run = two
    found = run.full("g0", "g1")
    untouched, hung = run.lives("g0"), found["g1"]["primary"]
    pid = found["g1"]["cohorts"][hung]["ranks"][0]["pid"]
    environ = dict(e.split("=", 1) for e in Path(f"/proc/{pid}/environ").read_text().split("\0") if "=" in e)
    (Path(environ["FAILOVER_LOCK_PATH"]).parent / f"wedge-{10 + hung}-1").touch()
    eventually(lambda: [e for e in run.of("g1", "kill") if "no token for 8 s (canary_timeout)" in e["detail"]], LONG)
    now = run.full("g1")["g1"]
    assert now["primary"] == 1 - hung and now["cohorts"][hung]["incarnation"] == 2
    os.killpg(run.primary_ranks("g1")[0], signal.SIGKILL)  # what takes over answers everything with an error
    eventually(lambda: [e for e in run.of("g1", "kill") if "no token within 8 s of the lock" in e["detail"]], LONG)
    assert (hung, 2) not in {(e["cohort_id"], e["incarnation"]) for e in run.of("g1", "first_token")}
    run.full("g1")
    assert run.lives("g0") == untouched and not run.of("g0", "kill")


TWO_MODELS = """
[[group]]
name = "chat"
gpus = 1
[[group]]
name = "code"
gpus = 1
served_model_name = "coder"
"""


def test_two_models_behind_one_frontend(tmp_path: Path, model: Path) -> None:
    config = tmp_path / "groups.toml"
    config.write_text(TWO_MODELS)
    with Grouped(tmp_path, model, "--virtual-gpus", "2", "--config", str(config)) as run:
        untouched = run.lives("chat")
        host, port = run.run_file["frontend_url"].removeprefix("http://").split(":")

        def text(name: str) -> str:
            return eventually(lambda: complete(host, int(port), "hello", 8, model=name), LONG, f"{name} answers")

        before = {name: text(name) for name in ("tiny", "coder")}
        assert run.cli("kill-primary", "--group", "code").returncode == 0
        assert {name: text(name) for name in before} == before and run.lives("chat") == untouched
