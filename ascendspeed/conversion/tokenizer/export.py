"""Converts tokenizer.model to a tokenizer.json that stock transformers loads without custom code, with
sentencepiece's ids.

Transformers' own conversion orders the merges by id; sentencepiece orders them by score, and in InternLM's
vocabulary the two differ. A tokenizer that cannot be expressed exactly is not written, with a reason; a
written one has been compared with sentencepiece.

Text is treated as by the model's original tokenizer. The strings that tokenizer_config.json and similar files
declare (`<s>`, `<|im_start|>`, added tokens) become their ids wherever they occur in a text, as in every
tokenizer of Hugging Face; sentencepiece itself never produces a control token from text, which
`split_special_tokens=True` selects at loading. User-defined pieces of the vocabulary (`[UNUSED_TOKEN_3]`,
runs of spaces) are recognized either way.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ascendspeed.conversion.output_files import write_json
from ascendspeed.conversion.tokenizer import comparison_texts
from ascendspeed.conversion.tokenizer.sentencepiece_bpe import (
    BYTE,
    NORMAL,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    InexactTokenizerError,
    Merge,
    merges,
    parse,
    read,
)
from ascendspeed.models.families import FAMILIES
from ascendspeed.tokenization.chat.jinja_template import ESCAPE, escaped
from ascendspeed.tokenization.declared_tokens import (
    ADDED_TOKEN_FLAGS,
    CONTROL_TOKEN_NAMES,
    DeclaredToken,
    declared_tokens,
    read_optional_json,
    token_text,
)
from ascendspeed.utils.atomic import replace_file
from ascendspeed.utils.errors import UserError

GENERIC_CLASS = "PreTrainedTokenizerFast"
"""Class that uses a tokenizer.json unchanged, in every version of transformers."""
ESCAPE_REMOVAL = {
    "type": "Split",
    "pattern": {"Regex": rf"(?<=[<\[]){ESCAPE}"},
    "behavior": "Removed",
    "invert": False,
}
"""Pre-tokenizer that cuts a text where a chat template has marked the string of a user-defined piece."""
Added = dict[int, dict[str, Any]]
"""Token id -> entry of `added_tokens`."""


def write(folder: Path) -> str | None:
    """Writes tokenizer.json and its settings beside the tokenizer.model of a folder; 100,000 pieces take a
    few seconds.

    Returns the reason if it would not give the ids of sentencepiece; then nothing is written. Raises
    `UserError`.
    """
    import tokenizers

    path = folder / "tokenizer.model"
    model_type = read_optional_json(folder / "config.json").get("model_type")
    family = FAMILIES.get(model_type)
    if family and family.requires_tokenizer_class:
        return (
            f"transformers use no tokenizer but {family.tokenizer_class} for a model of the type {model_type}"
        )
    try:
        model = parse(path)
        declared_settings, tokens = declared_tokens(folder)
        settings = _defaults(model, declared_settings) | declared_settings
        added = _added(model.pieces, _control_tokens(settings) | tokens)
        ranked = merges(model.pieces)
        text = json.dumps(_tokenizer(model, settings, added, ranked), ensure_ascii=False)
        comparison_texts.compare(
            path,
            tokenizers.Tokenizer.from_str(text),
            list(comparison_texts.texts(model.pieces, ranked)),
            _foreign_strings(model.pieces, added),
        )
    except InexactTokenizerError as error:
        return f"tokenizer.model {error}"
    replace_file(folder / "tokenizer.json", text)
    decoder = {
        str(i): {name: value for name, value in token.items() if name != "id"} for i, token in added.items()
    }
    write_json(
        folder / "tokenizer_config.json",
        settings | {"added_tokens_decoder": decoder, "tokenizer_class": GENERIC_CLASS},
    )
    return None


def check(folder: Path) -> None:
    """Raises `UserError` if a folder's tokenizer.json differs from its tokenizer.model, naming a text with
    different ids.

    Both must be readable. A tokenizer.json from another converter may differ in details, as that of
    transformers does for InternLM.
    """
    import tokenizers

    path = folder / "tokenizer.model"
    converted = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    declared = declared_tokens(folder)[1]
    try:
        for name, token in declared.items():
            other = converted.token_to_id(name)
            if token.number is not None and other not in (None, token.number):
                raise InexactTokenizerError(
                    f"has neighbours that say that {name!r} is {token.number}, and tokenizer.json says "
                    f"{other}"
                )
        pieces = read(path).pieces
        added_tokens = {
            token.content: DeclaredToken(i, token.special, {})
            for i, token in converted.get_added_tokens_decoder().items()
        }
        known = {
            i: entry for i, entry in _added(pieces, added_tokens).items() if entry["content"] in declared
        }
        samples = list(comparison_texts.texts(pieces, _ordered_merges(pieces)))
        comparison_texts.compare(path, converted, samples, _foreign_strings(pieces, known))
    except InexactTokenizerError as error:
        raise UserError(
            f"{path} {error}: move the one away that is not meant, or give --tokenizer DIR with one of them"
        ) from None


def _ordered_merges(pieces: Any) -> list[Merge]:
    """Merges for finding texts in which they compete; empty if the model has no exact order."""
    try:
        return merges(pieces)
    except InexactTokenizerError:
        return []


def _defaults(model: Any, declared_settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings that tokenizer_config.json leaves out: the special tokens of the model."""
    if model.normalizer_spec.add_dummy_prefix and declared_settings.get("legacy") is False:
        raise InexactTokenizerError(
            "begins the text with a space, and legacy = false in tokenizer_config.json wants none behind "
            "special tokens"
        )
    numbers = {f"{name}_token": getattr(model.trainer_spec, f"{name}_id") for name in ("bos", "eos", "unk")}
    model_tokens = {name: model.pieces[i].piece for name, i in numbers.items() if 0 <= i < len(model.pieces)}
    return model_tokens | {
        "pad_token": declared_settings.get("eos_token", model_tokens.get("eos_token")),
        "clean_up_tokenization_spaces": False,
    }


def _control_tokens(settings: Mapping[str, Any]) -> dict[str, DeclaredToken]:
    names = (settings.get(f"{name}_token") for name in CONTROL_TOKEN_NAMES)
    return {token_text(token): DeclaredToken(None, True, {}) for token in names if token is not None}


def _added(pieces: Any, tokens: Mapping[str, DeclaredToken]) -> Added:
    """Declared tokens and user-defined pieces. Raises `InexactTokenizerError` for an id of two names, or a
    name of two ids.
    """
    numbers = {piece.piece: i for i, piece in enumerate(pieces)}
    added = {
        i: _entry(i, piece.piece, DeclaredToken(i, False, {}), True)
        for i, piece in enumerate(pieces)
        if piece.type == USER_DEFINED
    }
    names_by_id: dict[int, str] = {}
    for name, token in tokens.items():
        number = numbers.get(name) if token.number is None else token.number
        if number is None:
            continue  # a token without an id: transformers append it to the vocabulary, as always
        piece = pieces[number] if number < len(pieces) else None
        renamed = piece is not None and piece.piece != name
        if (
            numbers.get(name, number) != number
            or number in names_by_id
            or (renamed and piece.type in (NORMAL, BYTE))
        ):
            also = names_by_id.get(number) or (piece.piece if renamed else f"piece {numbers[name]}")
            raise InexactTokenizerError(
                f"does not go with its neighbours: they say that {name!r} is {number}, which is also {also!r}"
            )
        names_by_id[number] = name
        added[number] = _entry(number, name, token, piece is not None and piece.type == USER_DEFINED)
    return dict(sorted(added.items()))


def _entry(number: int, name: str, token: DeclaredToken, normalized: bool) -> dict[str, Any]:
    """Entry of `added_tokens`; `normalized`: matched after spaces became ▁, as sentencepiece matches
    user-defined pieces.
    """
    flags = {flag: token.flags.get(flag, False) for flag in ADDED_TOKEN_FLAGS}
    return {"id": number, "content": name, **flags, "normalized": normalized, "special": token.special}


def _foreign_strings(pieces: Any, added: Added) -> list[str]:
    """Strings that sentencepiece must treat differently from the tokenizer.json."""
    return [name for number, token in added.items() for name in _foreign_names(pieces, number, token)]


def _foreign_names(pieces: Any, number: int, token: Mapping[str, Any]) -> list[str]:
    text = pieces[number].piece if number < len(pieces) else None
    if text != token["content"]:
        return [token["content"], *([text] if text and pieces[number].type == USER_DEFINED else [])]
    return [] if token["special"] or pieces[number].type == USER_DEFINED else [text]


def _tokenizer(model: Any, settings: Mapping[str, Any], added: Added, ranked: list[Merge]) -> dict[str, Any]:
    """Content of tokenizer.json."""
    prefix, fallback = model.normalizer_spec.add_dummy_prefix, bool(model.trainer_spec.byte_fallback)
    vocabulary = {i: _key(i, piece, fallback) for i, piece in enumerate(model.pieces)} | {
        i: t["content"] for i, t in added.items()
    }
    unknown = next(vocabulary[i] for i, piece in enumerate(model.pieces) if piece.type == UNKNOWN)
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": list(added.values()),
        "normalizer": _sequence(
            "normalizers",
            [
                *([{"type": "Prepend", "prepend": "▁"}] if prefix else []),
                _replace(" ", "▁"),
                *_renames(model.pieces, added),
                *_restores(added),
            ],
        ),
        "pre_tokenizer": ESCAPE_REMOVAL,
        "post_processor": _template(settings, {name: i for i, name in vocabulary.items()}),
        "decoder": _sequence(
            "decoders",
            [
                _replace("▁", " "),
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                *([{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefix else []),
            ],
        ),
        "model": {
            "type": "BPE",
            "unk_token": unknown,
            "fuse_unk": True,
            "byte_fallback": fallback,
            "vocab": {name: i for i, name in vocabulary.items()},
            "merges": [[merge.left, merge.right] for merge in ranked],
        },
    }


def _renames(pieces: Any, added: Added) -> list[dict[str, Any]]:
    """Steps of the normalizer for user-defined pieces with another name: both strings are the token."""
    slots = {i: token for i, token in added.items() if i < len(pieces) and pieces[i].type == USER_DEFINED}
    return [
        _replace(pieces[i].piece, token["content"])
        for i, token in slots.items()
        if pieces[i].piece != token["content"]
    ]


def _restores(added: Added) -> list[dict[str, Any]]:
    """Steps of the normalizer that remove `ESCAPE`, after the strings of control tokens have been matched.

    Tokens over user-defined pieces are matched later, so `ESCAPE_REMOVAL` cuts the text there: behind the
    first character, where InternLM's vocabularies merge nothing.
    """
    names = [token["content"] for token in added.values() if token["special"] and not token["normalized"]]
    return [_replace(escaped(name).replace(" ", "▁"), name.replace(" ", "▁")) for name in names]


def _key(number: int, piece: Any, byte_fallback: bool) -> str:
    """Name of a piece; one that sentencepiece never produces (unused, NUL beside byte pieces) gets a name
    that no text contains.
    """
    unused = piece.type == UNUSED or (byte_fallback and piece.type == NORMAL and piece.piece == "\0")
    return f"<unused piece {number}>" if unused else piece.piece


def _template(settings: Mapping[str, Any], numbers: Mapping[str, int]) -> dict[str, Any]:
    """Special tokens around a text, and around each of a pair."""
    names = {"bos": settings.get("add_bos_token", True), "eos": settings.get("add_eos_token", False)}
    used = {
        name: token_text(settings[f"{name}_token"])
        for name, is_used in names.items()
        if is_used and settings.get(f"{name}_token")
    }
    special = {
        name: [{"SpecialToken": {"id": token, "type_id": 0}}]
        for name, token in used.items()
        if token in numbers
    }

    def around(text: str) -> list[dict[str, Any]]:
        return [*special.get("bos", []), {"Sequence": {"id": text, "type_id": 0}}, *special.get("eos", [])]

    known = {
        token: {"id": token, "ids": [numbers[token]], "tokens": [token]}
        for token in used.values()
        if token in numbers
    }
    return {
        "type": "TemplateProcessing",
        "single": around("A"),
        "pair": around("A") + around("B"),
        "special_tokens": known,
    }


def _replace(text: str, by: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": {"String": text}, "content": by}


def _sequence(what: str, steps: list[dict[str, Any]]) -> dict[str, Any]:
    return {"type": "Sequence", what: steps}
