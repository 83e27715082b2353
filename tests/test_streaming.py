"""Hugging Face datasets on disk, tokenized in training: the documents of preprocessing, and batches that
depend on nothing else."""

import io
import re
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from helpers import launch
from helpers.corpus import words
from helpers.log_lines import log_lines
from helpers.streaming import (
    BAD,
    LONG,
    ROWS,
    SEED,
    SEQ,
    VOCAB,
    as_lists,
    chat_tokenizer,
    chats,
    config,
    opened,
    text,
    tokenizer,
)
from megatron.core.datasets.indexed_dataset import IndexedDataset

from ascendspeed.data.dataset import micro_batches
from ascendspeed.data.handlers.base import EncoderConfig
from ascendspeed.data.indexed.masked_pair import MaskedPair, find_pairs
from ascendspeed.data.preprocess import preprocess
from ascendspeed.data.splits import split_range
from ascendspeed.data.streaming import stream
from ascendspeed.data.streaming.permutation import Permutation
from ascendspeed.data.streaming.prefetch import Prefetch
from ascendspeed.training.metric_lines import TrainLine, read_lines
from ascendspeed.utils.errors import UserError


def order_of(which, streams, count, epochs):
    """Rows of one stream."""
    return [
        int(Permutation(count, SEED + e)(np.array([r]))[0])
        for e in range(epochs)
        for r in range(which, count, streams)
    ]


@pytest.mark.parametrize("count", [1, 2, 3, 16, 17, 100, 4097])
def test_a_permutation(count):
    indices = np.arange(count)
    permutations = [Permutation(count, seed)(indices) for seed in (0, 1, 2**40)]
    assert all(sorted(permutation.tolist()) == indices.tolist() for permutation in permutations)
    if count > 16:
        assert (permutations[0] != permutations[1]).any()
        assert (permutations[0] != indices).any()
        assert [int(Permutation(count, 1)(np.array([p]))[0]) for p in indices[:9]] == permutations[1][
            :9
        ].tolist()


def test_a_permutation_mixes():
    """Neighbours are a third of the range apart on average, as by chance, and permutations of different seeds
    differ."""
    permutations = [Permutation(10_000, seed)(np.arange(10_000)) for seed in range(4)]
    for permutation in permutations:
        assert np.abs(np.diff(permutation)).mean() == pytest.approx(10_000 / 3, rel=0.05)
        assert abs(np.corrcoef(permutation, np.arange(10_000))[0, 1]) < 0.05
    assert all((a == b).mean() < 0.01 for i, a in enumerate(permutations) for b in permutations[:i])


def test_text_is_that_of_preprocessing_in_the_order_of_its_streams(text, tokenizer, tmp_path):
    preprocess(
        [text],
        str(tmp_path / "p"),
        EncoderConfig(tokenizer, "GeneralPretrainHandler", append_eod=True),
    )
    good = iter(IndexedDataset(str(tmp_path / "p_text_document")))
    count, streams = ROWS, 300 // 64
    documents = [[] if i in BAD or i >= ROWS - 2 else next(good).tolist() for i in range(count)]
    assert next(good, None) is None
    samples = opened(text, tokenizer, split="1,0,0")
    for which in range(streams):
        flat = [token for row in order_of(which, streams, count, 4) for token in documents[row]]
        for index in range(len(flat) // SEQ - 1):
            expected = flat[index * SEQ : (index + 1) * SEQ + 1]
            sample = samples.sample(index * streams + which)
            assert as_lists(sample) == [expected[:-1], expected[1:], [1.0] * SEQ, list(range(SEQ))]
    assert index > 3 * len(samples) / streams / 2  # several epochs
    assert len(samples) == pytest.approx(sum(map(len, documents)) / SEQ, rel=0.1)
    assert samples.estimated


def test_the_flags_of_conversations(chats, chat_tokenizer):
    def row(**options):
        name = {"handler_name": "AlpacaStyleInstructionHandler", "packing": "none", "seq_length": LONG}
        return as_lists(opened(chats, chat_tokenizer, **name | options).sample(0))

    default = row()
    assert row(chat_template="v2", loss_on="all") == default
    assert len(row(system="Be brief.")[0]) == len(default[0])
    assert row(system="Be brief.") != default
    with pytest.raises(UserError, match="--chat-template v9 does not exist"):
        row(chat_template="v9")
    with pytest.raises(UserError, match="--system means nothing to GeneralPretrainHandler"):
        row(handler_name=None, system="Be brief.")
    with pytest.raises(
        UserError, match="--json-keys means nothing to AlpacaStyleInstructionHandler; leave it out"
    ):
        row(json_keys=("output",))


@pytest.mark.parametrize("packing", [None, "none"])
def test_conversations_are_those_of_preprocessing(chats, chat_tokenizer, tmp_path, packing):
    rows = datasets.load_from_disk(chats)
    rows.to_json(tmp_path / "rows.jsonl")
    job = EncoderConfig(chat_tokenizer, "AlpacaStyleInstructionHandler", seq_length=LONG, chat_template="v2")
    preprocess([tmp_path / "rows.jsonl"], str(tmp_path / "p"), job)
    masked_pair = MaskedPair("p", *find_pairs(str(tmp_path / "p")))
    samples = opened(
        chats,
        chat_tokenizer,
        split="1,0,0",
        handler_name="AlpacaStyleInstructionHandler",
        packing=packing,
        seq_length=LONG,
    )
    streams = 200 // 64
    for which in range(streams):
        order, index = order_of(which, streams, 200, 3), 0
        while len(order) > 20:
            row, free = [], LONG
            while free >= len(masked_pair.document(order[0]).tokens) and (packing is None or not row):
                row.append(masked_pair.document(order.pop(0)))
                free -= len(row[-1].tokens)
            tokens, labels, counts, positions = as_lists(samples.sample(index * streams + which))
            assert tokens[: LONG - free] == [t for document in row for t in document.tokens.tolist()]
            assert positions == [p for document in row for p in range(len(document.tokens))] + list(
                range(free)
            )
            supervised = [float(m) for document in row for m in [*document.loss_mask.tolist()[1:], False]]
            assert counts == supervised + [0.0] * free
            assert [x for x, c in zip(labels, counts, strict=True) if c] == [
                t
                for document in row
                for t, m in list(zip(document.tokens.tolist(), document.loss_mask.tolist(), strict=True))[1:]
                if m
            ]
            index += 1
    assert (index > 3 * 200 / streams * 0.8) == (packing == "none")


def test_truncation_is_reported(chats, chat_tokenizer):
    def note(length):
        options = {"handler_name": "AlpacaStyleInstructionHandler", "seq_length": length, "split": "1,0,0"}
        return opened(chats, chat_tokenizer, **options).notes[0]

    match = re.search(
        r"128 rows\); of these, (\d+) documents cut to --seq-length 70: 0 answers lost, (\d+) cut;",
        note(70),
    )
    assert match
    assert 10 < int(match[1]) == int(match[2]) < 128  # one answer in each
    assert "cut to" not in note(400)


def with_positions(content, change):
    """A file of positions whose array was changed, with the digest of the old one."""
    positions = np.load(io.BytesIO(content))
    change(positions)
    array = io.BytesIO()
    np.save(array, positions)
    return array.getvalue() + content[-32:]


DAMAGED_POSITIONS = {
    "a copy was cut off": lambda content: content[:-8],
    "empty": lambda content: b"",
    "of an older version": lambda content: content[:-32],
    "header": lambda content: content[:20] + b"(" + content[21:],
    "one row later": lambda content: with_positions(content, lambda a: np.add.at(a, (slice(1, None), 0), 1)),
    "negative": lambda content: with_positions(content, lambda a: a[1:, 0].fill(-5)),
    "huge offset": lambda content: with_positions(content, lambda a: a[1:, 1].fill(10**9)),
}


@pytest.mark.parametrize("damages", [["empty"], pytest.param([*DAMAGED_POSITIONS], marks=pytest.mark.slow)])
def test_any_sample_at_any_time_with_positions_and_without(damages, text, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(stream, "SAVE_EVERY", 4)
    samples = opened(text, tokenizer)
    expected = [as_lists(samples.sample(n)) for n in range(400)]
    files = sorted((tmp_path / "index-cache").rglob("stream-*.npy"))
    assert len(files) == 4
    stored = {path: path.read_bytes() for path in files}
    backwards = opened(text, tokenizer)
    assert [as_lists(backwards.sample(n)) for n in range(399, -1, -7)] == expected[::-7]
    packed = []
    monkeypatch.setattr(
        stream.SampleStream,
        "_take",
        lambda self, take=stream.SampleStream._take: packed.append(1) or take(self),
    )
    for seed, distance in ((SEED, 4), (SEED + 1, 100)):
        packed.clear()
        with log_lines() as lines:
            sample = as_lists(opened(text, tokenizer, seed=seed).sample(399))
        assert (sample == expected[399]) == (seed == SEED)  # another seed is another order
        assert len(packed) <= distance
        assert (len(packed) > 60) == (seed != SEED)  # without positions many samples are packed again
    assert not any("note: " in line for line in lines)
    for name in damages:
        damage = DAMAGED_POSITIONS[name]
        for path, content in stored.items():
            path.write_bytes(damage(content))
        with log_lines() as lines:
            again = opened(text, tokenizer)
            assert [as_lists(again.sample(n)) for n in range(380, 400)] == expected[380:], name
        assert sum("is damaged and not used" in line for line in lines) == len(stored)
        assert all(path.read_bytes() != damage(stored[path]) for path in stored)  # written again


def test_data_parallel_ranks_share_the_same_samples(text, tokenizer, tmp_path):
    alone = [
        torch.cat([b.tokens for b in micro_batches(opened(text, tokenizer), 40 + 8 * i, 8, 2)])
        for i in range(3)
    ]
    for size in (2, 4):
        ranks = [
            opened(text, tokenizer, data_cache_path=str(tmp_path / f"{size}.{rank}")) for rank in range(size)
        ]
        for i, expected in enumerate(alone):
            batches = [
                micro_batches(samples, 40 + 8 * i, 8, 2, rank, size) for rank, samples in enumerate(ranks)
            ]
            rows = [
                row
                for number in range(len(batches[0]))
                for samples in batches
                for row in samples[number].tokens.tolist()
            ]
            assert rows == expected.tolist()


def test_a_rank_tokenizes_its_own_streams_only(text, tokenizer):
    samples, read = opened(text, tokenizer), []
    source = samples._sources[0]
    source._read, take = lambda rows: read.extend(rows) or take(rows), source._read
    for consumed in range(0, 64, 8):
        micro_batches(samples, consumed, 8, 2, 1, 2)  # samples 2 and 3 of every four: streams 2 and 3 of 4
    count = len(split_range("949,50,1", "train", ROWS))
    expected = {row for which in (2, 3) for row in order_of(which, 4, count, 1)}
    assert read
    assert set(read) <= expected


def test_retokenizing_is_announced(text, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr("ascendspeed.data.streaming.positions.LOG_SECONDS", -1)
    with log_lines() as lines:
        opened(text, tokenizer).sample(4 * stream.SAVE_EVERY + 4)
    assert any("the positions where samples begin are not known (there are none in" in line for line in lines)
    assert any("samples tokenized again" in line for line in lines)
    (tmp_path / "file").touch()
    with log_lines() as lines:
        samples = opened(text, tokenizer, data_cache_path=str(tmp_path / "file"))
        assert samples.sample(0)
    assert any("positions cannot be stored there" in line for line in lines)


def test_the_next_batch_is_prefetched():
    calls, prefetched = [], threading.Event()

    def batches(split, consumed):
        calls.append((split, consumed))
        if consumed == 12:
            prefetched.set()
        if consumed == 16:
            raise UserError("no more")
        return (split, consumed)

    ahead = Prefetch(batches, lambda consumed: 4)
    assert ahead("train", 8) == ("train", 8)
    assert prefetched.wait(10)
    assert ahead("valid", 0) == ("valid", 0)
    assert ahead("train", 12) == ("train", 12)
    assert ahead("train", 4) == ("train", 4)  # not the prefetched batch
    assert ahead("train", 8) == ("train", 8)
    with pytest.raises(UserError, match="no more"):
        ahead("train", 16)
    assert calls[:2] == [("train", 8), ("train", 12)]


def fields_of(batch) -> list:
    """Tensors of a batch, in the order of a sample."""
    return [batch.tokens, batch.labels, batch.loss_mask, batch.position_ids]


def test_passes_over_text_cannot_be_counted(cpu, text, tokenizer):
    from helpers.start import RUN

    from ascendspeed.distributed import process_groups
    from ascendspeed.training import data_setup

    run_config = replace(RUN, data=config(text, tokenizer), model=replace(RUN.model, vocab_size=VOCAB))
    grid = process_groups.initialize(cpu, RUN.parallel, seed=1)
    with log_lines() as lines:
        _, batches = data_setup.open_data(run_config, grid)
    assert any(line.startswith("train data: about ") for line in lines)
    assert [as_lists(row) for row in zip(*fields_of(batches("train", 0)[0]), strict=True)] == [
        as_lists(opened(text, tokenizer, seed=1234).sample(0))
    ]
    with pytest.raises(UserError, match="give --train-iters"):
        data_setup.open_data(replace(run_config, train=replace(RUN.train, train_epochs=2.0)), grid)


def run(folder, text, tokenizer, world, *flags):
    """Losses of a run of the real entry, by iteration."""
    words = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        str(world),
        "--master-port",
        str(launch.free_port()),
    ]
    words += [
        "pretrain_intern.py",
        "--model",
        "internlm-tiny",
        "--data-path",
        text,
        "--tokenizer-name-or-path",
        tokenizer,
    ]
    words += [
        "--seq-length",
        str(SEQ),
        "--micro-batch-size",
        "2",
        "--global-batch-size",
        "8",
        "--train-iters",
        "8",
        "--lr",
        "1e-2",
    ]
    words += [
        "--log-dir",
        f"{folder}.log",
        "--save",
        str(folder),
        "--device",
        "cpu",
        "--lr-decay-iters",
        "8",
        *flags,
    ]
    done = subprocess.run(
        words, cwd=launch.ROOT, env=launch.environment(), capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return [
        line.loss for line in read_lines(Path(f"{folder}.log") / "train.log") if isinstance(line, TrainLine)
    ], done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("engine", [[], ["--deepspeed", "--zero-stage", "1"]])
def test_a_resumed_run_has_the_same_curve(text, tokenizer, tmp_path, engine):
    uninterrupted, output = run(tmp_path / "whole", text, tokenizer, 1, *engine)
    assert "tokenizing on the fly: " in output
    run(tmp_path / "broken", text, tokenizer, 1, *engine, "--exit-interval", "3")
    resumed, _ = run(tmp_path / "broken", text, tokenizer, 1, *engine, "--load", str(tmp_path / "broken"))
    assert len(uninterrupted) == 8
    assert resumed == uninterrupted
    two, _ = run(tmp_path / "two", text, tokenizer, 2, *engine)
    assert two == pytest.approx(uninterrupted, abs=2e-5)
    other, _ = run(tmp_path / "other", text, tokenizer, 1, *engine, "--seed", "5")
    assert other != pytest.approx(uninterrupted, abs=1e-3)
