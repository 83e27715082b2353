"""Prompts, byte for byte, against lm-eval's own code and the output of the original programs."""

from dataclasses import replace

import pytest
from helpers.evaluating import MAKERS, harness_task

from ascendspeed.evaluation.prompts import PromptEncoder, build_prompts
from ascendspeed.evaluation.questions import Benchmark, Question, Subject
from ascendspeed.evaluation.subjects import SUBJECTS
from ascendspeed.evaluation.tasks import TASKS, find_style, load_benchmark
from ascendspeed.utils.errors import UserError

ASKED = [
    Question(f"x/{i}", "", f"Q{i}", (f"a{i}", f"b{i}", f"c{i}", f"d{i}"), answer)
    for i, answer in ((1, 1), (2, 2), (3, 0))
]
OPENCOMPASS = {  # output of OpenCompass' templates, retriever and parser for these questions; the answer is D
    ("mmlu", "high_school_biology", 2): (
        "The following are multiple choice questions (with answers) about  high school biology.\n\n"
        "Q1\nA. a1\nB. b1\nC. c1\nD. d1\nAnswer: B\n\nQ2\nA. a2\nB. b2\nC. c2\nD. d2\nAnswer: C\n\n"
        "Q3\nA. a3\nB. b3\nC. c3\nD. d3\nAnswer: D"
    ),
    ("mmlu", "high_school_biology", 0): (
        "The following are multiple choice questions (with answers) about  high school biology.\n\n\n"
        "Q3\nA. a3\nB. b3\nC. c3\nD. d3\nAnswer: D"
    ),
    ("ceval", "law", 2): (
        "以下是中国关于法学考试的单项选择题，请选出其中的正确答案。\n"
        "Q1\nA. a1\nB. b1\nC. c1\nD. d1\n答案: \nB\n\n\n"
        "以下是中国关于法学考试的单项选择题，请选出其中的正确答案。\n"
        "Q2\nA. a2\nB. b2\nC. c2\nD. d2\n答案: \nC\n\n\n\n\n"
        "以下是中国关于法学考试的单项选择题，请选出其中的正确答案。\n"
        "Q3\nA. a3\nB. b3\nC. c3\nD. d3\n答案: \nD"
    ),
    ("ceval", "law", 1): (
        "以下是中国关于法学考试的单项选择题，请选出其中的正确答案。\n"
        "Q1\nA. a1\nB. b1\nC. c1\nD. d1\n答案: \nB\n\n\n\n\n"
        "以下是中国关于法学考试的单项选择题，请选出其中的正确答案。\n"
        "Q3\nA. a3\nB. b3\nC. c3\nD. d3\n答案: \nD"
    ),
    ("ceval", "law", 0): (
        "\n\n以下是中国关于法学考试的单项选择题，请选出其中的正确答案。\n"
        "Q3\nA. a3\nB. b3\nC. c3\nD. d3\n答案: \nD"
    ),
    ("cmmlu", "college_law", 2): (
        "以下是关于大学法律的单项选择题，请直接给出正确答案的选项。\n"
        "题目：Q1\nA. a1\nB. b1\nC. c1\nD. d1\n答案是: B\n\n\n"
        "以下是关于大学法律的单项选择题，请直接给出正确答案的选项。\n"
        "题目：Q2\nA. a2\nB. b2\nC. c2\nD. d2\n答案是: C\n\n\n\n\n"
        "以下是关于大学法律的单项选择题，请直接给出正确答案的选项。\n"
        "题目：Q3\nA. a3\nB. b3\nC. c3\nD. d3\n答案是: D"
    ),
    ("cmmlu", "college_law", 0): (
        "\n\n以下是关于大学法律的单项选择题，请直接给出正确答案的选项。\n"
        "题目：Q3\nA. a3\nB. b3\nC. c3\nD. d3\n答案是: D"
    ),
}


def whole(name: str, task: str, subject: str, shots: int) -> str:
    """Context, delimiter and the last choice."""
    style = TASKS[task].styles[name]
    return (
        style.context(SUBJECTS[task][subject], ASKED[:shots], ASKED[2])
        + style.delimiter
        + style.choices(ASKED[2])[-1]
    )


@pytest.mark.parametrize(("task", "subject", "shots"), OPENCOMPASS)
def test_opencompass(task, subject, shots):
    assert whole("opencompass", task, subject, shots) == OPENCOMPASS[task, subject, shots]


def test_opencompass_boolq():
    question = Question("", "", "is it so", ("no", "yes"), 1, "P -- p")
    style = find_style("opencompass", "boolq", 0)
    assert style.context(SUBJECTS["mmlu"]["anatomy"], (), question) == "P -- p\nQuestion: is it so?"
    assert (style.delimiter, style.choices(question)) == ("\n", ("No", "Yes"))


def test_hendrycks():
    expected = (
        "The following are multiple choice questions (with answers) about  us foreign policy.\n\n"
        "Q1\nA. a1\nB. b1\nC. c1\nD. d1\nAnswer: B\n\n"
        "Q3\nA. a3\nB. b3\nC. c3\nD. d3\nAnswer: D"
    )
    assert whole("hendrycks", "mmlu", "us_foreign_policy", 1) == expected
    # controls: who mixes the styles up is seen
    assert whole("lm-eval", "mmlu", "us_foreign_policy", 1) == expected.replace("about  ", "about ")
    assert whole("opencompass", "mmlu", "us_foreign_policy", 0) != whole(
        "hendrycks", "mmlu", "us_foreign_policy", 0
    )


@pytest.mark.parametrize(
    ("task", "shots"),
    [*((name, task.num_shots) for name, task in TASKS.items()), ("boolq", 2), ("hellaswag", 3), ("mmlu", 0)],
)
def test_lm_eval_of_every_subject_is_its_own(task, shots, tmp_path):
    """Against the prompts that lm-eval builds from its own files."""
    ours = load_benchmark(task, MAKERS[task](tmp_path), shots)
    put = find_style("lm-eval", task, shots)
    for subject in ours.subjects[:3]:  # the titles of all are compared below
        harness = harness_task(
            task,
            tmp_path,
            subject.info.name if len(ours.subjects) > 1 else "",
            shots,
            len(subject.questions),
        )
        assert len(harness.eval_docs) == len(subject.questions)
        for question, doc in zip(subject.questions, harness.eval_docs, strict=True):
            context = put.context(subject.info, subject.shots, question)
            assert context == harness.fewshot_context(doc, shots)
            if put.choices(question):
                assert list(put.choices(question)) == harness.doc_to_choice(doc)
                assert question.answer == int(harness.doc_to_target(doc))
            else:
                assert question.answer == harness.doc_to_target(doc)


@pytest.mark.parametrize("task", ["mmlu", "ceval", "cmmlu"])
def test_titles_of_all_subjects_are_lm_evals(task):
    from helpers.evaluating import FILES, HARNESS, _yaml

    for name, topic in SUBJECTS[task].items():
        description = _yaml(HARNESS / FILES[task].format(name))["description"]
        assert TASKS[task].styles["lm-eval"].context(topic, (), ASKED[0]).startswith(description), name


def test_what_a_style_does_not_say_is_refused():
    with pytest.raises(
        UserError,
        match="--prompt-style hendrycks has no prompts for ceval; choose lm-eval or opencompass",
    ):
        find_style("hendrycks", "ceval", 5)
    with pytest.raises(UserError, match="defines boolq with 0 examples; remove --num-fewshot 3"):
        find_style("opencompass", "boolq", 3)


class Letters:
    """A tokenizer of single characters."""

    bos, eos, vocab_size = 1, 2, 1 << 17

    def encode_batch(self, texts):
        import numpy as np

        return [np.array([ord(c) for c in text], np.int32) for text in texts]


def test_a_context_and_its_answers_are_parted_as_lm_eval_does(tmp_path):
    """White space goes to the answer, and the context keeps its own ids where the whole text would have
    others.
    """
    from helpers import corpus
    from lm_eval.api.model import TemplateLM

    from ascendspeed.tokenization import tokenizer

    tokens = tokenizer.load(corpus.sentencepiece_dir(tmp_path))
    encoder = PromptEncoder(tokens)
    harness_model = type("Theirs", (TemplateLM,), dict.fromkeys(TemplateLM.__abstractmethods__))()
    harness_model.tok_encode = lambda text: [tokens.bos, *tokens.encode(text).tolist()]
    merged = 0
    for context in ("Document 3 says", "Document 3 says  ", "答案: ", "答案:", "It ends", "Docu"):
        for answer in (" that", "\nB", "ment 4", " A", "中"):
            [pair] = encoder.encode_pairs(context, [answer])
            assert pair == harness_model._encode_pair(context, answer)
            merged += pair[0] + pair[1] != harness_model.tok_encode(context + answer)
    assert merged  # control: somewhere the two ways differ


@pytest.mark.parametrize("max_length", [99999, 250, 200, 150, 99, 40])
def test_examples_are_dropped_one_by_one_the_last_one_first(max_length):
    """The length is counted by hand: BOS, the context, and all of the longest answer but its last token."""
    topic = SUBJECTS["mmlu"]["anatomy"]
    benchmark = Benchmark("mmlu", None, (Subject(topic, tuple(ASKED[:2]), (ASKED[2],)),))
    put = find_style("lm-eval", "mmlu", 2)
    [prompt] = build_prompts(benchmark, put, PromptEncoder(Letters()), max_length, 0)
    lengths = [1 + len(put.context(topic, ASKED[:shots], ASKED[2])) + len(" A") - 1 for shots in range(3)]
    fitting = [shots for shots, length in enumerate(lengths) if length <= max_length]
    assert prompt.num_shots == max(fitting, default=0)
    assert prompt.truncated == max(0, lengths[0] - max_length)
    assert prompt.context == put.context(topic, ASKED[: prompt.num_shots], ASKED[2])
    exact = lengths[prompt.num_shots]  # the border itself
    [again] = build_prompts(benchmark, put, PromptEncoder(Letters()), exact, 0)
    assert again.num_shots == prompt.num_shots
    [less] = build_prompts(benchmark, put, PromptEncoder(Letters()), exact - 1, 0)
    assert (less.num_shots, less.truncated) == ((prompt.num_shots - 1, 0) if prompt.num_shots else (0, 1))


def test_a_written_answer_needs_tokens():
    topic = replace(SUBJECTS["mmlu"]["anatomy"], name="gsm8k")
    sums = [Question(f"x/{i}", "", f"Q{i}", (), "#### 3") for i in range(2)]
    benchmark = Benchmark("gsm8k", None, (Subject(topic, (sums[0],), (sums[1],)),))
    put = find_style("lm-eval", "gsm8k", 1)
    length = 1 + len(put.context(topic, sums[:1], sums[1]))
    for max_length, shots in ((length + 20, 1), (length + 19, 0)):
        [prompt] = build_prompts(benchmark, put, PromptEncoder(Letters()), max_length, 20)
        assert prompt.num_shots == shots
