"""Token ids of config.json and generation_config.json, brought into agreement with the tokenizer."""

from collections.abc import Mapping
from typing import Any

from ascendspeed.tokenization.declared_tokens import declared_tokens, token_text
from ascendspeed.tokenization.tokenizer import Tokenizer

TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
NONE = -1
"""Id that published files (LLaMA-1's `pad_token_id`) write for "no such token"."""


def without_placeholders(origin: str, table: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Returns the table without ids of -1, which mean "none", and a note for each."""
    dropped = [name for name in TOKEN_IDS if type(table.get(name)) is int and table[name] == NONE]
    notes = [f"{origin}: {name} = {NONE} means that there is none: the entry is left out" for name in dropped]
    return {name: value for name, value in table.items() if name not in dropped}, notes


def tokenizer_ids(tokenizer: Tokenizer, vocab_size: int) -> dict[str, int]:
    """Returns the ids of `TOKEN_IDS` that the tokenizer's files name and the model has a row for."""
    pad = declared_tokens(tokenizer.path)[0].get("pad_token")
    ids = {
        "bos_token_id": tokenizer.bos,
        "eos_token_id": tokenizer.eos,
        "pad_token_id": None if pad is None else tokenizer.pad,
    }
    return {name: token for name, token in ids.items() if token is not None and token < vocab_size}


def reconcile(
    origin: str, table: Mapping[str, Any], tokenizer: Tokenizer, vocab_size: int
) -> tuple[dict[str, Any], list[str]]:
    """Returns the table with the tokenizer's ids where it contradicts them, and a note for each change.

    An `eos_token_id` of several ids agrees if the tokenizer's is one of them; further stop tokens of a chat
    model stay. Ids that the tokenizer does not name stay as they are.
    """
    result, notes = dict(table), []
    named = tokenizer_ids(tokenizer, vocab_size)
    for name, token in named.items():
        stated = table.get(name)
        ids = stated if isinstance(stated, list) else [stated]
        if stated is None or token in ids:
            continue
        stops = _stop_tokens(ids, tokenizer, named) if name == "eos_token_id" else []
        result[name] = [token, *stops] if stops else token
        notes.append(
            f"{origin}: {name} = {stated!r}, but the tokenizer in {tokenizer.path} has {token}: "
            f"{result[name]!r} is written"
        )
    return result, notes


def _stop_tokens(ids: list[Any], tokenizer: Tokenizer, named: Mapping[str, int]) -> list[int]:
    """Returns those of `ids` that are added tokens (the end of a turn), and not BOS, PAD or UNK."""
    unknown = declared_tokens(tokenizer.path)[0].get("unk_token")
    others = {named.get("bos_token_id"), named.get("pad_token_id")}
    if unknown is not None:
        others.add(tokenizer.token_to_id(token_text(unknown)))
    added = set(tokenizer.added_tokens.values()) - others
    return [token for token in ids if token in added]
