"""Benchmark files: legal text is kept verbatim; everything else is an error with file and line."""

import csv
import json

import pyarrow
import pyarrow.parquet
import pytest
from helpers.evaluating import MAKERS, SAMPLE, mmlu, put_csv, put_jsonl, rows

from ascendspeed.evaluation.args import resolve
from ascendspeed.evaluation.loaders import CUSTOM_SUBJECTS
from ascendspeed.evaluation.subjects import CEVAL_HARD, SUBJECTS
from ascendspeed.evaluation.tasks import TASKS, load_benchmark
from ascendspeed.utils.errors import UserError

ONE = "subject,category\nanatomy,STEM\n"


def small(folder, count=3):
    """One subject, declared as a set of one's own."""
    mmlu(folder, count, ["anatomy"])
    (folder / CUSTOM_SUBJECTS).write_text(ONE)
    return folder


@pytest.mark.parametrize("task", TASKS)
def test_every_benchmark_is_read_whole(task, tmp_path):
    loaded = load_benchmark(task, MAKERS[task](tmp_path), TASKS[task].num_shots)
    expected = {"mmlu": 57 * 3, "ceval": 52 * 2, "cmmlu": 67 * 2, "boolq": 8, "gsm8k": 6, "hellaswag": 8}
    assert (loaded.size, loaded.custom) == (expected[task], False)
    assert {len(subject.shots) for subject in loaded.subjects} == {TASKS[task].num_shots}
    assert load_benchmark(task, tmp_path, TASKS[task].num_shots, limit=1).size == len(loaded.subjects)
    assert all(
        question.location.startswith(str(tmp_path))
        for subject in loaded.subjects
        for question in subject.questions
    )


def test_text_is_kept_verbatim(tmp_path):
    """Numbers, None, NA, quotes, commas, newlines and blanks: what Python's own csv reads there is what we
    ask.
    """
    [subject] = load_benchmark("mmlu", small(tmp_path, 10), 5).subjects
    for question, row in zip(subject.questions, rows("anatomy", "test", 10), strict=True):
        assert [question.text, *question.choices, "ABCD"[question.answer]] == row
    assert {"0.50", "None", "NA", "nan", "1e5", "two\nlines", " 007 ", "a, b"} <= {
        c for q in subject.questions for c in q.choices
    }
    assert [q.text for q in subject.shots] == [
        row[0] for row in rows("anatomy", "dev", 5)
    ]  # in the order of the file
    # lines are those of the file, where a question may have several
    lines = (tmp_path / "test/anatomy_test.csv").read_text().split("\n")
    assert all(lines[int(q.location.rsplit(":", 1)[1]) - 1].startswith(q.text) for q in subject.questions)


def test_a_folder_around_the_data(tmp_path):
    mmlu(tmp_path / "data")
    assert load_benchmark("mmlu", tmp_path, 5).size == 57 * 3
    MAKERS["ceval"](tmp_path / "formal_ceval")
    assert load_benchmark("ceval", tmp_path, 5).size == 52 * 2


def test_categories():
    assert {
        c: sum(t.category == c for t in SUBJECTS["mmlu"].values())
        for c in ("STEM", "humanities", "social sciences", "other")
    } == {
        "STEM": 19,
        "humanities": 13,
        "social sciences": 12,
        "other": 13,
    }
    assert (len(SUBJECTS["ceval"]), len(SUBJECTS["cmmlu"])) == (52, 67)
    assert (
        sum("hard" in topic.extra_groups for topic in SUBJECTS["ceval"].values())
        == len(CEVAL_HARD.split())
        == 8
    )
    assert SUBJECTS["ceval"]["law"].title == "法学"
    assert {t.category for t in SUBJECTS["cmmlu"].values()} == {
        "STEM",
        "humanities",
        "social sciences",
        "other",
    }


def hub(folder, subject="anatomy", answers=(0, 3), shards=1, **more):
    """Writes files like cais/mmlu's on the hub."""
    for split in ("dev", "test"):
        tables = [
            {
                "question": f"Q{i} {split}",
                "subject": subject,
                "choices": ["0.50", "None", "NA", "x"],
                "answer": a,
                **more,
            }
            for i, a in enumerate(answers)
        ]
        (folder / subject).mkdir(parents=True, exist_ok=True)
        pyarrow.parquet.write_table(
            pyarrow.Table.from_pylist(tables), folder / subject / f"{split}-00000-of-{shards:05}.parquet"
        )
    return folder


def test_the_hubs_parquet(tmp_path):
    for subject in SUBJECTS["mmlu"]:
        hub(tmp_path, subject)
    hub(tmp_path, "all")  # the hub has one with everything beside them
    loaded = load_benchmark("mmlu", tmp_path, 2)
    assert loaded.size == 57 * 2
    question = loaded.subjects[0].questions[1]
    assert (question.text, question.choices, question.answer) == ("Q1 test", ("0.50", "None", "NA", "x"), 3)
    assert question.location.endswith("test-00000-of-00001.parquet: row 1")


def test_ceval_on_the_hub(tmp_path):
    for subject in SUBJECTS["ceval"]:
        (tmp_path / subject).mkdir()
        for split in ("dev", "val"):
            tables = [
                {
                    "id": 0,
                    "question": "Q",
                    "A": "0.50",
                    "B": "b",
                    "C": "c",
                    "D": "d",
                    "answer": "C",
                    "explanation": "",
                }
            ]
            pyarrow.parquet.write_table(
                pyarrow.Table.from_pylist(tables), tmp_path / subject / f"{split}-00000-of-00001.parquet"
            )
    assert load_benchmark("ceval", tmp_path, 1).subjects[3].questions[0].answer == 2


def put_parquet(path, tables):
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(tables), path)


def joint(folder, subjects, shards=1):
    """Writes files of all subjects together, like cais/mmlu's `all`; a subject's rows are not adjacent."""
    for split, count in (("dev", 5), ("test", 2)):
        tables = [
            {
                "question": f"Q{i} of {subject} {split}",
                "subject": subject,
                "choices": list("wxyz"),
                "answer": i % 4,
            }
            for i in range(count)
            for subject in subjects
        ]
        for shard in range(shards):
            put_parquet(folder / f"{split}-{shard:05}-of-{shards:05}.parquet", tables[shard::shards])
    return folder


@pytest.mark.parametrize("inside", ["", "all"])
@pytest.mark.parametrize("shards", [1, 3])
def test_all_subjects_of_the_hub_in_one_file(inside, shards, tmp_path):
    joint(tmp_path / inside, SUBJECTS["mmlu"], shards)
    loaded = load_benchmark("mmlu", tmp_path, 5)
    assert (loaded.size, len(loaded.subjects)) == (57 * 2, 57)
    for subject in loaded.subjects:
        assert {q.text.split(" of ")[1] for q in subject.questions} == {f"{subject.info.name} test"}
        assert {q.text.split(" of ")[1] for q in subject.shots} == {f"{subject.info.name} dev"}
        assert [q.answer for q in sorted(subject.questions, key=lambda q: q.text)] == [0, 1]


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


HUB = {  # task -> folder and split on the hub of each of our files
    "boolq": {"train": "data/train", "val": "data/validation"},
    "gsm8k": {"train": "main/train", "test": "main/test"},
    "hellaswag": {"hellaswag_train": "data/train", "hellaswag_val": "data/validation"},
}


@pytest.mark.parametrize("task", HUB)
@pytest.mark.parametrize("shards", [1, 2])
def test_parquet_of_the_hub_holds_the_same_questions(task, shards, tmp_path):
    """The labels of HellaSwag are strings on the hub, those of BoolQ are called `answer`, or are 0 and 1."""
    lines = MAKERS[task](tmp_path / "lines")
    for name, target in HUB[task].items():
        tables = [json.loads(line) for line in (lines / f"{name}.jsonl").read_text().splitlines()]
        for table in tables:
            if task == "hellaswag":
                table["label"] = str(table["label"])
            elif task == "boolq" and shards == 1:
                table["answer"] = table.pop("label")
            elif task == "boolq":
                table["label"] = int(table["label"])
        cut = len(tables) // 2 if shards == 2 else len(tables)
        for shard, rows_of_shard in enumerate((tables[:cut], tables[cut:])[:shards]):
            put_parquet(tmp_path / "hub" / f"{target}-{shard:05}-of-{shards:05}.parquet", rows_of_shard)

    def content(folder):
        [subject] = load_benchmark(task, folder, 2).subjects
        return [(q.id, q.text, q.choices, q.answer, q.passage) for q in (*subject.shots, *subject.questions)]

    inner = tmp_path / "hub" / HUB[task][name].partition("/")[0]
    assert content(tmp_path / "hub") == content(inner) == content(lines)
    MAKERS[task](tmp_path / "hub")
    with pytest.raises(UserError, match=rf"{task} has both .*\.jsonl and .*\.parquet: remove one of them"):
        load_benchmark(task, tmp_path / "hub", 0)


def test_parquet_of_a_split_without_answers(tmp_path):
    MAKERS["boolq"](tmp_path)
    row = {"question": "q", "passage": "p", "label": -1}
    put_jsonl(tmp_path / "val.jsonl", [row])
    with pytest.raises(UserError, match=r"val\.jsonl:1: 'label' is -1, where true or false \(1 or 0\)"):
        load_benchmark("boolq", tmp_path, 0)


@pytest.mark.parametrize("task", HUB)
def test_json_lines_with_a_byte_order_mark(task, tmp_path):
    plain = load_benchmark(task, MAKERS[task](tmp_path), 2)
    for path in tmp_path.iterdir():
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert load_benchmark(task, tmp_path, 2) == plain


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


def test_the_originals_names_of_boolq(tmp_path):
    put_jsonl(tmp_path / "dev.jsonl", [{"question": "q", "title": "t", "answer": True, "passage": "p"}])
    assert load_benchmark("boolq", tmp_path, 0).subjects[0].questions[0].answer == 1


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


def test_the_sample_is_sound():
    """Every question once, four different choices, and answers that are as often A as D."""
    loaded = load_benchmark("mmlu", SAMPLE, 5)
    questions = [q for subject in loaded.subjects for q in (*subject.shots, *subject.questions)]
    assert loaded.custom
    assert (len(loaded.subjects), loaded.size) == (4, 60)
    assert len({q.text for q in questions}) == len(questions) == 80
    assert all(
        len(set(q.choices)) == 4 and q.choices == tuple(c.strip() for c in q.choices) for q in questions
    )
    counts = [sum(q.answer == i for subject in loaded.subjects for q in subject.questions) for i in range(4)]
    assert max(counts) - min(counts) <= 4
    for split in ("dev", "val", "test"):
        for path in (SAMPLE / split).iterdir():
            with open(path, newline="") as file:
                assert all(len(row) == 6 for row in csv.reader(file))
    right = {q.text: q.choices[q.answer] for q in questions}
    for text, answer in {
        "What is 19 + 26?": 19 + 26,
        "What is 9 x 12?": 9 * 12,
        "What is 6! (six factorial)?": 720,
    }.items():
        assert right[text] == str(answer)


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


def test_the_published_flags(tmp_path):
    """The legacy script's flags: several tasks in one word, and a note for each flag without effect."""
    MAKERS["boolq"](tmp_path / "boolq")
    (tmp_path / "hf").mkdir()
    words = (
        f"--task-data-path {SAMPLE} {tmp_path}/boolq --max-new-tokens 2 --row-col-parallel-linear-bias "
        f"--load {tmp_path}/hf --bf16 --no-contiguous-buffers-in-local-ddp --tokenizer-type PretrainedFromHF "
        "--tokenizer-not-use-fast --micro-batch-size 1 --seq-length 2048 --seed 42 "
        "--position-embedding-type rope --normalization RMSNorm --swiglu --no-load-rng --no-load-optim "
        "--exit-on-missing-checkpoint --no-masked-softmax-fusion --make-vocab-size-divisible-by 1 "
        "--use-flash-attn --deepspeed --no-pipeline-parallel --num-layers 32 --hidden-size 4096"
    )
    job, notes = resolve([*words.split(), "--task", "mmlu boolq"], 1)
    assert [benchmark.name for benchmark, _ in job.benchmarks] == ["mmlu", "boolq"]
    assert (job.evaluation.batch_size, job.shots) == (1, {"mmlu": 5, "boolq": 0})
    output = "\n".join(notes)
    assert all(
        f"--{name} is accepted and ignored" in output
        for name in ("seed", "no-load-rng", "use-flash-attn", "deepspeed")
    )
