"""What settings must not say together: each rule with the reason, as one message. Pure.

Types, ranges and choices of a single setting are `resolve.parse`'s business. docs/failure-policy.md lists the rules
between deadlines.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from gms_launch.errors import UsageError
from gms_launch.settings import arguments

if TYPE_CHECKING:
    from gms_launch.settings.declared import Settings

RUN_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,19}\Z")


def longest_liveness(lease_ttl: float) -> float:
    """Seconds that etcd may be silent before its restart, if Dynamo's leases of `lease_ttl` seconds are to outlive it.

    Dynamo sends a heartbeat when half of a lease is over (runtime's etcd/lease.rs), so half of one may be left when
    etcd falls silent. Noticing takes half as long again in the worst case, the restart a second.
    """
    return (lease_ttl / 2 - 1) / 1.5


def check(s: Settings) -> None:
    """Raise `UsageError` for the first contradiction between settings."""
    if s.run_id and not RUN_ID.match(s.run_id):
        raise UsageError(
            f"run_id {s.run_id!r}: use 1-20 letters, digits, dots, dashes or underscores, starting with a letter "
            "or digit (it becomes part of socket paths, which are short)"
        )
    if s.node_rank >= s.nnodes:
        raise UsageError(f"node_rank {s.node_rank} does not exist with nnodes {s.nnodes}: ranks count from 0")
    if s.world % s.nnodes:
        times = f" times pp {s.pp}" if s.pp > 1 else ""
        raise UsageError(f"tp {s.tp}{times} cannot be spread evenly over {s.nnodes} nodes")
    if not s.nats and s.event_plane == "nats":
        raise UsageError("--event-plane nats needs NATS, and --no-nats switches it off")
    if not s.nats and s.nats_server:
        raise UsageError("--nats-server names a NATS to use, and --no-nats switches NATS off")
    if s.restart_backoff > s.restart_backoff_max:
        raise UsageError(
            f"restart_backoff {s.restart_backoff:g} s is longer than restart_backoff_max {s.restart_backoff_max:g} s"
        )
    if s.health_timeout < 2 * s.health_interval:
        raise UsageError(
            f"health_timeout {s.health_timeout:g} s is shorter than two health_intervals ({s.health_interval:g} s): "
            "one late answer would look like a hang"
        )
    if s.canary_timeout < 2 * s.canary_interval:
        raise UsageError(
            f"canary_timeout {s.canary_timeout:g} s is shorter than two canary_intervals ({s.canary_interval:g} s): "
            "one unanswered request would look like a hang"
        )
    if s.service_liveness > longest_liveness(s.dynamo_lease_ttl):
        raise UsageError(
            f"service_liveness {s.service_liveness:g} s is more than the {longest_liveness(s.dynamo_lease_ttl):.1f} s "
            f"that dynamo_lease_ttl {s.dynamo_lease_ttl:g} s leaves: Dynamo's processes would exit before a silent etcd"
            " could be back"
        )
    if s.lease_ttl < 2:
        raise UsageError(f"lease_ttl {s.lease_ttl:g} s: below 2 s an ordinary pause would look like a lost node")
    if s.kill_wait < 2:
        raise UsageError(f"kill_wait {s.kill_wait:g} s: an orderly stop of engines, services and etcd needs 2 s")
    if s.was_set("stop_timeout") and s.stop_timeout > 0.5 * s.kill_wait:
        raise UsageError(
            f"stop_timeout {s.stop_timeout:g} s is more than half of kill_wait {s.kill_wait:g} s "
            f"(from {s.sources.get('kill_wait', 'the default')}): what follows the engines would be cut off"
        )
    if s.node_wait < 2 * s.lease_ttl:
        raise UsageError(
            f"node_wait {s.node_wait:g} s is shorter than two leases (lease_ttl {s.lease_ttl:g} s): "
            "a node could not be back before it is given up"
        )
    if s.hosts and s.was_set("node_rank"):
        raise UsageError("--hosts starts every agent itself; node_rank (from " + s.sources["node_rank"] + ") names one")
    if s.dynamo_lease_ttl < 5:
        raise UsageError(
            f"dynamo_lease_ttl {s.dynamo_lease_ttl:g} s: every Dynamo process exits when etcd is away for longer, "
            "and restarting etcd takes up to 2 s; use 5 or more"
        )
    fixed = [n for n in ("frontend_port", "etcd_port", "etcd_peer_port", "nats_port") if s.was_set(n)]
    seen: dict[int, str] = {}
    for name in fixed:
        port = getattr(s, name)
        if port in seen:
            raise UsageError(f"{name} and {seen[port]} are both {port}")
        seen[port] = name
    if s.engine_file and s.engine != "command":
        raise UsageError(f"--engine-file describes the engine `command`, and --engine is {s.engine}")
    if s.engine != "command" and (wrong := arguments.problem(s.engine_args)):
        raise UsageError(wrong)
