"""InternEvo's tokenized data: X.bin, one line of JSON per document, and X.bin.meta, the offsets of the lines.

A line is {"tokens": [...]}: a token t > 0 is supervised, t < 0 stands for the id -t without supervision, and
id 0 is never supervised, because InternEvo takes only labels above 0. X.bin.meta is a numpy array with a row
for every document: (offset of its line, tokens), and a third column from some tools. It is checked against
the lines before it is used.
"""

import functools
import json
import logging
import math
import os
from pathlib import Path
from typing import Any, NoReturn, Self

import numpy as np

from ascendspeed.config.schema import DataConfig
from ascendspeed.data.document import Document, Supervision, count_supervised
from ascendspeed.data.indexed.masked_pair import KEYS, MaskedPairWriter, pair_prefix
from ascendspeed.data.readers.discovery import file_kind, walk
from ascendspeed.data.source_record import SOURCE, refuse_other_source, source_digest
from ascendspeed.data.token_dataset import SampleSource, TokenDataset
from ascendspeed.utils.errors import UserError
from ascendspeed.utils.text import first_line

logger = logging.getLogger(__name__)

META = ".meta"
READ_HEADER = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}
"""Version of a .npy file -> parser of its header."""
CHECKED_LINES = 8
"""Lines of every file that are read when it is opened."""
DOCUMENTS_PER_WRITE = 1024
"""Documents that a conversion writes at once."""
CACHED_DOCUMENTS = 8
"""Documents read last; a long one continues in the next row."""


def find_files(path: str | Path) -> list[Path]:
    """Returns the .bin files that a path names: one, or all below a folder, sorted; empty if it holds no
    InternEvo data. Raises `UserError` for what cannot be reached, and a .meta without its .bin."""
    path = Path(path)
    kind = file_kind(path)
    if kind == "file":
        return [path] if path.suffix == ".bin" and Path(f"{path}{META}").is_file() else []
    below = list(walk(path)) if kind == "folder" else []
    files = [file for file in below if file.suffix == ".bin"]
    metas = [file for file in below if file.name.endswith(f".bin{META}")]
    if not metas:
        return []
    for file in (*files, *metas):
        file_kind(file)  # raises for a link that leads nowhere
    present = set(files)
    orphan = next((file for file in metas if file.with_suffix("") not in present), None)
    if orphan:
        raise UserError(f"{orphan}: there is no {orphan.stem} beside it; copy it, or remove {orphan.name}")
    return files


class InternEvoFile:
    """One .bin file and its .meta."""

    def __init__(self, path: Path, min_length: int, limit: int) -> None:
        """`limit`: ids must be below it. Raises `UserError` if the two files are damaged or do not belong
        together."""
        self.path = path
        self._limit = limit
        try:
            self._file = path.open("rb")
            self._size = os.fstat(self._file.fileno()).st_size
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror}") from error
        table = self._read_meta()
        self._offsets = table[:, 0]
        self._ends = np.append(table[1:, 0], self._size)
        self.lengths = table[:, self._length_column(table)]
        if (self.lengths < 0).any() or (self.lengths > (self._ends - self._offsets) // 2).any():
            self._raise_damaged("says that documents have more tokens than their lines could hold")
        self.documents = len(table)
        keep = self.lengths >= max(min_length, 1)
        self._offsets = self._offsets[keep]
        self._ends = self._ends[keep]
        self.lengths = self.lengths[keep]
        for number in _spread(len(self.lengths)):
            self.read(number)

    def read(self, number: int) -> np.ndarray:
        """Returns the stored tokens [n] int64 of a document, negative if unsupervised. Raises `UserError` if
        damaged."""
        offset = int(self._offsets[number])
        count = int(self.lengths[number])
        tokens = self._read_line(offset, int(self._ends[number]))
        if len(tokens) != count:
            self._raise_wrong_line(
                offset, f"the line has {len(tokens)} tokens and {self.path.name}{META} says {count}"
            )
        if tokens.min() <= -self._limit or tokens.max() >= self._limit:
            foreign = next(abs(token) for token in tokens.tolist() if abs(token) >= self._limit)
            self._raise_wrong_line(
                offset,
                f"token id {foreign}, but the vocabulary has {self._limit} ids; was another tokenizer used?",
            )
        return tokens

    def _read_meta(self) -> np.ndarray:
        meta = Path(f"{self.path}{META}")
        if not meta.is_file():
            raise UserError(
                f"{self.path}: there is no {meta.name} beside it; InternEvo's tools write it last"
            )
        table = _read_array(meta)
        if table.ndim != 2 or table.shape[1] not in (2, 3) or table.dtype.kind not in "iu" or not len(table):
            raise UserError(
                f"{meta} is {table.dtype} {list(table.shape)}, not integers of the shape [documents, 2 or 3]"
            )
        table = table.astype(np.int64)
        offsets = table[:, 0]
        if offsets[0] < 0 or (offsets[1:] <= offsets[:-1]).any() or offsets[-1] >= self._size:
            self._raise_damaged(f"has offsets that do not ascend within the {self._size} bytes of the file")
        return table

    def _length_column(self, table: np.ndarray) -> int:
        """Finds the column of the lengths, second or last, by reading a few lines."""
        counts = {}
        for number in _spread(len(table)):
            counts[number] = len(self._read_line(int(self._offsets[number]), int(self._ends[number])))
        for column in range(1, table.shape[1]):
            if all(table[number, column] == count for number, count in counts.items()):
                return column
        number, count = next((n, count) for n, count in counts.items() if table[n, 1] != count)
        difference = f"the line has {count} tokens and {self.path.name}{META} says {table[number, 1]}"
        self._raise_wrong_line(
            int(self._offsets[number]), f"{difference}; was only one of the two files written again?"
        )

    def _read_line(self, offset: int, end: int) -> np.ndarray:
        first = max(offset - 1, 0)  # the byte before must end a line
        try:
            content = os.pread(self._file.fileno(), end - first, first)
        except OSError as error:
            raise UserError(f"{self.path}, byte {offset}: cannot be read: {error.strerror}") from error
        byte_before = content[: offset - first]
        line = content[offset - first :].partition(b"\n")[0]
        if byte_before not in (b"", b"\n"):
            self._raise_wrong_line(
                offset,
                f"no line begins here, though {self.path.name}{META} says so; "
                "was only one of the two files written again?",
            )
        try:
            tokens = np.array(json.loads(line)["tokens"])
        except (ValueError, TypeError, KeyError, RecursionError, OverflowError) as error:
            self._raise_wrong_line(offset, f'not a line {{"tokens": [...]}}: {error!r}')
        if tokens.ndim != 1 or (len(tokens) and tokens.dtype.kind != "i"):
            self._raise_wrong_line(offset, "its tokens are not a list of integers")
        return tokens

    def _raise_damaged(self, reason: str) -> NoReturn:
        raise UserError(f"{self.path}{META} {reason}; write it again, it does not belong to {self.path.name}")

    def _raise_wrong_line(self, offset: int, reason: str) -> NoReturn:
        raise UserError(f"{self.path}, byte {offset}: {reason}")


def _read_array(path: Path) -> np.ndarray:
    """Reads a .npy file. Raises `UserError` if it is none, or has another size than its header states; memory
    is allocated only for what the file holds."""
    try:
        with path.open("rb") as file:
            version = np.lib.format.read_magic(file)
            shape, _, dtype = READ_HEADER[version](file)
            content = path.stat().st_size - file.tell()
            if dtype.hasobject:
                raise ValueError("it holds pickled objects, which could run code")
            if content != math.prod(shape) * dtype.itemsize or min(shape, default=0) < 0:
                raise ValueError(f"{content} bytes follow a header for {dtype} {list(shape)}")
            file.seek(0)
            return np.load(file, allow_pickle=False)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    except Exception as error:  # numpy parses the header as Python source, which can fail in many ways
        raise UserError(
            f"{path} is not a numpy array: {first_line(error)}; write it again with InternEvo's tools"
        ) from error


def _spread(count: int) -> list[int]:
    """Returns a few numbers below `count`, the first and the last among them."""
    return sorted({int(number) for number in np.linspace(0, count - 1, min(count, CHECKED_LINES))})


class InternEvoDataset(TokenDataset):
    """All documents below one path, file by file: `Documents` and a `TokenDataset`."""

    description = "InternEvo's data"
    flags = ("min_length", "max_segment_length")
    has_loss_mask = True

    def __init__(self, path: str, min_length: int = 0, limit: int = 1 << 31) -> None:
        """`min_length`: shorter documents are left out; `limit`: ids must be below it. Raises `UserError` if
        damaged."""
        self.prefix = path
        self._files = [InternEvoFile(file, min_length, limit) for file in find_files(path)]
        self.lengths = np.concatenate([file.lengths for file in self._files])
        self.file_bounds = np.cumsum([0, *(len(file.lengths) for file in self._files)])
        self.left_out = sum(file.documents for file in self._files) - len(self.lengths)
        if not len(self.lengths):
            raise UserError(
                f"{path}: none of its {self.left_out} documents has {max(min_length, 1)} tokens; lower "
                "--min-length"
            )
        self._cached_document = functools.lru_cache(CACHED_DOCUMENTS)(self._read_document)

    @classmethod
    def match(cls, path: str) -> bool:
        return bool(find_files(path))

    @classmethod
    def open(cls, path: str, data: DataConfig, vocab_size: int) -> Self:
        dataset = cls(path, data.min_length, vocab_size)
        logger.info(dataset.note)
        return dataset

    @classmethod
    def files(cls, path: str) -> list[Path]:
        return [part for file in find_files(path) for part in (file, Path(f"{file}{META}"))]

    def samples(self, split: str, data: DataConfig, seed: int) -> SampleSource:
        from ascendspeed.data.packing.internevo import InternEvoCut  # conversion needs no torch
        from ascendspeed.data.packing.packed_dataset import packed_samples

        return packed_samples(self, split, data, seed, InternEvoCut)

    @property
    def note(self) -> str:
        """One log line: files and documents."""
        short = f", {self.left_out:,} shorter ones left out" if self.left_out else ""
        return f"{self.prefix}: {len(self._files):,} InternEvo files, {len(self.lengths):,} documents{short}"

    def document(self, number: int) -> Document:
        """Returns a document. Raises `UserError` with file and byte if its line is damaged."""
        return self._cached_document(number)

    def supervision(self, numbers: np.ndarray, length: int) -> Supervision:
        """Counts as in `Documents`, but does not read the lines of documents that fit."""
        lengths = self.lengths[numbers]
        tokens = np.maximum(lengths - 1, 0)
        lost, cut = np.zeros((2, len(numbers)), np.int64)
        for index in np.flatnonzero(lengths > length):
            mask = self._read_document(int(numbers[index])).loss_mask
            assert mask is not None
            document = count_supervised(mask, lengths[index : index + 1], length)
            tokens[index] = document.tokens[0]
            lost[index] = document.lost_answers[0]
            cut[index] = document.cut_answers[0]
        return Supervision(tokens, lost, cut, exact=False)

    def _read_document(self, number: int) -> Document:
        which = int(np.searchsorted(self.file_bounds, number, side="right")) - 1
        tokens = self._files[which].read(number - int(self.file_bounds[which]))
        return Document(np.abs(tokens).astype(np.int32), tokens > 0)

    def __len__(self) -> int:
        return len(self.lengths)


def convert(path: str, prefix: str, min_length: int = 0, overwrite: bool = False) -> dict[str, Any]:
    """Writes the documents of a path as a masked pair (`masked_pair`), in their order; returns the content of
    P.meta.

    Every line is read. `overwrite`: replace data of the prefix that are made from others. Raises `UserError`
    for damaged data, and then leaves old files as they are.
    """
    files = InternEvoDataset.files(path)
    if not files:
        raise UserError(f"{path}: neither a .bin with its .bin{META} nor a folder with such files")
    dataset = InternEvoDataset(path, min_length)
    logger.info(dataset.note)
    source = source_digest(files, ["InternEvo", min_length])
    if not overwrite:
        refuse_other_source([pair_prefix(prefix, key) for key in KEYS], source)
    with MaskedPairWriter(prefix) as writer:
        max_token = 0
        for start in range(0, len(dataset), DOCUMENTS_PER_WRITE):
            stop = min(start + DOCUMENTS_PER_WRITE, len(dataset))
            documents = [dataset.document(number) for number in range(start, stop)]
            tokens = np.concatenate([document.tokens for document in documents])
            supervised = np.concatenate([document.loss_mask for document in documents])
            writer.add(tokens, dataset.lengths[start:stop].astype(np.int32), supervised)
            max_token = max(max_token, int(tokens.max()))
        facts = {
            "documents": writer.documents,
            "tokens": writer.tokens,
            "max_token": max_token,
            "left_out": dataset.left_out,
            SOURCE: source,
        }
        writer.commit(facts)
    logger.info(
        f"{writer.prefix}: {writer.documents:,} documents, {writer.tokens:,} tokens, "
        f"{writer.supervised:,} of them supervised"
    )
    return facts
