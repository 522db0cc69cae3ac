"""The floor plan, from the real imports: python -m tools.floors

    roof         tools/      what people type and look at
    first floor  train/      torch, deepspeed, peft, Ray Train
    ground       pipelines/  no torch
    foundation   schemas/

Fails (exit code 1) on an import that points up or at tests/, on a circle, on a sibling that visits a sibling (reader to reader, family to
family), on torch below the first floor, and on an `__init__.py` that is not empty. Reads the source, imports nothing.
"""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

FLOORS = ("schemas", "pipelines", "train", "tools")
"""From the foundation up."""
SIBLINGS = {
    "pipelines.readers": {"reader", "catalog"},
    "pipelines.families": {"family", "catalog", "patches", "box_text", "chatml", "visual_expert"},
}
"""Folders whose rooms do not visit each other, and the rooms in them that all may enter; only the catalog sees them all."""
NO_TORCH = ("schemas", "pipelines")
TORCH = {"torch", "transformers", "peft", "deepspeed", "accelerate"}
TORCH_DOORS = {"pipelines.tokens": {"transformers"}}
"""Where a heavy guest may come in, late and only when asked for: transformers converts a sentencepiece tokenizer."""


def module_name(path: Path, root: Path) -> str:
    return ".".join(path.relative_to(root).with_suffix("").parts)


def imports_of(path: Path, name: str) -> Iterator[str]:
    """Every module that a file imports, anywhere in it. `from a import b` is a.b where that is a file, else a. `name`: of the file."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), str(path))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = name.split(".")[: -node.level] if node.level else []
            module = ".".join([*start, *([node.module] if node.module else [])])
            yield from (f"{module}.{alias.name}" for alias in node.names)


def house(root: Path) -> dict[str, set[str]]:
    """Module -> the modules it imports: ours by file, others by their first name."""
    files = {module_name(path, root): path for floor in FLOORS for path in sorted((root / floor).rglob("*.py"))}
    arrows: dict[str, set[str]] = {}
    for name, path in files.items():
        found = set()
        for target in imports_of(path, name):
            parent = target.rpartition(".")[0]
            if target.partition(".")[0] in FLOORS:
                found.add(target if target in files else parent if parent in files else target)
            else:
                found.add(target.partition(".")[0])
        arrows[name] = found - {name}
    return arrows


def problems(root: Path) -> list[str]:
    """Everything that breaks the plan, in words."""
    arrows = house(root)
    found = []
    for name, targets in arrows.items():
        floor = name.partition(".")[0]
        for target in sorted(targets):
            target_floor = target.partition(".")[0]
            if target_floor in FLOORS and FLOORS.index(target_floor) > FLOORS.index(floor):
                found.append(f"{name} imports {target}: an arrow that points up")
            if target == "tests":
                found.append(f"{name} imports tests: nobody does")
            if floor in NO_TORCH and target_floor in TORCH - TORCH_DOORS.get(name, set()):
                found.append(f"{name} imports {target}: no torch below the first floor")
        found += _visits(name, targets)
    found += [f"a circle: {' -> '.join(circle)}" for circle in circles(arrows)]
    for floor in FLOORS:
        inits = (path for path in (root / floor).rglob("__init__.py") if path.read_text().strip())
        found += [f"{path.relative_to(root)} is not empty: import a name from the file that owns it" for path in inits]
    return found


def _visits(name: str, targets: set[str]) -> list[str]:
    folder, _, room = name.rpartition(".")
    if folder not in SIBLINGS or room == "catalog":
        return []
    siblings = (target for target in sorted(targets) if target.rpartition(".")[0] == folder)
    return [f"{name} imports {target}: a sibling" for target in siblings if target.rpartition(".")[2] not in SIBLINGS[folder] - {"catalog"}]


def circles(arrows: dict[str, set[str]]) -> list[list[str]]:
    """One circle for each place where a depth-first walk comes back to a module that it is still in."""
    found: list[list[str]] = []
    done: set[str] = set()

    def walk(name: str, path: list[str]) -> None:
        if name in path:
            found.append([*path[path.index(name) :], name])
        elif name not in done:
            for target in sorted(arrows.get(name, ())):
                if target in arrows:
                    walk(target, [*path, name])
            done.add(name)

    for name in sorted(arrows):
        walk(name, [])
    return found


def main() -> int:
    root = Path(__file__).resolve().parents[1]
    arrows = house(root)
    for floor in reversed(FLOORS):
        rooms = sorted(name for name in arrows if name.partition(".")[0] == floor and not name.endswith("__init__"))
        print(f"{floor}/  {len(rooms)} rooms")
        for room in rooms:
            below = sorted(target for target in arrows[room] if target in arrows)
            print(f"    {room.removeprefix(floor + '.'):28} <- {', '.join(below) or '-'}")
    found = problems(root)
    for line in found:
        print(f"FAULT  {line}", file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
