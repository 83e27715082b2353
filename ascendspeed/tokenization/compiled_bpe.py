"""Sentencepiece's BPE on the words between exact cuts (`text_cuts`), compiled by numba.

A word begins as its characters, and as the user-defined symbols that are found in it from left to right, the
longest first; these are joined with nothing. Of all neighbours that make a piece together, those with the
best score are joined, of equal scores the leftmost, until there are none. A character without a piece becomes
its bytes. `Model::SampleEncode` in sentencepiece's `bpe_model.cc` does the same with a queue, which pays for
texts of any length; a word is short. Every join looks in one hash table, by the hash of the characters of
both symbols.
"""

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba
import numpy as np

from ascendspeed.tokenization.text_cuts import UNUSED, USER_DEFINED

MAX_WORD = 128
"""Characters of the longest word that is encoded here: the time grows with the square of the length."""
BYTES, ELSEWHERE = -1, -2
"""In place of a character's id: it becomes its bytes; sentencepiece itself encodes words with it."""
FACTOR = np.uint64(0x9E3779B97F4A7C15)
"""Odd, of irregular bits: base of the hash of characters, and multiplier of the hash's last step."""
POWERS = np.cumprod(np.array([1] + MAX_WORD * [FACTOR], np.uint64))
"""Powers of `FACTOR`, modulo 2^64."""
PIECE_BITS = np.uint64(24)
"""Low bits of a slot: the number of the piece, from 1 on; above them, bits of the hash. 0: a free slot."""
PIECE_MASK = np.uint64((1 << 24) - 1)
RECENT = 1 << 15
"""Places for words of the same call, whose ids are copied when a word occurs again."""
MIN_RECENT = 3
"""Characters of a word that is worth a place."""
NONE = np.int32(0)
"""In place of the rank of a piece: two symbols make none."""

if numba.config.DISABLE_JIT:  # type: ignore[attr-defined]
    raise ImportError("NUMBA_DISABLE_JIT switches the compiler off")


class Compiled:
    """A function that is compiled at its first call.

    Its code is kept beside this file, or in the user's cache, where they can be written. Kept code that
    cannot be read is removed; where code cannot be kept, the function is compiled for this process.
    """

    def __init__(self, function: Callable) -> None:
        self._plain = function
        try:
            self._function = numba.njit(cache=True, nogil=True)(function)
            self._is_kept = True
        except RuntimeError:  # no place for the code
            self._function = numba.njit(nogil=True)(function)
            self._is_kept = False

    def __call__(self, *arguments: Any) -> Any:
        """Calls the function."""
        try:
            return self._function(*arguments)
        except Exception:  # reading damaged code may raise anything
            if not self._is_kept:
                raise
        self._remove_kept()
        self._function = numba.njit(nogil=True)(self._plain)
        return self._function(*arguments)

    def _remove_kept(self) -> None:
        """Removes the index of the code, without which the code is not read."""
        self._is_kept = False
        folder = Path(self._function.stats.cache_path or "")
        for index in folder.glob(f"*.{self._plain.__name__}-*.nbi"):
            with contextlib.suppress(OSError):
                index.unlink()


@Compiled
def fill_slots(slots, codes, begins):
    """Puts every piece into the hash table `slots`, uint64 [power of 2], open addressing with linear probing.

    `codes`: uint32, the characters of all pieces; `begins`: int32 [pieces + 1], their places there.
    """
    mask = np.uint64(len(slots) - 1)
    for piece in range(len(begins) - 1):
        length = begins[piece + 1] - begins[piece]
        if length == 0:
            continue
        hashed = np.uint64(0)
        for i in range(begins[piece], begins[piece + 1]):
            hashed = hashed * FACTOR + np.uint64(codes[i])
        mixed = (hashed ^ np.uint64(length)) * FACTOR
        key = mixed ^ (mixed >> np.uint64(32))
        slot = key & mask
        while slots[slot]:
            slot = (slot + np.uint64(1)) & mask
        slots[slot] = (key & ~PIECE_MASK) | np.uint64(piece + 1)


@Compiled
def word_ends(text, text_ends, rows, columns, is_cut):
    """Returns the ends of the words of texts, int64 [words]: every cut, and the end of every text."""
    ends = np.empty(len(text), np.int64)
    count, begin = 0, 0
    for end in text_ends:
        for i in range(begin, end - 1):
            ends[count] = i + 1
            count += is_cut[rows[text[i]] + columns[text[i + 1]]]
        if end > begin:
            ends[count] = end
            count += 1
        begin = end
    return ends[:count]


@Compiled
def encode_words(text, ends, slots, codes, begins, ranks, types, characters, begins_symbol, byte_ids):
    """Encodes words: `text` uint32 [characters], `ends` int64 [words], the end of each word in it.

    `slots`, `codes`, `begins`: see `fill_slots`; `ranks` int32 [pieces]: the higher, the better the score;
    `types` int8 [pieces]; `characters` int32 [code points]: the id of each, `BYTES` or `ELSEWHERE`;
    `begins_symbol` bool [code points]; `byte_ids` int32 [256].

    Returns ids int32 [ids] and int64 [words], the end of each word's ids, or -1 - this end for a word without
    ids, which sentencepiece itself must encode.

    The inner functions are no functions of their own, because each call would count references to all these
    arrays, which takes half of the time.
    """
    ids = np.empty(4 * len(text), np.int32)
    id_ends = np.empty(len(ends), np.int64)
    mask = np.uint64(len(slots) - 1)
    recent = np.full(RECENT, np.int32(-1))
    # Symbols of a word: id, first character, whether user-defined, hash of its characters; the piece that it
    # makes with the next symbol, and its rank.
    symbols = np.empty(MAX_WORD + 1, np.int32)
    firsts = np.empty(MAX_WORD + 1, np.int64)
    is_frozen = np.empty(MAX_WORD + 1, np.bool_)
    hashes = np.empty(MAX_WORD + 1, np.uint64)
    joined = np.empty(MAX_WORD + 1, np.int32)
    joined_ranks = np.empty(MAX_WORD + 1, np.int32)

    def find(begin, length, hashed):
        """Returns the piece that is text[begin : begin + length], -1 for none."""
        mixed = (hashed ^ np.uint64(length)) * FACTOR
        key = mixed ^ (mixed >> np.uint64(32))
        slot = key & mask
        found = np.int64(-1)
        while found < 0 and slots[slot]:
            if slots[slot] >> PIECE_BITS == key >> PIECE_BITS:
                piece = np.int64(slots[slot] & PIECE_MASK) - 1
                first = begins[piece]
                if begins[piece + 1] - first == length:
                    i = 0
                    while i < length and codes[first + i] == text[begin + i]:
                        i += 1
                    if i == length:
                        found = piece
            slot = (slot + np.uint64(1)) & mask
        return found

    def pair(k):
        """Finds the piece that symbol k makes with the next one."""
        joined_ranks[k] = NONE
        if not (is_frozen[k] or is_frozen[k + 1]):
            first, behind = firsts[k], firsts[k + 2]
            hashed = hashes[k] * POWERS[behind - firsts[k + 1]] + hashes[k + 1]
            piece = find(first, behind - first, hashed)
            if piece >= 0:
                joined[k] = piece
                joined_ranks[k] = ranks[piece]

    def split(begin, end):
        """Splits a word into its first symbols; returns their number."""
        count, i = 0, begin
        while i < end:
            code = text[i]
            hashes[count] = np.uint64(code)
            firsts[count], symbols[count], is_frozen[count] = i, characters[code], False
            length = np.int64(1)
            if begins_symbol[code]:
                hashed = np.uint64(0)
                for j in range(i, end):
                    hashed = hashed * FACTOR + np.uint64(text[j])
                    piece = find(i, j + 1 - i, hashed)
                    if piece >= 0 and types[piece] == USER_DEFINED:
                        symbols[count], is_frozen[count], length = piece, True, j + 1 - i
            i += length
            count += 1
        firsts[count] = end
        return count

    def join(count):
        """Joins symbols as long as two of them make a piece; returns how many are left."""
        for k in range(count - 1):
            pair(k)
        while True:
            best, best_rank = -1, NONE
            for k in range(count - 1):
                if joined_ranks[k] > best_rank:
                    best, best_rank = k, joined_ranks[k]
            if best < 0:
                break
            symbols[best] = joined[best]
            hashes[best] = hashes[best] * POWERS[firsts[best + 2] - firsts[best + 1]] + hashes[best + 1]
            count -= 1
            for k in range(best + 1, count):
                symbols[k], is_frozen[k], hashes[k] = symbols[k + 1], is_frozen[k + 1], hashes[k + 1]
                firsts[k], joined[k], joined_ranks[k] = firsts[k + 1], joined[k + 1], joined_ranks[k + 1]
            firsts[count] = firsts[count + 1]
            for k in range(max(best - 1, 0), min(best + 1, count - 1)):
                pair(k)
        return count

    def write_bytes(code, position):
        """Writes the ids of a character's UTF-8 bytes; returns the position behind them."""
        more = 0 if code < 0x80 else 1 if code < 0x800 else 2 if code < 0x10000 else 3
        lead = 0 if more == 0 else 0xC0 if more == 1 else 0xE0 if more == 2 else 0xF0
        ids[position] = byte_ids[lead | code >> 6 * more]
        for i in range(1, more + 1):
            ids[position + i] = byte_ids[0x80 | code >> 6 * (more - i) & 0x3F]
        return position + 1 + more

    def write(count, position):
        """Writes the ids of the symbols of a word; returns the position behind them, -1 for a word that
        sentencepiece itself must encode."""
        for k in range(count):
            symbol = symbols[k]
            if symbol == BYTES:
                position = write_bytes(np.int64(text[firsts[k]]), position)
            elif symbol == ELSEWHERE or (firsts[k + 1] - firsts[k] > 1 and types[symbol] == UNUSED):
                position = np.int64(-1)  # an unused piece is split into what it was joined from
                break
            else:
                ids[position] = symbol
                position += 1
        return position

    def place_of(begin, end):
        """Returns the place of a word among the recent ones."""
        hashed = np.uint64(end - begin)
        for i in range(begin, end):
            hashed = hashed * FACTOR + np.uint64(text[i])
        return (hashed ^ (hashed >> np.uint64(32))) & np.uint64(RECENT - 1)

    def copy_recent(word, begin, end, position):
        """Copies the ids of an earlier word if it is equal; returns the position behind them, -1 if not."""
        first = ends[word - 1] if word else np.int64(0)
        behind = np.int64(-1)
        if ends[word] - first == end - begin:
            i = 0
            while i < end - begin and text[first + i] == text[begin + i]:
                i += 1
            if i == end - begin:
                id_begin = id_ends[word - 1] if word else np.int64(0)
                behind = position
                for k in range(id_begin if id_begin >= 0 else -1 - id_begin, id_ends[word]):
                    ids[behind] = ids[k]
                    behind += 1
        return behind

    position, begin = np.int64(0), np.int64(0)
    for word in range(len(ends)):
        end, behind = ends[word], np.int64(-1)
        place = place_of(begin, end) if MIN_RECENT <= end - begin <= MAX_WORD else np.uint64(0)
        if place and recent[place] >= 0:
            behind = copy_recent(recent[place], begin, end, position)
        if behind < 0 and end - begin <= MAX_WORD:
            behind = write(join(split(begin, end)), position)
            if place and behind >= 0:
                recent[place] = word
        position = position if behind < 0 else behind
        id_ends[word] = -1 - position if behind < 0 else position
        begin = end
    return ids[:position].copy(), id_ends
