"""The table of settings in docs/reference.md, made from what `settings.declared` says: `make reference` writes it."""

from __future__ import annotations

from pathlib import Path

from gms_launch.settings.declared import SETTINGS, Setting

PAGE = Path(__file__).parents[1] / "docs/reference.md"
HEAD = "| TOML key | flag | environment | default | meaning |\n| --- | --- | --- | --- | --- |\n"


def row(s: Setting) -> str:
    names = ", ".join(filter(None, (s.env, s.recipe)))
    flag = s.flag if s.kind is not bool else f"{s.flag}`, `--no-{s.flag[2:]}"
    choices = f" ({', '.join(s.choices)})" if s.choices else ""
    return f"| {s.name} | `{flag}` | `{names}` | {s.default} | {s.help}{choices} |\n"


def rendered(text: str) -> str:
    """The page `text` with the table as it must be."""
    before, _, rest = text.partition(HEAD)
    after = rest[rest.index("\n\n") + 1 :]
    return before + HEAD + "".join(map(row, SETTINGS)) + after


if __name__ == "__main__":
    PAGE.write_text(rendered(PAGE.read_text()))
