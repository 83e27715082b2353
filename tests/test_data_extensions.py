"""Toy extensions of the data path: a kind of data, a packer, a reader and a handler, each one class and one
registry entry."""

import json
from pathlib import Path

import numpy as np
import pytest
from helpers.corpus import sentencepiece_dir

from ascendspeed.config.schema import DataConfig
from ascendspeed.data import dataset
from ascendspeed.data.dataset import build_splits, dataset_facts, dataset_files, micro_batches
from ascendspeed.data.document import Document, Supervision
from ascendspeed.data.handlers import registry as handlers
from ascendspeed.data.handlers.base import EncoderConfig
from ascendspeed.data.handlers.pretrain import TextHandler
from ascendspeed.data.packing import registry as packers
from ascendspeed.data.packing.algorithms import FirstFit, split_contiguous
from ascendspeed.data.packing.base import Packer, StreamPosition
from ascendspeed.data.packing.packed_dataset import packed_samples
from ascendspeed.data.packing.rows import assemble_row
from ascendspeed.data.preprocess import preprocess
from ascendspeed.data.readers import registry as readers
from ascendspeed.data.readers.shard import FileReader, Shard, rows_to_batch
from ascendspeed.data.token_dataset import TokenDataset
from ascendspeed.utils.errors import UserError

SEED, VOCAB, SEQ = 7, 2048, 8


class ToyDataset(TokenDataset):
    """Documents 'first id, number of ids' in a .toy file; all but the first token is supervised."""

    description = "toy data"
    flags = ("min_length", "max_segment_length")
    has_loss_mask = True

    def __init__(self, path, min_length):
        self.prefix = path
        self._documents = [
            (first, count)
            for first, count in json.loads(Path(path).read_text())
            if count >= max(1, min_length)
        ]
        self.lengths = np.array([count for _, count in self._documents])
        self.file_bounds = np.array([0, len(self._documents)])

    @classmethod
    def match(cls, path):
        return path.endswith(".toy")

    @classmethod
    def open(cls, path, data, vocab_size):
        return cls(path, data.min_length)

    @classmethod
    def files(cls, path):
        return [path]

    @classmethod
    def facts(cls, path):
        return {"vocab_size": VOCAB}

    def samples(self, split, data, seed):
        return packed_samples(self, split, data, seed, FirstFit)

    def document(self, number):
        first, count = self._documents[number]
        return Document(np.arange(first, first + count, dtype=np.int32), np.arange(count) > 0)

    def supervision(self, numbers, length):
        lengths = np.minimum(self.lengths[numbers], length)
        zeros = np.zeros(len(numbers), np.int64)
        return Supervision(lengths - 1, zeros, zeros)


class PairsPacker(Packer):
    """Two documents to a row, each truncated to half of it."""

    name = "pairs"
    packs_streams = True
    stream_note = "two documents in each sample"

    def pack(self, lengths, row_length):
        packing = split_contiguous(np.full(len(lengths) // 2 * 2, row_length // 2), row_length)
        packing.stops[:] = np.minimum(packing.stops, np.asarray(lengths)[packing.documents])
        return packing

    def pack_next(self, get_document, position, row_length):
        parts, row = [], position.row
        for _ in range(2):
            row, document = get_document(row)
            parts.append((document, 0, min(len(document.tokens), row_length // 2)))
            row += 1
        return assemble_row(parts, row_length), StreamPosition(row, 0)


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """A path of toy data, with its kind registered."""
    monkeypatch.setattr(dataset, "DATASET_KINDS", (ToyDataset, *dataset.DATASET_KINDS))
    path = tmp_path / "a.toy"
    path.write_text(json.dumps([[100 * number, 2 + number % 5] for number in range(1, 13)]))
    return str(path)


def train(path, **options):
    data = DataConfig(**({"data_path": (path,), "seq_length": SEQ, "split": "1,0,0"} | options))
    return build_splits(data, SEED, VOCAB, ("train",))["train"]


def test_a_kind_of_data_is_a_class_and_an_entry(toy, monkeypatch):
    samples = train(toy)
    (batch,) = micro_batches(samples, 0, 2, 2)
    assert batch.tokens.shape == (2, SEQ)
    tokens = {int(t) for n in range(len(samples)) for t in samples.sample(n)[0]}
    assert tokens >= {100 * number for number in range(1, 13)}
    assert dataset_files(toy) == [toy]
    assert dataset_facts(toy) == {"vocab_size": VOCAB}
    assert len(train(toy, min_length=6)) < len(samples)  # its flag applies
    with pytest.raises(UserError, match="--strict is for data that are tokenized in training"):
        train(toy, strict=True)
    data = DataConfig(data_path=(toy,), seq_length=SEQ, split="1,0,0")
    small = build_splits(data, SEED, 1200, ("train",))["train"]
    with pytest.raises(UserError, match="the token id 1200, but the model's vocabulary has 1200 ids"):
        [small.sample(number) for number in range(len(small))]
    monkeypatch.undo()  # control: without the entry the path is unknown
    with pytest.raises(UserError, match=r"a\.toy: files of type \.toy cannot be read"):
        train(toy)


def test_a_packer_is_a_class_and_an_entry(toy, tmp_path, monkeypatch):
    default = [train(toy).sample(number)[0].tolist() for number in range(6)]
    monkeypatch.setattr(packers, "PACKERS", (*packers.PACKERS, PairsPacker))
    samples = train(toy, packing="pairs")
    assert len(samples) == 6
    assert [samples.sample(number)[0].tolist() for number in range(6)] != default  # control
    for number in range(6):
        firsts = [token for token in samples.sample(number)[0].tolist() if token % 100 == 0 and token]
        assert len(firsts) == 2
    with pytest.raises(
        UserError, match="belongs to --packing internevo-cut and internevo-whole, not to pairs"
    ):
        train(toy, packing="pairs", max_segment_length=4)
    rows = [{"instruction": f"Say {number}", "output": f"word {number} again"} for number in range(100)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    tokenizer = str(sentencepiece_dir(tmp_path / "tokenizer"))
    streamed = train(
        str(tmp_path / "a.jsonl"),
        packing="pairs",
        tokenizer_name_or_path=tokenizer,
        handler_name="GeneralInstructionHandler",
        seq_length=1024,
    )
    assert streamed.notes[0].endswith("two documents in each sample")
    positions = streamed.sample(3)[3].tolist()
    assert positions.count(0) == 3  # two documents and the unused end
    with pytest.raises(UserError, match="take first-fit or none or pairs"):
        train(
            str(tmp_path / "a.jsonl"),
            packing="internevo-cut",
            tokenizer_name_or_path=tokenizer,
            handler_name="GeneralInstructionHandler",
            seq_length=1024,
        )


class ShoutHandler(TextHandler):
    """Upper-case text of the column `word`."""

    keys = ("text",)
    required = ("word",)

    def texts(self, rows):
        return {"text": [word.upper() if isinstance(word, str) else word for word in rows["word"]]}


def read_words(shard, split):
    words = shard.path.read_text().split()
    yield rows_to_batch([(index, {"word": word}) for index, word in enumerate(words)], split)


WORDS = FileReader(
    lambda path: ["word"],
    lambda path, wanted: iter([Shard(path, weight=1)]),
    read_words,
    lambda path, location: f"word {location + 1}",
)


def test_a_reader_and_a_handler_are_an_entry_each(tmp_path, monkeypatch):
    (tmp_path / "a.words").write_text("one two three")
    tokenizer = sentencepiece_dir(tmp_path / "tokenizer")
    config = EncoderConfig(str(tokenizer), "ShoutHandler")
    with pytest.raises(
        UserError, match=r"unknown handler 'ShoutHandler'; .*There are: GeneralPretrainHandler"
    ):
        preprocess([tmp_path / "a.words"], str(tmp_path / "p"), config)
    monkeypatch.setitem(handlers.HANDLERS, "ShoutHandler", ShoutHandler)
    with pytest.raises(UserError, match=r"files of type \.words cannot be read; there are: \.parquet"):
        preprocess([tmp_path / "a.words"], str(tmp_path / "p"), config)
    monkeypatch.setitem(readers.READERS, ".words", WORDS)
    facts = preprocess([tmp_path / "a.words"], str(tmp_path / "p"), config)
    assert facts["text"]["documents"] == 3
    assert facts["text"]["bytes"] == len("ONETWOTHREE")
    assert len(train(f"{tmp_path}/p_text_document", seq_length=2)) >= 1
