"""In what the nodes of a run differ, as they are told."""

from __future__ import annotations

import json

from gms_launch.run.agreement import settings_differences
from gms_launch.settings.resolve import resolve

GROUPS = {"group": [{"name": "a", "nodes": 1}, {"name": "b", "nodes": 1}]}


def test_only_what_differs_is_told_also_of_a_run_of_groups() -> None:
    """Against run.json, in which tables are lists and not what a node has in memory."""
    leaders = json.loads(json.dumps(resolve({"nnodes": "2"}, {}, GROUPS).to_json()))
    assert settings_differences(resolve({"nnodes": "2"}, {}, GROUPS), leaders) == []
    (told,) = settings_differences(resolve({"nnodes": "2", "shadows": "2"}, {}, GROUPS), leaders)
    assert told == "shadows is 2 here and 1 there"
