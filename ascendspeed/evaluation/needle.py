"""Asks a model for needles in haystacks; a table, a chart of lengths and depths, and every answer."""

import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tyro.conf import FlagCreatePairsOff

from ascendspeed.cli import command
from ascendspeed.cli.compat import INFERENCE
from ascendspeed.cli.train_args import DEFAULT_MODEL, Preset
from ascendspeed.config.schema import ModelConfig
from ascendspeed.conversion import weights_identity
from ascendspeed.evaluation import haystack as texts
from ascendspeed.evaluation.haystack import Cell
from ascendspeed.inference.args import EngineArgs, EngineSpec, resolve_engine
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
    needle: str = texts.NEEDLE
    """Sentence to hide; {number} stands for seven random digits."""
    question: str = texts.QUESTION
    """Question after the text."""
    answer: str | None = None
    """Text that a right answer contains; None: the number."""
    chat: bool = False
    """Use the chat template of the model."""
    chat_template: str | None = None
    """Chat template with --chat: v1, v1-eoh, v2, v2.5 or v3; None: that of the model's family and its tokenizer."""
    max_new_tokens: int = 32
    """Most tokens of an answer."""
    seed: int = 42
    """Random seed of the numbers."""
    output_dir: str = "needle"
    """Folder for results.json, chart.png and questions.jsonl; an interrupted run continues from there."""


@dataclass(frozen=True)
class NeedleCommand:
    """Needle-in-a-haystack test: retrieval of a sentence from long texts."""

    engine: FlagCreatePairsOff[EngineArgs] = field(default_factory=EngineArgs)
    needle: FlagCreatePairsOff[NeedleArgs] = field(default_factory=NeedleArgs)
    preset: FlagCreatePairsOff[Preset] = field(default_factory=Preset)
    model: ModelConfig = field(default_factory=lambda: families.preset(DEFAULT_MODEL))


@dataclass(frozen=True)
class NeedleJob:
    """A checked command line of the needle test."""

    spec: EngineSpec
    needle: NeedleArgs
    cells: tuple[Cell, ...]
    hay: tuple[str, ...]


def resolve(args: Sequence[str], world: int) -> tuple[NeedleJob, list[str]]:
    """Returns the job that `args` describe for `world` processes, and notes for the user. Raises UserError."""
    line = command.parse(NeedleCommand, args, INFERENCE, NeedleCommand.__doc__ or "")
    needle = line.options.needle
    command.check_minimum(needle, {"trials": 1, "max_new_tokens": 1})
    if needle.answer is None and "{number}" not in needle.needle:
        raise UserError("--needle has no {number} in it: say with --answer what is to be found")
    if needle.chat_template and not needle.chat:
        raise UserError(f"--chat-template {needle.chat_template} is of use only with --chat; add it")
    cells = texts.cells(needle.lengths, needle.depths, needle.trials)
    hay = texts.sentences(needle.haystack)
    return NeedleJob(resolve_engine(line, world), needle, tuple(cells), tuple(hay)), line.notes


def run(job: NeedleJob, device: Any, said: Sequence[str]) -> None:
    """Asks for every needle that was not asked for before, and reports. Raises `UserError`."""
    from ascendspeed.evaluation import fingerprint
    from ascendspeed.evaluation.answer_cache import open_together
    from ascendspeed.inference.session import Session

    asked = job.needle
    session = Session.open(job.spec, device, asked.chat_template)
    prompts = {cell: _prompt(job, session, cell) for cell in job.cells}
    session.warn_if_too_long("a prompt", max(map(len, prompts.values())) + asked.max_new_tokens)
    settings = {
        name: getattr(asked, name)
        for name in (
            "haystack",
            "needle",
            "question",
            "answer",
            "chat",
            "chat_template",
            "max_new_tokens",
            "seed",
        )
    }
    speaks, where = session.grid.rank == 0, job.spec.args
    settings = json.loads(json.dumps(settings)) | {
        "dtype": where.dtype,
        "haystack_sha256": hashlib.sha256("\n".join(job.hay).encode()).hexdigest(),
        "tokenizer_sha256": fingerprint.of_tokenizer(Path(session.tokenizer.path)),
        "model_sha256": weights_identity.full_bytes(session.source, session.readers),
    }
    answers = open_together(Path(asked.output_dir), settings, session.grid)
    for note in said:
        logger.info(f"note: {note}")
    left = [cell for cell in job.cells if cell.key not in answers.known]
    with progress(
        of_items("questions"), len(job.cells), len(job.cells) - len(left), quiet=not speaks
    ) as advance:
        for cell in left:
            answers.put(
                {"key": cell.key, "tokens": len(prompts[cell])} | _ask(job, session, cell, prompts[cell])
            )
            answers.flush()
            advance(1)
    answers.close()
    if speaks:
        _report(job, answers.known, settings)


def _hidden(job: NeedleJob, cell: Cell) -> tuple[str, str]:
    """The needle of a cell, and what an answer must hold."""
    number = texts.number(job.needle.seed, cell)
    return job.needle.needle.replace("{number}", number), job.needle.answer or number


def _prompt(job: NeedleJob, session: Any, cell: Cell) -> list[int]:
    """At most as many tokens as the cell says."""
    from ascendspeed.tokenization.chat import Message

    sizes = [
        max(1, len(ids)) for ids in session.tokenizer.encode_batch([f" {sentence}" for sentence in job.hay])
    ]

    def encoded(room: int) -> list[int]:
        text = texts.text(cell, _hidden(job, cell)[0], job.hay, sizes, room)
        if job.needle.chat:
            return session.chat_format.prompt_ids([Message("user", f"{text}\n\n{job.needle.question}")])
        bos = [session.tokenizer.bos] if session.adds_bos and session.tokenizer.bos is not None else []
        return bos + session.tokenizer.encode(f"{text}\n\nQuestion: {job.needle.question}\nAnswer:").tolist()

    room = cell.length - len(encoded(0))
    if room < sum(sizes):
        raise UserError(
            f"--lengths {cell.length}: at least {cell.length - room + sum(sizes)} tokens are needed for text and question"
        )
    while (
        len(ids := encoded(room)) > cell.length
    ):  # sentences are a little longer together than apart, in some vocabularies
        room -= len(ids) - cell.length
    return ids


def _ask(job: NeedleJob, session: Any, cell: Cell, prompt: list[int]) -> dict[str, Any]:
    from ascendspeed.inference.engine import SamplingParams, sample

    stops = session.stop_ids(job.needle.chat)
    tokens = session.usable_vocab_size
    ((answer,),) = sample(
        session.model,
        [prompt],
        SamplingParams(max_new_tokens=job.needle.max_new_tokens, stop_ids=stops, vocab_size=tokens),
    )
    text, wanted = session.tokenizer.decode(answer.tokens), _hidden(job, cell)[1]
    return {"answer": text, "wanted": wanted, "found": texts.found(text, wanted)}


def _report(job: NeedleJob, known: dict[str, dict[str, Any]], settings: dict[str, Any]) -> None:
    from ascendspeed.utils.atomic import write_file

    lengths, depths = sorted(job.needle.lengths), sorted(job.needle.depths)
    shares = [[_share(job, known, length, depth) for length in lengths] for depth in depths]
    print("found, in % | " + " | ".join(f"{length:,} tokens" for length in lengths))
    for depth, row in zip(depths, shares, strict=True):
        print(f"depth {depth:g} % | " + " | ".join(f"{100 * share:.0f}" for share in row))
    folder = Path(job.needle.output_dir)
    about = {
        "settings": settings,
        "lengths": lengths,
        "depths": depths,
        "trials": job.needle.trials,
        "found": shares,
    }
    write_file(folder / "results.json", json.dumps(about, indent=2, ensure_ascii=False) + "\n")
    write_file(folder / "chart.png", _chart(lengths, depths, shares))
    print(f"wrote {folder}/results.json, chart.png and questions.jsonl")


def _share(job: NeedleJob, known: dict[str, dict[str, Any]], length: int, depth: float) -> float:
    tries = [known[Cell(length, depth, trial).key]["found"] for trial in range(job.needle.trials)]
    return sum(tries) / len(tries)


def _chart(lengths: Sequence[int], depths: Sequence[float], shares: Sequence[Sequence[float]]) -> bytes:
    import io

    from matplotlib.figure import Figure

    figure = Figure(figsize=(1.5 + 0.9 * len(lengths), 1.5 + 0.5 * len(depths)), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(shares, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
    axes.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths], rotation=45)
    axes.set_yticks(range(len(depths)), [f"{depth:g} %" for depth in depths])
    axes.set(xlabel="tokens", ylabel="depth of the needle")
    figure.colorbar(image, label="found")
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=120)
    return out.getvalue()
