"""A job from the first rank's greeting to the files that it leaves. Imported after the command line was found good."""

import logging
import platform
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from ascendspeed.config.schema import ModelConfig
from ascendspeed.conversion import weights_identity
from ascendspeed.distributed import device as devices
from ascendspeed.evaluation import fingerprint
from ascendspeed.evaluation.answer_cache import NAME, Answers, open_together
from ascendspeed.evaluation.args import EvaluationJob
from ascendspeed.evaluation.prompts import Encoder, prepare
from ascendspeed.inference.args import SPARE
from ascendspeed.tokenization.detokenizer import TextStream, decode_until_stop
from ascendspeed.tokenization.tokenizer import Tokenizer
from ascendspeed.utils.errors import UserError
from ascendspeed.utils.progress import of_items, progress

logger = logging.getLogger(__name__)


class Model:
    """`ascendspeed.inference.engine` as a backend; every rank asks it the same."""

    def __init__(self, model: Any, tokenizer: Tokenizer, batch_size: int) -> None:
        self.model, self.tokenizer, self.batch_size = model, tokenizer, batch_size

    def score(self, pairs: Sequence[Any], got: Callable[[int, float, bool], None]) -> None:
        """As `harness.Backend` says."""
        from ascendspeed.inference import engine

        engine.score_continuations(
            self.model,
            pairs,
            self.batch_size,
            on_score=lambda i, score: got(i, score.logprob, score.is_greedy),
        )

    def generate(
        self, prompts: Sequence[Any], until: Sequence[str], new_tokens: int, got: Callable[[int, str], None]
    ) -> None:
        """As `harness.Backend` says."""
        from ascendspeed.inference import engine

        params = engine.SamplingParams(
            max_new_tokens=new_tokens, stop_ids=(self.tokenizer.eos,), vocab_size=self.tokenizer.vocab_size
        )
        order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
        for start in range(0, len(order), self.batch_size):
            batch = order[start : start + self.batch_size]
            streams = [TextStream(self.tokenizer, until) for _ in batch]

            def ends(row: int, token: int, streams: list[TextStream] = streams) -> bool:
                streams[row].push(token)
                return streams[row].stopped

            done = engine.sample(self.model, [prompts[i] for i in batch], params, ends)
            for i, completions in zip(batch, done, strict=True):
                got(i, decode_until_stop(self.tokenizer, completions[0].tokens, until)[0])


def check_vocabulary(tokenizer: Tokenizer, model: ModelConfig) -> None:
    """Raises `UserError` when the ids of one are not the rows of the other."""
    ids, rows = tokenizer.vocab_size, model.vocab_size
    if ids > rows or rows - ids > SPARE:
        raise UserError(
            f"{tokenizer.path} has {ids} tokens, but the model's vocabulary has {rows} rows: this is not the model's tokenizer; "
            "give the right one (--tokenizer-name-or-path)"
        )


def run(job: EvaluationJob, device: devices.Device, notes: Sequence[str]) -> None:
    """Loads, asks, grades, reports. Raises `UserError`."""
    from ascendspeed.inference.session import Session

    session = Session.open(job.spec, device)
    tokenizer, grid = session.tokenizer, session.grid
    check_vocabulary(tokenizer, session.config)
    for note in notes:
        logger.info(f"note: {note}")
    room = job.evaluation.max_input_length or session.config.max_position_embeddings
    written = [one.name for one, style in job.benchmarks if style.until]
    if written and room <= job.new_tokens:
        raise UserError(
            f"--max-new-tokens {job.new_tokens} of {written[0]} leaves nothing of {room} tokens for the question"
        )
    model = session.model
    sha256 = weights_identity.full_bytes(session.source, session.readers)
    settings = _settings(job, sha256, tokenizer, room)
    folder = Path(job.evaluation.output_dir)
    answers = open_together(folder, settings, grid)
    try:
        _ask(job, Model(model, tokenizer, job.evaluation.batch_size), answers, tokenizer, room, device)
    finally:
        answers.close()


def _settings(job: EvaluationJob, sha256: str, tokenizer: Tokenizer, room: int) -> dict[str, Any]:
    """What answers depend on, beside the questions. The layout and the batch size are not among it."""
    return {
        "model_sha256": sha256,
        "tokenizer_sha256": fingerprint.of_tokenizer(Path(tokenizer.path)),
        "dtype": job.spec.args.dtype,
        "prompt_style": job.evaluation.prompt_style,
        "num_fewshot": job.evaluation.num_fewshot,
        "max_input_length": room,
        "max_new_tokens": job.new_tokens,
        "lm_eval": version("lm_eval"),
    }


def _ask(
    job: EvaluationJob,
    backend: Model,
    answers: Answers,
    tokenizer: Tokenizer,
    room: int,
    device: Any,
) -> None:
    from ascendspeed.evaluation import lm_eval, metrics, report  # lm-eval: after the device was prepared

    began, encoder = time.time(), Encoder(tokenizer)
    prompts = [p for one, style in job.benchmarks for p in prepare(one, style, encoder, room, job.new_tokens)]
    keys = lm_eval.keys_of(prompts, answers.settings)
    before = sum(key in answers.known for key in keys)
    limited = f", the first {job.evaluation.limit} of each subject only" if job.evaluation.limit else ""
    logger.info(
        f"{len(prompts)} questions{limited}; {before} were answered before (in {job.evaluation.output_dir}/{NAME})"
    )
    grid = backend.model.grid
    with progress(of_items("questions"), len(prompts), before, quiet=grid.rank != 0) as advance:
        adapter = lm_eval.Adapter(backend, encoder, room, answers, advance)
        grades = lm_eval.ask(adapter, prompts, job.new_tokens)
    if grid.rank != 0:
        return
    answers.close()
    results = [
        metrics.of(one, [g for g in grades if g.prompt.task == one.name], job.shots[one.name])
        for one, _ in job.benchmarks
    ]
    for result in results:
        shots = job.shots[result.benchmark.name]
        logger.info(report.text(result, f"{job.evaluation.prompt_style} prompts, {shots} examples{limited}"))
    about = {
        "model": {
            "path": str(job.spec.args.load),
            "sha256": answers.settings["model_sha256"],
            "family": backend.model.config.family,
        },
        "settings": answers.settings,
        "limit": job.evaluation.limit,
        "batch_size": job.evaluation.batch_size,
        "layout": str(grid),
        "device": f"{device.kind} ({device.name})",
        "versions": _versions(),
        "seconds": round(time.time() - began, 1),
        "shots": job.shots,
    }
    folder = Path(job.evaluation.output_dir)
    report.write(folder, results, about, grades, answers.known)
    logger.info(f"wrote {folder}/results.json, results.csv, chart.png and {NAME}")


def _versions() -> dict[str, str]:
    return {
        "ascendspeed": version("ascendspeed"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        **{name: version(name) for name in ("megatron-core", "lm_eval")},
    }
