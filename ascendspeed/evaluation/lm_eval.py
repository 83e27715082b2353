"""Adapter to lm-evaluation-harness: builds its tasks from our prompts, answers its requests with a backend,
returns its grades.
"""

import contextlib
import io
import logging
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from datasets import Dataset
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.task import ConfigurableTask
from lm_eval.evaluator import evaluate

from ascendspeed.evaluation.answer_cache import AnswerCache, answer_key
from ascendspeed.evaluation.prompts import Prompt, PromptEncoder, truncate_left
from ascendspeed.evaluation.tasks import TASKS, EvaluationTask
from ascendspeed.utils.errors import UserError
from ascendspeed.utils.progress import Advance

TokenPair = tuple[Sequence[int], Sequence[int]]
"""Ids of a context and of its continuation."""
OnScore = Callable[[int, float, bool], None]
"""(index, log-probability, whether greedy decoding gives the continuation)."""
OnText = Callable[[int, str], None]
"""(index, generated text)."""


class Backend(Protocol):
    """A language model."""

    def score(self, pairs: Sequence[TokenPair], on_score: OnScore) -> None:
        """Calls `on_score` for every (context, continuation), in any order."""

    def generate(
        self, prompts: Sequence[Sequence[int]], until: Sequence[str], new_tokens: int, on_text: OnText
    ) -> None:
        """Calls `on_text` for every prompt, in any order, with the greedy text up to the first string of
        `until`.
        """


class HarnessModel(TemplateLM):
    """A model of lm-evaluation-harness that asks a backend for the missing answers and stores them."""

    def __init__(
        self,
        backend: Backend,
        encoder: PromptEncoder,
        max_length: int,
        answers: AnswerCache,
        advance: Advance = lambda amount: None,
        extra_stop_ids: Sequence[int] = (),
    ) -> None:
        """`max_length`: most tokens of the model's input. `advance`: progress in questions. `extra_stop_ids`:
        see `answer_keys`.
        """
        super().__init__()
        self.extra_stop_ids = extra_stop_ids
        self.backend = backend
        self.encoder = encoder
        self.max_length = max_length
        self.answers = answers
        self.advance = advance

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Returns the log-probability of each continuation, and whether it is the greedy one."""
        by_question = _group_by_question(requests)
        pairs: list[TokenPair] = []
        owners: list[tuple[str, int]] = []  # (key of the question, index of the choice) of each pair
        for key, choices in by_question.items():
            if key not in self.answers.records:
                question_pairs = self._encode_pairs(choices)
                pairs += question_pairs
                owners += [(key, i) for i in range(len(question_pairs))]
        scores: dict[str, dict[int, tuple[float, bool]]] = defaultdict(dict)

        def on_score(number: int, logprob: float, greedy: bool) -> None:
            key, i = owners[number]
            first, *_ = by_question[key]
            if not math.isfinite(logprob):
                raise UserError(
                    f"{first.doc['where']}: the model's log-likelihood is {logprob}: its weights are broken, "
                    "or fp16 overflowed (try --bf16)"
                )
            scores[key][i] = (logprob, greedy)
            if len(scores[key]) == len(by_question[key]):
                complete = scores.pop(key)
                ordered = [complete[i] for i in range(len(complete))]
                answer = {"loglikelihoods": [x for x, _ in ordered], "greedy": [g for _, g in ordered]}
                self._store(key, first, answer)

        self.backend.score(pairs, on_score)
        results = []
        for request in requests:
            record = self.answers.records[request.doc["key"]]
            results.append((record["loglikelihoods"][request.idx], record["greedy"][request.idx]))
        return results

    def _encode_pairs(self, choices: Sequence[Instance]) -> list[TokenPair]:
        """Encodes the choices of a question, truncated to the length of the model's input."""
        context = choices[0].args[0]
        encoded = self.encoder.encode_pairs(context, [request.args[1] for request in choices])
        num_bos = len(self.encoder.bos_ids)
        # The last token of a continuation is never an input.
        return [
            (truncate_left(head, self.max_length + 1 - len(continuation), num_bos), continuation)
            for head, continuation in encoded
        ]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Returns the greedy text after each prompt."""
        missing = {
            key: instances[0]
            for key, instances in _group_by_question(requests).items()
            if key not in self.answers.records
        }
        groups: dict[tuple[tuple[str, ...], int], list[str]] = defaultdict(list)
        for key, request in missing.items():
            groups[tuple(request.args[1]["until"]), request.args[1]["max_gen_toks"]].append(key)
        for (until, new_tokens), keys in groups.items():
            max_length = self.max_length - new_tokens
            num_bos = len(self.encoder.bos_ids)
            prompts = [
                truncate_left(self.encoder.encode(missing[key].args[0]), max_length, num_bos) for key in keys
            ]

            def on_text(i: int, text: str, keys: list[str] = keys) -> None:
                self._store(keys[i], missing[keys[i]], {"text": text})

            self.backend.generate(prompts, until, new_tokens, on_text)
        return [self.answers.records[request.doc["key"]]["text"] for request in requests]

    def _store(self, key: str, request: Instance, answer: dict[str, Any]) -> None:
        doc = request.doc
        question = {name: doc[name] for name in ("task", "id", "where", "shots", "cut")}
        self.answers.put({"key": key, **question, "answer": doc["answer"], **answer})
        self.advance(1)

    @property
    def eot_token_id(self) -> int:
        """EOS token."""
        return self.encoder.tokenizer.eos

    @property
    def prefix_token_id(self) -> int:
        """Token before an empty context."""
        return self.encoder.bos_ids[0] if self.encoder.bos_ids else self.eot_token_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Returns ids, with BOS unless `add_special_tokens` is False."""
        ids = self.encoder.encode(string)
        return ids[len(self.encoder.bos_ids) :] if add_special_tokens is False else ids

    def _loglikelihood_tokens(self, requests: list[Any], **kwargs: Any) -> list[tuple[float, bool]]:
        raise NotImplementedError("requests are answered by question")

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Not implemented: no task needs it."""
        raise NotImplementedError("no benchmark here asks for the likelihood of a whole text")


def _group_by_question(requests: Iterable[Instance]) -> dict[str, list[Instance]]:
    """Returns key -> the requests of a question, in the order of its choices."""
    groups: dict[str, list[Instance]] = defaultdict(list)
    for request in requests:
        groups[request.doc["key"]].append(request)
    return {key: sorted(group, key=lambda request: request.idx) for key, group in groups.items()}


@dataclass(frozen=True)
class Grade:
    """Metrics of one question."""

    prompt: Prompt
    key: str
    metrics: dict[str, float]
    predicted: str = ""
    """The answer that the main metric judges: a choice, or what was extracted from the generated text."""


def answer_keys(
    prompts: Sequence[Prompt], settings: dict[str, Any], extra_stop_ids: Sequence[int] = ()
) -> list[str]:
    """Returns for each prompt a hash of everything that its answer depends on.

    `extra_stop_ids`: ids beside the tokenizer's EOS that end a generated answer.
    """
    keys = []
    for p in prompts:
        ends = [list(extra_stop_ids)] if p.until and extra_stop_ids else []
        keys.append(answer_key(settings, p.task, p.question.id, p.context, p.answers, p.until, *ends))
    return keys


def discard_damaged(answers: AnswerCache, prompts: dict[str, Prompt]) -> None:
    """Removes the records of `prompts` (by key) that do not have the content of an answer, with a note."""

    def is_damaged(record: dict[str, Any]) -> bool:
        return record["key"] in prompts and not _is_answer(record, prompts[record["key"]])

    answers.discard(is_damaged)


def _is_answer(record: dict[str, Any], prompt: Prompt) -> bool:
    """Returns whether a record has the content of an answer to this prompt."""
    if not prompt.choices:
        return isinstance(record.get("text"), str)
    values, greedy = record.get("loglikelihoods"), record.get("greedy")
    are_lists = isinstance(values, list) and isinstance(greedy, list)
    if not are_lists or not len(values) == len(greedy) == len(prompt.choices):
        return False
    return all(type(value) in (int, float) for value in values) and all(type(flag) is bool for flag in greedy)


def grade_prompts(model: HarnessModel, prompts: Sequence[Prompt], new_tokens: int) -> list[Grade]:
    """Answers and grades the prompts; returns the grades in their order."""
    keys = answer_keys(prompts, model.answers.settings, model.extra_stop_ids)
    by_subject: dict[str, list[tuple[str, Prompt]]] = defaultdict(list)
    for key, prompt in zip(keys, prompts, strict=True):
        by_subject[f"{prompt.task}/{prompt.subject}"].append((key, prompt))
    # lm-eval warns that the datasets are not on the hub, which is intended, and draws a progress bar for each
    # subject.
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    tasks = {name: harness_task(name, keyed, new_tokens) for name, keyed in by_subject.items()}
    with contextlib.redirect_stderr(io.StringIO()):
        samples = evaluate(model, tasks, bootstrap_iters=0, log_samples=True)["samples"]
    metrics: dict[str, dict[str, float]] = defaultdict(dict)
    extracted: dict[str, str] = {}
    for subject in by_subject:
        for sample in samples[subject]:
            key = sample["doc"]["key"]
            for metric in sample["metrics"]:
                name = sample["filter"] if metric == "exact_match" else metric
                metrics[key][name] = float(sample[metric])
            if sample["filter"] == TASKS[sample["doc"]["task"]].main_metric:
                extracted[key] = str(sample["filtered_resps"][0])
    grades = []
    for key, prompt in zip(keys, prompts, strict=True):
        record = model.answers.records[key]
        predicted = _best_choice(prompt, record) if prompt.choices else extracted.get(key, "")
        grades.append(Grade(prompt, key, metrics[key], predicted))
    return grades


def _best_choice(prompt: Prompt, record: dict[str, Any]) -> str:
    """Returns the choice with the highest log-likelihood, per character if the main metric is `acc_norm`."""
    per_character = TASKS[prompt.task].main_metric == "acc_norm"
    scores = [
        value / len(choice) if per_character else value
        for value, choice in zip(record["loglikelihoods"], prompt.choices, strict=True)
    ]
    return prompt.choices[scores.index(max(scores))]


def harness_task(name: str, keyed_prompts: Sequence[tuple[str, Prompt]], new_tokens: int) -> ConfigurableTask:
    """Builds lm-evaluation-harness' task from (key, prompt) of one subject."""
    first = keyed_prompts[0][1]
    # `where`, `shots` and `cut` are keys of questions.jsonl.
    docs = Dataset.from_list(
        [
            {
                "key": key,
                "task": prompt.task,
                "id": prompt.question.id,
                "where": prompt.question.location,
                "shots": prompt.num_shots,
                "cut": prompt.truncated,
                "prompt": prompt.context,
                "choices": list(prompt.choices),
                "answer": prompt.question.answer,
            }
            for key, prompt in keyed_prompts
        ]
    )
    config: dict[str, Any] = {
        "task": name,
        "custom_dataset": lambda **_: {"test": docs},
        "test_split": "test",
        "num_fewshot": 0,  # the examples are in the prompt already
        "doc_to_text": "prompt",
        "doc_to_target": "answer",
        "target_delimiter": first.delimiter,
    }
    task = TASKS[first.task]
    output = _choice_config(task) if first.choices else _generation_config(task, first.until, new_tokens)
    return ConfigurableTask(config=config | output)


def _choice_config(task: EvaluationTask) -> dict[str, Any]:
    metrics = [{"metric": metric, "aggregation": "mean", "higher_is_better": True} for metric in task.metrics]
    return {"output_type": "multiple_choice", "doc_to_choice": "choices", "metric_list": metrics}


def _generation_config(task: EvaluationTask, until: Sequence[str], new_tokens: int) -> dict[str, Any]:
    exact_match = {
        "metric": "exact_match",
        "aggregation": "mean",
        "higher_is_better": True,
        "ignore_case": True,
        "ignore_punctuation": False,
        "regexes_to_ignore": [",", r"\$", "(?s).*#### ", r"\.$"],
    }
    filters = [
        {"name": name, "filter": [{"function": "regex", **arguments}, {"function": "take_first"}]}
        for name, arguments in task.extractions.items()
    ]
    return {
        "output_type": "generate_until",
        "metric_list": [exact_match],
        "filter_list": filters,
        "generation_kwargs": {"until": list(until), "do_sample": False, "max_gen_toks": new_tokens},
    }
