"""What mkdocs does beside its own: the pages that lie elsewhere in the repository, and the page of all commands.

Diagrams are written in Mermaid, which viewers of the repository draw by themselves; here the picture of it in
docs/pictures takes its place, so that no script is needed. One that is not of its diagram is told, and ends the build.

Links between pages are those of the repository, and are turned into the site's; one to a file that is no page becomes
that file's path. A link to nothing is left for `mkdocs build --strict` to complain about.
"""

from __future__ import annotations

import hashlib
import logging
import posixpath
import re
from pathlib import Path
from typing import Any

import typer
from mkdocs.structure.files import File, Files

from gms_launch.cli.main import app
from gms_launch.settings.declared import SETTINGS

log = logging.getLogger("mkdocs.plugins.pictures")
ROOT = Path(__file__).parents[2]
#: Pages of the site that are elsewhere in the repository.
ELSEWHERE = {"index.md": "README.md", "slurm.md": "slurm/README.md"}
#: The picture of the one diagram that a page has, and what it shows for those who do not see it.
PICTURES = {
    "README.md": ("overview.svg", "two nodes, each with a rank of the primary, a rank of the shadow, and a GMS"),
    "docs/architecture.md": ("rooms.svg", "the rooms of the code, and which imports which"),
}
_SETTINGS = {s.name for s in SETTINGS}


def on_files(files: Files, config: Any) -> Files:
    for name, source in ELSEWHERE.items():
        files.append(File.generated(config, name, content=(ROOT / source).read_text()))
    files.append(File.generated(config, "commands.md", content=commands()))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    source = ELSEWHERE.get(page.file.src_uri, f"docs/{page.file.src_uri}")
    here = posixpath.dirname(source)
    pages = {s: n for n, s in ELSEWHERE.items()}

    def drawn(found: re.Match[str]) -> str:
        name, shows = PICTURES[source]
        if hashlib.sha256(found[1].encode()).hexdigest() not in (ROOT / "docs/pictures" / name).read_text():
            log.warning(f"docs/pictures/{name} is not of the diagram in {source}: draw it again with Mermaid")
        return f"![{shows}](pictures/{name})"

    def led(found: re.Match[str]) -> str:
        text, target, anchor = found.groups(default="")
        path = posixpath.normpath(posixpath.join(here, target))
        if path in pages:
            return f"[{text}]({pages[path]}{anchor})"
        if path.startswith("docs/"):
            return f"[{text}]({path.removeprefix('docs/')}{anchor})"
        return f"{text} (`{path}`)" if (ROOT / path).exists() else found[0]

    markdown = re.sub(r"```mermaid\n(.*?)```", drawn, markdown, flags=re.DOTALL)
    return re.sub(r"\[([^\]\n]+)\]\((?!\w+:)([^)#\s]+)(#[^)\s]*)?\)", led, markdown)


def commands() -> str:
    """Every command with its help and options, as `gms-launch COMMAND --help` has them."""
    group: Any = typer.main.get_command(app)
    parts = [
        "# Commands",
        f"{group.help} Made from the command line itself; what a verb does in a sentence, exit codes and JSON layouts "
        "are in the [reference](reference.md).",
    ]
    for name, command in group.commands.items():
        if not command.hidden:
            parts += _command(name, command)
    return "\n\n".join(parts) + "\n"


def _command(name: str, command: Any) -> list[str]:
    context = command.context_class(command, info_name=f"gms-launch {name}")
    usage = " ".join(command.collect_usage_pieces(context))
    own = [p for p in command.params if p.name not in _SETTINGS and not getattr(p, "hidden", False)]
    told = [r for p in own if (r := p.get_help_record(context)) is not None]
    parts = [f"## {name}", str(command.help or "").strip(), f"```text\nUsage: gms-launch {name} {usage}\n```"]
    if told:
        rows = ["| option | does |", "| --- | --- |"]
        parts.append("\n".join([*rows, *(f"| {_cell(names)} | {_cell(meaning)} |" for names, meaning in told)]))
    if sum(p.name in _SETTINGS for p in command.params) > 9:
        parts.append("And every [setting](reference.md#settings).")
    return parts


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")
