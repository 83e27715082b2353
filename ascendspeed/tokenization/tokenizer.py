"""Text <-> token ids, from a Hugging Face directory and without anybody's code.

`tokenizer.model` (sentencepiece) is taken before `tokenizer.json`: it is what the model was trained with, and its ids are the
original's own, while a `tokenizer.json` beside it is a conversion. Text is always only text: a literal `<s>` in it is encoded as
the characters `<`, `s`, `>`, never as the control token. Who wants a control token puts its id there (`bos`, `eos`, `required_id`).
"""

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from ascendspeed.utils.errors import UserError
from ascendspeed.utils.safe_io import checked, read_table
from ascendspeed.utils.text import first_line

CONTROL_TOKEN_NAMES = ("bos", "eos", "unk", "pad")
ADDED_TOKEN_FLAGS = ("single_word", "lstrip", "rstrip")


@dataclass(frozen=True)
class DeclaredToken:
    """A string that the JSON files beside a vocabulary declare to be one token."""

    number: int | None
    """Its id; None: that of the piece of this name."""
    special: bool
    """Left out of decoded text."""
    flags: Mapping[str, bool]
    """What of its surroundings it takes with it (`FLAGS`)."""


def declared_tokens(folder: Path) -> tuple[dict[str, Any], dict[str, DeclaredToken]]:
    """(tokenizer_config.json with what special_tokens_map.json adds, the tokens that they and added_tokens.json declare by string).

    Where files differ, the same one is believed as by transformers. Raises `UserError`.
    """
    try:
        return _declared(folder)
    except (TypeError, AttributeError, ValueError) as error:  # a list where a table should be, and the like
        raise UserError(
            f"{folder}: the tokenizer's JSON files are not as transformers write them: {error}"
        ) from None


def _declared(folder: Path) -> tuple[dict[str, Any], dict[str, DeclaredToken]]:
    config, names = (
        read_optional_json(folder / f"{name}.json") for name in ("tokenizer_config", "special_tokens_map")
    )
    said = names | config if config.get("added_tokens_decoder") else config | names
    listed = (said.get(name) or () for name in ("additional_special_tokens", "extra_special_tokens"))
    more = [
        token for tokens in listed for token in (tokens.values() if isinstance(tokens, Mapping) else tokens)
    ]
    named = [said[f"{name}_token"] for name in CONTROL_TOKEN_NAMES if said.get(f"{name}_token") is not None]
    special = [token_text(token) for token in (*named, *more)]
    tokens = {text: DeclaredToken(None, True, {}) for text in special}
    for text, number in read_optional_json(folder / "added_tokens.json").items():
        tokens[text] = DeclaredToken(_number(number), text in special, {})
    for number, token in (said.get("added_tokens_decoder") or {}).items():
        text, flags = token_text(token), {name: bool(token.get(name)) for name in ADDED_TOKEN_FLAGS}
        tokens[text] = DeclaredToken(_number(number), bool(token.get("special")) or text in special, flags)
    return said, tokens


def adds_bos_token(table: Mapping[str, Any]) -> bool:
    """What tokenizer_config.json says about text; InternLM's says yes, and so does one that says nothing."""
    return table.get("add_bos_token") is not False


def token_text(token: Any) -> str:
    """The JSON files write a token as a string or as {"content": string}. Raises `ValueError`."""
    text = token.get("content") if isinstance(token, Mapping) else token
    if not isinstance(text, str) or not text:
        raise ValueError(f"{token!r} is no token")
    return text


def _number(number: Any) -> int:
    if not str(number).isdecimal() or int(number) >= 2**31:
        raise ValueError(f"{number!r} is no id of a token")
    return int(number)


class Tokenizer(ABC):
    """Ids of text, and the ids of the control tokens, found by their names in the directory's JSON files."""

    base_vocab_size: int
    """Size of the vocabulary itself."""
    vocab_size: int
    """Number of ids, added tokens included; the model may have more rows."""
    bos: int | None
    """Id that begins a text; None if the tokenizer has none."""
    eos: int | None
    """Id that ends a document."""
    pad: int | None
    """Id that fills a batch; `eos` where none is named."""

    def __init__(self, path: Path, size: int) -> None:
        self.path, self.base_vocab_size = path, size
        said, tokens = declared_tokens(path)
        self._added = {content: token.number for content, token in tokens.items() if token.number is not None}
        self._special = {number for content, number in self._added.items() if tokens[content].special}
        self.vocab_size = max([size, *(number + 1 for number in self._added.values())])
        self.bos, self.eos, self.pad = (
            self._named(said.get(f"{name}_token")) for name in ("bos", "eos", "pad")
        )

    @abstractmethod
    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids [n] int32 of every text, without bos or eos. One thread: processes are what preprocessing multiplies."""

    @abstractmethod
    def decode(self, ids: Iterable[int]) -> str:
        """Text of ids; control tokens are left out. Raises `UserError` for an id that the tokenizer does not have."""

    @abstractmethod
    def _base_token_to_id(self, piece: str) -> int | None:
        """Id of a piece of the vocabulary itself."""

    def encode(self, text: str) -> np.ndarray:
        """Ids [n] int32 of one text."""
        return self.encode_batch([text])[0]

    @abstractmethod
    def token_bytes(self, number: int) -> bytes | None:
        """The bytes that an id adds to those of its neighbours in decoded text; None: its text does not depend on them so.

        b"" for a control token, which decoded text leaves out.
        """

    decodes_byte_runs = False
    """Whether one wrong byte spoils all the bytes beside it in decoded text (otherwise only its own character)."""

    def resets_decoder(self, number: int) -> bool:
        """Whether text after this id is decoded as if it began there."""
        return False

    def token_to_id(self, piece: str) -> int | None:
        """Id of a token by its string; None when there is none."""
        return self._added.get(piece, self._base_token_to_id(piece))

    def required_id(self, piece: str) -> int:
        """The same. Raises `UserError` when there is none."""
        number = self.token_to_id(piece)
        if number is None:
            raise UserError(f"{self.path}: the tokenizer has no token {piece!r}")
        return number

    def _named(self, token: str | dict[str, Any] | None) -> int | None:
        return None if token is None else self.required_id(token_text(token))

    def _known(self, ids: Iterable[int]) -> list[int]:
        numbers = [int(i) for i in ids]
        for number in numbers:
            if not 0 <= number < self.vocab_size:
                raise UserError(
                    f"{self.path}: no token has the id {number}; the tokenizer has {self.vocab_size}"
                )
        return numbers


class SentencePieceTokenizer(Tokenizer):
    """`tokenizer.model`: the ids of sentencepiece itself."""

    def __init__(self, path: Path) -> None:
        import sentencepiece

        sentencepiece.set_min_log_level(
            2
        )  # InternLM's unused NUL piece would be warned about in every process
        try:
            self._model = sentencepiece.SentencePieceProcessor(
                model_file=str(checked(path / "tokenizer.model"))
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
        beyond = {
            number: content for content, number in self._added.items() if number >= self.base_vocab_size
        }
        kept = [
            i
            for i in self._known(ids)
            if i not in self._special and (i < self.base_vocab_size or i in beyond)
        ]
        runs = ((added, list(run)) for added, run in groupby(kept, beyond.__contains__))
        return "".join(
            "".join(map(beyond.get, run)) if added else self._model.decode(run) for added, run in runs
        )

    def token_bytes(self, number: int) -> bytes | None:
        if number in self._special:
            return b""
        is_byte = number < self.base_vocab_size and self._model.is_byte(number)
        return bytes([int(self._model.id_to_piece(number)[3:5], 16)]) if is_byte else None  # <0x41>

    def resets_decoder(self, number: int) -> bool:
        return number >= self.base_vocab_size and number not in self._special

    def _base_token_to_id(self, piece: str) -> int | None:
        number = self._model.piece_to_id(piece)
        return number if self._model.id_to_piece(number) == piece else None


class JsonTokenizer(Tokenizer):
    """`tokenizer.json`, by the `tokenizers` library."""

    def __init__(self, path: Path) -> None:
        import tokenizers

        try:
            self._model = tokenizers.Tokenizer.from_file(str(checked(path / "tokenizer.json")))
        except UserError:
            raise
        except Exception as error:  # the library raises bare Exception
            raise UserError(f"{path / 'tokenizer.json'} is not a tokenizer: {first_line(error)}") from error
        self._model.no_truncation()
        self._model.no_padding()
        # Control tokens in text stay text. Added tokens that are not special are ordinary vocabulary (runs of spaces, for
        # example) and are found in text, as in training.
        self._model.encode_special_tokens = True
        super().__init__(path, self._model.get_vocab_size(with_added_tokens=False))
        self.vocab_size = max(self.vocab_size, self._model.get_vocab_size())
        self.pad = self.eos if self.pad is None else self.pad
        kinds = _decoders(self._model.decoder)
        self.decodes_byte_runs = "ByteFallback" in kinds
        self._alphabet = _alphabet() if "ByteLevel" in kinds else None
        tokens = self._model.get_added_tokens_decoder()
        self._special |= {number for number, token in tokens.items() if token.special}

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        found = self._model.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, dtype=np.int32) for encoding in found]

    def decode(self, ids: Iterable[int]) -> str:
        return self._model.decode(self._known(ids), skip_special_tokens=True)

    def token_bytes(self, number: int) -> bytes | None:
        piece = self._model.id_to_token(number)
        if piece is None or number in self._special:
            return b""
        if self._alphabet:
            mapped = [self._alphabet.get(letter) for letter in piece]
            return piece.encode() if None in mapped else bytes(mapped)
        return (
            bytes([int(piece[3:5], 16)])
            if self.decodes_byte_runs and re.fullmatch(r"<0x[0-9A-F]{2}>", piece)
            else None
        )

    def _base_token_to_id(self, piece: str) -> int | None:
        return self._model.token_to_id(piece)


TOKENIZER_CLASSES: dict[str, type[Tokenizer]] = {
    "tokenizer.model": SentencePieceTokenizer,
    "tokenizer.json": JsonTokenizer,
}


def load(path: str | Path) -> Tokenizer:
    """The tokenizer of a Hugging Face directory. Raises `UserError` if there is none, or it is damaged."""
    folder = Path(path)
    for name, kind in TOKENIZER_CLASSES.items():
        if (folder / name).is_file():
            return kind(folder)
    held = ", ".join(sorted(p.name for p in folder.iterdir())[:8]) if folder.is_dir() else ""
    found = f"the folder holds {held or 'nothing'}" if folder.is_dir() else "there is no such folder"
    raise UserError(f"{folder}: no tokenizer here; looked for {' and '.join(TOKENIZER_CLASSES)}, but {found}")


def read_optional_json(path: Path) -> dict[str, Any]:
    """What a JSON file says that need not be there. Raises `UserError`."""
    return read_table(path) if path.exists() or path.is_symlink() else {}


def _decoders(decoder: Any) -> set[str]:
    """Kinds of a decoder of the `tokenizers` library and of all that it consists of."""
    said = json.loads(decoder.__getstate__()) if decoder is not None else {}
    return {said.get("type"), *(one.get("type") for one in said.get("decoders", []))}


def _alphabet() -> dict[str, int]:
    """Letter -> byte, as byte-level vocabularies write bytes down: printable ones as they are, the others from U+0100 on."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(0x100 + i): byte for i, byte in enumerate(others)}
