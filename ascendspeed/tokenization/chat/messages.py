"""Parses conversations (lists of role and content, as in OpenAI's or Hugging Face's format) into checked
`Message`s."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ascendspeed.utils.errors import UserError
from ascendspeed.utils.safe_io import parse_json
from ascendspeed.utils.text import shorten

ROLES = ("system", "user", "assistant", "environment")
TOOL_RESULT_ROLES = ("environment", "tool", "function")
"""Roles of a tool's result; the last two are OpenAI's."""
ACCEPTED_ROLES = tuple(dict.fromkeys((*ROLES, *TOOL_RESULT_ROLES)))
MESSAGE_KEYS = {"role", "content", "name", "tool_calls", "tool_call_id", "code"}
LOSS_KEYS = ("loss", "weight")
"""Keys of a training message that put the assistant's answer into the loss (true, 1) or leave it out (false,
0)."""
TOOLS = ("plugin", "interpreter")


class InvalidConversation(UserError):
    """Raised for a conversation that cannot be read or rendered."""

    def __init__(self, kind: str, message: str) -> None:
        """`kind`: category under which preprocessing counts skipped rows."""
        super().__init__(message)
        self.kind = kind


@dataclass(frozen=True)
class ToolCall:
    """A tool call of the assistant."""

    kind: str
    """plugin (a function call as JSON) or interpreter (code)."""
    content: str


@dataclass(frozen=True)
class Message:
    """A turn of a conversation."""

    role: str
    """One of `ROLES`."""
    content: str = ""
    name: str | None = None
    """Name of the speaker: plugin and interpreter become control tokens, other names are text (`user
    name=file`)."""
    calls: tuple[ToolCall, ...] = ()
    in_loss: bool | None = None
    """True: the answer is in the loss; false: the message leaves it out; None: `--loss-on` decides."""


def read_messages(items: Any, where: str) -> list[Message]:
    """Parses a conversation that ends with a message to answer.

    Raises `InvalidConversation`, its text beginning with `where`.
    """
    messages = _parse_messages(items, where)
    role = messages[-1].role
    if role not in ("user", "environment"):
        raise InvalidConversation(
            "wrong order", f"{where}: the last message is the {role}'s; it must be the user's or a tool's"
        )
    return messages


def read_training_messages(items: Any, where: str) -> list[Message]:
    """Parses a conversation for training: it ends with an answer of the assistant.

    Raises `InvalidConversation`, its text beginning with `where`.
    """
    messages = _parse_messages(items, where, LOSS_KEYS)
    previous: Message | None = None
    for number, message in enumerate(messages, 1):
        _check_training_turn(message, previous, f"{where}, message {number}")
        previous = message
    role = messages[-1].role
    if role != "assistant":
        raise InvalidConversation(
            "wrong order", f"{where}: the last message is the {role}'s; it must be the assistant's"
        )
    return messages


def _check_training_turn(message: Message, previous: Message | None, where: str) -> None:
    role = message.role
    if role == "assistant" and (previous is None or previous.role in ("system", "assistant")):
        position = f"after the {previous.role}'s" if previous else "at the beginning"
        raise InvalidConversation(
            "wrong order", f"{where}: an assistant message {position}; it must answer a user or a tool"
        )
    if previous and role == previous.role == "user" and message.name == previous.name:
        raise InvalidConversation("wrong order", f"{where}: a second user message without an answer between")
    if not message.content.strip() and not message.calls and role in ("user", "assistant"):
        kind = "empty answer" if role == "assistant" else "empty question"
        raise InvalidConversation(kind, f"{where}: the {role} message is empty")


def _parse_messages(items: Any, where: str, more_keys: tuple[str, ...] = ()) -> list[Message]:
    if not isinstance(items, Sequence) or isinstance(items, str) or not items:
        reason = f"a conversation is a list of at least one message, not {shorten(items)}"
        raise InvalidConversation("no conversation", f"{where}: {reason}")
    keys = MESSAGE_KEYS.union(more_keys)
    messages = [
        _parse_message(item, f"{where}, message {number}", keys) for number, item in enumerate(items, 1)
    ]
    for number, message in enumerate(messages[1:], 2):
        if message.role == "system" and message.name is None:
            first_is_system = messages[0].role == "system"
            reason = "a second system message" if first_is_system else "the system message must come first"
            raise InvalidConversation("wrong order", f"{where}, message {number}: {reason}")
    return messages


def tools_message(tools: Any, where: str) -> Message:
    """Returns the system message that describes the tools, as JSON. Raises `InvalidConversation`."""
    is_list = isinstance(tools, Sequence) and not isinstance(tools, str)
    if not is_list or not all(isinstance(tool, Mapping) for tool in tools):
        raise InvalidConversation(
            "wrong tools",
            f"{where}: tools are a list of objects that describe functions, not {shorten(tools)}",
        )
    return Message("system", json.dumps(list(tools), ensure_ascii=False), "plugin")


def _parse_message(item: Any, where: str, known_keys: set[str]) -> Message:
    if not isinstance(item, Mapping):
        raise InvalidConversation(
            "no conversation", f"{where}: a message is an object with role and content, not {shorten(item)}"
        )
    role, content, name = (item.get(key) for key in ("role", "content", "name"))
    if role not in ACCEPTED_ROLES:
        choices = ", ".join(ACCEPTED_ROLES)
        raise InvalidConversation(
            "wrong role", f"{where}: the role {shorten(role)} does not exist; choose from {choices}"
        )
    for key in item:
        if key not in known_keys:
            keys = ", ".join(sorted(known_keys))
            raise InvalidConversation(
                "unknown field", f"{where}: unknown field {shorten(key)}; a message has {keys}"
            )
    calls = _parse_calls(item, role, where)
    if not isinstance(content, str) and (content is not None or not calls):
        reason = "missing" if content is None else f"{shorten(content)}, not a string"
        raise InvalidConversation("wrong content", f"{where}: the content is {reason}")
    if name is not None and (not isinstance(name, str) or not name or "\n" in name):
        raise InvalidConversation(
            "wrong content", f"{where}: the name is {shorten(name)}, not one line of text"
        )
    if role in TOOL_RESULT_ROLES:
        name = name if name in TOOLS or role == "environment" else "plugin"
        role = "environment"
    return Message(role, content or "", name, calls, _in_loss(item, role, where))


def _in_loss(item: Mapping[str, Any], role: str, where: str) -> bool | None:
    """Returns the value of `LOSS_KEYS`; None if a message has none. Raises `InvalidConversation`."""
    given = {key: item[key] for key in LOSS_KEYS if item.get(key) is not None}
    for key, value in given.items():
        if not isinstance(value, bool | int | float) or value not in (0, 1):
            reason = f"{key} is {shorten(value)}; it must be true or false, 1 or 0"
            raise InvalidConversation("wrong loss", f"{where}: {reason}")
    values = {bool(value) for value in given.values()}
    if len(values) > 1:
        raise InvalidConversation("wrong loss", f"{where}: {' and '.join(given)} contradict each other")
    if True in values and role != "assistant":
        reason = f"{next(iter(given))} is set, but only the assistant's messages can be in the loss"
        raise InvalidConversation("wrong loss", f"{where}: {reason}")
    return values.pop() if values and role == "assistant" else None


def _parse_calls(item: Mapping[str, Any], role: str, where: str) -> tuple[ToolCall, ...]:
    tool_calls, code = item.get("tool_calls") or (), item.get("code")
    if (tool_calls or code) and role != "assistant":
        raise InvalidConversation(
            "wrong tool call", f"{where}: only the assistant calls tools, not the {role}"
        )
    if not isinstance(tool_calls, Sequence) or isinstance(tool_calls, str):
        raise InvalidConversation(
            "wrong tool call", f"{where}: tool_calls must be a list, not {shorten(tool_calls)}"
        )
    calls = [ToolCall("plugin", _function_call(call, where)) for call in tool_calls]
    if code is not None:
        if not isinstance(code, str):
            raise InvalidConversation(
                "wrong tool call", f"{where}: code must be a string, not {shorten(code)}"
            )
        calls.append(ToolCall("interpreter", code))
    return tuple(calls)


def _function_call(call: Any, where: str) -> str:
    """Returns a function call as JSON of name and parameters.

    Accepts {"name", "parameters"} and OpenAI's {"type": "function", "function": {"name", "arguments"}}.
    """
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise InvalidConversation(
            "wrong tool call",
            f"{where}: a tool call is an object with name and parameters, not {shorten(call)}",
        )
    parameters = function.get("parameters", function.get("arguments", {}))
    if isinstance(parameters, str):  # OpenAI's format keeps arguments as a JSON string
        try:
            parameters = parse_json(parameters.encode(), finite=False)
        except ValueError as error:
            reason = f"the arguments of {function['name']} are not JSON: {shorten(parameters)}: {error}"
            raise InvalidConversation("wrong tool call", f"{where}: {reason}") from None
    return json.dumps({"name": function["name"], "parameters": parameters}, ensure_ascii=False)
