"""The start of a LoRA run: base weights, and adapters that are new, from --lora-load or from a checkpoint."""

import logging
from dataclasses import replace
from itertools import chain
from pathlib import Path

from ascendspeed.checkpoint.discovery import Readers
from ascendspeed.checkpoint.load import Checkpoint
from ascendspeed.config.schema import LoraConfig, Run
from ascendspeed.conversion import weights_identity
from ascendspeed.conversion.checkpoint_reader import CheckpointReader
from ascendspeed.conversion.formats import peft
from ascendspeed.conversion.formats.registry import open_reader
from ascendspeed.conversion.formats.training_checkpoint import reading as training_checkpoint
from ascendspeed.models.lora import targets
from ascendspeed.models.lora.adapter import check_base, initial_tensors, training_tensors
from ascendspeed.training.reward_head import Tensors, head_of, with_head, with_new_head
from ascendspeed.utils.errors import UserError

logger = logging.getLogger(__name__)

FIXED_SETTINGS = ("lora_rank", "lora_alpha", "lora_target_modules")
"""Settings that cannot change when adapters are trained further."""


def start_adapters(run: Run, base: CheckpointReader, readers: Readers) -> tuple[Tensors, LoraConfig]:
    """Base weights with new adapters, or with those of --lora-load.

    Returns the tensors and the settings that the checkpoints of the run record. Raises `UserError`.
    """
    lora = run.lora
    if lora.lora_base:
        raise UserError(
            f"--lora-base {lora.lora_base} is for a --load that holds adapters; this one holds weights"
        )
    lora = replace(
        lora, lora_base=str(Path(base.path).resolve()), lora_base_fingerprint=weights_identity.sampled(base)
    )
    count = targets.trained_count(run.model, lora)
    logger.info(
        f"adapters of rank {lora.lora_rank} on {' '.join(lora.lora_target_modules)}: {count} parameters are "
        "trained"
    )
    if not lora.lora_load:
        tensors = with_new_head(run, base.tensors(), base.config)
        return chain(tensors, initial_tensors(run.model, lora, run.train.seed)), lora
    refuse_adapters_as_reference(run, f"--lora-load {lora.lora_load}")
    adapter = peft.open_adapter(lora.lora_load, readers)
    check_base(adapter, f"--load {run.train.load}", lora.lora_base_fingerprint)
    unchecked = "" if adapter.fingerprint else ", which do not say whether they belong to these weights"
    logger.info(f"adapters from {lora.lora_load}{unchecked}")
    trained = [*training_tensors(adapter, run.model, lora), *head_of(adapter, run.model)]
    return chain(trained, with_head(run, base.tensors(), base.config)), lora


def refuse_adapters_as_reference(run: Run, source: str) -> None:
    """Raises `UserError` if adapters that are trained already would be a part of the reference weights."""
    if run.preference.needs_reference:
        raise UserError(
            f"{source}: for --loss {run.preference.loss} the reference would be the weights without these "
            "adapters; merge them (tools/lora/merge_lora.py), --load the result and train new ones"
        )


def check_compatible(run: Run, checkpoint: Checkpoint) -> None:
    """Raises `UserError` if run and checkpoint differ in their adapters: only one has any, or their settings
    differ.
    """
    requested, saved = run.lora, checkpoint.run.lora
    if not saved.lora_rank:
        if requested.lora_rank and not run.train.finetune:
            raise UserError(
                f"{checkpoint.path} holds all weights of a model: to train adapters on them add --finetune"
            )
        return
    flags = (
        f"--lora-rank {saved.lora_rank} --lora-alpha {saved.lora_alpha:g} "
        f"--lora-target-modules {' '.join(saved.lora_target_modules)}"
    )
    if not requested.lora_rank:
        if not run.train.finetune:
            raise UserError(
                f"{checkpoint.path} holds adapters: continue training them with {flags}, "
                "or train all weights, with the adapters merged, with --finetune"
            )
        return
    different = [name for name in FIXED_SETTINGS if getattr(requested, name) != getattr(saved, name)]
    if different:
        raise UserError(
            f"{checkpoint.path} holds adapters of {flags}; {', '.join(different)} cannot change: give these "
            "flags, "
            "or merge the adapters (tools/lora/merge_lora.py) and --load the result to train new ones"
        )


def open_base(run: Run, checkpoint: Checkpoint, readers: Readers) -> tuple[Tensors, LoraConfig]:
    """Base weights of a checkpoint's adapters, and the settings that checkpoints of the run record."""
    if run.lora.lora_load:
        logger.info(
            f"note: --lora-load {run.lora.lora_load} was the start of the run; its adapters now come from "
            f"{checkpoint.path}"
        )
    base = training_checkpoint.base_of(checkpoint, open_reader, run.lora.lora_base, readers)
    logger.info(f"base weights of the adapters from {base.path} ({base.description})")
    lora = replace(
        run.lora,
        lora_base=str(Path(base.path).resolve()),
        lora_base_fingerprint=checkpoint.run.lora.lora_base_fingerprint,
    )
    return with_head(run, base.tensors(), base.config), lora


def with_placeholders(run: Run, base: Tensors) -> Tensors:
    """Base weights with initial adapters: an engine is built from all tensors, and restoring then replaces
    the adapters.
    """
    return chain(base, initial_tensors(run.model, run.lora, run.train.seed))
