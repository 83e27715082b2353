"""Tokenizer of a GGUF file: sentencepiece's BPE with its scores, or byte-level BPE with its merges."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gguf import GGUFWriter, TokenType

from ascendspeed.conversion.tokenizer import sentencepiece_bpe
from ascendspeed.models.families.gguf_names import BYTE_LEVEL, PRE_TOKENIZERS, SENTENCEPIECE
from ascendspeed.tokenization import tokenizer
from ascendspeed.tokenization.declared_tokens import adds_bos_token, declared_tokens, read_optional_json
from ascendspeed.utils.errors import UserError

ADDED_SCORE = -1000.0
"""Score of added tokens, as in llama.cpp's own converter: they are matched as a whole."""


@dataclass(frozen=True)
class Vocabulary:
    """Entries of a tokenizer by id, and its settings."""

    model: str
    """llama.cpp's kind: `SENTENCEPIECE` or `BYTE_LEVEL`."""
    pre: str
    tokens: list[str]
    types: list[int]
    scores: list[float]
    """Empty for `BYTE_LEVEL`."""
    merges: list[str]
    """Empty for `SENTENCEPIECE`."""
    ids: dict[str, int | None]
    """bos, eos and pad."""
    settings: dict[str, Any]
    adds_prefix: bool
    removes_spaces: bool

    def add_to(self, writer: GGUFWriter) -> None:
        """Writes the tokenizer into the metadata of a file."""
        writer.add_tokenizer_model(self.model)
        writer.add_tokenizer_pre(self.pre)
        writer.add_token_list(self.tokens)
        writer.add_token_types(self.types)
        if self.model == SENTENCEPIECE:
            writer.add_token_scores(self.scores)
            writer.add_add_space_prefix(self.adds_prefix)
            writer.add_remove_extra_whitespaces(self.removes_spaces)
        else:
            writer.add_token_merges(self.merges)
        adders = {
            "bos": writer.add_bos_token_id,
            "eos": writer.add_eos_token_id,
            "pad": writer.add_pad_token_id,
        }
        for name, number in self.ids.items():
            if number is not None:
                adders[name](number)
        writer.add_add_bos_token(self.ids["bos"] is not None and adds_bos_token(self.settings))
        writer.add_add_eos_token(bool(self.settings.get("add_eos_token", False)))


def read(folder: Path | None, vocab_size: int) -> Vocabulary:
    """Reads the tokenizer of a folder. Raises `UserError` if there is none, or llama.cpp has not its kind."""
    if folder is None:
        raise UserError("a GGUF file holds the tokenizer, and none is known: give --tokenizer DIR")
    loaded = tokenizer.load(folder)
    ids = {"bos": loaded.bos, "eos": loaded.eos, "pad": loaded.pad}
    settings = declared_tokens(folder)[0]
    if (folder / "tokenizer.model").is_file():
        return _sentencepiece(folder, vocab_size, ids, settings)
    return _byte_level(folder, vocab_size, ids, settings)


def _sentencepiece(
    folder: Path, vocab_size: int, ids: dict[str, int | None], settings: dict[str, Any]
) -> Vocabulary:
    path = folder / "tokenizer.model"
    try:
        model = sentencepiece_bpe.read(path)
    except sentencepiece_bpe.InexactTokenizerError as error:
        raise UserError(f"{path} {error}") from None
    if model.trainer_spec.model_type != model.trainer_spec.BPE or model.normalizer_spec.precompiled_charsmap:
        raise UserError(f"{path} is not BPE or normalizes the text, which llama.cpp does not: no GGUF file")
    fallback = bool(model.trainer_spec.byte_fallback)
    entries = [(piece.piece, int(piece.type), float(piece.score)) for piece in model.pieces]
    for number, (text, kind, score) in enumerate(entries):
        if text == "\0" and kind == sentencepiece_bpe.NORMAL and fallback:
            # C++ would take the string for an empty one; sentencepiece never makes this piece either.
            entries[number] = (f"<unused piece {number}>", int(TokenType.UNUSED), score)
    entries += [(f"[PAD{i}]", int(TokenType.UNUSED), ADDED_SCORE) for i in range(len(entries), vocab_size)]
    for text, token in declared_tokens(folder)[1].items():
        number = token.number
        if number is None:
            number = next((i for i, piece in enumerate(model.pieces) if piece.piece == text), None)
        if number is not None and number < vocab_size:
            kind = TokenType.CONTROL if token.special else TokenType.USER_DEFINED
            keeps = entries[number][1] == TokenType.UNKNOWN
            entries[number] = (text, int(TokenType.UNKNOWN if keeps else kind), ADDED_SCORE)
    tokens, types, scores = map(list, zip(*entries[:vocab_size], strict=True))
    text = model.normalizer_spec
    return Vocabulary(
        SENTENCEPIECE,
        "default",
        tokens,
        types,
        scores,
        [],
        ids,
        settings,
        bool(text.add_dummy_prefix),
        bool(text.remove_extra_whitespaces),
    )


def _byte_level(
    folder: Path, vocab_size: int, ids: dict[str, int | None], settings: dict[str, Any]
) -> Vocabulary:
    path = folder / "tokenizer.json"
    values = read_optional_json(path)
    try:
        parts = values["pre_tokenizer"].get("pretokenizers", [values["pre_tokenizer"]])
        patterns = [part["pattern"]["Regex"] for part in parts if part["type"] == "Split"]
        model = values["model"]
        merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
        names = {number: text for text, number in model["vocab"].items()}
    except (KeyError, TypeError, AttributeError):
        patterns = []
    pre = PRE_TOKENIZERS.get(patterns[0]) if len(patterns) == 1 else None
    if pre is None:
        found = json.dumps(patterns, ensure_ascii=False)[:80]
        kinds = ", ".join(PRE_TOKENIZERS.values())
        raise UserError(
            f"{path} splits text by {found}, which is not the tokenizer of a model that is written as GGUF "
            f"({kinds}, or a tokenizer.model)"
        )
    entries = [
        (names.get(i, f"[PAD{i}]"), TokenType.NORMAL if i in names else TokenType.UNUSED)
        for i in range(vocab_size)
    ]
    for token in values.get("added_tokens", []):
        if token["id"] < vocab_size:
            kind = TokenType.CONTROL if token["special"] else TokenType.USER_DEFINED
            entries[token["id"]] = (token["content"], kind)
    tokens = [text for text, _ in entries]
    types = [int(kind) for _, kind in entries]
    return Vocabulary(BYTE_LEVEL, pre, tokens, types, [], merges, ids, settings, False, False)
