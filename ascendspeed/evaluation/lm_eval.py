"""lm-evaluation-harness as the engine: it makes requests of our prompts and grades what comes back; here is what answers them."""

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

from ascendspeed.evaluation.answer_cache import Answers, key_of
from ascendspeed.evaluation.prompts import Encoder, Prompt, clip
from ascendspeed.utils.errors import UserError
from ascendspeed.utils.progress import Advance

Pair = tuple[Sequence[int], Sequence[int]]


class Backend(Protocol):
    """A model."""

    def score(self, pairs: Sequence[Pair], got: Callable[[int, float, bool], None]) -> None:
        """Tells of every (context, continuation), in any order: number, log-probability, whether greedy decoding gives it."""

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        until: Sequence[str],
        new_tokens: int,
        got: Callable[[int, str], None],
    ) -> None:
        """Tells of every prompt, in any order: number and greedy text up to the first of `until`."""


class Adapter(TemplateLM):
    """A language model as lm-evaluation-harness sees one: asks the backend what is not answered yet, and keeps the answers."""

    def __init__(
        self,
        backend: Backend,
        encoder: Encoder,
        room: int,
        answers: Answers,
        advance: Advance = lambda amount: None,
    ) -> None:
        super().__init__()
        self.backend, self.encoder, self.room, self.answers, self.advance = (
            backend,
            encoder,
            room,
            answers,
            advance,
        )

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Log-probability of each continuation, and whether it is the greedy one."""
        by_question = self._by_question(requests)
        pairs: list[Pair] = []
        owner: list[tuple[str, int]] = []
        for key, asked in by_question.items():
            if key not in self.answers.known:
                for i, pair in enumerate(
                    self.encoder.pairs(asked[0].args[0], [request.args[1] for request in asked])
                ):
                    context, continuation = pair
                    pairs.append(
                        (
                            clip(context, self.room + 1 - len(continuation), len(self.encoder.start)),
                            continuation,
                        )
                    )
                    owner.append((key, i))
        found: dict[str, dict[int, tuple[float, bool]]] = defaultdict(dict)

        def got(number: int, logprob: float, greedy: bool) -> None:
            key, i = owner[number]
            if not math.isfinite(logprob):
                where = by_question[key][0].doc["where"]
                raise UserError(
                    f"{where}: the model's log-likelihood is {logprob}: its weights are broken, or fp16 overflowed (try --bf16)"
                )
            found[key][i] = (logprob, greedy)
            if len(found[key]) == len(by_question[key]):
                values, flags = zip(*(found[key][i] for i in range(len(by_question[key]))), strict=True)
                del found[key]
                self._keep(key, by_question[key][0], {"loglikelihoods": list(values), "greedy": list(flags)})

        self.backend.score(pairs, got)
        answers = (self.answers.known[request.doc["key"]] for request in requests)
        return [
            (a["loglikelihoods"][r.idx], a["greedy"][r.idx]) for r, a in zip(requests, answers, strict=True)
        ]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Greedy text after each prompt."""
        by_question = self._by_question(requests)
        todo = {key: asked[0] for key, asked in by_question.items() if key not in self.answers.known}
        groups: dict[tuple[tuple[str, ...], int], list[str]] = defaultdict(list)
        for key, request in todo.items():
            groups[tuple(request.args[1]["until"]), request.args[1]["max_gen_toks"]].append(key)
        for (until, new_tokens), keys in groups.items():
            prompts = [
                clip(self.encoder.encode(todo[key].args[0]), self.room - new_tokens, len(self.encoder.start))
                for key in keys
            ]
            self.backend.generate(
                prompts,
                until,
                new_tokens,
                lambda i, text, keys=keys: self._keep(keys[i], todo[keys[i]], {"text": text}),
            )
        return [self.answers.known[request.doc["key"]]["text"] for request in requests]

    def _by_question(self, requests: Iterable[Instance]) -> dict[str, list[Instance]]:
        found: dict[str, list[Instance]] = defaultdict(list)
        for request in requests:
            found[request.doc["key"]].append(request)
        return {key: sorted(asked, key=lambda request: request.idx) for key, asked in found.items()}

    def _keep(self, key: str, request: Instance, answer: dict[str, Any]) -> None:
        doc = request.doc
        about = {name: doc[name] for name in ("task", "id", "where", "shots", "cut")}
        self.answers.put({"key": key, **about, "answer": doc["answer"], **answer})
        self.advance(1)

    @property
    def eot_token_id(self) -> int:
        """Of a text."""
        return self.encoder.tokenizer.eos

    @property
    def prefix_token_id(self) -> int:
        """What stands before an empty context."""
        return self.encoder.start[0] if self.encoder.start else self.eot_token_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **more: Any) -> list[int]:
        """Ids, with BOS unless told otherwise."""
        ids = self.encoder.encode(string)
        return ids[len(self.encoder.start) :] if add_special_tokens is False else ids

    def _loglikelihood_tokens(self, requests: list[Any], **more: Any) -> list[tuple[float, bool]]:
        raise NotImplementedError("requests are answered by question")

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """None of the benchmarks asks for it."""
        raise NotImplementedError("no benchmark here asks for the likelihood of a whole text")


@dataclass(frozen=True)
class Grade:
    """What one question came to."""

    prompt: Prompt
    key: str
    metrics: dict[str, float]


METRICS = {"hellaswag": ("acc", "acc_norm")}
"""Of tasks with choices; acc alone where nothing is said."""
MAIN = {"hellaswag": "acc_norm", "gsm8k": "flexible-extract"}
"""The metric that is quoted; acc where nothing is said."""


def main_metric(task: str) -> str:
    """The metric of a task that is quoted."""
    return MAIN.get(task, "acc")


def keys_of(prompts: Sequence[Prompt], settings: dict[str, Any]) -> list[str]:
    """A name for each question with everything that its answer depends on."""
    return [key_of(settings, p.task, p.question.id, p.context, p.answers, p.until) for p in prompts]


def ask(adapter: Adapter, prompts: Sequence[Prompt], new_tokens: int) -> list[Grade]:
    """Puts the prompts and grades the answers, in their order."""
    keys = keys_of(prompts, adapter.answers.settings)
    by_subject: dict[str, list[tuple[str, Prompt]]] = defaultdict(list)
    for key, prompt in zip(keys, prompts, strict=True):
        by_subject[f"{prompt.task}/{prompt.subject}"].append((key, prompt))
    logging.getLogger("lm_eval").setLevel(
        logging.ERROR
    )  # it warns of what is meant here: datasets that are not on the hub
    tasks = {name: task_of(name, asked, new_tokens) for name, asked in by_subject.items()}
    with contextlib.redirect_stderr(io.StringIO()):  # where it draws a bar for every subject
        samples = evaluate(adapter, tasks, bootstrap_iters=0, log_samples=True)["samples"]
    metrics: dict[str, dict[str, float]] = defaultdict(dict)
    for sample in (sample for name in by_subject for sample in samples[name]):
        for metric in sample["metrics"]:
            name = sample["filter"] if metric == "exact_match" else metric
            metrics[sample["doc"]["key"]][name] = float(sample[metric])
    return [Grade(prompt, key, metrics[key]) for key, prompt in zip(keys, prompts, strict=True)]


def task_of(name: str, asked: Sequence[tuple[str, Prompt]], new_tokens: int) -> ConfigurableTask:
    """lm-evaluation-harness' task of some prompts of one kind, with their keys."""
    first = asked[0][1]
    docs = Dataset.from_list(
        [
            {
                "key": key,
                "task": p.task,
                "id": p.question.id,
                "where": p.question.where,
                "shots": p.shots,
                "cut": p.cut,
                "prompt": p.context,
                "choices": list(p.choices),
                "answer": p.question.answer,
            }
            for key, p in asked
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
    return ConfigurableTask(
        config=config | (_choosing(first.task) if first.choices else _writing(first.until, new_tokens))
    )


def _choosing(task: str) -> dict[str, Any]:
    metrics = [
        {"metric": m, "aggregation": "mean", "higher_is_better": True} for m in METRICS.get(task, ("acc",))
    ]
    return {"output_type": "multiple_choice", "doc_to_choice": "choices", "metric_list": metrics}


def _writing(until: Sequence[str], new_tokens: int) -> dict[str, Any]:
    """GSM8K: the number after ####, or the last number of all."""
    patterns = {
        "strict-match": {"regex_pattern": r"#### (\-?[0-9\.\,]+)"},
        "flexible-extract": {"group_select": -1, "regex_pattern": r"(-?[$0-9.,]{2,})|(-?[0-9]+)"},
    }
    exact = {
        "metric": "exact_match",
        "aggregation": "mean",
        "higher_is_better": True,
        "ignore_case": True,
        "ignore_punctuation": False,
        "regexes_to_ignore": [",", r"\$", "(?s).*#### ", r"\.$"],
    }
    filters = [
        {"name": n, "filter": [{"function": "regex", **p}, {"function": "take_first"}]}
        for n, p in patterns.items()
    ]
    generation = {"until": list(until), "do_sample": False, "max_gen_toks": new_tokens}
    return {
        "output_type": "generate_until",
        "metric_list": [exact],
        "filter_list": filters,
        "generation_kwargs": generation,
    }
