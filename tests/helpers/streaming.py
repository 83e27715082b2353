"""Text and tokenizers on disk, and their samples tokenized on the fly."""

import json

import datasets
import pytest

from ascendspeed.config.schema import DataConfig
from ascendspeed.data.dataset import build_splits
from helpers.corpus import sentencepiece_dir, words

SEED, VOCAB, SEQ, LONG, ROWS = 7, 2048, 48, 160, 300
BAD = {17: {"text": None}, 40: {"text": 5}, 41: {"other": "x"}, 90: {"text": "  "}}


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory):
    return str(sentencepiece_dir(tmp_path_factory.mktemp("tokenizer") / "t"))


@pytest.fixture(scope="session")
def chat_tokenizer(tmp_path_factory):
    folder = sentencepiece_dir(tmp_path_factory.mktemp("tokenizer") / "chat")
    (folder / "added_tokens.json").write_text(json.dumps({"<|im_start|>": 1000, "<|im_end|>": 1001}))
    (folder / "config.json").write_text('{"model_type": "internlm2"}')
    return str(folder)


@pytest.fixture
def text(tmp_path):
    """Rows of text, four of them bad, one blank and one broken line at the end."""
    lines = [json.dumps(BAD.get(i, {"text": word})) for i, word in enumerate(words(ROWS - 2))]
    (tmp_path / "a.jsonl").write_text("\n".join([*lines, "", "{broken"]) + "\n")
    return str(tmp_path / "a.jsonl")


@pytest.fixture
def chats(tmp_path):
    """Alpaca rows of very different lengths, saved by the library."""
    rows = [
        {"instruction": f"Say {i} times", "input": "", "output": f"word {i} " * (1 + i * 37 % 11)}
        for i in range(200)
    ]
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "chats")
    return str(tmp_path / "chats")


def config(path, tokenizer, **options):
    return DataConfig(
        **({"data_path": (path,), "seq_length": SEQ, "tokenizer_name_or_path": tokenizer} | options)
    )


def opened(path, tokenizer, name="train", seed=SEED, **options):
    from ascendspeed.training import data_setup  # imports Megatron-core

    data = data_setup.with_chat_template(config(path, tokenizer, **options))
    return build_splits(data, seed, VOCAB, (name,))[name]


def as_lists(sample):
    return [column.tolist() for column in sample]
