"""Strict reader of YAML with plain values: what could be read as another value than was meant is an error."""

import re
from typing import Any

from ascendspeed.utils.errors import UserError

INTEGER = re.compile(r"[-+]?(?:0|[1-9][0-9]*|0x[0-9a-fA-F]+)")
EXPONENT = "[eE][-+]?[0-9]+"
FLOAT = re.compile(
    rf"[-+]?(?:[0-9]+{EXPONENT}|(?:[0-9]+\.[0-9]*|\.[0-9]+)(?:{EXPONENT})?|\.(?:inf|Inf|INF))|\.(?:nan|NaN|NAN)"
)
"""Numbers as YAML 1.2 writes them. PyYAML's YAML 1.1 reads 010 as 8, 1:30 as 90, and 1e-3 as text."""


def read(text: str, path: str) -> dict[str, Any]:
    """Returns the mapping of a text. Raises UserError for anything else, and for a repeated key."""
    import yaml

    loader = _loader(path)
    try:
        values = yaml.load(text, loader)
    except (yaml.YAMLError, RecursionError, TypeError, ValueError, OverflowError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        first_line = str(error).partition("\n")[0]  # the next ones repeat where
        raise UserError(f"{path}{line}: not YAML: {getattr(error, 'problem', None) or first_line}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: not a mapping of settings")
    return values


def _loader(path: str) -> Any:
    """Returns a loader class with the numbers of YAML 1.2, which refuses repeated keys."""
    import yaml

    class Loader(yaml.SafeLoader):
        """Reads plain values."""

    def mapping(loader: Any, node: Any) -> dict[Any, Any]:
        keys = [loader.construct_object(key, deep=True) for key, _ in node.value]
        repeated = next((key for key in keys if keys.count(key) > 1), None)
        if repeated is not None:
            raise UserError(f"{path}: {repeated!r} stands twice in one section")
        return dict(
            zip(keys, (loader.construct_object(item, deep=True) for _, item in node.value), strict=True)
        )

    Loader.yaml_constructors = {
        tag: function for tag, function in yaml.SafeLoader.yaml_constructors.items() if tag not in REFUSED
    }
    Loader.yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag not in REPLACED]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, mapping)
    for tag, pattern in ((INT, INTEGER), (FLOATING, FLOAT)):
        Loader.add_implicit_resolver(tag, re.compile(f"(?:{pattern.pattern})$"), list("-+.0123456789"))
    return Loader


TAG = "tag:yaml.org,2002:"
INT, FLOATING = f"{TAG}int", f"{TAG}float"
REPLACED = (INT, FLOATING, f"{TAG}timestamp")
"""Tags that YAML 1.1 gives to text of a certain form."""
REFUSED = (f"{TAG}binary", f"{TAG}set", f"{TAG}omap", f"{TAG}pairs", f"{TAG}timestamp")
"""Types that no setting has."""
