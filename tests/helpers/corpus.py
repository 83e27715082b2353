"""Small data shared by the tests of the data modules: texts with edge cases, and tokenizers trained here."""

import functools
import io
import json
from pathlib import Path

import sentencepiece
import tokenizers

REAL = Path(__file__).resolve().parents[3] / "shared" / "fixtures" / "tokenizers"

TRAPS = [
    "plain words and 1234 digits",
    "<s>literal control tokens</s> <unk> <|im_start|>",
    "  leading, trailing and\ttabs \n\n   \n\t\tnewlines  \n",
    "中文文本,以及 emoji 🦙 and é combining e\u0301",
    "a NUL \0 inside, and \u200b\ufeff zero width",
    "def f(x):\n    return {'k': [x ** 2]}\n",
    "x",
]


def words(count: int, start: int = 0) -> list[str]:
    """Ordinary short documents, all different."""
    return [
        f"Document {i} says that {i * 7919 % 1009} is not {i * 31 % 97}.\nIt ends here."
        for i in range(start, start + count)
    ]


@functools.cache
def _model(vocab_size: int) -> bytes:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(words(300) + (TRAPS * 3 if vocab_size >= 300 else [])),
        model_writer=model,
        model_type="bpe",
        vocab_size=vocab_size,
        byte_fallback=vocab_size >= 300,  # their pieces alone are 256
        split_digits=True,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        hard_vocab_limit=False,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()


def sentencepiece_dir(folder: Path, vocab_size: int = 400) -> Path:
    """A Hugging Face directory with tokenizer.model."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.model").write_bytes(_model(vocab_size))
    special = {"bos_token": "<s>", "eos_token": {"content": "</s>"}, "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(special))
    return folder


def json_dir(folder: Path) -> Path:
    """A Hugging Face directory with tokenizer.json: byte-level BPE, control tokens, one added plain token."""
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<unk>", "<s>", "</s>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    model.train_from_iterator(words(300), trainer)
    model.add_tokens(["ordinary_added"])
    folder.mkdir(parents=True, exist_ok=True)
    model.enable_truncation(4)
    model.save(str(folder / "tokenizer.json"))
    (folder / "special_tokens_map.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}))
    return folder


def big_vocabulary_dir(folder: Path, size: int = 70_000) -> Path:
    """A tokenizer whose ids do not fit 16 bits: the words w0, w1, ... by number."""
    vocabulary = {"<unk>": 0, "</s>": 1} | {f"w{i}": i for i in range(2, size)}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    folder.mkdir(parents=True, exist_ok=True)
    model.save(str(folder / "tokenizer.json"))
    (folder / "special_tokens_map.json").write_text(json.dumps({"eos_token": "</s>"}))
    return folder
