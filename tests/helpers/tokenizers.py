"""Sentencepiece tokenizers trained for tests."""

import inspect
import io
import json
from pathlib import Path

import sentencepiece

from ascendspeed.conversion.tokenizer import sentencepiece_bpe
from helpers.corpus import TRAPS, words

CHAT = {
    "<|plugin|>": 141,
    "<|interpreter|>": 142,
    "<|action_end|>": 143,
    "<|action_start|>": 144,
    "<|im_end|>": 145,
    "<|im_start|>": 146,
}


PLAIN = {
    "model_type": "bpe",
    "byte_fallback": True,
    "split_digits": True,
    "normalization_rule_name": "identity",
    "add_dummy_prefix": False,
    "remove_extra_whitespaces": False,
    "allow_whitespace_only_pieces": True,
    "vocab_size": 900,
}


TRAINED: dict[str, bytes] = {}
"""Models by their settings, for all test files of a process."""


def trained(**settings) -> bytes:
    """A small tokenizer.model, trained on code and a little of everything, once for each setting."""
    if (key := repr(sorted(settings.items()))) in TRAINED:
        return TRAINED[key]
    model = io.BytesIO()
    library = [line.rstrip("\n") + "\n" for line in inspect.getsource(inspect).splitlines()]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(
            [*library, *TRAPS * 3, *words(100), "    \n\n\n    \t\t x", "哈哈哈哈 --- ==== ...."]
        ),
        model_writer=model,
        num_threads=1,
        minloglevel=2,
        **PLAIN | settings,
    )
    TRAINED[key] = model.getvalue()
    return TRAINED[key]


def folder_with(folder: Path, model: bytes, config: dict | None = None, **files: dict) -> Path:
    """A directory with tokenizer.model and JSON files."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.model").write_bytes(model)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    for name, values in ({} if config is None else {"tokenizer_config": config} | files).items():
        (folder / f"{name}.json").write_text(json.dumps(values))
    return folder


def stock(folder: Path, **settings):
    """Loads the tokenizer as a user of transformers does."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, trust_remote_code=False, **settings)


def special(model: bytes) -> dict[str, int]:
    """Tokens declared when no file declares any: BOS, EOS and UNK of the sentencepiece model."""
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    return {processor.id_to_piece(i): i for i in (processor.bos_id(), processor.eos_id(), processor.unk_id())}


def chat_files(model: bytes) -> dict[str, dict]:
    """The JSON files of a chat model of v2: names over the unused pieces, and a template."""
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    numbers = {name: processor.piece_to_id(f"[UNUSED_TOKEN_{unused}]") for name, unused in CHAT.items()}
    flags = dict.fromkeys(("lstrip", "rstrip", "single_word", "normalized"), False)
    decoder = {
        str(i): {"content": name, **flags, "special": True}
        for name, i in {**special(model), **numbers}.items()
    }
    config = {
        "add_bos_token": True,
        "added_tokens_decoder": decoder,
        "additional_special_tokens": list(CHAT),
        "bos_token": "<s>",
        "chat_template": "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{{ m.content }}<|im_end|>\n{% endfor %}",
        "eos_token": "</s>",
        "legacy": False,
        "tokenizer_class": "InternLM2Tokenizer",
        "unk_token": "<unk>",
    }
    return {"config": config, "added_tokens": numbers}


def unused(proto) -> None:
    next(p for p in proto.pieces if p.piece == "self").type = sentencepiece_bpe.UNUSED
