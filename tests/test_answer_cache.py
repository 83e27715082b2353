"""Answers on disk: resuming after a kill, damaged records, foreign settings, two runs in one folder."""

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from helpers.evaluating import SAMPLE, model_dir

from ascendspeed.evaluation import lm_eval as harness
from ascendspeed.evaluation.answer_cache import FILE_NAME, AnswerCache, open_on_all_ranks
from ascendspeed.evaluation.prompts import PromptEncoder, build_prompts
from ascendspeed.evaluation.tasks import find_style, load_benchmark
from ascendspeed.tokenization import tokenizer
from ascendspeed.utils.errors import UserError


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """A folder with a tokenizer."""
    return {"ours": model_dir(tmp_path_factory.mktemp("answers") / "hf")}


class Stops(Exception):
    """A kill."""


class Counts:
    """A backend that knows the answers, counts what it is asked, and is killed at times."""

    def __init__(self, most: int = 10**9) -> None:
        self.asked, self.most = 0, most

    def score(self, pairs, got):
        for i, (context, answer) in enumerate(pairs):
            if self.asked == self.most:
                raise Stops
            self.asked += 1
            got(i, -float(sum(context) % 97) - sum(answer) / 7, False)


def sampled(folders, backend, answers):
    """Asks the sample."""
    loaded, encoder = load_benchmark("mmlu", SAMPLE, 1), PromptEncoder(tokenizer.load(folders["ours"]))
    prompts = list(build_prompts(loaded, find_style("lm-eval", "mmlu", 1), encoder, 1024, 0))
    return loaded, harness.grade_prompts(harness.HarnessModel(backend, encoder, 1024, answers), prompts, 0)


def test_killed_it_goes_on_where_it_was(tmp_path, folders):
    settings = {"model_sha256": "m", "prompt_style": "lm-eval"}
    whole = sampled(folders, Counts(), AnswerCache(None, settings))[1]
    answers = AnswerCache(tmp_path, settings)
    with pytest.raises(Stops):
        sampled(folders, Counts(4 * 23 + 2), answers)  # in the middle of a question
    answers.close()
    path = tmp_path / FILE_NAME
    assert len(path.read_text().splitlines()) == 1 + 23
    with open(path, "ab") as file:
        file.write(path.read_bytes().splitlines()[-1][:50])  # what a kill leaves of a line
    answers, backend = AnswerCache(tmp_path, settings), Counts()
    assert len(answers.records) == 23
    again = sampled(folders, backend, answers)[1]
    answers.close()
    assert backend.asked == 4 * (60 - 23)
    assert [(g.key, g.metrics) for g in again] == [(g.key, g.metrics) for g in whole]
    assert len(path.read_text().splitlines()) == 1 + 60
    assert all(json.loads(line) for line in path.read_text().splitlines())
    idle = Counts(0)  # all of it is there
    assert [g.metrics for g in sampled(folders, idle, AnswerCache(tmp_path, settings))[1]] == [
        g.metrics for g in whole
    ]


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_a_model_that_gives_no_number(value, folders):
    class Broken:
        def score(self, pairs, got):
            got(0, value, False)

    with pytest.raises(UserError, match=r"arithmetic_test\.csv:1: the model's log-likelihood is -?(nan|inf)"):
        sampled(folders, Broken(), AnswerCache(None, {}))


def test_answers_of_another_run_are_refused(tmp_path):
    AnswerCache(tmp_path, {"model_sha256": "m", "prompt_style": "lm-eval"}).close()
    with pytest.raises(
        UserError,
        match="holds answers of prompt_style lm-eval, this run has hendrycks: choose another "
        r"--output \(OUTPUT= of a recipe\)",
    ):
        AnswerCache(tmp_path, {"model_sha256": "m", "prompt_style": "hendrycks"})
    with pytest.raises(UserError, match="holds answers of model_sha256 m, this run has n"):
        AnswerCache(tmp_path, {"model_sha256": "n", "prompt_style": "lm-eval"})
    path = tmp_path / FILE_NAME
    for line in ("{}", '{"settings": 3}', "[1]", "\0\0", '{"settings": [["a"]]}'):
        path.write_text(f"{line}\n")
        with pytest.raises(UserError, match=r"questions\.jsonl:1: this line does not hold the settings"):
            AnswerCache(tmp_path, {"model_sha256": "m", "prompt_style": "lm-eval"})
    path.write_text("")
    assert not AnswerCache(tmp_path, {}).records  # killed before the first line was whole
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        AnswerCache(tmp_path / "file", {})


DAMAGE = {
    "no object": "3",
    "no JSON": '{"key": "K", ',
    "NULs": "\0\0\0",
    "key of another type": '{"key": ["K"], "loglikelihoods": [-1.0]}',
    "nothing but the key": '{"key": "K"}',
    "no list": '{"key": "K", "loglikelihoods": 3, "greedy": 3}',
    "a choice less": '{"key": "K", "loglikelihoods": [-1.0, -1.0, -1.0], "greedy": [false, false, false]}',
    "texts": '{"key": "K", "loglikelihoods": ["1", "2", "3", "4"], "greedy": [false, false, false, false]}',
    "nested": "[" * 100_000,
}


def test_damaged_records_are_answered_again(tmp_path, folders, caplog):
    """A damaged line costs its own question and is named; the control is a whole file."""
    whole = sampled(folders, Counts(), AnswerCache(tmp_path, {}))[1]
    path = tmp_path / FILE_NAME
    lines = path.read_text().splitlines()
    damaged = dict(zip(range(3, 60, 6), DAMAGE.values(), strict=False))
    for number, line in damaged.items():
        lines[number] = line.replace('"K"', json.dumps(json.loads(lines[number])["key"]))
    path.write_text("\n".join(lines) + "\n")
    answers, backend = AnswerCache(tmp_path, {}), Counts()
    loaded, encoder = load_benchmark("mmlu", SAMPLE, 1), PromptEncoder(tokenizer.load(folders["ours"]))
    prompts = list(build_prompts(loaded, find_style("lm-eval", "mmlu", 1), encoder, 1024, 0))
    with caplog.at_level("INFO"):
        harness.discard_damaged(answers, dict(zip(harness.answer_keys(prompts, {}), prompts, strict=True)))
    again = sampled(folders, backend, answers)[1]
    answers.close()
    assert backend.asked == 4 * len(DAMAGE)
    assert [g.metrics for g in again] == [g.metrics for g in whole]
    assert "4 records of questions.jsonl are no complete answers" in caplog.text
    idle = Counts(0)
    assert sampled(folders, idle, AnswerCache(tmp_path, {}))[1] == again


def test_two_evaluations_in_one_folder(tmp_path):
    """The second one is refused until the first has ended, and no line of the first is lost."""
    first = AnswerCache(tmp_path, {"seed": 1})
    for _ in range(2):
        with pytest.raises(UserError, match=r"another evaluation is writing .*questions\.jsonl: wait for it"):
            AnswerCache(tmp_path, {"seed": 1})
        first.put({"key": str(len(first.records))})
    first.close()
    assert list(AnswerCache(tmp_path, {"seed": 1}).records) == ["0", "1"]


class Ranks:
    """A grid of two threads."""

    def __init__(self, rank: int, meet: threading.Barrier, given: list) -> None:
        self.rank, self.meet, self.given = rank, meet, given

    def all_gather_object(self, value):
        self.given[self.rank] = value
        self.meet.wait()
        every = list(self.given)
        self.meet.wait()
        return every


def test_a_refused_folder_is_refused_on_every_rank(tmp_path):
    """With one line that is the same, and none of them waits for the other; a good one is known to all."""
    AnswerCache(tmp_path, {"seed": 1}).close()

    def opened(rank: int, settings: dict) -> AnswerCache | str:
        try:
            return open_on_all_ranks(tmp_path, settings, Ranks(rank, meet, given))
        except UserError as error:
            return str(error)

    for settings in ({"seed": 2}, {"seed": 1}):
        meet, given = threading.Barrier(2, timeout=20), [None, None]
        with ThreadPoolExecutor(2) as pool:
            caches = list(pool.map(opened, (0, 1), (settings, settings)))
        if settings["seed"] == 2:
            assert caches[0] == caches[1]
            assert "holds answers of seed 1, this run has 2: choose another --output" in caches[0]
        else:
            assert [cache.records for cache in caches] == [{}, {}]
            caches[0].close()
