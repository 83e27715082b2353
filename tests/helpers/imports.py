"""Imports of a module, read off its source."""

import ast


def imported(tree: ast.AST) -> set[str]:
    """Full names of everything that a module imports, at any place in it."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute here"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def inner(tree: ast.AST) -> set[str]:
    """The packages of the library that a module imports."""
    return {name.split(".")[1] for name in imported(tree) if name.startswith("ascendspeed.")}
