"""Prompts as conversations in the model's chat template, as text with its control tokens."""

from typing import Any

from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from ascendspeed.evaluation.prompts import PromptEncoder
from ascendspeed.tokenization import tokenizer as tokenizers
from ascendspeed.tokenization.chat import ChatFormat, to_jinja
from ascendspeed.tokenization.tokenizer import Tokenizer
from ascendspeed.utils.errors import UserError
from ascendspeed.utils.text import first_line


class ChatPrompts:
    """Renders conversations of lm-evaluation-harness."""

    def __init__(self, tokenizer: Tokenizer, template: str | None, family: str) -> None:
        """`template`: name of a chat template; None: the one of the tokenizer. Raises UserError."""
        chat_format = ChatFormat(tokenizer, template, family)
        self.name = chat_format.name
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        environment.globals["raise_exception"] = _raise
        self._template = environment.from_string(to_jinja(chat_format))

    def render(self, messages: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Returns the text of a conversation, up to the header of the answer.

        Without `add_generation_prompt`, a last message of the assistant is the begin of the answer.
        """
        begin = ""
        if not add_generation_prompt and messages[-1]["role"] == "assistant":
            messages, begin = messages[:-1], messages[-1]["content"]
        try:
            text = self._template.render(
                messages=messages, bos_token="", add_generation_prompt=True, tools=None
            )
        except TemplateError as error:
            raise UserError(f"the chat template {self.name}: {first_line(error)}") from error
        return text + begin


class ChatEncoder(PromptEncoder):
    """Encodes text in which the names of control tokens are control tokens, with one BOS."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        super().__init__(tokenizers.load(tokenizer.path, parses_special_tokens=True))


def _raise(message: Any) -> None:
    raise TemplateError(str(message))
