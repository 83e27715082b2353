"""Encoders of instruction data over small tokenizers, and rows for them."""

import pytest

from ascendspeed.data.handlers.base import EncoderConfig
from ascendspeed.data.tokenize import DocumentEncoder
from helpers.chat import KINDS


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Tokenizers of every kind: small ones trained here, and the published ones if they exist."""
    folders = {name: make(tmp_path_factory.mktemp("instructions") / name) for name, make in KINDS.items()}
    return {name: folder for name, folder in folders.items() if folder.is_dir()}


def create_encoder(folders, name, handler, **options):
    if name not in folders:
        pytest.skip("no real tokenizers beside the repository")
    return DocumentEncoder(EncoderConfig(str(folders[name]), handler, **options))


def encode_documents(encoder, *rows):
    """The documents of rows."""
    columns = {name: [row.get(name) for row in rows] for name in encoder.handler.columns}
    return encoder.encode(columns)["packed"].documents


TURNS = [("hello", "Hi there"), ("2+2?", "4")]
SHAREGPT, OPENAI = (
    [{role: who, content: text} for turn in TURNS for who, text in zip(names, turn, strict=True)]
    for role, content, names in (
        ("from", "value", ("human", "gpt")),
        ("role", "content", ("user", "assistant")),
    )
)
