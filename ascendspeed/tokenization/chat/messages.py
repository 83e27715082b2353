"""Conversations as others write them (lists of role and content) -> `Message`s; what is wrong is named with its place."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ascendspeed.utils.errors import UserError

ROLES = ("system", "user", "assistant", "environment")
TOOL_RESULT_ROLES = ("environment", "tool", "function")
"""Roles of what a tool answered; the last two are other programs' words."""
ACCEPTED_ROLES = tuple(dict.fromkeys((*ROLES, *TOOL_RESULT_ROLES)))
MESSAGE_KEYS = {"role", "content", "name", "tool_calls", "tool_call_id", "code"}
TOOLS = ("plugin", "interpreter")


class InvalidConversation(UserError):
    """A conversation that is none."""

    def __init__(self, kind: str, message: str) -> None:
        """`kind`: what such conversations are counted under."""
        super().__init__(message)
        self.kind = kind


@dataclass(frozen=True)
class ToolCall:
    """A tool that the assistant calls."""

    kind: str
    """plugin (a function, as JSON) or interpreter (code)."""
    content: str


@dataclass(frozen=True)
class Message:
    """One turn."""

    role: str
    """One of `ROLES`."""
    content: str = ""
    name: str | None = None
    """Who speaks: plugin and interpreter are control tokens, anything else is text (`user name=file`)."""
    calls: tuple[ToolCall, ...] = ()


def read_messages(items: Any, where: str) -> list[Message]:
    """Checked messages, the last of which asks for an answer. Raises `WrongMessage` beginning with `where`."""
    found = _messages(items, where)
    if found[-1].role not in ("user", "environment"):
        last = f"the last message is the {found[-1].role}'s"
        raise InvalidConversation(
            "wrong order", f"{where}: {last}, so nothing is asked; end with one of the user's"
        )
    return found


def read_training_messages(items: Any, where: str) -> list[Message]:
    """Checked messages to learn from: the assistant answers, and last of all. Raises `WrongMessage` beginning with `where`."""
    found = _messages(items, where)
    before: Message | None = None
    for number, message in enumerate(found, 1):
        place = f"{where}, message {number}"
        if message.role == "assistant" and (before is None or before.role in ("system", "assistant")):
            why = f"after the {before.role}'s" if before else "at the beginning"
            raise InvalidConversation(
                "wrong order", f"{place}: the assistant speaks {why}; it answers a user or a tool"
            )
        if before and message.role == before.role == "user" and message.name == before.name:
            raise InvalidConversation("wrong order", f"{place}: the user speaks again before an answer")
        if not message.content.strip() and not message.calls and message.role in ("user", "assistant"):
            kind = "empty answer" if message.role == "assistant" else "empty question"
            raise InvalidConversation(kind, f"{place}: the {message.role} says nothing")
        before = message
    if found[-1].role != "assistant":
        raise InvalidConversation(
            "wrong order", f"{where}: the last message is the {found[-1].role}'s, and has no answer"
        )
    return found


def _messages(items: Any, where: str) -> list[Message]:
    if not isinstance(items, Sequence) or isinstance(items, str) or not items:
        what = f"a conversation is a list of at least one role and content, not {shorten(items)}"
        raise InvalidConversation("no conversation", f"{where}: {what}")
    found = [_message(item, f"{where}, message {number}") for number, item in enumerate(items, 1)]
    for number, message in enumerate(found[1:], 2):
        if message.role == "system" and message.name is None:
            why = "there is one already" if found[0].role == "system" else "it must come first"
            raise InvalidConversation(
                "wrong order", f"{where}, message {number}: a system message here: {why}"
            )
    return found


def tools_message(tools: Any, where: str) -> Message:
    """The system message that tells a model its functions: their JSON. Raises `WrongMessage`."""
    if (
        not isinstance(tools, Sequence)
        or isinstance(tools, str)
        or not all(isinstance(tool, Mapping) for tool in tools)
    ):
        raise InvalidConversation(
            "wrong tools",
            f"{where}: tools are a list of tables that describe functions, not {shorten(tools)}",
        )
    return Message("system", json.dumps(list(tools), ensure_ascii=False), "plugin")


def _message(item: Any, where: str) -> Message:
    if not isinstance(item, Mapping):
        raise InvalidConversation(
            "no conversation", f"{where}: a message has a role and a content, and {shorten(item)} has not"
        )
    role, content, name = (item.get(key) for key in ("role", "content", "name"))
    if role not in ACCEPTED_ROLES:
        there = f"there are {', '.join(ACCEPTED_ROLES)}"
        raise InvalidConversation("wrong role", f"{where}: the role {shorten(role)} does not exist; {there}")
    for key in item:
        if key not in MESSAGE_KEYS:
            known = f"a message has {', '.join(sorted(MESSAGE_KEYS))}"
            raise InvalidConversation("unknown field", f"{where}: {shorten(key)} is not understood; {known}")
    calls = _calls(item, role, where)
    if not isinstance(content, str) and (content is not None or not calls):
        what = "missing" if content is None else f"{shorten(content)}, not a text"
        raise InvalidConversation("wrong content", f"{where}: the content is {what}")
    if name is not None and (not isinstance(name, str) or not name or "\n" in name):
        raise InvalidConversation("wrong content", f"{where}: {shorten(name)} is no name")
    if role in TOOL_RESULT_ROLES:
        role, name = "environment", name if name in TOOLS or role == "environment" else "plugin"
    return Message(role, content or "", name, calls)


def _calls(item: Mapping[str, Any], role: str, where: str) -> tuple[ToolCall, ...]:
    said, code = item.get("tool_calls") or (), item.get("code")
    if (said or code) and role != "assistant":
        raise InvalidConversation(
            "wrong tool call", f"{where}: only the assistant calls tools, not the {role}"
        )
    if not isinstance(said, Sequence) or isinstance(said, str):
        raise InvalidConversation("wrong tool call", f"{where}: tool_calls is a list, not {shorten(said)}")
    calls = [ToolCall("plugin", _function(call, where)) for call in said]
    if code is not None:
        if not isinstance(code, str):
            raise InvalidConversation("wrong tool call", f"{where}: code is {shorten(code)}, not a text")
        calls.append(ToolCall("interpreter", code))
    return tuple(calls)


def _function(call: Any, where: str) -> str:
    """JSON of name and parameters, from {"name", "parameters"} or from {"type": "function", "function": {"name", "arguments"}}."""
    table = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(table, Mapping) or not isinstance(table.get("name"), str):
        raise InvalidConversation(
            "wrong tool call", f"{where}: a tool call has a name and parameters, and {shorten(call)} has not"
        )
    parameters = table.get("parameters", table.get("arguments", {}))
    if isinstance(parameters, str):  # as some programs keep them
        try:
            parameters = json.loads(parameters)
        except ValueError:
            what = f"the arguments of {table['name']} are not JSON: {shorten(parameters)}"
            raise InvalidConversation("wrong tool call", f"{where}: {what}") from None
    return json.dumps({"name": table["name"], "parameters": parameters}, ensure_ascii=False)


def shorten(value: Any) -> str:
    """A value as it is said in messages: its beginning, if it is long."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
