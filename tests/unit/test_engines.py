"""Engine command lines, log lines, and the arithmetic of the reference engine."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from gms_launch import ports, topology
from gms_launch.cli.plan import layout
from gms_launch.cohort.model import Phase
from gms_launch.config import resolve
from gms_launch.engines import get
from gms_launch.engines.reference import weights
from gms_launch.engines.reference.args import Knobs
from gms_launch.engines.reference.compute import host
from gms_launch.errors import UsageError
from gms_launch.gms.devices import choose, virtual_devices
from gms_launch.gms.gpus import Gpu

RECORDED = Path(__file__).with_name("plans")


def normalised(text: str) -> str:
    import sys

    return text.replace(sys.executable, "PYTHON")


@pytest.mark.parametrize("name", ["reference", "vllm-tp4", "no-nats"])
def test_plans_are_as_recorded(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A change of a command, an environment or a port shows here. To record anew: delete the file and run twice."""
    monkeypatch.setenv("GMS_LAUNCH_HOME", "/home/user/.gms-launch")
    monkeypatch.setattr("gms_launch.rundir.user_root", lambda: Path("/dev/shm/gms-launch-1000"))
    monkeypatch.setattr("gms_launch.plan.find_binary", lambda _s, _c, name, _p: f"/usr/bin/{name}")
    flags: dict[str, dict[str, object]] = {
        "reference": {"engine": "reference", "run_id": "r1", "model": "/models/demo"},
        "vllm-tp4": {"engine": "vllm", "run_id": "r2", "model": "/models/q", "tp": "4", "shadows": "2"},
        "no-nats": {"engine": "reference", "run_id": "r3", "model": "/models/demo", "nats": False},
    }
    args = ["--max-model-len", "2048"] if name == "vllm-tp4" else []
    found = normalised(json.dumps(layout(resolve(flags[name], {}, engine_args=args)).to_json(), indent=1)) + "\n"
    file = RECORDED / f"{name}.json"
    if not file.exists():
        file.parent.mkdir(exist_ok=True)
        file.write_text(found)
        pytest.fail(f"{file} was not there and has been recorded")
    assert found == file.read_text()


def test_ranks_of_two_nodes_differ_as_upstream_wants() -> None:
    from dataclasses import replace

    settings = resolve({"engine": "vllm", "model": "/m", "tp": "2"}, {})
    plan = layout(settings)
    place = topology.Topology(1, 2, "node1", "10.0.0.2", "10.0.0.1")
    other = replace(plan, topology=place, ports=ports.layout(settings, lambda _: True))
    command = other.rank_command(1, 1, 29600)
    assert "--headless" in command.argv
    for flag, value in {
        "--nnodes": "2",
        "--node-rank": "1",
        "--master-addr": "10.0.0.1",
        "--master-port": "29600",
    }.items():
        assert command.argv[command.argv.index(flag) + 1] == value
    assert "DYN_SYSTEM_PORT" not in command.env and "ETCD_ENDPOINTS" not in command.env, "a headless rank has neither"
    assert command.env["ENGINE_ID"] == "1"


#: The lines of a real run, Dynamo 1.3.1 with vLLM 0.23.0 on an H200, in the order they came.
REAL = [
    ("[GMS] Failover enabled: will use scratch KV for initialization until engine is primary", None),
    ("Connected with rw_or_ro lock (granted=rw), committed=False", None),
    ("[GMS] Committed 0.55 GiB, switched to read mode with 26 mappings", None),
    ("Sleep freed 4.91 GiB", None),
    ("[Shadow] Engine sleeping, startup probe now passing, waiting for lock", Phase.PARKED),
    ("Failover lock acquired: engine-1", None),
    ("[Shadow] Lock acquired, waking engine", Phase.WAKING),
    ("It took 0.037454 seconds to wake up tags {'weights', 'kv_cache'}", None),
    ("[Shadow] Engine awake, registering with discovery", None),
]


@pytest.mark.parametrize("engine", ["vllm", "reference"])
def test_phases_from_log_lines(engine: str) -> None:
    module = get(engine)
    for line, phase in REAL:
        assert module.phase_of(f"2026-11-23 INFO worker_factory.py:920 {line}") is phase, line
    assert module.phase_of("[Shadow] Engine paused, startup probe now passing, waiting for lock") is Phase.PARKED
    assert module.phase_of("[Shadow] failover_state engine=1 -> active") is Phase.ACTIVE
    assert module.phase_of("[Shadow] failover_state engine=1 -> standby") is None
    assert module.is_awake(REAL[-1][0]) and not module.is_awake(REAL[6][0])


def test_an_engine_that_cannot_be_imported_is_named_and_not_replaced() -> None:
    problems = get("vllm").problems("")
    assert len(problems) == 1
    assert "gpu_memory_service" in problems[0] and "--engine reference" in problems[0]
    with pytest.raises(UsageError):
        get("sglang")


def test_the_sum_notices_a_changed_and_a_moved_word() -> None:
    words = np.arange(300_000, dtype=np.uint64)
    total = host.weighted_sum(words, 0)
    changed = words.copy()
    changed[222_222] ^= np.uint64(1)
    assert host.weighted_sum(changed, 0) != total
    moved = words.copy()
    moved[[5, 6]] = moved[[6, 5]]
    assert host.weighted_sum(moved, 0) != total
    exact = sum((2 * i + 1) * int(w) for i, w in enumerate(words)) & ((1 << 64) - 1)
    assert total == exact


@pytest.mark.parametrize("world", [2, 3, 7])
def test_any_number_of_workers_computes_the_same(world: int) -> None:
    rng = np.random.default_rng(0)
    tensors = [rng.integers(0, 1 << 63, size=n, dtype=np.uint64) for n in (10_000, 333, 200_001)]

    def parts(rank: int, of: int) -> list[weights.Shard]:
        made = []
        for index, words in enumerate(tensors):
            first, last = weights._split(len(words), rank, of)
            address = words.ctypes.data + 8 * first
            made.append(weights.Shard(index, f"t{index}", first, len(words), last - first, address))
        return made

    mask = (1 << 64) - 1
    whole, here = parts(0, 1), host.HostCompute()
    assert sum(weights.digest(here, parts(r, world)) for r in range(world)) & mask == weights.digest(here, whole)
    for state in (0, 1 << 20, mask, 0x123456789ABCDEF0):
        shares = [weights.window(here, parts(r, world), state) for r in range(world)]
        assert sum(shares) & mask == weights.window(here, whole, state)


def test_crash_points_name_a_life(monkeypatch: pytest.MonkeyPatch) -> None:
    died: list[int] = []
    monkeypatch.setattr("os.kill", lambda pid, sig: died.append(sig))
    knobs = Knobs.from_environ({"REFERENCE_CRASH": "1.2:parked"})
    knobs.crash_here("parked", "run/1/1/0")
    knobs.crash_here("waking", "run/1/2/0")
    knobs.crash_here("parked", "run/0/2/0")
    assert died == []
    knobs.crash_here("parked", "run/1/2/0")
    Knobs(crash="1.*:waking").crash_here("waking", "run/1/9/0")
    assert died == [9, 9]


def test_devices() -> None:
    one, two = virtual_devices(2, 64, "n1"), virtual_devices(2, 64, "n2")
    assert one == virtual_devices(2, 64, "n1")
    assert len({d.uuid for d in one + two}) == 4
    found = [Gpu(f"GPU-{c * 3}", "H200", 1000, 0, "default") for c in "abc"]
    found.insert(1, Gpu("MIG-a1", "H200 MIG 1g", 100, 0, "default", mig=True))
    assert [d.uuid for d in choose(found, None)] == ["GPU-aaa", "GPU-bbb", "GPU-ccc"]
    assert [(d.index, d.uuid) for d in choose(found, "2,0")] == [(0, "GPU-ccc"), (1, "GPU-aaa")]
    assert [d.uuid for d in choose(found, "GPU-b")] == ["GPU-bbb"]
    assert [(d.uuid, d.memory) for d in choose(found, "MIG-a1")] == [("MIG-a1", 100)]
    assert choose(found, "") == []
    assert [d.uuid for d in choose(found, "1,9,0")] == ["GPU-bbb"], "CUDA stops at what names nothing"
    assert [d.uuid for d in choose(found, "1,1,0")] == ["GPU-bbb"]
