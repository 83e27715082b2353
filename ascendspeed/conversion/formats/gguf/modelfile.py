"""Modelfile of Ollama for a GGUF file: chat template in Go's language, and stop strings."""

from ascendspeed.tokenization.chat import ChatFormat
from ascendspeed.tokenization.chat.chat_format import PLACEHOLDER
from ascendspeed.tokenization.chat.templates import EOS

ROLES = ("system", "user", "assistant")


def modelfile(file: str, chat_format: ChatFormat | None, context: int, has_own_template: bool) -> str:
    """Returns the Modelfile of `file`.

    `chat_format`: that of the training, without tools here. `has_own_template`: the GGUF file has a template
    that this project did not write, which Ollama detects; without any template, prompts are completed.
    """
    lines = ["# ollama create NAME -f Modelfile", f"FROM ./{file}"]
    if chat_format:
        lines.append(f'TEMPLATE """{_go_template(chat_format)}"""')
        stops = [_string(chat_format, name) for name in chat_format.template.stops]
        lines += [f'PARAMETER stop "{stop}"' for stop in stops if stop]
    elif not has_own_template:
        lines.append('TEMPLATE """{{ .Prompt }}"""')
    lines.append(f"PARAMETER num_ctx {context}")
    return "\n".join(lines) + "\n"


def _go_template(chat_format: ChatFormat) -> str:
    template = chat_format.template
    branches = []
    for role in ROLES:
        keyword = "else if" if branches else "if"
        turn = _pattern(chat_format, template.turns[role], "{{ .Content }}")
        branches.append(f'{{{{ {keyword} eq .Role "{role}" }}}}{turn}')
    turns = "".join([*branches, "{{ end }}"])
    return f"{{{{ range .Messages }}}}{turns}{{{{ end }}}}{_pattern(chat_format, template.answer, '')}"


def _pattern(chat_format: ChatFormat, pattern: str, content: str) -> str:
    words = PLACEHOLDER.split(pattern)
    values = {"content": content, "name": ""}
    for index in range(1, len(words), 2):
        words[index] = values[words[index]] if words[index] in values else _string(chat_format, words[index])
    return "".join(words)


def _string(chat_format: ChatFormat, control: str) -> str:
    """String of a control token in the tokenizer; empty for the end-of-document token, which ends anyway."""
    strings = chat_format.template.controls[control]
    known = (text for text in strings if text != EOS and chat_format.tokenizer.token_to_id(text) is not None)
    return next(known, "")
