"""Which group of a run a verb is about (`--group`), by what run.json says: nothing is asked, and nothing done yet."""

from __future__ import annotations

from gms_launch.errors import UsageError
from gms_launch.run.rundir import RunFile
from gms_launch.settings.rules import shortened

#: Names that a message has of those that there are.
NAMED = 24


def group(found: RunFile | None, name: str | None) -> str:
    """The group that was named, empty for all of them. Raises `UsageError` for one that there is not."""
    if name is None:
        return ""
    if found is None or name not in found.groups:
        raise UsageError(f"--group {shortened(name)}: {_there(found)}")
    return name


def one_group(found: RunFile, name: str | None) -> str:
    """The one group that a verb acts on, empty in a run without groups. Raises `UsageError` where it must be named."""
    if name is None and len(found.groups) > 1:
        raise UsageError(f"this verb acts on one group; say which with --group: {_there(found)}")
    return group(found, name) if name is not None else "".join(found.groups)


def sizes(found: RunFile | None) -> dict[str, int]:
    """How many nodes each group has."""
    return {name: len(said["nodes"]) for name, said in found.groups.items()} if found is not None else {}


def _there(found: RunFile | None) -> str:
    names = list(found.groups) if found is not None else []
    if not names:
        return "the run has no groups"
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return f"the run has groups {', '.join(names[:NAMED])}{more}"
