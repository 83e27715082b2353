"""Where a run begins: its data, and the weights or the checkpoint that `--load` means."""

import dataclasses
import logging
import math
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from tempfile import NamedTemporaryFile

from torch import Tensor

from ascendspeed.checkpoint.discovery import Readers
from ascendspeed.checkpoint.fragment import TrainState
from ascendspeed.checkpoint.load import Checkpoint
from ascendspeed.checkpoint.paths import looks_like_checkpoint
from ascendspeed.checkpoint.save import SLACK
from ascendspeed.config import lr_schedule
from ascendspeed.config.schema import DataConfig, LoraConfig, Run
from ascendspeed.conversion.checkpoint_reader import CheckpointReader
from ascendspeed.conversion.formats import training_checkpoint
from ascendspeed.conversion.formats.registry import open_reader
from ascendspeed.conversion.lora_adapter import initial
from ascendspeed.data import dataset
from ascendspeed.data.dataset import Batch
from ascendspeed.data.handlers.registry import HANDLERS
from ascendspeed.data.streaming.prefetch import Prefetch
from ascendspeed.distributed.device import Device
from ascendspeed.distributed.process_groups import ProcessGrid
from ascendspeed.models import estimates
from ascendspeed.models.families import chat_template_beside
from ascendspeed.models.param_mapping import random_tensors
from ascendspeed.tokenization import tokenizer
from ascendspeed.training import lora_setup
from ascendspeed.utils.errors import UserError

logger = logging.getLogger(__name__)

Batches = Callable[[str, int], list[Batch]]
"""(split, consumed samples) -> this rank's micro-batches of the global batch that begins there."""
UNWATCHED = {
    "data_cache_path",
    "initial_loss_scale",
    "is_instruction_dataset",
    "strict",
}  # settings that do not change the curve of a resumed run
WATCHED_TRAIN = ("seed", "global_batch_size", "train_iters", "attention_dropout", "hidden_dropout")


@dataclass(frozen=True)
class Start:
    """Where a run begins."""

    tensors: Iterable[tuple[str, Tensor]] | None
    """Weights to fill the model with; None: `resume` brings them."""
    resume: Checkpoint | None = None
    lora: LoraConfig | None = None
    """Of a run of adapters: with the weights that they belong to."""

    def named(self, run: Run) -> Run:
        """The run as its checkpoints remember it."""
        return dataclasses.replace(run, lora=self.lora) if self.lora else run

    @property
    def state(self) -> TrainState:
        """Position in the run."""
        return self.resume.state if self.resume else TrainState(step=0, samples=0, tokens=0)


def with_chat_template(data: DataConfig) -> DataConfig:
    """Data settings with the chat template of the model that the tokenizer belongs to, for handlers that take one."""
    handler = HANDLERS.get(data.handler_name or "")
    takes_template = handler is not None and "chat_template" in handler.takes
    if data.chat_template or not data.tokenizer_name_or_path or not takes_template:
        return data
    return dataclasses.replace(data, chat_template=chat_template_beside(Path(data.tokenizer_name_or_path)))


def open_data(run: Run, grid: ProcessGrid) -> tuple[Run, Batches]:
    """The data of the run, and the run with the iterations that its --train-epochs are; tensor-parallel ranks of a replica see the
    same.

    Raises `UserError` for data or a tokenizer that are not there, or that do not fit each other or the model.
    """
    _check_tokenizer(run)
    size, wanted = run.train.global_batch_size, {"train": run.train.train_iters}
    if run.train.eval_interval:
        wanted["valid"] = run.train.eval_iters
    splits = dataset.build_splits(
        with_chat_template(run.data), run.train.seed, run.model.vocab_size, list(wanted)
    )
    if run.train.train_epochs:
        if splits["train"].estimated:
            raise UserError(
                "--train-epochs: how many samples text makes is known after it is tokenized; give --train-iters"
            )
        if len(splits["train"].passes(1)) > 1:
            raise UserError(
                "--train-epochs: data sets that are blended by weights end at different times; give --train-iters"
            )
        wanted["train"] = math.ceil(run.train.train_epochs * len(splits["train"]) / size)
        run = dataclasses.replace(run, train=dataclasses.replace(run.train, train_iters=wanted["train"]))
        lr_schedule.check(run.optim, run.train.train_iters)
        logger.info(f"--train-epochs {run.train.train_epochs:g}: {run.train.train_iters} iterations")
    for name, iterations in wanted.items():
        samples = len(splits[name])
        passes = [
            f"{often:.2f} passes over {prefix}" for prefix, often in splits[name].passes(iterations * size)
        ]
        often = f"{iterations} x {size} samples are {', '.join(passes)}"
        about = "about " if splits[name].estimated else ""
        logger.info(f"{name} data: {about}{samples} samples of {run.data.seq_length} tokens; {often}")
        for note in splits[name].notes:
            logger.info(f"{name} data: {note}")
    micro = run.train.micro_batch_size

    def batches(split: str, consumed: int) -> list[Batch]:
        return dataset.micro_batches(splits[split], consumed, size, micro, grid.dp_rank, grid.dp)

    return run, Prefetch(batches, size) if any(one.estimated for one in splits.values()) else batches


def _check_tokenizer(run: Run) -> None:
    path, rows = run.data.tokenizer_name_or_path, run.model.vocab_size
    if not path:
        return
    ids = tokenizer.load(path).vocab_size
    if ids > rows:
        raise UserError(f"--tokenizer-name-or-path {path} has {ids} ids, but the model's vocabulary {rows}")
    for _, prefix in chain(
        *(dataset.parse_blend(paths) for paths in (run.data.data_path, run.data.valid_data_path) if paths)
    ):
        made = dataset.dataset_facts(prefix).get("vocab_size", ids)
        if made != ids:
            raise UserError(
                f"{prefix} was made with a tokenizer of {made} ids, but --tokenizer-name-or-path {path} has {ids}"
            )


def find_start(run: Run, grid: ProcessGrid, device: Device) -> Start:
    """What `--load` means: a training checkpoint to continue (or, with --finetune, its weights), weights, or nothing yet.

    Raises `UserError` when there is nothing where it points, when `--save` holds another run that would be overwritten or cannot be
    written, and, on every rank, when the ranks do not see the same files.
    """
    load, save = run.train.load, run.train.save
    _check_views(run, grid)
    if save:
        _check_disk(run, grid)
        _try_disk(Path(save), grid)
    same = bool(load and save) and Path(load).resolve() == Path(save).resolve()
    if save and looks_like_checkpoint(save):
        if run.train.finetune:
            raise UserError(
                f"--save {save} already holds the checkpoints of a run; go on by --auto-resume; a new one needs another folder"
            )
        if not same:
            raise UserError(
                f"--save {save} already holds checkpoints: continue them with --load {save}, or choose another folder"
            )
    readers = Readers.of(grid)
    if load and looks_like_checkpoint(load):
        return _from_checkpoint(run, readers.open(load), grid, readers)
    if load and not (same and _is_empty(Path(load))):
        source = open_reader(load)
        logger.info(f"weights from {load} ({source.kind})")
        return _from_weights(run, source, readers)
    if run.lora.lora_rank:
        raise UserError(f"--lora-rank {run.lora.lora_rank}: adapters belong to weights; name these by --load")
    why = f"--load {load} is empty: a fresh start from" if load else "no --load:"
    logger.info(f"{why} random weights, seed {run.train.seed}")
    return Start(random_tensors(run.model, run.train.seed, device.torch))


def _check_views(run: Run, grid: ProcessGrid) -> None:
    """Whether all ranks would begin at the same place; where --auto-resume found a checkpoint on some only, --load differs."""
    load, save = run.train.load, run.train.save
    holds = {
        flag: bool(path) and looks_like_checkpoint(path) for flag, path in (("load", load), ("save", save))
    }
    views = grid.all_gather_object((load, run.train.finetune, holds))
    other = next((rank for rank, view in enumerate(views) if view != views[0]), None)
    if other is not None:
        told = "; ".join(
            f"rank {r}: --load {views[r][0]}, checkpoints in {_names(views[r][2])}" for r in (0, other)
        )
        raise UserError(
            f"the ranks do not see the same files there: {told}; --save and --load must lie on storage that all share"
        )


def _names(holds: dict[str, bool]) -> str:
    return " and ".join(f"--{flag}" for flag, held in holds.items() if held) or "neither"


def _try_disk(folder: Path, grid: ProcessGrid) -> None:
    """Every rank makes a file in --save, sees that of rank 0, and removes its own: what would fail at the first save, fails now."""
    made, wrong = None, ""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        made = NamedTemporaryFile(dir=folder, prefix=".try_", buffering=0)  # noqa: SIM115 - it lives until all have looked
        made.write(b"x")
    except OSError as error:
        wrong = f"{error.strerror}; choose another --save"
    first = grid.all_gather_object(made and Path(made.name).name)[0]
    if not wrong and first and not (folder / first).exists():
        wrong = "a file that rank 0 made is not seen; use storage that all nodes share"
    found = grid.all_gather_object(wrong)
    if made:
        made.close()
    if any(found):
        rank = next(rank for rank, one in enumerate(found) if one)
        raise UserError(f"--save {folder}: rank {rank} cannot save there: {found[rank]}")


def _check_disk(run: Run, grid: ProcessGrid) -> None:
    """Whether --save has room for a checkpoint, by its estimated size; a note when it has none for all that will be kept."""
    size, train = estimates.checkpoint_bytes(run.model, run.lora), run.train
    folder = Path(train.save).resolve()
    disk = next(p for p in (folder, *folder.parents) if p.is_dir())
    free = grid.all_gather_object(shutil.disk_usage(disk).free)[
        0
    ]  # one answer for all ranks, though others write there too
    numbers = (
        f"a checkpoint takes {size / 2**30:.2f} GiB, and {free / 2**30:.2f} GiB are free in {train.save}"
    )
    if size + SLACK > free:
        raise UserError(f"{numbers}; free some space or choose another --save")
    ends = train.exit_interval or train.train_iters
    kept = ends // (train.save_interval or ends) + bool(ends % (train.save_interval or ends))
    kept = min(kept, (train.keep or kept) + 1)  # an old one goes when the new one is whole
    if kept * size + SLACK > free:
        logger.info(
            f"note: {numbers}, which is not enough for the {kept} that will lie there at a time; see --keep and --save-interval"
        )


def _is_empty(folder: Path) -> bool:
    """Nothing there but what a killed save left, or a file system itself."""
    return not folder.exists() or (
        folder.is_dir() and all(p.name.startswith(".") or p.name == "lost+found" for p in folder.iterdir())
    )


def _from_weights(run: Run, source: CheckpointReader, readers: Readers) -> Start:
    if not run.lora.lora_rank:
        return Start(source.tensors())
    tensors, lora = lora_setup.begin(run, source, readers)
    return Start(tensors, lora=lora)


def _from_checkpoint(run: Run, found: Checkpoint, grid: ProcessGrid, readers: Readers) -> Start:
    theirs = dataclasses.replace(found.config, init_method_std=run.model.init_method_std)
    if theirs != run.model:
        raise UserError(f"{found.path} holds another model than this run: {theirs}, not {run.model}")
    adapted = bool(run.lora.lora_rank)
    lora_setup.check_kind(run, found)
    if run.train.finetune and not (adapted and found.run.lora.lora_rank):
        logger.info(f"weights from {found.path}; optimizer and position start anew (--finetune)")
        either = adapted or found.run.lora.lora_rank
        return (
            _from_weights(run, training_checkpoint.source_of(found, readers), readers)
            if either
            else Start(found.tensors())
        )
    tensors, lora = lora_setup.go_on(run, found, readers) if adapted else (None, None)
    if run.train.finetune:
        logger.info(f"adapters from {found.path}; optimizer and position start anew (--finetune)")
        return Start(chain(tensors, found.tensors()), lora=lora)
    _announce_changes(run, found.run)
    moved = (found.world, found.run.parallel.layout_key) != (grid.world, run.parallel.layout_key)
    if moved and (
        run.train.attention_dropout or run.train.hidden_dropout or (adapted and run.lora.lora_dropout)
    ):
        logger.info(
            "note: in another layout than that of the checkpoint, the dropout masks start anew from --seed"
        )
    logger.info(
        f"resumes from {found.path}: iteration {found.state.step}, {found.state.samples} samples consumed"
    )
    if adapted:  # the engine asks for all its weights; the checkpoint then brings the adapters
        tensors = chain(tensors, initial(run.model, run.lora, run.train.seed))
    return Start(tensors, found, lora)


def _announce_changes(run: Run, before: Run) -> None:
    """What changes the curve of a resumed run is said aloud; a new layout is not among it."""
    watched = [
        (group, f.name) for group in ("data", "optim") for f in dataclasses.fields(getattr(run, group))
    ]
    for group, name in [*watched, *(("train", name) for name in WATCHED_TRAIN), ("lora", "lora_dropout")]:
        old, new = getattr(getattr(before, group), name), getattr(getattr(run, group), name)
        if old != new and name not in UNWATCHED:
            logger.info(f"note: {name} was {old} when the checkpoint was saved and is {new} now")
