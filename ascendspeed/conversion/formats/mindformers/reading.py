"""Reads MindFormers' `.ckpt` files.

A `.ckpt` is a list of values in protobuf's encoding: a tag, and the dimensions, type and bytes of a tensor. A
large tensor (over 512 MB) is several values of one tag and is read into memory; all others are memory-mapped.
The encoding holds no code.
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

from ascendspeed.conversion import legacy_names, rank_file_reader, rank_files
from ascendspeed.conversion.checkpoint_reader import CheckpointReader, read_config
from ascendspeed.conversion.formats.base import CheckpointFormat
from ascendspeed.conversion.legacy_names import ATTENTION, LAYER, MLP
from ascendspeed.conversion.rank_files import NamingScheme, RankLayout
from ascendspeed.utils.errors import UserError
from ascendspeed.utils.text import shorten_list

TYPES = {"Float32": torch.float32, "Float16": torch.float16, "BFloat16": torch.bfloat16}
"""Types of weights; tensors of other types (counters) are skipped."""
IGNORED = (
    r"(adam_[mv]|accu_grads)\..*",
    r"beta[12]_power|(epoch|step)_num|global_step|global_batch_size|learning_rate|loss_scale|scale_sense",
    r".*rotary_emb\.inv_freq",
)
PREFIX = "model.layers.{l}."
NUMBER = 0
"""Wire type of an integer in protobuf's encoding."""
BYTES = 2
"""Wire type of bytes, strings and messages."""


def _names(*qkv: str) -> Mapping[str, tuple[str, ...]]:
    """Megatron-core name -> MindFormers' names; `qkv`: modules of q, k and v, or the fused one."""
    attention = {
        kind: tuple(f"{PREFIX}attention.{name}.{kind}" for name in qkv) for kind in ("weight", "bias")
    }
    return {
        "embedding.word_embeddings.weight": ("model.tok_embeddings.embedding_weight",),
        LAYER + "input_layernorm.weight": (PREFIX + "attention_norm.weight",),
        ATTENTION + "linear_qkv.weight": attention["weight"],
        ATTENTION + "linear_qkv.bias": attention["bias"],
        ATTENTION + "linear_proj.weight": (PREFIX + "attention.wo.weight",),
        ATTENTION + "linear_proj.bias": (PREFIX + "attention.wo.bias",),
        LAYER + "pre_mlp_layernorm.weight": (PREFIX + "ffn_norm.weight",),
        MLP + "linear_fc1.weight": (PREFIX + "feed_forward.w1.weight", PREFIX + "feed_forward.w3.weight"),
        MLP + "linear_fc2.weight": (PREFIX + "feed_forward.w2.weight",),
        "decoder.final_layernorm.weight": ("model.norm_out.weight",),
        "output_layer.weight": ("lm_head.weight",),
    }


NAMING_SCHEMES = tuple(
    NamingScheme(program, partial(legacy_names.rows, names=_names(*qkv)), IGNORED)
    for program, qkv in (("MindFormers", ("wq", "wk", "wv")), ("MindFormers, --qkv_concat", ("w",)))
)
"""InternLM2's `w` is Hugging Face's `wqkv`, per key/value group [q..., k, v]."""


def open_ckpt(folder: Path, config_dir: Path, form: CheckpointFormat) -> CheckpointReader:
    """Opens a folder with one `.ckpt`.

    Raises `UserError` naming tensors that are missing, superfluous, mis-shaped or damaged; reads none.
    """
    files = sorted(folder.glob("*.ckpt"))
    if len(files) > 1:
        raise UserError(
            f"{folder} holds {len(files)} .ckpt files: only one that holds the whole model is read; "
            "merge the ranks' files with MindFormers first"
        )
    config_json, config = read_config(config_dir)
    form.check_family(config.family, "read")
    tensors = read(files[0])
    fused = sorted(name for name in tensors if "w_qkv." in name or "w_gate_hidden." in name)
    if fused:
        raise UserError(
            f"{files[0]} holds {shorten_list(fused, 2)}: MindFormers has stored these in several orders, "
            "and they do not say in which: convert what they were fused from"
        )
    rank_tensors = {(0, 0): tensors}
    scheme = rank_files.detect_naming(files[0], NAMING_SCHEMES, config, rank_tensors)
    layout = RankLayout(1, (config.num_layers,), config.vocab_size)
    reader = rank_file_reader.open_reader(
        f"{scheme.name} .ckpt", folder, config, config_json, rank_tensors, scheme, layout
    )
    return replace(reader, assets_dir=config_dir)


class TensorChunk(NamedTuple):
    """One value of a file: a tensor, or a part of one."""

    tag: str
    kind: str
    shape: tuple[int, ...]
    offset: int
    length: int


def read(path: Path) -> dict[str, Tensor]:
    """Reads every tensor of weights in a file, memory-mapped; the parts of a large one are concatenated.
    Raises `UserError`.
    """
    try:
        with open(path, "rb") as file:
            view = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        chunks_of: dict[str, list[TensorChunk]] = {}
        for chunk in _chunks(view):
            chunks_of.setdefault(chunk.tag, []).append(chunk)
        return {tag: _tensor(view, chunks) for tag, chunks in chunks_of.items() if chunks[0].kind in TYPES}
    except (OSError, ValueError, IndexError) as error:
        raise UserError(f"{path} is damaged, encrypted or no .ckpt of MindSpore: {error}") from None


def _tensor(view: mmap.mmap, chunks: list[TensorChunk]) -> Tensor:
    tag, kind, shape = chunks[0][:3]
    dtype = TYPES[kind]
    size = math.prod(shape) * dtype.itemsize
    actual = sum(chunk.length for chunk in chunks)
    if actual != size or any(chunk[:3] != chunks[0][:3] for chunk in chunks):
        raise ValueError(f"{tag} has {actual} bytes, not those of {list(shape)} {kind}")
    if len(chunks) == 1:  # torch and numpy accept unaligned bytes
        flat = torch.frombuffer(view, dtype=dtype, count=math.prod(shape), offset=chunks[0].offset)
        return flat.view(shape)
    parts = [
        torch.frombuffer(view, dtype=torch.uint8, count=chunk.length, offset=chunk.offset) for chunk in chunks
    ]
    return torch.cat(parts).view(dtype).view(shape)


# ---------------------------------------------------------------- protobuf


def _chunks(view: mmap.mmap) -> Iterator[TensorChunk]:
    """Message Checkpoint { repeated Value value = 1 }, Value { string tag = 1; TensorProto tensor = 2 }."""
    for _, start, end in _fields(view, 0, len(view), {1: BYTES}):
        spans = {number: (a, b) for number, a, b in _fields(view, start, end, {1: BYTES, 2: BYTES})}
        yield _chunk(view, _text(view, *spans[1]), *spans[2])


def _chunk(view: mmap.mmap, tag: str, start: int, end: int) -> TensorChunk:
    """Message TensorProto { repeated int64 dims = 1; string tensor_type = 2; bytes tensor_content = 3 }."""
    shape: list[int] = []
    kind = ""
    content = (end, end)
    for number, a, b in _fields(view, start, end, {1: NUMBER, 2: BYTES, 3: BYTES}):
        if number == 1:
            shape.append(a)
        elif number == 2:
            kind = _text(view, a, b)
        else:
            content = (a, b)
    return TensorChunk(tag, kind, tuple(shape), content[0], content[1] - content[0])


def _fields(
    view: mmap.mmap, position: int, end: int, known: Mapping[int, int]
) -> Iterator[tuple[int, int, int]]:
    """Yields (number, value, 0) of the integer fields of one message, and (number, start, end) of the byte
    fields.
    """
    while position < end:
        key, position = _varint(view, position)
        number = key >> 3
        wire_type = key & 7
        if known.get(number) != wire_type:
            raise ValueError(
                f"byte {position} should begin one of the fields {sorted(known)}, not {number} of kind "
                f"{wire_type}"
            )
        value, position = _varint(view, position)
        if wire_type == NUMBER:
            yield number, value, 0
            continue
        if position + value > end:
            raise ValueError(f"it ends before byte {position + value}")
        yield number, position, position + value
        position += value


def _varint(view: mmap.mmap, position: int) -> tuple[int, int]:
    """Decodes an integer of 7 bits a byte, lowest first; returns it and the position behind it."""
    value = 0
    for shift in range(0, 64, 7):
        byte = view[position]
        position += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, position
    raise ValueError(f"no number at byte {position}")


def _text(view: mmap.mmap, start: int, end: int) -> str:
    return view[start:end].decode()
