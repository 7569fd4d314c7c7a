"""Counts files, lines, imports and functions of the package: `python -m benchmarks.structure`.

`--entered` also runs one `e4t personalize` and counts the files of the package whose functions it
calls. `--source` counts another checkout, to compare two versions with one ruler.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).parent.parent
MAX_ARGUMENTS = 8

TRACE = """
import inspect, json, os, sys, threading
source, report = sys.argv[1:3]
files, functions = set(), set()
def profile(frame, event, argument):
    code = frame.f_code
    # Modules and class bodies also raise "call"; only the code of functions is optimized.
    called = event == "call" and code.co_flags & inspect.CO_OPTIMIZED
    if called and code.co_filename.startswith(source):
        files.add(code.co_filename)
        functions.add((code.co_filename, code.co_qualname))
sys.argv = ["e4t", *sys.argv[3:]]
from e4t_cli.cli.app import run
threading.setprofile(profile)
sys.setprofile(profile)
code = run(sys.argv[1:])
sys.setprofile(None)
json.dump([code, len(files), len(functions)], open(report, "w"))
"""


def modules_of(source: Path) -> dict[str, Path]:
    """Return the modules of a package by dotted name, packages by the name of their folder."""
    found = {}
    for path in sorted(source.rglob("*.py")):
        parts = list(path.relative_to(source).with_suffix("").parts)
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports_of(name: str, path: Path, modules: dict[str, Path], *, types: bool = False) -> set[str]:
    """Return the package's modules that a module imports anywhere; `types`: also those for type checking alone."""
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    found: set[str] = set()
    tree = ast.parse(path.read_text(encoding="utf-8"))
    skipped = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING" and not types
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if not isinstance(node, ast.ImportFrom) or id(node) in skipped:
            continue
        if node.level:
            base = [one for one in package[: len(package) - node.level + 1] if one]
            base += (node.module or "").split(".") if node.module else []
        elif (node.module or "").split(".")[0] == "e4t_cli":
            base = (node.module or "").split(".")[1:]
        else:
            continue
        for alias in node.names:
            longest = ".".join([*base, alias.name])
            found.add(longest if longest in modules else ".".join(base))
    return {one for one in found if one in modules and one != name}


def closure(start: str, graph: dict[str, set[str]]) -> set[str]:
    """Return everything that is imported from a module on, itself and its packages included."""
    seen: set[str] = set()
    waiting = [start]
    while waiting:
        name = waiting.pop()
        if name in seen:
            continue
        seen.add(name)
        waiting += graph[name]
        waiting += [".".join(name.split(".")[:i]) for i in range(name.count(".") + 1)]
    return seen


def measure(source: Path) -> dict[str, int]:
    """Return the counts of one checkout's package.

    Args:
        source: the folder `src/e4t_cli`.
    """
    modules = modules_of(source)
    graph = {name: imports_of(name, path, modules) for name, path in modules.items()}
    lines = {name: len(path.read_text(encoding="utf-8").splitlines()) for name, path in modules.items()}
    importers: dict[str, set[str]] = defaultdict(set)
    for name, path in modules.items():
        for one in imports_of(name, path, modules, types=True):
            importers[one].add(name)
    entered = closure("cli.personalize", graph)
    wide = 0
    for path in modules.values():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                given = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
                wide += len([one for one in given if one.arg not in ("self", "cls")]) > (MAX_ARGUMENTS)
    entries = [one for one in source.iterdir() if one.name != "__pycache__"]
    return {
        "files": len(modules),
        "lines": sum(lines.values()),
        "entries at the top": len(entries),
        "static closure of cli.personalize, files": len(entered),
        "static closure of cli.personalize, lines": sum(lines[name] for name in entered),
        "modules with one importer": sum(len(importers[name]) == 1 for name in modules),
        f"functions with more than {MAX_ARGUMENTS} arguments": wide,
    }


def entered(source: Path) -> tuple[int, int]:
    """Run one `e4t personalize` on `mini`; returns how many files and functions it enters."""
    root = source.parent.parent
    with tempfile.TemporaryDirectory() as place:
        report = Path(place) / "report.json"
        words = ["personalize", "face", str(root / "examples" / "me.png"), "S* on the beach"]
        done = subprocess.run(
            [
                *(sys.executable, "-c", TRACE, str(source), str(report), *words),
                *("--seed", "1", "--tune-steps", "1", "--steps", "2", "-o", place),
            ],
            env={**os.environ, "PYTHONPATH": f"{root / 'src'}{os.pathsep}{root / 'domains'}"},
            capture_output=True,
            text=True,
        )
        if done.returncode:
            raise RuntimeError(done.stderr)
        code, files, functions = json.loads(report.read_text(encoding="utf-8"))
        if code:
            raise RuntimeError(done.stderr)
        return files, functions


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--source", type=Path, default=ROOT / "src" / "e4t_cli")
    parser.add_argument("--entered", action="store_true")
    options = parser.parse_args()
    source = options.source.resolve()
    for name, value in measure(source).items():
        print(f"{name:44}{value:8,}")
    if options.entered:
        files, functions = entered(source)
        print(f"{'files entered by one personalize':44}{files:8,}")
        print(f"{'functions entered by one personalize':44}{functions:8,}")


if __name__ == "__main__":
    main()
