"""Verifies a conversion: every byte through the parameter mappings, and logits of both models at reduced
depth.
"""

import platform
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ascendspeed.conversion import write
from ascendspeed.conversion.checkpoint_reader import CheckpointReader, full_slice
from ascendspeed.conversion.verify_logits import compare_logits
from ascendspeed.conversion.weights_identity import digest_blocks
from ascendspeed.models.param_mapping import Parameter, parameters
from ascendspeed.utils.errors import UserError
from ascendspeed.utils.progress import Advance, of_bytes, progress

VERSIONS = ("ascendspeed", "torch", "safetensors", "transformers")


def verify(
    source: CheckpointReader, result: CheckpointReader, dtype: torch.dtype | None = None
) -> dict[str, Any]:
    """Returns the report for conversion.json. Raises `UserError` naming what differs (after a cast to
    `dtype`).
    """
    hashes = compare(source, result, dtype)
    logits = compare_logits(source, result, dtype)
    cast = f", cast to {dtype}" if dtype else ""
    logits_verdict = f"logits not compared: {logits['skipped']}" if "skipped" in logits else "logits equal"
    return {
        "verdict": f"exact: every byte of {len(hashes)} parameters{cast}; {logits_verdict}",
        "from": {"kind": source.description, "folder": str(source.path), "family": source.config.family},
        "to": {
            "kind": result.description,
            "family": result.config.family,
            "files": _file_sizes(result.path),
        },
        "logits": logits,
        "versions": {"python": platform.python_version()} | {name: version(name) for name in VERSIONS},
        "sha256": hashes,
    }


def summary(report: dict[str, Any]) -> str:
    """One line on what a verification compared, and with what."""
    verdict = report["verdict"].removeprefix("exact: ")
    logits = report["logits"]
    if "skipped" in logits:
        return f"verified, {verdict}"
    return f"verified, {verdict} ({logits['source']} and {logits['result']}, {logits['layers']} layers)"


def _file_sizes(folder: Path) -> dict[str, int]:
    return {
        path.relative_to(folder).as_posix(): path.stat().st_size
        for path in sorted(folder.rglob("[!.]*"))
        if path.is_file()
    }


# ---------------------------------------------------------------- bytes


def compare(
    source: CheckpointReader, result: CheckpointReader, dtype: torch.dtype | None = None
) -> dict[str, str]:
    """Returns the SHA-256 of every full parameter (row-major, little-endian, without padding), equal on both
    sides.

    Raises `UserError` naming the first parameter that differs.
    """
    if replace(result.config, family=source.config.family) != source.config:
        raise UserError(f"verification failed: the result is {result.config}, the source {source.config}")
    known = list(parameters(source.config))
    with (
        progress(of_bytes("verifying"), source.size(dtype)) as advance,
        ThreadPoolExecutor(write.workers()) as pool,
    ):
        digests = pool.map(
            lambda parameter: _compare_parameter(source, result, parameter, dtype, advance), known
        )
        return {parameter.name: digest for parameter, digest in zip(known, digests, strict=True)}


def _compare_parameter(
    source: CheckpointReader,
    result: CheckpointReader,
    parameter: Parameter,
    dtype: torch.dtype | None,
    advance: Advance,
) -> str:
    name = parameter.name
    expected_type = dtype or source.dtypes[name]
    expected = digest_blocks(block.to(expected_type) for block in _blocks(source, parameter))
    actual = digest_blocks(_counted(_blocks(result, parameter), advance))
    if result.dtypes[name] != expected_type or expected != actual:
        raise UserError(f"verification failed: {name} is not what {source.path} holds; nothing was written")
    return expected


def _blocks(reader: CheckpointReader, parameter: Parameter) -> Iterator[Tensor]:
    for rows in write.row_blocks(full_slice(parameter), reader.dtypes[parameter.name]):
        yield reader.read_block(parameter.name, rows)


def _counted(blocks: Iterator[Tensor], advance: Advance) -> Iterator[Tensor]:
    for block in blocks:
        yield block
        advance(block.nbytes)
