"""Records the content of what a run reads (data, tokenizer, DeepSpeed's JSON), and describes what has changed
when its checkpoint is continued."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from ascendspeed.config.schema import Run
from ascendspeed.data import dataset
from ascendspeed.distributed.process_groups import ProcessGrid
from ascendspeed.tokenization import tokenizer
from ascendspeed.tokenization.fingerprint import hash_encoding
from ascendspeed.training.engines.deepspeed_config import read_additions
from ascendspeed.utils.errors import UserError

ABSENT = "absent"
"""Value of a key that a file does not have, in notes."""


def with_inputs(run: Run, grid: ProcessGrid) -> Run:
    """The run with the record of what it reads; on rank 0, which writes the checkpoints' run.json."""
    _check_revisions(run, grid)
    if grid.rank:
        return run
    data, config = run.data, run.parallel.deepspeed_config
    tokenizer_path = data.tokenizer_name_or_path
    record = replace(
        run.inputs,
        data=_hash_blend(data.data_path),
        valid_data=_hash_blend(data.valid_data_path),
        tokenizer=hash_encoding(tokenizer.load(tokenizer_path)) if tokenizer_path else None,
        deepspeed_config=json.dumps(read_additions(config), sort_keys=True) if config else None,
    )
    return replace(run, inputs=record)


def _check_revisions(run: Run, grid: ProcessGrid) -> None:
    """Raises UserError on every rank if nodes have fetched different commits of a model."""
    if run.inputs.hub and grid.world > 1:
        commits = set(grid.all_gather_object(run.inputs.hub))
        if len(commits) > 1:
            texts = " and ".join(", ".join(names) for names in sorted(commits))
            raise UserError(f"the nodes have fetched different commits, {texts}; name one: NAME@COMMIT")


def _hash_blend(paths: tuple[str, ...]) -> tuple[str, ...]:
    blend = dataset.parse_blend(paths) if paths else []
    return tuple(dataset.hash_dataset(path) for _, path in blend)


def changes(saved: Run, run: Run) -> Iterator[str]:
    """Yields what a resumed run reads otherwise than the one that saved the checkpoint, where both recorded
    it."""
    old, new = saved.inputs, run.inputs
    for name in ("data", "valid_data"):
        before, now = getattr(old, name), getattr(new, name)
        if len(before) == len(now):  # otherwise the paths have changed, which is reported by itself
            blend = dataset.parse_blend(getattr(run.data, f"{name}_path")) if now else []
            for (_, path), was, is_now in zip(blend, before, now, strict=True):
                if was != is_now:
                    yield f"{path} holds other data than when the checkpoint was saved"
    if old.tokenizer and new.tokenizer and old.tokenizer != new.tokenizer:
        yield (
            f"the tokenizer in {run.data.tokenizer_name_or_path} encodes text otherwise than when the "
            "checkpoint was saved"
        )
    if old.data:  # the record exists
        before, now = (_flatten(json.loads(record.deepspeed_config or "{}")) for record in (old, new))
        for key in sorted({*before, *now}):
            was, is_now = before.get(key, ABSENT), now.get(key, ABSENT)
            if was != is_now:
                yield f"--deepspeed_config: {key} was {was} when the checkpoint was saved and is {is_now} now"


def _flatten(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns the values of nested tables by dotted key."""
    values: dict[str, Any] = {}
    for key, value in table.items():
        values |= (
            _flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
        )
    return values
