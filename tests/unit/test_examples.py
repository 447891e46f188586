"""Groups in the examples, of pages and of files: what a reader copies is taken."""

from __future__ import annotations

from pathlib import Path

import pytest

from gms_launch.run import placement
from gms_launch.settings import groups
from gms_launch.settings.resolve import read_toml, resolve
from tests import documents

EXAMPLES = {t.where: t.text for t in documents.blocks() if t.language == "toml" and "[[group]]" in t.text}
EXAMPLES |= {p.name: p.read_text() for p in (documents.ROOT / "slurm").glob("*.toml")}


@pytest.mark.parametrize("where", EXAMPLES)
def test_groups_of_an_example_are_taken_and_fit(where: str, tmp_path: Path) -> None:
    file = tmp_path / "example.toml"
    file.write_text(EXAMPLES[where])
    found = resolve({"model": "DIR", "engine": "reference", "nnodes": "4"}, {}, read_toml(file), where)
    made = groups.expand(found, 8)
    assert len(made) >= 2 and len(placement.place(made, 4, 8)) == len(made)


def test_there_are_examples() -> None:
    assert {"docs/guide.md", "docs/engines.md"} <= {
        w.partition(":")[0] for w in EXAMPLES
    } and "prefill-decode.toml" in EXAMPLES
