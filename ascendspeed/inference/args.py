"""Command line of generation: flags -> a checked `GenerationJob`. No torch, so that errors come at once."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import FlagCreatePairsOff, UseAppendAction

from ascendspeed.cli import command
from ascendspeed.cli.command import CommandLine
from ascendspeed.cli.compat import GENERATE
from ascendspeed.cli.parser import flag_of, output_flag
from ascendspeed.cli.train_args import DEFAULT_MODEL, Preset, find_model, model_of
from ascendspeed.config import schema
from ascendspeed.config.pipeline_stages import check_pipeline_parallel
from ascendspeed.config.schema import (
    BackendChoice,
    CpuLinearChoice,
    DeviceChoice,
    KVCacheChoice,
    ModelConfig,
    ParallelConfig,
    QuantizationChoice,
    alias,
)
from ascendspeed.inference.input_checks import check_chat_template, check_folders, check_input_file
from ascendspeed.inference.sampling_ranges import check_sampling_ranges
from ascendspeed.models import families
from ascendspeed.utils import hub
from ascendspeed.utils.errors import UserError

TASKS = {"greedy": "1", "sample": "2", "beam": "3", "beam-sample": "4", "logprobs": "5", "chat": "6"}
"""Name of a task -> its number in the published script."""
COMMON = {"max_new_tokens", "repetition_penalty", "stop"}
SAMPLING = {"temperature", "top_k", "top_p"}
BEAMS = {"num_beams", "length_penalty"}
USES = {
    "greedy": COMMON | {"lookup"},
    "sample": COMMON | SAMPLING | {"num_return_sequences"},
    "beam": COMMON | BEAMS | {"num_return_sequences"},
    "beam-sample": COMMON | SAMPLING | BEAMS | {"num_return_sequences"},
    "logprobs": set(),
    "chat": COMMON | SAMPLING | {"chat_template", "system", "history_turns", "lookup"},
}
"""Task -> the flags that it uses. --seed is legal for every task: the published script gives one to all of
them."""
SPARE = 1024
"""Rows that a vocabulary may have beyond the ids of its tokenizer: padding, and tokens that may be added."""


@dataclass(frozen=True)
class EngineArgs:
    """Weights, number format, layout and device."""

    load: str | None = None
    """Hugging Face directory, converted weights, or a training checkpoint (the newest one in a folder of
    checkpoints)."""
    tokenizer_name_or_path: str | None = None
    """Directory with tokenizer.model or tokenizer.json; None: that of --load."""
    bf16: bool = False
    """Weights, activations and KV cache in bfloat16; without --bf16 and --fp16 they are in float32."""
    fp16: bool = False
    """Weights, activations and KV cache in float16."""
    tensor_model_parallel_size: Annotated[int, alias("tp")] = 1
    """Tensor-parallel ranks: they split every layer."""
    pipeline_model_parallel_size: Annotated[int, alias("pp")] = 1
    """Pipeline stages: they split the stack of layers."""
    device: DeviceChoice = "auto"
    """Device to run on; auto: an NPU if there is one, else a GPU, else the CPU."""
    distributed_backend: BackendChoice = "auto"
    """Backend of collectives; auto, and nccl in a recipe: the device's own (nccl, hccl or gloo)."""
    use_fused_rmsnorm: bool = False
    """Use the device's fused RMSNorm kernel if it has one."""
    use_fused_rotary_pos_emb: bool = False
    """Use the device's fused rotary embedding kernel if it has one."""
    mlp_layer_fusion: bool = False
    """Use the device's fused SwiGLU kernel if it has one."""
    cpu_linear: CpuLinearChoice = "auto"
    """Matrix products on a CPU: those in fp32 by oneDNN, with packed weights, or torch; those in bf16 and
    fp16 in fp32, rounded afterwards, or by torch. auto: the faster one, in fp32 by a measurement on CPUs of
    AMD, in bf16 and fp16 by the CPU's instructions. They differ by rounding."""
    quantize: QuantizationChoice | None = None
    """w8a16: weights of the layers in int8 with a scale for each output channel, quantised as they are read;
    embedding, output layer and activations keep their number format. None: no quantisation."""
    kv_cache_dtype: KVCacheChoice = "auto"
    """int8: keys and values in int8 with a scale for each token and head; auto: the number format of the
    activations."""

    @property
    def dtype(self) -> Literal["bf16", "fp16", "fp32"]:
        """Name of the number format."""
        if self.bf16:
            return "bf16"
        return "fp16" if self.fp16 else "fp32"

    @property
    def precision(self) -> str:
        """Number format with its quantisation, for records and messages."""
        cache = "int8 cache" if self.kv_cache_dtype == "int8" else None
        return ", ".join(part for part in (self.dtype, self.quantize, cache) if part)

    @property
    def layout(self) -> ParallelConfig:
        """Tensor- and pipeline-parallel sizes."""
        return ParallelConfig(
            tensor_model_parallel_size=self.tensor_model_parallel_size,
            pipeline_model_parallel_size=self.pipeline_model_parallel_size,
        )


@dataclass(frozen=True)
class GenerationArgs:
    """Tasks, prompts and sampling."""

    task: tuple[str, ...] = ()
    """greedy, sample, beam, beam-sample, logprobs or chat, or their numbers 1 to 6; several run one after the
    other. None: derived from the other flags, else greedy; without any input, a demonstration of tasks 1 to
    5."""
    prompt: UseAppendAction[tuple[str, ...]] = ()
    """Text to continue, or the user's message for chat; may be repeated."""
    input_texts: tuple[str, ...] = ()
    """Several prompts at once."""
    input_file: str | None = None
    """JSON lines: a text, a list of messages, or {"prompt": text} or {"messages": list, "tools": list}, whose
    further keys are copied to the output; -: read stdin."""
    max_input_length: int | None = None
    """Longest prompt in tokens. A longer prompt is an error; in a conversation the oldest turns are
    dropped."""
    max_new_tokens: int = 64
    """Largest number of tokens of an answer."""
    batch_size: int = 16
    """Prompts per batch."""
    temperature: float = 1.0
    """Divisor of the logits before sampling; 0: no sampling, always the most likely token."""
    top_k: int = 0
    """Sample among this many most likely tokens; 0 or -1: all."""
    top_p: float = 1.0
    """Sample among the most likely tokens whose probabilities add up to this; 0: no sampling, always the most
    likely token."""
    repetition_penalty: float = 1.0
    """Above 1: makes tokens of the prompt and of the answer less likely."""
    num_beams: int = 4
    """Beams of beam search (tasks beam and beam-sample)."""
    length_penalty: float = 1.0
    """Exponent of the length: beams are ranked by the sum of log-probabilities / length ** length_penalty."""
    num_return_sequences: int = 1
    """Answers per prompt."""
    lookup: int = 0
    """Prompt lookup for the most likely tokens (greedy, and chat without sampling): at most so many tokens
    are proposed that followed the last ones earlier in the text, and checked in one pass; 0: none."""
    seed: int = 42
    """Random seed for sampling."""
    stop: UseAppendAction[tuple[str, ...]] = ()
    """Text, or name of a control token (<|im_end|>), that ends an answer and is not part of it; may be
    repeated."""
    chat_template: str | None = None
    """Chat template: v1, v1-eoh, v2, v2.5 or v3; None: that of the model's family and its tokenizer."""
    parse_special_tokens: bool = False
    """Special tokens in prompts (<s>, <think>) become their ids; otherwise they stay text. In a conversation
    all but BOS, EOS and those of the chat template."""
    system: str | None = None
    """System message of conversations that have none."""
    history_turns: int | None = None
    """Earlier turns of a conversation that stay in the prompt; None: all, 0: none."""
    output_file: Annotated[str | None, output_flag("output-file")] = None
    """File for the answers as JSON lines, in the order of the prompts; must not exist."""
    stream: bool = False
    """Print answers as they are generated, one prompt at a time."""


@dataclass(frozen=True)
class GenerateCommand:
    """Generates text with a language model, or chats with it.

    python tasks/inference/generate.py --load DIR --bf16 --prompt "The capital of France is"
    """

    generation: FlagCreatePairsOff[GenerationArgs] = field(default_factory=GenerationArgs)
    engine: FlagCreatePairsOff[EngineArgs] = field(default_factory=EngineArgs)
    preset: FlagCreatePairsOff[Preset] = field(default_factory=Preset)
    model: ModelConfig = field(default_factory=lambda: families.preset(DEFAULT_MODEL))


@dataclass(frozen=True)
class EngineSpec:
    """Checked arguments of an inference engine."""

    args: EngineArgs
    model: ModelConfig | None
    """Architecture of `args.load`; None if no config.json or run.json records it: it is checked when the
    weights are opened."""
    expected_model: ModelConfig | None
    """Architecture that the flags name, to compare with that of the weights; None if they name none."""
    tokenizer: str
    """Directory of the tokenizer."""


@dataclass(frozen=True)
class GenerationJob:
    """A checked command line of generation."""

    spec: EngineSpec
    generation: GenerationArgs
    tasks: tuple[str, ...]
    """Names of the tasks; empty if the command line names none."""
    typed: frozenset[str]
    """Fields that the command line sets."""


def resolve(args: Sequence[str], world: int) -> tuple[GenerationJob, list[str]]:
    """Returns the job of `args` for `world` processes, and notes for the user. Raises UserError."""
    line = command.parse(GenerateCommand, args, GENERATE, GenerateCommand.__doc__ or "")
    spec = resolve_engine(line, world)
    generation = line.options.generation
    tasks = tuple(task_name(word) for word in generation.task) or _implied_tasks(line.typed)
    command.check_minimum(
        generation,
        {"batch_size": 1, "max_input_length": 1, "history_turns": 0, "max_new_tokens": 1, "lookup": 0},
    )
    check_sampling_ranges(generation)
    if "" in generation.stop:
        raise UserError("--stop is empty: a text of no characters would end every answer at once")
    _check_uses(tasks, line.typed)
    _check_lookup(generation, line.typed)
    check_chat_template(generation.chat_template)
    check_input_file(generation.input_file)
    _check_output(generation, tasks)
    return GenerationJob(spec, generation, tasks, line.typed), line.notes


def resolve_engine(line: CommandLine[Any], world: int) -> EngineSpec:
    """Checks the groups `engine`, `preset` and `model`; reads config.json only. Raises UserError."""
    args: EngineArgs = line.options.engine
    if args.load is None:
        raise UserError(
            "--load is needed: a Hugging Face directory, converted weights or a training checkpoint"
        )
    args, _ = hub.localize(args, {"load": True, "tokenizer_name_or_path": False})
    if not Path(args.load).is_dir():
        check_folders(args.load, args.tokenizer_name_or_path)
    command.check_precision(args.bf16, args.fp16)
    line.legacy.check(args)
    name = line.options.preset.model
    model = model_of(line, name, args.load)
    loaded = find_model(args.load)
    architecture_typed = name is not None or any(f.name in line.typed for f in fields(ModelConfig))
    expected = model if architecture_typed else None
    if known := loaded or expected:
        schema.check_tensor_parallel(known, args.tensor_model_parallel_size)
        check_pipeline_parallel(known, args.pipeline_model_parallel_size)
    ranks = args.layout.model_size
    if world != ranks:
        raise UserError(
            f"{world} processes were started, but TP {args.tensor_model_parallel_size} x "
            f"PP {args.pipeline_model_parallel_size} "
            f"are {ranks}; start NPROC={ranks}, or choose other --tp and --pp"
        )
    return EngineSpec(args, loaded, expected, args.tokenizer_name_or_path or args.load)


def task_name(word: str) -> str:
    """Returns the name of a task given by name or number. Raises UserError if there is no such task."""
    for name, number in TASKS.items():
        if word in (name, number):
            return name
    known = ", ".join(f"{name} ({number})" for name, number in TASKS.items())
    raise UserError(f"--task {word} does not exist; there are {known}")


def _implied_tasks(typed: frozenset[str]) -> tuple[str, ...]:
    """Returns the task whose flags are used, if the command line names none."""
    if {"system", "history_turns"} & typed:
        return ("chat",)
    sampling = bool(SAMPLING & typed)
    beams = bool(BEAMS & typed)
    if sampling and beams:
        return ("beam-sample",)
    if beams:
        return ("beam",)
    return ("sample",) if sampling else ()


def _check_uses(tasks: Sequence[str], typed: frozenset[str]) -> None:
    """Raises UserError for a flag that none of the tasks uses."""
    for name in sorted(set().union(*USES.values()) & typed):
        users = [task for task, uses in USES.items() if name in uses]
        if tasks and not set(users) & set(tasks) and name != "chat_template":
            raise UserError(f"{flag_of(name)} is for --task {' or '.join(users)}, not for {', '.join(tasks)}")


def _check_lookup(generation: GenerationArgs, typed: frozenset[str]) -> None:
    """Raises UserError for prompt lookup with flags that make it useless."""
    other = SAMPLING & typed or (generation.repetition_penalty != 1 and {"repetition_penalty"})
    if generation.lookup and other:
        raise UserError(
            f"--lookup is for the most likely tokens and has no effect with {flag_of(min(other))}: "
            "leave one out"
        )


def partial_of(path: Path) -> Path:
    """Returns the name of an output file while answers are still missing."""
    return path.with_name(f"{path.name}.partial")


def _check_output(generation: GenerationArgs, tasks: tuple[str, ...]) -> None:
    """Raises UserError if --output cannot be written, or --stream cannot show the answers of `tasks`."""
    prompts = generation.prompt or generation.input_texts or generation.input_file
    if generation.output_file is not None:
        if tasks == ("chat",) and not prompts:
            raise UserError(
                "--output is for prompts (--prompt, --input-file), not for a conversation; redirect stdout"
            )
        check_output_file(Path(generation.output_file))
    several = generation.num_return_sequences > 1 or {"beam", "beam-sample", "logprobs"}.intersection(tasks)
    if generation.stream and several:
        raise UserError(
            "--stream shows one answer as it comes: not several (--num-return-sequences), beams or "
            "log-probabilities"
        )


def check_output_file(path: Path) -> None:
    """Raises UserError if `path` exists or cannot be created."""
    if path.exists():
        raise UserError(f"--output {path} exists; move it away, or give another name")
    partial = partial_of(path)
    if partial.exists() and partial.stat().st_size:
        raise UserError(
            f"{partial} holds answers of a run that did not end; move it away, or give --output another name"
        )
    folder = path.absolute().parent
    if not os.access(folder, os.W_OK):
        raise UserError(f"--output {path}: {folder} is not a writable directory")
