"""InternEvo's tokenized data: X.bin, a line of JSON for every document, and X.bin.meta, where the lines lie.

A line is {"tokens": [...]}: token t > 0 is read and learnt, t < 0 is read as -t and not learnt, and id 0 is never learnt, as
InternEvo takes for a label only what is above 0. X.bin.meta is an array of numpy's, a row for every document: (offset of its line,
tokens), and from some tools a third column. Nothing of it is believed before the line itself was read.
"""

import functools
import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from ascendspeed.data.document import Document, Supervision, count_supervised
from ascendspeed.data.indexed.masked_pair import MaskedPairWriter
from ascendspeed.utils.errors import UserError

logger = logging.getLogger(__name__)

META = ".meta"
CHECKED_LINES = 8
"""Lines of every file that are read when it is opened."""
DOCUMENTS_PER_WRITE = 1024
"""Documents that a conversion writes at once."""
CACHED_DOCUMENTS = 8
"""Documents that were read last; a long one goes on in the next row."""


def find_files(path: str | Path) -> list[Path]:
    """The .bin files that a path means: one, or all below a folder, sorted; none where it holds no such data."""
    path = Path(path)
    if path.is_file():
        return [path] if path.suffix == ".bin" and Path(f"{path}{META}").is_file() else []
    found = [one for one in _below(path) if one.suffix == ".bin"] if path.is_dir() else []
    return found if any(Path(f"{one}{META}").is_file() for one in found) else []


def _below(folder: Path) -> Iterator[Path]:
    """Files, through links too, folder by folder."""
    seen = set()
    for root, folders, files in os.walk(folder, followlinks=True):
        if (real := os.path.realpath(root)) in seen:
            folders.clear()
            continue
        seen.add(real)
        folders.sort()
        yield from (Path(root, name) for name in sorted(files))


class InternEvoFile:
    """One .bin and its .meta."""

    def __init__(self, path: Path, min_length: int, limit: int) -> None:
        """`limit`: ids must be below. Raises `UserError` when the two are damaged or do not belong together."""
        self.path, self._limit = path, limit
        try:
            self._file = path.open("rb")
            self._size = os.fstat(self._file.fileno()).st_size
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror}") from error
        table = self._table()
        self._offsets, self._ends = table[:, 0], np.append(table[1:, 0], self._size)
        self.lengths = table[:, self._column(table)]
        if (self.lengths < 0).any() or (2 * self.lengths > self._ends - self._offsets).any():
            self._damaged("says that documents have more tokens than their lines could hold")
        self.documents = len(table)
        keep = self.lengths >= max(min_length, 1)
        self._offsets, self._ends, self.lengths = self._offsets[keep], self._ends[keep], self.lengths[keep]
        for number in _spread(len(self.lengths)):
            self.read(number)

    def read(self, number: int) -> np.ndarray:
        """Tokens [n] int64 of a document as they were written, negative where they are not to be learnt. Raises `UserError`."""
        offset, end, count = int(self._offsets[number]), int(self._ends[number]), int(self.lengths[number])
        tokens = self._tokens(offset, end)
        if len(tokens) != count:
            self._wrong(offset, f"the line has {len(tokens)} tokens and {self.path.name}{META} says {count}")
        if tokens.min() <= -self._limit or tokens.max() >= self._limit:
            foreign = next(abs(token) for token in tokens.tolist() if abs(token) >= self._limit)
            self._wrong(
                offset,
                f"token id {foreign}, but the vocabulary has {self._limit} ids; was another tokenizer used?",
            )
        return tokens

    def _table(self) -> np.ndarray:
        meta = Path(f"{self.path}{META}")
        if not meta.is_file():
            raise UserError(
                f"{self.path}: there is no {meta.name} beside it; InternEvo's tools write it last"
            )
        try:
            table = np.load(meta, allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise UserError(f"{meta} is not an array of numpy's: {error}") from error
        if table.ndim != 2 or table.shape[1] not in (2, 3) or table.dtype.kind not in "iu" or not len(table):
            raise UserError(
                f"{meta} is {table.dtype} {list(table.shape)}, not whole numbers [documents, 2 or 3]"
            )
        table = table.astype(np.int64)
        offsets = table[:, 0]
        if offsets[0] < 0 or (np.diff(offsets) <= 0).any() or offsets[-1] >= self._size:
            self._damaged(f"has offsets that do not ascend within the {self._size} bytes of the file")
        return table

    def _column(self, table: np.ndarray) -> int:
        """Where the lengths stand, told by the lines: second or last."""
        looked = [
            (number, len(self._tokens(int(self._offsets[number]), int(self._ends[number]))))
            for number in _spread(len(table))
        ]
        for column in range(1, table.shape[1]):
            if all(table[number, column] == count for number, count in looked):
                return column
        number, count = next(one for one in looked if table[one[0], 1] != one[1])
        said = f"the line has {count} tokens and {self.path.name}{META} says {table[number, 1]}"
        self._wrong(int(self._offsets[number]), f"{said}; was one of the two made anew?")

    def _tokens(self, offset: int, end: int) -> np.ndarray:
        before = max(offset - 1, 0)
        try:
            read = os.pread(self._file.fileno(), end - before, before)
        except OSError as error:
            raise UserError(f"{self.path}, byte {offset}: cannot be read: {error.strerror}") from error
        head, line = read[: offset - before], read[offset - before :].partition(b"\n")[0]
        if head not in (b"", b"\n"):
            self._wrong(
                offset,
                f"no line begins here, though {self.path.name}{META} says so; was one of the two made anew?",
            )
        try:
            said = json.loads(line)
            tokens = np.array(said["tokens"])
        except (ValueError, TypeError, KeyError, RecursionError, OverflowError) as error:
            self._wrong(offset, f'not a line {{"tokens": [...]}}: {error!r}')
        if tokens.ndim != 1 or (len(tokens) and tokens.dtype.kind != "i"):
            self._wrong(offset, "its tokens are not a list of whole numbers")
        return tokens

    def _damaged(self, what: str) -> NoReturn:
        raise UserError(
            f"{self.path}{META} {what}; make it anew, it does not belong to {self.path.name} as it is"
        )

    def _wrong(self, offset: int, what: str) -> NoReturn:
        raise UserError(f"{self.path}, byte {offset}: {what}")


def _spread(count: int) -> list[int]:
    """A few numbers below `count`, first and last among them."""
    return sorted({int(number) for number in np.linspace(0, count - 1, min(count, CHECKED_LINES))})


class InternEvoDataset:
    """All documents of one path, file by file: `Documents`."""

    def __init__(self, path: str, min_length: int = 0, limit: int = 1 << 31) -> None:
        """`min_length`: shorter documents are left out; `limit`: ids must be below. Raises `UserError` for damaged data."""
        self.prefix = path
        self._files = [InternEvoFile(one, min_length, limit) for one in find_files(path)]
        self.lengths = np.concatenate([file.lengths for file in self._files])
        self.files = np.cumsum([0, *(len(file.lengths) for file in self._files)])
        self.left_out = sum(file.documents for file in self._files) - len(self.lengths)
        if not len(self.lengths):
            raise UserError(
                f"{path}: none of its {self.left_out} documents has {max(min_length, 1)} tokens; lower --min-length"
            )
        self._read = functools.lru_cache(CACHED_DOCUMENTS)(self._document)

    @property
    def note(self) -> str:
        """One line for a person."""
        short = f", {self.left_out:,} shorter ones left out" if self.left_out else ""
        return f"{self.prefix}: {len(self._files):,} files of InternEvo's, {len(self.lengths):,} documents{short}"

    def document(self, number: int) -> Document:
        """Raises `UserError` with file and byte when its line is damaged."""
        return self._read(number)

    def learnt(self, numbers: np.ndarray, length: int) -> Supervision:
        """As `Documents` says, but the lines of documents that are taken whole are not read."""
        lengths = self.lengths[numbers]
        tokens, (lost, cut) = np.maximum(lengths - 1, 0), np.zeros((2, len(numbers)), np.int64)
        for place in np.flatnonzero(lengths > length):
            mask = self._document(int(numbers[place])).loss_mask
            found = count_supervised(mask, lengths[place : place + 1], length)  # type: ignore[arg-type]
            tokens[place], lost[place], cut[place] = found.tokens[0], found.lost[0], found.cut[0]
        return Supervision(tokens, lost, cut, exact=False)

    def _document(self, number: int) -> Document:
        which = int(np.searchsorted(self.files, number, side="right")) - 1
        tokens = self._files[which].read(number - int(self.files[which]))
        return Document(np.abs(tokens).astype(np.int32), tokens > 0)

    def __len__(self) -> int:
        return len(self.lengths)


def convert(path: str, prefix: str, min_length: int = 0) -> dict[str, Any]:
    """The documents of a path as a couple of .bin/.idx pairs (`couple`), in their order; returns what P.meta says.

    Every line is read. Raises `UserError` for damaged data, and leaves old files as they are then.
    """
    if not find_files(path):
        raise UserError(f"{path}: neither a .bin with its .bin{META} nor a folder with such files")
    found = InternEvoDataset(path, min_length)
    logger.info(found.note)
    with MaskedPairWriter(prefix) as writer:
        highest = 0
        for start in range(0, len(found), DOCUMENTS_PER_WRITE):
            held = [
                found.document(number)
                for number in range(start, min(start + DOCUMENTS_PER_WRITE, len(found)))
            ]
            tokens, learnt = (
                np.concatenate(column)
                for column in zip(*((one.tokens, one.loss_mask) for one in held), strict=True)
            )
            writer.add(tokens, found.lengths[start : start + DOCUMENTS_PER_WRITE].astype(np.int32), learnt)
            highest = max(highest, int(tokens.max()))
        facts = {
            "documents": writer.documents,
            "tokens": writer.tokens,
            "max_token": highest,
            "left_out": found.left_out,
        }
        writer.commit(facts)
    logger.info(
        f"{writer.prefix}: {writer.documents:,} documents, {writer.tokens:,} tokens, {writer.learnt:,} of them to be learnt"
    )
    return facts
