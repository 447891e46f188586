"""Groups: what a word about them comes to, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from gms_launch.cli import background
from gms_launch.errors import UsageError
from gms_launch.settings import groups
from gms_launch.settings.declared import Settings
from gms_launch.settings.resolve import TABLES_ENV, read_toml, resolve

HALVES = (("a", "prefill"), ("b", "decode"))


def of(*tables: dict[str, Any], nnodes: int = 4, **flags: Any) -> Settings:
    return resolve({"nnodes": str(nnodes), **flags}, {}, {"group": list(tables)} if tables else None)


def test_without_a_word_there_are_none() -> None:
    assert groups.expand(of(), 8) == ()
    assert groups.expand(of(groups="1"), 8) == ()


@pytest.mark.parametrize(
    ("n", "nodes", "gpus", "whole", "tp"), [(2, 2, 8, True, 16), (4, 1, 8, True, 8), (8, 1, 4, False, 4)]
)
def test_equal_groups(n: int, nodes: int, gpus: int, whole: bool, tp: int) -> None:
    found = groups.expand(of(groups=str(n)), 8)
    assert [g.name for g in found] == [f"g{k}" for k in range(n)]
    assert {(g.nodes, g.gpus, g.whole, g.settings.tp) for g in found} == {(nodes, gpus, whole, tp)}


def test_equal_groups_of_a_size() -> None:
    assert {(g.nodes, g.gpus, g.whole) for g in groups.expand(of(groups="3", tp="2"), 8)} == {(1, 2, False)}
    assert {(g.nodes, g.gpus, g.whole) for g in groups.expand(of(groups="2", tp="6", pp="2"), 8)} == {(2, 6, True)}


@pytest.mark.parametrize(
    ("table", "expected"),
    [
        ({"dp": 4, "tp": 2}, (1, 8, False, 2)),
        ({"dp": 4, "tp": 4}, (2, 8, True, 4)),
        ({"dp": 3, "tp": 4}, (3, 4, True, 4)),
        ({"dp": 16, "nodes": 2}, (2, 8, True, 1)),
        ({"dp": 2, "gpus": 4}, (1, 4, False, 2)),
    ],
)
def test_the_size_of_a_group_with_replicas(table: dict[str, Any], expected: tuple[int, int, bool, int]) -> None:
    (g,) = groups.expand(of({"name": "a", **table}), 8)
    assert (g.nodes, g.gpus, g.whole, g.settings.tp) == expected


def test_slurms_idea_of_tp_is_that_of_one_engine() -> None:
    slurm = {"tp": 32, "nnodes": 4}
    assert groups.expand(resolve({"groups": "4"}, {}, scheduler=slurm), 8)[0].settings.tp == 8


def test_a_table_takes_the_rest_from_the_top(tmp_path: Path) -> None:
    file = tmp_path / "s.toml"
    file.write_text(
        'model = "top"\nshadows = 2\nnnodes = 3\ntp = 2\n[[group]]\nname = "a"\ncount = 2\n'
        '[[group]]\nname = "b"\nnodes = 2\ntp = 8\nmodel = "own"\nengine = "reference"\nengine_args = ["--x", "1"]\n'
    )
    s = resolve({}, {}, read_toml(file), str(file), engine_args=["--top"])
    a0, a1, b = groups.expand(s, 8)
    assert (a0.name, a1.name, b.name) == ("a-0", "a-1", "b")
    assert (a0.gpus, a0.settings.tp, a0.settings.model, a0.settings.engine_args) == (2, 2, "top", ("--top",))
    assert (b.nodes, b.gpus, b.whole, b.settings.nnodes, b.settings.shadows) == (2, 4, True, 2, 2)
    assert (b.settings.model, b.settings.engine, b.settings.engine_args) == ("own", "reference", ("--x", "1"))
    assert not b.settings.grouped, "its settings are those of a run by itself"


@pytest.mark.parametrize(
    ("tables", "flags", "says"),
    [
        ([{"name": "a", "nodes": 1}], {"groups": "2"}, r"groups 2 \(from --groups\) makes equal groups"),
        ([{"name": "a", "node": 1}], {}, r"\[\[group\]\] 1: unknown key 'node'; a group has name, count"),
        ([{"nodes": 1}], {}, r"1: it has no name"),
        ([{"name": "a/b"}], {}, "1-16 letters"),
        ([{"name": "a", "nodes": 1, "gpus": 1}], {}, "leave one out"),
        ([{"name": "a", "tp": "two"}], {}, r"tp \(from settings file, \[\[group\]\] 1\): 'two' is not"),
        ([{"name": "a", "role": "both"}], {}, "'both' is not one of agg, prefill, decode"),
        ([{"name": "a", "role": "prefill"}], {}, "none has role decode"),
        (
            [{"name": "a", "role": "prefill"}, {"name": "b", "role": "decode", "served_model_name": "m2"}],
            {},
            "group a has role prefill and none has role decode for model ''",
        ),
        (
            [{"name": "a", "role": "prefill"}, {"name": "b", "role": "decode"}, {"name": "c"}],
            {},
            "groups a and b are two halves, and group c answers by itself for the same model",
        ),
        (
            [{"name": n, "gpus": 1, "role": r, "engine": "reference", "component": "x"} for n, r in HALVES],
            {},
            r"groups a \(prefill\) and b \(decode\) have component x",
        ),
        (
            [{"name": "a", "gpus": 1}, {"name": "b", "gpus": 1, "served_model_name": "m", "component": "backend"}],
            {},
            "groups a and b have component backend and serve models",
        ),
        ([{"name": "a", "tp": 65536, "pp": 65536}], {}, "more than 4096 nodes have"),
        ([{"name": f"a{k}", "count": 1024} for k in range(10_000)], {}, "make 10240000 groups"),
        ([{"name": "a", "role": "prefill"}, {"name": "b", "role": "decode"}], {}, "says neither nodes"),
        (
            [{"name": "a", "role": "prefill", "gpus": 1}, {"name": "b", "role": "decode", "gpus": 1}],
            {},
            "group a: role prefill needs engine_args with --kv-transfer-config",
        ),
        ([{"name": "a", "component": "x.y"}], {}, "component 'x.y'"),
        ([{"name": "a", "engine_args": "--x"}], {}, "no list of words"),
        ([{"name": "a", "engine_args": ["\n"]}], {}, "control character"),
        ([{"name": "a", "count": 2}, {"name": "a-1"}], {}, "two groups are called a-1"),
        ([{"name": "a", "count": 1024}, {"name": "b"}], {}, "make 1025 groups; a run has at most 1024"),
        ([{"name": "a"}], {}, "says neither nodes, nor gpus, nor tp"),
        ([{"name": "a", "gpus": 2, "tp": 4}], {}, "tp 4 times pp 1 is 4 GPUs, and gpus gives it 2"),
        ([{"name": "a", "gpus": 9}], {}, "gpus 9, and a node has 8 GPUs"),
        ([{"name": "a", "nodes": 2, "tp": 3}], {}, "3 GPUs, which cannot be spread evenly over 2 nodes"),
        ([{"name": "a", "nodes": 2, "tp": 32}], {}, "32 GPUs, 16 on each of 2 nodes, and a node has 8 GPUs"),
        ([{"name": "a", "gpus": 3}], {"pp": "2"}, "gpus 3 cannot be divided by pp 2"),
        ([{"name": "a", "gpus": 6, "dp": 4}], {}, "gpus 6 cannot be divided by pp 1 times dp 4"),
        ([{"name": "a", "gpus": 6, "dp": 2, "tp": 2}], {}, "tp 2 times pp 1 times dp 2 is 4 GPUs, and gpus gives it 6"),
        ([{"name": "a", "nodes": 2, "dp": 3, "tp": 4}], {}, "group a: dp 3 cannot be spread evenly over 2 nodes"),
        ([{"name": "a", "gpus": 1, "engine_args": ["--headless"]}], {}, "group a: engine argument --headless"),
        ([], {"groups": "3"}, r"\(4 / 3\) nor the GPUs of a node \(8 / \(3 / 4\)\)"),
    ],
)
def test_what_is_refused(tables: list[dict[str, Any]], flags: dict[str, str], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        groups.expand(of(*tables, **flags), 8)


def test_an_agent_that_another_process_starts_gets_the_tables_too() -> None:
    said = of({"name": "a", "gpus": 1, "engine_args": ["--x", "1"]}, {"name": "b", "gpus": 2})
    told = resolve({}, background.as_environment(said))
    assert groups.expand(told, 8) == groups.expand(said, 8)
    assert background.as_environment(resolve({}, {})) == {}
    with pytest.raises(UsageError, match="no list of tables"):
        resolve({}, {TABLES_ENV: "none"})


@pytest.mark.parametrize("wrong", [1, "a", {"name": "a"}, ["a"]])
def test_group_must_be_tables(wrong: Any) -> None:
    with pytest.raises(UsageError, match="no list of tables"):
        resolve({}, {}, {"group": wrong})


def test_each_model_has_a_component_of_its_own() -> None:
    tables = [
        {"name": "a", "gpus": 1},
        {"name": "b", "gpus": 1, "served_model_name": "m2"},
        {"name": "c", "gpus": 1, "served_model_name": "m2"},
        {"name": "d", "gpus": 1, "served_model_name": "m3", "component": "mine"},
    ]
    found = groups.expand(resolve({"model": "m1"}, {}, {"group": tables}), 8)
    assert [(g.name, g.component) for g in found] == [("a", ""), ("b", "backend-2"), ("c", "backend-2"), ("d", "mine")]
    tables[0]["component"] = "mine"
    with pytest.raises(UsageError, match="groups a and d have component mine and serve models m1 and m3"):
        groups.expand(resolve({"model": "m1"}, {}, {"group": tables}), 8)


@pytest.mark.parametrize("found", [[{"name": "a"}], {"name": "a"}])
def test_a_table_by_the_name_of_the_number_is_told_how_tables_begin(found: Any) -> None:
    with pytest.raises(UsageError, match=r"g.toml: groups is a number, of equal groups; .* begin with \[\[group\]\]"):
        resolve({}, {}, {"groups": found}, "g.toml")
