"""The dashboard against the schema of Grafana, from which its SDK is made: no Grafana server can be installed here."""

from __future__ import annotations

import json
import sys
import typing
from collections.abc import Iterator
from enum import Enum
from itertools import combinations
from pathlib import Path
from types import UnionType
from typing import Any

import pytest

DASHBOARD = Path(__file__).parents[2] / "docs" / "monitoring" / "dashboard.json"
#: Of Grafana's import and of its Prometheus data source, and not in the schema of a dashboard.
BESIDE = {"/templating/list/1/definition", "/annotations/list/0/titleFormat", "/annotations/list/0/textFormat"}


def read() -> Any:
    return json.loads(DASHBOARD.read_text())


def lost(given: Any, kept: Any, path: str = "") -> Iterator[str]:
    """Where what Grafana's models keep is not what they were given."""
    if isinstance(given, dict) and isinstance(kept, dict):
        for key, value in given.items():
            yield from lost(value, kept[key], f"{path}/{key}") if key in kept else [f"{path}/{key}"]
    elif isinstance(given, list) and isinstance(kept, list) and len(given) == len(kept):
        for k, (one, other) in enumerate(zip(given, kept, strict=True)):
            yield from lost(one, other, f"{path}/{k}")
    elif given != kept:
        yield path


def wrong(value: Any, kind: Any, path: str = "") -> Iterator[str]:
    """Where a value is not of the type that Grafana's models declare."""
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if kind in (Any, object):
        return
    if origin in (typing.Union, UnionType):
        if not any(not [*wrong(value, one)] for one in inner):
            problems = [[*wrong(value, one, path)] for one in inner if one is not type(None)]
            yield from min(problems, key=len)
    elif origin is typing.Literal:
        if value not in inner:
            yield f"{path}: {value!r} is none of {inner}"
    elif origin in (list, dict):
        items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else None
        if items is None:
            yield f"{path}: {value!r} is no {kind}"
        for key, one in items or ():
            yield from wrong(one, inner[-1], f"{path}/{key}")
    elif isinstance(kind, type) and issubclass(kind, Enum):
        if value not in [one.value for one in kind]:
            yield f"{path}: {value!r} is none of {[one.value for one in kind]}"
    elif kind is float or kind is int:
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            yield f"{path}: {value!r} is no number"
    elif not isinstance(value, kind):
        yield f"{path}: {value!r} is no {kind.__name__}"
    elif hasattr(value, "to_json"):
        for name, declared in typing.get_type_hints(type(value)).items():
            yield from wrong(getattr(value, name), declared, f"{path}/{name}")
        # A panel's options and a target are of its plugin, which the dashboard's own schema leaves open.
        for name in ("options", "targets", "custom"):
            for k, one in enumerate(open_part(value, name)):
                yield from wrong(one, type(one), f"{path}/{name}/{k}")


def open_part(value: Any, name: str) -> list[Any]:
    part = getattr(value, name, None)
    return [one for one in (part if isinstance(part, list) else [part]) if hasattr(one, "to_json")]


def decoded(text: Any) -> Any:
    if sys.version_info < (3, 11):
        pytest.skip("Grafana's SDK needs Python 3.11")
    from grafana_foundation_sdk.cog.plugins import register_default_plugins
    from grafana_foundation_sdk.models.dashboard import Dashboard

    register_default_plugins()
    return Dashboard.from_json(text)


def problems(text: Any) -> list[str]:
    found = decoded(text)
    from grafana_foundation_sdk.cog.encoder import JSONEncoder

    kept = json.loads(JSONEncoder().encode(found))
    return [*(p for p in lost(text, kept) if p not in BESIDE), *wrong(found, type(found))]


def test_grafana_knows_every_field_and_value() -> None:
    assert problems(read()) == []


@pytest.mark.parametrize(
    ("place", "key", "value"),
    [
        ((), "refreshh", "30s"),
        ((), "graphTooltip", 7),
        (("panels", 0, "options"), "colourMode", "background"),
        (("panels", 0, "options"), "colorMode", "backgruond"),
        (("panels", 0, "targets", 0), "expression", "up"),
        (("panels", 0, "targets", 0), "instant", "yes"),
        (("panels", 0, "gridPos"), "w", "6"),
        (("panels", 5, "fieldConfig", "defaults"), "custom", {"drawStyle": "dots"}),
    ],
)
def test_a_slip_is_seen(place: tuple[Any, ...], key: str, value: object) -> None:
    text = read()
    into = text
    for step in place:
        into = into[step]
    into[key] = value
    assert problems(text) != []


def test_panels_have_their_own_numbers_and_places() -> None:
    panels = read()["panels"]
    assert len({p["id"] for p in panels}) == len(panels) > 10
    for panel in panels:
        assert panel["gridPos"]["x"] + panel["gridPos"]["w"] <= 24, panel["title"]
        refs = [t["refId"] for t in panel["targets"]]
        assert len(set(refs)) == len(refs), panel["title"]
    for one, other in combinations(panels, 2):
        a, b = one["gridPos"], other["gridPos"]
        beside = a["x"] + a["w"] <= b["x"] or b["x"] + b["w"] <= a["x"]
        below = a["y"] + a["h"] <= b["y"] or b["y"] + b["h"] <= a["y"]
        assert beside or below, f"{one['title']} lies on {other['title']}"


def test_every_query_goes_to_the_data_source_that_is_chosen() -> None:
    text = read()
    variables = {v["name"]: v for v in text["templating"]["list"]}
    assert variables["datasource"]["type"] == "datasource" and variables["datasource"]["query"] == "prometheus"
    asking = [*text["panels"], *(t for p in text["panels"] for t in p["targets"]), *text["annotations"]["list"]]
    asking += [v for v in variables.values() if v["type"] == "query"]
    for one in asking:
        assert one["datasource"] == {"type": "prometheus", "uid": "${datasource}"}, one


def test_what_a_number_says_is_of_now() -> None:
    """The last value in a range is told for hours after a run has ended, and would say that it is full."""
    for panel in read()["panels"]:
        for target in panel["targets"] if panel["type"] in ("stat", "table") else ():
            assert target["instant"] and not target["range"], panel["title"]
