r"""Chat templates as Jinja, for `apply_chat_template` of transformers and other programs.

Text in a message must not become a control token, as in `ChatFormat`. Jinja returns one string, so the
template writes `ESCAPE` behind the first character of every such string in a message, and the tokenizer.json
that this project writes (`conversion.tokenizer.export`) removes it once control tokens have been recognized.
Other tokenizers do not know the mark: a template for them leaves it out.
"""

from collections.abc import Collection

from ascendspeed.tokenization.chat.chat_format import PLACEHOLDER, ChatFormat
from ascendspeed.tokenization.chat.messages import TOOL_RESULT_ROLES, TOOLS
from ascendspeed.tokenization.chat.template_files import MARK
from ascendspeed.tokenization.chat.templates import EOS, first_token_id

ESCAPE = "\ufdd0"
"""Noncharacter of Unicode, which no text for interchange contains."""


def escaped(string: str) -> str:
    """Returns the string of a control token as it stands in the text of a message."""
    return string[0] + ESCAPE + string[1:]


def to_jinja(chat_format: ChatFormat, special: Collection[str] = ()) -> str:
    """Returns the chat template in Jinja.

    `special`: strings that the tokenizer makes control tokens of, to escape in messages; empty for a
    tokenizer that does not know `ESCAPE`. The result of `apply_chat_template` with `add_generation_prompt`
    then has the ids of `ChatFormat.prompt_ids`.
    """
    strings = sorted(_escapable(chat_format, special)) if special else []
    replaces = "".join(f" | replace({_literal(s)}, {_literal(escaped(s))})" for s in strings)
    template = chat_format.template
    parts = [
        f"{MARK}{chat_format.name} of the InternLM training recipes -#}}",
        f"{{%- macro text(value) -%}}{{{{- value{replaces} -}}}}{{%- endmacro -%}}",
        *_call_macros(chat_format),
        *_turn_macro(chat_format),
        "{{- bos_token if bos_token else '' -}}" if chat_format.tokenizer.bos is not None else "",
        "{%- for message in messages -%}",
        "{%- if tools and loop.first and message.role != 'system' -%}{{- tool_list() -}}{%- endif -%}",
        "{{- turn(message) -}}",
        "{%- if tools and loop.first and message.role == 'system' -%}{{- tool_list() -}}{%- endif -%}",
        "{%- endfor -%}",
        f"{{%- if add_generation_prompt -%}}{_pattern(chat_format, template.answer, {})}{{%- endif -%}}",
    ]
    return "\n".join(part for part in parts if part) + "\n"


def _escapable(chat_format: ChatFormat, special: Collection[str]) -> set[str]:
    """Strings that are text in a message, for `ChatFormat`, and control tokens for other tokenizers."""
    encoded = chat_format.tokenizer.encode_batch(list(special))
    numbers = map(chat_format.tokenizer.token_to_id, special)
    as_text = {s for s, n, ids in zip(special, numbers, encoded, strict=True) if n not in ids.tolist()}
    return as_text | set(chat_format.split_strings)


def _call_macros(chat_format: ChatFormat) -> list[str]:
    """Macros for the assistant's tool calls and for the list of tools."""
    calls = chat_format.template.calls
    if not calls:
        refusal = _refuse(chat_format, "does not support tools")
        body = f"{{%- if message.tool_calls or message.code -%}}{refusal}{{%- endif -%}}"
        return [
            f"{{%- macro body(message) -%}}{{{{- text(message.content or '') -}}}}{body}{{%- endmacro -%}}",
            f"{{%- macro tool_list() -%}}{refusal}{{%- endmacro -%}}",
        ]
    function = (
        "text('{\"name\": ' + (function.name | tojson) + ', \"parameters\": ' + "
        "(parameters if parameters is string else parameters | tojson) + '}')"
    )
    plugin = _pattern(chat_format, calls["plugin"], {"content": f"{{{{- {function} -}}}}"})
    interpreter = _pattern(chat_format, calls["interpreter"], {"content": "{{- text(message.code) -}}"})
    name = _pattern(chat_format, chat_format.template.name, {"name": _control(chat_format, "plugin")})
    turn = _pattern(
        chat_format,
        chat_format.template.turns["system"],
        {"name": name, "content": "{{- text(tools | tojson) -}}"},
    )
    return [
        "{%- macro body(message) -%}{{- text(message.content or '') -}}",
        "{%- for call in message.tool_calls or [] -%}{%- set function = call.function or call -%}",
        "{%- set parameters = function.parameters if function.parameters is defined else "
        "function.arguments if function.arguments is defined else {} -%}",
        f"{plugin}{{%- endfor -%}}",
        f"{{%- if message.code is string -%}}{interpreter}{{%- endif -%}}{{%- endmacro -%}}",
        f"{{%- macro tool_list() -%}}{turn}{{%- endmacro -%}}",
    ]


def _turn_macro(chat_format: ChatFormat) -> list[str]:
    """Macro for one message."""
    template = chat_format.template
    branches: list[str] = []
    for role, pattern in template.turns.items():
        values = {"content": "{{- body(message) -}}", "name": "{{- speaker(name) -}}"}
        keyword = "elif" if branches else "if"
        branches.append(f"{{%- {keyword} role == '{role}' -%}}{_pattern(chat_format, pattern, values)}")
    refusal = _refuse(chat_format, f"has no such role, only {', '.join(template.turns)}")
    aliases = sorted(set(TOOL_RESULT_ROLES) - {"environment"})
    return [
        f"{{%- macro speaker(name) -%}}{_speaker(chat_format)}{{%- endmacro -%}}",
        "{%- macro turn(message) -%}",
        f"{{%- set is_tool = message.role in {aliases} -%}}",
        "{%- set role = 'environment' if is_tool else message.role -%}",
        f"{{%- set name = 'plugin' if is_tool and message.name not in {sorted(TOOLS)} else message.name -%}}",
        "" if template.name else "{{- speaker(message.name) -}}",
        *branches,
        f"{{%- else -%}}{refusal}{{%- endif -%}}{{%- endmacro -%}}",
    ]


def _speaker(chat_format: ChatFormat) -> str:
    if not chat_format.template.name:
        return f"{{%- if name -%}}{_refuse(chat_format, 'does not support a name')}{{%- endif -%}}"
    lines: list[str] = []
    for tool in TOOLS:
        keyword = "elif" if lines else "if"
        filled = _pattern(chat_format, chat_format.template.name, {"name": _control(chat_format, tool)})
        lines.append(f"{{%- {keyword} name == '{tool}' -%}}{filled}")
    filled = _pattern(chat_format, chat_format.template.name, {"name": "{{- text(name) -}}"})
    return "".join([*lines, f"{{%- elif name -%}}{filled}{{%- endif -%}}"])


def _pattern(chat_format: ChatFormat, pattern: str, values: dict[str, str]) -> str:
    """Returns a pattern with its placeholders replaced by `values` (Jinja) or by control tokens."""
    filled = []
    for index, word in enumerate(PLACEHOLDER.split(pattern)):
        if index % 2:
            filled.append(values[word] if word in values else _control(chat_format, word))
        elif word:
            filled.append(f"{{{{- {_literal(word)} -}}}}")
    return "".join(filled)


def _control(chat_format: ChatFormat, name: str) -> str:
    """Returns a control token by the string that the tokenizer has for it."""
    strings = chat_format.template.controls[name]
    for string in strings:
        if first_token_id(chat_format.tokenizer, (string,)) is not None:
            return "{{- eos_token -}}" if string == EOS else f"{{{{- {_literal(string)} -}}}}"
    return _refuse(chat_format, f"needs the token {strings[0]}, which the tokenizer has not")


def _refuse(chat_format: ChatFormat, reason: str) -> str:
    return f"{{{{- raise_exception({_literal(f'the chat template {chat_format.name} {reason}')}) -}}}}"


def _literal(text: str) -> str:
    r"""Returns a string of Jinja in ASCII: others than Python may not know how to read `\u`."""
    return "'" + text.encode("unicode_escape").decode().replace("'", "\\'") + "'"
