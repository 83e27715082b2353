"""tokenizer.model -> tokenizer.json: stock transformers load it without anybody's code and give sentencepiece's own ids.

What transformers makes of a bare tokenizer.model by itself orders the merges by id; sentencepiece orders them by score, and in
InternLM's vocabulary the two are not the same. Whatever cannot be said exactly is not written: a reason is given instead, and what
is written has first been compared with sentencepiece.

Text is what the model's original tokenizer takes it for. The strings that tokenizer_config.json and its neighbours declare (`<s>`,
`<|im_start|>`, added tokens) become their ids wherever they stand in a text, as in every tokenizer of Hugging Face; sentencepiece
itself never makes a control token of text: who wants that too loads with `split_special_tokens=True`. User-defined pieces of the
vocabulary (`[UNUSED_TOKEN_3]`, runs of spaces) are found either way.
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
from ascendspeed.tokenization.tokenizer import (
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
"""The class that takes a tokenizer.json as it is, in every version of transformers."""
Added = dict[int, dict[str, Any]]
"""Id -> entry of `added_tokens`."""


def write(folder: Path) -> str | None:
    """Writes tokenizer.json and its settings beside the tokenizer.model of a folder; 100,000 pieces take a few seconds.

    Returns why not, in words, when it would not give the ids of sentencepiece; then nothing is written. Raises `UserError`.
    """
    import tokenizers

    path = folder / "tokenizer.model"
    kind = read_optional_json(folder / "config.json").get("model_type")
    family = FAMILIES.get(kind)
    if family and family.requires_tokenizer_class:
        return f"transformers use no tokenizer but {family.tokenizer_class} for a model of the type {kind}"
    try:
        model = parse(path)
        said, tokens = declared_tokens(folder)
        settings = _defaults(model, said) | said
        added = _added(model.pieces, _named(settings) | tokens)
        ranked = merges(model.pieces)
        text = json.dumps(_tokenizer(model, settings, added, ranked), ensure_ascii=False)
        comparison_texts.compare(
            path,
            tokenizers.Tokenizer.from_str(text),
            list(comparison_texts.texts(model.pieces, ranked)),
            _foreign(model.pieces, added),
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
    """Raises `UserError` when a folder's tokenizer.json is not its tokenizer.model, naming a text that they take differently.

    Both are readable. One that somebody made otherwise may differ in little things, as that of transformers does for InternLM's.
    """
    import tokenizers

    path = folder / "tokenizer.model"
    found = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    beside = declared_tokens(folder)[1]
    try:
        for name, number in ((name, token.number) for name, token in beside.items()):
            other = found.token_to_id(name)
            if number is not None and other not in (None, number):
                raise InexactTokenizerError(
                    f"has neighbours that say that {name!r} is {number}, and tokenizer.json says {other}"
                )
        pieces = read(path).pieces
        own = {
            token.content: DeclaredToken(i, token.special, {})
            for i, token in found.get_added_tokens_decoder().items()
        }
        known = {i: entry for i, entry in _added(pieces, own).items() if entry["content"] in beside}
        comparison_texts.compare(
            path, found, list(comparison_texts.texts(pieces, _ranked(pieces))), _foreign(pieces, known)
        )
    except InexactTokenizerError as error:
        raise UserError(
            f"{path} {error}: move the one away that is not meant, or give --tokenizer DIR with one of them"
        ) from None


def _ranked(pieces: Any) -> list[Merge]:
    """Only to find texts where they compete."""
    try:
        return merges(pieces)
    except InexactTokenizerError:
        return []


def _defaults(model: Any, said: Mapping[str, Any]) -> dict[str, Any]:
    """What holds where tokenizer_config.json says nothing: the special tokens of the model."""
    if model.normalizer_spec.add_dummy_prefix and said.get("legacy") is False:
        raise InexactTokenizerError(
            "begins the text with a space, and legacy = false in tokenizer_config.json wants none behind special tokens"
        )
    numbers = {f"{name}_token": getattr(model.trainer_spec, f"{name}_id") for name in ("bos", "eos", "unk")}
    own = {name: model.pieces[i].piece for name, i in numbers.items() if 0 <= i < len(model.pieces)}
    return own | {
        "pad_token": said.get("eos_token", own.get("eos_token")),
        "clean_up_tokenization_spaces": False,
    }


def _named(settings: Mapping[str, Any]) -> dict[str, DeclaredToken]:
    names = (settings.get(f"{name}_token") for name in CONTROL_TOKEN_NAMES)
    return {token_text(token): DeclaredToken(None, True, {}) for token in names if token is not None}


def _added(pieces: Any, tokens: Mapping[str, DeclaredToken]) -> Added:
    """What is declared, and the user-defined pieces. Raises `Inexact` for an id of two names, or a name of two ids."""
    numbers = {piece.piece: i for i, piece in enumerate(pieces)}
    added = {
        i: _entry(i, piece.piece, DeclaredToken(i, False, {}), True)
        for i, piece in enumerate(pieces)
        if piece.type == USER_DEFINED
    }
    taken: dict[int, str] = {}
    for name, token in tokens.items():
        number = numbers.get(name) if token.number is None else token.number
        if number is None:
            continue  # a name for a token that is nowhere: transformers add it behind the vocabulary, as ever
        piece = pieces[number] if number < len(pieces) else None
        renamed = piece is not None and piece.piece != name
        if (
            numbers.get(name, number) != number
            or number in taken
            or (renamed and piece.type in (NORMAL, BYTE))
        ):
            also = taken.get(number) or (piece.piece if renamed else f"piece {numbers[name]}")
            raise InexactTokenizerError(
                f"does not go with its neighbours: they say that {name!r} is {number}, which is also {also!r}"
            )
        taken[number] = name
        added[number] = _entry(number, name, token, piece is not None and piece.type == USER_DEFINED)
    return dict(sorted(added.items()))


def _entry(number: int, name: str, token: DeclaredToken, normalized: bool) -> dict[str, Any]:
    """`normalized`: looked for when spaces are ▁ already, as sentencepiece does with user-defined pieces; else before."""
    flags = {flag: token.flags.get(flag, False) for flag in ADDED_TOKEN_FLAGS}
    return {"id": number, "content": name, **flags, "normalized": normalized, "special": token.special}


def _foreign(pieces: Any, added: Added) -> list[str]:
    """Strings in which sentencepiece sees something else than the tokenizer.json is to see."""
    return [name for number, token in added.items() for name in _foreign_names(pieces, number, token)]


def _foreign_names(pieces: Any, number: int, token: Mapping[str, Any]) -> list[str]:
    own = pieces[number].piece if number < len(pieces) else None
    if own != token["content"]:
        return [token["content"], *([own] if own and pieces[number].type == USER_DEFINED else [])]
    return [] if token["special"] or pieces[number].type == USER_DEFINED else [own]


def _tokenizer(model: Any, settings: Mapping[str, Any], added: Added, ranked: list[Merge]) -> dict[str, Any]:
    """tokenizer.json as a table."""
    prefix, fallback = model.normalizer_spec.add_dummy_prefix, bool(model.trainer_spec.byte_fallback)
    vocabulary = {i: _key(i, piece, fallback) for i, piece in enumerate(model.pieces)} | {
        i: t["content"] for i, t in added.items()
    }
    renamed = [
        _replace(piece.piece, vocabulary[i])
        for i, piece in _user_defined(model.pieces)
        if vocabulary[i] != piece.piece
    ]
    unknown = next(vocabulary[i] for i, piece in enumerate(model.pieces) if piece.type == UNKNOWN)
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": list(added.values()),
        "normalizer": _sequence(
            "normalizers",
            [*([{"type": "Prepend", "prepend": "▁"}] if prefix else []), _replace(" ", "▁"), *renamed],
        ),
        "pre_tokenizer": None,
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


def _user_defined(pieces: Any) -> list[tuple[int, Any]]:
    return [(i, piece) for i, piece in enumerate(pieces) if piece.type == USER_DEFINED]


def _key(number: int, piece: Any, byte_fallback: bool) -> str:
    """A piece that sentencepiece never makes gets a name that no text is split into: unused ones, and NUL beside byte pieces."""
    unused = piece.type == UNUSED or (byte_fallback and piece.type == NORMAL and piece.piece == "\0")
    return f"<unused piece {number}>" if unused else piece.piece


def _template(settings: Mapping[str, Any], numbers: Mapping[str, int]) -> dict[str, Any]:
    """Which special tokens stand around a text, and around each of two."""
    names = {"bos": settings.get("add_bos_token", True), "eos": settings.get("add_eos_token", False)}
    used = {
        name: token_text(settings[f"{name}_token"])
        for name, wanted in names.items()
        if wanted and settings.get(f"{name}_token")
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
