"""The start of a run: random weights, weights from --load, or a training checkpoint to continue."""

import dataclasses
import logging
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from torch import Tensor

from ascendspeed.checkpoint.discovery import Readers
from ascendspeed.checkpoint.fragment import TrainState
from ascendspeed.checkpoint.load import Checkpoint
from ascendspeed.checkpoint.paths import looks_like_checkpoint
from ascendspeed.config.schema import LoraConfig, Run
from ascendspeed.conversion import weights_identity
from ascendspeed.conversion.checkpoint_reader import CheckpointReader
from ascendspeed.conversion.formats.registry import open_reader
from ascendspeed.conversion.formats.training_checkpoint import reading as training_checkpoint
from ascendspeed.distributed.device import Device
from ascendspeed.distributed.process_groups import ProcessGrid
from ascendspeed.models.param_mapping import random_tensors
from ascendspeed.training import input_record, lora_setup, save_dir
from ascendspeed.training.reward_head import with_new_head
from ascendspeed.utils.errors import UserError

logger = logging.getLogger(__name__)

UNREPORTED = {
    "data_cache_path",
    "initial_loss_scale",
    "is_instruction_dataset",
    "reference_fingerprint",
    "strict",
}
"""Settings of data and optimizer that do not change the loss curve of a resumed run."""
REPORTED_TRAIN = (
    "seed",
    "global_batch_size",
    "train_iters",
    "train_samples",
    "rampup_batch_size",
    "rampup_batch_size_iters",
    "iterations_to_skip",
    "skip_batches",
    "label_smoothing",
    "z_loss_coeff",
    "ema_decay",
    "attention_dropout",
    "hidden_dropout",
)
"""Settings of `TrainConfig` that do."""
REPORTED_LORA = (("lora", "lora_dropout"), ("lora", "quantization_bit"))


@dataclass(frozen=True)
class Start:
    """Start of a run: weights, and the checkpoint to continue."""

    tensors: Iterable[tuple[str, Tensor]] | None
    """Weights to load into the model; None: `resume` has them."""
    resume: Checkpoint | None = None
    """The checkpoint that the run continues."""
    lora: LoraConfig | None = None
    """For a LoRA run: its settings, with the path and the fingerprint of the base weights."""
    reference_fingerprint: str | None = None
    """For a loss that compares with the weights at the start of the run: their fingerprint."""

    def saved_run(self, run: Run) -> Run:
        """The run as its checkpoints record it."""
        if self.lora:
            run = dataclasses.replace(run, lora=self.lora)
        preference = dataclasses.replace(run.preference, reference_fingerprint=self.reference_fingerprint)
        return dataclasses.replace(run, preference=preference)

    @property
    def state(self) -> TrainState:
        """Position in the run."""
        return self.resume.state if self.resume else TrainState(step=0, samples=0, tokens=0)


def find_start(run: Run, grid: ProcessGrid, device: Device) -> Start:
    """Resolves --load: a training checkpoint to continue (or, with --finetune, its weights), weights, or an
    empty folder.

    Raises `UserError`, the same on every rank, if --load holds nothing usable, if --save holds another run or
    cannot be written, or if the ranks do not see the same files. Collective.
    """
    load = run.train.load
    save_dir.check_folders(run, grid)
    readers = Readers.of(grid)
    if load and looks_like_checkpoint(load):
        return _from_checkpoint(run, readers.open(load), grid, readers)
    if load and not (save_dir.is_same_folder(load, run.train.save) and save_dir.is_unused(Path(load))):
        reader = open_reader(load)
        logger.info(f"weights from {load} ({reader.description})")
        return _from_weights(run, reader, readers)
    return _from_random(run, device)


def _from_random(run: Run, device: Device) -> Start:
    load = run.train.load
    if run.preference.needs_reference:
        raise UserError(
            f"--loss {run.preference.loss} compares with the weights at the start, which a trained model "
            "has; "
            "name it by --load"
        )
    if run.lora.lora_rank:
        raise UserError(f"--lora-rank {run.lora.lora_rank}: adapters need base weights; name them by --load")
    reason = f"--load {load} is empty: a fresh start from" if load else "no --load:"
    logger.info(f"{reason} random weights, seed {run.train.seed}")
    return Start(random_tensors(run.model, run.train.seed, device.torch))


def _from_weights(run: Run, reader: CheckpointReader, readers: Readers) -> Start:
    if not run.lora.lora_rank:
        fingerprint = weights_identity.sampled(reader) if run.preference.needs_reference else None
        tensors = with_new_head(run, reader.tensors(), reader.config)
        return Start(tensors, reference_fingerprint=fingerprint)
    tensors, lora = lora_setup.start_adapters(run, reader, readers)
    return Start(tensors, lora=lora)


def _from_checkpoint(run: Run, checkpoint: Checkpoint, grid: ProcessGrid, readers: Readers) -> Start:
    _check_model(run, checkpoint)
    _check_stage(run, checkpoint)
    lora_setup.check_compatible(run, checkpoint)
    _check_optimizer(run, checkpoint)
    continues_adapters = bool(run.lora.lora_rank and checkpoint.run.lora.lora_rank)
    if continues_adapters:
        base, lora = lora_setup.open_base(run, checkpoint, readers)
        if run.train.finetune:
            lora_setup.refuse_adapters_as_reference(run, f"--load {checkpoint.path}")
            logger.info(f"adapters from {checkpoint.path}; optimizer and position start anew (--finetune)")
            return Start(chain(checkpoint.tensors(), base), lora=lora)
        _log_resume(run, checkpoint, grid)
        return Start(lora_setup.with_placeholders(run, base), checkpoint, lora)
    if run.train.finetune:
        logger.info(f"weights from {checkpoint.path}; optimizer and position start anew (--finetune)")
        needs_reader = run.lora.lora_rank or checkpoint.run.lora.lora_rank or run.preference.needs_reference
        if not needs_reader:
            return Start(with_new_head(run, checkpoint.tensors(), checkpoint.config))
        return _from_weights(run, training_checkpoint.reader_of(checkpoint, open_reader, readers), readers)
    _log_resume(run, checkpoint, grid)
    return Start(None, checkpoint, reference_fingerprint=checkpoint.run.preference.reference_fingerprint)


def _check_stage(run: Run, checkpoint: Checkpoint) -> None:
    """Raises `UserError` if a run would continue a run of another stage or with another reference."""
    saved, settings = checkpoint.run.preference, run.preference
    if run.train.finetune:
        return
    stages = [one.stage if one.trains_on_pairs else None for one in (saved, settings)]
    if stages[0] != stages[1]:
        was = f"--stage {saved.stage}" if saved.trains_on_pairs else "next-token prediction"
        raise UserError(
            f"{checkpoint.path} is of a run of {was}: continue it with the same stage, or start a new run "
            "from "
            "its weights with --finetune"
        )
    if settings.needs_reference and not saved.needs_reference:
        raise UserError(
            f"{checkpoint.path} is of a run with --loss {saved.loss}, which has no reference for --loss "
            f"{settings.loss}; start a new run from its weights with --finetune"
        )


def _check_model(run: Run, checkpoint: Checkpoint) -> None:
    """Raises `UserError` if the checkpoint holds another architecture; fields that only
    training reads may differ.
    """
    saved = checkpoint.config
    if run.train.finetune and run.model.reward_head and not saved.reward_head:
        saved = dataclasses.replace(saved, reward_head=True, scored_token_id=run.model.scored_token_id)
    if not saved.same_function(run.model):
        raise UserError(f"{checkpoint.path} holds another model than this run: {saved}, not {run.model}")


def _check_optimizer(run: Run, checkpoint: Checkpoint) -> None:
    """Raises `UserError` if the states in the checkpoint are those of another optimizer."""
    old, new = checkpoint.run.optim.optimizer, run.optim.optimizer
    if old != new and not run.train.finetune:
        raise UserError(
            f"{checkpoint.path} holds the states of --optimizer {old}, this run has --optimizer {new}; "
            "add --finetune to take its weights alone"
        )


def _log_resume(run: Run, checkpoint: Checkpoint, grid: ProcessGrid) -> None:
    """Logs the position, and what makes the loss curve differ from an uninterrupted run."""
    saved = checkpoint.run
    groups = [
        (group, field.name)
        for group in ("data", "optim", "preference")
        for field in dataclasses.fields(getattr(run, group))
    ]
    for group, name in [*groups, *(("train", name) for name in REPORTED_TRAIN), *REPORTED_LORA]:
        old, new = getattr(getattr(saved, group), name), getattr(getattr(run, group), name)
        unrecorded = name == "chat_template" and None in (old, new)  # that of the data, since version 0.2
        if old != new and name not in UNREPORTED and not unrecorded:
            logger.info(f"note: {name} was {old} when the checkpoint was saved and is {new} now")
    for change in input_record.changes(saved, run):
        logger.info(f"note: {change}")
    same_layout = (checkpoint.world, saved.parallel.layout_key) == (grid.world, run.parallel.layout_key)
    has_dropout = (
        run.train.attention_dropout
        or run.train.hidden_dropout
        or (run.lora.lora_rank and run.lora.lora_dropout)
    )
    if has_dropout and not same_layout:
        logger.info(
            "note: in another layout than that of the checkpoint, the dropout masks start anew from --seed"
        )
    state = checkpoint.state
    logger.info(f"resumes from {checkpoint.path}: iteration {state.step}, {state.samples} samples consumed")
