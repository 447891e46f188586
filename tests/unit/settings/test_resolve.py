"""Settings: where they come from, and what is refused."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from gms_launch.engines.base import MEETING_SECRET
from gms_launch.errors import UsageError
from gms_launch.settings.declared import SETTINGS, Setting, Settings
from gms_launch.settings.resolve import RESERVED_ENV, TABLES_ENV, read_toml, resolve


def resolved(environ: dict[str, str] | None = None, toml: dict[str, Any] | None = None, **flags: Any) -> Settings:
    return resolve(flags, environ or {}, toml)


def test_every_setting_is_a_field_and_the_other_way_round() -> None:
    fields = {f.name for f in dataclasses.fields(Settings)} - {"engine_args", "tables", "sources"}
    assert fields == {s.name for s in SETTINGS}


def test_order_of_the_sources() -> None:
    environ = {"GMS_LAUNCH_TP": "4", "TP": "2"}
    toml = {"tp": 8}
    assert resolved(environ, toml, tp="16").tp == 16
    assert resolved(environ, toml).tp == 4
    assert resolved({"TP": "2"}, toml).tp == 2
    assert resolved({}, toml).tp == 8
    assert resolve({}, {}, None, scheduler={"tp": 3}).tp == 3
    assert resolved().tp == 1


def test_the_recipes_names() -> None:
    s = resolved({"MODEL": "m", "TP": "2", "LEADER_ADDR": "10.0.0.1", "FRONTEND_PORT": "9000", "GMS_SOCKET_DIR": "/x"})
    assert (s.model, s.tp, s.leader_addr, s.frontend_port, s.gms_socket_dir) == ("m", 2, "10.0.0.1", 9000, "/x")
    assert s.sources["model"] == "MODEL"
    assert not resolved({"MODEL": ""}).was_set("model"), "an empty variable is unset, as in the recipe"


@pytest.mark.parametrize(
    ("environ", "toml", "flags", "says"),
    [
        ({"GMS_LAUNCH_MODLE": "x"}, None, {}, "did you mean GMS_LAUNCH_MODEL"),
        ({}, {"modle": "x"}, {}, "did you mean model"),
        ({}, {"tp": "two"}, {}, "tp (from settings file)"),
        ({}, {"tp": True}, {}, "expected int"),
        ({}, None, {"tp": "0"}, "below 1"),
        ({}, None, {"engine": "sglang"}, "not one of vllm, reference"),
        ({}, None, {"frontend_port": "70000"}, "above 65535"),
        ({}, None, {"system_port": "40000"}, "above 32000"),
        ({"GMS_LAUNCH_NATS": "maybe"}, None, {}, "neither true nor false"),
        ({}, None, {"node_rank": "2", "nnodes": "2"}, "does not exist with nnodes 2"),
        ({}, None, {"tp": "3", "nnodes": "2"}, "cannot be spread evenly"),
        ({}, None, {"nats": False, "event_plane": "nats"}, "needs NATS"),
        ({}, None, {"nats": False, "nats_server": "nats://x:1"}, "switches NATS off"),
        ({}, None, {"run_id": "no/slash"}, "1-20 letters"),
        ({}, None, {"run_id": "a" * 21}, "1-20 letters"),
        ({}, None, {"etcd_port": "4000", "nats_port": "4000"}, "are both 4000"),
        ({}, None, {"lease_ttl": "1"}, "below 2 s"),
        ({}, None, {"dynamo_lease_ttl": "2"}, "use 5 or more"),
        ({}, None, {"restart_backoff": "90"}, "longer than restart_backoff_max"),
        ({}, None, {"health_timeout": "3", "health_interval": "2"}, "shorter than two health_intervals"),
        ({}, None, {"canary_timeout": "15", "canary_interval": "8"}, "shorter than two canary_intervals"),
        ({}, None, {"service_liveness": "9"}, "before a silent etcd could be back"),
        ({}, None, {"tp": "2", "pp": "3", "nnodes": "4"}, "tp 2 times pp 3 cannot be spread"),
        ({}, None, {"engine_file": "x"}, "--engine is vllm"),
        ({}, None, {"etcd_port": "4000", "word_port": "4000"}, "etcd_port and word_port are both 4000"),
        ({}, None, {"word_port": "8081", "system_port": "8080"}, "word_port and system_port are both 8081"),
        (
            {},
            None,
            {"system_port": "8080", "nixl_port": "8081"},
            "system_port and nixl_port are both 8081 (system_port",
        ),
        ({}, None, {"vllm_port": "29400", "master_port": "29500"}, "vllm_port and master_port are both 29500"),
        ({}, None, {"namespace": "a.b"}, "no dots or slashes"),
        ({}, None, {"namespace": "a/b"}, "no dots or slashes"),
        ({}, None, {"etcd_endpoints": "http://a:2379,b"}, "--etcd-endpoints 'b' is no URL"),
        ({}, None, {"etcd_endpoints": "http://a:x"}, "is no URL"),
        ({}, None, {"etcd_endpoints": "http://u:p@a:1"}, "'http://<hidden>@a:1' holds a login"),
        ({}, None, {"etcd_ca": "/x"}, "etcd_ca (from --etcd-ca) is for a server of your own that speaks TLS"),
        ({}, None, {"etcd_ca": "/x", "etcd_endpoints": "http://a:1"}, "--etcd-endpoints https://..."),
        ({}, None, {"etcd_endpoints": "http://a:1,https://b:1"}, "everywhere or nowhere"),
        ({}, None, {"etcd_key": "/x", "etcd_endpoints": "https://a:1"}, "needs --etcd-cert too"),
        ({}, None, {"nats_cert": "/x", "nats_server": "nats://a:1"}, "--nats-server tls://..."),
        ({}, None, {"nats_cert": "/x", "nats_server": "tls://a:1"}, "needs --nats-key too"),
        ({}, None, {"nats_server": "u:p@somewhere"}, "--nats-server '<hidden>@somewhere' is no URL"),
        ({}, None, {"nats_server": "nats://u:p/q?r@a:1"}, "--nats-server 'nats://<hidden>@a:1' is no URL"),
        ({}, None, {"nats_server": "nats://a:1?token=s"}, "'nats://a:1?<hidden>' has something after a ?"),
        ({}, None, {"etcd_endpoints": "http://a:1/#s"}, "'http://a:1/?<hidden>' has something after"),
        ({}, None, {"nats_server": "nats://u:" + 5000 * "p" + "@a"}, "<hidden> is longer than"),
        ({}, None, {"nats_server": "somewhere"}, "expected something like nats://HOST:4222"),
        ({}, None, {"migration_limit": "4294967296"}, "above 4294967295"),
        ({}, {"lease_ttl": float("inf")}, {}, "not a valid float"),
        ({}, {"tp": "many"}, {"tp": "2"}, "tp (from settings file): 'many'"),
    ],
)
def test_what_is_refused(
    environ: dict[str, str], toml: dict[str, Any] | None, flags: dict[str, Any], says: str
) -> None:
    with pytest.raises(UsageError) as caught:
        resolve(flags, environ, toml)
    assert says in str(caught.value)
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["--model", "x"], "use --model before the --"),
        (["--tensor_parallel_size=2"], "use --tp before the --"),
        (["-tp", "2"], "use --tp before the --"),
        (["--headless"], "follows from the node rank"),
        (["--load-format=auto"], "only gms works here"),
        (["--load_format", "safetensors"], "only gms works here"),
        (["--distributed-executor-backend", "ray"], "not with Ray"),
        (["--data-parallel-size", "2"], "use --dp before the --"),
        (["--data-parallel-backend=ray"], "only mp works here"),
        (["-dpl", "2"], "it follows from --dp and the node"),
        (["--data-parallel-hybrid-lb"], "use --dp-lb hybrid before the --"),
        (["--disaggregation-mode", "prefill"], "give a [[group]] the role"),
        (["--kv-events-config", "nothing"], "expected a JSON object"),
        (["--kv_events_config=[]"], "expected a JSON object"),
        (["--no-enable-sleep-mode"], "parks by sleeping"),
    ],
)
def test_engine_arguments_that_break_shadow_mode_are_refused_with_the_reason(args: list[str], says: str) -> None:
    with pytest.raises(UsageError) as caught:
        resolve({}, {}, engine_args=["--max-model-len", "8", *args])
    assert says in str(caught.value)
    resolve({"engine": "command"}, {}, engine_args=args)


def test_an_etcd_of_ones_own_has_no_members_here_and_auto_asks_for_none() -> None:
    own = {"etcd_endpoints": "http://a:2379"}
    with pytest.raises(UsageError, match="--etcd-endpoints names another"):
        resolved(etcd_members="3", **own)
    assert resolved(etcd_members="auto", **own).etcd_endpoints


def test_auto_is_three_members_from_three_nodes_on_and_a_frontend_beside_each() -> None:
    s = resolved(etcd_members="auto", frontends="auto")
    assert [(s.members(n), s.fronts(n)) for n in (1, 2, 3, 8)] == [(1, 1), (1, 1), (3, 3), (3, 3)]


def test_the_number_of_replicas_is_said_once() -> None:
    with pytest.raises(UsageError, match=r"--data-parallel-size 1, and dp 2 \(from --dp\); leave one out"):
        resolve({"dp": "2"}, {}, engine_args=["-dp", "1"])
    assert resolve({"dp": "2"}, {}, scheduler={"tp": 16, "nnodes": 2}).tp == 8, "Slurm's GPUs, of one replica"
    assert resolve({"dp": "2"}, {}, scheduler={"nnodes": 2}).tp == 1


def test_hybrid_load_balancing_takes_replicas_and_locks_that_agents_hold() -> None:
    said = {"dp": "4", "dp_lb": "hybrid", "activation": "agent", "nnodes": "2"}
    assert resolve(said, {}).hybrid and not resolve(said | {"nnodes": "1"}, {}).hybrid
    with pytest.raises(UsageError, match=r"dp_lb hybrid \(from --dp-lb\) needs --activation agent"):
        resolve(said | {"activation": "lock"}, {})
    with pytest.raises(UsageError, match="is about several replicas, and dp is 1"):
        resolve(said | {"dp": "1"}, {})


def test_other_engine_arguments_pass() -> None:
    args = ["--load-format", "gms", "--distributed-executor-backend=mp", "--max-model-len", "-1", "-dp", "1"]
    args += ["--kv-events-config", '{"endpoint": "tcp://*:5557"}', "--no-enforce-eager"]
    assert resolve({}, {}, engine_args=args).engine_args == tuple(args)


def test_toml(tmp_path: Path) -> None:
    file = tmp_path / "s.toml"
    file.write_text('[gms-launch]\nmodel = "m"\nnats = false\nlease_ttl = 7\n')
    settings = resolve({}, {}, read_toml(file))
    assert (settings.model, settings.nats, settings.lease_ttl) == ("m", False, 7.0)
    with pytest.raises(UsageError, match="does not exist"):
        read_toml(tmp_path / "other.toml")
    file.write_text('model = "a"\n[gms-launch]\nmodel = "m"\n')
    with pytest.raises(UsageError, match="model is at the top and in "):
        read_toml(file)
    file.write_text("model = ")
    with pytest.raises(UsageError, match="not valid TOML"):
        read_toml(file)


def test_a_default_gives_way_to_what_was_said_of_its_neighbour() -> None:
    given = resolve({"health_timeout": "3", "canary_timeout": "6", "restart_backoff_max": "0.5"}, {})
    assert (given.health_interval, given.canary_interval, given.restart_backoff) == (0.75, 1.5, 0.5)
    assert resolve({"dynamo_lease_ttl": "5"}, {}).service_liveness == 1.0
    usual = resolve({}, {})
    assert usual.service_liveness == 3.0
    assert (usual.health_interval, usual.canary_interval, usual.restart_backoff) == (5.0, 10.0, 1.0)
    assert resolve({"health_timeout": "3", "health_interval": "1"}, {}).health_interval == 1.0


def test_only_a_close_match_is_suggested() -> None:
    for name, guess in ("sahdows", "shadows"), ("node_rnk", "node_rank"), ("port", ""), ("timeout", ""):
        with pytest.raises(UsageError) as caught:
            resolve({}, {}, {name: 1})
        assert ("did you mean" in str(caught.value)) == bool(guess) and guess in str(caught.value)


NUMBERS = [s for s in SETTINGS if s.kind in (int, float)]
#: What is no number, whatever Python thinks of some.
NO_NUMBER = [
    "",
    " ",
    "x",
    "nan",
    "inf",
    "-inf",
    "1e999",
    "1e308",
    "-1",
    "9" * 30,
    "9" * 5000,
    "٣",
    "²",
    "1_0",
    "0x10",
    " 7",
]


@pytest.mark.parametrize("setting", NUMBERS, ids=lambda s: s.name)
def test_every_number_has_bounds_and_is_written_in_digits(setting: Setting) -> None:
    assert setting.minimum is not None and setting.maximum is not None
    for text in [*NO_NUMBER, *(["1.5", "1e5"] if setting.kind is int else [])]:
        for flags, environ, toml in (
            ({setting.name: text}, {}, None),
            ({}, {setting.env: text}, None),
            ({}, {}, {setting.name: text}),
        ):
            if text or flags:  # an empty variable counts as unset
                with pytest.raises(UsageError):
                    resolve(flags, environ, toml)
    for value in float("inf"), float("nan"), 10**400, -(10**400), 1e300, True, [1], {"a": 1}, setting.maximum + 1:
        with pytest.raises(UsageError):
            resolve({}, {}, {setting.name: value})


def test_names_of_our_own_that_are_no_settings_are_passed_over() -> None:
    """A verb that is run by an engine, or by a hook, finds them in its environment."""
    assert resolve({}, dict.fromkeys(RESERVED_ENV - {TABLES_ENV}, "x")) == resolve({}, {})
    assert MEETING_SECRET in RESERVED_ENV
