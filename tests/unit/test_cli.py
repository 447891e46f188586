"""What the command line refuses before anything is started."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from tests.support import gms_launch


def run(tmp_path: Path, *args: str, **environ: str) -> tuple[int, str]:
    env = {k: v for k, v in os.environ.items() if not k.startswith(("GMS_LAUNCH_", "SLURM_"))}
    done = gms_launch(*args, env=env | {"GMS_LAUNCH_HOME": str(tmp_path / "home")} | environ)
    assert not (tmp_path / "home").exists(), "nothing was begun"
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("args", "environ", "says"),
    [
        (["up"], {}, "no model was given"),
        (["up", "--engine", "reference", "--model", "/nowhere"], {}, "not a model directory"),
        (["up", "--frobnicate"], {}, "No such option"),
        (["up", "--tp", "many"], {}, "tp (from --tp): 'many'"),
        (["up"], {"GMS_LAUNCH_FROBNICATE": "1"}, "unknown setting GMS_LAUNCH_FROBNICATE"),
        (["plan", "--config", "/nowhere.toml"], {}, "does not exist"),
    ],
)
def test_wrong_settings_end_with_code_2(tmp_path: Path, args: list[str], environ: dict[str, str], says: str) -> None:
    code, text = run(tmp_path, *args, **environ)
    assert code == 2, text
    assert says in text


def test_missing_binary_names_debians_package(tmp_path: Path, model: Path) -> None:
    args = ["up", "--engine", "reference", "--model", str(model)]
    code, text = run(tmp_path, *args, "--etcd-bin", "/no/etcd")
    assert code == 2 and "etcd_bin '/no/etcd' is not an executable file" in text
    from gms_launch.errors import UsageError
    from gms_launch.services.base import find_binary

    with pytest.raises(UsageError, match="apt-get install etcd-server"):
        find_binary("etcd_bin", "", "etcd-that-is-not-there", "etcd-server")


def test_the_real_engine_is_not_replaced_silently(tmp_path: Path, model: Path) -> None:
    code, text = run(tmp_path, "up", "--model", str(model))
    assert code == 2
    assert "--engine vllm needs" in text and "--engine reference" in text


def test_a_fixed_port_that_is_taken(tmp_path: Path, model: Path) -> None:
    import socket

    with socket.socket() as busy:
        busy.bind(("127.0.0.1", 0))
        busy.listen()
        port = str(busy.getsockname()[1])
        code, text = run(tmp_path, "up", "--engine", "reference", "--model", str(model), "--frontend-port", port)
    assert code == 2
    assert f"frontend_port {port} is in use on this node (from --frontend-port)" in text


def test_plan_and_doctor_start_nothing(tmp_path: Path, model: Path) -> None:
    code, text = run(tmp_path, "plan", "--engine", "reference", "--model", str(model))
    assert code == 0
    assert "-m gms_launch.engines.reference" in text and "<hidden>" in text


def test_no_run(tmp_path: Path) -> None:
    for verb in ("status", "kill-primary", "down", "timeline", "logs"):
        code, text = run(tmp_path, verb)
        assert code == 5, text
        assert "gms-launch up" in text


def test_status_imports_nothing_heavy() -> None:
    import subprocess
    import sys

    code = (
        "import sys; import gms_launch.cli.main, gms_launch.cli.status\n"
        "print(*sorted({'grpc', 'etcd3', 'paramiko', 'cuda', 'numpy', 'rich.live'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def test_a_plan_for_every_node_from_a_machine_that_is_none_of_them(tmp_path: Path, model: Path) -> None:
    env = {k: v for k, v in os.environ.items() if not k.startswith(("GMS_LAUNCH_", "SLURM_"))}
    env |= {"GMS_LAUNCH_HOME": str(tmp_path)}
    args = ["--engine", "reference", "--model", str(model), "--nnodes", "2", "--leader-addr", "10.1.2.3", "--json"]
    done = gms_launch("plan", *args, env=env)
    assert done.returncode == 0, done.stderr
    leader, other = json.loads(done.stdout)["nodes"]
    assert [p["name"] for p in leader["processes"]] == [
        *("gms-0", "etcd", "nats", "frontend", "cohort 0 rank 0", "cohort 1 rank 0")
    ]
    assert [p["name"] for p in other["processes"]] == ["gms-0", "cohort 0 rank 1", "cohort 1 rank 1"]
    rank = other["processes"][1]["argv"]
    assert "--headless" in rank and rank[rank.index("--master-addr") + 1] == "10.1.2.3"
    one = gms_launch("plan", *args, "--node-rank", "1", env=env)
    assert json.loads(one.stdout) == other
    assert not list(tmp_path.iterdir())


def test_the_proof_of_a_node_is_what_it_says_and_not_how_the_way_there_ended() -> None:
    from gms_launch.cli.down import proof_in

    assert proof_in('{"killed": 0}\n') == 0
    assert proof_in('srun: job 7 queued\n{"killed": 3}\n') == 3
    assert proof_in("") is None and proof_in('{"killed"') is None and proof_in("[1]\n7\n") is None
