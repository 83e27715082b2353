"""Values of a Python file of assignments, by evaluation of its literals; nothing is executed."""

import ast
import operator
from collections.abc import Callable
from typing import Any

from ascendspeed.utils.errors import UserError

OPERATORS: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
}
LARGEST = 1e18
"""Largest operand of an operation."""
LONGEST = 10_000
"""Characters of the longest value in an f-string: one that names itself grows without bound."""


def read_assignments(text: str, where: str) -> dict[str, Any]:
    """Returns the values that a file assigns to names.

    Literals, dict(...), names assigned above, arithmetic of numbers, and f-strings of them. Raises UserError,
    with the line, for anything else.
    """
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        reason = getattr(error, "msg", str(error)) or "nested too deeply"
        raise UserError(f"{where}: not a Python file: {reason}") from None
    names: dict[str, Any] = {}
    for statement in tree.body:
        if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
            continue  # a docstring
        target = statement.targets[0] if isinstance(statement, ast.Assign) else None
        if not isinstance(target, ast.Name) or len(statement.targets) > 1:
            raise _refused(statement, where)
        names[target.id] = _value(statement.value, names, where)
    return names


def _value(node: ast.expr, names: dict[str, Any], where: str) -> Any:
    """Returns the value of a literal expression."""
    if isinstance(node, ast.Constant) and not isinstance(node.value, bytes | complex):
        return node.value
    if isinstance(node, ast.Name) and node.id in names:
        return names[node.id]
    if isinstance(node, ast.List | ast.Tuple):
        return [_value(item, names, where) for item in node.elts]
    if isinstance(node, ast.Dict) and None not in node.keys:
        keys = [_value(key, names, where) for key in node.keys]
        return dict(zip(keys, (_value(item, names, where) for item in node.values), strict=True))
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "dict":
        if not node.args and all(keyword.arg for keyword in node.keywords):
            return {keyword.arg: _value(keyword.value, names, where) for keyword in node.keywords}
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        number = _value(node.operand, names, where)
        if isinstance(number, int | float):
            return -number
    elif isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
        return _operation(node, names, where)
    elif isinstance(node, ast.JoinedStr):
        return "".join(_part(part, names, where) for part in node.values)
    raise _refused(node, where)


def _operation(node: ast.BinOp, names: dict[str, Any], where: str) -> Any:
    """Returns the result of an operation on two numbers."""
    left, right = _value(node.left, names, where), _value(node.right, names, where)
    for number in (left, right):
        if not isinstance(number, int | float) or abs(number) > LARGEST:
            raise _refused(node, where)
    try:
        return OPERATORS[type(node.op)](left, right)
    except ZeroDivisionError:
        raise _refused(node, where) from None


def _part(part: ast.expr, names: dict[str, Any], where: str) -> str:
    """Returns a part of an f-string."""
    if isinstance(part, ast.FormattedValue):
        if part.format_spec is not None or part.conversion != -1:
            raise _refused(part, where)
        text = _value(part.value, names, where)
        if isinstance(text, list | dict) or len(str(text)) > LONGEST:
            raise _refused(part, where)
        return str(text)
    return str(_value(part, names, where))


def _refused(node: ast.AST, where: str) -> UserError:
    code = ast.unparse(node).splitlines()[0][:80]
    return UserError(
        f"{where}, line {node.lineno}: {code!r} is not a literal; configurations are read, never executed"
    )
