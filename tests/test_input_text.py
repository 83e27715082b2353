"""Content of input files: rows are read, or counted with a reason, or the file is refused with the place."""

import bz2
import gzip
import json
import lzma

import pyarrow
import pytest
from helpers.log_lines import log_lines
from hypothesis import given, settings
from hypothesis import strategies as st

from ascendspeed.data.handlers.base import text_size
from ascendspeed.data.readers import csv_text, json_text, registry
from ascendspeed.data.readers.json_text import Layout
from ascendspeed.data.readers.sequential import json_layout
from ascendspeed.data.readers.shard import InvalidValue
from ascendspeed.utils.errors import UserError


def read(path, *needed):
    """Values of the columns `needed` (default: text), row by row; single values for one column."""
    needed = needed or ("text",)
    batches = [b for shard in registry.shards(path, needed) for b in registry.read(shard, needed)]
    rows = [row for batch in batches for row in zip(*batch.values(), strict=True)]
    return [row[0] for row in rows] if len(needed) == 1 else rows


def written(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


COMPRESS = {
    ".gz": gzip.compress,
    ".xz": lzma.compress,
    ".bz2": bz2.compress,
    ".zst": lambda raw: pyarrow.Codec("zstd").compress(raw, asbytes=True),
}
CONTENT = {
    ".jsonl": '{"text": "a, b", "other": 1}\n{"text": "c"}\n',
    ".ndjson": '{"text": "a, b"}\n{"text": "c"}\n',
    ".json": '[{"text": "a, b"}, {"text": "c"}]',
    ".csv": 'text,other\n"a, b",1\nc,2\n',
    ".tsv": "text\tother\na, b\t1\nc\t2\n",
    ".txt": "a, b\nc\n",
}


@pytest.mark.parametrize("compression", ["", *COMPRESS])
@pytest.mark.parametrize("suffix", CONTENT)
def test_every_type_is_read_compressed_and_not(tmp_path, suffix, compression):
    raw = CONTENT[suffix].encode()
    path = tmp_path / f"a{suffix}{compression}"
    written(path, COMPRESS[compression](raw) if compression else raw)
    assert registry.find_files([tmp_path]) == [path]
    assert registry.columns(path)[0] == "text"
    assert read(path) == ["a, b", "c"]
    assert registry.describe_location(path, 2 if compression else 0)


@pytest.mark.parametrize("compression", COMPRESS)
def test_compressed_files_of_several_members_and_damaged_ones(tmp_path, compression):
    compress = COMPRESS[compression]
    parts = [compress(f'{{"text": "{i}"}}\n'.encode()) for i in range(3)]
    path = written(tmp_path / f"a.jsonl{compression}", b"".join(parts))
    assert read(path) == ["0", "1", "2"]
    long = compress("".join(f'{{"text": "{i**9}"}}\n' for i in range(20_000)).encode())
    written(path, long[:-12])
    with pytest.raises(UserError, match=rf"^{path} is damaged: [^\n]*$"):
        read(path)
    written(path, b"not compressed at all, but long enough for a header")
    with pytest.raises(UserError, match=rf"^{path} is damaged: [^\n]*$"):
        registry.find_files([path])
    assert read(written(path, compress(b""))) == []


@pytest.mark.parametrize("compression", COMPRESS)
def test_rows_behind_a_damaged_member_are_not_lost(tmp_path, compression):
    first, second = (COMPRESS[compression](f'{{"text": "{i}"}}\n'.encode()) for i in range(2))
    for damaged in (b"x" + second[1:], second[:6], b"garbage"):
        path = written(tmp_path / f"a.jsonl{compression}", first + damaged)
        with pytest.raises(UserError, match=rf"^{path} is damaged: [^\n]*$"):
            read(path)
    if compression == ".xz":  # zeros that fill up a block are part of the format
        assert read(written(path, first + bytes(8) + second + bytes(9000))) == ["0", "1"]


LONG = "x" * 9000
CARRIAGE_RETURNS = {
    "a.txt": "one\rtwo\r",
    "b.txt": f"{LONG}\r{LONG}",
    "a.jsonl": '{"text": "a"}\r{"text": "b"}\r',
    "a.json": '{"text": "a"}\r\r{"text": "b"}',
    "a.txt.gz": "one\r\rtwo",
}


@pytest.mark.parametrize("name", CARRIAGE_RETURNS)
def test_lines_that_end_with_carriage_returns_alone(tmp_path, name):
    raw = CARRIAGE_RETURNS[name].encode()
    path = written(tmp_path / name, gzip.compress(raw) if name.endswith("gz") else raw)
    with pytest.raises(UserError, match=rf"^{path} has a carriage return .*: tr '\\r' '\\n' makes"):
        registry.find_files([path])


def test_control_carriage_returns_in_text(tmp_path):
    for name, content in {
        "a.txt": f"one\r{LONG}\ntwo\n",
        "b.txt": "one\r\n",
        "c.txt": "one\r",
        "a.csv": "text\rone\r",
        "a.json": '[\r{"text":\r"one"}\r]',
    }.items():
        path = written(tmp_path / name, content)
        registry.find_files([path])
        assert len(read(path)) == content.count("two") + 1


QUOTES = {
    "open": (
        'text\n1\n"2\n3\n4\n',
        3,
        "never closed: the cell spans 3 lines, to line 5, the end of",
    ),
    "open in a later cell": ('text,b\n1,"2\n3,4\n', 2, "never closed: the cell spans 2 lines, to line 3"),
    "open at the end": ('text\n1\n"2', 3, "never closed: it is the last line, the end of the file"),
    "text behind": (
        'text\n1\n"a" b\n2\n',
        3,
        r'behind its closing quote; .* is written twice \(""\)',
    ),
    "text behind, over lines": (
        'text\n"a\nb" c\n2\n',
        2,
        r"quote \(the cell spans 2 lines, to line 3\)",
    ),
    "backslash": ('text\n"He said \\"hi\\" and"\n', 2, "goes on behind its closing quote"),
    "header": ('"text\n1\n2\n', 1, "never closed: the cell spans 3 lines"),
}


@pytest.mark.parametrize("compression", ["", ".gz"])
@pytest.mark.parametrize("case", QUOTES)
def test_a_stray_quote_is_an_error_with_its_line(tmp_path, case, compression):
    content, line, message = QUOTES[case]
    raw = content.encode()
    path = written(tmp_path / f"a.csv{compression}", gzip.compress(raw) if compression else raw)
    with pytest.raises(UserError, match=rf"^{path}, line {line}: .*{message}"):
        registry.columns(path), read(path)


def test_control_quotes_that_are_right(tmp_path):
    path = written(tmp_path / "a.csv", 'text,n\n"say ""hi""\n\nthere",1\n\na "b" c,2\n"",3\n"x",4\n')
    with log_lines() as lines:
        assert read(path) == ['say "hi"\n\nthere', 'a "b" c', "", "x"]
    note = f"note: {path}: 1 of 4 rows hold line breaks in quotes; the longest, at line 2, takes 3 lines"
    assert lines == [note]
    written(path, "text\na\nb\n")
    with log_lines() as lines:
        assert read(path) == ["a", "b"]
    assert lines == []


def test_an_open_quote_does_not_fill_the_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(csv_text, "MAX_CELL", 1 << 20)
    path = written(tmp_path / "a.csv", 'text\n"' + "x" * 99 + "\n" + "word\n" * (1 << 19))
    with pytest.raises(UserError, match=r"line 2: a cell has more than 1 Mi characters \(the cell spans "):
        read(path)


def test_locations_of_csv_are_lines(tmp_path):
    path = written(tmp_path / "a.csv", 'text,n\n"a\nb",1\n\nc\nd,2\n')
    (shard,) = registry.shards(path, ("text",))
    (batch,) = registry.read(shard, ("text",))
    assert batch["text"][1] == InvalidValue("wrong number of cells", "1 cells, the header has 2")
    assert [registry.describe_location(path, at) for at in batch.locations] == ["line 2", "line 5", "line 6"]


LAYOUTS = {
    "array": ('[{"text": "a"}, {"text": "b"}]', Layout.ARRAY),
    "array over lines": ('\n[\n {"text": "a"},\n {"text": "b"}\n]\n', Layout.ARRAY),
    "lines": ('{"text": "a"}\n\n{"text": "b"}', Layout.LINES),
    "lines with the key data": ('{"data": [{}], "text": "a"}\n{"data": [{}], "text": "b"}', Layout.LINES),
    "long lines with the key data": (
        "\n".join(f'{{"data": [{{"x": "{"y" * 9000}"}}], "text": "{text}"}}' for text in "ab"),
        Layout.LINES,
    ),
    "wrapped": ('{"data": [{"text": "a"}, {"text": "b"}]}', Layout.WRAPPED),
    "wrapped over lines": ('{\n "data": [\n  {"text": "a"},\n  {"text": "b"}\n ]\n}\n', Layout.WRAPPED),
    "wrapped beside others": (
        '{"version": "1.\\"1", "n": -1.5e3, "x": null,\n"data" : [{"text": "a"}, {"text": "b"}], "end": {}}',
        Layout.WRAPPED,
    ),
    "objects over lines": ('{\n  "text": "a"\n}\n{\n  "text": "b"\n}', Layout.OBJECTS),
}


@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".ndjson", ".jsonl.gz"])
@pytest.mark.parametrize("case", LAYOUTS)
def test_layouts_of_json(tmp_path, case, suffix, bom):
    content, layout = LAYOUTS[case]
    raw = bom + content.encode()
    path = written(tmp_path / f"a{suffix}", gzip.compress(raw) if suffix.endswith("gz") else raw)
    assert json_layout(path) is layout
    assert set(registry.columns(path)) == ({"data", "text"} if "key data" in case else {"text"})
    assert read(path) == ["a", "b"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('[{"text": "a"} {"text": "b"}]', "after 1 rows, ',' is expected, not '{\"text\": \"b\"}]'"),
        ('[{"text": "a"}] ]', "after 1 rows, the end of the file is expected, not ']'"),
        ('[{"text": "a"}] [{"text": "b"}]', "the end of the file is expected, not '[{"),
        ('[{"text": "a"},, {"text": "b"}]', "after 1 rows, a whole JSON value is expected, not ', {"),
        ('[, {"text": "b"}]', "at the beginning, a whole JSON value is expected"),
        ('[{"text": "a"},]', "after 1 rows, a whole JSON value is expected, not ']'"),
        ('[{"text": "a"},', "after 1 rows, it ends"),
        ('[{"text": "a"}', "after 1 rows, it ends"),
        ("[" * 100_000, "row 1 is nested too deeply"),
        ('{"data": [{"text": "a"}]', "behind the array of 'data': "),
        ('{"data": [{"text": "a"}]}}', "behind the array of 'data': Extra data"),
        (
            '{"data": [{"text": "a"}], "test": [{"text": "b"}]}',
            "beside 'data' it has 'test', whose rows would be",
        ),
        ('{\n"text": "a"\n}\n{\n"text": ', "after 1 rows, a whole JSON value is expected"),
    ],
)
def test_damaged_json_is_an_error(tmp_path, content, message):
    path = written(tmp_path / "a.json", content)
    with pytest.raises(UserError) as error:
        read(path)
    assert str(error.value).startswith(f"{path} is damaged: ")
    assert message in str(error.value)


@settings(max_examples=80, deadline=None)
@given(
    st.lists(st.dictionaries(st.text(max_size=4), st.text() | st.integers() | st.floats(allow_nan=False))),
    st.integers(1, 9),
    st.sampled_from([None, 1]),
    st.booleans(),
)
def test_arrays_are_the_same_wherever_a_piece_ends(tmp_path_factory, rows, chunk, indent, ascii_only):
    path = tmp_path_factory.mktemp("array") / "a.json"
    path.write_text(json.dumps(rows, indent=indent, ensure_ascii=ascii_only), "utf-8", "surrogatepass")
    with pytest.MonkeyPatch.context() as patch, path.open("rb") as file:
        patch.setattr(json_text, "CHUNK", chunk)
        assert list(json_text.rows(file, Layout.ARRAY)) == json.loads(json.dumps(rows))


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".jsonl.zst"])
def test_a_repeated_key_is_counted(tmp_path, suffix):
    rows = ['{"text": "a", "text": "b"}', '{"text": "c", "other": {"x": 1, "x": 2}}', '{"text": "d"}']
    text = f"[{','.join(rows)}]" if suffix == ".json" else "\n".join(rows)
    raw = text.encode()
    path = written(tmp_path / f"a{suffix}", COMPRESS[".zst"](raw) if suffix.endswith("zst") else raw)
    repeated = [InvalidValue("repeated key", f"the key '{key}' occurs twice") for key in ("text", "x")]
    assert read(path) == [*repeated, "d"]


def test_a_number_of_too_many_digits(tmp_path):
    row = f'{{"text": "a", "n": {"9" * 5000}}}'
    values = read(written(tmp_path / "a.jsonl", f'{row}\n{{"text": "b"}}\n'))
    assert values[0].kind == "malformed"
    assert "limit (4300 digits)" in values[0].detail
    assert values[1] == "b"
    path = written(tmp_path / "a.json", f'[{{"text": "b"}}, {row}]')
    with pytest.raises(UserError, match=rf"^{path} is damaged: row 2: Exceeds the limit"):
        read(path)


def test_rows_that_are_no_objects_are_told_apart(tmp_path):
    path = written(tmp_path / "a.json", '[[{"from": "human"}], "x", 5, null, true, 1.5, {"text": "a"}]')
    reasons = ("a list", "a string", "a number", "null", "true or false", "a number")
    expected = [InvalidValue("malformed", f"not a JSON object: it is {reason}") for reason in reasons]
    assert read(path) == [*expected, "a"]


def test_nul_characters_are_counted(tmp_path):
    nul = bytes(64)
    for name, content in {
        "a.txt": b"one\n" + nul,
        "a.jsonl": b'{"text": "one"}\n' + nul,
    }.items():
        values = read(written(tmp_path / name, content))
        assert values[0] == "one"
        assert values[1].kind == "NUL characters"
    for text in (read(written(tmp_path / "b.jsonl", r'{"text": "a\u0000b"}'))[0], "a\0b"):
        fault = text_size(text, 100)
        assert (fault.kind, fault.detail) == ("NUL characters", "1 of them in a text")
    assert text_size("ab", 100) == 2
