"""Checkpoints of MindFormers: MindSpore's `.ckpt`, one file with the whole model under MindFormers' names.

A `.ckpt` is a list of values in protobuf's encoding: a tag, and the dimensions, type and bytes of a tensor; a large tensor (over
512 MB) is several values of one tag, and read into memory. All others are mapped. Nothing in such a file could run.
"""

import math
import mmap
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ascendspeed.conversion import legacy_names, rank_files, support_matrix
from ascendspeed.conversion.checkpoint_reader import CheckpointReader, read_config
from ascendspeed.conversion.legacy_names import ATTENTION, LAYER, MLP
from ascendspeed.conversion.rank_files import NamingScheme, RankLayout
from ascendspeed.utils.errors import UserError
from ascendspeed.utils.text import shorten_list

TYPES = {"Float32": torch.float32, "Float16": torch.float16, "BFloat16": torch.bfloat16}
"""Of weights; tensors of other types (counters) are left where they are."""
JUNK = (
    r"(adam_[mv]|accu_grads)\..*",
    r"beta[12]_power|(epoch|step)_num|global_step|global_batch_size|learning_rate|loss_scale|scale_sense",
    r".*rotary_emb\.inv_freq",
)
OURS = "model.layers.{l}."


def _names(*qkv: str) -> Mapping[str, tuple[str, ...]]:
    attention = {kind: tuple(f"{OURS}attention.{name}.{kind}" for name in qkv) for kind in ("weight", "bias")}
    return {
        "embedding.word_embeddings.weight": ("model.tok_embeddings.embedding_weight",),
        LAYER + "input_layernorm.weight": (OURS + "attention_norm.weight",),
        ATTENTION + "linear_qkv.weight": attention["weight"],
        ATTENTION + "linear_qkv.bias": attention["bias"],
        ATTENTION + "linear_proj.weight": (OURS + "attention.wo.weight",),
        ATTENTION + "linear_proj.bias": (OURS + "attention.wo.bias",),
        LAYER + "pre_mlp_layernorm.weight": (OURS + "ffn_norm.weight",),
        MLP + "linear_fc1.weight": (OURS + "feed_forward.w1.weight", OURS + "feed_forward.w3.weight"),
        MLP + "linear_fc2.weight": (OURS + "feed_forward.w2.weight",),
        "decoder.final_layernorm.weight": ("model.norm_out.weight",),
        "output_layer.weight": ("lm_head.weight",),
    }


DIALECTS = tuple(
    NamingScheme(program, partial(legacy_names.rows, names=_names(*qkv)), JUNK)
    for program, qkv in (("MindFormers", ("wq", "wk", "wv")), ("MindFormers, --qkv_concat", ("w",)))
)
"""InternLM2's `w` is Hugging Face's `wqkv` as it stands, per key/value group [q..., k, v]."""


def is_one(folder: Path) -> bool:
    """Whether a folder holds a `.ckpt`."""
    return any(folder.glob("*.ckpt"))


def open_folder(folder: Path, config: Path) -> CheckpointReader:
    """Raises `UserError` naming what is missing, left over, mis-shaped or damaged; no tensor has been read by then."""
    files = sorted(folder.glob("*.ckpt"))
    if len(files) > 1:
        said = "only one that holds the whole model is read; merge the ranks' files with MindFormers first"
        raise UserError(f"{folder} holds {len(files)} .ckpt files: {said}")
    theirs, model = read_config(config)
    support_matrix.check("mindformers", "reads", model.family)
    tensors = read(files[0])
    fused = sorted(name for name in tensors if "w_qkv." in name or "w_gate_hidden." in name)
    if fused:
        said = "MindFormers has stored these in several orders, and they do not say in which: convert what they were fused from"
        raise UserError(f"{files[0]} holds {shorten_list(fused, 2)}: {said}")
    held = {(0, 0): tensors}
    dialect = rank_files.detect_naming(files[0], DIALECTS, model, held)
    source = rank_files.source(
        f"{dialect.name} .ckpt",
        folder,
        model,
        theirs,
        held,
        dialect,
        RankLayout(1, (model.num_layers,), model.vocab_size),
    )
    return source if config == folder else replace(source, beside=config)


class TensorChunk(NamedTuple):
    """One value of a file: (a piece of) a tensor."""

    tag: str
    kind: str
    shape: tuple[int, ...]
    offset: int
    length: int


def read(path: Path) -> dict[str, Tensor]:
    """Every tensor of weights in a file, mapped; one that lies in several pieces is put together. Raises `UserError`."""
    try:
        with open(path, "rb") as file:
            view = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        pieces: dict[str, list[TensorChunk]] = {}
        for value in _values(view):
            pieces.setdefault(value.tag, []).append(value)
        return {tag: _tensor(view, values) for tag, values in pieces.items() if values[0].kind in TYPES}
    except (OSError, ValueError, IndexError) as error:
        raise UserError(f"{path} is damaged, encrypted or no .ckpt of MindSpore: {error}") from None


def _tensor(view: mmap.mmap, values: list[TensorChunk]) -> Tensor:
    tag, kind, shape = values[0][:3]
    size = math.prod(shape) * TYPES[kind].itemsize
    if sum(value.length for value in values) != size or any(value[:3] != values[0][:3] for value in values):
        raise ValueError(
            f"{tag} has {sum(value.length for value in values)} bytes, not those of {list(shape)} {kind}"
        )
    if len(values) == 1:  # torch and numpy do not mind that the bytes are not aligned
        return torch.frombuffer(
            view, dtype=TYPES[kind], count=math.prod(shape), offset=values[0].offset
        ).view(shape)
    pieces = [
        torch.frombuffer(view, dtype=torch.uint8, count=value.length, offset=value.offset) for value in values
    ]
    return torch.cat(pieces).view(TYPES[kind]).view(shape)


def _values(view: mmap.mmap) -> Iterator[TensorChunk]:
    """Checkpoint { repeated Value value = 1 }, Value { string tag = 1; TensorProto tensor = 2 }."""
    for _, start, end in _fields(view, 0, len(view), {1: BYTES}):
        inner = {field: (a, b) for field, a, b in _fields(view, start, end, {1: BYTES, 2: BYTES})}
        yield _value(view, _text(view, *inner[1]), *inner[2])


def _value(view: mmap.mmap, tag: str, start: int, end: int) -> TensorChunk:
    """TensorProto { repeated int64 dims = 1; string tensor_type = 2; bytes tensor_content = 3 }."""
    shape, kind, content = [], "", (end, end)
    for field, a, b in _fields(view, start, end, {1: NUMBER, 2: BYTES, 3: BYTES}):
        if field == 1:
            shape.append(a)
        elif field == 2:
            kind = _text(view, a, b)
        else:
            content = (a, b)
    return TensorChunk(tag, kind, tuple(shape), content[0], content[1] - content[0])


NUMBER, BYTES = 0, 2
"""Kinds of a field in protobuf's encoding."""


def _fields(view: mmap.mmap, at: int, end: int, known: Mapping[int, int]) -> Iterator[tuple[int, int, int]]:
    """(number, value, 0) of the fields of one message that are numbers, (number, start, end) of those that are bytes."""
    while at < end:
        key, at = _number(view, at)
        field, kind = key >> 3, key & 7
        if known.get(field) != kind:
            raise ValueError(
                f"byte {at} should begin one of the fields {sorted(known)}, not {field} of kind {kind}"
            )
        value, at = _number(view, at)
        if kind == NUMBER:
            yield field, value, 0
            continue
        if at + value > end:
            raise ValueError(f"it ends before byte {at + value}")
        yield field, at, at + value
        at += value


def _number(view: mmap.mmap, at: int) -> tuple[int, int]:
    """A number of 7 bits a byte, the lowest first, and where it ends."""
    value = shift = 0
    while shift < 64:
        byte = view[at]
        value, shift, at = value | (byte & 127) << shift, shift + 7, at + 1
        if byte < 128:
            return value, at
    raise ValueError(f"no number at byte {at}")


def _text(view: mmap.mmap, start: int, end: int) -> str:
    return view[start:end].decode()
