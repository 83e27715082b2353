"""Where a run of adapters begins: the weights that they belong to, and the adapters."""

import logging
from collections.abc import Iterable
from dataclasses import replace
from itertools import chain
from pathlib import Path

from torch import Tensor

from ascendspeed.checkpoint.discovery import Readers
from ascendspeed.checkpoint.load import Checkpoint
from ascendspeed.config.schema import LoraConfig, Run
from ascendspeed.conversion.checkpoint_reader import CheckpointReader
from ascendspeed.conversion.formats import peft, training_checkpoint
from ascendspeed.conversion.lora_adapter import check_base, initial, tensors_of
from ascendspeed.models.lora import targets
from ascendspeed.utils.errors import UserError

logger = logging.getLogger(__name__)

Tensors = Iterable[tuple[str, Tensor]]
SAME = ("lora_rank", "lora_alpha", "lora_target_modules")


def begin(run: Run, base: CheckpointReader, readers: Readers) -> tuple[Tensors, LoraConfig]:
    """Weights and fresh adapters, or those of --lora-load; what the run's checkpoints say of them."""
    lora = run.lora
    if lora.lora_base:
        raise UserError(
            f"--lora-base {lora.lora_base} belongs to a --load that holds adapters; this one holds weights"
        )
    lora = replace(lora, lora_base=str(Path(base.where).resolve()), lora_base_fingerprint=base.fingerprint())
    count = targets.parameter_count(run.model, lora)
    logger.info(
        f"adapters of rank {lora.lora_rank} on {' '.join(lora.lora_target_modules)}: {count} parameters are trained"
    )
    if not lora.lora_load:
        return chain(base.tensors(), initial(run.model, lora, run.train.seed)), lora
    found = peft.open_adapter(lora.lora_load, readers)
    check_base(found, f"--load {run.train.load}", lora.lora_base_fingerprint)
    logger.info(
        f"adapters from {lora.lora_load}{'' if found.fingerprint else ', which do not say whether they belong to these weights'}"
    )
    return chain(base.tensors(), list(tensors_of(found, run.model, lora))), lora


def check_kind(run: Run, found: Checkpoint) -> None:
    """Raises `UserError` where a checkpoint of adapters meets a run of all weights or of other adapters, or the other way round."""
    mine, theirs = run.lora, found.run.lora
    if not theirs.lora_rank:
        if mine.lora_rank and not run.train.finetune:
            raise UserError(
                f"{found.path} holds all weights of a model: to train adapters beside them add --finetune"
            )
        return
    flags = (
        f"--lora-rank {theirs.lora_rank} --lora-alpha {theirs.lora_alpha:g} "
        f"--lora-target-modules {' '.join(theirs.lora_target_modules)}"
    )
    if not mine.lora_rank and not run.train.finetune:
        raise UserError(
            f"{found.path} holds adapters: go on training them by {flags}, or all weights with the adapters in them by --finetune"
        )
    if mine.lora_rank and (differ := [name for name in SAME if getattr(mine, name) != getattr(theirs, name)]):
        raise UserError(
            f"{found.path} holds adapters of {flags}; {', '.join(differ)} cannot change: give these flags, "
            "or merge the adapters (tools/lora/merge_lora.py) and --load the result to train new ones"
        )


def go_on(run: Run, found: Checkpoint, readers: Readers) -> tuple[Tensors, LoraConfig]:
    """The weights that a checkpoint's adapters belong to, and what the run's checkpoints say of them."""
    if run.lora.lora_load:
        logger.info(
            f"note: --lora-load {run.lora.lora_load} is where the run began; the adapters are those of {found.path}"
        )
    base = training_checkpoint.base_of(found, run.lora.lora_base, readers)
    logger.info(f"weights beneath the adapters from {base.where} ({base.kind})")
    where = str(Path(base.where).resolve())
    return base.tensors(), replace(
        run.lora, lora_base=where, lora_base_fingerprint=found.run.lora.lora_base_fingerprint
    )
