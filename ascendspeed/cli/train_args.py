"""Command line of training: flags -> a validated `Run`. No torch, so that errors come at once."""

import contextlib
import dataclasses
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tyro.conf import FlagCreatePairsOff

from ascendspeed.checkpoint.paths import looks_like_checkpoint
from ascendspeed.cli import command, effect_checks, parser, reward_model, validation
from ascendspeed.cli.command import CommandLine
from ascendspeed.cli.compat import TRAIN
from ascendspeed.cli.config_file import reading as config_file
from ascendspeed.cli.observation_checks import notes_of_length
from ascendspeed.config import batch_schedule, schema
from ascendspeed.config.schema import DataConfig, ModelConfig, ParallelConfig, Run, TrainConfig
from ascendspeed.models import families
from ascendspeed.models.lora import targets
from ascendspeed.utils import hub
from ascendspeed.utils.errors import UserError
from ascendspeed.utils.safe_io import parse_json
from ascendspeed.utils.text import shorten_list

DEFAULT_MODEL = "internlm-7b"
SECTIONS = ("model", "parallel", "optim", "data", "train", "lora")
"""Sections of a run that flags set."""
ADAPTER_CONFIG = "adapter_config.json"
TOKENIZER_FILES = ("tokenizer.model", "tokenizer.json")


@dataclass(frozen=True)
class Preset:
    """Architecture by name."""

    model: str | None = None
    """Name of an architecture, such as internlm-7b, -20b, -65b or -tiny; None: that of --load, else
    internlm-7b."""


@dataclass(frozen=True)
class Rehearsal:
    """Rehearsal of the run."""

    dry_run: bool = False
    """Check flags, data, weights and folders, plan the memory of a device, and stop: nothing is started."""


@dataclass(frozen=True)
class TrainCommand:
    """Trains InternLM and related models with Megatron-core or DeepSpeed.

    torchrun --nproc_per_node 8 pretrain_intern.py --load DIR --data-path PREFIX --bf16 --save ckpt
    """

    preset: FlagCreatePairsOff[Preset] = field(default_factory=Preset)
    data: FlagCreatePairsOff[DataConfig] = field(default_factory=DataConfig)
    train: FlagCreatePairsOff[TrainConfig] = field(default_factory=TrainConfig)
    optim: FlagCreatePairsOff[schema.OptimConfig] = field(default_factory=schema.OptimConfig)
    parallel: FlagCreatePairsOff[ParallelConfig] = field(default_factory=ParallelConfig)
    lora: FlagCreatePairsOff[schema.LoraConfig] = field(default_factory=schema.LoraConfig)
    preference: FlagCreatePairsOff[schema.PreferenceConfig] = field(default_factory=schema.PreferenceConfig)
    rehearsal: FlagCreatePairsOff[Rehearsal] = field(default_factory=Rehearsal)
    model: ModelConfig = field(default_factory=lambda: families.preset(DEFAULT_MODEL))


def resolve(args: Sequence[str], world: int | None) -> tuple[Run, list[str]]:
    """Returns the run that `args` describe for `world` processes, and notes for the user.

    `world`: None if it is not known yet; what depends on it is not checked then.

    Raises UserError for everything that can be known to be wrong before a process group exists.
    """
    return resolve_line(parse(args), world)


def parse(args: Sequence[str]) -> CommandLine[TrainCommand]:
    """Parses the words of a command line of training."""
    return command.parse(TrainCommand, args, TRAIN, TrainCommand.__doc__ or "", dumps_later=True)


def resolve_line(line: CommandLine[Any], world: int | None) -> tuple[Run, list[str]]:
    """`resolve` of a parsed command line, whose options are those of `TrainCommand` and perhaps more.

    Opens no file but the configuration in --load, and fetches models that are named by their hub.
    """
    options = line.options
    notes: list[str] = []
    train = _train_config(options.train, notes)
    own = {} if train.load == train.save else {"load": True}  # --load of the run's own checkpoints
    train, origins = hub.localize(train, own)
    data, more_origins = hub.localize(options.data, {"tokenizer_name_or_path": False})
    inputs = schema.InputRecord(hub=tuple(dict.fromkeys((*origins, *more_origins))))
    model = model_of(line, options.preset.model, train.load)
    notes += line.notes
    parallel = _parallel_config(line, options.parallel, model, notes)
    if train.global_batch_size is None:
        data_parallel = (world or 1) // max(1, parallel.model_size)
        train = replace(train, global_batch_size=max(1, train.micro_batch_size * data_parallel))
    _check_positions(data, model, notes)
    if model.num_experts:
        notes.append(_balancing_note(model))
    _check_data(data, line.typed)
    train = _length_of(_without_auto_recompute(train, notes), line.typed)
    validation.check_preference(options.preference, line.typed)
    model = reward_model.resolve(options.preference, data, model, train.load)
    data = reward_model.data_of(data, model)
    lora = targets.resolve_config(model, options.lora)
    run = Run(model, parallel, options.optim, _mocked(data), train, lora, options.preference, inputs)
    line.legacy.check(run)
    validation.check_run(run, world)
    notes += effect_checks.check(run, line.typed)
    if run.train.train_epochs is None:  # otherwise the length follows from the data
        notes += notes_of_length(run.train)
    if line.dumps:
        config_file.dump(schema.to_dict(run), SECTIONS)
    return run, notes


def check_inputs(run: Run) -> None:
    """Raises UserError naming every input that is missing: tokenizer, data, weights, DeepSpeed's file.

    Looks at names only; what the files hold is checked when they are opened.
    """
    missing = []
    tokenizer = run.data.tokenizer_name_or_path
    if tokenizer and not any((Path(tokenizer) / name).is_file() for name in TOKENIZER_FILES):
        missing.append(f"--tokenizer-name-or-path {tokenizer} (a folder with {' or '.join(TOKENIZER_FILES)})")
    for flag, words in (("--data-path", run.data.data_path), ("--valid-data-path", run.data.valid_data_path)):
        prefixes = words if words and len(words) == 1 else (words or ())[1::2]
        missing += [
            f"{flag} {prefix} ({_files_text(prefix)})"
            for prefix in prefixes
            if prefix != schema.MOCK_DATA and not _has_files(prefix)
        ]
    load, save = run.train.load, run.train.save
    is_fresh = bool(load and save) and Path(load).resolve() == Path(save).resolve()
    if load and not is_fresh and not Path(load).is_dir():
        missing.append(f"--load {load} (no such folder)")
    if (config := run.parallel.deepspeed_config) and not Path(config).is_file():
        missing.append(f"--deepspeed_config {config} (no such file)")
    if missing:
        raise UserError(
            f"missing: {'; '.join(missing)}; README.md describes how to get tokenizer, data and weights"
        )


def _has_files(prefix: str) -> bool:
    """True if a path is a file or a folder, the beginning of file names, or a glob of some."""
    path = Path(prefix)
    try:
        if path.exists() or (set("*?[") & set(prefix) and any(path.parent.glob(path.name))):
            return True
        return path.name != "" and any(other.name.startswith(path.name) for other in path.parent.iterdir())
    except (OSError, ValueError):
        return False


def _files_text(prefix: str) -> str:
    """Names the data beside a prefix that does not exist."""
    names = [str(path.with_suffix("")) for path in sorted(Path(prefix).parent.glob("*.idx"))]
    return f"no file has this prefix; prefixes in its folder: {shorten_list(names) or 'none'}"


def _train_config(train: TrainConfig, notes: list[str]) -> TrainConfig:
    """Returns `train` with the defaults of --save and --load that other flags imply."""
    if train.save_interval and train.save is None:
        notes.append("--save-interval without --save: checkpoints go to ./ckpt")
        train = replace(train, save="./ckpt")
    if not train.auto_resume:
        return train
    if train.save is None:
        raise UserError(
            "--auto-resume continues the run in --save; give --save, the folder of its checkpoints"
        )
    if not looks_like_checkpoint(train.save):
        notes.append(f"--auto-resume: {train.save} holds no checkpoint yet, so this is the start of the run")
        return train
    return replace(train, load=train.save, finetune=False)  # --load has named the start of the run


def _parallel_config(
    line: CommandLine[Any], parallel: ParallelConfig, model: ModelConfig, notes: list[str]
) -> ParallelConfig:
    """Returns `parallel` with virtual stages by number, and without sequence parallel at TP 1."""
    layers = line.legacy.values.get("--num-layers-per-virtual-pipeline-stage")
    if layers is not None:
        parallel = _virtual_stages(parallel, model.num_layers, layers, line.typed)
    if "zero_stage" in line.typed and not parallel.deepspeed:
        raise UserError(
            f"--zero-stage {parallel.zero_stage}: ZeRO is DeepSpeed's; add --deepspeed, or use "
            "--use-distributed-optimizer"
        )
    if parallel.sequence_parallel and parallel.tensor_model_parallel_size == 1:
        notes.append("--sequence-parallel does nothing at tensor-parallel size 1")
        parallel = replace(parallel, sequence_parallel=False)
    return parallel


def _virtual_stages(
    parallel: ParallelConfig, num_layers: int, layers_per_stage: int, typed: frozenset[str]
) -> ParallelConfig:
    """Returns `parallel` with the number of virtual stages that follows from the layers of one."""
    pp = parallel.pipeline_model_parallel_size
    flag = f"--num-layers-per-virtual-pipeline-stage {layers_per_stage}"
    if "num_virtual_stages_per_pipeline_rank" in typed:
        raise UserError(f"{flag} and --num-virtual-stages-per-pipeline-rank set the same; give one of them")
    per_rank = num_layers // max(1, pp)
    if pp < 1 or num_layers % pp or layers_per_stage < 1 or per_rank % layers_per_stage:
        choices = ", ".join(str(n) for n in range(1, per_rank + 1) if per_rank % n == 0)
        raise UserError(
            f"{flag} does not divide {num_layers} layers / {pp} pipeline ranks = "
            f"{num_layers / max(1, pp):g}; choose {choices}"
        )
    return replace(parallel, num_virtual_stages_per_pipeline_rank=per_rank // layers_per_stage)


def _without_auto_recompute(train: TrainConfig, notes: list[str]) -> TrainConfig:
    """Returns `train` without --auto-recompute-device-size if another flag says what is recomputed."""
    size = train.auto_recompute_device_size
    if size is None or train.recompute_granularity == "none":
        return train
    notes.append(
        f"--auto-recompute-device-size {size} has no effect beside --recompute-granularity "
        f"{train.recompute_granularity}"
    )
    return replace(train, auto_recompute_device_size=None)


def _length_of(train: TrainConfig, typed: frozenset[str]) -> TrainConfig:
    """Returns `train` with the iterations of --train-samples. Raises UserError if several flags give the
    length."""
    given = {"--train-iters": train.train_iters if "train_iters" in typed else None}
    given |= {"--train-samples": train.train_samples, "--train-epochs": train.train_epochs}
    words = [f"{flag} {value:g}" for flag, value in given.items() if value is not None]
    if len(words) > 1:
        raise UserError(f"{' and '.join(reversed(words))}: give one of them")
    if train.train_samples is None:
        return train
    batch_schedule.check_rampup(train)
    iterations = batch_schedule.iterations_of(train, train.train_samples)
    if iterations < 1:
        raise UserError(f"--train-samples {train.train_samples}: not one global batch; give more")
    return replace(train, train_iters=iterations)


def _mocked(data: DataConfig) -> DataConfig:
    """Returns `data` with random ids as its path if --mock-data is set."""
    if data.mock_data and (data.data_path or data.valid_data_path):
        raise UserError("--mock-data takes the place of --data-path and --valid-data-path; leave them out")
    return replace(data, data_path=(schema.MOCK_DATA,)) if data.mock_data else data


def _balancing_note(model: ModelConfig) -> str:
    """States the load-balancing loss of the experts, which may come from config.json."""
    if model.moe_aux_loss_coeff:
        return f"load-balancing loss of {model.num_experts} experts: coefficient {model.moe_aux_loss_coeff:g}"
    return (
        f"{model.num_experts} experts are trained without a balancing loss: the router may come to "
        "prefer few of them; --moe-aux-loss-coeff adds one"
    )


def _check_positions(data: DataConfig, model: ModelConfig, notes: list[str]) -> None:
    """Notes that sequences are longer than those that the model was trained on."""
    name = "max_segment_length" if data.max_segment_length else "seq_length"
    longest = getattr(data, name)
    if longest > model.max_position_embeddings:
        notes.append(
            f"{parser.flag_of(name)} {longest} is beyond the {model.max_position_embeddings} positions of "
            "the model"
        )


def _check_data(data: DataConfig, typed: frozenset[str]) -> None:
    """Raises UserError if the flags of the validation data do not belong together."""
    if not data.valid_data_path:
        return
    if "eval_interval" not in typed:
        raise UserError(
            f"--valid-data-path {' '.join(data.valid_data_path)}: set --eval-interval, the "
            "iterations between evaluations"
        )
    if "split" in typed and set(data.split.split(",")[1:]) - {"0"}:
        raise UserError(
            f"--split {data.split}: with --valid-data-path all of --data-path is trained on; drop one of them"
        )


def model_of(line: CommandLine[Any], name: str | None, load: str | None) -> ModelConfig:
    """Returns the architecture: flags override the preset `name`, which overrides that of `load`.

    `line.options` has the group `model`. Raises UserError if flags or the preset contradict `load`.
    """
    loaded = find_model(load) if load else None
    base = families.preset(name) if name else loaded or families.preset(DEFAULT_MODEL)
    if loaded is not None:
        base = replace(base, reward_head=loaded.reward_head, scored_token_id=loaded.scored_token_id)
    model = parser.parse_group(ModelConfig, line.args, base)
    if loaded is None:
        return model
    for field_name in (
        f.name for f in dataclasses.fields(ModelConfig) if f.name not in schema.TRAINING_FIELDS
    ):
        value = getattr(model, field_name)
        actual = getattr(loaded, field_name)
        if value != actual:
            origin = "the command line" if field_name in line.typed or not name else f"--model {name}"
            raise UserError(
                f"{origin} sets {field_name} = {value}, but --load {load} holds {field_name} = {actual}; "
                "correct the flag or leave it out"
            )
    return model


def find_model(load: str) -> ModelConfig | None:
    """Reads the architecture of a checkpoint, converted weights or a Hugging Face directory; None if unknown.

    In a folder of checkpoints it is that of the checkpoint which will be loaded, as far as run.json alone can
    tell.
    """
    folder = Path(load)
    if (folder / "config.json").is_file():
        return families.read_config(folder / "config.json")
    if (folder / ADAPTER_CONFIG).is_file():  # or the default model would be built before they are opened
        raise UserError(
            f"--load {load} holds adapters of peft ({ADAPTER_CONFIG}), not a model: --load BASE --lora-load "
            f"{load} continues them, tools/lora/merge_lora.py merges them into their base weights"
        )
    steps = [folder, *sorted(folder.glob("step_*"), reverse=True)]
    with contextlib.suppress(OSError):
        steps.insert(0, folder / (folder / "latest").read_text().strip())
    return next((run.model for run in map(_intact_run, steps) if run), None)


def _intact_run(step: Path) -> Run | None:
    """Reads run.json of a checkpoint if its hash is that of the manifest; loading reports damage later."""
    try:
        text = (step / "run.json").read_bytes()
        manifest = parse_json((step / "manifest.json").read_bytes())
        if hashlib.sha256(text).hexdigest() != manifest["files"]["run.json"]["sha256"]:
            return None
        return schema.from_dict(parse_json(text, finite=False))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
