"""What an agent serves to Prometheus: which metrics there are, and what each is made of.

`take` and `look` are called on the agent's loop and only keep what they are given; everything is worked out by `page`,
when somebody asks, in the thread that serves it. So metrics that nobody scrapes cost next to nothing.

Each agent serves what it knows at first hand. What is of its own node (services, GMS, starts, events) is summed over
nodes; what is of the run (redundancy, failovers, requests) only the leader serves, so that no sum counts it twice. In a
run of groups what is of one has the label `group`. Counts begin with the agent. Which run and node it is, is for the
scraper's labels (`Reporter.targets`).
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TypeVar

import prometheus_client
from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric

from gms_launch import __version__
from gms_launch.cohort.failover import CAUSES, STEPS, Failover, fold
from gms_launch.cohort.model import Redundancy
from gms_launch.cohort.records import EventRecord, NodeRecord
from gms_launch.observe.snapshot import Snapshot
from gms_launch.process import clock

#: The text format that every Prometheus reads.
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
#: Kinds of events that failovers are made of (`cohort.failover`).
FAILOVERS = frozenset(
    {"kill", "exit", "dead", "fenced", "held", "released", "hold_over", "lock", "awake", "registered", "first_token"}
    | {"parked", "stood_still"}
)
#: A step counts when it is so old: other nodes' events come later than ours, and may be earlier (seconds).
SETTLED = 2.0
#: A failover that is not complete by then never will be (seconds).
GIVEN_UP = 3600.0
#: Of more groups those metrics appear with their first count of which each group has many.
MANY = 64
#: Failovers that are remembered as counted.
REMEMBERED = 1000
#: So many events of failovers that nobody has asked about are worked through unasked.
UNASKED = 500

STEP_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
REARM_SECONDS = (1.0, 2.5, 5.0, 10.0, 20.0, 30.0, 45.0, 60.0, 90.0, 120.0, 300.0, 600.0, 1800.0)

M = TypeVar("M", Counter, Histogram)


class Metrics:
    """The metrics of one agent, of node `node_rank` of `nnodes`. `groups`: how many nodes each has; empty without any.

    `lease_left` says for how many seconds this node's lease is still good, None before there is one. `unasked` is
    called when `settle` should be, soon and off the loop.
    """

    def __init__(
        self,
        node_rank: int,
        nnodes: int,
        engine: str,
        groups: Mapping[str, int] | None = None,
        lease_left: Callable[[], float | None] = lambda: None,
        unasked: Callable[[], None] = lambda: None,
    ) -> None:
        prometheus_client.disable_created_metrics()
        self._node_rank, self._nnodes, self._engine = node_rank, nnodes, engine
        self._lease_left, self._unasked = lease_left, unasked
        self._lock = threading.Lock()
        self._events: deque[EventRecord] = deque()
        self._taken = 0
        self._counted: dict[tuple[str, tuple[int, int]], set[str]] = {}
        self._sizes = groups or {}
        self._group = ("group",) if groups else ()
        self._shot: Snapshot | None = None
        self.registry = CollectorRegistry()
        self._events_total = self._counter("events", "Events that this agent has told, by kind.", "kind")
        self._starts = self._counter("rank_starts", "Ranks started on this node.", *self._group, "cohort")
        if node_rank == 0:
            self._of_the_run()
        ProcessCollector(registry=self.registry)
        self.registry.register(self)

    def _counter(self, name: str, meaning: str, *labels: str) -> Counter:
        return Counter(f"gms_launch_{name}", meaning, labels, registry=self.registry)

    def _of_the_run(self) -> None:
        counter, own, group = self._counter, self.registry, self._group
        self._failovers = counter("failovers", "Primaries that died, by what was first seen of it.", *group, "cause")
        self._steps = Histogram(
            "gms_launch_failover_duration_seconds",
            "From the first sign of a primary's death to each step of the failover.",
            [*group, "step"],
            registry=own,
            buckets=STEP_SECONDS,
        )
        self._rearm = Histogram(
            "gms_launch_rearm_seconds",
            "From the first sign of a primary's death to a fresh shadow parked in its slot.",
            group,
            registry=own,
            buckets=REARM_SECONDS,
        )
        self._held = counter("requests_held", "Connections that waited for a successor of a dead primary.", *group)
        moves = "Moves of requests to a successor, as far as the frontend counts them."
        self._moved = counter("requests_moved", moves, *group)
        lost = "Requests that failed meanwhile, as far as the frontend counts them."
        self._lost = counter("requests_lost", lost, *group)
        unknown = "Failovers with held requests of which the frontend could not tell what became of them."
        self._unknown = counter("holds_uncounted", unknown, *group)
        # A counter that appears with its first count has no increase.
        for of in [(name,) for name in self._sizes] if self._group else [()]:
            for cause in CAUSES:
                self._failovers.labels(*of, cause)
            if len(self._sizes) > MANY:
                continue
            for step in STEPS:
                if step != "rearmed":
                    self._steps.labels(*of, step)
            for each in (self._rearm, self._held, self._moved, self._lost, self._unknown) if of else ():
                each.labels(*of)

    # -- on the agent's loop ----------------------------------------------------------------------------------------

    def take(self, event: EventRecord) -> None:
        """An event of this node, or on the leader of any."""
        if event.node_rank == self._node_rank:
            self._events_total.labels(event.kind).inc()
            if event.kind == "started":
                self._starts.labels(*self._of(event.group), str(event.cohort_id)).inc()
        if self._node_rank == 0 and event.kind in FAILOVERS:
            with self._lock:
                self._events.append(event)
                self._taken += 1
                asked = self._taken % UNASKED != 0
            if not asked:
                self._unasked()

    def look(self, shot: Snapshot) -> None:
        """The state of the run as this node sees it now; of groups as far as it knows them."""
        self._shot = shot

    def _of(self, group: str) -> tuple[str, ...]:
        """The value of the label `group`, where there is one."""
        return (group,) if self._group else ()

    # -- in the thread that serves ----------------------------------------------------------------------------------

    def page(self) -> bytes:
        """All of it as text."""
        self.settle()
        text: bytes = generate_latest(self.registry)
        return text

    @property
    def waiting(self) -> int:
        """Events that are kept for what is still to come of their failovers."""
        return len(self._events)

    def settle(self, now: float | None = None) -> None:
        """Count what has become known of failovers by `now` (Unix seconds)."""
        moment = clock.now() if now is None else now
        with self._lock:
            events = list(self._events)
        keep = moment - GIVEN_UP
        found = fold(events, self._nnodes, self._sizes)
        over = [self._count(failover, moment) for failover in found]
        if all(over):
            keep = moment - SETTLED
        else:
            first = next(f for f, done in zip(found, over, strict=True) if not done)
            keep = max(keep, first.time - SETTLED)
        while len(self._counted) > REMEMBERED:
            del self._counted[next(iter(self._counted))]
        with self._lock:
            self._events = deque(e for e in self._events if e.time >= keep)

    def _count(self, found: Failover, now: float) -> bool:
        """Count what is new of a failover; True when there is no more to come."""
        counted, group = self._counted.setdefault((found.group, found.victim), set()), self._of(found.group)

        def of(metric: M) -> M:
            return metric.labels(*group) if group else metric

        if now - found.time >= SETTLED and "failover" not in counted:
            counted.add("failover")
            self._failovers.labels(*group, found.kind).inc()
        for step, after in found.steps.items():
            if step not in counted and now - (found.time + after) >= SETTLED:
                counted.add(step)
                (of(self._rearm) if step == "rearmed" else self._steps.labels(*group, step)).observe(after)
        if found.held is not None and "requests" not in counted:
            counted.add("requests")
            of(self._held).inc(found.held)
            of(self._moved).inc(found.moved or 0)
            of(self._lost).inc(found.lost or 0)
            if found.moved is None or found.lost is None:
                of(self._unknown).inc()
        whole = found.complete and found.over and "fenced" in found.steps and set(found.steps) <= counted
        return whole or now - found.time >= GIVEN_UP

    def collect(self) -> Iterator[Metric]:
        """What is so at this moment; for the registry."""
        yield _gauge("build_info", "1, with the version.", {"version": __version__, "engine": self._engine}, 1.0)
        if (left := self._lease_left()) is not None:
            yield _gauge(
                "lease_seconds", "Until this node takes itself for cut off unless its lease is renewed.", {}, left
            )
        if (shot := self._shot) is None:
            return
        if self._node_rank == 0:
            yield from self._run(shot)
        led = [g for g in shot.groups if g.leader == self._node_rank] if self._group else [shot] * (not self._node_rank)
        given_up = self._gauges("slots_given_up", "Cohorts that are not started again for now.")
        for one in led:
            given_up.add_metric(self._of(one.group), float(sum(c.given_up for c in one.cohorts)))
        if led:
            yield given_up
        own = next((n for n in shot.nodes if n.node_rank == self._node_rank), None)
        if own is not None:
            parts = [(g.group, n) for g in shot.groups for n in g.nodes if n.number == self._node_rank]
            yield from self._node(own, parts or [("", own)])

    def _run(self, shot: Snapshot) -> Iterator[Metric]:
        states = self._gauges("redundancy", "How much can fail before nobody serves: 1 for the state.", "state")
        for one in shot.groups if self._group else (shot,):
            for state in Redundancy:
                states.add_metric([*self._of(one.group), state.value], float(state is one.redundancy))
        yield states
        yield _gauge("starting", "1 until the run has served for the first time.", {}, float(shot.starting))
        yield _gauge("nodes", "Nodes of the run.", {}, float(shot.nnodes))
        yield _gauge("nodes_missing", "Nodes without a living record.", {}, float(len(shot.missing)))
        alarms = GaugeMetricFamily(
            "gms_launch_etcd_alarm", "1 while etcd has raised that alarm, and refuses writes.", labels=["alarm"]
        )
        for alarm in sorted({"NOSPACE", "CORRUPT", *shot.alarms}):
            alarms.add_metric([alarm], float(alarm in shot.alarms))
        yield alarms

    def _gauges(self, name: str, meaning: str, *labels: str) -> GaugeMetricFamily:
        """A family of what is of a group, where there are some."""
        return GaugeMetricFamily(f"gms_launch_{name}", meaning, labels=[*self._group, *labels])

    def _node(self, node: NodeRecord, parts: Sequence[tuple[str, NodeRecord]]) -> Iterator[Metric]:
        """`parts` are the groups that this node is in, each with its record there."""
        up = GaugeMetricFamily("gms_launch_service_up", "1 while a service is ready.", labels=["service"])
        for service in node.services:
            if not service.name.rpartition(".")[2].startswith("warm-"):  # nobody's page if it is not
                up.add_metric([service.name], float(service.state == "ready"))
        yield up
        gms = self._gauges("gms_bytes", "Memory that GMS owns, at the last look.", "device", "tag")
        gpu = self._gauges("gpu_memory_bytes", "Memory of a GPU by NVML, at the last look.", "gpu", "state")
        for group, part in parts:
            for g in part.gms:
                if g.allocated_bytes is not None:
                    gms.add_metric([*self._of(group), str(g.device), g.tag], float(g.allocated_bytes))
            for card in part.gpu_memory:
                gpu.add_metric([*self._of(group), card.uuid, "used"], float(card.used))
                gpu.add_metric([*self._of(group), card.uuid, "free"], float(card.total - card.used))
        yield gms
        yield gpu
        dropped = GaugeMetricFamily(
            "gms_launch_writing_troubled", "1 while a directory does not take what is written.", labels=["place"]
        )
        for place in node.writing:
            dropped.add_metric([place.name], float(bool(place.state)))
        yield dropped


def _gauge(name: str, meaning: str, labels: dict[str, str], value: float) -> Metric:
    family = GaugeMetricFamily(f"gms_launch_{name}", meaning, labels=list(labels))
    family.add_metric(list(labels.values()), value)
    return family
