"""Benchmark files and command lines that are wrong: each is an error with file and line."""

import json

import pytest
from helpers.benchmark_files import ONE, hub, joint, put_parquet, small
from helpers.evaluating import MAKERS, SAMPLE, mmlu, put_csv, put_jsonl, rows

from ascendspeed.evaluation.args import resolve
from ascendspeed.evaluation.loaders import CUSTOM_SUBJECTS
from ascendspeed.evaluation.subjects import SUBJECTS
from ascendspeed.evaluation.tasks import load_benchmark
from ascendspeed.utils.errors import UserError


def test_joint_files_that_are_wrong(tmp_path):
    joint(tmp_path / "all", [*list(SUBJECTS["mmlu"])[1:], "astrology"])
    with pytest.raises(UserError, match=r"all: mmlu lacks abstract_algebra and has astrology, which it does"):
        load_benchmark("mmlu", tmp_path, 5)
    joint(tmp_path / "all", SUBJECTS["mmlu"])
    (tmp_path / "all/dev-00000-of-00001.parquet").unlink()
    assert load_benchmark("mmlu", tmp_path, 0).size == 57 * 2
    with pytest.raises(UserError, match=r"all: dev-\*\.parquet has no questions in abstract_algebra"):
        load_benchmark("mmlu", tmp_path, 5)
    put_parquet(tmp_path / "all/test-00000-of-00001.parquet", [{"question": "Q", "choices": list("abcd")}])
    with pytest.raises(UserError, match=r"test-00000-of-00001\.parquet lacks the columns subject, answer"):
        load_benchmark("mmlu", tmp_path, 0)


def test_parquet_of_a_split_without_answers(tmp_path):
    MAKERS["boolq"](tmp_path)
    row = {"question": "q", "passage": "p", "label": -1}
    put_jsonl(tmp_path / "val.jsonl", [row])
    with pytest.raises(UserError, match=r"val\.jsonl:1: 'label' is -1, where true or false \(1 or 0\)"):
        load_benchmark("boolq", tmp_path, 0)


@pytest.mark.parametrize("task", ["mmlu", "ceval", "cmmlu"])
def test_the_folder_of_a_split(task, tmp_path):
    """People of the old evaluator give data/mmlu/test."""
    MAKERS[task](tmp_path)
    split = "val" if task == "ceval" else "test"
    with pytest.raises(
        UserError, match=rf"it is the split {split} of them; give the folder above, {tmp_path}$"
    ):
        load_benchmark(task, tmp_path / split, 5)


def test_a_file_in_place_of_a_folder(tmp_path):
    MAKERS["gsm8k"](tmp_path)
    with pytest.raises(UserError, match=rf"is not a directory; give its folder, {tmp_path}"):
        load_benchmark("gsm8k", tmp_path / "test.jsonl", 0)


def broken_csv(line):
    def put(folder):
        small(folder)
        path = folder / "test/anatomy_test.csv"
        path.write_text("Q,a,b,c,d,A\n" + line + "\n")

    return put


def without(name):
    def put(folder):
        mmlu(folder)
        (folder / name).unlink()

    return put


def one_more(name):
    def put(folder):
        put_csv(mmlu(folder) / name, rows("anatomy", "test", 2))

    return put


BROKEN = {
    "too few fields": (broken_csv("Q,a,b,c,A"), r"anatomy_test\.csv:2: 5 fields, not 6"),
    "too many fields": (
        broken_csv("Q,a,b,c,d,e,A"),
        r"anatomy_test\.csv:2: 7 fields, not 6; a field with commas",
    ),
    "answer E": (broken_csv("Q,a,b,c,d,E"), r"anatomy_test\.csv:2: the answer 'E' is not one of A, B, C, D"),
    "answer a": (broken_csv("Q,a,b,c,d,a"), r"anatomy_test\.csv:2: the answer 'a' is not one of"),
    "answer Apple pie": (
        broken_csv("Q,a,b,c,d,Apple pie"),
        r"anatomy_test\.csv:2: the answer 'Apple pie' is not",
    ),
    "no answer": (broken_csv("Q,a,b,c,d,"), r"anatomy_test\.csv:2: the answer '' is not"),
    "an open quote": (broken_csv('"Q,a,b,c,d,A\nQ,a,b,c,d,B'), r"anatomy_test\.csv:\d: this is not CSV"),
    "an empty file": (
        lambda f: (small(f) / "test/anatomy_test.csv").write_text(""),
        r"has no questions in anatomy",
    ),
    "not UTF-8": (
        lambda f: (small(f) / "test/anatomy_test.csv").write_bytes(b"caf\xe9"),
        r"anatomy_test\.csv cannot be read",
    ),
    "UTF-16": (
        lambda f: (small(f) / "test/anatomy_test.csv").write_bytes(b"\xff\xfe"),
        r"anatomy_test\.csv is UTF-16",
    ),
    "no dev": (without("dev/virology_dev.csv"), r"virology_dev\.csv' cannot be read: .*No such file"),
    "a missing subject": (
        without("test/virology_test.csv"),
        r"test: mmlu lacks virology, of its 57 subjects",
    ),
    "an unknown subject": (
        one_more("test/anatomy (1)_test.csv"),
        r"test: mmlu has anatomy \(1\), which it does not know",
    ),
    "a double subject": (
        lambda f: (small(f) / CUSTOM_SUBJECTS).write_text(ONE + "anatomy,other\n"),
        r"subjects\.csv names anatomy twice",
    ),
    "a strange subject": (
        lambda f: (small(f) / CUSTOM_SUBJECTS).write_text(ONE + "../x,other\n"),
        r"'\.\./x' is not a valid subject name",
    ),
    "no subjects": (
        lambda f: (small(f) / CUSTOM_SUBJECTS).write_text("subject,category\n"),
        r"names no subject",
    ),
    "a nameless column": (
        lambda f: (small(f) / CUSTOM_SUBJECTS).write_text("anatomy,STEM\n"),
        r"subjects\.csv:1: the first line must name",
    ),
    "nothing": (
        lambda f: (f / "test").mkdir(),
        r"has no files of mmlu: looked for test/SUBJECT_test\.csv and",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_is_wrong_is_named(case, tmp_path):
    put, message = BROKEN[case]
    put(tmp_path)
    with pytest.raises(UserError, match=message) as error:
        load_benchmark("mmlu", tmp_path, 5)
    assert "\n" not in str(error.value)


def test_parquet_that_is_wrong(tmp_path):
    (tmp_path / CUSTOM_SUBJECTS).write_text(ONE)
    for wrong, message in (
        ((0, 4), "the answer 4 is not one of"),
        ((-1,), "the answer -1 is not one of"),
        ((None,), "the answer None"),
    ):
        hub(tmp_path, answers=wrong)
        with pytest.raises(UserError, match=rf"test-00000-of-00001\.parquet: row .: {message}"):
            load_benchmark("mmlu", tmp_path, 0)
    (tmp_path / "anatomy/test-00000-of-00001.parquet").unlink()
    hub(tmp_path, shards=2)
    (tmp_path / "anatomy/dev-00000-of-00001.parquet").unlink()
    with pytest.raises(UserError, match="is one of 2 files, but 1 are there"):
        load_benchmark("mmlu", tmp_path, 0)


JSONL = {
    "boolq": [
        ({"label": "true"}, "'label' is 'true', where true or false"),
        ({"passage": None}, "'passage' is None, where a string should be"),
        ({"question": 3}, "'question' is 3"),
    ],
    "gsm8k": [
        ({"answer": "about 3"}, "does not end with #### and a number"),
        ({"question": None}, "'question' is None"),
    ],
    "hellaswag": [
        ({"label": "4"}, "'label' is '4', where 0, 1, 2 or 3"),
        ({"label": ""}, "'label' is ''"),
        ({"endings": ["a", "b"]}, "where four strings should be"),
        ({"ctx_b": 1}, "'ctx_b' is 1"),
    ],
}


@pytest.mark.parametrize(
    ("task", "change", "message"), [(task, *case) for task, cases in JSONL.items() for case in cases], ids=str
)
def test_json_lines_that_are_wrong(task, change, message, tmp_path):
    MAKERS[task](tmp_path)
    path = next(p for p in tmp_path.iterdir() if "val" in p.name or "test" in p.name)
    tables = [json.loads(line) for line in path.read_text().splitlines()]
    tables[4] |= change
    put_jsonl(path, tables)
    with pytest.raises(UserError, match=rf"{path.name}:5: .*{message}"):
        load_benchmark(task, tmp_path, 0)
    path.write_text('{"question": "q"\n')
    with pytest.raises(UserError, match=rf"{path.name}:1: this line is not JSON"):
        load_benchmark(task, tmp_path, 0)
    path.unlink()
    with pytest.raises(UserError, match=f"{task} lacks"):
        load_benchmark(task, tmp_path, 0)


def test_two_files_for_one_split(tmp_path):
    MAKERS["boolq"](tmp_path)
    (tmp_path / "dev.jsonl").write_text("")
    with pytest.raises(UserError, match=r"boolq has both val\.jsonl and dev\.jsonl: remove one"):
        load_benchmark("boolq", tmp_path, 0)


@pytest.mark.parametrize(
    ("task", "message"),
    [
        (
            "mmlu-pro",
            "--task mmlu-pro does not exist; choose from mmlu, ceval, cmmlu, boolq, gsm8k, hellaswag",
        ),
    ],
)
def test_tasks_that_do_not_exist(task, message, tmp_path):
    with pytest.raises(UserError, match=message):
        load_benchmark(task, tmp_path, 0)
    with pytest.raises(UserError, match="is not a directory"):
        load_benchmark("mmlu", tmp_path / "nowhere", 0)


def test_too_few_examples(tmp_path):
    with pytest.raises(UserError, match="5 examples for anatomy, fewer than --num-fewshot 6"):
        load_benchmark("mmlu", small(tmp_path), 6)
    assert load_benchmark("mmlu", tmp_path, 0).subjects[0].shots == ()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--task-data-path {data}", "--task is required"),
        ("--task mmlu", "--task names 1 \\(mmlu\\) and --task-data-path 0: give one folder for each"),
        ("--task mmlu boolq --task-data-path {data}", "names 2 \\(mmlu boolq\\) and --task-data-path 1"),
        ("--task mmlu mmlu --task-data-path {data} {data}", "--task names mmlu twice"),
        ("--task bbh2 --task-data-path {data}", "--task bbh2 does not exist; choose from mmlu"),
        ("--task mmlu --task-data-path {data} --num-fewshot -1", "--num-fewshot -1 is too small: at least 0"),
        ("--task mmlu --task-data-path {data} --limit 0", "--limit 0 is too small"),
        (
            "--task gsm8k --task-data-path {data} --max-new-tokens 2",
            "--max-new-tokens 2 is too few for gsm8k",
        ),
        ("--task mmlu --task-data-path {data} --prompt-style helm", "helm"),
        ("--task mmlu --task-data-path {data} --tp 2", "1 processes were started, but TP 2"),
        ("--task mmlu --task-data-path {data} --bf16 --fp16", "contradict each other"),
        (
            "--task boolq --task-data-path {data} --prompt-style hendrycks",
            "boolq lacks val.jsonl or dev.jsonl",
        ),
    ],
)
def test_command_lines_that_are_wrong(words, message, tmp_path):
    (tmp_path / "hf").mkdir()
    with pytest.raises(UserError, match=message):
        resolve(["--load", str(tmp_path / "hf"), *words.format(data=SAMPLE).split()], 1)
