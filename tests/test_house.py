"""The house holds: imports run one way, doors are tidy, files and classes stay small."""

import ast
import importlib
import pathlib
from collections.abc import Iterator

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = "priorityprop_jax"
FILES = sorted((ROOT / PACKAGE).rglob("*.py"))

# What a room may import, beside itself.
BELOW = {
    "core": set(),
    "priority": {"core"},
    "exact": {"core", "rnn"},
    "partial": {"core", "priority"},
    "rnn": {"core", "priority"},
    "sparse": {"core", "priority"},
    "highway": {"core", "priority", "rnn"},
    "meprop": {"core", "priority", "rnn"},
    "models": {"core", "priority", "exact", "partial"},
    "training": {"core", "priority"},
}
ROOMS = tuple(BELOW)
BELOW["cli"] = {"", *ROOMS}

# What does not hold yet. A line that is no longer needed fails its test: take it out.
EXCEPTIONS: dict[str, set[str]] = {}

# It may shrink: towards 15,000.
MOST_LINES = 25058


def module_name(path: pathlib.Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(tree: ast.AST, module: str, is_package: bool) -> Iterator[tuple[str, str]]:
    """Every `(module, name)` imported anywhere in a file; the name is "" for `import module`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = module.split(".") if is_package else module.split(".")[:-1]
                parents = parents[: len(parents) - node.level + 1]
                base = ".".join([*parents, *([node.module] if node.module else [])])
            yield from ((base, alias.name) for alias in node.names)


def graph() -> dict[str, set[str]]:
    """For every module of the package the modules of the package that it imports, anywhere."""
    modules = {module_name(path): path for path in FILES}
    edges: dict[str, set[str]] = {}
    for module, path in modules.items():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        edges[module] = set()
        for base, name in imports(tree, module, path.name == "__init__.py"):
            if base.split(".")[0] == PACKAGE:
                inner = f"{base}.{name}"
                edges[module].add(inner if inner in modules else base)
    return edges


GRAPH = graph()


def room(module: str) -> str:
    """The room that a module lies in; "" for the front door and what lies beside it."""
    name = [*module.split("."), ""][1]
    return name if (ROOT / PACKAGE / name).is_dir() else ""


def against_the_rule(edges: dict[str, set[str]]) -> set[str]:
    return {
        f"{module} imports {other}"
        for module, others in edges.items()
        for other in others
        # The front door opens into every room, and no room imports it.
        if room(module) and room(other) not in BELOW[room(module)] | {room(module)}
    }


def circles(edges: dict[str, set[str]]) -> set[str]:
    """Modules that import themselves through others."""

    def reached(module: str) -> set[str]:
        found, front = set(), [module]
        while front:
            new = edges.get(front.pop(), set()) - found
            found |= new
            front += new
        return found

    return {module for module in edges if module in reached(module)}


def long_files() -> set[str]:
    return {module_name(path) for path in FILES if lines(path) > 500}


def long_classes() -> set[str]:
    return {
        f"{module_name(path)}.{node.name}"
        for path in FILES
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ClassDef) and (node.end_lineno or 0) - node.lineno >= 350
    }


def lines(path: pathlib.Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


def untidy_doors() -> set[str]:
    """Rooms whose `__all__` is missing, not sorted, or names what is not there."""
    found = set()
    for name in ROOMS:
        door = importlib.import_module(f"{PACKAGE}.{name}")
        names = getattr(door, "__all__", [])
        if not names or names != sorted(set(names)) or not all(hasattr(door, n) for n in names):
            found.add(name)
    return found


CHECKS = {
    "imports": lambda: against_the_rule(GRAPH),
    "circles": lambda: circles(GRAPH),
    "doors": untidy_doors,
    "files": long_files,
    "classes": long_classes,
    "package": lambda: {"lines"} if sum(map(lines, FILES)) > MOST_LINES else set(),
    "readme": lambda: {"lines"} if lines(ROOT / "README.md") > 150 else set(),
}


@pytest.mark.parametrize("check", CHECKS)
def test_the_house_holds(check):
    found, allowed = CHECKS[check](), EXCEPTIONS.get(check, set())
    assert found - allowed == set()
    assert allowed - found == set(), "these hold by now: take them out of EXCEPTIONS"


def test_exceptions_are_of_checks():
    assert set(EXCEPTIONS) <= set(CHECKS)


def test_every_room_has_a_rule():
    assert {room(module) for module in GRAPH} - {""} == set(BELOW)


def test_the_front_door_has_few_names():
    door = importlib.import_module(PACKAGE)
    assert len(door.__all__) <= 14
    assert list(door.__all__) == sorted(door.__all__)
    assert all(hasattr(door, name) for name in door.__all__)


def test_imports_count_wherever_they_are():
    text = """
from typing import TYPE_CHECKING
if TYPE_CHECKING:
    from priorityprop_jax.cli import main
def late():
    import priorityprop_jax.training.trainer
    from ..sparse import native as kernels
    from . import slots
"""
    found = set(imports(ast.parse(text), "priorityprop_jax.core.paths", is_package=False))
    assert found == {
        ("typing", "TYPE_CHECKING"),
        ("priorityprop_jax.cli", "main"),
        ("priorityprop_jax.training.trainer", ""),
        ("priorityprop_jax.sparse", "native"),
        ("priorityprop_jax.core", "slots"),
    }


def test_the_checks_see_what_they_are_for():
    edges = {f"{PACKAGE}.core.a": {f"{PACKAGE}.priority.b"}, f"{PACKAGE}.priority.b": {PACKAGE}}
    edges |= {PACKAGE: {f"{PACKAGE}.core.a"}, f"{PACKAGE}.cli.c": {f"{PACKAGE}.core.a"}}
    assert against_the_rule(edges) == {
        f"{PACKAGE}.core.a imports {PACKAGE}.priority.b",
        f"{PACKAGE}.priority.b imports {PACKAGE}",
    }
    assert circles(edges) == {PACKAGE, f"{PACKAGE}.core.a", f"{PACKAGE}.priority.b"}
