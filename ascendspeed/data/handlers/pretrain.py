"""Handlers for text documents, of which every token is supervised."""

from abc import abstractmethod
from typing import Any, ClassVar

from ascendspeed.data.document import Document, EncodedRows, Fault
from ascendspeed.data.handlers.base import EncoderConfig, Handler, alpaca_question, text_size
from ascendspeed.data.readers.shard import RowBatch
from ascendspeed.tokenization.tokenizer import Tokenizer


class TextHandler(Handler):
    """Converts every row to one text per key."""

    def __init__(self, config: EncoderConfig, tokenizer: Tokenizer) -> None:
        self._longest = config.longest
        self._tokenizer = tokenizer

    @abstractmethod
    def texts(self, rows: RowBatch) -> dict[str, list[Any]]:
        """Returns key -> one value per row: the text, or the value in its place (None, an `InvalidValue`, any
        other type)."""

    def encode_rows(self, rows: RowBatch) -> dict[str, EncodedRows]:
        return {key: self._encode(values) for key, values in self.texts(rows).items()}

    def _encode(self, values: list[Any]) -> EncodedRows:
        sizes = [text_size(value, self._longest) for value in values]
        valid = [value for value, size in zip(values, sizes, strict=True) if not isinstance(size, Fault)]
        encoded = iter(self._tokenizer.encode_batch(valid))
        documents: list[Document | Fault] = []
        total = 0
        for size in sizes:
            if isinstance(size, Fault):
                documents.append(size)
            else:
                total += size
                ids = next(encoded)
                documents.append(Document(ids) if len(ids) else Fault("without tokens"))
        return EncodedRows(documents, total)


class GeneralPretrainHandler(TextHandler):
    """Plain text in the columns of `--json-keys`; each key becomes a dataset of its own."""

    accepted_settings = ("json_keys",)

    def __init__(self, config: EncoderConfig, tokenizer: Tokenizer) -> None:
        super().__init__(config, tokenizer)
        self.keys = self.required = tuple(dict.fromkeys(config.json_keys))

    def texts(self, rows: RowBatch) -> dict[str, list[Any]]:
        return {key: rows[key] for key in self.keys}


class AlpacaPretrainHandler(TextHandler):
    """Alpaca rows (instruction, input, output) as one text, under the key `text`."""

    keys = ("text",)
    required = ("instruction", "output")
    optional = ("input",)

    # The published format to the letter, without a space before USER; only an empty input omits its section.
    PROMPT: ClassVar[str] = (
        "A chat between a curious user and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the user's questions."
        "USER: Below is an instruction that describes a task. Write a response that appropriately completes "
        "the request.\n\n"
        "### Instruction:\n{instruction}\n\n{section}### Response: ASSISTANT: "
    )
    SECTION: ClassVar[str] = "### Input:\n{input}\n\n"

    def texts(self, rows: RowBatch) -> dict[str, list[Any]]:
        columns = [rows[name] for name in self.columns]
        return {"text": [self._text(*row) for row in zip(*columns, strict=True)]}

    def _text(self, instruction: Any, output: Any, context: Any) -> Any:
        instruction, context = alpaca_question(instruction, context)
        for value in (instruction, output):
            if not isinstance(value, str) or not value.strip():
                return value  # `text_size` reports it
        if context is not None and not isinstance(context, str):
            return context
        section = self.SECTION.format(input=context) if context and context.strip() else ""
        return self.PROMPT.format(instruction=instruction, section=section) + output
