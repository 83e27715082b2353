"""Content of what a run reads: recorded in its checkpoints, compared with the data's own record, and reported
when it has changed."""

import json
import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import sentencepiece
from helpers.corpus import json_dir, sentencepiece_dir, words
from helpers.log_lines import log_lines
from helpers.start import MODEL, RUN

from ascendspeed.config import schema
from ascendspeed.config.schema import InputRecord
from ascendspeed.data.dataset import hash_dataset
from ascendspeed.data.handlers.base import EncoderConfig
from ascendspeed.data.indexed.masked_pair import MaskedPairWriter
from ascendspeed.data.preprocess import preprocess
from ascendspeed.tokenization import tokenizer
from ascendspeed.tokenization.fingerprint import hash_encoding
from ascendspeed.training import data_setup, input_record, setup
from ascendspeed.utils import file_samples
from ascendspeed.utils.errors import UserError

GRID = SimpleNamespace(rank=0, world=1, dp=1, dp_rank=0)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two tokenizers of the same size, the first also with further files, and a third of another kind."""
    folder = tmp_path_factory.mktemp("tokenizers")
    sentencepiece_dir(folder / "a")
    sentencepiece_dir(folder / "again")
    (folder / "again" / "config.json").write_text("{}")
    size = tokenizer.load(folder / "a").vocab_size
    shutil.copytree(folder / "a", folder / "other")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([text[::-1] for text in words(300)]),
        model_prefix=str(folder / "other" / "tokenizer"),
        model_type="bpe",
        vocab_size=size,
        byte_fallback=True,
        hard_vocab_limit=False,
        num_threads=1,
        minloglevel=2,
    )
    assert tokenizer.load(folder / "other").vocab_size == size
    json_dir(folder / "json")
    return folder


@pytest.fixture(scope="module")
def prefix(folders, tmp_path_factory):
    """Data made with the first tokenizer."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "a.txt").write_text("one two three four five six seven eight nine ten\n" * 200)
    preprocess(
        [folder / "a.txt"], str(folder / "p"), EncoderConfig(str(folders / "a"), "GeneralPretrainHandler")
    )
    return str(folder / "p_text_document")


def run_of(prefix, folder, **data):
    given = replace(RUN.data, data_path=(prefix,), tokenizer_name_or_path=str(folder), **data)
    return replace(RUN, data=given, model=replace(MODEL, vocab_size=2048))


def resume_notes(saved, run):
    """Log lines of a run that continues the checkpoint of `saved`."""
    state = SimpleNamespace(step=1, samples=4)
    checkpoint = SimpleNamespace(run=saved, world=1, state=state, path="ckpt")
    with log_lines() as lines:
        setup._log_resume(run, checkpoint, GRID)
    return [line for line in lines if line.startswith("note: ")]


def test_the_hash_of_a_tokenizer_is_that_of_its_ids(folders):
    hashes = {path.name: hash_encoding(tokenizer.load(path)) for path in folders.iterdir()}
    assert hashes["a"] == hashes["again"]
    assert len(set(hashes.values())) == 3


def test_another_tokenizer_of_the_same_size_is_refused(folders, prefix):
    data_setup.open_data(run_of(prefix, folders / "again"), GRID)
    with pytest.raises(UserError, match=r"both have 4.. ids, but they encode text differently"):
        data_setup.open_data(run_of(prefix, folders / "other"), GRID)


def test_validation_data_that_are_training_data_are_noted(folders, prefix, tmp_path):
    for suffix in ("bin", "idx", "meta"):
        shutil.copy(f"{prefix}.{suffix}", tmp_path / f"copy.{suffix}")
    (tmp_path / "link.bin").symlink_to(f"{prefix}.bin")
    (tmp_path / "link.idx").symlink_to(f"{prefix}.idx")
    noted = {}
    for valid in (prefix, str(tmp_path / "link"), str(tmp_path / "copy")):
        with log_lines() as lines:
            run = run_of(prefix, folders / "a", valid_data_path=(valid,))
            data_setup.open_data(replace(run, train=replace(run.train, eval_interval=2)), GRID)
        noted[valid] = any("2 of its 2 files are training data too" in line for line in lines)
    assert list(noted.values()) == [True, True, False]


def write_masked(folder, seed):
    tokens = np.random.default_rng(seed).integers(1, 400, 600)
    with MaskedPairWriter(folder / "chat") as writer:
        writer.add(tokens, np.full(60, 10, np.int32), np.arange(600) % 2 > 0)
        writer.commit({"tokens": 600})
    return folder / "chat"


def write_internevo(folder, seed):
    lines = [json.dumps({"tokens": [seed + 1, 2, 3]}).encode() + b"\n" for _ in range(5)]
    (folder / "x.bin").write_bytes(b"".join(lines))
    table = np.stack([np.cumsum([0, *map(len, lines)])[:-1], np.full(5, 3)], 1)
    with (folder / "x.bin.meta").open("wb") as file:
        np.save(file, table)
    return folder


def write_lines(folder, seed):
    (folder / "a.jsonl").write_text(json.dumps({"text": f"text {seed}"}) + "\n")
    return folder


@pytest.mark.parametrize("write", [write_masked, write_internevo, write_lines])
def test_the_hash_of_data_is_that_of_their_content(tmp_path, write):
    hashes = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        (tmp_path / name).mkdir()
        hashes.append(hash_dataset(str(write(tmp_path / name, seed))))
    assert hashes[0] == hashes[1] != hashes[2]


def test_samples_reach_the_whole_file(tmp_path, monkeypatch):
    monkeypatch.setattr(file_samples, "SAMPLE_BYTES", 16)
    path = tmp_path / "file"
    content = np.random.default_rng(0).bytes(10240)
    path.write_bytes(content)
    expected = file_samples.hash_samples(path)
    detected = 0
    for at in range(0, len(content), 97):
        path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
        detected += file_samples.hash_samples(path) != expected
    assert 5 < detected < 20  # 64 samples of 16 bytes are a tenth of the file
    for changed in (content[:-1], content + b"\0", content[1:] + b"\0", content[: len(content) // 2] * 2):
        path.write_bytes(changed)
        assert file_samples.hash_samples(path) != expected
    path.write_bytes(content[:500])
    whole = file_samples.hash_samples(path)
    for at in range(500):  # of a small file every byte counts
        path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 : 500])
        assert file_samples.hash_samples(path) != whole


def test_changed_content_is_reported_on_resume(folders, prefix, tmp_path):
    for suffix in ("bin", "idx", "meta"):
        shutil.copy(f"{prefix}.{suffix}", tmp_path / f"p.{suffix}")
    config = tmp_path / "ds.json"
    config.write_text('{"zero_optimization": {"overlap_comm": true}, "communication_data_type": "fp32"}')
    data = str(tmp_path / "p")
    run = run_of(data, folders / "a", valid_data_path=(prefix,))
    run = replace(run, parallel=replace(run.parallel, deepspeed_config=str(config)))
    saved = input_record.with_inputs(run, GRID)
    assert schema.from_dict(json.loads(json.dumps(schema.to_dict(saved)))) == saved
    assert resume_notes(saved, saved) == []
    content = bytearray((tmp_path / "p.bin").read_bytes())
    content[100:102] = content[102:104][::-1]
    (tmp_path / "p.bin").write_bytes(content)
    config.write_text('{"zero_optimization": {"overlap_comm": false}, "wall_clock_breakdown": true}')
    run = replace(run, data=replace(run.data, tokenizer_name_or_path=str(folders / "other")))
    notes = resume_notes(saved, input_record.with_inputs(run, GRID))
    when = "when the checkpoint was saved"
    assert [note.removeprefix("note: ") for note in notes if "tokenizer_name_or_path" not in note] == [
        f"{data} holds other data than {when}",
        f"the tokenizer in {folders / 'other'} encodes text otherwise than {when}",
        f"--deepspeed_config: communication_data_type was fp32 {when} and is absent now",
        f"--deepspeed_config: wall_clock_breakdown was absent {when} and is True now",
        f"--deepspeed_config: zero_optimization.overlap_comm was True {when} and is False now",
    ]


def test_a_checkpoint_without_a_record_gives_no_notes(folders, prefix):
    run = run_of(prefix, folders / "a")
    values = schema.to_dict(run)
    del values["inputs"]
    older = schema.from_dict(json.loads(json.dumps(values)))
    assert older.inputs == InputRecord()
    assert resume_notes(older, input_record.with_inputs(run, GRID)) == []
    other = input_record.with_inputs(run, replace_rank(1))
    assert other.inputs == InputRecord()  # rank 0 writes run.json


def replace_rank(rank):
    return SimpleNamespace(**vars(GRID) | {"rank": rank})
