"""Who a node is, and whether nodes fit together."""

from __future__ import annotations

import os
import random
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from gms_launch.cohort import membership
from gms_launch.cohort.records import ModelStamp, NodeRecord
from gms_launch.engines.reference import demo_model
from gms_launch.errors import UsageError
from gms_launch.run import contents, rundir, topology
from gms_launch.settings.resolve import resolve
from gms_launch.spool.reading import within
from tests.support import PATIENCE

#: What a task of `srun -N3 --gres=gpu:2` sees on its second node (Slurm 22.05).
TASK = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NODELIST": "node[1-3]",
    "SLURM_STEP_NUM_TASKS": "3",
    "SLURM_STEP_TASKS_PER_NODE": "1(x3)",
    "SLURM_NODEID": "1",
    "SLURM_PROCID": "1",
    "SLURMD_NODENAME": "node2",
    "SLURM_GPUS_ON_NODE": "2",
}


def test_a_task_of_a_step_knows_its_place() -> None:
    found = topology.from_slurm(TASK)
    assert found == {"nnodes": 3, "node_rank": 1, "leader_addr": "node1", "tp": 6, "virtual_gpus": 2}
    assert topology.from_slurm({}) == {}
    assert topology.from_slurm(TASK, hands_off=True) == {}
    assert topology.from_slurm({k: v for k, v in TASK.items() if "GPU" not in k})["tp"] == 3


def test_a_node_with_a_step_of_its_own_is_one_of_all() -> None:
    own = {"SLURM_STEP_NODELIST": "node2", "SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_TASKS_PER_NODE": "1"}
    own |= {"SLURM_NODEID": "0", "GL_NODES": "node[1-3]"}
    assert topology.from_slurm(TASK | own) == topology.from_slurm(TASK)
    assert topology.from_slurm(TASK | own | {"GL_NODES": ""})["nnodes"] == 1
    steps = {rundir.slurm_step(TASK | own | {"SLURM_STEP_ID": str(k)}) for k in range(3)}
    assert len(steps) == 1, "of one run, and not an earlier one of this job"


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"SLURM_STEP_NUM_TASKS": "6", "SLURM_STEP_TASKS_PER_NODE": "2(x3)"}, "6 tasks on 3 nodes"),
        ({"SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_TASKS_PER_NODE": "2,1(x2)"}, "--ntasks-per-node=1"),
        ({"SLURM_STEP_NUM_TASKS": "x"}, "SLURM_STEP_NUM_TASKS is 'x', and Slurm would have put a number there"),
        ({"SLURM_STEP_NUM_TASKS": "", "SLURM_NTASKS": "-1"}, "SLURM_NTASKS is '-1'"),
        ({"SLURM_NODEID": "one"}, "SLURM_NODEID is 'one'"),
        ({"SLURMD_NODENAME": "node3"}, "calls this node node3, number 1"),
    ],
)
def test_a_step_that_cannot_be_a_run(changes: dict[str, str], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        topology.from_slurm(TASK | changes)


def test_a_shell_that_is_no_task() -> None:
    batch = {"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "1", "SLURM_NODEID": "0", "SLURMD_NODENAME": "node1"}
    assert topology.from_slurm(batch) == {"tp": 1}, "a batch script on its only node"
    with pytest.raises(UsageError, match="SLURM_JOB_NUM_NODES is 'two'"):
        topology.from_slurm(batch | {"SLURM_JOB_NUM_NODES": "two"})
    for shell in (batch | {"SLURM_JOB_NUM_NODES": "2"}, {k: v for k, v in batch.items() if k != "SLURMD_NODENAME"}):
        with pytest.raises(UsageError, match="srun --ntasks-per-node=1 gms-launch up"):
            topology.from_slurm(shell)


def test_nodelists_keep_slurms_order() -> None:
    assert topology.expand("node[1-3,7],login") == ["node1", "node2", "node3", "node7", "login"]
    assert topology.expand("b1,a[09-11]x") == ["b1", "a09x", "a10x", "a11x"]
    with pytest.raises(UsageError, match="cannot be read"):
        topology.expand("node[1-")


def place(own: dict[str, str], monkeypatch: pytest.MonkeyPatch, **flags: Any) -> topology.Topology:
    monkeypatch.setattr(topology, "addresses", lambda: own)
    monkeypatch.setattr(topology, "route_to", lambda _: own.get("eth0", ""))
    return topology.discover(resolve({"model": "m", "engine": "reference", **flags}, {}))


OWN = {"lo": "127.0.0.1", "eth0": "10.0.0.1"}


def test_the_leader_serves_on_the_network_that_the_nodes_share(monkeypatch: pytest.MonkeyPatch) -> None:
    assert place(OWN, monkeypatch).leader_address == "127.0.0.1", "one node needs nothing but itself"
    for name in ("10.0.0.1", "localhost"):  # /etc/hosts may give a machine's own name a loopback address
        found = place(OWN, monkeypatch, nnodes="2", leader_addr=name)
        assert (found.leader_address, found.address) == ("10.0.0.1", "10.0.0.1")
    chosen = place(OWN | {"ib0": "10.9.0.1"}, monkeypatch, nnodes="2", leader_addr="10.0.0.1", interface="ib0")
    assert (chosen.leader_address, chosen.address) == ("10.9.0.1", "10.9.0.1")


@pytest.mark.parametrize(
    ("flags", "own", "says"),
    [
        ({}, OWN, "2 nodes need --leader-addr"),
        ({"node_rank": "1"}, OWN, "node 1 of 2 needs --leader-addr"),
        ({"leader_addr": "127.0.0.1"}, OWN | {"ib0": "10.9.0.1"}, "--interface: eth0 10.0.0.1, ib0 10.9.0.1"),
        ({"leader_addr": "10.0.0.7"}, OWN, "node rank 0 must run on the leader"),
        ({"leader_addr": "127.0.0.1", "node_rank": "1"}, OWN, "its own loopback"),
        ({"leader_addr": "10.0.0.1", "interface": "ib0"}, OWN, "there are lo 127.0.0.1, eth0 10.0.0.1"),
        ({"leader_addr": "no-such-host.invalid"}, OWN, "has no address"),
    ],
)
def test_a_leader_that_nobody_could_reach(
    flags: dict[str, str], own: dict[str, str], says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UsageError, match=says):
        place(own, monkeypatch, nnodes="2", **flags)


NODE = NodeRecord(0, "a", "10.0.0.1", "b", 1, 1, gpus=("g",), version="1", settings_digest="d")


@pytest.mark.parametrize(
    ("other", "says"),
    [
        ({}, ""),
        ({"version": "2"}, "node 1 (b) has gms-launch 2, node 0 (a) has 1"),
        ({"settings_digest": "e", "differences": ("tp is 2 here and 4 there",)}, "tp is 2 here and 4 there"),
        ({"model": ModelStamp(3, 70, "other")}, "no model directory here"),
        ({"gpus": ("g", "h")}, "has 2 GPUs, node 0 (a) has 1"),
        ({"clock_skew": 61.0}, "at least 61 s ahead of node 0 (a)'s"),
        ({"clock_skew": -61.0}, "at least 61 s behind"),
        ({"clock_skew": 1.0}, ""),
    ],
)
def test_nodes_that_do_not_fit(other: dict[str, Any], says: str) -> None:
    found = membership.objections({0: NODE, 1: replace(NODE, node_rank=1, host="b", **other)}, 2)
    assert len(found) == (1 if says else 0) and says in "".join(found)


def test_whoever_does_not_fit_is_as_good_as_absent() -> None:
    other = replace(NODE, node_rank=1, host="b")
    assert membership.unfit({0: NODE, 1: other}, 2) == []
    assert membership.unfit({0: NODE, 1: replace(other, settings_digest="e")}, 2) == [1]
    assert membership.unfit({1: other}, 2) == [], "nobody to compare it with"


def _model(directory: Path, seed: int) -> Path:
    demo_model.make(directory, 1, seed)
    return directory


def test_models_are_compared_by_what_is_in_them(tmp_path: Path) -> None:
    one = _model(tmp_path / "one", 1)
    stamp = contents.stamp(str(one))
    assert stamp.files >= 4 and stamp.bytes > 1 << 20
    shutil.copytree(one, tmp_path / "copy")
    (tmp_path / "copy" / "README.md").write_text("a copy")
    (tmp_path / "copy" / ".cache").mkdir()
    (tmp_path / "copy" / ".cache" / "x.json").write_text("{}")
    assert contents.stamp(str(tmp_path / "copy")) == stamp, "what no engine reads may differ"
    retrained = _model(tmp_path / "two", 2)
    assert (retrained / "model.safetensors").stat().st_size == (one / "model.safetensors").stat().st_size
    assert contents.stamp(str(retrained)).digest != stamp.digest, "same names, sizes, shapes: other weights"
    (tmp_path / "copy" / "config.json").write_text("{}")
    assert contents.stamp(str(tmp_path / "copy")) != stamp
    assert contents.stamp("org/name-in-a-hub").files == 0
    (tmp_path / "copy" / "broken.safetensors").symlink_to("nowhere")
    assert contents.stamp(str(tmp_path / "copy")).files == stamp.files + 1, "unreadable is told apart, and no error"


def test_a_pipe_among_a_models_files_keeps_nobody_waiting(tmp_path: Path) -> None:
    model = _model(tmp_path / "one", 1)
    before = contents.stamp(str(model))
    os.mkfifo(model / "extra.json")
    stamp = within(PATIENCE, partial(contents.stamp, str(model)), before)
    assert stamp.files == before.files + 1, "told apart, and no error"
    os.mkfifo(model / "x.safetensors")
    assert within(PATIENCE, partial(contents.problem, model), "") == f"{model}/x.safetensors is no regular file"


def test_a_rank_beyond_the_run() -> None:
    assert "came to a run of 2 nodes" in membership.objections({0: NODE, 2: replace(NODE, node_rank=2)}, 2)[0]
    assert membership.missing({0: NODE, 2: NODE}, 4) == [1, 3]


def test_a_clock_is_only_off_when_it_must_be() -> None:
    for _ in range(2000):
        skew, now, trip = random.uniform(-30, 30), random.uniform(1e9, 2e9), random.uniform(0, 2)
        answered = now + random.uniform(0, trip)
        found = membership.clock_skew(now + skew, float(int(answered)), now + trip + skew)
        assert 0 <= found <= max(0.0, skew) or min(0.0, skew) <= found <= 0
        assert abs(skew) - abs(found) <= 1.0 + trip + 1e-6
