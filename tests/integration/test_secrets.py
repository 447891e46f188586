"""The password of a NATS of the user's own: used by Dynamo, and seen by nobody else."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.support import CommandLines, Deployment, NatsServer, eventually


@pytest.mark.parametrize("by", ["file", pytest.param("environment", marks=pytest.mark.slow)])
def test_the_password_of_a_nats_is_used_and_not_told(by: str, tmp_path: Path, fast_dir: Path, model: Path) -> None:
    with NatsServer(fast_dir) as nats:
        file = tmp_path / "settings.toml"
        file.write_text(f"nats_server = {json.dumps(nats.url)}\n")
        file.chmod(0o600)
        said = {"file": {"GMS_LAUNCH_CONFIG": str(file)}, "environment": {"NATS_SERVER": nats.url}}[by]
        run = Deployment(tmp_path / "home", model, "--event-plane=nats", **said)
        with CommandLines(nats.password) as lines, run:
            assert run.wait_full() and run.text()
            assert "nats" not in _services(run), "none of the run's own"
            assert eventually(lambda: "authentication error" not in nats.log.read_text() and _clients(nats))
            told = [run.cli("kill-primary")]
            assert eventually(run.text)
            told += [run.cli(verb, "--json") for verb in ("status", "timeline")]
            told += [run.cli("timeline", "--events"), run.cli("logs", "-n", "0", "agent"), run.cli("logs", "frontend")]
            told += [run.cli(verb, *run.flags) for verb in ("plan", "doctor")]
            told += [run.cli("plan", "--json", *run.flags), run.cli("up", *run.flags), run.cli("up", "-d", *run.flags)]
            told += [run.cli("submit", "--dry-run", "-N1", *run.flags)]
            places = [run.home, run.node_dir]
            for place in places:
                assert not [p for p in place.rglob("*") if p.is_file() and nats.password.encode() in p.read_bytes()]
            told += [run.cli("down"), run.cli("wait")]
        for done in told:
            assert "Traceback" not in done.stderr and nats.password not in done.stdout + done.stderr, done.args
        plan = json.loads(told[-6].stdout)
        env = next(p["env"] for p in plan["processes"] if p["name"] == "frontend")
        assert env["NATS_SERVER"] == f"nats://127.0.0.1:{nats.port}" and env["NATS_AUTH_USERNAME"] == nats.user
        assert env["NATS_AUTH_PASSWORD"] == "<hidden>"
        assert not lines.seen
        assert run.run_file["settings"]["nats_server"] == f"nats://<hidden>@127.0.0.1:{nats.port}"
        assert not [p for p in run.home.rglob("*") if p.is_file() and nats.password.encode() in p.read_bytes()]


def _clients(nats: NatsServer) -> bool:
    return "Client connection created" in nats.log.read_text()


def _services(run: Deployment) -> list[str]:
    return [s["name"] for s in run.status()["nodes"][0]["services"]]
