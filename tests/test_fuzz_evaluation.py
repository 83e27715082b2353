"""Mutated benchmark files and answers: read, or refused with one line. Seeded; the long run is `slow`."""

import io
import json
import random
import shutil

import pyarrow
import pyarrow.parquet
import pytest
from helpers.evaluating import SAMPLE
from helpers.fuzz import Findings, dump, mutate_bytes, mutate_json

from ascendspeed.evaluation.answer_cache import FILE_NAME, AnswerCache
from ascendspeed.evaluation.tasks import load_benchmark

COUNTS = [100, pytest.param(1500, marks=pytest.mark.slow)]
ROWS = {
    "boolq": ("val", "train", {"question": "q", "passage": "p", "idx": 0, "label": True}),
    "gsm8k": ("test", "train", {"question": "q", "answer": "x\n#### 42"}),
    "hellaswag": (
        "hellaswag_val",
        "hellaswag_train",
        {"ctx_a": "a", "ctx_b": "b", "activity_label": "c", "endings": ["1", "2", "3", "4"], "label": 1},
    ),
}
WHOLE_FILES = (b"", b"\0", b'"', b'"' * 500, b"\xef\xbb\xbfQ,a,b,c,d,A\n", b"a" * 200_000 + b",1,2,3,4,A\n")


def mutated_row(row: dict, rng: random.Random) -> bytes:
    return dump(mutate_json(row, rng)) if rng.random() < 0.7 else mutate_bytes(dump(row), rng)


@pytest.mark.parametrize("count", COUNTS)
def test_csv(count, tmp_path):
    rng, findings = random.Random(8), Findings()
    folder = tmp_path / "mmlu"
    shutil.copytree(SAMPLE, folder)
    files = sorted(path for split in ("dev", "test") for path in (folder / split).glob("*.csv"))
    for number in range(count):
        path = rng.choice(files)
        content = path.read_bytes()
        other = rng.choice([*WHOLE_FILES, content.decode().encode("utf-16"), content.replace(b",", b"\t")])
        path.write_bytes(mutate_bytes(content, rng) if rng.random() < 0.8 else other)
        findings.case(f"{number}: {path.name}", lambda: (load_benchmark("mmlu", folder, 3), None)[1])
        path.write_bytes(content)
    findings.check()


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("task", ROWS)
def test_json_lines(task, count, tmp_path):
    rng, findings = random.Random(9), Findings()
    scored, examples, row = ROWS[task]
    (tmp_path / f"{examples}.jsonl").write_bytes(b"\n".join([dump(row)] * 3))
    for number in range(count):
        lines = [dump(row), mutated_row(row, rng), dump(row)]
        (tmp_path / f"{scored}.jsonl").write_bytes(b"\n".join(lines))
        findings.case(f"{number}", lambda: (load_benchmark(task, tmp_path, 2), None)[1])
    findings.check()


def parquet(rows: list[dict]) -> bytes:
    content = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), content)
    return content.getvalue()


@pytest.mark.parametrize("count", COUNTS)
def test_parquet(count, tmp_path):
    """Files of one subject, and of all subjects together."""
    rng, findings = random.Random(10), Findings()
    (tmp_path / "subjects.csv").write_text("subject,category\nsub,x\n")
    good = [{"question": "q", "choices": list("abcd"), "answer": i % 4, "subject": "sub"} for i in range(4)]
    cells = (None, "x", ["a"], ["a", None, "c", "d"], 4, -1, True, 1.0, "A", {"a": 1}, b"\xff")
    for number in range(count):
        field = rng.choice(list(good[0]))
        if (kind := rng.random()) < 0.5:
            content = mutate_bytes(parquet(good), rng)
        elif kind < 0.9:
            cell = rng.choice(cells)
            content = parquet([row | {field: cell} for row in good])
        else:
            content = parquet([{name: value for name, value in row.items() if name != field} for row in good])
        place = tmp_path / rng.choice(["sub", "all"])
        place.mkdir()
        (place / "test-00000-of-00001.parquet").write_bytes(content)
        (place / "dev-00000-of-00001.parquet").write_bytes(parquet(good))
        findings.case(f"{number}: {place.name}", lambda: (load_benchmark("mmlu", tmp_path, 2), None)[1])
        shutil.rmtree(place)
    findings.check()


@pytest.mark.parametrize("count", COUNTS)
def test_answers(count, tmp_path):
    """questions.jsonl with mutated lines: every whole record is kept, or the file is refused."""
    rng, findings = random.Random(11), Findings()
    record = {"key": "k", "task": "mmlu", "loglikelihoods": [-1.5, -2.0], "greedy": [True, False]}
    settings = {"model_sha256": "m", "num_fewshot": None}

    def open_and_check() -> str | None:
        answers = AnswerCache(tmp_path, settings)
        kept = {f"k{i}" for i in range(4) if i != place} - set(answers.records)
        answers.close()
        return f"{sorted(kept)} are lost" if kept else None

    for number in range(count):
        lines = [dump({"settings": settings}), *(dump(record | {"key": f"k{i}"}) for i in range(4))]
        place = rng.randrange(-1, 4)  # -1: the settings
        lines[place + 1] = mutated_row(json.loads(lines[place + 1]), rng).replace(b"\n", b"")
        (tmp_path / FILE_NAME).write_bytes(b"\n".join(lines) + b"\n")
        if place >= 0:
            findings.case(f"{number}", open_and_check)
        else:
            findings.case(f"{number}", lambda: AnswerCache(tmp_path, settings).close())
    findings.check()
