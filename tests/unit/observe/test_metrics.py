"""What is counted of failovers, and when: once, and not before it is known."""

from __future__ import annotations

from dataclasses import replace

from gms_launch.cohort.failover import CAUSES, fold
from gms_launch.cohort.records import EventRecord, GmsStatus, NodeRecord, RunRecord
from gms_launch.control.mirror import Mirror
from gms_launch.observe.metrics import GIVEN_UP, SETTLED, UNASKED, Metrics
from gms_launch.observe.snapshot import as_known_here, build

T = 1000.0


def failover(at: float = T, life: tuple[int, int] = (0, 1), detail: str = "killed by SIGKILL") -> list[EventRecord]:
    """A whole one, without held requests, from `at` on."""
    victim, heir = life, (1 - life[0], 1)
    steps = [
        ("exit", victim, 0.0, {"role": "primary"}),
        ("lock", heir, 0.02, {}),
        ("dead", victim, 0.03, {}),
        ("awake", heir, 0.06, {}),
        ("fenced", victim, 0.07, {}),
        ("registered", heir, 0.1, {}),
        ("first_token", heir, 0.2, {}),
        ("parked", (victim[0], victim[1] + 1), 5.0, {}),
    ]
    return [EventRecord(at + after, 0, kind, *who, detail, data) for kind, who, after, data in steps]


def value(metrics: Metrics, name: str, **labels: str) -> float:
    found = metrics.registry.get_sample_value(f"gms_launch_{name}", labels)
    assert found is not None, (name, labels)
    return found


def test_a_failover_is_counted_once_however_often_somebody_asks() -> None:
    metrics = Metrics(0, 1, "reference")
    for event in failover():
        metrics.take(event)
    for now in (T + 0.5, T + 3, T + 4, T + 60, T + 61):
        metrics.settle(now)
        early = now < T + SETTLED
        assert value(metrics, "failovers_total", cause="exit") == (0 if early else 1)
    assert value(metrics, "failover_duration_seconds_count", step="first_token") == 1
    assert abs(value(metrics, "failover_duration_seconds_sum", step="first_token") - 0.2) < 1e-6
    assert value(metrics, "rearm_seconds_count") == 1
    assert value(metrics, "failover_duration_seconds_count", step="held") == 0
    # The next one of that slot is another, and a late word of the first is none.
    metrics.take(EventRecord(T + 0.04, 0, "exit", 0, 1, "killed by SIGKILL", {"role": "primary"}))
    for event in failover(T + 100, (0, 2), "switch-over"):
        metrics.take(EventRecord(event.time, 0, "kill" if event.kind == "exit" else event.kind, *_rest(event)))
    metrics.settle(T + 200)
    assert value(metrics, "failovers_total", cause="exit") == 1
    assert value(metrics, "failovers_total", cause="switch-over") == 1


def _rest(event: EventRecord) -> tuple[int, int, str, dict[str, str]]:
    return event.cohort_id, event.incarnation, event.detail, dict(event.data)


def test_requests_count_when_the_hold_is_over_and_what_is_not_known_is_no_number() -> None:
    metrics = Metrics(0, 1, "reference")
    first, *rest = failover()
    held = EventRecord(T + 0.01, 0, "held", 0, 1)
    for event in (first, held, *rest):
        metrics.take(event)
    metrics.settle(T + 30)
    assert value(metrics, "requests_held_total") == 0
    metrics.take(EventRecord(T + 31, 0, "hold_over", 0, 1, "", {"connections": 7, "moves": 9, "lost": None}))
    metrics.settle(T + 40)
    metrics.settle(T + 50)
    assert [value(metrics, f"requests_{w}_total") for w in ("held", "moved", "lost")] == [7, 9, 0]
    assert value(metrics, "holds_uncounted_total") == 1


def test_what_several_nodes_held_is_told_when_all_of_them_are_done() -> None:
    first, *rest = failover()
    held = [EventRecord(T + 0.01, n, "held", 0, 1) for n in (0, 1)]
    over = [
        EventRecord(T + 31 + n, n, "hold_over", 0, 1, "", {"connections": 3, "moves": 20 + n, "lost": n})
        for n in (0, 1)
    ]
    half, whole = fold([first, *held, *rest, over[0]])[0], fold([first, *held, *rest, *over])[0]
    assert not half.over and whole.over
    assert (whole.held, whole.moved, whole.lost) == (6, 21, 1), "the frontend's own counts are not added up"


def test_what_never_ends_and_what_nobody_asks_for_does_not_pile_up() -> None:
    asked: list[int] = []
    metrics = Metrics(0, 1, "reference", unasked=lambda: asked.append(1))
    for life in range(1, 301):
        for event in failover(T + 10 * life, (0, life))[:4]:  # no token came
            metrics.take(event)
    assert len(asked) == 1200 // UNASKED
    metrics.settle(T + 3010 + GIVEN_UP)
    assert value(metrics, "failovers_total", cause="exit") == 300
    assert metrics.waiting == 0


def test_only_the_leader_counts_failovers_and_every_node_its_own_starts() -> None:
    other = Metrics(1, 2, "reference")
    for event in failover():
        other.take(event)
    other.take(EventRecord(T, 1, "started", 1, 1))
    assert other.registry.get_sample_value("gms_launch_failovers_total", {"cause": "exit"}) is None
    assert value(other, "rank_starts_total", cohort="1") == 1
    assert other.registry.get_sample_value("gms_launch_events_total", {"kind": "exit"}) is None, "those are node 0's"
    assert b"gms_launch_build_info" in other.page()


def test_what_is_of_a_group_has_its_name_and_nothing_is_counted_for_another() -> None:
    metrics = Metrics(0, 4, "reference", {"a": 1, "b": 1})
    for event in failover():
        metrics.take(replace(event, group="a"))
    metrics.take(EventRecord(T, 0, "hold_over", 0, 1, "", {"connections": 3, "moves": 1, "lost": 2}, "a"))
    metrics.take(replace(failover()[0], kind="started", group="b"))
    metrics.settle(T + 60)
    for group, count in (("a", 1), ("b", 0)):
        assert value(metrics, "failovers_total", group=group, cause="exit") == count
        assert value(metrics, "failover_duration_seconds_count", group=group, step="fenced") == count
        assert value(metrics, "rearm_seconds_count", group=group) == count
        assert value(metrics, "requests_lost_total", group=group) == 2 * count
    assert value(metrics, "rank_starts_total", group="b", cohort="0") == 1

    def part(name: str, redundancy: str, leader: int) -> RunRecord:
        return RunRecord("r", "", "", "", 1.0, redundancy=redundancy, leader=leader, nnodes=1)

    run = Mirror("r")
    run.nodes = {0: NodeRecord(0, "h", "", "b", 1, 1), 1: NodeRecord(1, "i", "", "c", 1, 1)}
    own = Mirror("r", "a")
    gms = (GmsStatus(0, "GPU-0", "weights", "READY", allocated_bytes=7),)
    own.run, own.nodes = part("a", "none", 0), {0: NodeRecord(0, "h", "", "b", 1, 1, gms=gms, number=0)}
    said = {"a": own.run, "b": part("b", "full", 1)}
    metrics.look(as_known_here(build(run), [build(own)], said))
    assert value(metrics, "redundancy", group="b", state="full") == 1
    assert value(metrics, "redundancy", group="a", state="full") == 0
    assert value(metrics, "gms_bytes", group="a", device="0", tag="weights") == 7
    assert value(metrics, "slots_given_up", group="a") == 0
    assert metrics.registry.get_sample_value("gms_launch_slots_given_up", {"group": "b"}) is None, "another node's"
    del run.nodes[1]
    metrics.look(as_known_here(build(run), [build(own)], said))
    assert value(metrics, "redundancy", group="b", state="down") == 1, "its leader is lost, whatever it said last"


def test_every_cause_is_one_of_those_that_are_documented() -> None:
    details = {
        "killed by SIGKILL": "exit",
        "a rank of the same life ended: rank 1": "exit",
        "hung: process 12 has been stopped for 20 s (health_timeout)": "hung",
        "no token within 60 s of the lock (promotion_timeout)": "deadline",
        "node 1 (b) was lost": "node_lost",
        "this node is cut off from the leader": "node_lost",
        "GMS on node 0 (a) is gone: the group starts cold": "gms",
        "kill-primary": "kill-primary",
        "switch-over": "switch-over",
        "roll": "roll",
        "drill": "drill",
        "something new": "other",
    }
    for detail, kind in details.items():
        sign = EventRecord(T, 0, "exit" if detail.startswith("killed") else "kill", 0, 1, detail, {"role": "primary"})
        assert fold([sign])[0].kind == kind
    assert set(details.values()) == set(CAUSES)
