"""Opens the data of a run and gives each rank its micro-batches."""

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from ascendspeed.cli.observation_checks import notes_of_length
from ascendspeed.config import lr_schedule
from ascendspeed.config.batch_schedule import batch_size_at
from ascendspeed.config.schema import DataConfig, Run, TrainConfig
from ascendspeed.data import dataset
from ascendspeed.data.dataset import Batch
from ascendspeed.data.handlers.registry import HANDLERS
from ascendspeed.data.indexed.megatron_pair import ENCODING_FACT
from ascendspeed.data.streaming.prefetch import Prefetch
from ascendspeed.distributed.process_groups import ProcessGrid
from ascendspeed.models.families import chat_template_beside
from ascendspeed.tokenization import tokenizer
from ascendspeed.tokenization.chat import TEMPLATES, choose_template
from ascendspeed.tokenization.fingerprint import hash_encoding
from ascendspeed.tokenization.vocab_check import check_vocab_size
from ascendspeed.utils.errors import UserError

logger = logging.getLogger(__name__)

BatchFunction = Callable[[str, int], list[Batch]]
"""(split, consumed samples) -> this rank's micro-batches of the global batch that begins there."""


def with_chat_template(data: DataConfig) -> DataConfig:
    """Data settings with the chat template of the model that the tokenizer belongs to, for handlers that take
    one.
    """
    if data.chat_template or not data.tokenizer_name_or_path or not _takes_template(data):
        return data
    return replace(data, chat_template=chat_template_beside(Path(data.tokenizer_name_or_path)))


def recorded_template(data: DataConfig) -> str | None:
    """Name of the chat template that the training data are in, for run.json: exports need it.

    Logs a note if the data name several; the first one counts.
    """
    paths = [path for _, path in dataset.parse_blend(data.data_path)]
    names = [dataset.dataset_facts(path).get("chat_template") for path in paths]
    if _takes_template(data) and data.tokenizer_name_or_path:
        loaded = tokenizer.load(data.tokenizer_name_or_path)
        names.append(choose_template(loaded, with_chat_template(data).chat_template)[0])
    templates = list(dict.fromkeys(name for name in names if name in TEMPLATES))
    if len(templates) > 1:
        logger.info(
            f"note: the training data are in several chat templates ({', '.join(templates)}); exports will "
            f"have the first one"
        )
    return next(iter(templates), None)


def _takes_template(data: DataConfig) -> bool:
    """True if the handler of data that are tokenized during training takes a chat template."""
    handler = HANDLERS.get(data.handler_name or "")
    return handler is not None and "chat_template" in handler.accepted_settings


def open_data(run: Run, grid: ProcessGrid) -> tuple[Run, BatchFunction]:
    """Opens the data. Returns the run, with --train-epochs resolved to iterations, and its batches.

    The tensor-parallel ranks of a replica get the same samples. Raises `UserError` if data or tokenizer are
    missing, or do not match each other or the model.
    """
    _check_tokenizer(run)
    iterations = {"train": run.train.train_iters}
    if run.train.eval_interval:
        iterations["valid"] = run.train.eval_iters
    splits = dataset.build_splits(
        with_chat_template(run.data),
        run.train.seed,
        run.model.vocab_size,
        list(iterations),
        run.preference.trains_on_pairs,
    )
    _note_shared_files(run.data)
    run = replace(run, data=replace(run.data, chat_template=recorded_template(run.data)))
    if run.train.train_epochs:
        run = _with_iterations(run, splits["train"])
        iterations["train"] = run.train.train_iters
    for name, count in iterations.items():
        _log_split(run, name, splits[name], count)
    batches = SplitBatches(splits, run.train, grid)
    sizes = partial(batch_size_at, run.train)
    is_streamed = any(split.estimated for split in splits.values())
    return run, Prefetch(batches, sizes) if is_streamed else batches


@dataclass(frozen=True)
class SplitBatches:
    """Micro-batches of this rank in every split: a `BatchFunction`."""

    splits: dict[str, dataset.BlendedSamples]
    train: TrainConfig
    grid: ProcessGrid

    def __call__(self, split: str, consumed: int) -> list[Batch]:
        train, grid = self.train, self.grid
        size = batch_size_at(train, consumed) if split == "train" else train.global_batch_size
        return dataset.micro_batches(
            self.splits[split], consumed, size, train.micro_batch_size, grid.dp_rank, grid.dp
        )


def _with_iterations(run: Run, samples: dataset.BlendedSamples) -> Run:
    """The run with --train-iters computed from --train-epochs.

    Raises `UserError` if an epoch has no known length.
    """
    if samples.estimated:
        raise UserError(
            "--train-epochs: the number of samples of streamed text is known only after it is tokenized; "
            "give --train-iters"
        )
    if len(samples.passes(1)) > 1:
        raise UserError(
            "--train-epochs: the data sets of a weighted blend have no common epoch; give --train-iters"
        )
    count = math.ceil(run.train.train_epochs * len(samples) / run.train.global_batch_size)
    lr_schedule.check(run.optim, count)
    logger.info(f"--train-epochs {run.train.train_epochs:g}: {count} iterations")
    run = replace(run, train=replace(run.train, train_iters=count))
    for note in notes_of_length(run.train):
        logger.info(f"note: {note}")
    return run


def _log_split(run: Run, name: str, samples: dataset.BlendedSamples, iterations: int) -> None:
    size = run.train.global_batch_size
    total = run.train.train_samples if name == "train" else None
    passes = [
        f"{number:.2f} passes over {prefix}" for prefix, number in samples.passes(total or iterations * size)
    ]
    about = "about " if samples.estimated else ""
    logger.info(
        f"{name} data: {about}{len(samples)} samples of {run.data.seq_length} tokens; "
        f"{total or f'{iterations} x {size}'} samples are {', '.join(passes)}"
    )
    for note in samples.notes:
        logger.info(f"{name} data: {note}")


def _note_shared_files(data: DataConfig) -> None:
    """Logs a note if validation data are training data too."""
    files = []
    for paths in (data.data_path, data.valid_data_path):
        blend = dataset.parse_blend(paths) if paths else []
        files.append({file.resolve() for _, path in blend for file in dataset.dataset_files(path)})
    shared = sorted(files[0] & files[1])
    if shared:
        logger.info(
            f"note: --valid-data-path: {len(shared):,} of its {len(files[1]):,} files are training data too "
            f"({shared[0]}), so the validation loss is that of text which is trained on"
        )


def _check_tokenizer(run: Run) -> None:
    """Raises `UserError` if the tokenizer has more ids than the model, or is another one than that which made
    the data.
    """
    path, rows = run.data.tokenizer_name_or_path, run.model.vocab_size
    if not path:
        return
    loaded = tokenizer.load(path, run.data.parse_special_tokens)
    ids = loaded.vocab_size
    too_large = f"--tokenizer-name-or-path {path} has {ids} ids, but the model's vocabulary {rows}"
    for note in check_vocab_size(loaded, rows, too_large):
        logger.info(f"note: {note}")
    encoding = hash_encoding(loaded)
    for paths in (run.data.data_path, run.data.valid_data_path):
        for _, prefix in dataset.parse_blend(paths) if paths else ():
            facts = dataset.dataset_facts(prefix)
            data_ids = facts.get("vocab_size", ids)
            if data_ids != ids:
                raise UserError(
                    f"{prefix} was made with a tokenizer of {data_ids} ids, but --tokenizer-name-or-path "
                    f"{path} has {ids}"
                )
            if facts.get(ENCODING_FACT, encoding) != encoding:
                raise UserError(
                    f"{prefix} was made with another tokenizer than --tokenizer-name-or-path {path}: both "
                    f"have {ids} ids, but they encode text differently; give the tokenizer of the data, or "
                    "preprocess again"
                )
