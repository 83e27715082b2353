"""Sentencepiece's own ids, several times as fast: text is cut where no id extends across (`text_cuts`), and
the ids of the words between the cuts are kept (`word_cache`), per process and from batch to batch."""

import logging
import threading
import time
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from ascendspeed.tokenization.text_cuts import NoExactCutsError, TextCuts
from ascendspeed.tokenization.word_cache import WordCache

NO_DUMMY_PREFIX = bytes([0x1A, 2, 0x18, 0])
"""End of a serialized sentencepiece model that sets `normalizer_spec.add_dummy_prefix` to false."""
logger = logging.getLogger(__name__)

MIN_CHARACTERS = 1 << 18
"""Text of a process after which the cache begins: until then it would not pay for its tables (0.1 s)."""
SMALL_BATCH = 1 << 10
"""Characters of a batch that sentencepiece encodes in less time than a pass takes to begin."""
BLOCK = 1 << 16
"""Characters of one pass: its arrays stay in the processor's cache."""
WORDS = 1 << 14
"""Words of one pass."""
WARM_UP = 1 << 20
"""Characters that fill the cache before it is judged."""
PROBE_SHARE = 1 / 50
"""Share of the time that is spent on trying the slower way again."""


class Pace:
    """Chooses the faster one of two ways by their measured CPU seconds per character, `plain` and
    `cached`."""

    def __init__(self) -> None:
        self._cost: dict[bool, float] = {}
        self._warm_up = WARM_UP
        self._since_probe = 0.0

    def uses_cache(self, characters: int) -> bool:
        """Returns whether to encode the next `characters` through the cache."""
        if self._warm_up > 0:
            return True
        if False not in self._cost:
            return False
        cached = self._cost[True] <= self._cost[False]
        if self._since_probe * PROBE_SHARE > self._cost[not cached] * characters:
            self._since_probe = 0
            return not cached
        return cached

    def record(self, cached: bool, seconds: float, characters: int) -> None:
        """Updates the cost of a way by a run of it."""
        cost = seconds / characters
        self._cost[cached] = cost if cached not in self._cost else (self._cost[cached] + cost) / 2
        self._warm_up -= characters
        self._since_probe += seconds


class CachedEncoder:
    """Encodes texts as sentencepiece does; models without exact cuts by sentencepiece alone."""

    def __init__(self, model: Any, continuation: Any, data: bytes, path: Path) -> None:
        """`model`: the `SentencePieceProcessor` of `data`, the content of `path`; `continuation`: the one for
        text behind an added token, perhaps without the dummy prefix."""
        self._model, self._continuation = model, continuation
        self._data, self._path = data, path
        self._words: WordCache | None = None
        self._pace = Pace()
        self._characters = 0
        self._is_prepared = False
        self._lock = threading.Lock()

    def encode(self, texts: Sequence[str], continued: bool = False) -> list[np.ndarray]:
        """Returns ids [n] int32 of each text. `continued`: they follow an added token."""
        size = sum(map(len, texts))
        self._characters += size
        model = self._continuation if continued else self._model
        # A thread that comes while another one uses the cache does not wait for it.
        if size < SMALL_BATCH or self._characters < MIN_CHARACTERS or not self._lock.acquire(blocking=False):
            return _encode_anew(texts, model)
        try:
            self.prepare()
            if self._words is None:
                return _encode_anew(texts, model)
            return [ids for block in _blocks(texts) for ids in self._encode_block(block, model, self._words)]
        finally:
            self._lock.release()

    def prepare(self) -> None:
        """Builds the tables, once; logs why there are none."""
        if self._is_prepared:
            return
        self._is_prepared = True
        try:
            cuts = TextCuts(self._data)
            model = self._model
            if cuts.has_dummy_prefix:
                from sentencepiece import SentencePieceProcessor

                model = SentencePieceProcessor(model_proto=self._data + NO_DUMMY_PREFIX)
            self._words = WordCache(model, cuts)
        except NoExactCutsError as error:
            logger.info(f"note: {self._path}: sentencepiece encodes every text anew, because {error}")
        self._data = b""

    def _encode_block(self, texts: Sequence[str], model: Any, words: WordCache) -> list[np.ndarray]:
        """Encodes texts in the faster way."""
        characters = sum(map(len, texts))
        cached = self._pace.uses_cache(characters)
        began = time.process_time()
        try:
            ids = self._encode_words(texts, model, words) if cached else _encode_anew(texts, model)
        except UnicodeEncodeError:  # a lone surrogate: sentencepiece's own error
            ids = _encode_anew(texts, model)
        self._pace.record(cached, time.process_time() - began, max(characters, 1))
        return ids

    def _encode_words(self, texts: Sequence[str], model: Any, words: WordCache) -> list[np.ndarray]:
        if words.cuts.has_dummy_prefix and model is self._model:
            texts = [f" {text}" if text else "" for text in texts]
        return _encode_words(texts, words)


def _encode_anew(texts: Sequence[str], model: Any) -> list[np.ndarray]:
    return model.encode_as_numpy(list(texts), num_threads=1)


def _encode_words(texts: Sequence[str], words: WordCache) -> list[np.ndarray]:
    """Encodes texts by their words."""
    text_edges = np.cumsum([0, *map(len, texts)])
    text = "".join(texts)
    cuts = [words.cuts.find(text[i : i + BLOCK + 1]) for i in range(0, len(text), BLOCK)]
    is_edge = np.concatenate([[True], *cuts, [True]])
    is_edge[text_edges] = True
    edges = np.flatnonzero(is_edge)
    ids, counts = [], [np.zeros(1, np.int32)]
    for first in range(0, len(edges) - 1, WORDS):
        ends = edges[first + 1 : first + 1 + WORDS]
        begin = edges[first]
        word_ids, word_counts = words.encode(text[begin : ends[-1]], ends - begin)
        ids.append(word_ids)
        counts.append(word_counts)
    id_edges = np.cumsum(np.concatenate(counts))[np.searchsorted(edges, text_edges)].tolist()
    joined = np.concatenate(ids)
    return [joined[begin:end].copy() for begin, end in pairwise(id_edges)]


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
