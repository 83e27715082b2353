"""Rows of files that are read in any order in training: those that preprocessing reads."""

import gzip
import json
import os

import numpy as np
import pyarrow
import pytest
from helpers.log_lines import log_lines

from ascendspeed.data.readers import random_access, registry, row_cache
from ascendspeed.data.readers.shard import InvalidValue
from ascendspeed.data.streaming import source_files
from ascendspeed.utils.errors import UserError

ANSWERS = ["NA", "None", "null", "nan", "", "1.50", "007", "true"]
"""Texts that a reader of tables takes for something else."""
CSV = "question,answer\n" + "".join(f"q{i},{answer}\n" for i, answer in enumerate(ANSWERS))
CSV += 'short\n"two\nlines",a\n'
VALUES = (1, None, 1.5, ["x"], {"y": 1}, "z")
JSON = [{"question": f"q{i}", "answer": value} for i, value in enumerate(VALUES)]
NEEDED = ("question", "answer")


def files(folder):
    """One file of every kind that cannot be read in place, and two that can."""
    folder.mkdir(exist_ok=True)
    array = json.dumps([*JSON, "text", 5], indent=1)
    lines = "\n".join(map(json.dumps, JSON)) + '\n\n{broken\n{"question": "\\ud800"}\n'
    contents = {
        "a.csv": CSV,
        "b.tsv": CSV.replace(",", "\t"),
        "c.json": array,
        "d.json": f'{{"data": {array.replace(", 5", "")}}}'.replace('"text",\n 5', "{}"),
        "e.jsonl": array,
        "f.jsonl": lines,
        "g.txt": "one\ntwo\n",
    }
    paths = []
    for name, text in contents.items():
        raw = text.encode()
        for path, content in {
            folder / name: raw,
            folder / f"{name}.gz": gzip.compress(raw),
            folder / f"{name}.zst": pyarrow.Codec("zstd").compress(raw, asbytes=True),
        }.items():
            path.write_bytes(content)
            paths.append(path)
    return paths


def test_rows_are_those_of_preprocessing(tmp_path):
    for path in files(tmp_path / "data"):
        needed = ("text",) if ".txt" in path.name else NEEDED
        expected = []
        for shard in registry.shards(path, needed):
            for batch in registry.read(shard, needed):
                places = [registry.describe_location(path, location) for location in batch.locations]
                expected += zip(*batch.values(), places, strict=True)
        table = random_access.open_table(str(path), [path], tmp_path / "cache", None)
        batch = table.read(np.arange(len(table)), needed)
        places = [table.describe_location(number) for number in batch.locations]
        assert all(place.startswith(f"{path}, ") for place in places)
        rows = list(zip(*batch.values(), (place.removeprefix(f"{path}, ") for place in places), strict=True))
        assert rows == expected, path
        assert table.columns == registry.columns(path)
        if path.name == "a.csv":
            assert [row[1] for row in rows[: len(ANSWERS)]] == ANSWERS
            short = InvalidValue("wrong number of cells", "1 cells, the header has 2")
            assert rows[len(ANSWERS) :] == [(short, short, "line 10"), ("two\nlines", "a", "line 11")]
    backwards = table.read(np.arange(len(table))[::-1], needed)
    assert backwards["text"] == ["two", "one"]


def test_a_copy_is_made_once_and_again_after_a_change(tmp_path):
    path = files(tmp_path / "data")[0]
    cache = tmp_path / "cache"
    with log_lines() as lines:
        first = row_cache.cached_rows(path, cache)
    assert lines[0] == f"{path}: its rows are copied to {first}, to be read in any order"
    with log_lines() as lines:
        assert row_cache.cached_rows(path, cache) == first
    assert lines == []
    path.write_text("question,answer\nnew,row\n")
    os.utime(path, ns=(1, 1))
    second = row_cache.cached_rows(path, cache)
    assert second != first
    assert [row_cache.parse(line) for line in second.read_bytes().splitlines()] == [
        {"question": "new", "answer": "row"}
    ]
    assert registry.type_of(second) == ""  # a folder with a cache has no more data than before
    path.write_text('question,answer\n"open')
    with pytest.raises(UserError, match="never closed"):
        row_cache.cached_rows(path, cache)
    assert sorted(cache.iterdir()) == sorted([first, second])  # nothing half-written
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"the rows of .*e\.jsonl cannot be copied there: .*-cache-path"):
        row_cache.cached_rows(tmp_path / "data" / "e.jsonl", tmp_path / "file" / "cache")


def found(path):
    return source_files.find_files(str(path)).files


def test_what_data_path_names(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "a.jsonl").write_text("{}\n")
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(b"{}\n"))
    (folder / "c.json").write_text("[]")
    (folder / "README.md").touch()
    result = source_files.find_files(str(folder))
    assert [path.name for path in result.files] == ["a.jsonl", "b.jsonl.gz", "c.json"]
    assert result.notes == [f"{folder}: 1 file is not read: README.md"]
    assert found(folder / "b.jsonl.gz") == [folder / "b.jsonl.gz"]
    (folder / "d.csv").write_text("a\n")
    (folder / "e.arrow").touch()
    with pytest.raises(
        UserError,
        match=r"holds files of several types, 1 \.arrow, 1 \.csv and 3 \.jsonl: name those of one",
    ):
        found(folder)
    with pytest.raises(UserError, match="holds files of several types"):
        found(f"{folder}/?.*")
    assert found(f"{folder}/*.csv") == [folder / "d.csv"]
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "x.md").touch()
    (tmp_path / "p.idx").touch()
    for name in ("p.bin", "q.bin", "z.foo"):
        (tmp_path / name).touch()
    for name, message in {
        "empty": r"empty holds no data \(.*1 file is not read: x\.md\): looked for \.parquet, ",
        "p.bin": r"p\.bin: indexed data are named by their prefix, .*/p$",
        "p.idx": r"p\.idx: indexed data are named by their prefix, .*/p$",
        "q.bin": r"there is neither q\.bin\.meta \(InternEvo's data\) nor q\.idx \(Megatron's\) beside it",
        "z.foo": r"files of type \.foo cannot be read; there are: \.parquet",
        "absent.jsonl.zst": r"absent\.jsonl\.zst: there is no such file$",
        "absent/*.csv": r"there is no such file$",
    }.items():
        with pytest.raises(UserError, match=message):
            found(tmp_path / name)
    assert found(tmp_path / "prefix") == []  # perhaps the prefix of indexed data


def test_internevo_folders_are_read_whole(tmp_path):
    from ascendspeed.data.indexed.internevo import find_files

    for name in ("a.bin", "a.bin.meta", "b.bin", "b.bin.meta"):
        (tmp_path / name).touch()
    assert [path.name for path in find_files(tmp_path)] == ["a.bin", "b.bin"]
    (tmp_path / "a.bin").unlink()
    with pytest.raises(UserError, match=r"/a\.bin\.meta: there is no a\.bin beside it"):
        find_files(tmp_path)
    (tmp_path / "a.bin").symlink_to("gone.bin")
    with pytest.raises(UserError, match=r"/a\.bin is a link to gone\.bin, which does not exist"):
        find_files(tmp_path)
