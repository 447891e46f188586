"""`gms-launch status`."""

from __future__ import annotations

import json

from gms_launch import rundir
from gms_launch.observe import contact


def main(run: str | None, watch: bool, as_json: bool) -> None:
    directory, found = rundir.find(run)
    door = contact.gateway(directory, found)
    _, shot = contact.read(directory, door)
    if as_json and not watch:
        print(json.dumps(shot.to_json(), indent=1))
        return
    from rich.console import Console

    from gms_launch.observe import views

    if not watch:
        Console().print(views.status(shot))
        return
    import time

    from rich.live import Live

    with Live(views.status(shot), refresh_per_second=4) as live:
        while True:
            time.sleep(0.5)  # a view for people; scripts use --json
            _, shot = contact.read(directory, door)
            live.update(views.status(shot))
