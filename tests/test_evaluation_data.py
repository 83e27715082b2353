"""Benchmark files: legal text is kept verbatim, in every published format."""

import csv
import json

import pyarrow
import pyarrow.parquet
import pytest
from helpers.benchmark_files import hub, joint, put_parquet, small
from helpers.evaluating import MAKERS, SAMPLE, mmlu, put_jsonl, rows

from ascendspeed.evaluation.args import resolve
from ascendspeed.evaluation.subjects import CEVAL_HARD, SUBJECTS
from ascendspeed.evaluation.tasks import TASKS, load_benchmark
from ascendspeed.utils.errors import UserError


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


@pytest.mark.parametrize("task", HUB)
def test_json_lines_with_a_byte_order_mark(task, tmp_path):
    plain = load_benchmark(task, MAKERS[task](tmp_path), 2)
    for path in tmp_path.iterdir():
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert load_benchmark(task, tmp_path, 2) == plain


def test_the_originals_names_of_boolq(tmp_path):
    put_jsonl(tmp_path / "dev.jsonl", [{"question": "q", "title": "t", "answer": True, "passage": "p"}])
    assert load_benchmark("boolq", tmp_path, 0).subjects[0].questions[0].answer == 1


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
