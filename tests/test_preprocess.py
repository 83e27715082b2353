import contextlib
import gzip
import json
import os
import random
import re
import signal
import subprocess
import sys
import time

import numpy as np
import psutil
import pyarrow
import pyarrow.parquet
import pytest
import sentencepiece
from helpers.corpus import TRAPS, big_vocabulary_dir, sentencepiece_dir, words
from helpers.log_lines import log_lines
from helpers.preprocess import TOOL, read_pair
from megatron.core.datasets.indexed_dataset import IndexedDataset

from ascendspeed.data.indexed.megatron_pair import check_pair, pair_file
from ascendspeed.data.preprocess import EncoderConfig, preprocess
from ascendspeed.data.readers import lines, parquet, sequential
from ascendspeed.utils.errors import UserError

TEXTS = words(600) + TRAPS


@pytest.fixture
def tokenizer(tmp_path):
    return sentencepiece_dir(tmp_path / "tokenizer")


def parquet_of(path, texts, **options):
    path.parent.mkdir(exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), path, **options)
    return path


def run(*args):
    return subprocess.run([sys.executable, TOOL, *map(str, args)], capture_output=True, text=True)


def test_documents_are_sentencepiece_ids_and_eos(tmp_path, tokenizer):
    parquet_of(tmp_path / "a.parquet", TEXTS, row_group_size=100)
    facts = preprocess(
        [tmp_path / "a.parquet"],
        str(tmp_path / "p"),
        EncoderConfig(str(tokenizer), "GeneralPretrainHandler", append_eod=True),
    )
    processor = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer / "tokenizer.model"))
    read = IndexedDataset(str(tmp_path / "p_text_document"))
    texts = [text for text in TEXTS if "\0" not in text]
    assert facts["text"]["skipped"] == {"NUL characters": len(TEXTS) - len(texts)}
    expected = [[*processor.encode(text), 2] for text in texts]
    assert [d.tolist() for d in read[0 : len(read)]] == expected
    assert read.index.dtype == np.uint16
    recorded = json.loads(read_pair(tmp_path / "p_text_document")["meta"])
    assert {name: recorded[name] for name in facts["text"]} == facts["text"]
    assert recorded.keys() - facts["text"].keys() == {"bin_samples_sha256", "idx_samples_sha256"}
    assert facts["text"]["max_token"] == max(map(max, expected))
    assert facts["text"]["bytes"] == sum(len(text.encode()) for text in texts)
    preprocess(
        [tmp_path / "a.parquet"], str(tmp_path / "q"), EncoderConfig(str(tokenizer), "GeneralPretrainHandler")
    )
    without_eos = IndexedDataset(str(tmp_path / "q_text_document"))
    assert [d.tolist() for d in without_eos[0 : len(without_eos)]] == [ids[:-1] for ids in expected]


def test_a_large_vocabulary_is_stored_in_32_bits(tmp_path):
    folder = big_vocabulary_dir(tmp_path / "tokenizer")
    parquet_of(tmp_path / "a.parquet", ["w2 w69999", "w65536"])
    preprocess(
        [tmp_path / "a.parquet"],
        str(tmp_path / "p"),
        EncoderConfig(str(folder), "GeneralPretrainHandler", append_eod=True),
    )
    read = IndexedDataset(str(tmp_path / "p_text_document"))
    assert read.index.dtype == np.int32
    assert [d.tolist() for d in read[0:2]] == [[2, 69999, 1], [65536, 1]]


def test_output_is_the_same_for_any_number_of_workers_and_any_format(tmp_path, tokenizer, monkeypatch):
    for module in (parquet, lines, sequential):
        monkeypatch.setattr(module, "SHARD_BYTES", 6000)  # many shards
    inputs = {
        "one group": parquet_of(tmp_path / "one.parquet", TEXTS),
        "groups": parquet_of(tmp_path / "groups.parquet", TEXTS, row_group_size=77),
        "jsonl": tmp_path / "a.jsonl",
        "array": tmp_path / "a.json",
        "gz": tmp_path / "a.jsonl.gz",
    }
    rows = [{"text": text} for text in TEXTS]
    inputs["jsonl"].write_text("\n".join(map(json.dumps, rows)))
    inputs["array"].write_text(json.dumps(rows))
    inputs["gz"].write_bytes(gzip.compress(inputs["jsonl"].read_bytes()))
    job, outputs = EncoderConfig(str(tokenizer), "GeneralPretrainHandler", append_eod=True), {}
    for name, path in inputs.items():
        for workers in (1, 3) if name in ("one group", "gz") else (1,):
            facts = preprocess([path], str(tmp_path / name), job, workers)
            files = read_pair(f"{tmp_path / name}_text_document")
            meta = json.loads(files.pop("meta"))
            assert {name: meta[name] for name in facts["text"]} == facts["text"]
            assert meta.keys() - facts["text"].keys() == {"bin_samples_sha256", "idx_samples_sha256"}
            facts["text"].pop("source")  # of the file, not of its content
            outputs[name, workers] = files | facts
    first = outputs["one group", 1]
    assert all(files == first for files in outputs.values())
    parquet_of(tmp_path / "one.parquet", TEXTS[:50] + TEXTS[51:52] + TEXTS[50:51] + TEXTS[52:])
    preprocess([tmp_path / "one.parquet"], str(tmp_path / "swapped"), job)
    assert (
        read_pair(tmp_path / "swapped_text_document")["bin"] != first["bin"]
    )  # control: the comparison detects the order of the rows


def test_several_files_and_keys(tmp_path, tokenizer):
    data = tmp_path / "data"
    data.mkdir()
    (data / "a.jsonl").write_text('{"text": "one", "title": "A"}\n{"text": "two", "title": null}\n')
    (data / "b.csv").write_text("title,text\nB,three\n")
    (data / "c.csv").write_text("")  # holds no rows and misses no column
    job = EncoderConfig(str(tokenizer), "GeneralPretrainHandler", ("text", "title"))
    preprocess([data], str(data / "new" / "p"), job)
    facts = preprocess([data], str(data / "new" / "p"), job)  # its own output in the input folder is ignored
    assert [facts[key]["documents"] for key in ("text", "title")] == [3, 2]
    assert facts["title"]["skipped"] == {"null": 1}
    texts, titles = (IndexedDataset(str(data / "new" / f"p_{key}_document")) for key in ("text", "title"))
    assert (len(texts), len(titles)) == (3, 2)


def test_rows_that_make_no_document_are_counted_and_reported(tmp_path, tokenizer):
    path = tmp_path / "a.jsonl"
    good = [json.dumps({"text": "good"}).encode()]
    bad = [
        b'{"text": null}',
        b'{"text": ""}',
        b'{"text": " \\n"}',
        b'{"text": 5}',
        b"{",
        b'{"text": "\xff"}',
        b'{"text": "\\ud800"}',
    ]
    path.write_bytes(b"\n".join(good + bad + [json.dumps({"text": "x" * 5000}).encode()] + good))
    job = EncoderConfig(str(tokenizer), "GeneralPretrainHandler", longest=4000)
    with log_lines() as lines:
        facts = preprocess([path], str(tmp_path / "p"), job)
    assert facts["text"]["rows"] == 10
    assert facts["text"]["documents"] == 2
    expected = {
        "null": 1,
        "empty": 1,
        "whitespace": 1,
        "not text": 1,
        "malformed": 1,
        "invalid UTF-8": 2,
        "huge": 1,
    }
    assert facts["text"]["skipped"] == expected
    assert "from 10 rows, skipped: 1 empty, 1 huge, 2 invalid UTF-8" in lines[0]


def test_without_a_document_it_is_an_error_and_the_old_pair_stays(tmp_path, tokenizer):
    job = EncoderConfig(str(tokenizer), "GeneralPretrainHandler")
    preprocess([parquet_of(tmp_path / "a.parquet", ["old"])], str(tmp_path / "p"), job)
    before = read_pair(tmp_path / "p_text_document")
    with pytest.raises(
        UserError,
        match=r"no document under 'text' in 1 files: .* 1 empty, 1 null; .*b\.parquet, row 1: empty; "
        "nothing was written",
    ):
        preprocess([parquet_of(tmp_path / "b.parquet", ["", None])], str(tmp_path / "p"), job, overwrite=True)
    assert read_pair(tmp_path / "p_text_document") == before
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(UserError, match=r"^no rows in .*empty\.jsonl$"):
        preprocess([tmp_path / "empty.jsonl"], str(tmp_path / "p"), job, overwrite=True)
    (tmp_path / "header.csv").write_text("text\n")
    files = [tmp_path / "empty.jsonl", tmp_path / "header.csv"]
    with pytest.raises(UserError, match=r"^no rows in .*empty\.jsonl and 1 more$"):
        preprocess(files, str(tmp_path / "p"), job, overwrite=True)
    with pytest.raises(UserError, match=r"--strict: .*b\.parquet, row 1: empty; nothing was written"):
        preprocess([tmp_path / "b.parquet"], str(tmp_path / "p"), job, strict=True, overwrite=True)
    (tmp_path / "c.json").write_text('[{"text": "good"}, {"te')
    with pytest.raises(UserError, match="damaged"):
        preprocess([tmp_path / "c.json"], str(tmp_path / "p"), job, workers=2, overwrite=True)
    assert read_pair(tmp_path / "p_text_document") == before
    assert not list(tmp_path.glob("*.tmp"))


def test_errors_before_anything_is_written(tmp_path, tokenizer):
    path = parquet_of(tmp_path / "a.parquet", ["text"])
    with pytest.raises(UserError, match="needs the column 'instruction'; there are: text"):
        preprocess([path], str(tmp_path / "p"), EncoderConfig(str(tokenizer), "AlpacaPretrainHandler"))
    with pytest.raises(UserError, match="unknown handler"):
        preprocess([path], str(tmp_path / "p"), EncoderConfig(str(tokenizer), "Alpaca"))
    folder = big_vocabulary_dir(tmp_path / "no-eos", 10)
    (folder / "special_tokens_map.json").unlink()
    with pytest.raises(UserError, match="names no eos_token"):
        preprocess(
            [path], str(tmp_path / "p"), EncoderConfig(str(folder), "GeneralPretrainHandler", append_eod=True)
        )
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file"):
        preprocess(
            [path], str(tmp_path / "file" / "p"), EncoderConfig(str(tokenizer), "GeneralPretrainHandler")
        )
    assert not list(tmp_path.glob("p_*"))


def test_a_full_disk_is_detected_early(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(parquet, "SHARD_BYTES", 2000)
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000}))
    with pytest.raises(UserError, match=r"are still to be written, but 0\.0 GB are free"):
        preprocess(
            [parquet_of(tmp_path / "a.parquet", TEXTS)],
            str(tmp_path / "p"),
            EncoderConfig(str(tokenizer), "GeneralPretrainHandler"),
        )
    assert not list(tmp_path.glob("p_*"))


def test_the_published_command(tmp_path, tokenizer):
    rows = [
        {"instruction": f"Say {i}.", "input": None if i % 2 else "loud", "output": f"{i}!"}
        for i in range(100)
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "train.parquet")
    prefix = tmp_path / "alpaca"
    flags = [
        "--input",
        tmp_path / "train.parquet",
        "--tokenizer-name-or-path",
        tokenizer,
        "--output-prefix",
        prefix,
        "--workers",
        2,
    ]
    flags += [
        "--log-interval",
        10,
        "--tokenizer-type",
        "PretrainedFromHF",
        "--handler-name",
        "AlpacaPretrainHandler",
    ]
    done = run(
        *flags,
        "--tokenizer-not-use-fast",
        "--append-eod",
        "--dataset-impl",
        "mmap",
        "--streaming",
        "--seq-length",
        2048,
    )
    assert done.returncode == 0, done.stderr
    assert len(IndexedDataset(f"{prefix}_text_document")) == 100
    for message in (
        "--streaming is accepted and ignored: rows are always",
        "--seq-length is ignored: ",
        "--tokenizer-not-use-fast is accepted and ignored: ",
    ):
        assert message in done.stdout
    assert "100 documents" in done.stdout
    assert "documents/s" in done.stderr
    assert "left" in done.stderr
    failed = run(*flags[:-1], "AlpacaHandler")
    assert failed.returncode == 2
    assert failed.stderr.count("\n") == 1
    assert "did you mean AlpacaPretrainHandler" in failed.stderr


def test_the_workers_need_no_torch():
    heavy = ("torch", "megatron", "transformers")
    code = f"import sys, ascendspeed.data.preprocess; sys.exit(any(m in sys.modules for m in {heavy}))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def tool_with_workers(tmp_path, tokenizer):
    """The running tool and its two worker processes."""
    path = parquet_of(tmp_path / "long.parquet", words(20_000) * 20, row_group_size=5000)
    command = [
        sys.executable,
        TOOL,
        "--input",
        path,
        "--tokenizer-name-or-path",
        tokenizer,
        "--output-prefix",
        tmp_path / "p",
    ]
    tool = subprocess.Popen(
        [*map(str, command), "--workers", "2"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    workers = []
    while len(workers) < 2 and tool.poll() is None:
        time.sleep(0.02)
        workers = [p for p in psutil.Process(tool.pid).children() if "spawn_main" in " ".join(p.cmdline())]
    return tool, workers


def test_a_dead_worker_is_reported_and_leaves_no_files(tmp_path, tokenizer):
    tool, workers = tool_with_workers(tmp_path, tokenizer)
    workers[0].kill()
    stderr = tool.communicate()[1]
    assert tool.returncode == 2
    assert "error: a worker process died" in stderr.splitlines()[-1]
    assert not list(tmp_path.glob("p_*"))


def test_workers_end_with_a_killed_parent(tmp_path, tokenizer):
    tool, workers = tool_with_workers(tmp_path, tokenizer)
    tool.kill()
    tool.communicate()
    _, alive = psutil.wait_procs(workers, timeout=30)
    assert not alive


def kill_at_random(folder, tokenizer, times, seed):
    """Kills the tool (SIGKILL) at random moments beside an older pair; returns the state after each."""
    old, new = (
        parquet_of(folder / "old.parquet", words(50)),
        parquet_of(folder / "new.parquet", words(20000), row_group_size=2000),
    )
    job, prefix = EncoderConfig(str(tokenizer), "GeneralPretrainHandler"), folder / "p_text_document"
    preprocess([new], str(folder / "whole"), job)
    complete, outcomes = read_pair(folder / "whole_text_document"), []
    command = [
        sys.executable,
        TOOL,
        "--input",
        new,
        "--tokenizer-name-or-path",
        tokenizer,
        "--output-prefix",
        folder / "p",
    ]
    command = [*map(str, command), "--workers", "2", "--overwrite"]
    began = time.monotonic()
    subprocess.run(command, check=True, capture_output=True)
    duration, chance = time.monotonic() - began, random.Random(seed)
    assert read_pair(prefix) == complete
    for _ in range(times):
        preprocess([old], str(folder / "p"), job, overwrite=True)
        before = read_pair(prefix)
        tool = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(chance.uniform(0.3, 1.1) * duration)
        os.kill(tool.pid, signal.SIGKILL)
        tool.wait()
        if pair_file(prefix, "idx").exists():
            after = read_pair(prefix)
            assert after in (before, complete)
            check_pair(prefix)
            outcomes.append("old" if after == before else "new")
        else:
            outcomes.append("none")
    return outcomes


@pytest.mark.slow
def test_killed_at_any_moment_no_wrong_pair_is_left(tmp_path, tokenizer):
    assert kill_at_random(tmp_path, tokenizer, 1, seed=0)


@pytest.mark.slow
def test_killed_at_many_moments_no_wrong_pair_is_left(tmp_path, tokenizer):
    assert set(kill_at_random(tmp_path, tokenizer, 30, seed=1)) >= {"old", "new"}


def test_another_prefix_is_not_overwritten(tmp_path, tokenizer):
    job = EncoderConfig(str(tokenizer), "GeneralPretrainHandler")
    path = parquet_of(tmp_path / "a.parquet", ["old"])
    prefix = str(tmp_path / "p")
    preprocess([path], prefix, job)
    before = read_pair(tmp_path / "p_text_document")
    preprocess([path], prefix, job, workers=2)  # the same command again, whatever the number of workers
    assert read_pair(tmp_path / "p_text_document") == before
    with_eod = EncoderConfig(str(tokenizer), "GeneralPretrainHandler", append_eod=True)
    others = {
        "other rows": ([parquet_of(tmp_path / "b" / "a.parquet", ["new"])], job),
        "more files": ([path, tmp_path / "b" / "a.parquet"], job),
        "other settings": ([path], with_eod),
    }
    message = r"p_text_document\.idx exists, and is not made from these files with these settings"
    for inputs, config in others.values():
        with pytest.raises(UserError, match=message):
            preprocess(inputs, prefix, config)
    assert read_pair(tmp_path / "p_text_document") == before
    (tmp_path / "b" / "a.parquet").replace(tmp_path / "copy.parquet")
    (tmp_path / "b" / "a.parquet").write_bytes(path.read_bytes())
    preprocess([tmp_path / "b" / "a.parquet"], prefix, job)  # the same content elsewhere
    pair_file(tmp_path / "p_text_document", "meta").unlink()  # as other tools leave it
    with pytest.raises(UserError, match=message):
        preprocess([path], prefix, job)
    facts = preprocess([path], prefix, with_eod, overwrite=True)
    assert facts["text"]["tokens"] > json.loads(before["meta"])["tokens"]
    pair_file(tmp_path / "p_text_document", "idx").unlink()  # a run that was killed leaves no .idx
    preprocess([path], prefix, job)
    assert read_pair(tmp_path / "p_text_document") == before


@pytest.mark.breadth
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_leaves_no_files_and_no_traceback(tmp_path, tokenizer, number):
    tool, workers = tool_with_workers(tmp_path, tokenizer)
    for process in (tool, *workers):  # Ctrl-C and a closed terminal reach all processes
        if process is tool or number == signal.SIGINT:
            with contextlib.suppress(psutil.NoSuchProcess):  # a worker whose parent has ended it
                process.send_signal(number)
    stderr = tool.communicate()[1]
    assert tool.returncode == 128 + number
    assert "Traceback" not in stderr
    assert "resource_tracker" not in stderr
    assert stderr.splitlines()[-1] == ("interrupted" if number == signal.SIGINT else "terminated")
    assert not list(tmp_path.glob("p_*"))
    _, alive = psutil.wait_procs(workers, timeout=30)
    assert not alive


def test_numbers_of_workers(tmp_path, tokenizer):
    path = parquet_of(tmp_path / "a.parquet", ["text"])
    flags = ["--input", path, "--tokenizer-name-or-path", tokenizer, "--output-prefix", tmp_path / "p"]
    for workers, message in {10**26: "--workers 1000.*: at most 1024", -1: "must be positive"}.items():
        done = run(*flags, "--workers", workers)
        assert (done.returncode, done.stderr.count("\n")) == (2, 1)
        assert re.search(message, done.stderr)
    done = run("--input", *flags[2:])
    assert (done.returncode, done.stderr) == (
        2,
        "error: --input names no file; give files, quoted globs or folders\n",
    )
