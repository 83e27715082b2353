import hashlib
import json
import threading
from itertools import pairwise

import numpy as np
import pytest
import torch
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.indexed_dataset import IndexedDataset
from megatron.core.datasets.utils import Split

from ascendspeed.config.schema import DataConfig
from ascendspeed.data import dataset
from ascendspeed.data.dataset import build_splits, micro_batches, parse_blend
from ascendspeed.data.indexed import epoch
from ascendspeed.data.indexed.epoch import NoTokenizer, load_or_build
from ascendspeed.data.indexed.megatron_pair import PairWriter, pair_file
from ascendspeed.data.splits import SPLITS, split_range
from ascendspeed.utils.errors import UserError

SEQ, SEED, VOCAB = 16, 7, 50_000


def write(prefix, count, start=0, seed=0):
    """Documents of 1 to 40 ids; all ids of the data set are different, so that a token identifies its
    document."""
    lengths = np.random.default_rng(seed).integers(1, 41, count).astype(np.int32)
    tokens = np.arange(start, start + lengths.sum(), dtype=np.int32)
    with PairWriter(prefix, np.dtype(np.uint16)) as writer:
        writer.add(tokens, lengths)
        writer.commit({"tokens": writer.tokens, "max_token": int(tokens.max())})
    return [part.tolist() for part in np.split(tokens, np.cumsum(lengths)[:-1])]


@pytest.fixture
def prefix(tmp_path):
    write(tmp_path / "a", 200)
    return str(tmp_path / "a")


def train(prefix, seed=SEED, **options):
    return build_splits(
        DataConfig(**({"data_path": (prefix,), "seq_length": SEQ} | options)), seed, VOCAB, ("train",)
    )["train"]


def tokens_of(batches):
    return torch.cat([b.tokens for b in batches]).tolist()


def expected_samples(documents, seed, passes):
    """Samples of some epochs: shuffled documents, concatenated, split and shuffled again."""
    samples_by_epoch = []
    for number in range(passes):
        random = np.random.RandomState(seed + number)
        order = np.arange(len(documents))
        random.shuffle(order)
        row = [token for d in order for token in documents[d]]
        samples = [row[at : at + SEQ + 1] for at in range(0, len(row) - SEQ, SEQ)]
        order = np.arange(len(samples))
        random.shuffle(order)
        samples_by_epoch += [samples[p] for p in order]
    return samples_by_epoch


def test_samples_are_shuffled_documents_split_epoch_after_epoch(tmp_path):
    documents = write(tmp_path / "a", 60)
    samples = train(str(tmp_path / "a"), split="1,0,0")
    expected = expected_samples(documents, SEED, 3)
    assert len(expected) == 3 * len(samples)
    for number, row in enumerate(expected):
        tokens, labels, mask, positions = samples.sample(number)
        assert tokens.tolist() == row[:-1]
        assert labels.tolist() == row[1:]
        assert mask.tolist() == [1.0] * SEQ
        assert positions.tolist() == list(range(SEQ))
        assert {t.dtype for t in (tokens, labels, positions)} == {torch.int64}
    assert expected_samples(documents, SEED + 1, 1) != expected[: len(samples)]  # control: the seed matters
    assert (
        expected[: len(samples)] != expected[len(samples) : 2 * len(samples)]
    )  # and no epoch is like the one before


def test_an_epoch_equals_megatrons(prefix, tmp_path):
    def megatron_epoch(num_samples, seed=SEED):
        config = GPTDatasetConfig(
            random_seed=seed,
            sequence_length=SEQ,
            split="1,0,0",
            blend=([prefix], None),
            path_to_cache=str(tmp_path / "cache"),
            tokenizer=NoTokenizer(),
            reset_position_ids=False,
            reset_attention_mask=False,
            eod_mask_loss=False,
        )
        documents = np.arange(200, dtype=np.int32)
        return GPTDataset(IndexedDataset(prefix), prefix, documents, num_samples, Split.train, config)

    samples = train(prefix, split="1,0,0")
    for number in (0, 1):
        reference = megatron_epoch(None, SEED + number)
        assert len(reference) == len(samples)
        for index in range(len(reference)):
            assert (
                samples.sample(number * len(reference) + index)[0].tolist()
                == reference[index]["tokens"].tolist()
            )
    # control: built for as many samples as a run asks for, what comes first depends on the length of the run
    firsts = {tuple(megatron_epoch(count)[0]["tokens"].tolist()) for count in (100, 1000, 5000)}
    assert len(firsts) == 3


def test_splits_are_megatrons(prefix, tmp_path):
    config = GPTDatasetConfig(
        random_seed=SEED,
        sequence_length=SEQ,
        split="900,70,30",
        blend=([prefix], None),
        path_to_cache=str(tmp_path / "cache"),
        tokenizer=NoTokenizer(),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
    )
    references = BlendedMegatronDatasetBuilder(GPTDataset, [None, None, None], lambda: True, config).build()
    samples = build_splits(DataConfig(data_path=(prefix,), seq_length=SEQ, split="900,70,30"), SEED, VOCAB)
    assert list(samples) == ["train", "valid", "test"]
    for name, reference in zip(samples, references, strict=True):
        assert len(samples[name]) == len(reference)
        assert [samples[name].sample(i)[0].tolist() for i in range(len(reference))] == [
            x["tokens"].tolist() for x in reference
        ]


@pytest.mark.parametrize("split", ["949,50,1", "100", "0.8,0.2", "1,1,1", "0,0,5"])
def test_every_document_is_in_one_split(split):
    for count in (1, 7, 200, 12345):
        ranges = [split_range(split, name, count) for name in SPLITS]
        assert sorted(d for r in ranges for d in r) == list(range(count))


def test_batch_depends_only_on_consumed_samples(prefix):
    samples = train(prefix)
    steps = [tokens_of(micro_batches(samples, consumed, 8, 2)) for consumed in range(0, 1000, 8)]
    assert 3 * len(samples) < 1000  # several epochs
    for step in (124, 3, 57, 0):  # a resumed run, forwards and backwards
        assert tokens_of(micro_batches(train(prefix), step * 8, 8, 2)) == steps[step]
        assert tokens_of(micro_batches(samples, step * 8, 8, 2)) == steps[step]
    assert tokens_of(micro_batches(train(prefix, seed=SEED + 100), 0, 8, 2)) != steps[0]


@pytest.mark.parametrize("micro", [1, 2, 4])
def test_data_parallel_ranks_share_the_same_samples(prefix, micro):
    samples, consumed = train(prefix), len(train(prefix)) - 5  # over the edge of an epoch
    alone = tokens_of(micro_batches(samples, consumed, 16, micro))
    assert alone == [samples.sample(consumed + i)[0].tolist() for i in range(16)]
    for size in (2, 4):
        ranks = [micro_batches(train(prefix), consumed, 16, micro, rank, size) for rank in range(size)]
        assert all(len(batches) == 16 // micro // size for batches in ranks)
        assert all(b.tokens.shape == b.loss_mask.shape == (micro, SEQ) for batches in ranks for b in batches)
        rounds = [
            row
            for number in range(len(ranks[0]))
            for batches in ranks
            for row in batches[number].tokens.tolist()
        ]
        assert rounds == alone
    with pytest.raises(UserError, match="16 is not a multiple of micro batch"):
        micro_batches(samples, 0, 16, micro, 0, 3)


def test_a_blend_follows_its_weights_and_skips_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(dataset, "PERIOD", 50)
    edges = {"a": 0, "b": 10_000, "c": 20_000}
    for name, start in edges.items():
        write(tmp_path / name, 100, start)
    path = ("3", str(tmp_path / "a"), "1", str(tmp_path / "b"), "1", str(tmp_path / "c"))
    blended = build_splits(
        DataConfig(data_path=path, seq_length=SEQ, split="1,0,0"), SEED, VOCAB, ("train",)
    )["train"]
    alone = {name: train(str(tmp_path / name), split="1,0,0") for name in edges}
    taken, weights = dict.fromkeys(edges, 0), {"a": 0.6, "b": 0.2, "c": 0.2}
    for number in range(1000):
        tokens = blended.sample(number)[0].tolist()
        name = max(n for n in edges if edges[n] <= tokens[0])
        assert tokens == alone[name].sample(taken[name])[0].tolist()
        if number < 50:  # Megatron's rule: the dataset furthest behind its share
            behind = {n: w * max(number, 1) - taken[n] for n, w in weights.items()}
            assert behind[name] == pytest.approx(max(behind.values()))
        taken[name] += 1
    assert taken == {"a": 600, "b": 200, "c": 200}
    assert len(blended) == sum(map(len, alone.values()))


def test_blend_of_the_command_line():
    assert parse_blend(["a"]) == [(1.0, "a")]
    assert parse_blend(["0.3", "a", "0.7", "b"]) == [(0.3, "a"), (0.7, "b")]
    for words, message in {
        (): "takes one prefix",
        ("1", "a", "b"): "takes one prefix",
        ("a", "b"): "'a' is not a weight",
        ("-1", "a"): "not a weight",
        ("nan", "a"): "not a weight",
        ("1e-6", "a", "1", "b"): "weight 1e-06 of a is less",
    }.items():
        with pytest.raises(UserError, match=message):
            parse_blend(words)


def test_a_split_without_a_sample_is_an_error_with_numbers(prefix):
    data = DataConfig(data_path=(prefix,), seq_length=SEQ)
    build_splits(data, SEED, VOCAB, ("train", "valid"))  # the test split is not needed
    with pytest.raises(
        UserError, match=r"--split 1,0,0 gives valid 0 of 200 documents with 0 tokens, .* takes 17"
    ):
        build_splits(DataConfig(data_path=(prefix,), seq_length=SEQ, split="1,0,0"), SEED, VOCAB, ("valid",))
    with pytest.raises(UserError, match="a: valid has all of the 200 documents with 4359 tokens") as caught:
        build_splits(
            DataConfig(data_path=(prefix,), valid_data_path=(prefix,), seq_length=9000),
            SEED,
            VOCAB,
            ("valid",),
        )
    assert "--split" not in str(caught.value)
    with pytest.raises(UserError, match="takes 9001"):
        build_splits(DataConfig(data_path=(prefix,), seq_length=9000), SEED, VOCAB, ("train",))
    for split in ("", "a,b", "0,0,0", "1,1,1,1", "-1,2", "1;2"):
        with pytest.raises(UserError, match="is not up to three shares"):
            split_range(split, "train", 100)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"handler_name": "AlpacaPretrainHandler"},
            "--handler-name is for data that are tokenized in training",
        ),
        ({"system": "Be brief."}, "--system is for data that are tokenized in training"),
        ({"strict": True}, "--strict is for data that are tokenized in training"),
        ({"min_length": 3}, "--min-length is for InternEvo's data"),
        (
            {"packing": "first-fit"},
            "--packing first-fit is for data with masks, and these are plain text; leave it out",
        ),
        ({"packing": "none"}, r"--packing none \(--no-pack\) is for data with masks"),
        (
            {"max_segment_length": 8},
            "--max-segment-length is for .bin/.idx pairs with labels or InternEvo's data",
        ),
    ],
)
def test_flags_that_mean_nothing_to_the_data(prefix, options, message):
    with pytest.raises(UserError, match=message):
        train(prefix, **options)


def test_one_sample_needs_one_token_more_than_its_length(tmp_path):
    for count, enough in ((SEQ + 1, True), (SEQ, False)):
        with PairWriter(tmp_path / "a", np.dtype(np.int32)) as writer:
            writer.add(np.arange(count, dtype=np.int32), np.array([count], np.int32))
            writer.commit({})
        if enough:
            assert train(str(tmp_path / "a"), split="1,0,0").sample(5)[1].tolist() == list(range(1, SEQ + 1))
        else:
            with pytest.raises(UserError, match="1 of 1 documents with 16 tokens"):
                train(str(tmp_path / "a"), split="1,0,0")


def test_ids_beyond_the_vocabulary(prefix):
    highest = pair_file(prefix, "bin").stat().st_size // 2 - 1  # ids are 0, 1, 2 and so on, in 16 bits
    data = DataConfig(data_path=(prefix,), seq_length=SEQ, split="1,0,0")
    build_splits(data, SEED, highest + 1, ("train",))
    with pytest.raises(UserError, match=f"token id {highest}, but the model's vocabulary has {highest} ids"):
        build_splits(data, SEED, highest, ("train",))  # noticed before the first step
    pair_file(prefix, "meta").unlink()
    samples = build_splits(data, SEED, highest, ("train",))[
        "train"
    ]  # data of another tool: noticed when the sample is read
    with pytest.raises(UserError, match=f"a has the token id {highest}"):
        [samples.sample(i) for i in range(2 * len(samples))]


def test_eos_is_supervised_though_it_is_the_pad_id(tmp_path):
    with PairWriter(tmp_path / "a", np.dtype(np.int32)) as writer:
        writer.add(np.tile([5, 2], 40), np.full(40, 2, np.int32))
        writer.commit({})
    _, labels, mask, _ = train(str(tmp_path / "a"), split="1,0,0").sample(0)
    assert 2 in labels.tolist()
    assert mask.min() == 1


def test_large_indices_are_cached_in_files(prefix, tmp_path, monkeypatch):
    in_memory = [train(prefix).sample(i)[0].tolist() for i in range(500)]
    assert not (tmp_path / "index-cache").exists()
    monkeypatch.setattr(epoch, "MIN_CACHED", 0)
    for _ in range(2):  # built, then loaded
        samples = train(prefix)
        assert [samples.sample(i)[0].tolist() for i in range(500)] == in_memory
    folders = [p for p in (tmp_path / "index-cache").iterdir() if p.is_dir()]
    assert len(folders) == -(-500 // len(samples))
    monkeypatch.setattr(epoch.EpochDataset, "_build", lambda *args: pytest.fail("was in the files"))
    assert train(prefix).sample(3)[0].tolist() == in_memory[3]
    monkeypatch.undo()
    monkeypatch.setattr(epoch, "MIN_CACHED", 0)
    write(prefix, 200, seed=5)  # other data under the same name
    assert train(prefix).sample(0)[0].tolist() != in_memory[0]
    assert train(prefix, data_cache_path=str(tmp_path / "elsewhere")).sample(0)
    assert (tmp_path / "elsewhere").is_dir()


def test_one_builds_and_the_others_wait(tmp_path):
    built, results = [], []

    def build():
        built.append(1)
        threading.Event().wait(0.05)
        return np.arange(3), np.arange(6).reshape(3, 2), np.arange(3)

    threads = [
        threading.Thread(target=lambda: results.append(load_or_build(tmp_path / "k", build)))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert built == [1]
    assert all(
        np.array_equal(x, y)
        for result, following in pairwise(results)
        for x, y in zip(result, following, strict=True)
    )
    assert not list(tmp_path.glob("*.tmp"))


def test_a_damaged_cache_is_refused(tmp_path):
    arrays = np.arange(3), np.arange(6).reshape(3, 2), np.arange(3)
    for name in (*(f"{name}.npy" for name in epoch.INDICES), epoch.HASHES):
        load_or_build(tmp_path / name, lambda: arrays)
        assert [part.tolist() for part in load_or_build(tmp_path / name, lambda: ())] == [
            part.tolist() for part in arrays
        ]
        for damage in (lambda raw: raw[:-1] + b"\7", lambda raw: raw[:20], lambda raw: b"(" * 200, None):
            path = tmp_path / name / name
            content = path.read_bytes()
            path.write_bytes(damage(content)) if damage else path.unlink()
            with pytest.raises(UserError, match=rf"damaged: remove {tmp_path / name}|is not JSON"):
                load_or_build(tmp_path / name, lambda: ())
            path.write_bytes(content)


def test_nothing_in_a_cache_is_unpickled_and_a_cache_that_cannot_be_is_an_error(tmp_path):
    (tmp_path / "k").mkdir()
    for name in epoch.INDICES:
        np.save(
            tmp_path / "k" / f"{name}.npy", np.array([{"any": "object"}], dtype=object), allow_pickle=True
        )
    with pytest.raises(UserError, match="damaged: remove"):
        load_or_build(tmp_path / "k", lambda: ())
    hashes = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in (tmp_path / "k").iterdir()}
    (tmp_path / "k" / epoch.HASHES).write_text(json.dumps(hashes))
    with pytest.raises(UserError, match="choose another --data-cache-path"):
        load_or_build(tmp_path / "k", lambda: ())
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="choose another --data-cache-path"):
        load_or_build(tmp_path / "file" / "k", lambda: ())
