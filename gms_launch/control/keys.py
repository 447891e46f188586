"""Names of the keys in etcd, under `/gms-launch/<run>/`, and how to read them back."""

from __future__ import annotations

ROOT = "/gms-launch/"


class Keys:
    """The keys of one run."""

    def __init__(self, run: str) -> None:
        self.prefix = f"{ROOT}{run}/"
        self.run = f"{self.prefix}run"
        self.nodes = f"{self.prefix}nodes/"
        self.desired = f"{self.prefix}desired/cohorts/"
        self.ranks = f"{self.prefix}ranks/"
        self.events = f"{self.prefix}events/"
        self.commands = f"{self.prefix}commands/"
        self.refusals = f"{self.prefix}refusals/"

    def node(self, node_rank: int) -> str:
        return f"{self.nodes}{node_rank}"

    def cohort(self, cohort_id: int) -> str:
        return f"{self.desired}{cohort_id}"

    def rank(self, cohort_id: int, node_rank: int) -> str:
        return f"{self.ranks}{cohort_id}/{node_rank}"

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


#: Where Dynamo registers a serving endpoint: v1/instances/<namespace>/<component>/<endpoint>/<lease in hex>.
DYNAMO_INSTANCES = "v1/instances/"


def dynamo_lease(key: str) -> int | None:
    """The lease (= instance id) in the name of one of Dynamo's instance keys; None for another key."""
    if not key.startswith(DYNAMO_INSTANCES):
        return None
    try:
        return int(key.rpartition("/")[2], 16)
    except ValueError:
        return None
