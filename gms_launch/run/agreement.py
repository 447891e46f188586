"""In which settings the nodes of a run must agree, and whether two of them do. Pure."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from gms_launch.settings.declared import Settings

#: Settings in which the nodes of a run may differ.
_OWN = frozenset(
    {"node_rank", "leader_addr", "interface", "hosts", "gms_socket_dir", "etcd_bin", "nats_bin", "python"}
    | {"etcd_ca", "etcd_cert", "etcd_key", "nats_ca", "nats_cert", "nats_key"}  # the leader's are used
    | {"virtual_gpus", "run_id", "kill_wait", "cache_dir", "haproxy_bin", "metrics_host", "metrics_port"}
)


def _shared(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in settings.items() if k not in _OWN}


def settings_digest(settings: Settings) -> str:
    """A digest of what all nodes of a run must agree on."""
    return hashlib.sha256(json.dumps(_shared(settings.to_json()), sort_keys=True).encode()).hexdigest()


def settings_differences(settings: Settings, leaders: Mapping[str, Any]) -> list[str]:
    """The settings in which this node differs from the leader's (`Settings.to_json`), for people."""
    mine, theirs = json.loads(json.dumps(_shared(settings.to_json()))), _shared(leaders)  # as run.json has them
    return [f"{k} is {mine[k]!r} here and {theirs[k]!r} there" for k in mine if k in theirs and mine[k] != theirs[k]]
