"""The house has floors: nothing imports from a floor above its own, and no two files import each other."""

from __future__ import annotations

import ast
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# The floors from low to high; each entry is a file or a package of dlm_fast, by its first name.
FLOORS = (
    ("dlm_kernels",),
    ("version", "limits", "files", "diffusion", "ops", "models", "patching"),
    ("policies",),
    ("presets",),
    ("decoding",),
    ("prompts", "stops", "stopper", "requests", "loading", "generate"),
    ("tiny", "jobs", "cli", "training", "__main__", "__init__"),
)
FLOOR = {name: floor for floor, names in enumerate(FLOORS) for name in names}


def modules() -> dict[str, Path]:
    paths = [*(ROOT / "kernels" / "dlm_kernels").rglob("*.py"), *(ROOT / "dlm_fast").rglob("*.py")]
    roots = {True: ROOT / "kernels", False: ROOT}
    parts = {path: path.relative_to(roots["dlm_kernels" in path.parts]).with_suffix("").parts for path in paths}
    return {".".join(part for part in parts[path] if part != "__init__"): path for path in paths}


def imports(name: str, path: Path, known: dict[str, Path]) -> set[str]:
    """The project's modules that a file imports anywhere in it, under TYPE_CHECKING and in functions too."""
    package = name.split(".") if path.stem == "__init__" else name.split(".")[:-1]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*start, *([node.module] if node.module else [])])
            found |= {f"{base}.{alias.name}" if f"{base}.{alias.name}" in known else base for alias in node.names}
    return found & set(known)


def floor_of(name: str) -> int:
    top, _, below = name.partition(".")
    return FLOOR[top] if top == "dlm_kernels" else FLOOR[below.split(".")[0] or "__init__"]


def test_nothing_imports_from_a_floor_above() -> None:
    known = modules()
    upward = [
        f"{name} -> {imported}"
        for name, path in known.items()
        for imported in imports(name, path, known)
        if floor_of(imported) > floor_of(name)
    ]
    assert not upward


def test_no_two_files_import_each_other() -> None:
    known = modules()
    # The __init__ of a package lists the package's parts for others; a part that asks a neighbour does not ask for it.
    TopologicalSorter({name: imports(name, path, known) for name, path in known.items()}).prepare()


def test_whatever_asks_for_a_cache_or_a_rule_by_name_is_a_preset() -> None:
    compared = []
    for path in (ROOT / "dlm_fast").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Compare) and isinstance(node.left, ast.Attribute | ast.Name):
                name = node.left.attr if isinstance(node.left, ast.Attribute) else node.left.id
                strings = [
                    leaf for operand in node.comparators for leaf in ast.walk(operand) if isinstance(leaf, ast.Constant)
                ]
                if name in ("cache", "rule") and any(isinstance(leaf.value, str) for leaf in strings):
                    compared.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert not [place for place in compared if not place.startswith("dlm_fast/presets/")]
