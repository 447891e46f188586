"""Names of the keys in etcd, under `/gms-launch/<run>/`, and how to read them back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

ROOT = "/gms-launch/"


@dataclass(frozen=True)
class Range:
    """Keys from `first` up to and without `end`; the one key `first` without an end."""

    first: str
    end: str = ""


def prefix(start: str) -> Range:
    """All keys that begin with `start`, which ends in an ASCII character."""
    return Range(start, start[:-1] + chr(ord(start[-1]) + 1))


class Keys:
    """The keys of one group of a run. Those of a run without groups are the run's own.

    `run` holds what is said of the group as a whole, by its leader as long as there is no `over`. Events, and where
    nodes hear each other, are of the run.
    """

    def __init__(self, run: str, group: str = "") -> None:
        top = f"{ROOT}{run}/"
        self.groups = f"{top}groups/"
        self.prefix = f"{top}group/{group}/" if group else top
        self.run = f"{self.groups}{group}" if group else f"{top}run"
        self.nodes = f"{self.prefix}nodes/"
        self.desired = f"{self.prefix}desired/cohorts/"
        self.ranks = f"{self.prefix}ranks/"
        self.ended = f"{self.prefix}ended/"
        self.events = f"{top}events/"
        self.commands = f"{self.prefix}commands/"
        self.peers = f"{top}peers"
        self.lead = f"{top}lead"
        self.refusals = f"{top}refusals/"
        self.seats = f"{top}seats/"
        self.asked = f"{top}asked/"
        self.dark = f"{top}dark/"
        self.answers = f"{self.prefix}answers/"
        self.over = f"{top}over/{group}"

    def node(self, node_rank: int) -> str:
        return f"{self.nodes}{node_rank}"

    def seat(self, node_rank: int) -> str:
        """Whose a node rank of the run is."""
        return f"{self.seats}{node_rank}"

    def dark_of(self, group: str, node_rank: int) -> str:
        """What the run's leader says of the engines that a group had on a lost node of the run."""
        return f"{self.dark}{group}/{node_rank}"

    def cohort(self, cohort_id: int) -> str:
        return f"{self.desired}{cohort_id}"

    def rank(self, cohort_id: int, node_rank: int) -> str:
        return f"{self.ranks}{cohort_id}/{node_rank}"

    def life_ended(self, cohort_id: int, incarnation: int) -> str:
        return f"{self.ended}{cohort_id}/{incarnation}"

    def followed(self, cohorts: int, asks: bool = False) -> list[Range]:
        """What every agent follows, and not only the leader: as little as the rest of the run has to know at once.

        That is what is commanded and wanted, which lives have ended, how the cohorts' leader ranks are, and the run.
        Were it all records of all ranks, the messages of a failover would grow with the square of the nodes. `asks`:
        and what it asked of the run's leader.
        """
        leaders = [self.rank(cohort_id, 0) for cohort_id in range(cohorts)]
        if self.run.startswith(self.groups):
            leaders.append(self.node(0))  # of the run's leader its etcd tells
        tables = (self.commands, self.desired, self.ended, *([self.answers] if asks else []))
        return [prefix(p) for p in tables] + [Range(k) for k in (*leaders, self.run, self.peers)]

    def led(self) -> list[Range]:
        """What the leader of the group follows: all of it."""
        return [prefix(self.prefix), Range(self.run)]

    def everywhere(self) -> list[Range]:
        """What an agent of a run of groups follows besides its groups."""
        return [prefix(self.commands), prefix(self.dark), Range(self.run), Range(self.peers)]

    def over_all(self) -> list[Range]:
        """What the leader of a run of groups follows besides its own groups."""
        tables = (self.nodes, self.commands, self.events, self.refusals, self.groups, self.seats, self.asked, self.dark)
        return [*map(prefix, tables), Range(self.run), Range(self.peers)]

    def event(self, time_ns: int, node_rank: int, serial: int) -> str:
        """Sorts by time; `serial` keeps two events of a node in one nanosecond apart."""
        return f"{self.events}{time_ns:020d}-{node_rank:04d}-{serial:06d}"

    def command(self, uuid: str) -> str:
        return f"{self.commands}{uuid}"

    def result(self, uuid: str) -> str:
        return f"{self.commands}{uuid}/result"

    def question(self, uuid: str) -> str:
        """What a group's leader asks of the run's, who has the frontend."""
        return f"{self.asked}{uuid}"

    def answer(self, uuid: str) -> str:
        """Where its group's leader reads what came of it, and nobody else."""
        return f"{self.answers}{uuid}"

    def refusal(self, who: str) -> str:
        """What an agent that may not take its place leaves for the leader."""
        return f"{self.refusals}{who}"


@dataclass(frozen=True)
class Share:
    """What an agent is part of, the run or a group: whether it leads there, how many cohorts that has, and whether
    engines register on its node.
    """

    keys: Keys
    leads: bool
    cohorts: int
    speaks: bool = False


def followed(run: Share, groups: Sequence[Share] = ()) -> list[Range]:
    """What one agent follows of its run: of groups its own alone, so that a failover costs what its group is large."""
    if not groups:
        lost = prefix(run.keys.dark)
        return [prefix(run.keys.prefix)] if run.leads else [*run.keys.followed(run.cohorts, run.speaks), lost]
    found = run.keys.over_all() if run.leads else run.keys.everywhere()
    for mine in groups:
        found += mine.keys.led() if mine.leads else mine.keys.followed(mine.cohorts, mine.speaks)
    return list(dict.fromkeys(found))


#: Everything of Dynamo's discovery.
DYNAMO_ROOT = "v1/"
#: Where Dynamo registers a serving endpoint: v1/instances/<namespace>/<component>/<endpoint>/<lease in hex>.
DYNAMO_INSTANCES = "v1/instances/"
#: The endpoint under which a frontend in kv router mode registers itself, beside the engines and under its own lease.
ROUTER_ENDPOINT = "router-discovery"


def dynamo_lease(key: str) -> int | None:
    """The lease (= instance id) in the name of an engine's key among Dynamo's instances; None for another key."""
    if not key.startswith(DYNAMO_INSTANCES) or f"/{ROUTER_ENDPOINT}/" in key:
        return None
    try:
        return int(key.rpartition("/")[2], 16)
    except ValueError:
        return None
