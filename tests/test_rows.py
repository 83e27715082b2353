import csv
import gzip
import io
import json

import pyarrow
import pyarrow.parquet
import pytest
from helpers.corpus import TRAPS
from hypothesis import given, settings
from hypothesis import strategies as st

from ascendspeed.data.readers import lines, parquet, registry, sequential
from ascendspeed.data.readers.json_text import malformed
from ascendspeed.data.readers.shard import BATCH_ROWS, InvalidValue
from ascendspeed.utils.errors import UserError

TEXTS = [f"{i}: {TRAPS[i % len(TRAPS)]}" for i in range(1200)]
ROWS = [{"text": text, "other": i} for i, text in enumerate(TEXTS)]


def write(path, kind):
    """Writes the test rows in a format."""
    if kind == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path, row_group_size=700)
        return path
    if kind == "csv":
        out = io.StringIO(newline="")
        writer = csv.DictWriter(out, ["text", "other"])
        writer.writeheader()
        writer.writerows(ROWS)
        text = out.getvalue()
    elif kind == "jsonl":
        text = "".join(json.dumps(row, ensure_ascii=row["other"] % 2 == 0) + "\n\n" for row in ROWS)
    else:
        text = json.dumps(ROWS, ensure_ascii=False, indent=1)
    raw = text.encode()
    path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" else raw)
    return path


def values(path, name="text", needed=("text",)):
    """Reads a column shard by shard; returns its values and the number of shards."""
    shards = list(registry.shards(path, needed))
    assert sum(shard.weight for shard in shards) == pytest.approx(1)
    batches = [batch for shard in shards for batch in registry.read(shard, needed)]
    assert all(list(batch) == list(needed) and len(batch[name]) <= BATCH_ROWS for batch in batches)
    return [value for batch in batches for value in batch[name]], len(shards)


@pytest.mark.parametrize("shard_bytes", [8 << 20, 5000])
@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("a.parquet", "parquet"),
        ("a.jsonl", "jsonl"),
        ("a.JSONL.gz", "jsonl"),
        ("a.json", "array"),
        ("b.json", "jsonl"),
        ("a.json.gz", "array"),
        ("b.json.gz", "jsonl"),
        ("a.csv", "csv"),
        ("a.csv.gz", "csv"),
    ],
)
def test_every_format_gives_the_rows_in_order(tmp_path, monkeypatch, name, kind, shard_bytes):
    for module in (parquet, lines, sequential):
        monkeypatch.setattr(module, "SHARD_BYTES", shard_bytes)
    path = write(tmp_path / name, kind)
    assert registry.columns(path) == ["text", "other"]
    rows, shards = values(path)
    assert rows == TEXTS
    assert shards > 2 if shard_bytes == 5000 else shards <= 2
    assert values(path, "absent", ("text", "absent"))[0] == [None] * len(ROWS)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.binary(max_size=12).map(lambda b: b.replace(b"\n", b"")), max_size=20),
    st.integers(1, 9),
    st.booleans(),
)
def test_lines_belong_to_one_shard_wherever_the_cut_falls(tmp_path_factory, content, shard_bytes, ends):
    path = tmp_path_factory.mktemp("lines") / "a.txt"
    raw = b"\n".join(content) + (b"\n" if ends else b"")
    path.write_bytes(raw)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lines, "SHARD_BYTES", shard_bytes)
        rows = [
            v for s in registry.shards(path, ["text"]) for b in registry.read(s, ["text"]) for v in b["text"]
        ]
    parts = raw.removeprefix(lines.BOM).split(b"\n")
    expected = []
    for line in parts if parts[-1] else parts[:-1]:
        text = line.rstrip(b"\r").decode("utf-8", "surrogateescape")
        expected.append(lines.NUL if "\0" in text else text)
    assert rows == expected


def test_an_array_is_read_in_pieces_with_elements_larger_than_a_piece(tmp_path):
    path = tmp_path / "a.json"
    texts = ["small", "x" * 300_000, '[],{}\\"' * 20_000, "end"]
    path.write_text(json.dumps([{"text": t} for t in texts]))
    assert values(path)[0] == texts


def test_a_byte_order_mark_is_not_text(tmp_path):
    for name, raw in {
        "a.txt": b"one\ntwo",
        "a.jsonl": b'{"text": "one"}\n{"text": "two"}',
        "a.json": b'[{"text": "one"}, {"text": "two"}]',
        "a.csv": b"text\none\ntwo\n",
    }.items():
        for path, content in (
            (tmp_path / name, lines.BOM + raw),
            (tmp_path / f"{name}.gz", gzip.compress(lines.BOM + raw)),
        ):
            path.write_bytes(content)
            assert registry.columns(path) == ["text"]
            assert values(path)[0] == ["one", "two"]


def test_bad_bytes_and_bad_lines_are_handed_on(tmp_path):
    invalid, decoded = b"caf\xe9", "caf\udce9"
    (tmp_path / "a.txt").write_bytes(b"good\n" + invalid + b"\n")
    (tmp_path / "a.csv").write_bytes(b"text\ngood\n" + invalid + b"\n")
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "good"}\n{"text": "' + invalid + b'"}\n')
    (tmp_path / "a.json").write_bytes(b'[{"text": "good"}, {"text": "' + invalid + b'"}]')
    strings = pyarrow.array([b"good", invalid], pyarrow.binary())
    for name, column in {"a": strings.view(pyarrow.string()), "b": strings}.items():
        pyarrow.parquet.write_table(pyarrow.table({"text": column}), tmp_path / f"{name}.parquet")
    for path in tmp_path.iterdir():
        assert values(path)[0] == ["good", decoded], path
    path = tmp_path / "bad.jsonl"
    path.write_text('{"text": 1}\n{broken\n[1]\n"text"\n{}\n' + "[" * 100_000)
    assert values(path)[0] == [
        1,
        malformed("Expecting property name enclosed in double quotes, column 2"),
        malformed("it is a list"),
        malformed("it is a string"),
        None,
        malformed("nested too deeply"),
    ]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.json", b'[{"text": "a"}, {"text": "b"'),
        ("a.json", b'[{"text": "a"},'),
        ("a.json", b'[{"text": "a"} x]'),
        ("a.jsonl.gz", gzip.compress(b'{"text": "a"}\n' * 99, mtime=0)[:-9]),
        ("a.jsonl.gz", b"not gzip"),
        ("a.parquet", b"PAR1 but not really"),
    ],
)
def test_a_damaged_file_is_an_error(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=r"a\.(json|jsonl\.gz|parquet) is"):
        values(tmp_path / name)


def test_a_damaged_row_group_is_an_error(tmp_path):
    path = write(tmp_path / "a.parquet", "parquet")
    raw = bytearray(path.read_bytes())
    raw[4:4000] = bytes(3996)
    path.write_bytes(raw)
    with pytest.raises(UserError, match=r"a\.parquet: row group 0"):
        values(path)


def test_find(tmp_path):
    for name in ("b.jsonl", "a.parquet", "c.csv.gz", "notes.md", ".hidden.json", "sub/d.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    at = [tmp_path / name for name in ("a.parquet", "b.jsonl", "c.csv.gz", "sub/d.txt")]
    assert registry.find_files([tmp_path]) == at
    assert registry.find_files([at[1], at[0]]) == [at[1], at[0]]
    assert registry.find_files([f"{tmp_path}/*.jsonl", str(tmp_path / "**/*.txt")]) == [at[1], at[3]]
    for name, message in {
        "absent.json": "no such file",
        "notes.md": r"type \.md cannot be read; there are: \.parquet",
    }.items():
        with pytest.raises(UserError, match=message):
            registry.find_files([tmp_path / name])


@pytest.mark.parametrize("name", ["a.csv", "a.csv.gz"])
def test_a_row_of_csv_with_other_cells_than_the_header(tmp_path, name):
    raw = b'text,other,third\na,1,x\n"b, c",2\n\nd,3,x,surplus,5\ne,4,\n'
    (tmp_path / name).write_bytes(gzip.compress(raw) if name.endswith("gz") else raw)
    few, many = (
        InvalidValue("wrong number of cells", f"{count} cells, the header has 3") for count in (2, 5)
    )
    assert values(tmp_path / name)[0] == ["a", few, many, "e"]
    assert values(tmp_path / name, "third", ("text", "third"))[0] == ["x", few, many, ""]


def test_a_column_that_is_much_like_one_that_is_missing(tmp_path):
    def misspelled(wrong, right):
        return InvalidValue("misspelt column", f"{wrong!r} is not read; did you mean {right!r}?")

    content = [{"instruction": "q", "inputs": "x", "text": "t"}]
    (tmp_path / "a.jsonl").write_text(
        json.dumps(content[0]) + '\n{"instruction": "q", "input": "x", "inputs": "y"}\n'
    )
    (tmp_path / "a.json").write_text(json.dumps(content))
    (tmp_path / "a.csv").write_text("instruction,inputs,text\nq,x,t\n")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(content), tmp_path / "a.parquet")
    needed = ("instruction", "input", "system")
    for name in ("a.jsonl", "a.json", "a.csv", "a.parquet"):
        column = values(tmp_path / name, "input", needed)[0]
        assert column == [misspelled("inputs", "input")] + ["x"] * (name == "a.jsonl"), name
        assert values(tmp_path / name, "instruction", needed)[0][0] == "q"
        assert values(tmp_path / name, "system", needed)[0][0] is None
    for right, wrong in {"output": "Output ", "history": "histroy", "conversations": "conversation"}.items():
        (tmp_path / "b.jsonl").write_text(json.dumps({wrong: "x"}))
        assert values(tmp_path / "b.jsonl", right, (right,))[0] == [misspelled(wrong, right)]
    for right, other in {"input": "output", "system": "system_prompt", "history": "id"}.items():
        (tmp_path / "b.jsonl").write_text(json.dumps({other: "x"}))
        assert values(tmp_path / "b.jsonl", right, (right,))[0] == [None]
