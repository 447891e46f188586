"""What we rely on in Dynamo, looked up in the wheels of every release line."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

from gms_launch.cohort.model import Phase
from gms_launch.engines import signals, vllm
from gms_launch.engines.base import MEETING_SECRET
from gms_launch.engines.vllm import LINES, Line
from gms_launch.settings.groups import COMPONENTS
from gms_launch.settings.resolve import resolve
from tests.unit.engines.test_engines import plan_of
from tests.wheels.source import Wheel

wheel = cache(Wheel)
each_line = pytest.mark.parametrize("line", LINES, ids=[x.release for x in LINES])


def wait_for_lock(line: Line) -> str:
    """The code that parks, waits for the lock and wakes: in the worker factory up to 1.4, and then shared."""
    where = wheel(line.release)
    path, text = where.function("dynamo/vllm/worker_factory.py", "_maybe_wait_for_failover_lock")
    assert path == "dynamo/vllm/worker_factory.py"
    if "elect_and_wake" in text:
        text += where.function("dynamo/common/snapshot/lifecycle.py", "elect_and_wake")[1]
    return text


@each_line
def test_release(line: Line) -> None:
    found = wheel(line.release)
    assert f"\nVersion: {line.release}\n" in found.metadata
    pins = re.findall(r"^Requires-Dist: vllm\[.*\]==(\S+?);", found.metadata, re.MULTILINE)
    assert set(pins) == {line.vllm}
    assert vllm.line_of(line.release) is line
    assert line.release.startswith(line.dynamo + ".")


@each_line
def test_flags_and_variables_of_the_engine(line: Line) -> None:
    found = wheel(line.release)
    flags = found.flags("dynamo/vllm/") | found.flags("dynamo/common/configuration/")
    assert flags["--gms-shadow-mode"]["env_var"] == "DYN_VLLM_GMS_SHADOW_MODE"
    assert flags["--headless"]["env_var"] == "DYN_VLLM_HEADLESS"
    assert flags["--namespace"]["env_var"] == "DYN_NAMESPACE"
    assert flags["--endpoint"]["env_var"] == "DYN_ENDPOINT"
    assert flags["--discovery-backend"]["env_var"] == "DYN_DISCOVERY_BACKEND"
    assert flags["--request-plane"]["env_var"] == "DYN_REQUEST_PLANE"
    plane = flags["--event-plane"]
    assert plane["env_var"] == "DYN_EVENT_PLANE" and set(plane["choices"]) == {"nats", "zmq"}  # type: ignore[call-overload]
    said = str(plane["help"])
    default = plane["default"] or (
        "nats" if "'nats' for etcd" in said else "zmq" if "defaults to 'zmq'" in said else ""
    )
    assert default == line.event_plane
    read = found.environ("dynamo/vllm/")
    assert {"ENGINE_ID", "FAILOVER_LOCK_PATH"} <= read


@each_line
def test_halves_are_told_apart_as_we_do(line: Line) -> None:
    found = wheel(line.release)
    assert "--disaggregation-mode" in found.flags("dynamo/vllm/")
    _, args = found.function("dynamo/vllm/args.py", "update_dynamo_config_with_engine")
    for role, component in (("PREFILL", COMPONENTS["prefill"]), ("ENCODE", "encode")):
        assert re.search(rf'DisaggregationMode.{role}:\s+dynamo_config.component = "{component}"', args)
    assert f'dynamo_config.component = "{COMPONENTS["decode"]}"' in args
    assert "parse_endpoint(user_endpoint)" in args, "--endpoint counts for more"
    assert re.search(r"PREFILL\s+and not has_kv_transfer_config", args), "refused there without a way for the KV cache"
    both = found.sources["dynamo/vllm/worker_factory.py"]
    waits = both.count("self._maybe_wait_for_failover_lock(")
    assert waits == 2, "prefill engines park and wait for the lock as the others do"
    assert "ModelType.Prefill" in both


@each_line
def test_every_variable_that_we_set_is_known(line: Line) -> None:
    """Dynamo's Python reads it, or its native runtime or vLLM does: those are named here, so that a new one shows."""
    native = {"DYN_SYSTEM_PORT", "DYN_SYSTEM_HOST", "DYN_SYSTEM_STARTING_HEALTH_STATUS", "DYN_HEALTH_CHECK_ENABLED"}
    native |= {"DYN_SYSTEM_USE_ENDPOINT_HEALTH_STATUS", "DYN_TCP_RPC_HOST", "DYN_TCP_RESPONSE_STREAM_HOST"}
    native |= {"DYN_EVENT_PLANE_HOST", "ETCD_ENDPOINTS", "ETCD_LEASE_TTL", "ETCD_AUTH_USERNAME", "ETCD_AUTH_PASSWORD"}
    native |= {"ETCD_AUTH_CA", "ETCD_AUTH_CLIENT_CERT", "ETCD_AUTH_CLIENT_KEY"}
    native |= {"NATS_SERVER", "NATS_AUTH_USERNAME", "NATS_AUTH_PASSWORD", "GMS_SOCKET_DIR"}
    native |= {"NATS_AUTH_TOKEN", "NATS_AUTH_NKEY", "NATS_AUTH_CREDENTIALS_FILE"}
    vllms = {
        "TMPDIR",
        "VLLM_PORT",
        "VLLM_RPC_BASE_PATH",
        "VLLM_HOST_IP",
        "VLLM_CACHE_ROOT",
        "VLLM_NIXL_SIDE_CHANNEL_PORT",
        "VLLM_USE_FLASHINFER_SAMPLER",
    }
    vllms |= {"VLLM_NIXL_SIDE_CHANNEL_HOST", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "FLASHINFER_WORKSPACE_BASE"}
    ours = {MEETING_SECRET}  # what the reference engine's ranks know each other by
    later = {"DYN_GMS_USE_V1", "DYN_SNAPSHOT_CONTROL_DIR"}  # unset for the lines that know them
    found = wheel(line.release)
    flags = found.flags("dynamo/vllm/") | found.flags("dynamo/common/configuration/")
    known = {str(f.get("env_var")) for f in flags.values()} | found.environ("dynamo/") | set(found.strings("dynamo/"))
    command = plan_of(resolve({"engine": "vllm", "model": "/m"}, {})).rank_command(0, 1, 29500)
    assert set(command.env) - known - native - vllms - later - ours == set()


@each_line
def test_the_frontends_flags(line: Line) -> None:
    flags = wheel(line.release).flags("dynamo/frontend/")
    assert {"--http-host", "--http-port", "--migration-limit", "--namespace"} <= set(flags)


@each_line
def test_routes(line: Line) -> None:
    calls = wheel(line.release).calls("dynamo/vllm/worker_factory.py", "register_engine_route")
    routes = {call.args[0].value for _, call in calls if isinstance(call.args[0], ast.Constant)}
    assert {f"{line.control}sleep", f"{line.control}wake_up"} <= routes


@each_line
def test_order_parked_healthy_lock_wake(line: Line) -> None:
    """It sleeps, says it is healthy, waits for the lock, wakes, registers: health means parked at least."""
    text = wait_for_lock(line)
    order = ["pause(1)" if "pause(1)" in text else "sleep", "set_health_status(True)", "waiting for lock"]
    order += ["FlockFailoverLock(" if "FlockFailoverLock(" in text else ".acquire(", "Lock acquired, waking engine"]
    order += ["Engine awake, registering with discovery"]
    places = [text.find(word) for word in order]
    if "elect_and_wake" in text:  # two functions, one after the other: the election's own order counts
        places = [text.rfind(word) for word in order]
        order, places = order[1:], places[1:]
    assert -1 not in places, dict(zip(order, places, strict=True))
    assert places == sorted(places), dict(zip(order, places, strict=True))
    factory = wheel(line.release).sources["dynamo/vllm/worker_factory.py"]
    first_wait = factory.find("await self._maybe_wait_for_failover_lock(")
    assert first_wait < factory.find("await self.register_vllm_model(", first_wait)


@each_line
def test_log_lines_show_the_phase(line: Line) -> None:
    logged = [s for s in wheel(line.release).strings("dynamo/") if s.startswith("[Shadow] ")]
    seen = {vllm.ENGINE.phase_of(f"INFO worker_factory.py:1 {text}") for text in logged}
    assert {Phase.PARKED, Phase.WAKING} <= seen
    assert sum(vllm.ENGINE.is_awake(text) for text in set(logged)) == 1
    assert any(f"Engine {line.parked}, startup probe now passing, waiting for lock" in text for text in logged)
    assert any("[GMS] Failover enabled: will use scratch KV" in s for s in wheel(line.release).strings("dynamo/vllm/"))


@each_line
def test_failover_metrics_and_their_states(line: Line) -> None:
    found = wheel(line.release)
    used = any("gpu_memory_service.failover_lock.failover_metrics" in text for text in found.sources.values())
    assert used == line.metrics
    states = {
        call.args[0].value for _, call in found.calls("dynamo/", "set_state") if isinstance(call.args[0], ast.Constant)
    }
    assert states == (set(signals.STATES) if line.metrics else set())


@each_line
def test_ranks_above_0_run_headless_through_vllm_with_the_gms_worker(line: Line) -> None:
    _, text = wheel(line.release).function("dynamo/vllm/", "run_dynamo_headless")
    for word in ("run_headless(", "gpu_memory_service.integrations.vllm.worker.GMSWorker", "configure_gms_lock_mode"):
        assert word in text


@each_line
def test_shadow_mode_without_the_gms_loader_is_upstreams_error_too(line: Line) -> None:
    text = wheel(line.release).sources["dynamo/vllm/args.py"]
    assert "--gms-shadow-mode requires --load-format gms" in text


def test_the_table_in_the_docs_is_this_one() -> None:
    text = (Path(__file__).parents[2] / "docs" / "compatibility.md").read_text()
    for line in LINES:
        row = (
            f"| {line.dynamo} | {line.release} | {line.vllm} | `/engine/{line.control}sleep` | {line.parked} | "
            f"{'yes' if line.metrics else 'no'} | {line.event_plane} | {'yes' if line.needs_system_port else 'no'} |"
        )
        assert row in text, row
