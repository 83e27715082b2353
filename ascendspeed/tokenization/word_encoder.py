"""Encoding of texts by their words: exact cuts, and a compiled BPE between them."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from ascendspeed.tokenization import compiled_bpe
from ascendspeed.tokenization.text_cuts import (
    BYTE,
    CODES,
    IN_TEXT,
    NORMAL,
    SPACE,
    USER_DEFINED,
    TextCuts,
)


class WordEncoder:
    """Encodes texts with sentencepiece's ids, without its dummy prefix; several threads may share it."""

    def __init__(self, proto: Any, model: Any) -> None:
        """`proto`: the result of `read_model`; `model`: its `SentencePieceProcessor` without dummy prefix,
        for words that are not encoded here. Raises `NoExactCutsError`."""
        self._model = model
        self.escapes_spaces: bool = proto.normalizer_spec.escape_whitespaces
        rows = [(piece.piece, piece.type, piece.score) for piece in proto.pieces]
        pieces, kinds, scores = zip(*rows, strict=True)
        types = np.array(kinds, np.int8)
        in_text = [
            piece if is_found else ""
            for piece, is_found in zip(pieces, np.isin(types, IN_TEXT).tolist(), strict=True)
        ]
        lengths = np.fromiter(map(len, in_text), np.int32, len(in_text))
        cuts = TextCuts([in_text[i] for i in np.flatnonzero(lengths).tolist()])
        self._cuts = cuts.rows, cuts.columns, cuts.is_cut
        begins = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
        codes = np.frombuffer("".join(in_text).encode("utf-32-le"), np.uint32)
        slots = np.zeros(1 << (2 * len(pieces)).bit_length(), np.uint64)
        compiled_bpe.fill_slots(slots, codes, begins)
        self._vocabulary = (
            *(slots, codes, begins, _ranks(scores), types),
            *_characters(pieces, types),
        )
        self.encode(["a"])  # compiles, or reads what was compiled before

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Returns ids [n] int32 of each text. Raises `UnicodeEncodeError` for a lone surrogate."""
        text = "".join(texts)
        if self.escapes_spaces:
            text = text.replace(" ", SPACE)
        codes = np.frombuffer(text.encode("utf-32-le"), np.uint32)
        text_ends = np.cumsum([*map(len, texts)], dtype=np.int64)
        ends = compiled_bpe.word_ends(codes, text_ends, *self._cuts)
        ids, id_ends = compiled_bpe.encode_words(codes, ends, *self._vocabulary)
        if len(others := np.flatnonzero(id_ends < 0)):
            ids, id_ends = self._insert(text, ends, others, ids, id_ends)
        words = np.searchsorted(ends, text_ends, "right")
        edges = np.concatenate([[0], id_ends])[[0, *words]].tolist()
        return [ids[begin:end].copy() for begin, end in pairwise(edges)]

    def _insert(
        self, text: str, ends: np.ndarray, others: np.ndarray, ids: np.ndarray, id_ends: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Inserts the ids of words that sentencepiece itself must encode; returns all ids and the end of each
        word's."""
        id_ends[others] = -1 - id_ends[others]
        begins = np.where(others, ends[others - 1], 0)
        words = [text[b:e] for b, e in zip(begins.tolist(), ends[others].tolist(), strict=True)]
        unique = list(dict.fromkeys(words))
        encoded = dict(zip(unique, self._model.encode_as_numpy(unique, num_threads=1), strict=True))
        of_words = [encoded[word] for word in words]
        counts = np.array([len(word_ids) for word_ids in of_words])
        ids = np.insert(ids, np.repeat(id_ends[others], counts), np.concatenate(of_words))
        added = np.zeros(len(ends), np.int64)
        added[others] = counts
        return ids, id_ends + np.cumsum(added)


def _ranks(scores: Sequence[float]) -> np.ndarray:
    """Returns the rank of each score, from 1 on, in sentencepiece's order, which is that of the floats' bits:
    -0 comes before 0, and NaN has a place."""
    bits = np.array(scores, np.float32).view(np.int32)
    _, places = np.unique(np.where(bits < 0, bits ^ 0x7FFFFFFF, bits), return_inverse=True)
    return (places + 1).astype(np.int32)


def _characters(pieces: Sequence[str], types: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns the id of each character (or what stands for it), whether a user-defined symbol begins with it,
    and the id of each byte."""
    characters = np.full(CODES, compiled_bpe.BYTES, np.int32)
    begins_symbol = np.zeros(CODES, np.bool_)
    byte_ids = np.zeros(256, np.int32)
    lengths = np.fromiter(map(len, pieces), np.int32, len(pieces))
    for number in np.flatnonzero(lengths == 1).tolist():
        is_encoded = types[number] in (NORMAL, USER_DEFINED)
        characters[ord(pieces[number])] = number if is_encoded else compiled_bpe.ELSEWHERE
    characters[0] = compiled_bpe.ELSEWHERE  # sentencepiece treats a piece of it as unused
    for number in np.flatnonzero(types == USER_DEFINED).tolist():
        begins_symbol[ord(pieces[number][0])] = True
    for number in np.flatnonzero(types == BYTE).tolist():
        byte_ids[int(pieces[number][3:5], 16)] = number  # <0x41>
    return characters, begins_symbol, byte_ids
