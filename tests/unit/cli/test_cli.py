"""What the command line refuses before anything is started."""

from __future__ import annotations

import json
import os
import shutil
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


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["kill-primary", "--scope", "rank:١"], "expected group, leader or rank:N"),
        (["kill-primary", "--timeout", "nan"], "'nan' is not a number"),
        (["logs", "-n", "-3"], "-3 is below 0"),
        (["timeline", "--json", "--html", "x.html"], "--json and --html are two ways"),
        (["up", "--engine", "reference", "--model", "Qwen/Qwen3-0.6B"], "names of the hub are not taken"),
        (["up", "--model", "Qwen/Qwen3-0.6B"], "hf download Qwen/Qwen3-0.6B --local-dir DIR"),
    ],
)
def test_what_is_typed_wrong_is_said(tmp_path: Path, args: list[str], says: str) -> None:
    code, text = run(tmp_path, *args)
    assert code == 2 and says in text, text


def test_too_many_gpus_are_named_by_the_setting_that_asks_for_them(tmp_path: Path, model: Path) -> None:
    code, text = run(tmp_path, "up", "--engine", "reference", "--model", str(model), "--tp", "3", "--virtual-gpus", "1")
    assert code == 2 and "tp 3 (from --tp) over 1 node is 3 GPUs on each; this node has 1" in text, text


def test_a_broken_engine_file_is_called_one(tmp_path: Path, model: Path) -> None:
    file = tmp_path / "engine.toml"
    file.write_text("[engine\n")
    code, text = run(tmp_path, "up", "--model", str(model), "--engine", "command", "--engine-file", str(file))
    assert code == 2 and f"engine file {file} is not valid TOML" in text, text


def test_a_fault_that_there_is_not_is_refused(tmp_path: Path) -> None:
    from gms_launch.engines.reference.args import Knobs

    assert Knobs(fault="0.1:parked=hang,*.*:waking").fault == "0.1:parked=hang,*.*:waking"
    for fault in ("0.1:parked=crsh", "0.1:praked=crash", "0.1"):
        with pytest.raises(ValueError, match="a kind of crash, hang, error"):
            Knobs(fault=fault)


def test_timeline_writes_a_page_that_has_the_failovers(tmp_path: Path) -> None:
    from gms_launch.cohort.records import EventRecord

    directory = tmp_path / "home" / "r1"
    directory.mkdir(parents=True)
    ended = {"run": "r1", "version": "0", "created": 1.0, "leader_host": "a", "leader_boot_id": "", "agent_pid": 1}
    (directory / "run.json").write_text(
        json.dumps(ended | {"agent_start": 1, "node_dir": "/x", "etcd_endpoints": [], "ended": 2.0})
    )
    events = [
        EventRecord(100.0, 0, "exit", 0, 1, "killed by SIGKILL", {"role": "primary"}),
        EventRecord(100.2, 0, "lock", 1, 1),
        EventRecord(100.3, 0, "first_token", 1, 1),
    ]
    (directory / "events.jsonl").write_bytes(b"".join(e.encode() + b"\n" for e in events))
    env = {k: v for k, v in os.environ.items() if not k.startswith(("GMS_LAUNCH_", "SLURM_"))}
    env |= {"GMS_LAUNCH_HOME": str(tmp_path / "home")}
    for more, shown in ([], "first_token"), (["--events"], "killed by SIGKILL"):
        page = tmp_path / "page.html"
        done = gms_launch("timeline", "--run", "r1", "--html", str(page), *more, env=env)
        assert done.returncode == 0 and str(page) in done.stdout, done.stderr
        text = page.read_text()
        assert text.startswith("<!DOCTYPE html>") and shown in text
        assert page.stat().st_mode & 0o777 == 0o600, "other users shall not read of a run"
    done = gms_launch("timeline", "--run", "r1", "--html", str(tmp_path / "no" / "page.html"), env=env)
    assert done.returncode == 2 and "cannot be written" in done.stderr


def test_groups_are_drawn(tmp_path: Path, model: Path) -> None:
    config = tmp_path / "s.toml"
    config.write_text(
        f'engine = "reference"\nmodel = "{model}"\nnnodes = 3\nleader_addr = "10.0.0.1"\nvirtual_gpus = 4\n'
        '[[group]]\nname = "big"\nnodes = 2\n[[group]]\nname = "small"\ncount = 2\ngpus = 2\n'
    )
    code, text = run(tmp_path, "plan", "--config", str(config))
    assert code == 0, text
    drawn, *nodes = text.split("\n\nrun RUN, ")
    assert [line.split()[:4] for line in drawn.splitlines()[1:]] == [
        ["node", "0", "GPUs", "0-3"],
        ["node", "1", "GPUs", "0-3"],
        ["node", "2", "GPUs", "0-1"],
        ["GPUs", "2-3", "small-1", "leads,"],
        ["etcd", "on", "node", "0,"],
    ]
    assert [node.partition("\n")[0] for node in nodes] == ["node 0 of 3", "node 1 of 3", "node 2 of 3"]
    assert nodes[1].count("-m gms_launch.engines.reference") == 2 and nodes[2].count("\n# small-1.cohort ") == 2
    code, text = run(tmp_path, "plan", "--config", str(config), "--json")
    assert [(g["name"], g["leader"], g["nodes"], g["gpus"]) for g in json.loads(text)["groups"]] == [
        ("big", 0, [0, 1], [0, 1, 2, 3]),
        ("small-0", 2, [2], [0, 1]),
        ("small-1", 2, [2], [2, 3]),
    ]
    first, second, third = json.loads(text)["nodes"]
    ranks = ["big.cohort 0 rank 0", "big.cohort 1 rank 0"]
    gms = [f"big.gms-{k}" for k in range(4)]
    assert [p["name"] for p in first["processes"]] == [*gms, "etcd", "nats", "frontend", *ranks]
    headless = second["processes"][-1]
    assert headless["name"] == "big.cohort 1 rank 1" and "--headless" in headless["argv"]
    assert headless["argv"][headless["argv"].index("--master-addr") + 1] == "10.0.0.1"
    engines = {p["name"]: p["env"] for p in third["processes"] if "cohort" in p["name"]}
    seen = [(name, env["GMS_VISIBLE_DEVICES"], env["DYN_SYSTEM_PORT"]) for name, env in engines.items()]
    assert seen == [
        *(("small-0.cohort 0 rank 0", "0,1", "8080"), ("small-0.cohort 1 rank 0", "0,1", "8081")),
        *(("small-1.cohort 0 rank 0", "2,3", "8090"), ("small-1.cohort 1 rank 0", "2,3", "8091")),
    ]
    assert [g["ports"]["system"] for g in third["groups"]] == [[8080, 8081], [8090, 8091]]
    # Of other nodes, with GPUs that this one has not.
    flags = ["--config", str(config), "--json", "--node-rank", "2"]
    config.write_text(config.read_text().replace("virtual_gpus = 4\n", "").replace('leader_addr = "10.0.0.1"\n', ""))
    code, text = run(tmp_path, "plan", *flags, "--gpus-per-node", "4")
    (only,) = json.loads(text)["nodes"]
    assert only["leader_address"] == "<address of node 0>" and only["groups"][1]["gms_memory"] == "cuda"
    last = only["processes"][-1]
    assert last["name"] == "small-1.cohort 1 rank 0" and last["env"]["CUDA_VISIBLE_DEVICES"] == "2,3"
    assert len([p for p in only["processes"] if ".gms-" in p["name"]]) == 4
    config.write_text(f"virtual_gpus = 4\n{config.read_text()}")
    code, text = run(tmp_path, "plan", "--config", str(config), "--virtual-gpus", "3")
    assert code == 2 and "group small-1 wants 2 on one node, and no node has more than 1 GPU left" in text


def test_what_up_would_refuse_of_groups_is_refused_by_plan(tmp_path: Path, model: Path) -> None:
    flags = ["plan", "--engine", "reference", "--model", str(model), "--groups", "2", "--nnodes", "4"]
    code, text = run(tmp_path, *flags, "--event-plane", "nats")
    assert (
        code == 2 and "group g1 has engines on node 3, and the run's own NATS is on the first node's loopback" in text
    )
    code, text = run(tmp_path, *flags, "--spares", "2", "--etcd-members", "3")
    assert code == 2 and "each is on a node of its own, and the run has 2 nodes, and 2 spares" in text


def test_a_spoilt_model_of_another_nodes_group_is_told_at_once(tmp_path: Path, model: Path) -> None:
    """Else its own nodes end with it, and this one waits for them."""
    spoilt = tmp_path / "spoilt"
    shutil.copytree(model, spoilt)
    (spoilt / "config.json").unlink()
    config = tmp_path / "two.toml"
    config.write_text(
        f'engine = "reference"\n[[group]]\nname = "a"\nnodes = 1\nmodel = "{model}"\n'
        f'[[group]]\nname = "b"\nnodes = 1\nmodel = "{spoilt}"\n'
    )
    place = ["--nnodes", "2", "--node-rank", "0", "--leader-addr", "127.0.0.1", "--interface", "lo"]
    code, text = run(tmp_path, "up", "--config", str(config), *place)
    assert code == 2 and "group b: model" in text and "no config.json in it" in text


TABLES = """engine = "reference"
served_model_name = "tiny"
[[group]]
name = "big"
nodes = 2
tp = 4
engine_args = ["--max-model-len", "64"]
[[group]]
name = "small"
count = 2
gpus = 1
shadows = 2
"""


def test_submit_asks_slurm_for_what_the_groups_take(tmp_path: Path, model: Path) -> None:
    (tmp_path / "g.toml").write_text(TABLES)
    flags = ["--config", str(tmp_path / "g.toml"), "--model", str(model), "--run", "r1", "--dry-run"]
    code, text = run(tmp_path, "submit", *flags, "--gpus-per-node", "2")
    assert code == 0, text
    assert "#SBATCH --nodes=3\n" in text and text.count("--gpus-per-node=2") == 1
    assert "# 3 groups on 3 nodes with 2 GPUs each" in text and "# node 2  GPU 0     small-0" in text
    # What is saved says the same again.
    saved = text.rpartition("settings.toml\n")[2]
    (tmp_path / "again.toml").write_text(saved)
    flags[1] = str(tmp_path / "again.toml")
    again = run(tmp_path, "submit", *flags, "--sbatch=--gres=gpu:2")
    assert again[0] == 0 and again[1].rpartition("settings.toml\n")[2] == saved and "--gpus-per-node" not in again[1]
    code, text = run(tmp_path, "submit", *flags)
    assert code == 2 and "say -N or --gpus-per-node" in text
    code, text = run(tmp_path, "submit", *flags, "-N", "2", "--gpus-per-node", "2")
    assert code == 2 and "2 groups with gpus want 2 GPUs of 0" in text
    assert run(tmp_path, "submit", "--engine", "reference", "--model", str(model))[1].endswith("the job has: -N 2\n")


def test_doctor_says_once_what_stops_several_of_its_checks(tmp_path: Path, model: Path) -> None:
    code, text = run(tmp_path, "doctor", "--engine", "reference", "--model", str(model), "--nnodes", "2")
    assert code == 1 and text.count("need --leader-addr") == 1, text
    assert "ports                not looked at, for what topology says" in text


def test_doctor_says_what_each_group_of_the_node_needs(tmp_path: Path, model: Path) -> None:
    config = tmp_path / "g.toml"
    config.write_text(TABLES.replace("nodes = 2\ntp = 4", f'gpus = 2\nmodel = "{tmp_path}"'))
    env = {k: v for k, v in os.environ.items() if not k.startswith(("GMS_LAUNCH_", "SLURM_"))}
    env |= {"GMS_LAUNCH_HOME": str(tmp_path / "home")}

    def doctor(*flags: str) -> tuple[dict[str, tuple[bool, str]], str]:
        flags = ("--config", str(config), "--model", str(model), *flags, "--json")
        done = gms_launch("doctor", *flags, env=env)
        found = {c["check"]: (c["ok"], c["detail"]) for c in json.loads(done.stdout)["checks"]}
        assert done.returncode == (0 if all(ok for ok, _ in found.values()) else 1)
        return found, done.stderr

    found, said = doctor("--virtual-gpus", "4")
    assert "2 of " in said and "checks failed: groups, big: model" in said
    assert not found["big: model"][0] and found["small-0: model"] == found["small-1: model"] == (True, str(model))
    config.write_text(TABLES.replace("nodes = 2\ntp = 4", "gpus = 2"))
    found, said = doctor("--virtual-gpus", "4")
    assert said == "" and found["groups"] == (
        True,
        "big on GPUs 0-1 of 4, small-0 on GPU 2 of 4, small-1 on GPU 3 of 4",
    )
    assert found["small-1: gms"][1].count("GPU-") == 1 and found["big: gms"][1].count("GPU-") == 2
    found, said = doctor("--virtual-gpus", "3")
    assert "checks failed: groups" in said and "group small-1 wants 1 on one node" in found["groups"][1]
