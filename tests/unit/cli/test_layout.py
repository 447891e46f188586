"""`-o` says in YAML and in columns what `--json` says."""

from __future__ import annotations

import json

import pytest
import yaml  # type: ignore[import-untyped]

from gms_launch.cli.layout import document

DATA = {
    "schema": 1,
    "run": "no",
    "why": 'a "quoted": line\nand # another é',
    "none": None,
    "at": 1795920333.25,
    "yes": True,
    "short": [5e-05, -1e-07, 1e22, 1.5e-06],
    "cohorts": [{"id": 0, "ranks": [{"pid": 1, "left": []}, {"pid": 2, "left": [[1, 2], "x"]}]}, {}, []],
    "empty": {},
    "odd key: #": {"0": [None]},
}


@pytest.mark.parametrize("data", [DATA, [], {}, [1, [2, [{"a": 1}]]], "text"])
def test_yaml_says_what_json_says(data: object) -> None:
    assert yaml.safe_load(document(data, "yaml")) == json.loads(document(data, "json")) == data
