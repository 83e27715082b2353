"""A Hugging Face dataset on disk that is tokenized in training."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Self

import numpy as np

from ascendspeed.config.schema import DataConfig
from ascendspeed.data.document import Document, Fault, Truncation
from ascendspeed.data.handlers.base import EncoderConfig
from ascendspeed.data.handlers.registry import (
    HANDLER_SETTINGS,
    HANDLERS,
    check_columns,
    refuse_repeated_columns,
    unread_columns,
)
from ascendspeed.data.readers import random_access, registry
from ascendspeed.data.readers.discovery import CACHE_FOLDER
from ascendspeed.data.splits import split_range
from ascendspeed.data.streaming.source_files import check_files, find_files
from ascendspeed.data.streaming.streamed_samples import StreamedSamples
from ascendspeed.data.token_dataset import TokenDataset
from ascendspeed.data.tokenize import DocumentEncoder
from ascendspeed.utils.errors import UserError

logger = logging.getLogger(__name__)


class StreamedDataset(TokenDataset):
    """Rows of parquet, arrow, json, csv or txt files, encoded by a handler when a sample needs them."""

    description = "data that are tokenized in training"
    flags = ("handler_name", "json_keys", *HANDLER_SETTINGS, "parse_special_tokens", "strict")

    def __init__(self, path: str, files: Sequence[Path], data: DataConfig) -> None:
        """Raises `UserError` for a missing tokenizer, handler or column, and for damaged files."""
        self.prefix = path
        self.encoder = DocumentEncoder(_encoder_config(path, data))
        handler = self.encoder.handler
        self.has_loss_mask = handler.has_loss_mask
        self.holds_pairs = handler.has_pairs
        self._last_token = data.reward_token_id if self.holds_pairs else None
        if len(handler.keys) > 1:
            raise UserError(
                f"--json-keys {' '.join(data.json_keys)}: one column is streamed; blend data sets by "
                "--data-path"
            )
        for file in files:
            if registry.format_of(file) in registry.WITH_HEADER:
                refuse_repeated_columns(handler, file, registry.columns(file))
        cache = Path(data.data_cache_path) if data.data_cache_path else None
        self.cache = cache or Path(path).absolute().parent / CACHE_FOLDER
        self.table = random_access.open_table(path, files, self.cache / "rows", cache and cache / "datasets")
        if not len(self.table):
            raise UserError(f"{path}: there is no row in it")
        check_columns(handler, path, self.table.columns)
        for note in filter(None, (*handler.notes, unread_columns(handler, self.table.columns))):
            logger.info(f"{path}: {note}")
        self.cache_key = self._cache_key(files)
        """Everything that decides which documents the rows give."""

    def _cache_key(self, files: Sequence[Path]) -> list[object]:
        last = [] if self._last_token is None else [f"reward token {self._last_token}"]
        return [random_access.fingerprint(files), *self.encoder.identity, *last]

    @classmethod
    def match(cls, path: str) -> bool:
        return bool(find_files(path).files)

    @classmethod
    def open(cls, path: str, data: DataConfig, vocab_size: int) -> Self:
        found = find_files(path)
        for note in found.notes:
            logger.info(f"note: {note}")
        check_files(found.files)
        return cls(path, found.files, data)

    @classmethod
    def files(cls, path: str) -> list[Path]:
        return find_files(path).files

    def samples(self, split: str, data: DataConfig, seed: int) -> StreamedSamples:
        return StreamedSamples(self, split_range(data.split, split, len(self)), split, data, seed)

    def documents(self, numbers: np.ndarray) -> tuple[dict[int, Document | Fault], Truncation]:
        """Returns row -> document or fault, without blank lines, and the truncation of these rows."""
        batch = self.table.read(numbers, self.encoder.handler.columns)
        encoded = next(iter(self.encoder.encode(batch).values()))
        documents = encoded.documents
        if (token := self._last_token) is not None:
            documents = [doc.ended_by(token) if isinstance(doc, Document) else doc for doc in documents]
        return dict(zip(batch.locations, documents, strict=True)), encoded.truncated

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.table)


def _encoder_config(path: str, data: DataConfig) -> EncoderConfig:
    if not data.tokenizer_name_or_path:
        raise UserError(
            f"{path} is text: give --tokenizer-name-or-path, or make .bin/.idx of it by "
            "tools/preprocess_data.py"
        )
    name = data.handler_name or "GeneralPretrainHandler"
    settings = HANDLERS[name].accepted_settings if name in HANDLERS else None  # an unknown name fails later
    if settings is not None and "json_keys" not in settings and data.json_keys != DataConfig.json_keys:
        raise UserError(f"--json-keys means nothing to {name}; leave it out")
    in_chat_format = settings is not None and "chat_template" in settings
    return EncoderConfig(
        data.tokenizer_name_or_path,
        name,
        data.json_keys,
        append_eod=not in_chat_format,  # answers in a chat format have their own end
        seq_length=data.seq_length,
        parse_special_tokens=data.parse_special_tokens,
        **{setting: getattr(data, setting) for setting in HANDLER_SETTINGS},
    )
