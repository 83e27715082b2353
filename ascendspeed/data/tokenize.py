"""Encodes rows as documents, in memory: preprocessing writes them to files, streaming trains on them at
once."""

import hashlib
from dataclasses import replace

import numpy as np

from ascendspeed.data.document import Document, EncodedRows, Fault, Truncation, count_supervised
from ascendspeed.data.handlers.base import EncoderConfig, nan_to_none
from ascendspeed.data.handlers.registry import create_handler
from ascendspeed.data.readers.shard import RowBatch
from ascendspeed.tokenization import tokenizer
from ascendspeed.utils.errors import UserError

VOCABULARY_SUFFIXES = (".json", ".model")
"""Tokenizer files that decide on the ids."""


class DocumentEncoder:
    """A handler and a tokenizer; appends eos and truncates. One per process."""

    def __init__(self, config: EncoderConfig) -> None:
        """Raises `UserError` for a missing tokenizer or handler, and for settings that do not go together."""
        self.config = config
        self.tokenizer = tokenizer.load(config.tokenizer_path, config.parse_special_tokens)
        self.handler = create_handler(config, self.tokenizer)
        if config.append_eod and self.tokenizer.eos is None:
            raise UserError(f"--append-eod: the tokenizer in {config.tokenizer_path} names no eos_token")
        self._eod = np.array([self.tokenizer.eos], np.int32) if config.append_eod else None
        self._max_length = config.seq_length if self.handler.has_loss_mask else None

    @property
    def identity(self) -> list[object]:
        """All that decides, beside the rows, on the documents: digests of the tokenizer's files, settings."""
        digests = []
        for path in sorted(self.tokenizer.path.glob("*")):
            if path.suffix in VOCABULARY_SUFFIXES:
                digests.append(hashlib.sha256(path.read_bytes()).hexdigest())
        return [digests, vars(self.config) | {"tokenizer_path": ""}]

    def encode(self, rows: RowBatch) -> dict[str, EncodedRows]:
        """Returns key of the handler -> a document or a fault for each row; `rows` has at least the handler's
        columns."""
        rows = RowBatch({name: nan_to_none(values) for name, values in rows.items()})
        return {key: self._finish(encoded) for key, encoded in self.handler.encode_rows(rows).items()}

    def _finish(self, encoded: EncodedRows) -> EncodedRows:
        documents: list[Document | Fault] = []
        truncated = Truncation()
        for document in encoded.documents:
            if isinstance(document, Document):
                document = self._append_eods(document)
                if self._max_length is not None and len(document.tokens) > self._max_length:
                    document, truncation = _truncate(document, self._max_length)
                    truncated += truncation
            documents.append(document)
        return replace(encoded, documents=documents, truncated=truncated)

    def _append_eods(self, document: Document) -> Document:
        parts = [self._append_eod(part) for part in document.parts()]
        return parts[0] if len(parts) == 1 else Document.of_pair(*parts)

    def _append_eod(self, document: Document) -> Document:
        tokens, mask = document.tokens, document.loss_mask
        if self._eod is None:
            return document
        if mask is not None and mask[-1] and tokens[-1] == self._eod[0]:  # the last turn ends with eos
            return document
        return Document(np.concatenate([tokens, self._eod]), None if mask is None else np.append(mask, True))


def _truncate(document: Document, length: int) -> tuple[Document | Fault, Truncation]:
    tokens, mask = document.tokens, document.loss_mask
    assert mask is not None  # plain text is not truncated
    if document.rejected_start is not None:
        detail = f"{len(tokens)} tokens of chosen and rejected together, and --seq-length is {length}"
        return Fault("pair longer than --seq-length", detail), Truncation()
    supervision = count_supervised(mask, np.array([len(tokens)]), length)
    if not supervision.tokens[0]:
        detail = f"{len(tokens)} tokens, and the supervised ones come after {length}"
        return Fault("answers beyond --seq-length", detail), Truncation()
    truncation = Truncation(1, int(supervision.lost_answers[0]), int(supervision.cut_answers[0]))
    return Document(tokens[:length], mask[:length]), truncation
