"""Finding input files: nothing of a folder or a glob is passed over without a word."""

import gzip
import json
import os
import subprocess

import pyarrow
import pyarrow.parquet
import pytest
from helpers.log_lines import log_lines

from ascendspeed.data.readers import registry
from ascendspeed.utils.errors import UserError
from ascendspeed.utils.safe_io import LFS_POINTER

ROW = '{"text": "a"}\n'


def fill(folder, *names):
    """Makes files of one row each."""
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        content = ROW.encode()
        path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return [folder / name for name in names]


def find(*inputs):
    """Files and notes."""
    with log_lines() as lines:
        files = registry.find_files(inputs)
    return files, lines


def test_a_folder_names_what_it_does_not_read(tmp_path):
    read = fill(tmp_path, "a.jsonl", "b/c.ndjson", "d.JSONL")
    fill(tmp_path, "b.arrow", "b/noext", "_part.jsonl", ".hidden.jsonl", ".gitignore", "dataset_infos.json")
    fill(tmp_path, ".cache/e.jsonl", "index-cache/f.jsonl", "README.md")
    files, notes = find(tmp_path)
    assert files == sorted(read)
    names = ".hidden.jsonl, README.md, _part.jsonl, b/noext, b.arrow and 1 more"
    assert notes[0] == f"note: {tmp_path}: 6 files are not read: {names}"
    (tmp_path / "dataset_info.json").write_text("{}")
    fill(tmp_path, "state.json")  # of save_to_disk, and an ordinary name elsewhere
    assert find(tmp_path)[0] == sorted(read)
    assert find(*fill(tmp_path / "other", "state.json"))[0] == [tmp_path / "other/state.json"]


def test_several_types_are_named(tmp_path):
    fill(tmp_path, "a.jsonl", "b.jsonl", "c.jsonl.gz", "d.txt")
    assert find(tmp_path)[1] == ["note: files of several types are read: 2 .jsonl, 1 .jsonl.gz and 1 .txt"]
    assert find(f"{tmp_path}/*.jsonl")[1] == []


def test_links_are_followed(tmp_path):
    data = tmp_path / "data"
    fill(data, "a.jsonl")
    fill(tmp_path / "elsewhere", "b.jsonl")
    (data / "more").symlink_to("../elsewhere")
    (data / "circle").symlink_to(".")
    assert find(data)[0] == [data / "a.jsonl", data / "more/b.jsonl"]


@pytest.mark.parametrize("name", ["gone.jsonl", "gone"])
def test_a_link_that_leads_nowhere(tmp_path, name):
    fill(tmp_path, "a.jsonl")
    (tmp_path / name).symlink_to("absent")
    message = rf"/{name} is a link to absent, which does not exist$"
    for path in (tmp_path, tmp_path / name, f"{tmp_path}/*"):
        with pytest.raises(UserError, match=message):
            find(path)
    (tmp_path / name).unlink()
    (tmp_path / name).symlink_to(name)
    with pytest.raises(UserError, match=rf"/{name} cannot be read: Too many levels of symbolic links"):
        find(tmp_path)


def test_what_cannot_be_read_is_an_error(tmp_path, monkeypatch):
    fill(tmp_path, "a.jsonl", "locked/b.jsonl")
    scandir, access, stat = os.scandir, os.access, os.stat

    def refuse(function):
        def call(path, *args, **options):
            if str(path).endswith("locked"):
                raise PermissionError(13, "Permission denied", str(path))
            return function(path, *args, **options)

        return call

    monkeypatch.setattr(os, "scandir", refuse(scandir))  # the tests may run as root, who may read anything
    with pytest.raises(UserError, match=r"locked cannot be read: Permission denied; make it readable"):
        find(tmp_path)
    monkeypatch.setattr(os, "access", lambda path, mode: access(path, mode) and "locked" not in str(path))
    for pattern in ("locked/*.jsonl", "*/*.jsonl", "**/*.jsonl"):
        with pytest.raises(UserError, match=r"locked cannot be read: no permission"):
            find(tmp_path / pattern)
    assert find(tmp_path / "*.jsonl")[0] == [tmp_path / "a.jsonl"]
    monkeypatch.setattr(os, "stat", refuse(stat))
    with pytest.raises(UserError, match=r"locked cannot be read: Permission denied$"):
        find(tmp_path / "locked")


def test_a_file_without_permission_is_an_error(tmp_path, monkeypatch):
    fill(tmp_path, "a.jsonl")

    def refuse(self, mode):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("pathlib.Path.open", refuse)
    with pytest.raises(UserError, match=r"a\.jsonl cannot be read: Permission denied$"):
        find(tmp_path)


def test_splits_of_a_folder_are_not_mixed(tmp_path):
    train, test = fill(tmp_path, "main/train-00000-of-00001.jsonl", "main/test-00000-of-00001.jsonl")
    with pytest.raises(
        UserError, match=rf"main holds several splits, test, train: name the files of one, such as '{test}'$"
    ):
        find(tmp_path / "main")
    assert find(f"{tmp_path}/main/train-*") == ([train], [])
    files, notes = find(f"{tmp_path}/main/*")
    assert files == [test, train]
    assert notes == [f"note: {tmp_path}/main/*: files of several splits are read: test, train"]
    assert find(train, test)[0] == [train, test]


def test_a_file_is_read_once(tmp_path):
    path = fill(tmp_path, "a.jsonl")[0]
    with pytest.raises(UserError, match=r"/a\.jsonl is named twice: its rows would be read twice"):
        find(path, f"{tmp_path}/*.jsonl")
    (tmp_path / "b.jsonl").symlink_to(path)
    with pytest.raises(UserError, match=r"/a\.jsonl and .*/b\.jsonl are the same file"):
        find(tmp_path)
    assert find(tmp_path / "b.jsonl")[0] == [tmp_path / "b.jsonl"]


def test_a_glob_names_folders_that_it_matches(tmp_path):
    fill(tmp_path, "a.jsonl", "more/b.jsonl")
    files, notes = find(f"{tmp_path}/*")
    assert files == [tmp_path / "a.jsonl"]
    assert notes == [f"note: {tmp_path}/*: not read, because they are no files: {tmp_path}/more"]
    assert len(find(f"{tmp_path}/**/*.jsonl")[0]) == 2


def test_a_glob_names_splits_that_it_mixes(tmp_path):
    fill(tmp_path, "train/a.jsonl", "test/a.jsonl", "more/test.jsonl")
    note = f"note: {tmp_path}/t*/*: files of several splits are read: test, train"
    assert find(f"{tmp_path}/t*/*")[1] == [note]
    assert find(f"{tmp_path}/test/*")[1] == []
    assert find(f"{tmp_path}/more/*")[1] == []


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("", "an empty path names no data"),
        ("/", "/ is the root of the file system"),
        ("/..", "is the root of the file system"),
        ("/dev/null", "there is no such file or folder"),
        ("a" * 300, "cannot be read: File name too long"),
        ("a\0b", "cannot be read: embedded null byte"),
        ("a.zst", r"a\.zst: its name must have the type of the content too, such as \.jsonl\.zst"),
        ("noext", r"noext: files without a suffix cannot be read; there are: \.parquet, \.jsonl, \.ndjson"),
        ("b.parquet.gz", r"files of type \.parquet\.gz cannot be read; .*all but \.parquet also with \.gz"),
    ],
)
def test_names_of_nothing(tmp_path, monkeypatch, name, message):
    monkeypatch.chdir(tmp_path)
    fill(tmp_path, "a.zst", "noext", "b.parquet.gz")
    with pytest.raises(UserError, match=message):
        find(name)


def test_no_input():
    with pytest.raises(UserError, match="--input names no file; give files, quoted globs or folders"):
        find()


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.parquet"])
def test_a_git_lfs_pointer_is_no_data(tmp_path, name):
    (tmp_path / name).write_bytes(LFS_POINTER + b"v1\noid sha256:0\nsize 5\n")
    with pytest.raises(UserError, match=r"is a Git LFS pointer, not the file itself: run git lfs pull"):
        find(tmp_path)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "a.jsonl", "a.json", "a.csv", "a.tsv"])
def test_utf16_is_named(tmp_path, encoding, name):
    content = '{"text": "first line"}\nsecond line of this file\n'.encode(encoding)
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    with pytest.raises(
        UserError, match=r"is UTF-(16|16LE|16BE|32), .*iconv -f UTF-.* -t UTF-8 makes it"
    ) as e:
        find(tmp_path)
    name = str(e.value).split(" is ")[1].split(",")[0]
    command = ["iconv", "-f", name, "-t", "UTF-8"]
    converted = subprocess.run(command, input=content, capture_output=True, check=True).stdout
    assert converted == content.decode(encoding).encode()


def test_control_text_with_few_nuls_is_no_utf16(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"text\n" + bytes(64))
    (tmp_path / "b.txt").write_bytes(b"a\0b\n")
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a"]}), tmp_path / "c.parquet")
    assert len(find(tmp_path)[0]) == 3


def test_columns_that_stand_there_twice(tmp_path):
    from ascendspeed.data.handlers.registry import HANDLERS, check_columns

    handler = HANDLERS["GeneralPretrainHandler"].__new__(HANDLERS["GeneralPretrainHandler"])
    handler.keys = handler.required = ("text",)
    table = pyarrow.table([["a"], ["b"], ["c"], ["d"]], ["text", "text", "other", "other"])
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    (tmp_path / "a.csv").write_text("text,other,text,other\na,b,c,d\n")
    for path in find(tmp_path / "a.csv", tmp_path / "a.parquet")[0]:
        with pytest.raises(UserError, match=rf"{path.name}: the column 'text' occurs 2 times; rename"):
            check_columns(handler, path, registry.columns(path))
        handler.keys = handler.required = ("other",)
        with pytest.raises(UserError, match="the column 'other' occurs 2 times"):
            check_columns(handler, path, registry.columns(path))
        handler.keys = handler.required = ("text",)
    (tmp_path / "b.csv").write_text("text,,\na,b,c\n")  # columns that nobody reads may have equal names
    check_columns(handler, tmp_path / "b.csv", registry.columns(tmp_path / "b.csv"))
    assert json.dumps(registry.columns(tmp_path / "b.csv")) == '["text", "", ""]'
