"""Rows -> documents as they are trained on, without any file: what preprocessing writes, and what can be trained on at once."""

from dataclasses import replace

import numpy as np

from ascendspeed.data.document import Document, EncodedRows, Fault, Truncation, count_supervised
from ascendspeed.data.handlers.base import EncoderConfig
from ascendspeed.data.handlers.registry import create_handler
from ascendspeed.data.readers.shard import RowBatch
from ascendspeed.tokenization import tokenizer
from ascendspeed.utils.errors import UserError


class DocumentEncoder:
    """A handler and a tokenizer; one per process."""

    def __init__(self, job: EncoderConfig) -> None:
        """Raises `UserError` for a tokenizer or a handler that is not there, and settings that do not go together."""
        self.job = job
        self.tokenizer = tokenizer.load(job.tokenizer_path)
        self.handler = create_handler(job, self.tokenizer)
        self._eod = (
            np.array([self.tokenizer.eos] if job.append_eod else [], np.int32) if self._ends() else None
        )
        self._length = job.seq_length if self.handler.learns_answers else None

    def make(self, rows: RowBatch) -> dict[str, EncodedRows]:
        """Key of the handler -> a document or a fault for each row. `rows`: at least the columns of the handler."""
        return {key: self._finished(made) for key, made in self.handler.make(rows).items()}

    def _ends(self) -> bool:
        if self.job.append_eod and self.tokenizer.eos is None:
            raise UserError(f"--append-eod: the tokenizer in {self.job.tokenizer_path} names no eos_token")
        return self.job.append_eod

    def _finished(self, made: EncodedRows) -> EncodedRows:
        documents = [one if isinstance(one, Fault) else self._ended(one) for one in made.documents]
        truncated = Truncation()
        for place, one in enumerate(documents):
            if self._length is not None and isinstance(one, Document) and len(one.tokens) > self._length:
                documents[place], lost = _cut(one, self._length)
                truncated += lost
        return replace(made, documents=documents, truncated=truncated)

    def _ended(self, document: Document) -> Document:
        tokens, mask = document.tokens, document.loss_mask
        if self._eod is None or (
            mask is not None and mask[-1] and tokens[-1] == self._eod[0]
        ):  # a turn that ends with eos
            return document
        return Document(np.concatenate([tokens, self._eod]), None if mask is None else np.append(mask, True))


def _cut(document: Document, length: int) -> tuple[Document | Fault, Truncation]:
    tokens, mask = document.tokens, document.loss_mask
    assert mask is not None  # plain text stays whole
    found = count_supervised(mask, np.array([len(tokens)]), length)
    if not found.tokens[0]:
        what = f"{len(tokens)} tokens, and those to be learnt come after {length}"
        return Fault("answers beyond --seq-length", what), Truncation()
    return Document(tokens[:length], mask[:length]), Truncation(1, int(found.lost[0]), int(found.cut[0]))
