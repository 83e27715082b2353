"""Handlers whose documents are texts, of which every token is learnt."""

from abc import abstractmethod
from typing import Any, ClassVar

from ascendspeed.data.document import Document, EncodedRows, Fault
from ascendspeed.data.handlers.base import EncoderConfig, Handler, text_size
from ascendspeed.data.readers.shard import RowBatch
from ascendspeed.tokenization.tokenizer import Tokenizer


class TextHandler(Handler):
    """Rows -> texts -> documents."""

    def __init__(self, job: EncoderConfig, tokenizer: Tokenizer) -> None:
        self._longest, self._tokenizer = job.longest, tokenizer

    @abstractmethod
    def texts(self, rows: RowBatch) -> dict[str, list[Any]]:
        """Key -> one value per row: the text, or what stands in its place (None, a `Bad`, whatever is not text)."""

    def make(self, rows: RowBatch) -> dict[str, EncodedRows]:
        return {key: self._made(values) for key, values in self.texts(rows).items()}

    def _made(self, values: list[Any]) -> EncodedRows:
        weighed = [text_size(value, self._longest) for value in values]
        good = [value for value, one in zip(values, weighed, strict=True) if not isinstance(one, Fault)]
        encoded = iter(self._tokenizer.encode_batch(good))
        documents = [one if isinstance(one, Fault) else self._document(next(encoded)) for one in weighed]
        return EncodedRows(documents, sum(one for one in weighed if not isinstance(one, Fault)))

    def _document(self, ids: Any) -> Document | Fault:
        return Document(ids) if len(ids) else Fault("without tokens")


class GeneralPretrainHandler(TextHandler):
    """Plain text in the columns of `--json-keys`; each key makes a data set of its own."""

    takes = ("json_keys",)

    def __init__(self, job: EncoderConfig, tokenizer: Tokenizer) -> None:
        super().__init__(job, tokenizer)
        self.keys = self.required = tuple(dict.fromkeys(job.json_keys))

    def texts(self, rows: RowBatch) -> dict[str, list[Any]]:
        return {key: rows[key] for key in self.keys}


class AlpacaPretrainHandler(TextHandler):
    """Alpaca rows (instruction, input, output) as one text, under the key `text`."""

    keys = ("text",)
    required = ("instruction", "output")
    optional = ("input",)

    # The published format to the letter (no space before USER included), except that an empty input leaves its section out.
    PROMPT: ClassVar[str] = (
        "A chat between a curious user and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the user's questions."
        "USER: Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\n{instruction}\n\n{section}### Response: ASSISTANT: "
    )
    SECTION: ClassVar[str] = "### Input:\n{input}\n\n"

    def texts(self, rows: RowBatch) -> dict[str, list[Any]]:
        return {
            "text": [self._text(*row) for row in zip(*(rows[name] for name in self.columns), strict=True)]
        }

    def _text(self, instruction: Any, output: Any, given: Any) -> Any:
        for value in (instruction, output):
            if not isinstance(value, str) or not value.strip():
                return value  # there is nothing to learn; it is counted as what it is
        if given is not None and not isinstance(given, str):
            return given
        section = self.SECTION.format(input=given) if given and given.strip() else ""
        return self.PROMPT.format(instruction=instruction, section=section) + output
