"""Which group a verb is about: named, the only one, or refused with those that there are."""

from __future__ import annotations

from dataclasses import replace

import pytest

from gms_launch.cli import which
from gms_launch.errors import UsageError
from gms_launch.run.rundir import RunFile

PLAIN = RunFile("r", "0", 0.0, "h", "b", 1, 1, "/n")


def of(*names: str) -> RunFile:
    return replace(PLAIN, groups={n: {"nodes": [0], "shadows": 1, "engine": "vllm"} for n in names})


def test_a_verb_that_shows_shows_all_and_one_that_acts_must_be_told() -> None:
    assert which.group(of("a", "b"), None) == "" and which.group(of("a", "b"), "b") == "b"
    assert which.one_group(of("a", "b"), "b") == "b"
    assert which.one_group(of("a"), None) == "a", "there is only one"
    assert which.one_group(PLAIN, None) == "" == which.group(None, None)
    with pytest.raises(UsageError, match=r"say which with --group: the run has groups a, b$"):
        which.one_group(of("a", "b"), None)


@pytest.mark.parametrize("name", ["c", "", "A", "a ", "../a", "a\nb", "x" * 5000])
def test_a_name_that_there_is_not_is_refused_with_those_that_there_are(name: str) -> None:
    for ask in (which.group, which.one_group):
        with pytest.raises(UsageError, match=r"the run has groups a, b$") as caught:
            ask(of("a", "b"), name)
        assert len(str(caught.value)) < 400 and "\n" not in str(caught.value)
        with pytest.raises(UsageError, match="the run has no groups"):
            ask(PLAIN, name)


def test_a_thousand_names_are_not_all_told() -> None:
    with pytest.raises(UsageError, match=r"g23 and 1000 more$"):
        which.one_group(of(*(f"g{k}" for k in range(1024))), None)
