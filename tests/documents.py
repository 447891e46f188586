"""The command lines in README.md, docs/ and slurm/, and the marks that say why one is not run by a test.

A fenced block of language `sh` is run line by line; so is a span of text that is a command line of gms-launch or Slurm.
A mark is a comment of Markdown, before a block or on the line of a span:

    <!-- run on: login -->                  a block that is for the login node of a cluster
    <!-- file: name -->                     a block that is a file where the reader is
    <!-- run by: test_name -->              another test does what it says
    <!-- not run here: reason -->           nobody can, on a machine of tests
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "slurm").glob("*.md"))]
#: These too, where no command line is run.
ALL = [*PAGES, ROOT / "bench" / "gpu" / "README.md"]
SCRIPTS = [*sorted((ROOT / "slurm").glob("*.sbatch")), ROOT / "slurm" / "epilog.sh"]
LANGUAGES = ("sh", "text", "toml", "python", "mermaid", "json")
MARK = re.compile(r"<!-- (run on|run by|not run here|file): (.+?) -->")
TOOL = re.compile(r"(?:\w+=\S+ )*(gms-launch|make|sbatch|srun|scancel|salloc|python3?|pip|curl|kill|hf) +[^ ]")
#: Tools whose spans are run, and those whose targets and flags are looked up instead.
RUN = ("gms-launch", "kill")
LOOKED_UP = ("make", "python", "python3")


@dataclass(frozen=True)
class Text:
    """A block or a span: where it stands, what it says, and its mark."""

    page: Path
    line: int
    language: str
    text: str
    mark: str = ""
    reason: str = ""

    @property
    def where(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"

    @property
    def tool(self) -> str:
        found = TOOL.match(self.text + " ")
        return found.group(1) if found else ""

    @property
    def commands(self) -> list[str]:
        """The command lines of a block, without comments; continued lines and here-documents are one."""
        found: list[str] = []
        end = ""
        for line in self.text.splitlines():
            if end or (found and found[-1].endswith("\\")):
                found[-1] += "\n" + line
                end = "" if line == end else end
            elif line.strip() and not line.startswith("#"):
                found.append(line)
                if here := re.search(r"<<'?(\w+)'?", line):
                    end = here.group(1)
        return [re.sub(r"\s{2,}#.*$", "", c) for c in found]


def _marked(line: str) -> tuple[str, str]:
    found = MARK.search(line)
    return (found.group(1), found.group(2)) if found else ("", "")


def read(page: Path) -> Iterator[Text]:
    """Every fenced block and every span of code in a page."""
    before, block, start = "", None, 0
    language = ""
    for number, line in enumerate(page.read_text().splitlines(), 1):
        if line.startswith("```"):
            if block is None:
                block, start, language = [], number, line[3:].strip()
            else:
                yield Text(page, start, language, "\n".join(block), *_marked(before))
                block, before = None, ""
        elif block is not None:
            block.append(line)
        else:
            for span in re.findall(r"`([^`]+)`", line):
                yield Text(page, number, "span", span, *_marked(line))
            before = line if line.strip() else before


def blocks() -> list[Text]:
    return [t for page in PAGES for t in read(page) if t.language != "span"]


def spans() -> list[Text]:
    """Spans that are command lines."""
    found = [t for page in PAGES for t in read(page) if t.language == "span" and t.tool]
    for script in SCRIPTS:
        for number, line in enumerate(script.read_text().splitlines(), 1):
            text = Text(script, number, "span", line.removeprefix("#").strip())
            if line.startswith("#   ") and text.tool:
                found.append(text)
    return found
