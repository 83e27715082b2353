"""InternEvo's tokenized data: packings position by position, and errors by file and byte."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.launch import ROOT
from hypothesis import given
from hypothesis import strategies as st

from ascendspeed.config.schema import DataConfig
from ascendspeed.data.dataset import build_splits, dataset_files, open_dataset
from ascendspeed.data.document import Document
from ascendspeed.data.indexed.internevo import InternEvoDataset, convert
from ascendspeed.data.indexed.masked_pair import MaskedPair
from ascendspeed.data.packing.algorithms import split_contiguous
from ascendspeed.data.packing.internevo import SEED as SHUFFLED_BY
from ascendspeed.data.packing.internevo import InternEvoCut
from ascendspeed.data.packing.packed_dataset import PackedSamples
from ascendspeed.data.packing.registry import create_packer
from ascendspeed.utils.errors import UserError

SEED, VOCAB = 7, 1000
CONFIG = DataConfig()


def write(path, documents, columns=2, dtype=np.int64):
    """X.bin and X.bin.meta as InternEvo's tools write them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    meta, at = [], 0
    with path.open("wb") as file:
        for tokens in documents:
            line = json.dumps({"tokens": tokens}).encode() + b"\n"
            file.write(line)
            meta.append([at, len(tokens), 0][:columns])
            at += len(line)
    save(f"{path}.meta", np.array(meta, dtype))
    return str(path)


def save(name, array):
    with open(name, "wb") as file:
        np.save(file, array)


def config(path, row, **options):
    return DataConfig(**({"data_path": (str(path),), "seq_length": row, "split": "1,0,0"} | options))


def train(path, row, **options):
    return build_splits(config(path, row, **options), SEED, VOCAB, ("train",))["train"]


def as_lists(sample):
    """Tokens, labels with -100 where they do not count, positions."""
    tokens, labels, counts, positions = sample
    return [tokens.tolist(), torch.where(counts > 0, labels, -100).tolist(), positions.tolist()]


def in_file_order(samples, rows):
    """The rows of the first epoch as they were packed."""
    order = np.random.RandomState(SEED).permutation(rows)
    rows_in_order = [as_lists(samples.sample(index)) for index in range(rows)]
    return [rows_in_order[index] for index in np.argsort(order)]


def naive_packs(
    documents, row, segment, across_documents, shuffled_by=SHUFFLED_BY, predicts_across_packs=True
):
    """The packs of one file, position by position. `predicts_across_packs`: the last position
    of a pack predicts the next token of its document."""
    order = np.random.RandomState(shuffled_by).permutation(len(documents))
    flat = [(documents[d], index) for d in order for index in range(len(documents[d]))]
    packs = []
    for start in range(0, len(flat) - row + 1, row):
        tokens, labels, positions = [], [], []
        for at in range(row):
            document, index = flat[start + at]
            following = document[index + 1] if index + 1 < len(document) else -100
            beyond = at + 1 == row and (across_documents or not predicts_across_packs)
            since = min(at, index)  # the beginning of the document, or of the pack
            tokens.append(abs(document[index]))
            labels.append(following if following > 0 and not beyond else -100)
            positions.append((at if across_documents else since) % segment)
        packs.append([tokens, labels, positions])
    return packs


# [1, 2] [3, 4] [5, 6, 7] [8 ... 13], in this order
FOUR = [[1, 2], [3, 4], [5, 6, 7], [8, 9, 10, 11, 12, 13]]
N = -100
BY_HAND = {
    ("internevo-cut", 5, 3): [
        [[1, 2, 3, 4, 5], [2, N, 4, N, 6], [0, 1, 0, 1, 0]],
        [[6, 7, 8, 9, 10], [7, N, 9, 10, 11], [0, 1, 0, 1, 2]],
    ],
    ("internevo-cut", 5, 2): [
        [[1, 2, 3, 4, 5], [2, N, 4, N, 6], [0, 1, 0, 1, 0]],
        [[6, 7, 8, 9, 10], [7, N, 9, 10, 11], [0, 1, 0, 1, 0]],
    ],
    ("internevo-whole", 6, 3): [
        [[1, 2, 3, 4, 5, 6], [2, N, 4, N, 6, N], [0, 1, 2, 0, 1, 2]],
        [[7, 8, 9, 10, 11, 12], [N, 9, 10, 11, 12, N], [0, 1, 2, 0, 1, 2]],
    ],
}


@pytest.mark.parametrize(("name", "row", "segment"), BY_HAND)
def test_packs_by_hand(tmp_path, name, row, segment):
    order = np.random.RandomState(1024).permutation(4)
    stored = [
        FOUR[index] for index in np.argsort(order)
    ]  # so that shuffling brings them into the order above
    path = write(tmp_path / "x.bin", stored)
    samples = train(path, row, packing=name, max_segment_length=segment)
    assert len(samples) == 2
    assert in_file_order(samples, 2) == BY_HAND[name, row, segment]


TOKENS = st.lists(st.integers(-99, 99), min_size=1, max_size=30)


class MemoryDocuments:
    """Documents in memory."""

    prefix = "memory"

    def __init__(self, documents):
        self._documents = documents
        self.lengths = np.array([len(document) for document in documents])
        self.file_bounds = np.array([0, len(documents)])

    def document(self, number):
        tokens = np.array(self._documents[number])
        return Document(np.abs(tokens).astype(np.int32), tokens > 0)


@given(st.lists(TOKENS, min_size=1, max_size=25), st.integers(1, 8), st.integers(1, 3), st.booleans())
def test_packs_are_internevos(documents, segment, segments, across_documents):
    row = segment * segments
    expected = naive_packs(documents, row, segment, across_documents)
    options = DataConfig(
        seq_length=row,
        max_segment_length=segment,
        packing="internevo-whole" if across_documents else "internevo-cut",
    )
    source = (
        MemoryDocuments(documents),
        range(len(documents)),
        row,
        create_packer(options, InternEvoCut),
        SEED,
    )
    if not expected:
        with pytest.raises(UserError, match="none fills a row or has a supervised token"):
            PackedSamples(*source)
        return
    samples = PackedSamples(*source)
    assert samples.samples_per_epoch == len(expected)
    assert samples.filled == 1
    assert in_file_order(samples, len(expected)) == expected


def test_controls():
    """The comparison detects another order, and labels that stop at the end of a pack."""
    documents = [[10 * d + t for t in range(1, 9)] for d in range(9)]
    packs = in_file_order(
        PackedSamples(
            MemoryDocuments(documents),
            range(9),
            5,
            create_packer(DataConfig(seq_length=5), InternEvoCut),
            SEED,
        ),
        14,
    )
    assert packs == naive_packs(documents, 5, 5, False)
    assert packs != naive_packs(documents, 5, 5, False, shuffled_by=1023)
    assert packs != naive_packs(documents, 5, 5, False, predicts_across_packs=False)
    assert packs != naive_packs(documents, 5, 5, True)


def test_a_folder_is_packed_file_by_file(tmp_path):
    files = {
        "en/a": [[d * 9 + t + 1 for t in range(7)] for d in range(11)],
        "en/b": [[500, -501]],
        "cn/c": [[600 + t] for t in range(20)],
    }
    for name, documents in files.items():
        write(tmp_path / f"{name}.bin", documents)
    (tmp_path / "README.md").write_text("no data")
    expected = [
        pack for name in ("cn/c", "en/a", "en/b") for pack in naive_packs(files[name], 4, 4, False)
    ]  # sorted
    samples = train(tmp_path, 4)  # their packing is the default for their data
    assert in_file_order(samples, len(expected)) == expected
    assert dataset_files(str(tmp_path))[0] == tmp_path / "cn" / "c.bin"
    assert [len(m) for m in samples.notes] == [len(samples.notes[0])]
    assert "3 tokens left out, as they fill no row" in samples.notes[0]  # 77 % 4 and 2
    linked = tmp_path.parent / f"{tmp_path.name}-linked"
    linked.mkdir()
    (linked / "train").symlink_to(tmp_path)
    (tmp_path / "loop").symlink_to(tmp_path)
    assert in_file_order(train(linked, 4), len(expected)) == expected


def test_the_first_epoch_is_internevos_with_its_seed(tmp_path):
    documents = [[d * 9 + t + 1 for t in range(7)] for d in range(30)]
    samples = build_splits(config(write(tmp_path / "x.bin", documents), 6), 1024, VOCAB, ("train",))["train"]
    packs, order = naive_packs(documents, 6, 6, False), np.arange(35)
    np.random.RandomState(1024).shuffle(order)
    assert [as_lists(samples.sample(index)) for index in range(35)] == [packs[number] for number in order]


def test_unsupervised_tokens(tmp_path):
    """Negative ids, and id 0, which has no sign: InternEvo supervises ids above 0."""
    path = write(tmp_path / "x.bin", [[1, -5, -6, 7, 0, 8, 2]])
    document = InternEvoDataset(path).document(0)
    assert document.tokens.tolist() == [1, 5, 6, 7, 0, 8, 2]
    assert document.loss_mask.tolist() == [True, False, False, True, False, True, True]
    for name in ("none", "first-fit", "internevo-cut"):
        assert as_lists(train(path, 7, packing=name).sample(0)) == [
            [1, 5, 6, 7, 0, 8, 2],
            [N, N, 7, N, 8, 2, N],
            list(range(7)),
        ]


def test_three_columns_wherever_the_length_stands(tmp_path):
    documents = [[1, 2, 3], [4, 5]]
    for order in ([0, 1, 2], [0, 2, 1]):
        write(tmp_path / "x.bin", documents, columns=3)
        table = np.load(tmp_path / "x.bin.meta")
        save(f"{tmp_path}/x.bin.meta", table[:, order])
        dataset = InternEvoDataset(str(tmp_path / "x.bin"))
        assert dataset.lengths.tolist() == [3, 2]
        assert dataset.document(1).tokens.tolist() == [4, 5]


def test_short_documents_are_left_out_before_all_else(tmp_path):
    documents = [list(range(1, n + 1)) for n in (3, 9, 2, 5, 1, 7)]
    path = write(tmp_path / "x.bin", documents)
    expected = naive_packs([document for document in documents if len(document) >= 5], 3, 3, False)
    assert in_file_order(train(path, 3, min_length=5), len(expected)) == expected
    with pytest.raises(UserError, match="none of its 6 documents has 10 tokens; lower --min-length"):
        train(path, 3, min_length=10)


def test_validation_data_of_their_own(tmp_path):
    for name, first in (("train", 1), ("valid", 500)):
        write(
            tmp_path / name / "en" / "dataset.bin",
            [[first + d, first + d + 1, first + d + 2] for d in range(12)],
        )
    options = config(tmp_path / "train", 6, split="949,50,1", valid_data_path=(str(tmp_path / "valid"),))
    splits = build_splits(options, SEED, VOCAB, ("train", "valid"))
    for name, low in (("train", 1), ("valid", 500)):
        rows = [splits[name].sample(index)[0] for index in range(len(splits[name]))]
        assert len(rows) == 6  # all 36 tokens
        assert all(low <= int(row.min()) and int(row.max()) < low + 20 for row in rows)
    with pytest.raises(UserError, match="there is no test split then"):
        build_splits(options, SEED, VOCAB, ("test",))
    parts = build_splits(config(tmp_path / "train", 6, split="1,1,0"), SEED, VOCAB, ("train", "valid"))
    tokens = [
        {int(t) for index in range(len(samples)) for t in samples.sample(index)[0]}
        for samples in parts.values()
    ]
    assert [len(part) for part in parts.values()] == [3, 3]
    assert tokens[0] != tokens[1]


def test_a_blend(tmp_path):
    for name, first in (("a", 1), ("b", 500)):
        write(tmp_path / f"{name}.bin", [[first + d, first + d + 1] for d in range(40)])
    path = ("3", str(tmp_path / "a.bin"), "1", str(tmp_path / "b.bin"))
    samples = build_splits(DataConfig(data_path=path, seq_length=4, split="1,0,0"), SEED, VOCAB, ("train",))
    firsts = [int(samples["train"].sample(n)[0][0]) for n in range(80)]
    assert sum(first >= 500 for first in firsts) == 20


def test_converted_data_are_the_same(tmp_path):
    rng = np.random.default_rng(0)
    documents = [
        (rng.integers(1, 99, n) * rng.choice([1, 1, -1], n)).tolist() for n in rng.integers(2, 40, 60)
    ]
    # A masked pair omits documents without supervised tokens; finding them here would mean reading all lines.
    for document in documents:
        document[1] = abs(document[1])
    path, prefix = write(tmp_path / "en" / "x.bin", documents), str(tmp_path / "out" / "converted")
    command = [
        sys.executable,
        "tools/convert_internevo_data.py",
        "--input",
        str(tmp_path / "en"),
        "--output-prefix",
        prefix,
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "60 documents" in done.stdout
    assert isinstance(open_dataset(prefix, CONFIG, 99), MaskedPair)
    for name in ("internevo-cut", "internevo-whole", "first-fit", "none"):
        internevo, converted = train(path, 16, packing=name), train(prefix, 16, packing=name)
        assert len(internevo) == len(converted)
        assert [as_lists(internevo.sample(n)) for n in range(2 * len(internevo))] == [
            as_lists(converted.sample(n)) for n in range(2 * len(internevo))
        ]
    with pytest.raises(UserError, match=r"token id \d+, but the model's vocabulary has 50 ids"):
        open_dataset(prefix, CONFIG, 50)
    again = subprocess.run([*command, "--min-length", "100"], cwd=ROOT, capture_output=True, text=True)
    assert again.returncode == 2
    assert again.stderr.count("\n") == 1
    with pytest.raises(UserError, match=r"exists, and is not made from these files with these settings"):
        convert(str(tmp_path / "en"), prefix, min_length=2)
    assert train(prefix, 16)  # the old files are unchanged
    assert convert(str(tmp_path / "en"), prefix)["documents"] == 60  # the same command again
    assert convert(str(tmp_path / "en"), prefix, min_length=2, overwrite=True)["documents"] <= 60
    with pytest.raises(UserError, match=r"neither a \.bin"):
        convert(str(tmp_path / "out"), prefix)


def meta_of(change):
    def damage(path):
        table = np.load(f"{path}.meta")
        save(f"{path}.meta", change(table))

    return damage


def bytes_of(change):
    def damage(path):
        Path(path).write_bytes(change(Path(path).read_bytes()))

    return damage


def plus(table, row, column, by):
    table[row, column] += by
    return table


DAMAGED = {
    "no meta of a file": (lambda path: os.unlink(f"{path}.meta"), r"there is no x\.bin\.meta beside it"),
    "text": (
        lambda path: Path(f"{path}.meta").write_text("[[0, 3]]"),
        r"x\.bin\.meta is not a numpy array",
    ),
    "cut off": (lambda path: os.truncate(f"{path}.meta", 140), r"x\.bin\.meta is not a numpy array"),
    "empty": (lambda path: os.truncate(f"{path}.meta", 0), r"x\.bin\.meta is not a numpy array"),
    "objects": (
        meta_of(lambda table: table.astype(object)),
        r"x\.bin\.meta is not a numpy array: .*pickled objects",
    ),
    "one column": (
        meta_of(lambda table: table[:, :1]),
        r"x\.bin\.meta is int64 \[20, 1\], not integers",
    ),
    "floats": (meta_of(lambda table: table.astype(float)), r"x\.bin\.meta is float64"),
    "no rows": (meta_of(lambda table: table[:0]), r"x\.bin\.meta is int64 \[0, 2\]"),
    "negative": (meta_of(lambda table: plus(table, 0, 0, -1)), "offsets that do not ascend"),
    "order": (meta_of(lambda table: table[::-1]), "offsets that do not ascend"),
    "beyond": (
        meta_of(lambda table: plus(table, -1, 0, 10**6)),
        "offsets that do not ascend within the 500 bytes",
    ),
    "too long": (meta_of(lambda table: plus(table, 3, 1, 10**6)), "more tokens than their lines could hold"),
    "first length": (
        meta_of(lambda table: plus(table, 0, 1, 1)),
        r"x\.bin, byte 0: the line has 3 tokens and x\.bin\.meta says 4",
    ),
    "last offset": (meta_of(lambda table: plus(table, -1, 0, 1)), r"x\.bin, byte 476: no line begins here"),
    "bin cut off": (bytes_of(lambda content: content[:490]), "byte 475: not a line"),
    "bin inside": (bytes_of(lambda content: content.replace(b"tokens", b"t0kens", 1)), r"byte 0: not a line"),
    "no list": (
        bytes_of(lambda content: content.replace(b"[11, 12, 13]", b'"1, 12, 13"', 1)),
        "byte 0: its tokens are not a list",
    ),
    "halves": (
        bytes_of(lambda content: content.replace(b"11,", b"1.5", 1).replace(b"1.5 12", b"1.5,2", 1)),
        "byte 0: ",
    ),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_data(tmp_path, name):
    path = write(tmp_path / "x.bin", [[11, 12, 13]] * 20)
    write(tmp_path / "y.bin", [[1, 2, 3]])
    damage, message = DAMAGED[name]
    damage(path)
    with pytest.raises(UserError, match=message) as caught:
        train(tmp_path, 3)
    assert "\n" not in str(caught.value)


def test_what_is_not_looked_at_in_the_beginning_is_seen_when_it_is_read(tmp_path):
    lines = 200  # all 25 bytes long
    path = write(tmp_path / "x.bin", [[11, 12, 13]] * lines)
    with open(path, "r+b") as file:
        file.seek(25 * 17)
        file.write(b'{"tokens": [11, 12    ]}\n')
    samples = train(path, 3)
    with pytest.raises(UserError, match=r"x\.bin, byte 425: the line has 2 tokens and x\.bin\.meta says 3"):
        [samples.sample(index) for index in range(lines)]
    os.truncate(path, 100)  # under an open file
    with pytest.raises(UserError, match=r"x\.bin, byte \d+: "):
        [samples.sample(index) for index in range(lines)]


def test_ids_beyond_the_vocabulary(tmp_path):
    path = write(tmp_path / "x.bin", [[1, 2, 3], [4, -VOCAB, 6]])
    with pytest.raises(
        UserError, match=rf"x\.bin, byte 22: token id {VOCAB}, but the vocabulary has {VOCAB} ids"
    ):
        train(path, 3)
    build_splits(config(path, 3), SEED, VOCAB + 1, ("train",))


def test_flags_that_mean_nothing(tmp_path):
    path = write(tmp_path / "x.bin", [[1, 2, 3, 4]] * 5)
    for options, message in (
        (
            {"packing": "none", "max_segment_length": 2},
            "--max-segment-length 2 belongs to --packing internevo-cut and",
        ),
        (
            {"packing": "internevo-whole", "max_segment_length": 3},
            "--seq-length 4 is not a multiple of --max-segment-length 3",
        ),
        (
            {"packing": "internevo-cut", "seq_length": 30},
            "none fills a row or has a supervised token at --seq-length 30",
        ),
    ):
        with pytest.raises(UserError, match=message):
            train(path, options.pop("seq_length", 4), **options)


def test_a_row_of_many_long_pieces_is_fast_to_pack():
    """No loop over tokens: a billion of them, in documents of any length."""
    lengths = np.random.default_rng(0).integers(1, 20_000, 100_000)
    packing = split_contiguous(lengths, 8192, 4096)
    assert packing.tokens == len(packing) * 8192 == int(lengths.sum()) // 8192 * 8192
    assert (packing.stops - packing.starts).max() <= 4096
    assert ((packing.stops - packing.starts) > 0).all()
