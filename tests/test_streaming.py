"""Hugging Face data sets on disk, tokenized in training: the documents of preprocessing, and the same batch from anywhere."""

import json
import os
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
from helpers.corpus import sentencepiece_dir, words
from helpers.log_lines import log_lines
from megatron.core.datasets.indexed_dataset import IndexedDataset

from ascendspeed.config.schema import DataConfig
from ascendspeed.data.dataset import build_splits, dataset_files, micro_batches
from ascendspeed.data.handlers.base import EncoderConfig
from ascendspeed.data.indexed.masked_pair import MaskedPair, find_pairs
from ascendspeed.data.preprocess import preprocess
from ascendspeed.data.readers import random_access
from ascendspeed.data.splits import split_range
from ascendspeed.data.streaming import stream
from ascendspeed.data.streaming.permutation import Permutation
from ascendspeed.data.streaming.prefetch import Prefetch
from ascendspeed.training.metrics_log import TrainLine, read_lines
from ascendspeed.utils.errors import UserError

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


def told(sample):
    return [column.tolist() for column in sample]


def order_of(which, streams, count, epochs):
    """Rows of one stream."""
    return [
        int(Permutation(count, SEED + e)(np.array([r]))[0])
        for e in range(epochs)
        for r in range(which, count, streams)
    ]


@pytest.mark.parametrize("count", [1, 2, 3, 16, 17, 100, 4097])
def test_a_permutation(count):
    places = np.arange(count)
    found = [Permutation(count, seed)(places) for seed in (0, 1, 2**40)]
    assert all(sorted(one.tolist()) == places.tolist() for one in found)
    if count > 16:
        assert (found[0] != found[1]).any()
        assert (found[0] != places).any()
        assert [int(Permutation(count, 1)(np.array([p]))[0]) for p in places[:9]] == found[1][:9].tolist()


def test_a_permutation_mixes():
    """Neighbours part, and no seed repeats another: as far apart on average as chance has it, a third of all."""
    found = [Permutation(10_000, seed)(np.arange(10_000)) for seed in range(4)]
    for one in found:
        assert np.abs(np.diff(one)).mean() == pytest.approx(10_000 / 3, rel=0.05)
        assert abs(np.corrcoef(one, np.arange(10_000))[0, 1]) < 0.05
    assert all((a == b).mean() < 0.01 for i, a in enumerate(found) for b in found[:i])


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
        for place in range(len(flat) // SEQ - 1):
            expected = flat[place * SEQ : (place + 1) * SEQ + 1]
            found = samples.sample(place * streams + which)
            assert told(found) == [expected[:-1], expected[1:], [1.0] * SEQ, list(range(SEQ))]
    assert place > 3 * len(samples) / streams / 2  # several epochs
    assert len(samples) == pytest.approx(sum(map(len, documents)) / SEQ, rel=0.1)
    assert samples.estimated


def test_the_flags_of_conversations(chats, chat_tokenizer):
    def row(**given):
        name = {"handler_name": "AlpacaStyleInstructionHandler", "packing": "none", "seq_length": LONG}
        return told(opened(chats, chat_tokenizer, **name | given).sample(0))

    plain = row()
    assert row(chat_template="v2", loss_on="all") == plain
    assert len(row(system="Be brief.")[0]) == len(plain[0])
    assert row(system="Be brief.") != plain
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
    couple = MaskedPair("p", *find_pairs(str(tmp_path / "p")))
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
        order, place = order_of(which, streams, 200, 3), 0
        while len(order) > 20:
            row, room = [], LONG
            while room >= len(couple.document(order[0]).tokens) and (packing is None or not row):
                row.append(couple.document(order.pop(0)))
                room -= len(row[-1].tokens)
            tokens, labels, counts, positions = told(samples.sample(place * streams + which))
            assert tokens[: LONG - room] == [t for one in row for t in one.tokens.tolist()]
            assert positions == [p for one in row for p in range(len(one.tokens))] + list(range(room))
            learnt = [float(m) for one in row for m in [*one.loss_mask.tolist()[1:], False]]
            assert counts == learnt + [0.0] * room
            assert [x for x, c in zip(labels, counts, strict=True) if c] == [
                t
                for one in row
                for t, m in list(zip(one.tokens.tolist(), one.loss_mask.tolist(), strict=True))[1:]
                if m
            ]
            place += 1
    assert (place > 3 * 200 / streams * 0.8) == (packing == "none")


def test_what_is_cut_away_is_said(chats, chat_tokenizer):
    def note(length):
        options = {"handler_name": "AlpacaStyleInstructionHandler", "seq_length": length, "split": "1,0,0"}
        return opened(chats, chat_tokenizer, **options).notes[0]

    found = re.search(
        r"each by 128 of them; of these, (\d+) documents cut to --seq-length 70: 0 answers lost, (\d+) cut;",
        note(70),
    )
    assert found
    assert 10 < int(found[1]) == int(found[2]) < 128  # one answer in each
    assert "cut to" not in note(400)


def test_any_sample_at_any_time_with_places_and_without(text, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(stream, "SAVE_EVERY", 4)
    walked = opened(text, tokenizer)
    expected = [told(walked.sample(n)) for n in range(400)]
    kept = sorted((tmp_path / "index-cache").rglob("stream-*.npy"))
    assert len(kept) == 4
    backwards = opened(text, tokenizer)
    assert [told(backwards.sample(n)) for n in range(399, -1, -7)] == expected[::-7]
    made = []
    monkeypatch.setattr(
        stream.SampleStream,
        "_take",
        lambda self, take=stream.SampleStream._take: made.append(1) or take(self),
    )
    for seed, distance in ((SEED, 4), (SEED + 1, 100)):
        made.clear()
        found = told(opened(text, tokenizer, seed=seed).sample(399))
        assert (found == expected[399]) == (seed == SEED)  # another seed is another order
        assert len(made) <= distance
        assert (len(made) > 60) == (seed != SEED)  # without places it is a long way
    kept[0].write_bytes(kept[0].read_bytes()[:-8])  # a copy was cut off
    kept[1].write_bytes(b"")
    again = opened(text, tokenizer)
    assert [told(again.sample(n)) for n in range(380, 400)] == expected[380:]


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
            found = [micro_batches(one, 40 + 8 * i, 8, 2, rank, size) for rank, one in enumerate(ranks)]
            rows = [
                row for number in range(len(found[0])) for one in found for row in one[number].tokens.tolist()
            ]
            assert rows == expected.tolist()


def test_a_rank_tokenizes_its_own_streams_only(text, tokenizer):
    samples, read = opened(text, tokenizer), []
    source = samples._sources[0]
    source._read, take = lambda rows: read.extend(rows) or take(rows), source._read
    for consumed in range(0, 64, 8):
        micro_batches(samples, consumed, 8, 2, 1, 2)  # samples 2 and 3 of every four: streams 2 and 3 of 4
    count = len(split_range("949,50,1", "train", ROWS))
    own = {row for which in (2, 3) for row in order_of(which, 4, count, 1)}
    assert read
    assert set(read) <= own


def test_changed_data_are_noticed(text, tokenizer, tmp_path):
    with log_lines() as said:
        before = told(opened(text, tokenizer).sample(100))
    assert not any("other data" in line for line in said)
    os.utime(text, ns=(1, 1))
    with open(text, "r+") as file:
        file.write(json.dumps({"text": "A change of the same len"[: len(words(1)[0])]}))
    with log_lines() as said:
        after = told(opened(text, tokenizer).sample(100))
    assert any(
        re.search(r"a\.jsonl-train-\w+ is of other data or settings than these", line) for line in said
    )
    assert len(list((tmp_path / "index-cache").glob("a.jsonl-train-*"))) == 2
    assert before[0] != after[0] or before == after  # whatever the change reached


def test_a_long_way_is_announced(text, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr("ascendspeed.data.streaming.positions.LOG_SECONDS", -1)
    with log_lines() as said:
        opened(text, tokenizer).sample(4 * stream.SAVE_EVERY + 4)
    assert any("the positions where samples begin are not known (there are none in" in line for line in said)
    assert any("samples tokenized again" in line for line in said)
    (tmp_path / "file").touch()
    with log_lines() as said:
        samples = opened(text, tokenizer, data_cache_path=str(tmp_path / "file"))
        assert samples.sample(0)
    assert any("positions cannot be stored there" in line for line in said)


def test_bad_rows_are_counted_once_and_said(text, tokenizer):
    with log_lines() as said:
        samples = opened(text, tokenizer, split="1,0,0")
        [samples.sample(n) for n in range(3 * len(samples))]  # three epochs
    skipped = [line for line in said if line.startswith("skipped")]
    assert sorted(skipped) == sorted(
        [
            f"skipped, null: {text}, line 18: null",
            f"skipped, null: {text}, line 42: null",
            f"skipped, not text: {text}, line 41: not text",
            f"skipped, whitespace: {text}, line 91: whitespace",
            f"skipped, malformed: {text}, line 300: not a JSON object",
        ]
    )
    counts = [line for line in said if "rows skipped so far" in line]
    assert counts
    with pytest.raises(UserError, match=r"--strict: .*a\.jsonl, line \d+: "):
        [opened(text, tokenizer, split="1,0,0", strict=True).sample(n) for n in range(2 * len(samples))]


def test_rows_that_make_nothing_at_all(tokenizer, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": ""}\n' * 200)
    with pytest.raises(UserError, match="none of 128 rows makes a document: 128 empty"):
        opened(str(tmp_path / "a.jsonl"), tokenizer)


def saved(folder, rows=100):
    data = datasets.Dataset.from_dict({"text": words(rows), "other": list(range(rows))})
    return data.save_to_disk(folder) or data


def test_every_form_gives_the_same_samples(tokenizer, tmp_path):
    data = saved(tmp_path / "saved")
    datasets.DatasetDict({"train": data}).save_to_disk(tmp_path / "dict")
    for name in ("parquet", "csv", "jsonl", "json", "list"):
        (tmp_path / name).mkdir()
    (tmp_path / "parquet" / "README.md").touch()
    (tmp_path / "parquet" / "dataset_infos.json").write_text("{}")
    data.select(range(60)).to_parquet(tmp_path / "parquet" / "train-00000-of-00002.parquet")
    data.select(range(60, 100)).to_parquet(tmp_path / "parquet" / "train-00001-of-00002.parquet")
    data.to_csv(tmp_path / "csv" / "a.csv", index=False)
    data.to_json(tmp_path / "jsonl" / "a.jsonl")
    data.to_json(tmp_path / "json" / "a.json")  # lines too
    (tmp_path / "list" / "a.json").write_text(json.dumps(data.to_list()))
    options = {"data_cache_path": str(tmp_path / "cache"), "split": "1,0,0"}
    forms = (
        "saved",
        "dict",
        "parquet",
        "parquet/*-of-00002.parquet",
        "csv",
        "jsonl",
        "json",
        "list",
        "saved/data-00000-of-00001.arrow",
    )
    found = {form: opened(str(tmp_path / form), tokenizer, **options) for form in forms}
    expected = [told(found["saved"].sample(n)) for n in range(50)]
    for form, samples in found.items():
        assert [told(samples.sample(n)) for n in range(50)] == expected, form
        assert dataset_files(str(tmp_path / form))
    with pytest.raises(UserError, match="needs the column 'content'; there are: text, other"):
        opened(str(tmp_path / "saved"), tokenizer, json_keys=("content",))
    with pytest.raises(UserError, match="one column is streamed"):
        opened(str(tmp_path / "saved"), tokenizer, json_keys=("text", "other"))


def test_splits_must_be_named(tokenizer, tmp_path):
    data = saved(tmp_path / "saved")
    datasets.DatasetDict({"train": data, "test": data}).save_to_disk(tmp_path / "dict")
    with pytest.raises(
        UserError, match=r"holds several data sets; name one of them: .*dict/test, .*dict/train"
    ):
        opened(str(tmp_path / "dict"), tokenizer)
    valid = (str(tmp_path / "dict" / "test"),)
    found = build_splits(
        config(str(tmp_path / "dict" / "train"), tokenizer, valid_data_path=valid),
        SEED,
        VOCAB,
        ("train", "valid"),
    )
    assert all(one.sample(0) for one in found.values())
    (tmp_path / "hub" / "data").mkdir(parents=True)
    for name in ("train", "validation"):
        data.to_parquet(tmp_path / "hub" / "data" / f"{name}-00000-of-00001.parquet")
    with pytest.raises(
        UserError, match=r"holds several splits, train, validation: name the files of one, such as"
    ):
        opened(str(tmp_path / "hub"), tokenizer)
    assert opened(
        str(tmp_path / "hub" / "data" / "train-*"), tokenizer, data_cache_path=str(tmp_path / "c")
    ).sample(0)
    with pytest.raises(UserError, match="gives test 0 of 100 rows"):
        opened(str(tmp_path / "saved"), tokenizer, name="test", split="1,0,0")


def test_what_cannot_be_streamed(tokenizer, tmp_path, monkeypatch, text):
    with pytest.raises(UserError, match="is text: give --tokenizer-name-or-path"):
        opened(text, None)
    with pytest.raises(UserError, match="unknown handler"):
        opened(text, tokenizer, handler_name="GeneralPretrain")
    with pytest.raises(UserError, match="is plain text without labels"):
        opened(text, tokenizer, is_instruction_dataset=True)
    with pytest.raises(UserError, match="is for InternEvo's data"):
        opened(text, tokenizer, min_length=5)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"there is no .*empty\.idx"):
        opened(str(tmp_path / "empty"), tokenizer)
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 not at all")
    with pytest.raises(UserError, match=r"bad\.parquet cannot be read as a data set: [^\n]*$"):
        opened(str(tmp_path / "bad.parquet"), tokenizer, data_cache_path=str(tmp_path / "c"))
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"takes the package datasets: pip install -e '\.\[streaming\]'"):
        opened(str(tmp_path / "bad.parquet"), tokenizer)
    assert opened(text, tokenizer).sample(0)  # lines need no package


def test_nothing_is_asked_of_the_network(tokenizer, tmp_path, monkeypatch):
    saved(tmp_path / "saved").to_parquet(tmp_path / "a.parquet")
    monkeypatch.setattr("socket.socket.connect", lambda *args: pytest.fail("connects"))
    for name in ("saved", "a.parquet"):
        assert opened(str(tmp_path / name), tokenizer, data_cache_path=str(tmp_path / "c")).sample(0)


def test_lines_are_found_wherever_they_end(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(
        b"\xef\xbb\xbf" + b'{"text": "\xc3\xa9"}\r\n\n{"text": "no newline at the end"}'
    )
    (tmp_path / "b.jsonl").write_bytes(b"")
    (tmp_path / "c.jsonl").write_bytes(b'{"text": "c"}\n')
    table = random_access.LineTable([tmp_path / f"{name}.jsonl" for name in "abc"])
    assert len(table) == 4
    found = table.read(np.array([3, 2, 1, 0]), ["text"])
    assert found == {"text": ["c", "no newline at the end", "é"]}
    assert list(found.locations) == [3, 2, 0]
    assert table.describe_location(3) == f"{tmp_path}/c.jsonl, line 1"


def test_the_next_batch_is_made_ahead():
    calls, made = [], threading.Event()

    def batches(split, consumed):
        calls.append((split, consumed))
        if consumed == 12:
            made.set()
        if consumed == 16:
            raise UserError("no more")
        return (split, consumed)

    ahead = Prefetch(batches, 4)
    assert ahead("train", 8) == ("train", 8)
    assert made.wait(10)
    assert ahead("valid", 0) == ("valid", 0)
    assert ahead("train", 12) == ("train", 12)
    assert ahead("train", 4) == ("train", 4)  # not what was made ahead
    assert ahead("train", 8) == ("train", 8)
    with pytest.raises(UserError, match="no more"):
        ahead("train", 16)
    assert calls[:2] == [("train", 8), ("train", 12)]


def test_passes_over_text_cannot_be_counted(cpu, text, tokenizer):
    from helpers.start import RUN

    from ascendspeed.distributed import process_groups
    from ascendspeed.training import data_setup

    given = replace(RUN, data=config(text, tokenizer), model=replace(RUN.model, vocab_size=VOCAB))
    grid = process_groups.initialize(cpu, RUN.parallel, seed=1)
    with log_lines() as said:
        _, batches = data_setup.open_data(given, grid)
    assert any(line.startswith("train data: about ") for line in said)
    assert [told(row) for row in zip(*vars(batches("train", 0)[0]).values(), strict=True)] == [
        told(opened(text, tokenizer, seed=1234).sample(0))
    ]
    with pytest.raises(UserError, match="give --train-iters"):
        data_setup.open_data(replace(given, train=replace(RUN.train, train_epochs=2.0)), grid)


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
    whole, said = run(tmp_path / "whole", text, tokenizer, 1, *engine)
    assert "tokenized while it is trained on" in said
    run(tmp_path / "broken", text, tokenizer, 1, *engine, "--exit-interval", "3")
    broken, _ = run(tmp_path / "broken", text, tokenizer, 1, *engine, "--load", str(tmp_path / "broken"))
    assert len(whole) == 8
    assert broken == whole
    two, _ = run(tmp_path / "two", text, tokenizer, 2, *engine)
    assert two == pytest.approx(whole, abs=2e-5)
    other, _ = run(tmp_path / "other", text, tokenizer, 1, *engine, "--seed", "5")
    assert other != pytest.approx(whole, abs=1e-3)
