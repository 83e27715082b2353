"""Files that are tokenized in training: forms, splits, changed files, skipped rows, and what is refused."""

import gzip
import json
import os
import re
import sys

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from helpers.corpus import words
from helpers.log_lines import log_lines
from helpers.streaming import SEED, VOCAB, as_lists, config, opened, text, tokenizer

from ascendspeed.data.dataset import build_splits, dataset_files
from ascendspeed.data.readers import random_access
from ascendspeed.utils.errors import UserError


def test_changed_data_are_noticed(text, tokenizer, tmp_path):
    with log_lines() as lines:
        before = as_lists(opened(text, tokenizer).sample(100))
    assert not any("other data" in line for line in lines)
    os.utime(text, ns=(1, 1))
    with open(text, "r+") as file:
        file.write(json.dumps({"text": "A change of the same len"[: len(words(1)[0])]}))
    with log_lines() as lines:
        after = as_lists(opened(text, tokenizer).sample(100))
    assert any(
        re.search(r"a\.jsonl-train-\w+ is of other data or settings than these", line) for line in lines
    )
    assert len(list((tmp_path / "index-cache").glob("a.jsonl-train-*"))) == 2
    assert before[0] != after[0] or before == after  # whatever the change reached


def test_bad_rows_are_counted_and_reported_once(text, tokenizer):
    with log_lines() as lines:
        samples = opened(text, tokenizer, split="1,0,0")
        [samples.sample(n) for n in range(3 * len(samples))]  # three epochs
    skipped = [line for line in lines if line.startswith("skipped")]
    assert sorted(skipped) == sorted(
        [
            f"skipped, null: {text}, line 18: null",
            f"skipped, null: {text}, line 42: null",
            f"skipped, not text: {text}, line 41: not text",
            f"skipped, whitespace: {text}, line 91: whitespace",
            f"skipped, malformed: {text}, line 300: not a JSON object: Expecting property name enclosed in "
            "double quotes, column 2",
        ]
    )
    counts = [line for line in lines if "rows skipped so far" in line]
    assert counts
    with pytest.raises(UserError, match=r"--strict: .*a\.jsonl, line \d+: "):
        [opened(text, tokenizer, split="1,0,0", strict=True).sample(n) for n in range(2 * len(samples))]


def test_rows_without_any_document(tokenizer, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": ""}\n' * 200)
    with pytest.raises(UserError, match="none of 128 rows makes a document: 128 empty"):
        opened(str(tmp_path / "a.jsonl"), tokenizer)


@pytest.mark.parametrize("name", ["a.csv", "a.csv.gz", "a.tsv", "a.parquet"])
def test_a_column_that_stands_there_twice(tokenizer, tmp_path, caplog, name):
    path = tmp_path / "data" / name
    path.parent.mkdir()
    if name == "a.parquet":
        pyarrow.parquet.write_table(pyarrow.table([["a"], ["b"], ["c"]], ["text", "text", "other"]), path)
    else:
        text = "text,text,other\na,b,c\n".replace(",", "\t" if ".tsv" in name else ",").encode()
        path.write_bytes(gzip.compress(text) if name.endswith(".gz") else text)
    for data in (path, path.parent):
        with pytest.raises(UserError, match=rf"{name}: the column 'text' occurs 2 times; rename or"):
            opened(str(data), tokenizer)
    assert not caplog.records


def saved(folder, rows=100):
    data = datasets.Dataset.from_dict({"text": words(rows), "other": list(range(rows))})
    return data.save_to_disk(folder) or data


def test_every_form_gives_the_same_samples(tokenizer, tmp_path):
    data = saved(tmp_path / "saved")
    datasets.DatasetDict({"train": data}).save_to_disk(tmp_path / "dict")
    for name in ("parquet", "csv", "jsonl", "json", "list", "zst"):
        (tmp_path / name).mkdir()
    (tmp_path / "parquet" / "README.md").touch()
    (tmp_path / "parquet" / "dataset_infos.json").write_text("{}")
    data.select(range(60)).to_parquet(tmp_path / "parquet" / "train-00000-of-00002.parquet")
    data.select(range(60, 100)).to_parquet(tmp_path / "parquet" / "train-00001-of-00002.parquet")
    data.to_csv(tmp_path / "csv" / "a.csv", index=False)
    data.to_json(tmp_path / "jsonl" / "a.jsonl")
    data.to_json(tmp_path / "json" / "a.json")  # lines too
    (tmp_path / "list" / "a.json").write_text(json.dumps(data.to_list()))
    raw = (tmp_path / "jsonl" / "a.jsonl").read_bytes()
    (tmp_path / "zst" / "a.jsonl.zst").write_bytes(pyarrow.Codec("zstd").compress(raw, asbytes=True))
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
        "zst/a.jsonl.zst",
        "saved/data-00000-of-00001.arrow",
    )
    samples_by_form = {form: opened(str(tmp_path / form), tokenizer, **options) for form in forms}
    expected = [as_lists(samples_by_form["saved"].sample(n)) for n in range(50)]
    for form, samples in samples_by_form.items():
        assert [as_lists(samples.sample(n)) for n in range(50)] == expected, form
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
    splits = build_splits(
        config(str(tmp_path / "dict" / "train"), tokenizer, valid_data_path=valid),
        SEED,
        VOCAB,
        ("train", "valid"),
    )
    assert all(samples.sample(0) for samples in splits.values())
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
    with pytest.raises(UserError, match=r"empty holds no data: looked for "):
        opened(str(tmp_path / "empty"), tokenizer)
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 not at all")
    with pytest.raises(UserError, match=r"bad\.parquet is not a parquet file: [^\n]*$"):
        opened(str(tmp_path / "bad.parquet"), tokenizer, data_cache_path=str(tmp_path / "c"))
    pyarrow.parquet.write_table(pyarrow.table({"text": words(3)}), tmp_path / "good.parquet")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"takes the package datasets: pip install -e '\.\[streaming\]'"):
        opened(str(tmp_path / "good.parquet"), tokenizer)
    assert opened(text, tokenizer).sample(0)  # lines need no package


def test_no_network_access(tokenizer, tmp_path, monkeypatch):
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
    batch = table.read(np.array([3, 2, 1, 0]), ["text"])
    assert batch == {"text": ["c", "no newline at the end", "é"]}
    assert list(batch.locations) == [3, 2, 0]
    assert table.describe_location(3) == f"{tmp_path}/c.jsonl, line 1"
