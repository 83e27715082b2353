"""Text that is no UTF-8, damaged, or ambiguous is named by evaluation and generation as by preprocessing."""

import bz2
import gzip
import lzma

import pytest

from ascendspeed.evaluation.readers import check_dataset_files, csv_rows, json_rows
from ascendspeed.inference import prompts
from ascendspeed.utils.errors import UserError
from ascendspeed.utils.safe_io import LFS_POINTER

UTF16 = '{"prompt": "hello, world"}\n'.encode("utf-16")


def read_csv(path):
    return list(csv_rows(path, ("text", "label")))


def read_json(path):
    return list(json_rows(path))


def read_stdin(path):
    return prompts.prompts_from_text(path.read_bytes(), "stdin")


READERS = [read_csv, read_json, read_stdin, lambda path: prompts.prompts_from_file(str(path))]


@pytest.mark.parametrize("read", READERS)
def test_utf16_and_pointers(tmp_path, read):
    path = tmp_path / "a"
    path.write_bytes(UTF16)
    with pytest.raises(UserError, match=r"is UTF-16, .*: iconv -f UTF-16 -t UTF-8 makes it readable"):
        read(path)
    if read is not read_stdin:
        path.write_bytes(LFS_POINTER + b"v1\n")
        with pytest.raises(UserError, match="is a Git LFS pointer"):
            read(path)


@pytest.mark.parametrize("read", READERS)
def test_compressed_text(tmp_path, read):
    path = tmp_path / "a"
    packed = {"gzip": gzip.compress(b"{}"), "xz": lzma.compress(b"{}"), "bzip2": bz2.compress(b"{}")}
    for program, data in packed.items():
        path.write_bytes(data)
        with pytest.raises(UserError, match=f"is compressed, and .*: {program} -d unpacks it"):
            read(path)
    path.write_bytes(b"\x28\xb5\x2f\xfd\x04\x00\x19")
    with pytest.raises(UserError, match="zstd -d"):
        read(path)
    assert prompts.prompts_from_text(b"BZh", "stdin")[0].text == "BZh"  # a text may begin so


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("test.jsonl", UTF16, "is UTF-16"),
        ("a/test-00000-of-00001.parquet", LFS_POINTER, "is a Git LFS pointer"),
    ],
)
def test_files_of_a_dataset_of_the_hub(tmp_path, name, data, message):
    """They are named before `datasets` calls the whole dataset invalid."""
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=f"{tmp_path / name} {message}"):
        check_dataset_files(tmp_path)
    (tmp_path / name).write_bytes(b'{"text": "x"}\n')
    check_dataset_files(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            'text,label\na,1\n"b,2\nc,3\n',
            "3: this is not CSV: .* never closed: the cell spans 2 lines, to line 4",
        ),
        ('text,label\n"a" b,1\n', "2: this is not CSV: a quoted cell goes on behind its closing quote"),
        ("text,label,text\na,1,b\n", "1: the column 'text' occurs 2 times"),
        ("text,label\na,1\nb\0,2\n", "3: a cell holds NUL characters"),
    ],
)
def test_csv_of_evaluation(tmp_path, content, message):
    path = tmp_path / "a.csv"
    path.write_text(content)
    with pytest.raises(UserError, match=f"^{path}:{message}"):
        read_csv(path)


def test_control_csv_of_evaluation(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text('\ufefftext,label\n\n"a ""b"",\nc",NA\n')
    assert read_csv(path) == [(f"{path}:3", ['a "b",\nc', "NA"])]


def test_prompts_behind_carriage_returns():
    for read in (prompts.prompts_from_text, prompts.prompts_from_json_lines):
        with pytest.raises(UserError, match=r"^stdin has a carriage return at the end of a line in place of"):
            read(b'"one"\r"two"\r', "stdin")
        assert len(read(b'"one"\r\n"two"\r', "stdin")) == 2


def test_nul_characters_in_a_prompt(tmp_path):
    with pytest.raises(UserError, match=r"^stdin, line 2 holds NUL characters"):
        prompts.prompts_from_text(b"one\ntwo \0\n", "stdin")
    assert [prompt.text for prompt in prompts.prompts_from_text(b"one\ntwo\n", "stdin")] == ["one", "two"]
