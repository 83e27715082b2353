"""Sentencepiece's own ids, several times as fast for much text: text is cut where no id extends across
(`text_cuts`), and the words between the cuts are encoded by compiled code (`compiled_bpe`)."""

import importlib.util
import logging
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ascendspeed.tokenization.text_cuts import NoExactCutsError, read_model

if TYPE_CHECKING:
    from ascendspeed.tokenization.word_encoder import WordEncoder

logger = logging.getLogger(__name__)

NO_DUMMY_PREFIX = bytes([0x1A, 2, 0x18, 0])
"""End of a serialized sentencepiece model that sets `normalizer_spec.add_dummy_prefix` to false."""
MIN_CHARACTERS = 1 << 22
"""Text of a process after which words are encoded by compiled code: until then it would not pay for its
import and tables (1 s; 10 s where it is compiled for the first time)."""
SMALL_BATCH = 1 << 10
"""Characters of a batch that sentencepiece encodes in less time than a pass takes to begin."""
BLOCK = 1 << 18
"""Characters of one pass."""


class SentencePieceEncoder:
    """Encodes texts as sentencepiece does; models without exact cuts by sentencepiece alone."""

    def __init__(self, model: Any, continuation: Any, data: bytes, path: Path) -> None:
        """`model`: the `SentencePieceProcessor` of `data`, the content of `path`; `continuation`: the one for
        text behind an added token, perhaps without the dummy prefix."""
        self._model, self._continuation = model, continuation
        self._data, self._path = data, path
        self._words: WordEncoder | None = None
        self._has_dummy_prefix = False
        self._characters = 0
        self._is_prepared, self._is_logged = False, False
        self._lock = threading.Lock()

    def encode(self, texts: Sequence[str], continued: bool = False) -> list[np.ndarray]:
        """Returns ids [n] int32 of each text. `continued`: they follow an added token."""
        size = sum(map(len, texts))
        self._characters += size
        model = self._continuation if continued else self._model
        if self._characters >= MIN_CHARACTERS:
            self.prepare()
        words = self._words
        if words is None or size < SMALL_BATCH:
            return _encode_all(texts, model)
        if self._has_dummy_prefix and model is self._model:
            texts = [f" {text}" if text else "" for text in texts]
        try:
            return [ids for block in _blocks(texts) for ids in words.encode(block)]
        except UnicodeEncodeError:  # a lone surrogate: sentencepiece's own error
            return _encode_all(texts, model)

    def log_slowness(self) -> None:
        """Logs why much text is encoded by sentencepiece alone, if it is."""
        try:
            read_model(self._data)
        except NoExactCutsError as error:
            self._log(error)
        if not importlib.util.find_spec("numba"):
            self._log("numba is not installed")

    def _log(self, reason: Exception | str) -> None:
        if not self._is_logged:
            logger.info(f"note: {self._path}: sentencepiece encodes every text itself, because {reason}")
        self._is_logged = True

    def prepare(self) -> None:
        """Builds the tables, once, and logs why there are none; another thread does not wait for them."""
        if self._is_prepared or not self._lock.acquire(blocking=False):
            return
        try:
            self._words = self._word_encoder()
        except (NoExactCutsError, ImportError, OSError) as error:  # numba, or the folder for its code
            self._log(error)
        finally:
            self._is_prepared = True
            self._lock.release()

    def _word_encoder(self) -> "WordEncoder":
        from ascendspeed.tokenization.word_encoder import WordEncoder

        proto = read_model(self._data)
        self._has_dummy_prefix = proto.normalizer_spec.add_dummy_prefix
        model = self._model
        if self._has_dummy_prefix:
            from sentencepiece import SentencePieceProcessor

            model = SentencePieceProcessor(model_proto=self._data + NO_DUMMY_PREFIX)
        return WordEncoder(proto, model)


def _encode_all(texts: Sequence[str], model: Any) -> list[np.ndarray]:
    return model.encode_as_numpy(list(texts), num_threads=1)


def _blocks(texts: Sequence[str]) -> Iterator[list[str]]:
    """Yields texts in groups of about `BLOCK` characters."""
    block: list[str] = []
    size = 0
    for text in texts:
        block.append(text)
        size += len(text)
        if size >= BLOCK:
            yield block
            block, size = [], 0
    if block:
        yield block
