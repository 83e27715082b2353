"""Needle-in-a-haystack test: prompts, answers, and the share found by length and depth."""

import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import FlagCreatePairsOff

from ascendspeed.cli import command, parser
from ascendspeed.cli.compat import INFERENCE
from ascendspeed.cli.train_args import DEFAULT_MODEL, Preset
from ascendspeed.config.schema import ModelConfig
from ascendspeed.evaluation import haystack
from ascendspeed.evaluation.haystack import NEEDLE, QUESTION, Cell
from ascendspeed.inference.args import EngineArgs, EngineSpec, resolve_engine
from ascendspeed.inference.input_checks import check_chat_template
from ascendspeed.models import families
from ascendspeed.utils.errors import UserError
from ascendspeed.utils.progress import of_items, progress

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class NeedleArgs:
    """Haystacks, needle and question."""

    lengths: tuple[int, ...] = (4096, 8192, 16384, 32768)
    """Lengths of the prompts in tokens."""
    depths: tuple[float, ...] = (0, 25, 50, 75, 100)
    """Positions of the needle, in percent of the text before it."""
    trials: int = 1
    """Prompts for each length and depth, with different numbers."""
    haystack: tuple[str, ...] = ()
    """Text files of the haystack; None: five short sentences, repeated."""
    needle: str = NEEDLE
    """Sentence to hide; {number} stands for seven random digits."""
    question: str = QUESTION
    """Question after the text."""
    answer: str | None = None
    """Text that a right answer contains; None: the number."""
    chat: bool = False
    """Use the chat template of the model."""
    chat_template: str | None = None
    """Chat template with --chat: v1, v1-eoh, v2, v2.5 or v3; None: that of the model's family and its
    tokenizer.
    """
    max_new_tokens: int = 32
    """Largest number of tokens of an answer."""
    seed: int = 42
    """Random seed of the numbers."""
    output_dir: Annotated[str, parser.output_flag("output-dir")] = "needle"
    """Folder for results.json, chart.png and questions.jsonl; an interrupted run continues from there."""


@dataclass(frozen=True)
class NeedleCommand:
    """Needle-in-a-haystack test: retrieval of a sentence from long texts.

    python tasks/evaluation/needle.py --load DIR --bf16 --chat --lengths 32768 65536
    """

    needle: FlagCreatePairsOff[NeedleArgs] = field(default_factory=NeedleArgs)
    engine: FlagCreatePairsOff[EngineArgs] = field(default_factory=EngineArgs)
    preset: FlagCreatePairsOff[Preset] = field(default_factory=Preset)
    model: ModelConfig = field(default_factory=lambda: families.preset(DEFAULT_MODEL))


@dataclass(frozen=True)
class NeedleJob:
    """A checked command line of the needle test."""

    spec: EngineSpec
    needle: NeedleArgs
    cells: tuple[Cell, ...]
    sentences: tuple[str, ...]
    """Sentences of the haystack."""


def resolve(args: Sequence[str], world: int) -> tuple[NeedleJob, list[str]]:
    """Returns the job that `args` describe for `world` processes, and notes for the user.

    Raises UserError.
    """
    line = command.parse(NeedleCommand, args, INFERENCE, NeedleCommand.__doc__ or "")
    needle = line.options.needle
    command.check_minimum(needle, {"trials": 1, "max_new_tokens": 1})
    if needle.answer is None and "{number}" not in needle.needle:
        raise UserError("--needle has no {number} in it: give the expected text with --answer")
    if needle.chat_template and not needle.chat:
        raise UserError(f"--chat-template {needle.chat_template} has no effect without --chat; add it")
    check_chat_template(needle.chat_template)
    cells = haystack.make_cells(needle.lengths, needle.depths, needle.trials)
    sentences = haystack.read_sentences(needle.haystack)
    return NeedleJob(resolve_engine(line, world), needle, tuple(cells), tuple(sentences)), line.notes


SETTINGS = ("haystack", "needle", "question", "answer", "chat", "chat_template", "max_new_tokens", "seed")
"""Fields of `NeedleArgs` that answers depend on."""


def run(job: NeedleJob, device: Any, notes: Sequence[str]) -> None:
    """Answers every prompt without an answer in the output folder, and reports. Raises UserError."""
    from ascendspeed.evaluation.answer_cache import open_on_all_ranks
    from ascendspeed.inference.session import Session

    needle = job.needle
    session = Session.open(job.spec, device, needle.chat_template)
    prompts = {cell: _prompt(job, session, cell) for cell in job.cells}
    session.warn_if_too_long("a prompt", max(map(len, prompts.values())) + needle.max_new_tokens)
    settings = _settings(job, session)
    answers = open_on_all_ranks(Path(needle.output_dir), settings, session.grid)
    for note in notes:
        logger.info(f"note: {note}")
    answers.discard(lambda record: type(record.get("found")) is not bool)
    missing = [cell for cell in job.cells if cell.key not in answers.records]
    done = len(job.cells) - len(missing)
    with progress(of_items("questions"), len(job.cells), done, quiet=session.grid.rank != 0) as advance:
        for cell in missing:
            prompt = prompts[cell]
            answers.put({"key": cell.key, "tokens": len(prompt)} | _answer(job, session, cell, prompt))
            answers.flush()
            advance(1)
    if session.grid.rank == 0:
        _report(job, answers.records, settings)
    answers.close()


def _settings(job: NeedleJob, session: Any) -> dict[str, Any]:
    """Returns everything that answers depend on, beside the cell. Collective."""
    from ascendspeed.conversion import weights_identity
    from ascendspeed.evaluation import fingerprint

    settings = {name: getattr(job.needle, name) for name in SETTINGS}
    return json.loads(json.dumps(settings)) | {
        "dtype": job.spec.args.precision,
        "haystack_sha256": hashlib.sha256("\n".join(job.sentences).encode()).hexdigest(),
        "tokenizer_sha256": fingerprint.hash_tokenizer(Path(session.tokenizer.path)),
        "model_sha256": weights_identity.full_bytes(session.source, session.readers),
    }


def _needle_and_answer(job: NeedleJob, cell: Cell) -> tuple[str, str]:
    """Returns the needle of a cell and the text that a right answer contains."""
    number = haystack.magic_number(job.needle.seed, cell)
    return job.needle.needle.replace("{number}", number), job.needle.answer or number


def _prompt(job: NeedleJob, session: Any, cell: Cell) -> list[int]:
    """Returns the longest prompt with at most `cell.length` tokens.

    Raises UserError if it would have no text.
    """
    from ascendspeed.tokenization.chat import Message

    tokenizer = session.tokenizer
    encoded_sentences = tokenizer.encode_batch([f" {sentence}" for sentence in job.sentences])
    sizes = [max(1, len(ids)) for ids in encoded_sentences]
    needle, _ = _needle_and_answer(job, cell)

    def encode(max_text_tokens: int) -> list[int]:
        text = haystack.build_text(cell, needle, job.sentences, sizes, max_text_tokens)
        if job.needle.chat:
            return session.chat_format.prompt_ids([Message("user", f"{text}\n\n{job.needle.question}")])
        bos = [tokenizer.bos] if session.adds_bos and tokenizer.bos is not None else []
        return bos + tokenizer.encode(f"{text}\n\nQuestion: {job.needle.question}\nAnswer:").tolist()

    max_text_tokens = cell.length - len(encode(0))
    if max_text_tokens < sum(sizes):
        least = cell.length - max_text_tokens + sum(sizes)
        raise UserError(f"--lengths {cell.length}: at least {least} tokens are needed for text and question")
    # In some vocabularies, joined sentences have slightly more tokens than the sentences alone.
    while len(ids := encode(max_text_tokens)) > cell.length:
        max_text_tokens -= len(ids) - cell.length
    return ids


def _answer(job: NeedleJob, session: Any, cell: Cell, prompt: list[int]) -> dict[str, Any]:
    """Returns the record of an answer: `answer`, `wanted` and `found` are keys of questions.jsonl."""
    from ascendspeed.inference.engine import SamplingParams, sample

    params = SamplingParams(
        max_new_tokens=job.needle.max_new_tokens,
        stop_ids=session.stop_ids(job.needle.chat),
        vocab_size=session.usable_vocab_size,
    )
    ((completion,),) = sample(session.model, [prompt], params)
    text = session.tokenizer.decode(completion.tokens)
    _, expected = _needle_and_answer(job, cell)
    return {"answer": text, "wanted": expected, "found": haystack.contains_answer(text, expected)}


def _report(job: NeedleJob, records: dict[str, dict[str, Any]], settings: dict[str, Any]) -> None:
    """Prints the table and writes results.json and chart.png."""
    from ascendspeed.evaluation.chart import draw_needle_chart
    from ascendspeed.utils.atomic import write_file

    lengths, depths = sorted(job.needle.lengths), sorted(job.needle.depths)
    shares = [[_share_found(job, records, length, depth) for length in lengths] for depth in depths]
    print("found, in % | " + " | ".join(f"{length:,} tokens" for length in lengths))
    for depth, row in zip(depths, shares, strict=True):
        print(f"depth {depth:g} % | " + " | ".join(f"{100 * share:.0f}" for share in row))
    folder = Path(job.needle.output_dir)
    results = {
        "settings": settings,
        "lengths": lengths,
        "depths": depths,
        "trials": job.needle.trials,
        "found": shares,
    }
    write_file(folder / "results.json", json.dumps(results, indent=2, ensure_ascii=False) + "\n")
    trials = f"{job.needle.trials} trials each" if job.needle.trials > 1 else "one trial each"
    title = f"Needle in a haystack: {job.spec.args.load}, {job.spec.args.precision}, {trials}"
    write_file(folder / "chart.png", draw_needle_chart(lengths, depths, shares, title))
    print(f"wrote {folder}/results.json, chart.png and questions.jsonl")


def _share_found(job: NeedleJob, records: dict[str, dict[str, Any]], length: int, depth: float) -> float:
    trials = range(job.needle.trials)
    return sum(records[Cell(length, depth, trial).key]["found"] for trial in trials) / len(trials)
