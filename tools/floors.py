"""The floor plan, from the real imports: python -m tools.floors [--files]

    roof         tools/      what people type and look at
    first floor  train/      torch, deepspeed, peft, Ray Train
    ground       pipelines/  no torch
    foundation   schemas/

Prints each floor's folders in the order in which data flows through them, and what each folder imports; with --files, each file, too.

Fails (exit code 1) on an import that points up or at tests/, on a circle of files or of folders, on a sibling that visits a sibling (reader
to reader, family to family), on torch below the first floor, on an import that is not by the installed name (`boxcar.train`, not `train`),
on an `__init__.py` that is not empty, and on code outside pipelines/families that asks which family it has: it imports a family's file or a
concrete rule, or compares with a family's name. Reads the source, imports nothing.
"""

import ast
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

PACKAGE = "boxcar"
"""What the four floors are installed as."""
FLOORS = ("schemas", "pipelines", "train", "tools")
"""From the foundation up."""
SIBLINGS = {
    "pipelines.readers": {"reader", "catalog"},
    "pipelines.families": {"family", "catalog", "patches", "box_text", "chatml", "visual_expert", "prompts"},
    "tools.commands": {"options"},
}
"""Folders whose files do not import each other, and the files in them that all may import; only the catalog sees them all."""
NO_TORCH = ("schemas", "pipelines")
TORCH = {"torch", "transformers", "peft", "deepspeed", "accelerate"}
TORCH_DOORS = {"pipelines.tokens.tokenizer": {"transformers"}}
"""Where a heavy package may be imported, late and only when asked for: transformers converts a sentencepiece tokenizer."""

FAMILIES = "pipelines.families"
OPEN_TO_ALL: dict[str, set[str] | None] = {
    "family": None,
    "catalog": None,
    "prompts": None,
    "box_text": {"BoxForm", "BoxText", "CoordinateGrid", "FloatBoxes", "IntBoxes", "Numbers", "TextBox", "XYXY", "as_xyxy", "render"},
    "patches": {"BoolColumn", "Misfit", "PixelLimits", "ResizeRule", "ResizedSizes"},
}
"""What may be imported from the families by others: files, and of them these names, or all. The rest is how one family or a few do it."""


def module_name(path: Path, root: Path) -> str:
    return ".".join(path.relative_to(root).with_suffix("").parts)


def folder_of(module: str) -> str:
    """The folder of a floor that a module stands in, such as pipelines.readers; a file directly on a floor is a folder of its own."""
    return ".".join(module.split(".")[:2])


def imports_of(path: Path, name: str) -> Iterator[str]:
    """Every module that a file imports, anywhere in it. `from a import b` is a.b where that is a file, else a. `name`: of the file."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), str(path))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = [PACKAGE, *name.split(".")[: -node.level]] if node.level else []
            module = ".".join([*start, *([node.module] if node.module else [])])
            yield from (f"{module}.{alias.name}" for alias in node.names)


def house(root: Path) -> dict[str, set[str]]:
    """Module -> the modules it imports: ours by file and without `boxcar.`, others by their first name."""
    files = {module_name(path, root): path for floor in FLOORS for path in sorted((root / floor).rglob("*.py"))}
    arrows: dict[str, set[str]] = {}
    for name, path in files.items():
        found = set()
        for imported in imports_of(path, name):
            first, _, target = imported.partition(".")
            if first != PACKAGE or target.partition(".")[0] not in FLOORS:
                found.add(first)
                continue
            parent = target.rpartition(".")[0]
            found.add(target if target in files else parent if parent in files else target)
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
            if target in FLOORS:
                found.append(f"{name} imports {target}: write {PACKAGE}.{target}, the name under which it is installed")
            elif target_floor in FLOORS and FLOORS.index(target_floor) > FLOORS.index(floor):
                found.append(f"{name} imports {target}: an arrow that points up")
            if target == "tests":
                found.append(f"{name} imports tests: nobody does")
            if floor in NO_TORCH and target_floor in TORCH - TORCH_DOORS.get(name, set()):
                found.append(f"{name} imports {target}: no torch below the first floor")
        found += _visits(name, targets)
    found += questions(root)
    found += [f"a circle: {' -> '.join(circle)}" for circle in circles(arrows)]
    found += [f"a circle of folders: {' -> '.join(circle)}" for circle in circles(folders(arrows))]
    for floor in FLOORS:
        inits = (path for path in (root / floor).rglob("__init__.py") if path.read_text().strip())
        found += [f"{path.relative_to(root)} is not empty: import a name from the file that owns it" for path in inits]
    return found


def _visits(name: str, targets: set[str]) -> list[str]:
    folder, _, file = name.rpartition(".")
    if folder not in SIBLINGS or file == "catalog":
        return []
    siblings = (target for target in sorted(targets) if target.rpartition(".")[0] == folder)
    return [f"{name} imports {target}: a sibling" for target in siblings if target.rpartition(".")[2] not in SIBLINGS[folder] - {"catalog"}]


def questions(root: Path) -> list[str]:
    """Where code outside pipelines/families asks which family it has, instead of asking the family."""
    catalog = root.joinpath(*FAMILIES.split("."), "catalog.py")
    names = {key for node in _nodes(catalog) if isinstance(node, ast.Dict) for key in _texts(node.keys, {})} if catalog.is_file() else set()
    found = []
    for path in (path for floor in FLOORS for path in sorted((root / floor).rglob("*.py"))):
        name = module_name(path, root)
        if name.startswith(f"{FAMILIES}."):
            continue
        for imported in imports_of(path, name):
            if _is_closed(imported.removeprefix(f"{PACKAGE}.")):
                found.append(f"{name} imports {imported.removeprefix(f'{PACKAGE}.')}: let the family answer (pipelines/families/family.py)")
        for line, text in sorted(_compared_texts(path)):
            if text in names:
                found.append(f"{name}, line {line}, compares with {text!r}: let the family answer (pipelines/families/family.py)")
    return found


def _is_closed(imported: str) -> bool:
    """Whether only the families may import this."""
    if imported != FAMILIES and not imported.startswith(f"{FAMILIES}."):
        return False
    file, _, name = imported.removeprefix(FAMILIES).lstrip(".").partition(".")
    if file not in OPEN_TO_ALL:
        return True
    open_names = OPEN_TO_ALL[file]
    return open_names is not None and name not in open_names


def _nodes(path: Path) -> list[ast.AST]:
    return list(ast.walk(ast.parse(path.read_text(encoding="utf-8"), str(path))))


def _compared_texts(path: Path) -> Iterator[tuple[int, str]]:
    """(line, literal text) of comparisons, cases of a match and keys of a dict, also where the file calls the literal by a name."""
    nodes = _nodes(path)
    named: dict[str, ast.expr] = {}
    for node in nodes:
        if isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None:
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            named |= {target.id: node.value for target in targets if isinstance(target, ast.Name) and target.id.isupper()}
    for node in nodes:
        compared: Sequence[ast.expr | None] = ()
        if isinstance(node, ast.Compare):
            compared = [node.left, *node.comparators]
        elif isinstance(node, ast.MatchValue):
            compared = [node.value]
        elif isinstance(node, ast.Dict):
            compared = node.keys
        for one in compared:
            if one is not None:
                yield from ((one.lineno, text) for text in _texts([one], named))


def _texts(expressions: Sequence[ast.expr | None], named: Mapping[str, ast.expr]) -> Iterator[str]:
    """Literal texts, those in literal tuples, lists and sets, and those that a constant of the file stands for."""
    for one in expressions:
        if isinstance(one, ast.Constant) and isinstance(one.value, str):
            yield one.value
        elif isinstance(one, ast.Tuple | ast.List | ast.Set):
            yield from _texts(one.elts, {})
        elif isinstance(one, ast.Name) and one.id in named:
            yield from _texts([named[one.id]], {})


def folders(arrows: dict[str, set[str]]) -> dict[str, set[str]]:
    """Folder -> the folders that its files import, packages of others left out."""
    found: dict[str, set[str]] = {}
    for name, targets in arrows.items():
        if not name.endswith("__init__"):
            own = folder_of(name)
            found.setdefault(own, set()).update({folder_of(target) for target in targets if target in arrows} - {own})
    return found


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


def in_order(arrows: dict[str, set[str]]) -> list[str]:
    """Names so that each stands after everything that it imports: the order in which data flows."""
    order: list[str] = []

    def visit(name: str, path: frozenset[str]) -> None:
        if name not in order and name not in path:
            for target in sorted(arrows[name] & arrows.keys()):
                visit(target, path | {name})
            order.append(name)

    for name in sorted(arrows):
        visit(name, frozenset())
    return order


def _print_plan(root: Path, *, files: bool) -> None:
    arrows = {name: targets for name, targets in house(root).items() if not name.endswith("__init__")}
    by_folder = folders(arrows)
    order = in_order(by_folder)
    for floor in reversed(FLOORS):
        own = [folder for folder in order if folder.partition(".")[0] == floor]
        print(f"\n{floor}/")
        for folder in own:
            inside = [name.removeprefix(f"{folder}.") for name in arrows if folder_of(name) == folder]
            label = folder.partition(".")[2] + ("" if inside == [folder] else "/")
            uses = sorted(target.removeprefix(f"{floor}.") for target in by_folder[folder] if floor != "schemas" and target not in FLOORS)
            uses = [target for target in uses if not target.startswith("schemas.")]
            print(f"  {label:14} {'' if inside == [folder] else ', '.join(inside)}")
            if uses:
                print(f"  {'':14}   <- {', '.join(uses)}")
            for name in sorted(arrows) if files else ():
                if folder_of(name) == folder:
                    print(f"    {name.removeprefix(floor + '.'):34} <- {', '.join(sorted(arrows[name] & arrows.keys())) or '-'}")


def main() -> int:
    root = Path(__file__).resolve().parents[1]
    _print_plan(root, files="--files" in sys.argv[1:])
    found = problems(root)
    for line in found:
        print(f"FAULT  {line}", file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
