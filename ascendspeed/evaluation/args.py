"""Command line of evaluation: flags -> a checked `EvaluationJob` with its questions. No torch."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import FlagCreatePairsOff, arg

from ascendspeed.cli import command, parser
from ascendspeed.cli.compat import EVALUATE
from ascendspeed.cli.parser import flag_of
from ascendspeed.cli.train_args import DEFAULT_MODEL, Preset
from ascendspeed.config.schema import ModelConfig
from ascendspeed.evaluation.harness_index import CODE_TASKS, GROUPS, PREFIX, definition_folders, harness_name
from ascendspeed.evaluation.prompt_styles import PromptStyle
from ascendspeed.evaluation.questions import Benchmark
from ascendspeed.evaluation.tasks import TASKS, find_style, find_task, load_benchmark
from ascendspeed.inference.args import EngineArgs, EngineSpec, resolve_engine
from ascendspeed.inference.graph_checks import check_graph_flags
from ascendspeed.models import families
from ascendspeed.utils.errors import UserError

ANSWER_TOKENS = 256
"""Default of --max-new-tokens."""
TASK_HELP = (
    f"Benchmarks: {', '.join(TASKS)}; {', '.join((*GROUPS, *CODE_TASKS))}; {PREFIX}NAME for any task or "
    'group of lm-evaluation-harness. Several may be given in one word: --task "mmlu ceval".'
)


@dataclass(frozen=True)
class EvaluationArgs:
    """Benchmarks, prompts and results."""

    task: Annotated[tuple[str, ...], arg(help=TASK_HELP)] = ()
    task_data_path: tuple[str, ...] = ()
    """Folder of each benchmark, in the order of --task."""
    prompt_style: Literal["lm-eval", "opencompass", "hendrycks"] = "lm-eval"
    """Program whose prompts are reproduced byte for byte; scores are comparable only within one style."""
    num_fewshot: int | None = None
    """Examples before each question, the first ones of dev; None: 5 for mmlu, ceval, cmmlu and gsm8k, 0 for
    boolq and hellaswag."""
    max_input_length: int | None = None
    """Largest number of tokens of a prompt and its answer: examples that do not fit are dropped; None:
    that of the model."""
    max_new_tokens: int | None = None
    """Largest number of tokens of a generated answer (gsm8k); None: 256. Multiple-choice answers are
    compared, not generated."""
    batch_size: int = 16
    """Prompts per batch; another size rounds log-likelihoods differently, by up to 3e-3 in bf16."""
    cuda_graphs: bool = False
    """Generate answers with CUDA graphs: see the same flag of the service. Not run on a GPU yet."""
    limit: int | None = None
    """Evaluate only this many questions of each subject, for a trial."""
    allow_code_execution: bool = False
    """Execute the answers to humaneval and mbpp, in processes without network and with limits."""
    apply_chat_template: bool = False
    """Put the prompts of lm-eval:NAME into the model's chat template."""
    chat_template: str | None = None
    """Chat template of --apply-chat-template; None: that of the tokenizer."""
    system: str | None = None
    """System message of --apply-chat-template."""
    fewshot_as_multiturn: bool = False
    """Make every example a turn of its own, with --apply-chat-template."""
    output_dir: Annotated[str, parser.output_flag("output-dir")] = "evaluation"
    """Folder for results.json, results.csv, questions.jsonl and chart.png; an interrupted evaluation
    continues from there."""


@dataclass(frozen=True)
class EvaluateCommand:
    """Evaluates a language model on benchmark files on disk.

    python tasks/evaluation/evaluation.py --load DIR --bf16 --task mmlu --task-data-path data/mmlu
    """

    evaluation: FlagCreatePairsOff[EvaluationArgs] = field(default_factory=EvaluationArgs)
    engine: FlagCreatePairsOff[EngineArgs] = field(default_factory=EngineArgs)
    preset: FlagCreatePairsOff[Preset] = field(default_factory=Preset)
    model: ModelConfig = field(default_factory=lambda: families.preset(DEFAULT_MODEL))


@dataclass(frozen=True)
class HarnessSelection:
    """A task, group or tag of lm-evaluation-harness, and the folder of its dataset."""

    name: str
    folder: Path

    @property
    def title(self) -> str:
        """Name in the reports."""
        return self.name if self.name in CODE_TASKS else PREFIX + self.name


@dataclass(frozen=True)
class EvaluationJob:
    """A checked command line of evaluation."""

    spec: EngineSpec
    evaluation: EvaluationArgs
    benchmarks: tuple[tuple[Benchmark, PromptStyle], ...]
    shots: dict[str, int]
    """Examples before each question, by task."""
    new_tokens: int
    """Largest number of tokens of a generated answer."""
    harness: tuple[HarnessSelection, ...] = ()
    """Tasks of lm-evaluation-harness."""


def resolve(args: Sequence[str], world: int) -> tuple[EvaluationJob, list[str]]:
    """Returns the job of `args` for `world` processes, and notes for the user. Raises UserError."""
    line = command.parse(EvaluateCommand, args, EVALUATE, EvaluateCommand.__doc__ or "")
    evaluation = line.options.evaluation
    command.check_minimum(
        evaluation,
        {"num_fewshot": 0, "max_input_length": 1, "max_new_tokens": 1, "batch_size": 1, "limit": 1},
    )
    return build_job(evaluation, lambda: resolve_engine(line, world)), line.notes


def build_job(evaluation: EvaluationArgs, engine: Callable[[], EngineSpec]) -> EvaluationJob:
    """Checks the benchmarks, then the `engine`, and reads the questions. Raises UserError."""
    folders = _task_folders(evaluation)
    harness = _harness_selections(evaluation, folders)
    _check_chat(evaluation, folders)
    new_tokens = ANSWER_TOKENS if evaluation.max_new_tokens is None else evaluation.max_new_tokens
    shots = {}
    for name in folders:
        if harness_name(name):
            continue
        task = find_task(name)
        shots[name] = task.num_shots if evaluation.num_fewshot is None else evaluation.num_fewshot
        if new_tokens < task.min_new_tokens:
            raise UserError(
                f"--max-new-tokens {new_tokens} is too few for {name}, whose answers have some 100 tokens; "
                "leave it out"
            )
    spec = engine()
    benchmarks = []
    for name, folder in folders.items():
        if harness_name(name):
            continue
        benchmark = load_benchmark(name, folder, shots[name], evaluation.limit)
        benchmarks.append((benchmark, find_style(evaluation.prompt_style, name, shots[name])))
    if evaluation.cuda_graphs:
        check_graph_flags(spec)
        if not harness and not any(style.until for _, style in benchmarks):
            raise UserError(
                f"{flag_of('cuda_graphs')} is for answers that are generated, but those of --task "
                f"{' '.join(folders)} are compared: leave it out"
            )
    return EvaluationJob(spec, evaluation, tuple(benchmarks), shots, new_tokens, harness)


def _harness_selections(evaluation: EvaluationArgs, folders: dict[str, Path]) -> tuple[HarnessSelection, ...]:
    """Returns the tasks of lm-evaluation-harness. Raises UserError for an unknown one or a missing folder."""
    selections = []
    for task, folder in folders.items():
        if name := harness_name(task):
            if name in CODE_TASKS and not evaluation.allow_code_execution:
                raise UserError(
                    f"--task {name} executes the answers of the model; add --allow-code-execution to allow it"
                )
            if name not in CODE_TASKS:
                definition_folders(name)
            if not folder.is_dir():
                raise UserError(f"--task-data-path {folder} of {task} is not a directory")
            selections.append(HarnessSelection(name, folder))
    return tuple(selections)


def _check_chat(evaluation: EvaluationArgs, folders: dict[str, Path]) -> None:
    """Raises UserError for flags of the chat template that have no effect."""
    own = [task for task in folders if not harness_name(task)]
    if evaluation.apply_chat_template and own:
        raise UserError(
            f"--apply-chat-template: the prompts of {own[0]} are those of --prompt-style, without a chat "
            f"template; use --task {PREFIX}NAME, for example {PREFIX}{own[0]}"
        )
    for field_name in ("chat_template", "system", "fewshot_as_multiturn"):
        if getattr(evaluation, field_name) and not evaluation.apply_chat_template:
            raise UserError(f"{flag_of(field_name)} belongs to --apply-chat-template; add it")


def _task_folders(evaluation: EvaluationArgs) -> dict[str, Path]:
    """Returns the folder of each task. Raises UserError unless every task has one and is named once."""
    words = [word for words in evaluation.task for word in words.split()]
    tasks = [word if word.startswith(PREFIX) else word.lower() for word in words]
    if not tasks:
        raise UserError(f"--task is required: one or more of {', '.join(TASKS)}")
    repeated = [task for task in tasks if tasks.count(task) > 1]
    if repeated:
        raise UserError(f"--task names {repeated[0]} twice")
    if len(tasks) != len(evaluation.task_data_path):
        raise UserError(
            f"--task names {len(tasks)} ({' '.join(tasks)}) and "
            f"--task-data-path {len(evaluation.task_data_path)}: "
            "give one folder for each task, in their order"
        )
    return dict(zip(tasks, map(Path, evaluation.task_data_path), strict=True))
