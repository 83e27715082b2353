"""Comparison of a tokenizer's ids with the rows of a model's embedding."""

from ascendspeed.tokenization.tokenizer import Tokenizer
from ascendspeed.utils.errors import UserError
from ascendspeed.utils.text import shorten_list


def check_vocab_size(tokenizer: Tokenizer, rows: int, too_large: str) -> list[str]:
    """Returns notes about added tokens that the model has no row for, but that text never becomes.

    `too_large`: error for a tokenizer whose own vocabulary is larger than the `rows` of the embedding. Raises
    `UserError` with it, or with the added tokens that a text may become.
    """
    if tokenizer.vocab_size <= rows:
        return []
    added = {text: number for text, number in tokenizer.added_tokens.items() if number >= rows}
    beyond = shorten_list([f"{text!r} = {number}" for text, number in added.items()], 3)
    if tokenizer.base_vocab_size > rows or not added:
        raise UserError(too_large)
    used = {*tokenizer.ids_from_text, tokenizer.bos, tokenizer.eos}
    if used & set(added.values()):
        raise UserError(
            f"the tokenizer in {tokenizer.path} adds {beyond}, but the model's vocabulary has {rows} ids "
            f"(0 to {rows - 1}): remove these tokens from added_tokens.json and tokenizer_config.json there, "
            f"or give the model that was trained with them"
        )
    return [
        f"the tokenizer in {tokenizer.path} adds {beyond}, beyond the {rows} ids of the model; "
        f"no text becomes such a token"
    ]
