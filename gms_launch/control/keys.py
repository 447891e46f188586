"""Names of the keys in etcd, under `/gms-launch/<run>/`, and how to read them back."""

from __future__ import annotations

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
    """The keys of one run."""

    def __init__(self, run: str) -> None:
        self.prefix = f"{ROOT}{run}/"
        self.run = f"{self.prefix}run"
        self.nodes = f"{self.prefix}nodes/"
        self.desired = f"{self.prefix}desired/cohorts/"
        self.ranks = f"{self.prefix}ranks/"
        self.ended = f"{self.prefix}ended/"
        self.events = f"{self.prefix}events/"
        self.commands = f"{self.prefix}commands/"
        self.peers = f"{self.prefix}peers"
        self.refusals = f"{self.prefix}refusals/"

    def node(self, node_rank: int) -> str:
        return f"{self.nodes}{node_rank}"

    def cohort(self, cohort_id: int) -> str:
        return f"{self.desired}{cohort_id}"

    def rank(self, cohort_id: int, node_rank: int) -> str:
        return f"{self.ranks}{cohort_id}/{node_rank}"

    def life_ended(self, cohort_id: int, incarnation: int) -> str:
        return f"{self.ended}{cohort_id}/{incarnation}"

    def followed(self, cohorts: int) -> list[Range]:
        """What every agent follows, and not only the leader: as little as the rest of the run has to know at once.

        That is what is commanded and wanted, which lives have ended, how the cohorts' leader ranks are, and the run.
        Were it all records of all ranks, the messages of a failover would grow with the square of the nodes.
        """
        leaders = [self.rank(cohort_id, 0) for cohort_id in range(cohorts)]
        return [prefix(p) for p in (self.commands, self.desired, self.ended)] + [
            Range(k) for k in (*leaders, self.run, self.peers)
        ]

    def event(self, time_ns: int, node_rank: int, serial: int) -> str:
        """Sorts by time; `serial` keeps two events of a node in one nanosecond apart."""
        return f"{self.events}{time_ns:020d}-{node_rank:04d}-{serial:06d}"

    def command(self, uuid: str) -> str:
        return f"{self.commands}{uuid}"

    def result(self, uuid: str) -> str:
        return f"{self.commands}{uuid}/result"

    def refusal(self, who: str) -> str:
        """What an agent that may not take its place leaves for the leader."""
        return f"{self.refusals}{who}"


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
