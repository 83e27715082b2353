"""Runs an evaluation job: loads the model, answers the questions, reports.

Imported after argument parsing.
"""

import logging
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from ascendspeed.config.schema import ModelConfig
from ascendspeed.conversion import weights_identity
from ascendspeed.distributed import device as devices
from ascendspeed.evaluation import fingerprint
from ascendspeed.evaluation.answer_cache import FILE_NAME, AnswerCache, open_on_all_ranks
from ascendspeed.evaluation.args import EvaluationJob
from ascendspeed.evaluation.harness_index import CODE_TASKS
from ascendspeed.evaluation.prompts import PromptEncoder, build_prompts
from ascendspeed.inference.args import SPARE
from ascendspeed.tokenization.chat import control_token_ids
from ascendspeed.tokenization.detokenizer import TextStream, decode_until_stop
from ascendspeed.tokenization.tokenizer import Tokenizer
from ascendspeed.tokenization.vocab_check import check_vocab_size
from ascendspeed.utils.errors import UserError
from ascendspeed.utils.progress import of_items, progress

logger = logging.getLogger(__name__)


class EngineBackend:
    """Backend over `ascendspeed.inference.engine`. Collective: every rank makes the same calls."""

    def __init__(
        self,
        model: Any,
        tokenizer: Tokenizer,
        batch_size: int,
        stop_ids: Sequence[int] | None = None,
        capture: Any = None,
    ) -> None:
        """`stop_ids`: ids that end a generated answer; None: the tokenizer's EOS. `capture`: see
        `continuous_batching.generate`."""
        self.model, self.capture = model, capture
        self.tokenizer = tokenizer
        self.batch_size = batch_size
        eos = () if tokenizer.eos is None else (tokenizer.eos,)
        self.stop_ids = tuple(eos if stop_ids is None else stop_ids)

    @property
    def extra_stop_ids(self) -> tuple[int, ...]:
        """Ids beside the tokenizer's EOS that end a generated answer."""
        return tuple(sorted(set(self.stop_ids) - {self.tokenizer.eos}))

    def score(self, pairs: Sequence[Any], on_score: Callable[[int, float, bool], None]) -> None:
        """Calls `on_score` with index, log-probability and greediness of every (context, continuation)."""
        from ascendspeed.inference import engine

        engine.score_continuations(
            self.model,
            pairs,
            on_score=lambda i, score: on_score(i, score.logprob, score.is_greedy),
        )

    def generate(
        self,
        prompts: Sequence[Any],
        until: Sequence[str],
        new_tokens: int,
        on_text: Callable[[int, str], None],
    ) -> None:
        """Calls `on_text` with index and greedy text of every prompt."""
        from ascendspeed.inference import continuous_batching, engine

        stop_ids = {*self.stop_ids, *control_token_ids(self.tokenizer, until)}
        params = engine.SamplingParams(
            max_new_tokens=new_tokens,
            stop_ids=tuple(sorted(stop_ids)),
            vocab_size=min(self.tokenizer.vocab_size, self.model.config.vocab_size),
        )
        streams = [TextStream(self.tokenizer, until) for _ in prompts]

        def is_finished(number: int, token: int) -> bool:
            streams[number].push(token)
            return streams[number].stopped

        def on_completion(number: int, completion: engine.Completion) -> None:
            text, *_ = decode_until_stop(self.tokenizer, completion.tokens, until)
            on_text(number, text)

        continuous_batching.generate(
            self.model, prompts, params, self.batch_size, is_finished, on_completion, self.capture
        )


def check_vocabulary(tokenizer: Tokenizer, model: ModelConfig) -> None:
    """Raises UserError if the tokenizer does not fit the model's vocabulary."""
    ids, rows = tokenizer.vocab_size, model.vocab_size
    message = (
        f"{tokenizer.path} has {ids} tokens, but the model's vocabulary has {rows} rows: this is not the "
        "model's tokenizer; give the right one (--tokenizer-name-or-path)"
    )
    check_vocab_size(tokenizer, rows, message)
    if rows - ids > SPARE:
        raise UserError(message)


def run(job: EvaluationJob, device: devices.Device, notes: Sequence[str]) -> None:
    """Loads the model, answers all questions and writes the reports. Raises UserError."""
    from ascendspeed.inference.serving import decode_graphs
    from ascendspeed.inference.session import Session

    if job.evaluation.cuda_graphs:
        decode_graphs.check_device(device)
    harness = load_harness_tasks(job)
    session = Session.open(job.spec, device)
    tokenizer = session.tokenizer
    check_vocabulary(tokenizer, session.config)
    for note in notes:
        logger.info(f"note: {note}")
    max_length = input_length(job, session.config)
    stop_ids = stop_ids_of(job, tokenizer, session.generation_stop_ids)
    model, capture = session.model, None
    if job.evaluation.cuda_graphs:
        capture = decode_graphs.open_capture(model, model.paged_block_size)
    backend = EngineBackend(model, tokenizer, job.evaluation.batch_size, stop_ids, capture)
    sha256 = weights_identity.full_bytes(session.source, session.readers)
    settings = _settings(job, sha256, tokenizer, max_length)
    answers = open_on_all_ranks(Path(job.evaluation.output_dir), settings, session.grid)
    try:
        _evaluate(job, backend, answers, max_length, device, harness)
    finally:
        answers.close()


def input_length(job: EvaluationJob, model: ModelConfig) -> int:
    """Most tokens of the model's input. Raises UserError if generated answers leave none for the question."""
    max_length = job.evaluation.max_input_length or model.max_position_embeddings
    generated = [benchmark.name for benchmark, style in job.benchmarks if style.until]
    if generated and max_length <= job.new_tokens:
        raise UserError(
            f"--max-new-tokens {job.new_tokens} of {generated[0]} leaves none of the {max_length} tokens for "
            "the question"
        )
    return max_length


def stop_ids_of(job: EvaluationJob, tokenizer: Tokenizer, of_model: Sequence[int]) -> list[int]:
    """Ids that end a generated answer: those `of_model` and of the tasks; none if nothing is generated."""
    until = {string for _, style in job.benchmarks for string in style.until}
    if not until and not job.harness:
        return []
    return sorted({*of_model, *control_token_ids(tokenizer, until)})


def load_harness_tasks(job: EvaluationJob) -> dict[str, dict[str, Any]]:
    """Returns name -> tasks of lm-evaluation-harness, by their names. Raises UserError."""
    if not job.harness:
        return {}
    from ascendspeed.evaluation.code_tasks import load_code_task
    from ascendspeed.evaluation.harness_tasks import load_tasks

    logger.info(f"loading {', '.join(selection.title for selection in job.harness)} ...")
    tasks = {}
    for selection in job.harness:
        load = load_code_task if selection.name in CODE_TASKS else load_tasks
        tasks[selection.name] = load(selection.name, selection.folder, job.evaluation.num_fewshot)
    return tasks


def _settings(job: EvaluationJob, sha256: str, tokenizer: Tokenizer, max_length: int) -> dict[str, Any]:
    """Returns everything that answers depend on, beside the questions; not the layout or the batch size."""
    options = job.evaluation
    chat = (
        {"chat_template": options.chat_template, "system": options.system}
        if options.apply_chat_template
        else {}
    )
    return chat | {
        "model_sha256": sha256,
        "tokenizer_sha256": fingerprint.hash_tokenizer(Path(tokenizer.path)),
        "dtype": job.spec.args.precision,
        "prompt_style": job.evaluation.prompt_style,
        "num_fewshot": job.evaluation.num_fewshot,
        "max_input_length": max_length,
        "max_new_tokens": job.new_tokens,
        "lm_eval": version("lm_eval"),
    }


def _evaluate(
    job: EvaluationJob,
    backend: EngineBackend,
    answers: AnswerCache,
    max_length: int,
    device: devices.Device,
    harness: Mapping[str, Mapping[str, Any]],
) -> None:
    """Answers and grades the questions on all ranks; rank 0 writes the reports.

    `harness`: name -> tasks of lm-evaluation-harness.
    """
    # lm-eval imports torch, so it is imported after the device was prepared.
    from ascendspeed.evaluation import report

    started, options, grid = time.time(), job.evaluation, backend.model.grid
    limited = f", the first {options.limit} of each subject only" if options.limit else ""
    grades, results = answer(job, backend, answers, max_length, harness)
    if grid.rank != 0:
        return
    answers.flush()
    own, others = score_own_tasks(job, grades), [result.score for result in results]
    for score in own:
        title = f"{options.prompt_style} prompts, {job.shots[score.benchmark.name]} examples{limited}"
        logger.info(report.as_text(score, title))
    for result in results:
        chat = f", chat template {result.chat_template}" if result.chat_template else ""
        title = f"prompts of lm-evaluation-harness, {result.shots} examples{chat}{limited}"
        logger.info(report.as_text(result.score, title))
    run_facts = {
        "model": {
            "path": str(job.spec.args.load),
            "sha256": answers.settings["model_sha256"],
            "family": backend.model.config.family,
        },
        "settings": answers.settings,
        "limit": options.limit,
        "batch_size": options.batch_size,
        "layout": str(grid),
        "device": f"{device.kind} ({device.name})",
        "versions": _versions(),
        "seconds": round(time.time() - started, 1),
        "shots": job.shots | {result.score.benchmark.name: result.shots for result in results},
    }
    folder = Path(options.output_dir)
    graded = {key: more for result in results for key, more in result.records.items()}
    report.write_reports(folder, own + others, run_facts, grades, answers.records, graded)
    logger.info(f"wrote {folder}/results.json, results.csv, chart.png and {FILE_NAME}")


def score_own_tasks(job: EvaluationJob, grades: Sequence[Any]) -> list[Any]:
    """`TaskScore`s of this project's own tasks, from the `Grade`s of their questions."""
    from ascendspeed.evaluation import metrics

    return [
        metrics.score_task(
            benchmark,
            [grade for grade in grades if grade.prompt.task == benchmark.name],
            job.shots[benchmark.name],
        )
        for benchmark, _ in job.benchmarks
    ]


def answer(
    job: EvaluationJob,
    backend: EngineBackend,
    answers: AnswerCache,
    max_length: int,
    harness: Mapping[str, Mapping[str, Any]],
) -> tuple[list[Any], list[Any]]:
    """Answers all questions on all ranks; returns the `Grade`s of this project's own tasks, and the
    `HarnessResult`s of the others.
    """
    from ascendspeed.evaluation import lm_eval

    encoder, grid = PromptEncoder(backend.tokenizer), backend.model.grid
    prompts = []
    for benchmark, style in job.benchmarks:
        prompts += build_prompts(benchmark, style, encoder, max_length, job.new_tokens)
    keys = lm_eval.answer_keys(prompts, answers.settings, backend.extra_stop_ids)
    lm_eval.discard_damaged(answers, dict(zip(keys, prompts, strict=True)))
    cached = sum(key in answers.records for key in keys)
    options = job.evaluation
    limited = f", the first {options.limit} of each subject only" if options.limit else ""
    if answers.is_on_disk:
        logger.info(
            f"{len(prompts)} questions{limited}; {cached} were answered before (in "
            f"{options.output_dir}/{FILE_NAME})"
        )
    with progress(of_items("questions"), len(prompts), cached, quiet=grid.rank != 0) as advance:
        model = lm_eval.HarnessModel(backend, encoder, max_length, answers, advance, backend.extra_stop_ids)
        grades = lm_eval.grade_prompts(model, prompts, job.new_tokens) if prompts else []
    return grades, _evaluate_harness(job, backend, answers, max_length, harness)


def _evaluate_harness(
    job: EvaluationJob,
    backend: EngineBackend,
    answers: AnswerCache,
    max_length: int,
    harness: Mapping[str, Mapping[str, Any]],
) -> list[Any]:
    """Answers and grades tasks of lm-evaluation-harness on all ranks; returns their `HarnessResult`s."""
    if not harness:
        return []
    from ascendspeed.evaluation import harness_scores
    from ascendspeed.evaluation.chat_prompts import ChatEncoder, ChatPrompts
    from ascendspeed.evaluation.harness_model import RequestModel

    options, tokenizer = job.evaluation, backend.tokenizer
    chat = None
    encoder = PromptEncoder(tokenizer)
    if options.apply_chat_template:
        chat = ChatPrompts(tokenizer, options.chat_template, backend.model.config.family)
        encoder = ChatEncoder(tokenizer)
    results = []
    for selection in job.harness:
        tasks = harness[selection.name]
        model = RequestModel(
            backend,
            encoder,
            max_length,
            answers,
            quiet=backend.model.grid.rank != 0,
            new_tokens=options.max_new_tokens,
            chat=chat,
            extra_stop_ids=backend.extra_stop_ids,
        )
        result = harness_scores.evaluate_tasks(
            selection.title,
            selection.folder,
            tasks,
            model,
            limit=options.limit,
            system=options.system,
            multiturn=options.fewshot_as_multiturn,
        )
        results.append(result)
    return results


def _versions() -> dict[str, str]:
    return {
        "ascendspeed": version("ascendspeed"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        **{name: version(name) for name in ("megatron-core", "lm_eval")},
    }
