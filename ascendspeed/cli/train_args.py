"""The command line of pre-training -> a `Run` that has been checked. No torch: a wrong flag is an error at once."""

import contextlib
import dataclasses
import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from tyro.conf import FlagCreatePairsOff

from ascendspeed.checkpoint.paths import looks_like_checkpoint
from ascendspeed.cli import parser, validation
from ascendspeed.config import schema
from ascendspeed.config.schema import ModelConfig, Run
from ascendspeed.models import families
from ascendspeed.models.lora import targets
from ascendspeed.utils.errors import UserError

DEFAULT_MODEL = "internlm-7b"


@dataclass(frozen=True)
class RecipeFlags:
    """Flags of the published recipe and of Megatron that choose among the above, or that no longer need to be said."""

    model: str | None = None
    """Architecture by name, such as internlm-7b, -20b, -65b or -tiny; default: that of --load, else internlm-7b."""
    row_col_parallel_linear_bias: bool = False
    """Biases on q, k, v and the attention's output: --add-qkv-bias --add-dense-bias."""
    checkpoint_activations: bool = False
    """Full activation recomputation: --recompute-granularity full."""
    deepspeed_activation_checkpointing: bool = False
    """The same."""
    auto_recompute_device_size: int | None = None
    """Device memory in MiB to plan recomputation for; until there is a planner: full recomputation."""
    auto_recompute_profiling_step: int | None = None
    """Accepted; nothing is profiled."""
    no_pipeline_parallel: bool = False
    """Asserts that there are no pipeline stages."""
    use_flash_attn: bool = False
    """Accepted; attention never makes s x s scores here."""
    triangle_attn: bool = False
    """Accepted; causal attention never computes the masked half here."""
    position_embedding_type: Literal["rope"] = "rope"
    """Accepted; the models have rope."""
    normalization: Literal["RMSNorm"] = "RMSNorm"
    """Accepted; the models have RMSNorm."""
    swiglu: bool = False
    """Accepted where it is true: a model with another activation is refused."""
    untie_embeddings_and_output_weights: bool = False
    """Accepted where it is true: a model with tied embeddings is refused."""
    num_layers_per_virtual_pipeline_stage: int | None = None
    """Another way to say --num-virtual-stages-per-pipeline-rank: layers in each virtual stage."""
    DDP_impl: Literal["local", "torch"] = "local"
    """Accepted; the engine owns data parallelism."""
    no_contiguous_buffers_in_local_ddp: bool = False
    """Accepted; the engine owns its buffers."""
    data_impl: Literal["mmap", "infer"] = "mmap"
    """Accepted; data are memory-mapped .bin/.idx pairs."""
    tokenizer_type: Literal["PretrainedFromHF"] = "PretrainedFromHF"
    """Accepted; the tokenizer is that of a Hugging Face directory."""
    tokenizer_not_use_fast: bool = False
    """Accepted; tokenizer.model is always read by sentencepiece itself."""
    no_pack: bool = False
    """Instruction data: one document in each sample: --packing none."""
    local_rank: int | None = None
    """Accepted; LOCAL_RANK of the launcher is used."""
    lora_register_forward_hook: tuple[str, ...] = ()
    """Accepted; what goes into the first layer wants a gradient by itself here."""


SAYS = {  # one line for each accepted flag that no longer does anything
    "use_flash_attn": "attention is torch's SDPA, which never makes s x s scores",
    "triangle_attn": "causal attention never computes the masked half",
    "DDP_impl": "the engine owns data parallelism",
    "no_contiguous_buffers_in_local_ddp": "the engine owns its buffers",
    "tokenizer_not_use_fast": "tokenizer.model is always read by sentencepiece itself",
    "auto_recompute_profiling_step": "nothing is profiled",
    "local_rank": "LOCAL_RANK of the launcher is used",
    "lora_register_forward_hook": "what goes into the first layer wants a gradient by itself",
}


@dataclass(frozen=True)
class Command:
    """Pre-trains InternLM. Flags are those of the published recipe and Megatron's of the same meaning."""

    recipe: FlagCreatePairsOff[RecipeFlags] = field(default_factory=RecipeFlags)
    model: ModelConfig = field(default_factory=lambda: families.preset(DEFAULT_MODEL))
    parallel: FlagCreatePairsOff[schema.ParallelConfig] = field(default_factory=schema.ParallelConfig)
    optim: FlagCreatePairsOff[schema.OptimConfig] = field(default_factory=schema.OptimConfig)
    data: FlagCreatePairsOff[schema.DataConfig] = field(default_factory=schema.DataConfig)
    train: FlagCreatePairsOff[schema.TrainConfig] = field(default_factory=schema.TrainConfig)
    lora: FlagCreatePairsOff[schema.LoraConfig] = field(default_factory=schema.LoraConfig)


def resolve(args: Sequence[str], world: int) -> tuple[Run, list[str]]:
    """The run that `args` describe for `world` processes, and what the user should be told about it.

    Raises `UserError` for whatever is wrong, before any process group exists.
    """
    command = parser.parse(Command, args, description=Command.__doc__ or "")
    typed, recipe, said = parser.typed(Command, args), command.recipe, []
    if command.train.save_interval and command.train.save is None:
        said.append("--save-interval without --save: checkpoints go to ./ckpt")
        command = replace(command, train=replace(command.train, save="./ckpt"))
    if command.train.auto_resume:
        command = replace(command, train=_continued(command.train, said))
    model = model_of(command, command.train.load, typed, args)
    parallel, optim, train = command.parallel, command.optim, command.train
    said += [
        f"--{name.replace('_', '-')} is accepted and does nothing: {why}"
        for name, why in SAYS.items()
        if name in typed
    ]
    why_full = [
        n
        for n in (
            "checkpoint_activations",
            "deepspeed_activation_checkpointing",
            "auto_recompute_device_size",
        )
        if n in typed
    ]
    if why_full and train.recompute_granularity == "none":
        said.append(f"--{why_full[0].replace('_', '-')} means full activation recomputation")
        train = replace(train, recompute_granularity="full")
    if recipe.num_layers_per_virtual_pipeline_stage is not None:
        parallel = _virtual_stages(
            parallel, model.num_layers, recipe.num_layers_per_virtual_pipeline_stage, typed
        )
    if "zero_stage" in typed and not parallel.deepspeed:
        raise UserError(
            f"--zero-stage {parallel.zero_stage}: ZeRO is DeepSpeed's; add --deepspeed, or use --use-distributed-optimizer"
        )
    if parallel.sequence_parallel and parallel.tensor_model_parallel_size == 1:
        said.append("--sequence-parallel does nothing at tensor-parallel size 1")
        parallel = replace(parallel, sequence_parallel=False)
    if train.global_batch_size is None:
        train = replace(
            train, global_batch_size=max(1, train.micro_batch_size * (world // max(1, parallel.model_size)))
        )
    longest = command.data.max_segment_length or command.data.seq_length
    if longest > model.max_position_embeddings:
        flag = "max-segment-length" if command.data.max_segment_length else "seq-length"
        said.append(
            f"--{flag} {longest} is beyond the {model.max_position_embeddings} positions of the model"
        )
    data = command.data
    if recipe.no_pack:
        if "packing" in typed and data.packing != "none":
            raise UserError(f"--no-pack and --packing {data.packing} contradict each other; drop one of them")
        data = replace(data, packing="none")
    if data.valid_data_path and "eval_interval" not in typed:
        raise UserError(
            f"--valid-data-path {' '.join(data.valid_data_path)}: say how often it is evaluated on by --eval-interval"
        )
    if data.valid_data_path and "split" in typed and set(data.split.split(",")[1:]) - {"0"}:
        raise UserError(
            f"--split {data.split}: with --valid-data-path all of --data-path is trained on; drop one of them"
        )
    if train.train_epochs is not None and "train_iters" in typed:
        raise UserError(
            f"--train-epochs {train.train_epochs:g} and --train-iters {train.train_iters}: give one of them"
        )
    if recipe.no_pipeline_parallel and parallel.pipeline_model_parallel_size > 1:
        raise UserError(
            "--no-pipeline-parallel contradicts --pipeline-model-parallel-size above 1; drop one of them"
        )
    if recipe.swiglu and model.activation != "silu":
        raise UserError(f"--swiglu: the model has the activation {model.activation}; drop the flag")
    if recipe.untie_embeddings_and_output_weights and model.tie_embeddings:
        raise UserError("--untie-embeddings-and-output-weights: the model ties its embeddings; drop the flag")
    run = Run(model, parallel, optim, data, train, targets.resolve_config(model, command.lora))
    validation.check(run, world)
    return run, said


def _continued(train: schema.TrainConfig, said: list[str]) -> schema.TrainConfig:
    """--auto-resume: what is in --save goes before --load, which said how the run began."""
    if train.save is None:
        raise UserError(
            "--auto-resume continues the run in --save; give --save, the folder of its checkpoints"
        )
    if not looks_like_checkpoint(train.save):
        said.append(f"--auto-resume: {train.save} holds no checkpoint yet, so this is the start of the run")
        return train
    return replace(train, load=train.save, finetune=False)


def _virtual_stages(
    parallel: schema.ParallelConfig, layers: int, each: int, typed: set[str]
) -> schema.ParallelConfig:
    """Megatron's older way to ask for virtual stages: by the layers in each."""
    pp, flag = parallel.pipeline_model_parallel_size, f"--num-layers-per-virtual-pipeline-stage {each}"
    if "num_virtual_stages_per_pipeline_rank" in typed:
        raise UserError(f"{flag} and --num-virtual-stages-per-pipeline-rank say the same; give one of them")
    if pp < 1 or layers % pp or each < 1 or layers // pp % each:
        per_rank = layers // max(1, pp)
        choices = ", ".join(str(n) for n in range(1, per_rank + 1) if per_rank % n == 0)
        raise UserError(
            f"{flag} does not divide {layers} layers / {pp} pipeline ranks = {layers / max(1, pp):g}; choose {choices}"
        )
    return replace(parallel, num_virtual_stages_per_pipeline_rank=layers // pp // each)


def model_of(command: Any, load: str | None, typed: set[str], args: Sequence[str]) -> ModelConfig:
    """The architecture: typed flags over --model over that of --load, which none of them may contradict.

    `command`: what was parsed from `args`, a dataclass with the groups `recipe` and `model`. Raises `UserError`.
    """
    name = command.recipe.model
    loaded = find_model(load) if load else None
    base = families.preset(name) if name else loaded or families.preset(DEFAULT_MODEL)
    model = parser.parse(type(command), args, default=type(command)(model=base)).model
    if command.recipe.row_col_parallel_linear_bias:
        model = replace(model, add_qkv_bias=True, add_dense_bias=True)
    if loaded is None:
        return model
    for ours in (f.name for f in dataclasses.fields(ModelConfig) if f.name != "init_method_std"):
        mine, theirs = getattr(model, ours), getattr(loaded, ours)
        if mine != theirs:
            who = "the command line" if ours in typed or not name else f"--model {name}"
            raise UserError(
                f"{who} says {ours} = {mine}, but --load {load} holds {ours} = {theirs}; correct the flag or leave it out"
            )
    return model


def find_model(load: str) -> ModelConfig | None:
    """The architecture that a checkpoint, converted weights or a Hugging Face directory say they have; None if they say nothing.

    Of a folder of checkpoints it is that of the one which will be loaded, as far as run.json alone can tell.
    """
    folder = Path(load)
    if (folder / "config.json").is_file():
        return families.read_config(folder / "config.json")
    steps = [folder, *sorted(folder.glob("step_*"), reverse=True)]
    with contextlib.suppress(OSError):
        steps.insert(0, folder / (folder / "latest").read_text().strip())
    return next((run.model for run in map(_intact_run, steps) if run), None)


def _intact_run(step: Path) -> Run | None:
    """run.json of a checkpoint, if it is as the manifest says; what is damaged is named later, when all of it is verified."""
    try:
        text = (step / "run.json").read_bytes()
        wanted = json.loads((step / "manifest.json").read_text())["files"]["run.json"]["sha256"]
        return schema.from_dict(json.loads(text)) if hashlib.sha256(text).hexdigest() == wanted else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def world_size() -> int:
    """Processes that the launcher started."""
    return int(os.environ.get("WORLD_SIZE", "1"))
