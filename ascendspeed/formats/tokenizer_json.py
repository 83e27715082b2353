"""tokenizer.model -> tokenizer.json: stock transformers load it without anybody's code and give sentencepiece's own ids.

What transformers makes of a bare tokenizer.model by itself orders the merges by id; sentencepiece orders them by score, and in
InternLM's vocabulary the two are not the same.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ascendspeed.formats.files import read_json, write_json

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # sentencepiece's types of pieces


def write(folder: Path) -> str | None:
    """Writes tokenizer.json and its settings beside the tokenizer.model of a folder.

    Returns why not, in words, when the tokenizer is of a kind that this cannot express.
    """
    from sentencepiece import sentencepiece_model_pb2  # here: it needs protobuf, which reading weights does not

    model = sentencepiece_model_pb2.ModelProto()
    try:
        model.ParseFromString((folder / "tokenizer.model").read_bytes())
    except Exception as error:  # protobuf's own DecodeError, of whichever implementation
        return f"tokenizer.model is no sentencepiece model ({error})"
    rules, trainer = model.normalizer_spec, model.trainer_spec
    if trainer.model_type != trainer.BPE or rules.precompiled_charsmap or rules.add_dummy_prefix or rules.remove_extra_whitespaces:
        return "tokenizer.model is not plain BPE (it normalises the text, or begins it with a space)"
    settings = read_json(folder / "tokenizer_config.json") if (folder / "tokenizer_config.json").exists() else {}
    bos = model.pieces[trainer.bos_id].piece if settings.get("add_bos_token", True) and trainer.bos_id >= 0 else None
    text = json.dumps(_tokenizer(model.pieces, bos, trainer.bos_id, bool(trainer.byte_fallback)), ensure_ascii=False)
    (folder / "tokenizer.json").write_text(text, encoding="utf-8")
    special = {
        f"{name}_token": model.pieces[i].piece for name in ("bos", "eos", "unk") if (i := getattr(trainer, f"{name}_id")) >= 0
    }
    defaults = special | {"pad_token": special.get("eos_token"), "clean_up_tokenization_spaces": False}
    write_json(folder / "tokenizer_config.json", defaults | settings | {"tokenizer_class": "PreTrainedTokenizerFast"})
    return None


def _tokenizer(pieces: Any, bos: str | None, bos_id: int, byte_fallback: bool) -> dict[str, Any]:
    """tokenizer.json as a table."""
    sequence = {"Sequence": {"id": "A", "type_id": 0}}
    begin = [{"SpecialToken": {"id": bos, "type_id": 0}}] if bos else []
    named = {bos: {"id": bos, "ids": [bos_id], "tokens": [bos]}} if bos else {}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [_added(i, piece) for i, piece in enumerate(pieces) if piece.type in (UNKNOWN, CONTROL, USER_DEFINED)],
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [*begin, sequence],
            "pair": [*begin, sequence, *begin, {"Sequence": {"id": "B", "type_id": 0}}],
            "special_tokens": named,
        },
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
            ],
        },
        "model": {
            "type": "BPE",
            "unk_token": next(piece.piece for piece in pieces if piece.type == UNKNOWN),
            "fuse_unk": True,
            "byte_fallback": byte_fallback,
            "vocab": {_key(i, piece, byte_fallback): i for i, piece in enumerate(pieces)},
            "merges": [list(pair) for pair in _merges(pieces)],
        },
    }


def _key(number: int, piece: Any, byte_fallback: bool) -> str:
    """A piece that sentencepiece never makes gets a name that no text is split into: unused ones, and NUL beside byte pieces."""
    unused = piece.type == UNUSED or (byte_fallback and piece.piece == "\0")
    return f"<unused piece {number}>" if unused else piece.piece


def _added(number: int, piece: Any) -> dict[str, Any]:
    """Found in the text before anything else; user-defined pieces with spaces, as they stand there."""
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": number, "content": piece.piece.replace("▁", " "), **flags, "special": piece.type != USER_DEFINED}


def _merges(pieces: Any) -> Iterator[tuple[str, str]]:
    """Every way to make a piece of two, the best scores first."""
    numbers = {piece.piece: i for i, piece in enumerate(pieces) if piece.type == NORMAL}
    found = []
    for text, number in numbers.items():
        for at in range(1, len(text)):
            left, right = numbers.get(text[:at]), numbers.get(text[at:])
            if left is not None and right is not None:
                found.append((-pieces[number].score, left, right, text[:at], text[at:]))
    return ((left, right) for *_, left, right in sorted(found))
