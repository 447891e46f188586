"""Engines get the command line on record, and their log lines mean what they say; the reference engine can add."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from gms_launch.cli.plan import layout
from gms_launch.cohort.model import Phase
from gms_launch.engines import get, installed, signals, vllm
from gms_launch.engines.reference import weights
from gms_launch.engines.reference.args import InjectedError, Knobs
from gms_launch.engines.reference.compute import host
from gms_launch.engines.reference.metrics import FailoverMetrics
from gms_launch.errors import UsageError
from gms_launch.gms.devices import choose, virtual_devices
from gms_launch.gms.gpus import Gpu
from gms_launch.run import ports, topology
from gms_launch.run.plan import Layout
from gms_launch.run.printed import to_json
from gms_launch.settings import arguments
from gms_launch.settings.declared import Settings
from gms_launch.settings.resolve import resolve

RECORDED = Path(__file__).with_name("plans")


def plan_of(settings: Settings) -> Layout:
    """What would run on this node with these settings."""
    return layout(settings)


def normalised(text: str) -> str:
    import sys

    return text.replace(sys.executable, "PYTHON")


@pytest.mark.parametrize("name", ["reference", "vllm-tp4", "no-nats"])
def test_plans_are_as_recorded(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A change of a command, an environment or a port shows here. To record anew: delete the file and run twice."""
    monkeypatch.setenv("GMS_LAUNCH_HOME", "/home/user/.gms-launch")
    monkeypatch.setattr("gms_launch.run.nodedir.user_root", lambda: Path("/dev/shm/gms-launch-1000"))
    monkeypatch.setattr("gms_launch.run.plan.find_binary", lambda _s, _c, name, _p: f"/usr/bin/{name}")
    flags: dict[str, dict[str, object]] = {
        "reference": {"engine": "reference", "run_id": "r1", "model": "/models/demo"},
        "vllm-tp4": {"engine": "vllm", "run_id": "r2", "model": "/models/q", "tp": "4", "shadows": "2"},
        "no-nats": {"engine": "reference", "run_id": "r3", "model": "/models/demo", "nats": False},
    }
    args = ["--max-model-len", "2048"] if name == "vllm-tp4" else []
    found = normalised(json.dumps(to_json(layout(resolve(flags[name], {}, engine_args=args))), indent=1)) + "\n"
    file = RECORDED / f"{name}.json"
    if not file.exists():
        file.parent.mkdir(exist_ok=True)
        file.write_text(found)
        pytest.fail(f"{file} was not there and has been recorded")
    assert found == file.read_text()


def test_ranks_of_two_nodes_differ_as_upstream_wants() -> None:
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
    problems = get("vllm").problems(resolve({}, {}))
    assert len(problems) == 1
    assert "gpu_memory_service" in problems[0] and "--engine reference" in problems[0]
    with pytest.raises(UsageError):
        get("sglang")


@pytest.mark.parametrize(
    ("version", "line"),
    [("1.0.9", None), ("1.1.0", "1.1"), ("1.4.2.post1", "1.4"), ("1.6.1", "1.6"), ("1.9.0", "1.6"), ("x", None)],
)
def test_the_line_of_a_version(version: str, line: str | None) -> None:
    found = vllm.line_of(version)
    assert (found.dynamo if found else None) == line


def test_each_cohort_publishes_kv_events_on_its_own_port() -> None:
    config = '{"publisher": "zmq", "endpoint": "tcp://*:5557"}'
    settings = resolve({"engine": "vllm", "model": "/m"}, {}, engine_args=["--kv-events-config", config])
    argv = plan_of(settings).rank_command(1, 1, 29600).argv
    assert json.loads(argv[argv.index("--kv-events-config") + 1])["endpoint"] == "tcp://*:5558"
    assert arguments.stagger_kv_events([f"--kv_events_config={config}"], 2)[0].endswith('"tcp://*:5559"}')
    assert arguments.stagger_kv_events(["--kv-events-config", "no json"], 2) == ("--kv-events-config", "no json")


def test_caches_and_interface_are_the_users_word_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_CACHE_ROOT", "/mine")
    monkeypatch.delenv("TRITON_CACHE_DIR", raising=False)
    flags = {"engine": "vllm", "model": "/m", "cache_dir": "/local/cache", "nnodes": "2", "interface": "eth7"}
    place = topology.Topology(0, 2, "n0", "10.0.0.1", "10.0.0.1")
    env = layout(resolve(flags, {}), place).rank_command(0, 1, 29500).env
    assert "VLLM_CACHE_ROOT" not in env and env["TRITON_CACHE_DIR"] == "/local/cache/triton"
    assert env["NCCL_SOCKET_IFNAME"] == env["GLOO_SOCKET_IFNAME"] == "eth7"
    assert env["VLLM_USE_FLASHINFER_SAMPLER"] == "0", "flashinfer is not installed here"


def test_another_interpreter_is_asked_without_importing(tmp_path: Path) -> None:
    import sys

    link = tmp_path / "python"
    link.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    link.chmod(0o755)
    found = installed.look(str(link), ("json", "no_such_module", "dynamo.no_such"), ("pytest", "no-such-dist"))
    assert found.missing == ("no_such_module", "dynamo.no_such")
    assert found.versions == {"pytest": pytest.__version__}
    assert "a working interpreter" in installed.look(str(tmp_path / "none"), ("json",)).missing[0]


@pytest.mark.parametrize("lacking", [(), ("setproctitle",)])
def test_doctor_says_when_the_real_engines_processes_have_no_titles(
    monkeypatch: pytest.MonkeyPatch, lacking: tuple[str, ...]
) -> None:
    def look(_python: str, modules: tuple[str, ...], _distributions: tuple[str, ...] = ()) -> installed.Installed:
        return installed.Installed(tuple(m for m in modules if m in lacking), {"vllm": "0.23.0"})

    monkeypatch.setattr(installed, "look", look)
    told = get("vllm").describe(resolve({"model": "/models/q"}, {}))
    assert ("only its main process is watched" in told) is bool(lacking)


@pytest.mark.parametrize(("version", "hangs"), [("1.1.1", True), ("1.2.1", False), ("1.6.1", False)])
def test_replicas_are_refused_where_dynamo_hangs_with_them(
    monkeypatch: pytest.MonkeyPatch, version: str, hangs: bool
) -> None:
    monkeypatch.setattr(installed, "look", lambda *_: installed.Installed((), {"ai-dynamo": version}))
    found = get("vllm").problems(resolve({"model": "/models/q", "dp": "2"}, {}))
    assert [p for p in found if "--dp needs 1.2" in p] == found and bool(found) == hangs
    assert get("vllm").problems(resolve({"model": "/models/q"}, {})) == []


METRICS = """
# HELP dynamo_component_engine_failover_state 1 for the state
dynamo_component_engine_failover_state{dynamo_component="backend",engine_id="1",model="m",state="init"} 0
dynamo_component_engine_failover_state{dynamo_component="backend",engine_id="1",model="m",state="standby"} 1
dynamo_component_engine_failover_transitions_total{from_state="init",to_state="standby"} 1
"""


def test_what_an_engine_has_done_is_read_from_its_own_counters() -> None:
    label = 'dynamo_component="prefill",dynamo_endpoint="{}",dynamo_namespace="dynamo"'
    lines = [
        f"dynamo_component_{name}{{{label.format(endpoint)}}} {value}"
        for name, endpoint, value in (
            ("requests_total", "generate", 3),
            ("response_bytes_total", "generate", 729),
            ("requests_total", "clear_kv_blocks", 5),
            ("request_bytes_total", "generate", 11),
        )
    ]
    assert signals.counted("\n".join(lines)) == signals.Work(3.0, 729.0)
    assert signals.counted(METRICS) == signals.Work(0.0, 0.0)


def test_replicas_are_shared_out_over_the_nodes_as_upstream_wants() -> None:
    events = '{"enable_kv_cache_events": true, "publisher": "zmq", "endpoint": "tcp://*:5557"}'
    args = ["--enable-expert-parallel", "--kv-events-config", events]
    plan = layout(resolve({"engine": "vllm", "model": "/m", "tp": "2", "dp": "4"}, {}, engine_args=args))
    for node_rank in (0, 1):
        place = topology.Topology(node_rank, 2, "n", f"10.0.0.{node_rank + 1}", "10.0.0.1")
        argv = " ".join(replace(plan, topology=place).rank_command(1, 1, 29600).argv)
        assert "--data-parallel-size 4 --data-parallel-size-local 2 --data-parallel-address 10.0.0.1" in argv
        assert "--data-parallel-rpc-port 29650" in argv and "--enable-expert-parallel" in argv
        assert "tcp://*:5561" in argv, "the second cohort's four follow the first's"
        assert ("--data-parallel-start-rank 2" in argv) == ("--headless" in argv) == (node_rank == 1)
        assert "--nnodes" not in argv and "--master-addr" not in argv


def test_with_hybrid_load_balancing_every_node_registers_its_replicas_and_has_locks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("gms_launch.run.reach.interface", lambda _: "")  # those addresses are not of this machine
    flags = {"engine": "vllm", "model": "/m", "tp": "2", "dp": "4", "nnodes": "2", "leader_addr": "10.0.0.1"}
    place = topology.Topology(1, 2, "n", "10.0.0.2", "10.0.0.1")
    plan = layout(resolve(flags | {"dp_lb": "hybrid", "activation": "agent"}, {}), place)
    for node_rank in (0, 1):
        place = topology.Topology(node_rank, 2, "n", f"10.0.0.{node_rank + 1}", "10.0.0.1")
        here = replace(plan, topology=place)
        command = here.rank_command(1, 1, 29600)
        argv = " ".join(command.argv)
        assert "--data-parallel-hybrid-lb" in argv and "--headless" not in argv
        assert ("--data-parallel-start-rank 2" in argv) == (node_rank == 1)
        assert command.env["DYN_SYSTEM_PORT"] and command.env["DYN_TCP_RPC_HOST"] == f"10.0.0.{node_rank + 1}"
        assert here.speaks and here.gates[1] == here.lock_of(1) != here.lock_of(0)
    inside = layout(resolve(flags | {"activation": "agent"}, {}), place)
    assert not inside.speaks and not inside.gates, "one lock, with the first node"


def test_a_half_is_told_its_part_and_a_component(tmp_path: Path) -> None:
    plan = layout(resolve({"engine": "vllm", "model": "/m"}, {}))
    command = replace(plan, role="prefill", component="late").rank_command(0, 1, 29600)
    assert command.argv[command.argv.index("--disaggregation-mode") + 1] == "prefill"
    assert command.argv[command.argv.index("--endpoint") + 1] == "dyn://dynamo.late.generate"
    alone = plan.rank_command(0, 1, 29600).argv
    assert not {"--disaggregation-mode", "--endpoint"} & set(alone)
    file = tmp_path / "e.toml"
    file.write_text('command = ["e", "{role}", "{component}"]\n[phase]\nparked = "x"\n')
    own = layout(resolve({"engine": "command", "engine_file": str(file), "model": "/m"}, {}))
    assert replace(own, role="prefill").rank_command(0, 1, 1).argv == ("e", "prefill", "prefill")
    assert replace(own, role="decode", component="c").rank_command(0, 1, 1).argv == ("e", "decode", "c")


def test_phase_by_the_strongest_sign() -> None:
    assert signals.failover_state(METRICS) == "standby"
    assert signals.failover_state("dynamo_component_uptime_seconds 1") == ""
    none, healthy = signals.Health(), signals.Health(healthy=True)
    assert signals.phase(signals.Signals(none)) is None
    assert signals.phase(signals.Signals(signals.Health(healthy=False))) is None
    assert signals.phase(signals.Signals(healthy)) is Phase.PARKED
    assert signals.phase(signals.Signals(healthy, holds_lock=True)) is Phase.WAKING
    assert signals.phase(signals.Signals(signals.Health(True, "init"))) is Phase.STARTING, "metrics above health"
    assert signals.phase(signals.Signals(signals.Health(True, "standby"), holds_lock=True)) is Phase.PARKED
    assert signals.phase(signals.Signals(signals.Health(True, "active"))) is Phase.ACTIVE
    assert signals.phase(signals.Signals(none, registered=True)) is Phase.ACTIVE
    assert signals.mapped(signals.Signals(holds_lock=True), kv_session=True)
    assert not signals.mapped(signals.Signals(), kv_session=True)


def test_the_metrics_of_the_reference_engine_are_read_as_upstreams(tmp_path: Path) -> None:
    metrics = FailoverMetrics(1, "m", tmp_path)
    for state, phase in signals.STATES.items():
        metrics.enter(state)
        assert signals.failover_state(metrics.text()) == state
        assert signals.phase(signals.Signals(signals.Health(True, state))) is phase


ENGINE_FILE = """
[engine]
command = ["{python}", "-m", "mine", "--id", "{cohort_id}", "--of", "{local_ranks}", "--json", '{{"a": 1}}']
headless = ["sleep", "{node_rank}"]
unset = ["NATS_SERVER"]
[engine.environment]
KV = "{port_kv}"
HEALTH = "{system_port}"
[engine.ports]
kv = 20080
[engine.phase]
parked = "waiting for (the )?lock"
awake = "^awake$"
"""


def test_an_engine_of_ones_own(tmp_path: Path) -> None:
    file = tmp_path / "engine.toml"
    file.write_text(ENGINE_FILE)
    settings = resolve(
        {"engine": "command", "engine_file": str(file), "model": "/m", "tp": "2", "nnodes": "2"}, {}, engine_args=["-x"]
    )
    plan = layout(settings, topology.Topology(0, 2, "n0", "10.0.0.1", "10.0.0.1"))
    command = plan.rank_command(1, 3, 29600)
    assert command.argv[1:] == ("-m", "mine", "--id", "1", "--of", "1", "--json", '{"a": 1}', "-x")
    assert command.env["KV"] == "20081" and command.env["ENGINE_ID"] == "1"
    assert command.env["DYN_DISCOVERY_BACKEND"] == "etcd", "a leader rank gets what Dynamo needs"
    other = layout(settings, topology.Topology(1, 2, "n1", "10.0.0.2", "10.0.0.1"))
    assert other.rank_command(1, 3, 29600).argv[:2] == ("sleep", "1")
    assert "DYN_DISCOVERY_BACKEND" not in other.rank_command(1, 3, 29600).env
    engine = plan.engine
    assert engine.phase_of("x waiting for the lock") is Phase.PARKED and engine.phase_of("awake") is None
    assert engine.is_awake("awake") and not engine.is_awake("awake now")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (('"{cohort_id}"', '"{cohort}"'), "{cohort} is not known"),
        (("parked =", "sleeping ="), "the phases are parked"),
        (('"waiting for (the )?lock"', '"("'), "no regular expression"),
        (("headless =", "headles ="), "headles"),
        (('{{"a": 1}}', '{"a": 1}'), "is not known"),
        (('{{"a": 1}}', '{"a'), "written twice"),
        (("command = [", "command = []\nx = ["), "unknown field"),
    ],
)
def test_what_is_wrong_in_an_engine_file_is_said(tmp_path: Path, change: tuple[str, str], says: str) -> None:
    file = tmp_path / "engine.toml"
    file.write_text(ENGINE_FILE.replace(*change))
    with pytest.raises(UsageError) as caught:
        get("command", str(file))
    assert says in str(caught.value) and str(file) in str(caught.value)


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
    states = (0, 1 << 20, mask, 0x123456789ABCDEF0)
    shares = [weights.windows(here, parts(r, world), states) for r in range(world)]
    assert [sum(s) & mask for s in zip(*shares, strict=True)] == weights.windows(here, whole, states)
    assert weights.windows(here, whole, states[1:2]) == weights.windows(here, whole, states)[1:2], "batched or not"


def test_crash_points_name_a_life(monkeypatch: pytest.MonkeyPatch) -> None:
    died: list[int] = []
    monkeypatch.setattr("os.kill", lambda pid, sig: died.append(sig))
    knobs = Knobs.from_environ({"REFERENCE_FAULT": "1.2:parked,0.*:waking=error"})
    knobs.fail_here("parked", "run/1/1/0")
    knobs.fail_here("waking", "run/1/2/0")
    knobs.fail_here("parked", "run/0/2/0")
    assert died == []
    with pytest.raises(InjectedError):
        knobs.fail_here("parked", "run/1/2/0")  # the signal that would have ended it is only noted here
    assert died == [9]
    with pytest.raises(InjectedError, match="error at waking"):
        knobs.fail_here("waking", "run/0/9/0")
    assert Knobs(fault="*.*:tokens=hang").fault_at("tokens", "run/7/8/0") == "hang"
    assert Knobs(fault="*.*:tokens=hang").fault_at("tokens", "no tag") == ""


def test_devices() -> None:
    one, two = virtual_devices(2, 64, "n1"), virtual_devices(2, 64, "n2")
    assert one == virtual_devices(2, 64, "n1")
    assert len({d.uuid for d in one + two}) == 4
    found = [Gpu(f"GPU-{c * 3}", "H200", 1000, 0, "default") for c in "abc"]
    found.insert(1, Gpu("MIG-a1", "H200 MIG 1g", 100, 0, "default", mig=True))
    assert [d.uuid for d in choose(found, None)] == ["GPU-aaa", "GPU-bbb", "GPU-ccc"]
    assert [(d.index, d.uuid, d.alias) for d in choose(found, "2,0")] == [
        (0, "GPU-ccc", "GPU-aaa"),
        (1, "GPU-aaa", "GPU-bbb"),
    ]
    assert [d.alias for d in choose(found, None)] == ["", "", ""]
    assert [d.uuid for d in choose(found, "GPU-b")] == ["GPU-bbb"]
    assert [(d.uuid, d.memory) for d in choose(found, "MIG-a1")] == [("MIG-a1", 100)]
    assert choose(found, "") == []
    assert [d.uuid for d in choose(found, "1,9,0")] == ["GPU-bbb"], "CUDA stops at what names nothing"
    assert [d.uuid for d in choose(found, "1,1,0")] == ["GPU-bbb"]
