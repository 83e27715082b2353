"""Damaged input files: an error of one line, or the same rows for preprocessing and for training."""

import gzip
import io
import json
import lzma
import random

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from helpers.fuzz import Findings, mutate_bytes

from ascendspeed.data.readers import random_access, registry
from ascendspeed.data.readers.shard import InvalidValue
from ascendspeed.utils.errors import UserError

ROWS = [{"text": f"row {i}, \"said\"\n'é' 中文 {i**9}", "other": i} for i in range(40)]
NEEDED = ("text", "absent")


def parquet():
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), buffer, row_group_size=16)
    return buffer.getvalue()


LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()
CELLS = "text,other\n"
for row in ROWS:
    CELLS += '"{}",{}\n'.format(row["text"].replace('"', '""'), row["other"])
CONTENTS = {
    "a.jsonl": LINES,
    "a.txt": LINES,
    "a.json": json.dumps(ROWS, indent=1).encode(),
    "b.json": json.dumps({"version": 1, "data": ROWS}).encode(),
    "c.json": "\n".join(json.dumps(row, indent=1) for row in ROWS).encode(),
    "a.csv": CELLS.encode(),
    "a.tsv": CELLS.replace(",", "\t").encode(),
    "a.jsonl.gz": gzip.compress(LINES),
    "a.csv.xz": lzma.compress(CELLS.encode()),
    "a.jsonl.zst": pyarrow.Codec("zstd").compress(LINES, asbytes=True),
    "a.parquet": parquet(),
}


def use(path, cache):
    """Reads a file in both ways."""
    registry.find_files([path])
    registry.columns(path)
    rows = []
    for shard in registry.shards(path, NEEDED):
        for batch in registry.read(shard, NEEDED):
            rows += batch["text"]
            for location in batch.locations[:2]:
                registry.describe_location(path, location)
    if path.suffix == ".parquet":
        return None
    table = random_access.open_table(str(path), [path], cache, None)
    streamed = table.read(np.arange(len(table)), NEEDED)["text"]
    return None if as_text(streamed) == as_text(rows) else "rows differ from those of preprocessing"


def as_text(values):
    return [repr(value) if isinstance(value, InvalidValue) else json.dumps(value) for value in values]


def fuzz(folder, seed, cases):
    generator = random.Random(seed)
    findings = Findings()
    for number in range(cases):
        name = generator.choice(list(CONTENTS))
        work = folder / str(number)
        work.mkdir()
        path = work / name
        path.write_bytes(mutate_bytes(CONTENTS[name], generator))
        findings.case(f"{seed}/{number}/{name}", lambda path=path, work=work: use(path, work / "cache"))
    findings.check(accepted=cases // 5, refused=cases // 10)


def test_whole_files_are_read(tmp_path):
    for name, content in CONTENTS.items():
        (tmp_path / name).write_bytes(content)
        assert use(tmp_path / name, tmp_path / "cache") is None


def test_damaged_files(tmp_path):
    fuzz(tmp_path, 1, 250)


def test_a_damaged_parquet_footer(tmp_path):
    """Each byte in turn. Arrow ends the process, with no exception, when it parses the damaged description of
    a column; names that are no text and counts that contradict each other are errors of one line too."""
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a b"] * 4, "other": [1] * 4}), buffer)
    whole = buffer.getvalue()
    begin = len(whole) - 8 - int.from_bytes(whole[-8:-4], "little")
    errors = []
    for position in range(begin, len(whole) - 8):
        for value in (0x29, 0xFF) if position % 3 else (0x29, 0):
            path = tmp_path / f"{position}-{value}.parquet"
            path.write_bytes(whole[:position] + bytes([value]) + whole[position + 1 :])
            reader = registry.reader_of(path)
            try:
                for shard in reader.shards(path, ["text"]):
                    list(reader.read(shard, ["text"]))
            except UserError as error:
                errors.append((str(path), str(error)))
            path.unlink()
    assert len(errors) > 200
    assert all(path in error and "\n" not in error for path, error in errors)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2, 6))
def test_many_damaged_files(tmp_path, seed):
    fuzz(tmp_path, seed, 3000)
