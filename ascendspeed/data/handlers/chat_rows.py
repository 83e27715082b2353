"""Conversations as data sets hold them, read as lists of messages with role and content.

A conversation is a list of messages, its JSON, or a struct of lists (one list for every key: a sequence of
structs in the `datasets` library). A message has role and content (OpenAI), from and value (ShareGPT), or
input and output for a whole turn (XTuner); it may be an Arrow map.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from ascendspeed.data.readers.json_text import RepeatedKey, unique_keys
from ascendspeed.tokenization.chat import InvalidConversation
from ascendspeed.utils.text import shorten

SHAREGPT_ROLES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "observation": "tool",
    "function_response": "tool",
}
XTUNER_KEYS = {"input", "output"}


def read_conversation(value: Any, name: str) -> list[Any]:
    """Returns the messages of the column `name`; what is no message is left to the parser of messages. Raises
    `InvalidConversation`."""
    items = _transposed(_from_map(json_or_value(value)), name)
    if not isinstance(items, Sequence) or isinstance(items, str) or not items:
        raise InvalidConversation("no conversation", f"{name} is {shorten(value)}, not a list of messages")
    return [message for item in items for message in _messages(_from_map(item))]


def json_or_value(value: Any) -> Any:
    """Returns what a text holds as JSON, any other value and a text that is not JSON as it is. Raises
    `InvalidConversation` if an object has a key twice."""
    try:
        return json.loads(value, object_pairs_hook=unique_keys) if isinstance(value, str) else value
    except RepeatedKey as error:
        raise _repeated_key(value, error) from None
    except (ValueError, RecursionError):
        return value


def parse_json(text: Any, kind: str) -> Any:
    """Parses JSON. Raises `InvalidConversation` of this kind."""
    try:
        return json.loads(text, object_pairs_hook=unique_keys)
    except RepeatedKey as error:
        raise _repeated_key(text, error) from None
    except (ValueError, TypeError, RecursionError):
        raise InvalidConversation(kind, f"{shorten(text)} is not JSON") from None


def _repeated_key(text: str, error: RepeatedKey) -> InvalidConversation:
    return InvalidConversation("repeated key", f"{shorten(text)} has the key {str(error)!r} twice")


def _from_map(value: Any) -> Any:
    """Returns an Arrow map, a list of tuples (key, value), as a dictionary. Raises `InvalidConversation` if a
    key is there twice."""
    is_map = isinstance(value, list) and value and all(isinstance(entry, tuple) for entry in value)
    if not is_map:
        return value
    table = dict(value)
    if len(table) < len(value):
        raise InvalidConversation("wrong content", f"{shorten(value)} has a key twice")
    return table


def _transposed(value: Any, name: str) -> Any:
    """Returns a struct of lists as a list of structs. Raises `InvalidConversation` for lists of different
    lengths."""
    if not isinstance(value, Mapping):
        return value
    columns = {key: column for key, column in value.items() if column is not None}
    if not columns or not all(isinstance(column, list) for column in columns.values()):
        return value
    if len({len(column) for column in columns.values()}) > 1:
        lengths = ", ".join(f"{len(column)} {key}" for key, column in columns.items())
        raise InvalidConversation("no conversation", f"{name} has lists of different lengths: {lengths}")
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def _messages(item: Any) -> list[Any]:
    """Returns the messages of one item; columnar files have every key in every item, most of them null."""
    if not isinstance(item, Mapping):
        return [item]
    fields = {key: value for key, value in item.items() if value is not None}
    if "from" in fields:
        return [_sharegpt_message(fields)]
    if XTUNER_KEYS & fields.keys() and "role" not in fields:
        return _xtuner_turn(fields)
    return [fields]


def _sharegpt_message(fields: dict[str, Any]) -> dict[str, Any]:
    role = fields.pop("from")
    content = fields.pop("value", None)
    if role == "function_call":
        calls = parse_json(content, "wrong tool call")
        return fields | {"role": "assistant", "tool_calls": calls if isinstance(calls, list) else [calls]}
    known = SHAREGPT_ROLES.get(role, role) if isinstance(role, str) else role
    return fields | {"role": known, "content": content}


def _xtuner_turn(fields: dict[str, Any]) -> list[dict[str, Any]]:
    """Returns the messages of a turn; a key that is not XTuner's stays in the question, which is then
    refused."""
    system = fields.pop("system", None)
    answer = {"role": "assistant", "content": fields.pop("output", None)}
    if "output_with_loss" in fields:
        answer["loss"] = fields.pop("output_with_loss")
    question = {"role": "user", "content": fields.pop("input", None)} | fields
    return [*([{"role": "system", "content": system}] if system else []), question, answer]
