"""Model for any task of lm-evaluation-harness, with answers cached on disk."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from lm_eval import utils
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM

from ascendspeed.evaluation.answer_cache import AnswerCache, answer_key
from ascendspeed.evaluation.chat_prompts import ChatPrompts
from ascendspeed.evaluation.lm_eval import Backend
from ascendspeed.evaluation.prompts import PromptEncoder, truncate_left
from ascendspeed.utils.errors import UserError
from ascendspeed.utils.progress import Advance, of_items, progress

DEFAULT_NEW_TOKENS = 256
"""Tokens of an answer if neither the task nor the user gives a number, as in lm-evaluation-harness."""


class RequestModel(TemplateLM):
    """Answers single requests; `HarnessModel` answers the questions of this project's own tasks."""

    def __init__(
        self,
        backend: Backend,
        encoder: PromptEncoder,
        max_length: int,
        answers: AnswerCache,
        *,
        quiet: bool,
        new_tokens: int | None = None,
        chat: ChatPrompts | None = None,
        extra_stop_ids: Sequence[int] = (),
    ) -> None:
        """`max_length`: most tokens of the model's input. `quiet`: show no progress. `new_tokens`: None for
        that of the task. `extra_stop_ids`: ids beside the tokenizer's EOS that end a generated answer.
        """
        super().__init__()
        self.backend = backend
        self.encoder = encoder
        self.max_length = max_length
        self.answers = answers
        self.quiet = quiet
        self._advance: Advance = lambda amount: None
        self.new_tokens = new_tokens
        self.chat = chat
        self.extra_stop_ids = list(extra_stop_ids)

    def key(self, request: Instance) -> str:
        """Returns the key of a request's answer in the cache."""
        stops = self.extra_stop_ids if request.request_type == "generate_until" else []
        return answer_key(self.answers.settings, request.request_type, request.args, self.new_tokens, stops)

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Returns the log-probability of each continuation, and whether it is the greedy one."""
        missing = self._missing(requests)
        pairs = [self._encode_pair_of(*request.args) for request in missing.values()]
        keys = list(missing)

        def on_score(i: int, logprob: float, greedy: bool) -> None:
            self._store(keys[i], missing[keys[i]], {"loglikelihoods": [logprob], "greedy": [greedy]})

        with self._progress(len(missing)):
            self.backend.score(pairs, on_score)
        records = [self.answers.records[self.key(request)] for request in requests]
        return [(record["loglikelihoods"][0], record["greedy"][0]) for record in records]

    def _encode_pair_of(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Encodes a request, truncated to the length of the model's input."""
        if context:
            [(head, tail)] = self.encoder.encode_pairs(context, [continuation])
        else:
            head = [self.prefix_token_id]
            tail = self.encoder.encode(continuation)[len(self.encoder.bos_ids) :]
        # The last token of a continuation is never an input.
        num_bos = len(self.encoder.bos_ids)
        return truncate_left(head, self.max_length + 1 - len(tail), num_bos), tail

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Returns the log-probability of each text, in windows of the model's length without overlap."""
        missing = self._missing(requests)
        pairs: list[Any] = []
        owners: list[str] = []
        for key, request in missing.items():
            windows = utils.get_rolling_token_windows(
                token_list=self.encoder.encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            new = [utils.make_disjoint_window(window) for window in windows]
            pairs += new
            owners += [key] * len(new)
        scores: dict[str, list[float]] = defaultdict(list)

        def on_score(i: int, logprob: float, greedy: bool) -> None:
            scores[owners[i]].append(logprob)
            if len(scores[owners[i]]) == owners.count(owners[i]):
                values = scores.pop(owners[i])
                record = {"loglikelihoods": [sum(values)], "greedy": [False]}
                self._store(owners[i], missing[owners[i]], record)

        with self._progress(len(missing)):
            self.backend.score(pairs, on_score)
        return [self.answers.records[self.key(request)]["loglikelihoods"][0] for request in requests]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Returns the greedy text after each prompt. Raises UserError for a task that samples."""
        missing = self._missing(requests)
        groups: dict[tuple[tuple[str, ...], int], list[str]] = defaultdict(list)
        for key, request in missing.items():
            groups[self._generation_settings(request)].append(key)
        with self._progress(len(missing)):
            for (until, new_tokens), keys in groups.items():
                self._generate({key: missing[key] for key in keys}, until, new_tokens)
        return [self.answers.records[self.key(request)]["text"] for request in requests]

    def _generate(self, requests: dict[str, Instance], until: Sequence[str], new_tokens: int) -> None:
        """Answers requests with equal settings."""
        limit = self.max_length - new_tokens
        first = next(iter(requests.values()))
        if limit < 1:
            raise UserError(
                f"{first.task_name} generates {new_tokens} tokens, which leaves none of the "
                f"{self.max_length} tokens for the question; set --max-new-tokens"
            )
        num_bos = len(self.encoder.bos_ids)
        keys = list(requests)
        prompts = [truncate_left(self.encoder.encode(requests[k].args[0]), limit, num_bos) for k in keys]

        def on_text(i: int, text: str) -> None:
            self._store(keys[i], requests[keys[i]], {"text": text})

        self.backend.generate(prompts, until, new_tokens, on_text)

    def _generation_settings(self, request: Instance) -> tuple[tuple[str, ...], int]:
        """Returns the stop strings and the number of tokens of a request."""
        settings = request.args[1]
        if settings.get("do_sample") and settings.get("temperature", 1.0) > 0:
            raise UserError(
                f"{request.task_name} samples its answers (temperature {settings.get('temperature', 1.0)}); "
                "only greedy answers are supported"
            )
        until = settings.get("until") or []
        until = [until] if isinstance(until, str) else until
        new_tokens = self.new_tokens or settings.get("max_gen_toks", DEFAULT_NEW_TOKENS)
        return tuple(string for string in until if string), new_tokens

    def _missing(self, requests: Sequence[Instance]) -> dict[str, Instance]:
        """Returns key -> request of those without an answer; equal requests are answered once."""
        keyed = {self.key(request): request for request in requests}
        return {key: request for key, request in keyed.items() if not self._has_answer(key, request)}

    def _has_answer(self, key: str, request: Instance) -> bool:
        record = self.answers.records.get(key, {})
        if request.request_type == "generate_until":
            return isinstance(record.get("text"), str)
        values = record.get("loglikelihoods")
        return isinstance(values, list) and len(values) == 1 and type(values[0]) in (int, float)

    def _store(self, key: str, request: Instance, answer: dict[str, Any]) -> None:
        question = {"task": request.task_name, "id": f"{request.task_name}/{request.doc_id}/{request.idx}"}
        self.answers.put({"key": key, **question, "prompt": request.args[0], **answer})
        self._advance(1)

    @contextmanager
    def _progress(self, total: int) -> Iterator[None]:
        """Shows how many of `total` missing requests are answered."""
        with progress(of_items("requests"), total, quiet=self.quiet or not total) as advance:
            self._advance = advance
            yield

    @property
    def eot_token_id(self) -> int:
        """EOS token."""
        return self.encoder.tokenizer.eos

    @property
    def prefix_token_id(self) -> int:
        """Token before an empty context."""
        return self.encoder.bos_ids[0] if self.encoder.bos_ids else self.eot_token_id

    @property
    def tokenizer_name(self) -> str:
        """Name in lm-evaluation-harness' request cache, which is not used."""
        return "ascendspeed"

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Returns the text of a conversation in the chat template."""
        assert self.chat is not None, "lm-evaluation-harness asks only with --apply-chat-template"
        return self.chat.render(chat_history, add_generation_prompt)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Returns ids, with BOS unless `add_special_tokens` is False."""
        ids = self.encoder.encode(string)
        return ids[len(self.encoder.bos_ids) :] if add_special_tokens is False else ids

    def _loglikelihood_tokens(self, requests: list[Any], **kwargs: Any) -> list[tuple[float, bool]]:
        raise NotImplementedError("requests are answered by `loglikelihood`")
