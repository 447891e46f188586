"""What a look at a run of groups says: never more than is known of the nodes that lead them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from gms_launch.cohort.model import Phase, Redundancy
from gms_launch.cohort.records import (
    DesiredCohort,
    GmsStatus,
    LeadRecord,
    NodeRecord,
    RankRecord,
    RunRecord,
    ServiceStatus,
    Wanted,
)
from gms_launch.control.door import Door
from gms_launch.control.keys import Keys
from gms_launch.observe import look, words
from gms_launch.observe.snapshot import Snapshot
from gms_launch.run.rundir import RunDir, RunFile

FILE = RunFile(
    "r", "0", 1.0, "host0", "b", 1, 1, "/n", groups={n: {"nodes": [k], "shadows": 1} for k, n in enumerate("ab")}
)


class Etcd(Door):
    """What etcd holds, and for how many seconds nothing was heard under a key's lease; None without one."""

    def __init__(self) -> None:
        run = RunRecord("r", "", "", "", 1.0, nnodes=2, redundancy="full", frontend_url="http://127.0.0.1:8000")
        self.held = {Keys("r").run: run.encode()}
        self.silent: dict[str, int | None] = {}

    def get_prefix(self, prefix: str) -> dict[str, bytes]:
        return {k: v for k, v in self.held.items() if k.startswith(prefix)}

    def silence(self, key: str) -> tuple[int, int] | None:
        ago = self.silent.get(key, 0)
        return None if ago is None else (ago, 5)

    def alarms(self) -> tuple[str, ...]:
        return ()

    def group(self, name: str, leader: int) -> None:
        """A group of one node, full."""
        keys = Keys("r", name)
        node = NodeRecord(leader, f"host{leader}", "", "b", 1, 1)
        self.held[Keys("r").node(leader)] = node.encode()
        self.held[keys.node(0)] = replace(node, node_rank=0, number=leader).encode()
        self.held[keys.run] = RunRecord("r", "", "", "", 1.0, redundancy="full", leader=leader).encode()
        for cohort, phase in enumerate((Phase.ACTIVE, Phase.PARKED)):
            self.held[keys.cohort(cohort)] = DesiredCohort(cohort, 1, Wanted.RUNNING, 1).encode()
            self.held[keys.rank(cohort, 0)] = RankRecord(cohort, 0, 1, phase).encode()


def seen(etcd: Etcd) -> tuple[Snapshot, dict[str, Snapshot]]:
    shot = look.now(RunDir(Path("/home/r")), FILE, etcd)
    return shot, {g.group: g for g in shot.groups}


def both() -> Etcd:
    etcd = Etcd()
    etcd.group("a", 0)
    etcd.group("b", 1)
    return etcd


def test_a_run_is_as_redundant_as_its_worst_group() -> None:
    etcd = both()
    shot, groups = seen(etcd)
    assert shot.redundancy is groups["a"].redundancy is groups["b"].redundancy is Redundancy.FULL
    etcd.held[Keys("r", "b").rank(1, 0)] = RankRecord(1, 0, 1, Phase.STARTING).encode()
    shot, groups = seen(etcd)
    assert (shot.redundancy, groups["a"].redundancy) == (Redundancy.NONE, Redundancy.FULL)


def test_a_group_whose_leader_is_silent_or_lost_is_not_full_whatever_was_said_last() -> None:
    etcd = both()
    etcd.silent[Keys("r").node(1)] = 4
    shot, groups = seen(etcd)
    assert (
        groups["b"].redundancy is shot.redundancy is Redundancy.DEGRADED and groups["a"].redundancy is Redundancy.FULL
    )
    assert groups["b"].leader_silent == "the agent of node 1 (pid 1, host1) has not reported for 4 s"
    assert shot.to_json()["leader_silent"] is False and shot.to_json()["groups"][1]["leader_silent"] is True
    etcd.silent[Keys("r").node(1)] = None
    del etcd.held[Keys("r", "b").node(0)], etcd.held[Keys("r").node(1)]
    shot, groups = seen(etcd)
    assert groups["b"].redundancy is shot.redundancy is Redundancy.DOWN and groups["a"].redundancy is Redundancy.FULL
    # What its ranks said last is marked, and whose nodes they were is still told.
    rows = dict(zip(("a", "b"), words.groups(shot, 2.0), strict=True))
    assert rows["a"][2:5] == ("cohort 0.1", "1 of 1", "0") and rows["b"][2:5] == ("cohort 0.1 ?", "1 of 1 ?", "1")
    assert words.parts(groups["b"])[0][:3] == ("1 (rank 0)", "agent", words.SILENT)


def test_what_keeps_a_group_from_being_full_is_told_in_its_line() -> None:
    etcd = both()
    keys = Keys("r", "b")

    def note() -> str:
        return words.groups(seen(etcd)[0], 10.0)[1][-1]

    assert note() == ""
    etcd.held[keys.cohort(1)] = DesiredCohort(1, 1, Wanted.RUNNING, 1, why="5 starts failed", given_up=True).encode()
    etcd.held[keys.rank(1, 0)] = RankRecord(1, 0, 1, Phase.FENCED).encode()
    assert note() == "cohort 1: given up: 5 starts failed"
    etcd.held[keys.cohort(1)] = DesiredCohort(1, 1, Wanted.RUNNING, 1).encode()
    etcd.held[keys.rank(1, 0)] = RankRecord(1, 0, 1, Phase.STARTING, step="weights", step_since=7.0).encode()
    assert note() == "cohort 1: weights (cohort 0 writes them) for 3 s"
    etcd.held[keys.rank(1, 0)] = RankRecord(1, 0, 1, Phase.FAILING, leftovers=(7,)).encode()
    assert note() == "cohort 1: cannot be killed"
    etcd.held[keys.rank(1, 0)] = RankRecord(1, 0, 1, Phase.PARKED).encode()
    etcd.held[keys.run] = replace(RunRecord.decode(etcd.held[keys.run]), redundancy="down").encode()
    assert note() == "not confirmed yet: a token is waited for"
    node = NodeRecord.decode(etcd.held[keys.node(0)])
    etcd.held[keys.node(0)] = replace(node, gms=(GmsStatus(0, "", "weights", state="DOWN"),)).encode()
    assert note() == "GMS is down on node 1 (rank 0)"
    # The node that leads it is lost: whose agent is silent, and what comes in its place.
    etcd.silent[Keys("r").node(1)] = None
    gone = etcd.held.pop(Keys("r").node(1))
    del etcd.held[keys.node(0)]
    away = "the agent of node 1 has not reported for more than 7 s; node 1 (rank 0) not here: "
    assert note() == away + "waited for until node_wait is over"
    run = RunRecord.decode(etcd.held[Keys("r").run])
    etcd.held[Keys("r").run] = replace(run, spares=1).encode()
    assert note() == away + "waited for until node_wait is over, no spare is here"
    assert words.short(seen(etcd)[0]) == ["0 of 1 spare here"]
    etcd.held[Keys("r").node(2)] = replace(NodeRecord.decode(gone), node_rank=2).encode()
    assert note() == away + "back, or a spare in its place after spare_wait"
    assert words.short(seen(etcd)[0]) == []


def test_where_clients_come_in_is_told_of_each_frontend_that_is_there() -> None:
    etcd = both()
    run = RunRecord.decode(etcd.held[Keys("r").run])
    etcd.held[Keys("r").run] = replace(run, etcd=("https://a:1", "https://b:1", "https://c:1")).encode()
    etcd.held[Keys("r").lead] = LeadRecord(1, 1, "host1", 7).encode()
    well = (ServiceStatus("etcd", "ready"),)
    for rank in (0, 1):
        node = replace(NodeRecord.decode(etcd.held[Keys("r").node(rank)]), etcd="https://a:1", services=well)
        etcd.held[Keys("r").node(rank)] = replace(node, frontend=f"http://127.0.0.1:800{rank}").encode()
    shot, _ = seen(etcd)
    assert words.frontend(shot) == "http://127.0.0.1:8000 (only on host0), http://127.0.0.1:8001 (only on host1)"
    assert words.frontend(look.of(shot, "b")) == words.frontend(shot), "of one group, too"
    all_of = ", ".join(f"http://127.0.0.1:800{n}/v1/completions (only on host{n})" for n in (0, 1))
    assert words.entrances(shot, 2) == all_of
    assert words.entrances(shot, 3) == f"{all_of} and others (`gms-launch status` has all 3)"
    nobody = replace(shot, fronts=())
    assert words.entrances(nobody, 3).startswith("http://127.0.0.1:8000/v1/completions and others")
    assert words.short(shot) == ["etcd has 2 of 3 members: no other may be lost"]
    second = etcd.held[Keys("r").node(1)]
    etcd.silent[Keys("r").node(0)] = 9
    etcd.held[Keys("r").lead] = LeadRecord(0, 1, "host0", 7).encode()
    assert seen(etcd)[0].leader_silent == "the leader's agent (pid 1, host0) has not reported for 9 s"
    etcd.held[Keys("r").lead] = LeadRecord(1, 1, "host1", 7).encode()
    del etcd.held[Keys("r").node(0)]
    assert words.frontend(seen(etcd)[0]) == "http://127.0.0.1:8001 (only on host1)", "and not that of the lost node"
    etcd.held[Keys("r").node(1)] = replace(NodeRecord.decode(second), frontend="").encode()
    assert words.frontend(seen(etcd)[0]) == "http://127.0.0.1:8000 (its node is not here: nobody gets in)"


def test_a_rank_without_signs_of_its_own_is_not_called_starting_for_ever() -> None:
    etcd = both()
    keys = Keys("r", "a")
    etcd.held[keys.rank(0, 1)] = RankRecord(0, 1, 1, Phase.STARTING).encode()
    etcd.held[keys.node(1)] = NodeRecord(1, "host2", "", "b", 1, 1).encode()
    etcd.held[keys.run] = replace(RunRecord.decode(etcd.held[keys.run]), nnodes=2).encode()
    rows = words.cohorts(look.of(seen(etcd)[0], "a"), 2.0)
    assert [row[2] for row in rows[:2]] == ["active", "headless"]
    etcd.held[keys.rank(0, 0)] = RankRecord(0, 0, 1, Phase.STARTING).encode()
    rows = words.cohorts(look.of(seen(etcd)[0], "a"), 2.0)
    assert [row[2] for row in rows[:2]] == ["starting", "starting"]


def test_a_group_that_has_said_nothing_yet_is_listed_as_starting() -> None:
    etcd = Etcd()
    etcd.group("a", 0)
    shot, groups = seen(etcd)
    assert list(groups) == ["a", "b"] and groups["b"].starting and not groups["a"].starting
    assert (groups["b"].nnodes, groups["b"].leader, groups["b"].shadows) == (1, 1, 1)
    assert shot.redundancy is Redundancy.DOWN
    one = look.of(shot, "a")
    assert (one.frontend_url, one.frontend_host, one.to_json()["name"]) == ("http://127.0.0.1:8000", "host0", "a")


def test_which_node_leads_the_run_is_told_where_it_may_be_another() -> None:
    etcd = both()
    notes = [row[-1] for row in words.parts(seen(etcd)[0])]
    assert notes == ["", ""] and seen(etcd)[0].to_json()["leader"] == 0
    run = RunRecord.decode(etcd.held[Keys("r").run])
    etcd.held[Keys("r").run] = replace(run, etcd=("https://a:1", "https://b:1", "https://c:1")).encode()
    assert seen(etcd)[0].to_json()["leader"] == -1
    etcd.held[Keys("r").lead] = LeadRecord(1, 1, "host1", 7).encode()
    shot, _ = seen(etcd)
    assert [row[-1] for row in words.parts(shot)] == ["", ", leads the run"] and shot.to_json()["leader"] == 1
