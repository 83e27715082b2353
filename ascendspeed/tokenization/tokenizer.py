"""Tokenizers of a Hugging Face directory: `tokenizer.model` (sentencepiece) and `tokenizer.json`; no remote
code runs.

`tokenizer.model` has priority: the model was trained with it, while a `tokenizer.json` beside it is a
conversion. Added tokens that are not special are found in text, as in transformers. Text never becomes a
special token: a literal `<s>` is encoded as the characters `<`, `s`, `>`, unless the caller chooses to parse
special tokens. Callers insert control tokens by id (`bos`, `eos`, `required_id`).
"""

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from ascendspeed.tokenization.added_tokens import AddedToken, AddedTokenSplitter
from ascendspeed.tokenization.declared_tokens import (
    DeclaredToken,
    declared_tokens,
    token_text,
)
from ascendspeed.tokenization.sentencepiece_encoder import NO_DUMMY_PREFIX, SentencePieceEncoder
from ascendspeed.utils.errors import UserError
from ascendspeed.utils.safe_io import checked_file
from ascendspeed.utils.text import first_line


class Tokenizer(ABC):
    """Encodes and decodes text; knows the ids of the control tokens that the directory's JSON files name."""

    base_vocab_size: int
    """Number of entries of the vocabulary file, without added tokens."""
    vocab_size: int
    """Number of ids with added tokens; the model's embedding may have more rows."""
    bos: int | None
    """Id that begins a text; None if the tokenizer has none."""
    eos: int | None
    """Id that ends a document."""
    pad: int | None
    """Id that fills a batch; `eos` if the files name none."""
    parses_special_tokens: bool
    """True if special tokens are found in text too."""

    def __init__(self, path: Path, size: int, parses_special_tokens: bool) -> None:
        """`size`: `base_vocab_size`."""
        self.path, self.base_vocab_size, self.parses_special_tokens = path, size, parses_special_tokens
        settings, tokens = declared_tokens(path)
        self._settings = settings
        self._added = {text: token.number for text, token in tokens.items() if token.number is not None}
        self._special = {number for text, number in self._added.items() if tokens[text].special}
        self.vocab_size = max([size, *(number + 1 for number in self._added.values())])
        self.bos = self._control_id(settings.get("bos_token"))
        self.eos = self._control_id(settings.get("eos_token"))
        self.pad = self._control_id(settings.get("pad_token"))

    @abstractmethod
    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Returns ids [n] int32 of every text, without bos or eos.

        Uses one thread: preprocessing starts several processes.
        """

    @abstractmethod
    def log_slowness(self) -> None:
        """Logs what makes the encoding of much text slow."""

    @abstractmethod
    def prepare(self) -> None:
        """Builds what much text is encoded with, which otherwise happens after some of it."""

    @abstractmethod
    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text of ids without control tokens.

        Raises `UserError` for an id outside the vocabulary.
        """

    @abstractmethod
    def _base_token_to_id(self, token: str) -> int | None:
        """Returns the id of an entry of the vocabulary file."""

    def encode(self, text: str) -> np.ndarray:
        """Returns ids [n] int32 of one text, without bos or eos."""
        return self.encode_batch([text])[0]

    @abstractmethod
    def token_bytes(self, number: int) -> bytes | None:
        """Returns the bytes that an id adds to a run of such ids in decoded text; None if it does not take
        part in runs.

        b"" for a control token, which decoded text leaves out.
        """

    decodes_byte_runs = False
    """True if one malformed byte changes how its whole run of bytes is decoded, false if only its own
    character."""

    def resets_decoder(self, number: int) -> bool:
        """Returns whether the text after this id is decoded as at the beginning of a text."""
        return False

    def token_to_id(self, token: str) -> int | None:
        """Returns the id of a token by its string; None if there is no such token."""
        return self._added.get(token, self._base_token_to_id(token))

    def required_id(self, token: str) -> int:
        """Returns the id of a token by its string. Raises `UserError` if there is no such token."""
        number = self.token_to_id(token)
        if number is None:
            raise UserError(f"{self.path}: the tokenizer has no token {token!r}")
        return number

    @property
    def control_strings(self) -> tuple[str, ...]:
        """Strings of BOS and EOS, as the files name them."""
        tokens = (self._settings.get(f"{name}_token") for name in ("bos", "eos"))
        return tuple(token_text(token) for token in tokens if token is not None)

    @property
    def added_tokens(self) -> Mapping[str, int]:
        """String -> id of every token that is declared beside or inside the vocabulary file."""
        return self._added

    @property
    def ids_from_text(self) -> set[int]:
        """Ids of the added tokens that text may become."""
        added = set(self._added.values())
        return added if self.parses_special_tokens else added - self._special

    def _control_id(self, token: str | dict[str, Any] | None) -> int | None:
        return None if token is None else self.required_id(token_text(token))

    def _checked_ids(self, ids: Iterable[int]) -> list[int]:
        """Converts ids to int. Raises `UserError` for an id outside the vocabulary."""
        numbers = [int(i) for i in ids]
        for number in numbers:
            if not 0 <= number < self.vocab_size:
                raise UserError(
                    f"{self.path}: no token has the id {number}; the tokenizer has {self.vocab_size}"
                )
        return numbers


class SentencePieceTokenizer(Tokenizer):
    """`tokenizer.model`, by the sentencepiece library, and the tokens that the files beside it add."""

    def __init__(self, path: Path, parses_special_tokens: bool = False) -> None:
        import sentencepiece

        # Errors only: sentencepiece warns about InternLM's unused NUL piece in every process.
        sentencepiece.set_min_log_level(2)
        try:
            model = checked_file(path / "tokenizer.model").read_bytes()
            self._model = sentencepiece.SentencePieceProcessor()
            self._model.load_from_serialized_proto(model)
            self._pieces = [self._model.id_to_piece(i) for i in range(self._model.get_piece_size())]
        except (OSError, RuntimeError, UnicodeDecodeError) as error:
            raise UserError(
                f"{path / 'tokenizer.model'} is not a sentencepiece model: {first_line(error)}"
            ) from error
        super().__init__(path, len(self._pieces), parses_special_tokens)
        if self.bos is None and self._model.bos_id() >= 0:
            self.bos = self._model.bos_id()
        if self.eos is None and self._model.eos_id() >= 0:
            self.eos = self._model.eos_id()
        self.pad = self.eos if self.pad is None else self.pad
        settings, tokens = declared_tokens(path)
        self._splitter = AddedTokenSplitter(self._in_text(tokens), parses_special_tokens)
        self._names = {
            number: text
            for text, number in self._added.items()
            if number >= self.base_vocab_size or self._pieces[number] != text
        }
        # Text behind an added token begins with a space of its own, unless `legacy` is false.
        has_prefix = settings.get("legacy") is not False
        self._continuation = self._model
        if not has_prefix and self._names:
            self._continuation = sentencepiece.SentencePieceProcessor(model_proto=model + NO_DUMMY_PREFIX)
        self._encoder = SentencePieceEncoder(self._model, self._continuation, model, path / "tokenizer.model")

    def _in_text(self, tokens: Mapping[str, DeclaredToken]) -> dict[str, AddedToken]:
        """Declared tokens that have an id."""
        ids = {text: self.token_to_id(text) for text in tokens}
        return {
            text: AddedToken(number, number in self._special or tokens[text].special, **tokens[text].flags)
            for text, number in ids.items()
            if number is not None
        }

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        split = [self._splitter.split(text) for text in texts]
        if all(len(parts) == 1 and isinstance(parts[0], str) for parts in split):
            return self._encoder.encode(texts)
        first = [part for parts in split for part in parts[:1] if isinstance(part, str)]
        later = [part for parts in split for part in parts[1:] if isinstance(part, str)]
        first_ids = iter(self._encoder.encode(first))
        later_ids = iter(self._encoder.encode(later, continued=True))
        return [_concatenate(parts, first_ids, later_ids) for parts in split]

    def log_slowness(self) -> None:
        self._encoder.log_slowness()

    def prepare(self) -> None:
        self._encoder.prepare()

    def decode(self, ids: Iterable[int]) -> str:
        visible = [
            i
            for i in self._checked_ids(ids)
            if i not in self._special and (i < self.base_vocab_size or i in self._names)
        ]
        parts: list[str] = []
        for is_added, group in groupby(visible, self._names.__contains__):
            run = list(group)
            model = self._continuation if parts else self._model
            parts += [self._names[i] for i in run] if is_added else [model.decode(run)]
        return "".join(parts)

    def token_bytes(self, number: int) -> bytes | None:
        if number in self._special:
            return b""
        is_byte = number < self.base_vocab_size and self._model.is_byte(number)
        return bytes([int(self._pieces[number][3:5], 16)]) if is_byte else None  # <0x41>

    def resets_decoder(self, number: int) -> bool:
        is_added = number in self._names or number >= self.base_vocab_size
        return is_added and number not in self._special and self._continuation is self._model

    def _base_token_to_id(self, token: str) -> int | None:
        number = self._model.piece_to_id(token)  # the id of <unk> for an unknown piece
        return number if self._pieces[number] == token else None


def _concatenate(
    parts: Sequence[str | int], first: Iterator[np.ndarray], later: Iterator[np.ndarray]
) -> np.ndarray:
    """Ids [n] int32 of the parts of a text: ids of added tokens, and the next of `first` or `later` for
    text."""
    ids = []
    for index, part in enumerate(parts):
        text_ids = later if index else first
        ids.append(np.array([part], np.int32) if isinstance(part, int) else next(text_ids))
    return np.concatenate(ids) if ids else np.zeros(0, np.int32)


class JsonTokenizer(Tokenizer):
    """`tokenizer.json`, by the `tokenizers` library."""

    def __init__(self, path: Path, parses_special_tokens: bool = False) -> None:
        import tokenizers

        try:
            self._model = tokenizers.Tokenizer.from_file(str(checked_file(path / "tokenizer.json")))
        except UserError:
            raise
        except Exception as error:  # the library raises bare Exception
            raise UserError(f"{path / 'tokenizer.json'} is not a tokenizer: {first_line(error)}") from error
        self._model.no_truncation()
        self._model.no_padding()
        # Added tokens that are not special are ordinary vocabulary (runs of spaces, for example).
        self._model.encode_special_tokens = not parses_special_tokens
        super().__init__(path, self._model.get_vocab_size(with_added_tokens=False), parses_special_tokens)
        highest = max(self._model.get_vocab().values(), default=-1)  # ids may have gaps
        if highest >= 2**31 - 1:
            raise UserError(f"{path / 'tokenizer.json'}: {highest} is not a token id")
        self.vocab_size = max(self.vocab_size, highest + 1)
        self.pad = self.eos if self.pad is None else self.pad
        kinds = _decoder_kinds(self._model.decoder)
        self.decodes_byte_runs = "ByteFallback" in kinds
        self._byte_alphabet = _byte_alphabet() if "ByteLevel" in kinds else None
        tokens = self._model.get_added_tokens_decoder()
        self._special |= {number for number, token in tokens.items() if token.special}
        self._added = {token.content: number for number, token in tokens.items()} | self._added

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        encodings = self._model.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, dtype=np.int32) for encoding in encodings]

    def log_slowness(self) -> None:
        pass

    def prepare(self) -> None:
        pass

    def decode(self, ids: Iterable[int]) -> str:
        return self._model.decode(self._checked_ids(ids), skip_special_tokens=True)

    def token_bytes(self, number: int) -> bytes | None:
        token = self._model.id_to_token(number)
        if token is None or number in self._special:
            return b""
        if self._byte_alphabet:
            values = [self._byte_alphabet[letter] for letter in token if letter in self._byte_alphabet]
            return bytes(values) if len(values) == len(token) else token.encode()
        if self.decodes_byte_runs and re.fullmatch(r"<0x[0-9A-F]{2}>", token):
            return bytes([int(token[3:5], 16)])
        return None

    def _base_token_to_id(self, token: str) -> int | None:
        return self._model.token_to_id(token)


TOKENIZER_CLASSES: dict[str, type[SentencePieceTokenizer | JsonTokenizer]] = {
    "tokenizer.model": SentencePieceTokenizer,
    "tokenizer.json": JsonTokenizer,
}
"""File name -> class, in the order of priority."""


def load(path: str | Path, parses_special_tokens: bool = False) -> Tokenizer:
    """Loads the tokenizer of a Hugging Face directory.

    `parses_special_tokens`: find special tokens (`<s>`, `<|im_end|>`) in text too. Raises `UserError` if
    there is none or it is damaged.
    """
    folder = Path(path)
    return TOKENIZER_CLASSES[find_vocabulary(folder)](folder, parses_special_tokens)


def find_vocabulary(folder: Path) -> str:
    """Name of the vocabulary file in a folder. Raises `UserError` if there is none."""
    for name in TOKENIZER_CLASSES:
        if (folder / name).is_file():
            return name
    if folder.is_file():
        raise UserError(f"{folder} is a file: give its folder, {folder.parent}")
    if folder.is_dir():
        names = ", ".join(sorted(p.name for p in folder.iterdir())[:8])
        reason = f"the folder holds {names or 'nothing'}"
    else:
        reason = "there is no such folder"
    raise UserError(
        f"{folder}: no tokenizer here; looked for {' and '.join(TOKENIZER_CLASSES)}, but {reason}"
    )


def _decoder_kinds(decoder: Any) -> set[str]:
    """Returns the type of a decoder of the `tokenizers` library and of its parts."""
    state = json.loads(decoder.__getstate__()) if decoder is not None else {}
    return {state.get("type"), *(part.get("type") for part in state.get("decoders", []))}


def _byte_alphabet() -> dict[str, int]:
    """Returns letter -> byte of GPT-2's byte-level vocabularies: printable bytes are themselves, the others
    from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}
