"""Tokens and log-probabilities as the API returns them."""

from collections.abc import Sequence
from typing import Any

from ascendspeed.inference.serving.request import TokenChoice
from ascendspeed.tokenization.tokenizer import Tokenizer


def token_bytes(tokenizer: Tokenizer, token: int) -> bytes:
    """Returns the bytes that a token adds to the text; none for control tokens."""
    if token >= tokenizer.vocab_size:
        return b""
    data = tokenizer.token_bytes(token)
    return tokenizer.decode([token]).encode() if data is None else data


def token_text(tokenizer: Tokenizer, token: int) -> str:
    """Returns a token as text, different for different tokens as far as possible: clients use it as a key.

    The bytes of an incomplete character have OpenAI's form `bytes:\\xe2\\x80`; a token without text, its id.
    """
    data = token_bytes(tokenizer, token)
    try:
        return data.decode() or f"<token {token}>"
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def chat_logprobs(tokenizer: Tokenizer, tokens: Sequence[TokenChoice]) -> dict[str, Any]:
    """Returns the `logprobs` object of chat completions."""

    def entry(token: int, logprob: float) -> dict[str, Any]:
        data = token_bytes(tokenizer, token)
        return {"token": token_text(tokenizer, token), "logprob": logprob, "bytes": list(data)}

    content = []
    for choice in tokens:
        best = [entry(token, logprob) for token, logprob in choice.top]
        content.append(entry(choice.token, choice.logprob) | {"top_logprobs": best})
    return {"content": content, "refusal": None}
