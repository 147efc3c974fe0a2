"""Imports run downwards: no circle between files or folders, and no file knows a floor above its own.

Imports inside functions and under TYPE_CHECKING count like all others.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "vitrail"

# Rooms from the ground up. A file may import its own floor and those below; what stands on no floor fails the test.
FLOORS = (
    ("files", "lookup", "machine", "threads", "console", "tensor_files", "config_schema", "durations"),
    ("kernels",),
    ("models",),
    ("config", "distributed", "device"),
    ("data",),
    ("weights", "optim"),
    ("evaluation",),
    ("objectives",),
    ("recipes", "training", "export"),
    ("report", "doctor"),
    ("api",),
    ("cli",),
    ("__init__", "__main__"),
)
DATA_FLOORS = (
    ("problems", "progress"),
    ("images", "cache"),
    ("datasets",),
    ("splits", "augment", "check"),
    ("loading",),
    ("setup",),
)
# A version number is no room.
NO_ROOM = {"vitrail"}


def modules(root: Path = PACKAGE) -> dict[str, Path]:
    """Return the files of a package by module name; a folder's `__init__` has the folder's name."""
    found = {}
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root.parent).with_suffix("").parts
        found[".".join(parts).removesuffix(".__init__")] = path
    return found


def imports(text: str, known: set[str]) -> Iterator[str]:
    """Yield the modules that a file's text imports, of those that are known."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known)
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                if full in known or node.module in known:
                    yield full if full in known else node.module


def arrows(root: Path = PACKAGE) -> set[tuple[str, str]]:
    """Return all pairs of modules (importing, imported)."""
    found = modules(root)
    return {
        (name, target)
        for name, path in found.items()
        for target in imports(path.read_text(encoding="utf-8"), set(found))
        if target != name and target not in NO_ROOM
    }


def circles(pairs: set[tuple[str, str]]) -> list[list[str]]:
    """Return the groups of nodes that reach each other (strongly connected components of two or more)."""
    below: dict[str, set[str]] = {}
    for start, end in pairs:
        below.setdefault(start, set()).add(end)
    reached = {node: reachable(node, below) for node in below}
    together = {frozenset(other for other in reached[node] if node in reached.get(other, ())) for node in below}
    return sorted(sorted(group) for group in together if len(group) > 1)


def reachable(node: str, below: dict[str, set[str]]) -> set[str]:
    """Return every node that arrows lead to."""
    seen: set[str] = set()
    waiting = [node]
    while waiting:
        for each in below.get(waiting.pop(), ()):
            if each not in seen:
                seen.add(each)
                waiting.append(each)
    return seen


def between_children(folder: str, pairs: set[tuple[str, str]]) -> set[tuple[str, str]]:
    """Return the arrows between the files and folders that lie directly in a folder."""
    prefix = f"{folder}."
    found = set()
    for start, end in pairs:
        if start.startswith(prefix) and end.startswith(prefix):
            one, other = (name.removeprefix(prefix).split(".")[0] for name in (start, end))
            if one != other:
                found.add((one, other))
    return found


def folders() -> list[str]:
    """Return the name of every package."""
    return [".".join(path.parent.relative_to(PACKAGE.parent).parts) for path in sorted(PACKAGE.rglob("__init__.py"))]


def test_no_circle_between_files():
    assert circles(arrows()) == []


@pytest.mark.parametrize("folder", folders())
def test_no_circle_between_the_rooms_of_a_folder(folder):
    assert circles(between_children(folder, arrows())) == []


@pytest.mark.parametrize(("folder", "floors"), [("vitrail", FLOORS), ("vitrail.data", DATA_FLOORS)])
def test_imports_run_downwards(folder, floors):
    floor_of = {room: number for number, rooms in enumerate(floors) for room in rooms}
    rooms = {path.stem for path in (PACKAGE.parent / folder.replace(".", "/")).iterdir() if path.suffix == ".py"}
    rooms |= {
        path.name for path in (PACKAGE.parent / folder.replace(".", "/")).iterdir() if (path / "__init__.py").exists()
    }
    if folder != "vitrail":
        rooms.discard("__init__")
    assert rooms == set(floor_of), "every room stands on exactly one floor, and every floor's rooms exist"
    up = [pair for pair in between_children(folder, arrows()) if floor_of[pair[0]] < floor_of[pair[1]]]
    assert up == [], "these import a floor above their own"


def test_the_walk_finds_a_circle_and_an_arrow_up(tmp_path):
    """What this test would catch: two files that need each other, also through a folder, also lazily."""
    package = tmp_path / "house"
    (package / "low").mkdir(parents=True)
    (package / "high").mkdir()
    for folder in (package, package / "low", package / "high"):
        (folder / "__init__.py").write_text("")
    (package / "low" / "one.py").write_text("def f():\n    from house.high import two\n")
    (package / "high" / "two.py").write_text("import house.low.three\n")
    (package / "low" / "three.py").write_text("")
    pairs = arrows(package)
    assert pairs == {("house.low.one", "house.high.two"), ("house.high.two", "house.low.three")}
    assert circles(pairs) == [], "no circle between files"
    assert circles(between_children("house", pairs)) == [["high", "low"]], "but one between folders"


def test_rooms_are_small():
    """A file that outgrows 400 lines, or a folder of more than 20 files, is two ideas: divide it."""
    long = {name: lines for name, path in modules().items() if (lines := len(path.read_text().splitlines())) > 400}
    assert long == {}
    crowded = {
        folder: count
        for folder in folders()
        if (count := sum(1 for path in (PACKAGE.parent / folder.replace(".", "/")).glob("*.py"))) > 21
    }
    assert crowded == {}


def test_at_most_three_functions_are_long():
    """A function over 60 lines must read like a story; few do."""
    long = [
        f"{name}:{node.name} ({node.end_lineno - node.lineno + 1} lines)"
        for name, path in modules().items()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and node.end_lineno is not None
        and node.end_lineno - node.lineno + 1 > 60
    ]
    assert len(long) <= 3, long
