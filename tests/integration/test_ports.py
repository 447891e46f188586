"""What a run on one node listens on is what docs/security.md says, from its start over a failover, and no more."""

from __future__ import annotations

import threading
from pathlib import Path

from tests import listening
from tests.listening import Row
from tests.support import Deployment, eventually


def test_a_run_listens_on_what_the_page_says_and_on_nothing_else(tmp_path: Path, model: Path) -> None:
    run = Deployment(tmp_path / "home", model)
    seen: set[Row] = set()
    over = threading.Event()

    def watch() -> None:
        while not over.wait(0.2):
            if (tmp_path / "home" / run.run / "run.json").exists() and (ports := run.run_file.get("ports")):
                seen.update(listening.of_run(run.run, ports)[0])

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        with run:
            for _ in range(2):
                eventually(
                    lambda: listening.of_run(run.run, run.run_file["ports"])[0] == listening.documented(2),
                    what=lambda: str(listening.of_run(run.run, run.run_file["ports"])),
                )
                assert run.cli("kill-primary").returncode == 0
                run.wait_full()
            # The dead one's successor listens as it did.
            eventually(lambda: listening.of_run(run.run, run.run_file["ports"])[0] == listening.documented(2))
    finally:
        over.set()
        watcher.join()
    assert seen == listening.documented(2), "nor did it in between"
    assert all(row.where != "network" for row in seen), "on one node nobody is reached from another"
