"""`gms-launch plan`: what `up` would run here. Starts nothing, writes nothing, binds nothing."""

from __future__ import annotations

import json
import shlex

from gms_launch import ports, topology
from gms_launch.config import Settings
from gms_launch.plan import HIDDEN, Layout
from gms_launch.rundir import Credentials, NodeDir, RunDir


def layout(settings: Settings) -> Layout:
    """The layout with the wanted ports: `up` moves those that are taken, unless they were fixed."""
    run = settings.run_id or "RUN"
    return Layout(
        run=run,
        settings=settings,
        topology=topology.discover(settings),
        ports=ports.layout(settings, lambda _: True),
        credentials=Credentials(HIDDEN, "dynamo", HIDDEN, "dynamo", HIDDEN),
        run_dir=RunDir.of(run),
        node_dir=NodeDir.of(run, settings.gms_socket_dir, settings.node_rank),
    )


def main(settings: Settings, as_json: bool) -> None:
    found = layout(settings)
    found.check()
    data = found.to_json()
    if as_json:
        print(json.dumps(data, indent=1))
        return
    print(
        f"run {data['run']}, node {data['node_rank']} of {data['nnodes']}, "
        f"engine {data['engine']}, GMS {data['gms_server']}"
    )
    print(f"run directory {data['run_dir']}, node-local directory {data['node_dir']}, frontend {data['frontend_url']}")
    print("ports: " + ", ".join(f"{k} {v}" for k, v in data["ports"].items()))
    for process in data["processes"]:
        print(f"\n# {process['name']}")
        for key, value in process["env"].items():
            print(f"unset {key}" if value is None else f"export {key}={shlex.quote(value)}")
        print(shlex.join(process["argv"]))
