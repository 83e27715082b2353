import importlib.util
import json
import shutil
from pathlib import Path

import pyarrow.parquet
import pytest

from ascendspeed.tokenization import tokenizer
from ascendspeed.utils.errors import UserError

SCRIPT = Path(__file__).resolve().parents[1] / "examples" / "intern" / "make_quickstart_data.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("make_quickstart_data", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def contents(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_rows_and_tokenizer(script, tmp_path, capsys):
    first = script.make(tmp_path / "one", 300, 1024)
    first_contents = contents(first)
    assert set(first_contents) >= {
        "train.parquet",
        "heldout.parquet",
        "heldout.txt",
        "chat.jsonl",
        "chat_heldout.jsonl",
        "tokenizer/tokenizer.model",
        "made.json",
    }
    train, held_out = (
        pyarrow.parquet.read_table(first / name).to_pylist() for name in ("train.parquet", "heldout.parquet")
    )
    assert len(train) == 300
    assert held_out
    assert set(train[0]) == {"instruction", "input", "output"}
    assert {bool(row["input"]) for row in train} == {True, False}
    chat = [json.loads(line) for line in (first / "chat.jsonl").read_text("utf-8").splitlines()]
    assert len(chat) > 20
    assert len({row["instruction"] for row in chat}) == len(chat)
    asked = {
        json.loads(line)["instruction"]
        for line in (first / "chat_heldout.jsonl").read_text("utf-8").splitlines()
    }
    assert asked
    assert not asked & {row["instruction"] for row in chat}
    outputs = {row["output"].splitlines()[0].strip() for row in train}
    assert all(row["instruction"].endswith("?") and row["output"] in outputs for row in chat)
    modules = [{row["instruction"].split()[-1] for row in rows} for rows in (train, held_out)]
    assert not modules[0] & modules[1]
    ours = tokenizer.load(first / "tokenizer")
    assert (ours.vocab_size, ours.bos, ours.eos, ours.pad) == (1024, 1, 2, 2)
    for row in held_out[:20]:
        ids = ours.encode(row["output"])
        assert ours.decode(ids) == row["output"]
        assert len(ids) < len(row["output"].encode()) / 1.5  # it has merges; single bytes would be as many

    made_at = (first / "train.parquet").stat().st_mtime_ns
    script.make(first, 300, 1024)
    assert (first / "train.parquet").stat().st_mtime_ns == made_at
    assert "reusing" in capsys.readouterr().out
    (first / "made.json").unlink()  # as a run that was cut off leaves it
    shutil.rmtree(first / "tokenizer")
    script.make(first, 300, 1024)
    assert contents(first) == first_contents


def test_too_much_is_asked_for(script, tmp_path, monkeypatch):
    few = script.modules()[:100]
    monkeypatch.setattr(script, "modules", lambda: few)
    with pytest.raises(UserError, match="has only"):
        script.make(tmp_path, 10**7, 1024)
    with pytest.raises(UserError, match="--vocab-size 30000 does not fit this text"):
        script.make(tmp_path, 100, 30000)
    assert not (tmp_path / "made.json").exists()
