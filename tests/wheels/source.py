"""Read the pure-Python wheels of ai-dynamo as the package index has them. Nothing is imported."""

from __future__ import annotations

import ast
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

#: Kept between runs, beside the virtual environment.
STORE = Path(__file__).parents[2] / ".wheels"


def fetch(version: str) -> Path:
    """The wheel of a release, downloaded once."""
    found = list(STORE.glob(f"ai_dynamo-{version}-*.whl"))
    if not found:
        STORE.mkdir(exist_ok=True)
        argv = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "-q",
            "--no-deps",
            "--dest",
            str(STORE),
            f"ai-dynamo=={version}",
        ]
        subprocess.run(argv, check=True)
        found = list(STORE.glob(f"ai_dynamo-{version}-*.whl"))
    return found[0]


class Wheel:
    """One release. Paths are inside the wheel, tests left out."""

    def __init__(self, version: str) -> None:
        self.version = version
        self._trees: dict[str, ast.Module] = {}
        with zipfile.ZipFile(fetch(version)) as file:
            names = [n for n in file.namelist() if n.endswith(".py") and "/tests/" not in n]
            self.sources = {n: file.read(n).decode() for n in names}
            (meta,) = [n for n in file.namelist() if n.endswith(".dist-info/METADATA")]
            self.metadata = file.read(meta).decode()

    def tree(self, path: str) -> ast.Module:
        if path not in self._trees:
            self._trees[path] = ast.parse(self.sources[path])
        return self._trees[path]

    def trees(self, under: str) -> Iterator[tuple[str, ast.Module]]:
        for path in sorted(self.sources):
            if path.startswith(under):
                yield path, self.tree(path)

    def calls(self, under: str, *names: str) -> list[tuple[str, ast.Call]]:
        """Every call of a function or method of one of these names, with its file."""
        found = []
        for path, tree in self.trees(under):
            for node in ast.walk(tree):
                if isinstance(node, ast.Call) and _name(node.func) in names:
                    found.append((path, node))
        return found

    def flags(self, under: str) -> dict[str, dict[str, object]]:
        """Command-line flags by name, with the constants among their keywords (env_var, default, choices)."""
        found: dict[str, dict[str, object]] = {}
        for _, call in self.calls(under, "add_argument", "add_negatable_bool_argument"):
            keywords = {k.arg: _constant(k.value) for k in call.keywords if k.arg}
            names = [keywords.get("flag_name"), *(_constant(a) for a in call.args)]
            for name in names:
                if isinstance(name, str) and name.startswith("-"):
                    found[name] = {str(k): v for k, v in keywords.items()}
        return found

    def environ(self, under: str) -> set[str]:
        """Names that are read from the environment by a constant."""
        found = set()
        for _, call in self.calls(under, "get", "getenv", "env_bool"):
            if call.args and isinstance(name := _constant(call.args[0]), str):
                found.add(name)
        return found

    def strings(self, under: str) -> list[str]:
        """Every string constant; of an f-string its constant pieces."""
        return [
            node.value
            for _, tree in self.trees(under)
            for node in ast.walk(tree)
            if isinstance(node, ast.Constant) and isinstance(node.value, str)
        ]

    def function(self, under: str, name: str) -> tuple[str, str]:
        """The file and the source of the function of that name."""
        for path, tree in self.trees(under):
            for node in ast.walk(tree):
                if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and node.name == name:
                    text = ast.get_source_segment(self.sources[path], node)
                    assert text is not None
                    return path, text
        raise AssertionError(f"Dynamo {self.version} has no function {name} under {under}")


def _name(function: ast.expr) -> str:
    if isinstance(function, ast.Attribute):
        return function.attr
    return function.id if isinstance(function, ast.Name) else ""


def _constant(node: ast.expr) -> object:
    try:
        return ast.literal_eval(node)
    except ValueError:
        return None
