"""The house has floors: nothing imports from a floor above its own, and no two files import each other."""

from __future__ import annotations

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# The floors from low to high; each entry is a file or a package of dlm_fast, by its first name.
FLOORS = (
    ("dlm_kernels",),
    ("version", "limits", "fingerprint", "disk", "files", "diffusion", "ops", "models", "patching"),
    ("policies",),
    ("presets",),
    ("decoding",),
    ("prompts", "stops", "stopper", "requests", "draws", "output", "adapters", "loading", "call"),
    ("running", "sizing", "session", "rollouts", "generate"),
    ("tiny", "jobs", "inspection", "support", "cli", "training", "__main__", "__init__"),
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


def asks_by_name(source: str) -> list[int]:
    """Lines that compare a cache or a rule with strings, look it up in a table, or match it."""

    def is_choice(node: ast.AST) -> bool:
        return isinstance(node, ast.Attribute) and node.attr in ("cache", "rule")

    def holds_a_string(node: ast.AST) -> bool:
        return any(isinstance(leaf, ast.Constant) and isinstance(leaf.value, str) for leaf in ast.walk(node))

    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Compare):
            sides = [node.left, *node.comparators]
            asks = any(map(is_choice, sides)) and any(
                holds_a_string(side) or isinstance(side, ast.Name) for side in sides
            )
        elif isinstance(node, ast.Subscript):
            asks = is_choice(node.slice)
        elif isinstance(node, ast.Call):
            asks = isinstance(node.func, ast.Attribute) and node.func.attr == "get" and any(map(is_choice, node.args))
        else:
            asks = isinstance(node, ast.Match) and is_choice(node.subject)
        if asks:
            found.append(node.lineno)
    return found


@pytest.mark.parametrize(
    "source",
    [
        "preset.cache == 'dual'", "'dual' == preset.cache", "preset.cache in ('dual', 'prefix')", "p.rule != 'quota'",
        "p.cache in CACHED", "{'dual': 1}[p.cache]", "{'dual': 1}.get(p.cache, 0)",
        "match p.rule:\n    case 'quota':\n        pass",
    ],
)  # fmt: skip
def test_every_way_to_ask_for_a_choice_by_its_name_is_seen(source) -> None:
    assert asks_by_name(source)


def test_whatever_asks_for_a_cache_or_a_rule_by_name_is_a_preset() -> None:
    files = [path for path in (ROOT / "dlm_fast").rglob("*.py") if path.parent.name != "presets"]
    assert not [f"{path.relative_to(ROOT)}:{line}" for path in files for line in asks_by_name(path.read_text())]
