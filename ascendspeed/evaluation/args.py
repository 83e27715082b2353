"""The command line of evaluation -> a checked `Job` with its questions. No torch: a wrong flag or file is an error at once."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import FlagCreatePairsOff

from ascendspeed.cli import parser
from ascendspeed.cli.train_args import DEFAULT_MODEL, RecipeFlags
from ascendspeed.config.schema import ModelConfig, alias
from ascendspeed.evaluation.loaders import load
from ascendspeed.evaluation.prompt_styles import SHOTS, Style, style
from ascendspeed.evaluation.questions import Benchmark
from ascendspeed.inference.args import Place, Where, find_place, notes
from ascendspeed.models import families
from ascendspeed.utils.errors import UserError

SHORTEST_ANSWER = 16
"""Tokens: the published command's --max-new-tokens 2 is enough for a letter, but for no worked answer."""
INERT = {
    "seed": "nothing is drawn",
    "no_load_rng": "only weights are loaded",
    "no_load_optim": "only weights are loaded",
    "exit_on_missing_checkpoint": "a missing checkpoint is always an error",
    "no_masked_softmax_fusion": "attention is torch's SDPA",
    "make_vocab_size_divisible_by": "padded rows take no part",
}


@dataclass(frozen=True)
class Evaluation:
    """What to ask, and how."""

    task: tuple[str, ...] = ()
    """Benchmarks: mmlu, ceval, cmmlu, boolq, gsm8k, hellaswag; several in one word too: --task "mmlu ceval"."""
    task_data_path: tuple[str, ...] = ()
    """The folder of each of them, in the same order."""
    prompt_style: Literal["lm-eval", "opencompass", "hendrycks"] = "lm-eval"
    """Whose prompts, byte for byte; figures are comparable only in the same style."""
    num_fewshot: int | None = None
    """Examples before each question, the first ones of dev; None: 5 for mmlu, ceval, cmmlu and gsm8k, 0 for boolq and hellaswag."""
    max_input_length: int | None = None
    """Tokens of a prompt and its answer at most: examples that do not fit are dropped; None: the positions of the model."""
    max_new_tokens: int | None = None
    """Tokens of an answer that is written (gsm8k) at most; None: 256. Choices are compared, not written."""
    batch_size: Annotated[int, alias("micro-batch-size", "evaluation-batch-size")] = 16
    """Rows that go through the model side by side; changes no result."""
    limit: int | None = None
    """Only the first so many questions of each subject: to try, not to report."""
    output_dir: str = "evaluation"
    """Folder for results.json, results.csv, questions.jsonl and chart.png; an evaluation that was stopped goes on there."""
    seed: int | None = None
    """Accepted; nothing is drawn."""
    no_load_rng: bool = False
    """Accepted; only weights are loaded."""
    no_load_optim: bool = False
    """Accepted; only weights are loaded."""
    exit_on_missing_checkpoint: bool = False
    """Accepted; a missing checkpoint is always an error."""
    no_masked_softmax_fusion: bool = False
    """Accepted; attention is torch's SDPA."""
    make_vocab_size_divisible_by: int | None = None
    """Accepted; padded rows of the vocabulary take no part."""


@dataclass(frozen=True)
class Command:
    """Evaluates a language model on benchmarks that lie on disk."""

    recipe: FlagCreatePairsOff[RecipeFlags] = field(default_factory=RecipeFlags)
    model: ModelConfig = field(default_factory=lambda: families.preset(DEFAULT_MODEL))
    where: FlagCreatePairsOff[Where] = field(default_factory=Where)
    evaluation: FlagCreatePairsOff[Evaluation] = field(default_factory=Evaluation)


@dataclass(frozen=True)
class Job:
    """A checked command."""

    place: Place
    evaluation: Evaluation
    benchmarks: tuple[tuple[Benchmark, Style], ...]
    shots: dict[str, int]
    """Examples that each task was asked to have."""
    new_tokens: int


def resolve(args: Sequence[str], world: int) -> tuple[Job, list[str]]:
    """What `args` ask for with `world` processes, and what the user should be told. Raises `UserError`."""
    command = parser.parse(Command, args, description=Command.__doc__ or "")
    asked, typed = command.evaluation, parser.typed(Command, args)
    least = {"num_fewshot": 0, "max_input_length": 1, "max_new_tokens": 1, "batch_size": 1, "limit": 1}
    for name, smallest in least.items():
        value = getattr(asked, name)
        if value is not None and value < smallest:
            raise UserError(f"--{name.replace('_', '-')} {value} is too small: at least {smallest}")
    pairs = _pairs(asked)
    new_tokens = 256 if asked.max_new_tokens is None else asked.max_new_tokens
    if "gsm8k" in dict(pairs) and new_tokens < SHORTEST_ANSWER:
        raise UserError(
            f"--max-new-tokens {new_tokens}: gsm8k's answers are worked out in some 100 tokens; leave it out"
        )
    place = find_place(command, typed, args, world)
    shots = {
        task: SHOTS.get(task, 0) if asked.num_fewshot is None else asked.num_fewshot for task, _ in pairs
    }
    found = [load(task, folder, shots[task], asked.limit) for task, folder in pairs]
    benchmarks = tuple((one, style(asked.prompt_style, one.name, shots[one.name])) for one in found)
    said = [
        f"--{name.replace('_', '-')} is accepted and does nothing: {why}"
        for name, why in INERT.items()
        if name in typed
    ]
    return Job(place, asked, benchmarks, shots, new_tokens), [*notes(typed), *said]


def _pairs(asked: Evaluation) -> list[tuple[str, Path]]:
    tasks = [word.lower() for words in asked.task for word in words.split()]
    if not tasks:
        raise UserError("--task is needed: one or more of mmlu, ceval, cmmlu, boolq, gsm8k, hellaswag")
    double = [task for task in tasks if tasks.count(task) > 1]
    if double:
        raise UserError(f"--task names {double[0]} twice")
    if len(tasks) != len(asked.task_data_path):
        raise UserError(
            f"--task names {len(tasks)} ({' '.join(tasks)}) and --task-data-path {len(asked.task_data_path)}: "
            "give one folder for each task, in their order"
        )
    return list(zip(tasks, map(Path, asked.task_data_path), strict=True))
