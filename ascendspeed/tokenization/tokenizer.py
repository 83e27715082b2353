"""Tokenizers of a Hugging Face directory: `tokenizer.model` (sentencepiece) and `tokenizer.json`; no remote
code runs.

`tokenizer.model` has priority: the model was trained with it, while a `tokenizer.json` beside it is a
conversion. Text never becomes a control token: a literal `<s>` is encoded as the characters `<`, `s`, `>`.
Callers insert control tokens by id (`bos`, `eos`, `required_id`).
"""

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from ascendspeed.utils.errors import UserError
from ascendspeed.utils.safe_io import checked_file, read_json_object
from ascendspeed.utils.text import first_line

CONTROL_TOKEN_NAMES = ("bos", "eos", "unk", "pad")
ADDED_TOKEN_FLAGS = ("single_word", "lstrip", "rstrip")
"""Fields of an added token: match whole words only; strip the whitespace to its left or right."""


@dataclass(frozen=True)
class DeclaredToken:
    """A string that the JSON files beside a vocabulary declare to be one token."""

    number: int | None
    """Token id; None: the id of the vocabulary entry with this string."""
    special: bool
    """True if decoded text leaves it out."""
    flags: Mapping[str, bool]
    """Matching options, see `ADDED_TOKEN_FLAGS`."""


def declared_tokens(folder: Path) -> tuple[dict[str, Any], dict[str, DeclaredToken]]:
    """Reads tokenizer_config.json, special_tokens_map.json and added_tokens.json.

    Returns the merged settings of the first two, and the declared tokens of all three by string. Where the
    files contradict each other, the precedence is that of transformers. Raises `UserError`.
    """
    try:
        return _declared_tokens(folder)
    except (TypeError, AttributeError, ValueError) as error:  # e.g. a list where an object is expected
        raise UserError(
            f"{folder}: the tokenizer's JSON files do not have the structure that transformers writes: "
            f"{error}"
        ) from None


def _declared_tokens(folder: Path) -> tuple[dict[str, Any], dict[str, DeclaredToken]]:
    config = read_optional_json(folder / "tokenizer_config.json")
    names = read_optional_json(folder / "special_tokens_map.json")
    settings = names | config if config.get("added_tokens_decoder") else config | names
    special = _special_strings(settings)
    tokens = {text: DeclaredToken(None, True, {}) for text in special}
    for text, number in read_optional_json(folder / "added_tokens.json").items():
        tokens[text] = DeclaredToken(_token_id(number), text in special, {})
    for number, token in (settings.get("added_tokens_decoder") or {}).items():
        text = token_text(token)
        flags = {name: bool(token.get(name)) for name in ADDED_TOKEN_FLAGS}
        tokens[text] = DeclaredToken(_token_id(number), bool(token.get("special")) or text in special, flags)
    return settings, tokens


def _special_strings(settings: Mapping[str, Any]) -> list[str]:
    """Returns the strings of the named control tokens and of the additional special tokens."""
    tokens = [settings.get(f"{name}_token") for name in CONTROL_TOKEN_NAMES]
    tokens = [token for token in tokens if token is not None]
    for key in ("additional_special_tokens", "extra_special_tokens"):
        additional = settings.get(key) or ()
        tokens += additional.values() if isinstance(additional, Mapping) else additional
    return [token_text(token) for token in tokens]


def adds_bos_token(settings: Mapping[str, Any]) -> bool:
    """Returns `add_bos_token` of tokenizer_config.json; true, as for InternLM, where it is missing."""
    return settings.get("add_bos_token") is not False


def token_text(token: Any) -> str:
    """Returns the string of a token that a JSON file holds as a string or as {"content": string}.

    Raises `ValueError`.
    """
    text = token.get("content") if isinstance(token, Mapping) else token
    if not isinstance(text, str) or not text:
        raise ValueError(f"{token!r} is not a token")
    return text


def _token_id(number: Any) -> int:
    if not str(number).isdecimal() or int(number) >= 2**31:
        raise ValueError(f"{number!r} is not a token id")
    return int(number)


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

    def __init__(self, path: Path, size: int) -> None:
        """`size`: `base_vocab_size`."""
        self.path, self.base_vocab_size = path, size
        settings, tokens = declared_tokens(path)
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
    def added_tokens(self) -> Mapping[str, int]:
        """String -> id of every token that is declared beside or inside the vocabulary file."""
        return self._added

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
    """`tokenizer.model`, by the sentencepiece library."""

    def __init__(self, path: Path) -> None:
        import sentencepiece

        # Errors only: sentencepiece warns about InternLM's unused NUL piece in every process.
        sentencepiece.set_min_log_level(2)
        try:
            self._model = sentencepiece.SentencePieceProcessor(
                model_file=str(checked_file(path / "tokenizer.model"))
            )
        except (OSError, RuntimeError) as error:
            raise UserError(
                f"{path / 'tokenizer.model'} is not a sentencepiece model: {first_line(error)}"
            ) from error
        super().__init__(path, self._model.get_piece_size())
        if self.bos is None and self._model.bos_id() >= 0:
            self.bos = self._model.bos_id()
        if self.eos is None and self._model.eos_id() >= 0:
            self.eos = self._model.eos_id()
        self.pad = self.eos if self.pad is None else self.pad

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return self._model.encode_as_numpy(list(texts), num_threads=1)

    def decode(self, ids: Iterable[int]) -> str:
        added = {text_id: text for text, text_id in self._added.items() if text_id >= self.base_vocab_size}
        visible = [
            i
            for i in self._checked_ids(ids)
            if i not in self._special and (i < self.base_vocab_size or i in added)
        ]
        parts = []
        for is_added, group in groupby(visible, added.__contains__):
            run = list(group)
            parts += [added[i] for i in run] if is_added else [self._model.decode(run)]
        return "".join(parts)

    def token_bytes(self, number: int) -> bytes | None:
        if number in self._special:
            return b""
        is_byte = number < self.base_vocab_size and self._model.is_byte(number)
        return bytes([int(self._model.id_to_piece(number)[3:5], 16)]) if is_byte else None  # <0x41>

    def resets_decoder(self, number: int) -> bool:
        return number >= self.base_vocab_size and number not in self._special

    def _base_token_to_id(self, token: str) -> int | None:
        number = self._model.piece_to_id(token)  # the id of <unk> for an unknown piece
        return number if self._model.id_to_piece(number) == token else None


class JsonTokenizer(Tokenizer):
    """`tokenizer.json`, by the `tokenizers` library."""

    def __init__(self, path: Path) -> None:
        import tokenizers

        try:
            self._model = tokenizers.Tokenizer.from_file(str(checked_file(path / "tokenizer.json")))
        except UserError:
            raise
        except Exception as error:  # the library raises bare Exception
            raise UserError(f"{path / 'tokenizer.json'} is not a tokenizer: {first_line(error)}") from error
        self._model.no_truncation()
        self._model.no_padding()
        # Control tokens in text stay text. Added tokens that are not special are ordinary vocabulary (runs of
        # spaces, for example) and are found in text, as in training.
        self._model.encode_special_tokens = True
        super().__init__(path, self._model.get_vocab_size(with_added_tokens=False))
        self.vocab_size = max(self.vocab_size, self._model.get_vocab_size())
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


TOKENIZER_CLASSES: dict[str, Callable[[Path], Tokenizer]] = {
    "tokenizer.model": SentencePieceTokenizer,
    "tokenizer.json": JsonTokenizer,
}
"""File name -> class, in the order of priority."""


def load(path: str | Path) -> Tokenizer:
    """Loads the tokenizer of a Hugging Face directory.

    Raises `UserError` if there is none or it is damaged.
    """
    folder = Path(path)
    for name, tokenizer_class in TOKENIZER_CLASSES.items():
        if (folder / name).is_file():
            return tokenizer_class(folder)
    if folder.is_dir():
        names = ", ".join(sorted(p.name for p in folder.iterdir())[:8])
        reason = f"the folder holds {names or 'nothing'}"
    else:
        reason = "there is no such folder"
    raise UserError(
        f"{folder}: no tokenizer here; looked for {' and '.join(TOKENIZER_CLASSES)}, but {reason}"
    )


def read_optional_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object from a file; returns {} if the file does not exist. Raises `UserError`."""
    return read_json_object(path) if path.exists() or path.is_symlink() else {}


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
