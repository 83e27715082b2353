"""The command line of generation -> a checked `Job`. No torch: a wrong flag is an error at once."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import FlagCreatePairsOff, UseAppendAction

from ascendspeed.cli import parser
from ascendspeed.cli.train_args import DEFAULT_MODEL, SAYS, RecipeFlags, find_model, model_of
from ascendspeed.config import schema
from ascendspeed.config.schema import BackendChoice, DeviceChoice, ModelConfig, ParallelConfig, alias
from ascendspeed.models import families
from ascendspeed.utils.errors import UserError

TASKS = {"greedy": "1", "sample": "2", "beam": "3", "beam-sample": "4", "logprobs": "5", "chat": "6"}
"""Name -> its number in the published script."""
COMMON = {"max_new_tokens", "repetition_penalty", "stop"}
DRAWN = {"temperature", "top_k", "top_p"}
BEAMS = {"num_beams", "length_penalty"}
USES = {
    "greedy": COMMON,
    "sample": COMMON | DRAWN | {"num_return_sequences"},
    "beam": COMMON | BEAMS | {"num_return_sequences"},
    "beam-sample": COMMON | DRAWN | BEAMS | {"num_return_sequences"},
    "logprobs": set(),
    "chat": COMMON | DRAWN | {"chat_template", "system", "history_turns"},
}
"""Task -> the flags that mean something for it. Any may have a seed: the published script gives one, drawing or not."""
SPARE = 1024
"""Rows that a vocabulary may have beyond its tokenizer's ids: padding, and room for tokens to be added."""


@dataclass(frozen=True)
class Where:
    """The weights, and where they run."""

    load: Annotated[str | None, alias("checkpoint")] = None
    """Hugging Face directory, converted weights, or a training checkpoint (of a folder of them, the newest)."""
    tokenizer_name_or_path: str | None = None
    """Directory with tokenizer.model or tokenizer.json; None: that of --load."""
    bf16: bool = False
    """Weights, activations and the cache in bfloat16; without this and --fp16: fp32."""
    fp16: bool = False
    """The same in float16."""
    tensor_model_parallel_size: Annotated[int, alias("tp")] = 1
    """Ranks that share every layer."""
    pipeline_model_parallel_size: Annotated[int, alias("pp")] = 1
    """Ranks that share the stack of layers."""
    device: DeviceChoice = "auto"
    """Where to run; auto takes an NPU, else a GPU, else the CPU."""
    distributed_backend: BackendChoice = "auto"
    """Collectives; nccl in a recipe means the device's own (gloo, nccl, hccl)."""
    use_fused_rmsnorm: bool = False
    """RMSNorm by the device's fused kernel, where there is one."""
    use_fused_rotary_pos_emb: bool = False
    """Rotary embedding by the device's fused kernel, where there is one."""
    mlp_layer_fusion: bool = False
    """SwiGLU by the device's fused kernel, where there is one."""
    deepspeed: bool = False
    """Accepted; there is nothing to partition when nothing is trained."""
    deepspeed_config: str | None = None
    """Accepted, for the same reason."""
    zero_stage: int | None = None
    """Accepted, for the same reason."""
    seq_length: int | None = None
    """Accepted; the cache is as long as a prompt and its answer."""

    @property
    def dtype(self) -> Literal["bf16", "fp16", "fp32"]:
        """Name of the compute type."""
        return "bf16" if self.bf16 else "fp16" if self.fp16 else "fp32"

    @property
    def layout(self) -> ParallelConfig:
        """TP x PP."""
        return ParallelConfig(
            tensor_model_parallel_size=self.tensor_model_parallel_size,
            pipeline_model_parallel_size=self.pipeline_model_parallel_size,
        )


UNNEEDED = {
    **SAYS,
    **dict.fromkeys(
        ("deepspeed", "deepspeed_config", "zero_stage"),
        "there is nothing to partition when nothing is trained",
    ),
    **dict.fromkeys(
        ("checkpoint_activations", "deepspeed_activation_checkpointing"), "nothing is kept for a way back"
    ),
    **dict.fromkeys(
        ("auto_recompute_device_size", "auto_recompute_profiling_step"), "nothing is kept for a way back"
    ),
    "seq_length": "the cache is as long as a prompt and its answer; --max-input-length limits prompts",
}


@dataclass(frozen=True)
class Generation:
    """What to generate, and from what."""

    task: tuple[str, ...] = ()
    """greedy, sample, beam, beam-sample, logprobs or chat, or their numbers 1 to 6; several are done one after the other.
    None: greedy; without any input a demonstration of 1 to 5."""
    prompt: UseAppendAction[tuple[str, ...]] = ()
    """A text to go on with (for chat: what the user says); again for more of them."""
    input_texts: tuple[str, ...] = ()
    """The same, several at once."""
    input_file: str | None = None
    """JSON lines: a text, a list of role and content, or {"prompt": text} or {"messages": list, "tools": list}; -: from stdin."""
    max_input_length: int | None = None
    """Longest prompt in tokens; a longer one is an error, or in a conversation makes the oldest turns go."""
    max_new_tokens: Annotated[int, alias("max-output-length")] = 64
    """Tokens of an answer at most."""
    batch_size: Annotated[int, alias("max-batch-size", "micro-batch-size")] = 16
    """Prompts that are answered side by side."""
    temperature: float = 1.0
    """Logits are divided by it before a token is drawn."""
    top_k: int = 0
    """Draw among so many of the most likely tokens; 0: all."""
    top_p: float = 1.0
    """Draw among the most likely tokens that make up this probability."""
    repetition_penalty: float = 1.0
    """Above 1, tokens that were there, in the prompt too, become less likely."""
    num_beams: int = 4
    """Continuations that are followed at the same time, for beam and beam-sample."""
    length_penalty: float = 1.0
    """Beams are compared by their sum of log-probabilities / length to this power."""
    num_return_sequences: int = 1
    """Answers for each prompt."""
    seed: int = 42
    """Of what is drawn."""
    stop: UseAppendAction[tuple[str, ...]] = ()
    """A text that ends the answer and does not belong to it; again for more of them."""
    chat_template: str | None = None
    """v1, v1-eoh, v2, v2.5 or v3; None: by the model's family and its tokenizer."""
    system: str | None = None
    """System message of a chat that has none."""
    history_turns: int | None = None
    """Earlier questions and answers that a conversation remembers; None: all, 0: none."""
    output_file: str | None = None
    """JSON lines with the answers, in the order of the prompts; must not exist yet."""
    stream: bool = False
    """Show answers as they come, one prompt at a time."""


@dataclass(frozen=True)
class Command:
    """Generates text with a language model, or talks with it."""

    recipe: FlagCreatePairsOff[RecipeFlags] = field(default_factory=RecipeFlags)
    model: ModelConfig = field(default_factory=lambda: families.preset(DEFAULT_MODEL))
    where: FlagCreatePairsOff[Where] = field(default_factory=Where)
    generation: FlagCreatePairsOff[Generation] = field(default_factory=Generation)


@dataclass(frozen=True)
class Place:
    """Weights that exist and fit: what every command of generation needs."""

    where: Where
    model: ModelConfig | None
    """None: the folder does not say it in a config.json of Hugging Face's, so it is checked when it is opened."""
    typed_model: ModelConfig | None
    """What flags say about the architecture, to be compared with what is opened."""
    tokenizer: str


@dataclass(frozen=True)
class Job:
    """A checked command."""

    place: Place
    generation: Generation
    tasks: tuple[str, ...]
    """By name; empty: not said."""
    typed: frozenset[str]


def resolve(args: Sequence[str], world: int) -> tuple[Job, list[str]]:
    """What `args` ask for with `world` processes, and what the user should be told. Raises `UserError`."""
    command = parser.parse(Command, args, description=Command.__doc__ or "")
    typed = parser.typed(Command, args)
    place = find_place(command, typed, args, world)
    asked = command.generation
    tasks = tuple(map(task_name, asked.task)) or _meant(typed)
    _check_numbers(asked)
    _check_uses(tasks, typed)
    if asked.output_file is not None:
        if tasks == ("chat",) and not (asked.prompt or asked.input_texts or asked.input_file):
            raise UserError(
                "--output-file is for prompts (--prompt, --input-file), not for a conversation; redirect stdout"
            )
        _check_output(Path(asked.output_file))
    if asked.stream and (
        asked.num_return_sequences > 1 or {"beam", "beam-sample", "logprobs"}.intersection(tasks)
    ):
        raise UserError(
            "--stream shows one answer as it comes: not several (--num-return-sequences), beams or log-probabilities"
        )
    return Job(place, asked, tasks, frozenset(typed)), notes(typed)


def find_place(command: Any, typed: set[str], args: Sequence[str], world: int) -> Place:
    """Of a command with the groups `recipe`, `model` and `where`. Raises `UserError` before anything is read but config.json."""
    where, recipe = command.where, command.recipe
    if where.load is None:
        raise UserError(
            "--load is needed: a Hugging Face directory, converted weights or a training checkpoint"
        )
    if not Path(where.load).is_dir():
        raise UserError(f"--load {where.load} is not a directory")
    if where.bf16 and where.fp16:
        raise UserError("--bf16 and --fp16 contradict each other; give one of them")
    if recipe.no_pipeline_parallel and where.pipeline_model_parallel_size > 1:
        raise UserError(
            "--no-pipeline-parallel contradicts --pipeline-model-parallel-size above 1; drop one of them"
        )
    model = model_of(command, where.load, typed, args)
    found = find_model(where.load)
    says = {f.name for f in fields(ModelConfig)} | {"row_col_parallel_linear_bias"}
    typed_model = model if recipe.model or says & typed else None
    if known := found or typed_model:
        schema.check_tensor_parallel(known, where.tensor_model_parallel_size)
        schema.check_pipeline_parallel(known, where.pipeline_model_parallel_size)
    needed = where.layout.model_size
    if world != needed:
        raise UserError(
            f"{world} processes were started, but TP {where.tensor_model_parallel_size} x PP {where.pipeline_model_parallel_size} "
            f"are {needed}; start NPROC={needed}, or choose other --tp and --pp"
        )
    return Place(where, found, typed_model, where.tokenizer_name_or_path or where.load)


def notes(typed: set[str]) -> list[str]:
    """A line for each flag that was given and does nothing."""
    return [
        f"--{name.replace('_', '-')} is accepted and does nothing: {why}"
        for name, why in UNNEEDED.items()
        if name in typed
    ]


def task_name(said: str) -> str:
    """Name of a task that was given by name or number. Raises `UserError`."""
    found = next((name for name, number in TASKS.items() if said in (name, number)), None)
    if found is None:
        known = ", ".join(f"{name} ({number})" for name, number in TASKS.items())
        raise UserError(f"--task {said} does not exist; there are {known}")
    return found


def _meant(typed: set[str]) -> tuple[str, ...]:
    """The task where none is named: what the other flags speak of."""
    if {"system", "history_turns"} & typed:
        return ("chat",)
    drawn, beams = bool(DRAWN & typed), bool(BEAMS & typed)
    if drawn or beams:
        return ("beam-sample",) if drawn and beams else ("beam",) if beams else ("sample",)
    return ()


def partial_of(path: Path) -> Path:
    """What an output file is called until all answers are there."""
    return path.with_name(f"{path.name}.partial")


def _check_output(path: Path) -> None:
    if path.exists():
        raise UserError(f"--output-file {path} exists; move it away, or give another name")
    partial = partial_of(path)
    if partial.exists() and partial.stat().st_size:
        raise UserError(
            f"{partial} holds answers of a run that did not end; move it away, or give --output-file another name"
        )
    if not os.access(path.absolute().parent, os.W_OK):
        raise UserError(
            f"--output-file {path}: {path.absolute().parent} is no directory that can be written to"
        )


def _check_numbers(asked: Generation) -> None:
    for name, least in {
        "batch_size": 1,
        "max_input_length": 1,
        "history_turns": 0,
        "max_new_tokens": 1,
    }.items():
        value = getattr(asked, name)
        if value is not None and value < least:
            raise UserError(f"--{name.replace('_', '-')} {value} is too small: at least {least}")
    if "" in asked.stop:
        raise UserError("--stop is empty: a text of no characters would end every answer at once")


def _check_uses(tasks: Sequence[str], typed: set[str]) -> None:
    for name in sorted(set().union(*USES.values()) & typed):
        of_use = [task for task, uses in USES.items() if name in uses]
        if tasks and not set(of_use) & set(tasks) and name != "chat_template":
            flag = f"--{name.replace('_', '-')}"
            raise UserError(f"{flag} is for --task {' or '.join(of_use)}, not for {', '.join(tasks)}")
