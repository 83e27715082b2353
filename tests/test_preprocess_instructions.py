"""Preprocessing of instruction data: the masked pair on disk, and errors of rows by file and line."""

import gzip
import json
import random
import re
import subprocess
import sys

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from helpers.chat import KINDS
from helpers.corpus import sentencepiece_dir
from helpers.instruction_rows import ROWS
from helpers.log_lines import log_lines
from helpers.preprocess import TOOL, read_pair
from helpers.supervised_tokens import lost_by_hand
from megatron.core.datasets.indexed_dataset import IndexedDataset

from ascendspeed.data.document import Truncation
from ascendspeed.data.handlers.base import EncoderConfig
from ascendspeed.data.indexed.masked_pair import KEYS, MaskedPair, find_pairs, pair_prefix
from ascendspeed.data.preprocess import preprocess
from ascendspeed.data.readers import lines, parquet, sequential
from ascendspeed.data.tokenize import DocumentEncoder
from ascendspeed.utils.errors import UserError

GENERAL, ALPACA, SHAREGPT, BELLE = (
    f"{name}InstructionHandler" for name in ("General", "AlpacaStyle", "SharegptStyle", "BelleMultiTurn")
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return KINDS["v2"](tmp_path_factory.mktemp("tokenizer") / "v2")


def write(path, rows, **options):
    """Rows in the format of the suffix; a row that is a string is a line as it stands."""
    path.parent.mkdir(exist_ok=True)
    text = "".join(
        f"{row if isinstance(row, str) else json.dumps(row, ensure_ascii=False)}\n" for row in rows
    )
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, **options)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows, indent=1))
    elif path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text)
    return path


def run(tmp_path, inputs, tokenizer, handler=SHAREGPT, workers=1, prefix="p", strict=False, **options):
    """Returns the facts and the log lines."""
    job = EncoderConfig(str(tokenizer), handler, **options)
    with log_lines() as lines:
        facts = preprocess(inputs, str(tmp_path / prefix), job, workers, strict=strict, overwrite=True)
    return facts["packed"], lines


def masked_files(prefix):
    return {key: read_pair(pair_prefix(prefix, key)) for key in KEYS}


def content(prefix):
    """Files of a masked pair without the identity of their source."""
    pairs = masked_files(prefix)
    for files in pairs.values():
        files["meta"] = {key: value for key, value in json.loads(files["meta"]).items() if key != "source"}
    return pairs


def test_masked_pair_has_the_published_names_and_content(tmp_path, tokenizer):
    facts, log = run(tmp_path, [write(tmp_path / "a.jsonl", ROWS)], tokenizer)
    ids, labels = (IndexedDataset(pair_prefix(tmp_path / "p", key)) for key in KEYS)
    assert (tmp_path / "p_packed_input_ids_document.bin").is_file()
    assert (tmp_path / "p_packed_labels_document.idx").is_file()
    encoder = DocumentEncoder(EncoderConfig(str(tokenizer), SHAREGPT))
    columns = {name: [row.get(name) for row in ROWS] for name in encoder.handler.columns}
    documents = encoder.encode(columns)["packed"].documents
    assert len(ids) == len(labels) == len(documents) == 120
    for i, document in enumerate(documents):
        assert ids[i].tolist() == document.tokens.tolist()
        assert labels[i].tolist() == np.where(document.loss_mask, document.tokens, -100).tolist()
    assert ids.index.dtype == labels.index.dtype == np.int32
    assert facts["tokens"] == sum(len(d.tokens) for d in documents)
    assert facts["chat_template"] == "v2.5"
    assert log[:2] == ["note: chat template v2.5", f"note: {tmp_path}/a.jsonl: columns not read: id"]
    assert (
        f"120 documents, {facts['tokens']:,} tokens, {sum(int(d.loss_mask.sum()) for d in documents):,} of "
        "them supervised" in log[2]
    )
    opened = MaskedPair("p", *find_pairs(str(tmp_path / "p")))
    assert opened.document(7).tokens.tolist() == documents[7].tokens.tolist()


@pytest.mark.slow
def test_the_same_bytes_for_any_number_of_workers_and_any_format(tmp_path, tokenizer, monkeypatch):
    for module in (parquet, lines, sequential):
        monkeypatch.setattr(module, "SHARD_BYTES", 3000)
    inputs = {name: write(tmp_path / name, ROWS) for name in ("a.jsonl", "b.json", "c.jsonl.gz", "d.parquet")}
    inputs["e.parquet"] = write(tmp_path / "e.parquet", ROWS, row_group_size=17)
    outputs = {}
    for name, path in inputs.items():
        for workers in (1, 3) if name in ("a.jsonl", "d.parquet") else (1,):
            run(tmp_path, [path], tokenizer, workers=workers, prefix=name)
            outputs[name, workers] = content(tmp_path / name)
    first = outputs["a.jsonl", 1]
    assert all(files == first for files in outputs.values())
    run(tmp_path, [write(tmp_path / "f.jsonl", ROWS[::-1])], tokenizer, prefix="f")
    assert content(tmp_path / "f") != first  # control


BAD = [
    '{"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "va',
    {"conversations": [{"from": "boss", "value": "q"}, {"from": "gpt", "value": "a"}]},
    {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": " "}]},
    {"conversations": [{"from": "human", "value": "q", "mood": 1}, {"from": "gpt", "value": "a"}]},
    {"conversations": [{"from": "human", "value": "q"}]},
    {"text": "another schema"},
]
KINDS_OF_BAD = ["malformed", "wrong role", "empty answer", "unknown field", "wrong order", "no conversation"]


def mixed(seed=3):
    """Good, blank and bad lines in random order: (lines, kind -> numbers of the bad lines)."""
    chance = random.Random(seed)
    rows, numbers = [], {kind: [] for kind in KINDS_OF_BAD}
    for row in ROWS:
        while chance.random() < 0.4:
            which = chance.randrange(-2, len(BAD))
            rows.append(BAD[which] if which >= 0 else "")
            if which >= 0:
                numbers[KINDS_OF_BAD[which]].append(len(rows))
        rows.append(row)
    return rows, numbers


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
@pytest.mark.parametrize("workers", [1, 2])
def test_bad_rows_are_said_by_line_whatever_the_shards(tmp_path, tokenizer, monkeypatch, name, workers):
    if workers == 1:
        for module in (lines, sequential):
            monkeypatch.setattr(module, "SHARD_BYTES", 1500)
    rows, bad_numbers = mixed()
    path = write(tmp_path / name, rows)
    facts, log = run(tmp_path, [path], tokenizer, workers=workers)
    assert facts["documents"] == len(ROWS)
    assert facts["skipped"] == {kind: len(numbers) for kind, numbers in bad_numbers.items()}
    for kind, numbers in bad_numbers.items():
        shown = [line for line in log if line.startswith(f"skipped, {kind}: ")]
        assert len(numbers) > 4
        assert [re.match(rf".*{re.escape(name)}, line (\d+): ", line).group(1) for line in shown[:3]] == [
            str(n) for n in numbers[:3]
        ]
        assert shown[3] == f"skipped, {kind}: ... and {len(numbers) - 3} more"
        assert len(shown) == 4


def test_bad_rows_of_columnar_files_are_said_by_row(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(parquet, "SHARD_BYTES", 1500)
    rows = [{"conversations": row["conversations"]} for row in ROWS]
    for number in (5, 50, 51, 119):
        rows[number] = {"conversations": [{"from": "human", "value": "q"}]}
    for name, options in (("a.parquet", {}), ("b.parquet", {"row_group_size": 13}), ("c.json", {})):
        _, log = run(tmp_path, [write(tmp_path / name, rows, **options)], tokenizer)
        assert [
            re.search(rf"{name}, row (\d+)", line).group(1) for line in log if "wrong order: /" in line
        ] == ["6", "51", "52"]
        assert "skipped, wrong order: ... and 1 more" in log
    header, *more = ["instruction,output\n", *(f'q{i},"a\n{i}"\n' for i in range(9))]
    (tmp_path / "d.csv").write_text("".join([header, *more[:4], "x,\n", *more[4:]]))
    facts, log = run(tmp_path, [tmp_path / "d.csv"], tokenizer, ALPACA)
    assert facts["documents"] == 9
    assert any(line.endswith("d.csv, line 10: 'output' says nothing") for line in log)


def test_strict_stops_at_the_first_bad_row_and_writes_nothing(tmp_path, tokenizer):
    rows, bad_numbers = mixed()
    path, first = write(tmp_path / "a.jsonl", rows), min(min(numbers) for numbers in bad_numbers.values())
    for workers in (1, 2):
        with pytest.raises(UserError, match=rf"--strict: .*a\.jsonl, line {first}: .*nothing was written"):
            run(tmp_path, [path], tokenizer, strict=True, workers=workers)
    assert not list(tmp_path.glob("p_*"))
    done = subprocess.run(
        [
            *(
                sys.executable,
                TOOL,
                "--input",
                path,
                "--tokenizer-name-or-path",
                tokenizer,
                "--output-prefix",
                tmp_path / "p",
            ),
            *("--handler-name", SHAREGPT, "--workers", "1", "--strict"),
        ],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert f"a.jsonl, line {first}:" in done.stderr
    facts, _ = run(tmp_path, [write(tmp_path / "good.jsonl", ROWS)], tokenizer, strict=True)
    assert facts["documents"] == len(ROWS)


def test_mixed_schemas(tmp_path, tokenizer):
    """A second file with other columns, and rows of another type: counted, by file and line."""
    good = write(
        tmp_path / "1.jsonl",
        [{"instruction": "q", "output": "a"}, ["q", "a"], {"instruction": "q", "output": ["a"]}],
    )
    other = write(tmp_path / "2.jsonl", [{"question": "q", "answer": "a"}] * 5)
    facts, log = run(tmp_path, [good, other], tokenizer, ALPACA)
    assert facts["documents"] == 1
    assert facts["skipped"] == {"malformed": 1, "no 'instruction'": 5, "not text": 1}
    assert any("1.jsonl, line 2: not a JSON object: " in line for line in log)
    assert any(line.endswith("2.jsonl, line 1: 'instruction' is missing or null") for line in log)
    with pytest.raises(
        UserError, match=r"2\.jsonl: AlpacaStyleInstructionHandler needs the column 'instruction'"
    ):
        run(tmp_path, [good, other], tokenizer, ALPACA, strict=True)
    with pytest.raises(
        UserError,
        match=r"2\.jsonl: AlpacaStyleInstructionHandler needs the column 'instruction'; there are: question",
    ):
        run(tmp_path, [other], tokenizer, ALPACA)
    with pytest.raises(UserError, match="needs the column 'conversations or messages or conversation'"):
        run(tmp_path, [other], tokenizer)
    with pytest.raises(
        UserError,
        match=r"no document under 'packed' in 1 files: .* skipped, wrong order: .*line 1: .*"
        "nothing was written",
    ):
        run(tmp_path, [write(tmp_path / "3.jsonl", [BAD[4]])], tokenizer)


def test_a_csv_holds_no_list_that_is_not_json(tmp_path, tokenizer):
    (tmp_path / "a.csv").write_text("conversations\nx\n")
    with pytest.raises(UserError, match=r"1 no conversation; .*a\.csv, line 2: conversations is 'x', not a"):
        run(tmp_path, [tmp_path / "a.csv"], tokenizer)
    (tmp_path / "b.csv").write_text("instruction,output,history\nq,a,\nq,a,b\n")
    lines = run(tmp_path, [tmp_path / "b.csv"], tokenizer, ALPACA)[1]
    assert any("from 2 rows, skipped: 1 wrong history" in line for line in lines)


def test_text_that_is_not_utf8_deep_in_a_columnar_file(tmp_path, tokenizer):
    def broken(texts):
        data = pyarrow.array(texts, pyarrow.binary())
        return pyarrow.Array.from_buffers(pyarrow.string(), len(data), data.buffers())

    values = broken([b"q", b"a", b"q", b"caf\xe9", b"q", b"a"])
    pairs = pyarrow.StructArray.from_arrays([pyarrow.array(["human", "gpt"] * 3), values], ["from", "value"])
    table = pyarrow.table({"conversations": pyarrow.ListArray.from_arrays([0, 2, 4, 6], pairs)})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    facts, log = run(tmp_path, [tmp_path / "a.parquet"], tokenizer)
    assert facts["documents"] == 2
    assert facts["skipped"] == {"invalid UTF-8": 1}
    assert any("a.parquet, row 2" in line for line in log)


def test_seq_length_cuts_and_counts(tmp_path, tokenizer):
    path = write(tmp_path / "a.jsonl", ROWS)
    assert not any("cut to" in line for line in run(tmp_path, [path], tokenizer)[1])
    untruncated = MaskedPair("p", *find_pairs(str(tmp_path / "p")))
    length = int(np.median(untruncated.lengths))
    documents = [untruncated.document(i) for i in range(120)]
    expected = [d for d in documents if len(d.tokens) <= length or d.loss_mask[1:length].any()]
    facts, log = run(tmp_path, [path], tokenizer, seq_length=length)
    lost = lost_by_hand(documents, length)
    assert Truncation(*(facts[name] for name in ("truncated", "answers_lost", "answers_cut"))) == lost
    assert 0 < lost.documents < 120
    assert lost.lost_answers > lost.cut_answers > 0
    assert facts["seq_length"] == length
    assert (
        f"{lost.documents} documents cut to --seq-length {length}: {lost.lost_answers} answers lost, "
        f"{lost.cut_answers} cut" in log[2]
    )
    cut = MaskedPair("p", *find_pairs(str(tmp_path / "p")))
    assert [cut.document(i).tokens.tolist() for i in range(len(expected))] == [
        d.tokens[:length].tolist() for d in expected
    ]
    first = [int(np.flatnonzero(d.loss_mask)[0]) for d in documents]
    short = int(np.median(first))
    facts, log = run(tmp_path, [path], tokenizer, seq_length=short)
    assert facts["skipped"] == {"answers beyond --seq-length": sum(at >= short for at in first)}
    assert any("skipped, answers beyond --seq-length: " in line and "a.jsonl, line" in line for line in log)


def test_the_command_and_what_it_says(tmp_path):
    tokenizer = sentencepiece_dir(tmp_path / "plain")
    rows = [{"instruction": f"Say {i}.", "input": None, "output": f"{i}!"} for i in range(30)]
    path = write(tmp_path / "train.parquet", rows)
    command = [
        sys.executable,
        TOOL,
        "--input",
        path,
        "--tokenizer-name-or-path",
        tokenizer,
        "--output-prefix",
        tmp_path / "alpaca",
    ]
    command += [
        "--workers",
        "1",
        "--tokenizer-type",
        "PretrainedFromHF",
        "--handler-name",
        GENERAL,
        "--seq-length",
        "4096",
    ]
    done = subprocess.run([*command, "--append-eod"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "ignored" not in done.stdout
    assert "note:" not in done.stdout
    assert "30 documents" in done.stdout
    without_eod = subprocess.run([*command, "--overwrite"], capture_output=True, text=True)
    assert (
        "note: answers have no end in the published prompt, so models learn none: add --append-eod"
        in without_eod.stdout
    )
    keys = subprocess.run([*command, "--json-keys", "foo"], capture_output=True, text=True)
    assert keys.returncode == 2
    assert (
        "error: --json-keys means nothing to GeneralInstructionHandler, only to GeneralPretrainHandler"
        in keys.stderr
    )
    short = subprocess.run([*command, "--seq-length", "1"], capture_output=True, text=True)
    assert short.returncode == 2
    assert "a document of one token has no token to predict" in short.stderr


def test_columns_that_are_not_read(tmp_path, tokenizer):
    rows = [{"instruction": "q", "input": f"{i}", "output": "a", "text": "all of it"} for i in range(4)]
    for name in ("a.parquet", "b.parquet"):
        write(tmp_path / name, rows)
    wrong = [{"instruction": "q", "inputs": f"{i}", "output": "a"} for i in range(4)]
    inputs = [tmp_path / "a.parquet", tmp_path / "b.parquet", write(tmp_path / "c.jsonl", rows[:2] + wrong)]
    facts, log = run(tmp_path, inputs, tokenizer, ALPACA)
    assert facts["documents"] == 10
    assert facts["skipped"] == {"misspelt column": 4}
    assert f"note: {inputs[0]} and 1 more: columns not read: text" in log
    assert f"note: {inputs[2]}: columns not read: text, inputs" in log
    assert (
        f"skipped, misspelt column: {inputs[2]}, line 3: 'inputs' is not read; did you mean 'input'?" in log
    )
    for handler in (ALPACA, GENERAL, "AlpacaPretrainHandler"):
        with pytest.raises(
            UserError,
            match=r"c\.jsonl, line 3: 'inputs' is not read; did you mean 'input'\? \(misspelt column\)",
        ):
            run(tmp_path, inputs, tokenizer, handler, strict=True)
    with pytest.raises(
        UserError, match=r"no document .*'inputs' is not read; did you mean 'input'\?; nothing was written"
    ):
        run(tmp_path, [write(tmp_path / "d.parquet", wrong)], tokenizer, ALPACA)
    conversation = [
        {"from": "human", "value": "q"},
        {"from": "gpt", "value": "a"},
    ]  # one of two names is enough
    facts, log = run(
        tmp_path,
        [write(tmp_path / "e.jsonl", [{"conversations": conversation, "message": "x"}] * 3)],
        tokenizer,
    )
    assert facts["documents"] == 3
    assert any(line.endswith("columns not read: message") for line in log)


@pytest.mark.parametrize("handler", [ALPACA, "AlpacaPretrainHandler"])
def test_a_csv_row_with_too_many_or_too_few_cells_is_counted(tmp_path, tokenizer, handler):
    (tmp_path / "a.csv").write_text("instruction,input,output\nq,x,a\nq,1, 2,3,a\nq,x,a\nq,a\n")
    job = EncoderConfig(str(tokenizer), handler)
    with log_lines() as log:
        (facts,) = preprocess([tmp_path / "a.csv"], str(tmp_path / "p"), job).values()
    assert facts["documents"] == 2
    assert facts["skipped"] == {"wrong number of cells": 2}
    assert f"skipped, wrong number of cells: {tmp_path}/a.csv, line 3: 5 cells, the header has 3" in log
    with pytest.raises(
        UserError, match=r"--strict: .*a\.csv, line 3: 5 cells, the header has 3 \(wrong number of cells\)"
    ):
        preprocess([tmp_path / "a.csv"], str(tmp_path / "p"), job, strict=True)
