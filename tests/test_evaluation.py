"""Evaluation against lm-evaluation-harness' HFLM: log-likelihoods, scores, styles, reports."""

import csv
import json
import sys
from dataclasses import replace

import pytest
from helpers.evaluated_model import LIMIT, NEW, QUESTIONS, SUBJECTS, folders, model
from helpers.evaluating import MODEL, SAMPLE, harness_task, model_dir
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM

from ascendspeed.conversion import weights_identity
from ascendspeed.evaluation import lm_eval as harness
from ascendspeed.evaluation import loaders, metrics, prompt_styles, report
from ascendspeed.evaluation.answer_cache import AnswerCache
from ascendspeed.evaluation.args import resolve
from ascendspeed.evaluation.prompt_styles import PromptStyle
from ascendspeed.evaluation.prompts import PromptEncoder, build_prompts
from ascendspeed.evaluation.questions import Question
from ascendspeed.evaluation.runner import EngineBackend, check_vocabulary
from ascendspeed.evaluation.tasks import TASKS, EvaluationTask, find_style, load_benchmark
from ascendspeed.tokenization import tokenizer
from ascendspeed.utils.errors import UserError

STYLES = [
    (style, name)
    for style in ("opencompass", "hendrycks")
    for name, task in TASKS.items()
    if style in task.styles
]


@pytest.fixture(scope="module")
def hf(folders) -> HFLM:
    """Theirs.

    Text comes from our tokenizer: transformers has U+FFFD for whole runs of bytes that are no UTF-8.
    """
    tokens = tokenizer.load(folders["ours"])

    class Ours(HFLM):
        def tok_decode(self, ids, skip_special_tokens=True):
            return (
                tokens.decode(ids) if isinstance(ids, list) else super().tok_decode(ids, skip_special_tokens)
            )

    return Ours(
        str(folders["theirs"]),
        device="cpu",
        dtype="float32",
        batch_size=3,
        add_bos_token=True,
        max_length=1024,
    )


def benchmark(task: str, folders, shots: int | None = None):
    """Its first subjects."""
    loaded = load_benchmark(task, folders[task], TASKS[task].num_shots if shots is None else shots, QUESTIONS)
    return replace(loaded, subjects=loaded.subjects[:SUBJECTS])


def asked(
    model,
    folders,
    task: str,
    batch_size: int = 3,
    name: str = "lm-eval",
    answers=None,
    encoder=None,
    shots=None,
):
    """(benchmark, grades, what was answered) of our own way."""
    tokens = tokenizer.load(folders["ours"])
    encoder = encoder or PromptEncoder(tokens)
    loaded = benchmark(task, folders, shots)
    put = find_style(name, task, TASKS[task].num_shots if shots is None else shots)
    max_length = model.config.max_position_embeddings
    prompts = list(build_prompts(loaded, put, encoder, max_length, NEW))
    answers = AnswerCache(None, {}) if answers is None else answers
    adapter = harness.HarnessModel(EngineBackend(model, tokens, batch_size), encoder, max_length, answers)
    grades = harness.grade_prompts(adapter, prompts, NEW)
    return loaded, grades, [answers.records[grade.key] for grade in grades]


def their_samples(hf: HFLM, folders, task: str, shots: int) -> list[dict]:
    """lm-eval's tasks, lm-eval's model."""
    loaded = benchmark(task, folders, shots)
    all_samples = []
    for subject in loaded.subjects:
        subject_task = harness_task(
            task,
            folders[task],
            subject.info.name if task in ("mmlu", "ceval", "cmmlu") else "",
            shots,
            QUESTIONS,
        )
        if task == "gsm8k":
            subject_task.set_config("generation_kwargs", {"max_gen_toks": NEW}, update=True)
        samples = evaluate(hf, {"one": subject_task}, bootstrap_iters=0, limit=QUESTIONS)["samples"]["one"]
        all_samples += samples
    return all_samples


def far(answers: list[dict], samples: list[dict]) -> float:
    """Largest distance of two log-likelihoods."""
    pairs = [
        (our, their[0])
        for answer, sample in zip(answers, samples, strict=True)
        for our, their in zip(answer["loglikelihoods"], sample["filtered_resps"], strict=True)
    ]
    assert len(pairs) >= 2 * len(answers)
    assert min(our for our, _ in pairs) > -64
    return max(abs(our - their) for our, their in pairs)


@pytest.mark.parametrize(
    ("task", "shots"), [("mmlu", 5), ("ceval", 2), ("cmmlu", 2), ("boolq", 0), ("boolq", 2), ("hellaswag", 0)]
)
def test_every_log_likelihood_and_score_is_lm_evals(task, shots, model, hf, folders):
    loaded, grades, answers = asked(model, folders, task, shots=shots)
    samples = their_samples(hf, folders, task, shots)
    assert all(grade.prompt.num_shots == shots and not grade.prompt.truncated for grade in grades)
    assert far(answers, samples) < LIMIT
    assert [a["greedy"] for a in answers] == [[g for _, g in s["filtered_resps"]] for s in samples]
    for grade, sample in zip(grades, samples, strict=True):
        assert {name: grade.metrics[name] for name in grade.metrics} == {
            n: sample[n] for n in sample["metrics"] if n in grade.metrics
        }
        assert TASKS[task].main_metric in grade.metrics
        right = grade.prompt.choices[grade.prompt.question.answer]
        assert (grade.predicted == right) == (grade.metrics[TASKS[task].main_metric] == 1)
    values = [sample[TASKS[task].main_metric] for sample in samples]
    assert metrics.score_task(loaded, grades, shots).groups["all"]["micro"] == pytest.approx(
        sum(values) / len(values)
    )


def test_written_answers_and_scores_are_lm_evals(model, hf, folders):
    _, grades, answers = asked(model, folders, "gsm8k", shots=2)
    samples = their_samples(hf, folders, "gsm8k", 2)
    for name in ("strict-match", "flexible-extract"):
        filtered = [sample for sample in samples if sample["filter"] == name]
        assert [a["text"] for a in answers] == [sample["resps"][0][0] for sample in filtered]
        assert [grade.metrics[name] for grade in grades] == [sample["exact_match"] for sample in filtered]
    assert any(a["text"] for a in answers)


def test_numbers_are_found_in_written_answers(folders):
    """By a backend that knows what to say: the grading itself, by hand."""
    says = ["so 1,600\n#### 1,600", "it is 1608.", "#### 7", "none"]

    class Says:
        def generate(self, prompts, until, new_tokens, got):
            assert (until, new_tokens) == (("Question:", "</s>", "<|im_end|>"), 64)
            for i in reversed(range(len(prompts))):
                got(i, says[i])

    loaded = load_benchmark("gsm8k", folders["gsm8k"], 1, 4)
    encoder = PromptEncoder(tokenizer.load(folders["ours"]))
    prompts = list(build_prompts(loaded, find_style("lm-eval", "gsm8k", 1), encoder, 1024, 64))
    grades = harness.grade_prompts(
        harness.HarnessModel(Says(), encoder, 1024, AnswerCache(None, {})), prompts, 64
    )
    assert [g.metrics["strict-match"] for g in grades] == [1, 0, 0, 0]
    assert [g.metrics["flexible-extract"] for g in grades] == [1, 1, 0, 0]
    assert [g.predicted for g in grades] == ["1,600", "1608.", "7", "[invalid]"]
    result = metrics.score_task(loaded, grades, 1)
    assert result.groups["all"]["micro"] == 0.5
    assert "strict-match: 25.00" in report.as_text(result, "x")


class TwoStarts(PromptEncoder):
    """The mistake of a BOS before a text that has one already."""

    def __init__(self, tokens) -> None:
        super().__init__(tokens)
        self.bos_ids = self.bos_ids * 2


class Shifted(EngineBackend):
    """The mistake of a continuation that begins one token late."""

    def score(self, pairs, got):
        super().score([([*c, a[0]], a[1:] or a) for c, a in pairs], got)


def test_controls(model, hf, folders, monkeypatch):
    samples = their_samples(hf, folders, "hellaswag", 0)
    assert far(asked(model, folders, "hellaswag")[2], samples) < LIMIT
    tokens = tokenizer.load(folders["ours"])
    assert far(asked(model, folders, "hellaswag", encoder=TwoStarts(tokens))[2], samples) > 1e-2
    without_bos = PromptEncoder(tokens)
    without_bos.bos_ids = []
    assert far(asked(model, folders, "hellaswag", encoder=without_bos)[2], samples) > 1e-2
    monkeypatch.setattr(sys.modules[__name__], "EngineBackend", Shifted)
    assert far(asked(model, folders, "hellaswag")[2], samples) > 1e-2


@pytest.mark.parametrize(("name", "task"), STYLES)
def test_other_styles_have_transformers_log_likelihoods(name, task, model, hf, folders):
    """Compares with lm-eval's model on identical texts."""
    _, grades, answers = asked(model, folders, task, name=name, shots=0)
    for grade, answer in zip(grades, answers, strict=True):
        pairs = [(grade.prompt.context, text) for text in grade.prompt.answers]
        encoded = [(pair, *hf._encode_pair(*pair)) for pair in pairs]
        expected = [value for value, _ in hf._loglikelihood_tokens(encoded, disable_tqdm=True)]
        assert answer["loglikelihoods"] == pytest.approx(expected, abs=LIMIT)


def test_a_prompt_that_is_too_long_keeps_its_bos_and_its_end(model, folders):
    loaded = benchmark("boolq", folders)
    encoder = PromptEncoder(tokenizer.load(folders["ours"]))
    [prompt, *_] = build_prompts(loaded, find_style("lm-eval", "boolq", 0), encoder, 20, 0)
    whole = max((len(a) + len(b) - 1 for a, b in encoder.encode_pairs(prompt.context, prompt.answers)))
    assert prompt.truncated == whole - 20 > 0
    seen = []

    class Sees:
        def score(self, pairs, got):
            seen.extend(pairs)
            for i in range(len(pairs)):
                got(i, -1.0, False)

    grades = harness.grade_prompts(
        harness.HarnessModel(Sees(), encoder, 20, AnswerCache(None, {})), [prompt], 0
    )
    for (context, answer), (full, _) in zip(
        seen, encoder.encode_pairs(prompt.context, prompt.answers), strict=True
    ):
        assert len(context) + len(answer) - 1 <= 20
        assert context == [1, *full[-(len(context) - 1) :]]
        assert context.count(1) == 1
    assert "lost their beginning" in report.as_text(
        metrics.score_task(
            replace(loaded, subjects=(replace(loaded.subjects[0], questions=(prompt.question,)),)), grades, 0
        ),
        "x",
    )


def test_a_task_is_one_entry(folders, tmp_path, monkeypatch):
    """The command, the loader, the prompts, the grades and the report take a toy task from the registry."""

    def parse(name, location, row):
        return Question(name, location, row["sum"], ("2", "3"), row["right"])

    toy = EvaluationTask(
        "toy",
        load=loaders.json_lines("toy", ("toy.jsonl",), ("train.jsonl",), parse),
        styles={"lm-eval": PromptStyle(lambda subject, shots, q: f"{q.text} =", prompt_styles.texts)},
    )
    monkeypatch.setitem(TASKS, toy.name, toy)
    rows = [{"sum": "1 + 1", "right": 0}, {"sum": "1 + 2", "right": 1}]
    (tmp_path / "toy.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["--load", str(folders["ours"]), "--task-data-path", str(tmp_path), "--task"]
    [(toy_benchmark, put)] = resolve([*words, "toy"], 1)[0].benchmarks
    with pytest.raises(UserError, match=r"--task other does not exist; choose from mmlu, .*, hellaswag, toy"):
        resolve([*words, "other"], 1)

    class AlwaysTwo:
        def score(self, pairs, on_score):
            for i in range(len(pairs)):
                on_score(i, -1.0 - i % 2, False)

    encoder = PromptEncoder(tokenizer.load(folders["ours"]))
    prompts = list(build_prompts(toy_benchmark, put, encoder, 1024, 0))
    assert [(p.context, p.answers) for p in prompts] == [("1 + 1 =", [" 2", " 3"]), ("1 + 2 =", [" 2", " 3"])]
    grades = harness.grade_prompts(
        harness.HarnessModel(AlwaysTwo(), encoder, 1024, AnswerCache(None, {})), prompts, 0
    )
    score = metrics.score_task(toy_benchmark, grades, 0)
    assert (score.metric, score.groups["all"]["micro"]) == ("acc", 0.5)
    assert report.as_text(score, "x").startswith(f"toy ({tmp_path}), x, acc in %")
    assert report.as_json(score, 0)["questions"] == 2


def test_means_by_hand(folders):
    """Two subjects of different sizes in one category: macro and micro differ."""
    loaded = load_benchmark("mmlu", SAMPLE, 1)
    sizes = {"arithmetic": 3, "computer_basics": 1, "english_words": 2, "world_geography": 2}
    loaded = replace(
        loaded,
        subjects=tuple(replace(s, questions=s.questions[: sizes[s.info.name]]) for s in loaded.subjects),
    )
    encoder = PromptEncoder(tokenizer.load(folders["ours"]))
    prompts = list(build_prompts(loaded, find_style("lm-eval", "mmlu", 1), encoder, 1024, 0))
    values = [1, 0, 0, 1, 1, 0, 0, 0]
    grades = [
        harness.Grade(prompt, str(i), {"acc": float(v)})
        for i, (prompt, v) in enumerate(zip(prompts, values, strict=True))
    ]
    result = metrics.score_task(loaded, grades, 2)
    stem = result.groups["STEM"]
    assert (stem["macro"], stem["micro"]) == pytest.approx(((1 / 3 + 1) / 2, 2 / 4))
    assert (result.groups["all"]["macro"], result.groups["all"]["micro"]) == pytest.approx(
        ((1 / 3 + 1 + 1 / 2 + 0) / 4, 3 / 8)
    )
    assert (result.dropped, result.shortened, result.truncated) == (8, 8, 0)
    shown = report.as_text(result, "title")
    assert "8 examples did not fit before 8 questions" in shown
    assert any(line.split()[:4] == ["STEM", "4", "66.67", "50.00"] for line in shown.splitlines())
    table = list(csv.DictReader(report.as_csv([result]).splitlines()))
    assert {
        "task": "mmlu",
        "category": "all",
        "subject": "",
        "questions": "8",
        "metric": "acc micro",
        "value": "0.375",
    } in table
    assert report.draw_chart([result, result], "title").startswith(b"\x89PNG")
    with pytest.raises(AssertionError):  # control: a subject that shrank
        metrics.score_task(loaded, grades[1:], 2)


def test_hashes_of_a_model(folders, tmp_path):
    from ascendspeed.conversion import convert
    from ascendspeed.conversion.formats.registry import open_reader

    source = open_reader(folders["ours"])
    own = weights_identity.full_bytes(source)
    convert.convert(source, tmp_path / "again", convert.HuggingFaceWriter(max_shard_size=100_000))
    assert len(list((tmp_path / "again").glob("*.safetensors"))) > 1
    assert weights_identity.full_bytes(open_reader(tmp_path / "again")) == own
    convert.write_megatron(source, tmp_path / "ranks", 2, 1)
    assert weights_identity.full_bytes(open_reader(tmp_path / "ranks")) == own
    other = model_dir(tmp_path / "other", replace(MODEL, init_method_std=0.1))
    assert weights_identity.full_bytes(open_reader(other)) != own


def test_a_tokenizer_of_another_model(folders):
    tokens = tokenizer.load(folders["ours"])
    check_vocabulary(tokens, replace(MODEL, vocab_size=tokens.vocab_size))
    for size in (tokens.vocab_size - 1, tokens.vocab_size + 1025):
        with pytest.raises(
            UserError, match=f"has {tokens.vocab_size} tokens, but the model's vocabulary has {size} rows"
        ):
            check_vocabulary(tokens, replace(MODEL, vocab_size=size))
